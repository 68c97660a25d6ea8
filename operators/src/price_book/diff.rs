//! What a list of entries would change, for a look before it is applied.

use super::book::{PriceBook, Prices};
use super::entry::{EntryError, PRICE_FIELDS, Price, PriceEntry, check_entries};

/// A list of entries compared with a book.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PriceDiff {
    /// Entries of keys that have no price at the entry's start.
    pub new: Vec<PriceEntry>,
    /// Entries that change a price that is in force at the entry's start.
    pub changed: Vec<EntryChange>,
    /// Entries whose prices, fall-backs included, are in force already.
    pub same: usize,
}

/// One entry that changes prices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntryChange {
    /// The entry.
    pub entry: PriceEntry,
    /// The prices that change, in the order of the meters.
    pub changes: Vec<PriceChange>,
}

/// One price that changes, per unit and with fall-backs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PriceChange {
    /// Field of the price.
    pub field: &'static str,
    /// Price in force.
    pub old: Option<Price>,
    /// Price of the entry.
    pub new: Option<Price>,
    /// Change in hundredths of a percent of the old price, towards zero; absent without two prices
    /// or when the old one is zero.
    pub basis_points: Option<i128>,
}

impl PriceBook {
    /// Compares entries with the entries of the same key in force at their starts.
    ///
    /// # Errors
    /// Everything that is wrong with the entries.
    pub fn diff(&self, entries: &[PriceEntry]) -> Result<PriceDiff, Vec<EntryError>> {
        check_entries(entries)?;
        let mut diff = PriceDiff::default();
        for entry in entries {
            let old = self.before(entry).map(Prices::of).unwrap_or_default();
            let new = Prices::of(entry);
            if old == new {
                diff.same += 1;
            } else if old == Prices::default() {
                diff.new.push(entry.clone());
            } else {
                let changes = changes(&old, &new);
                diff.changed.push(EntryChange { entry: entry.clone(), changes });
            }
        }
        Ok(diff)
    }
}

fn changes(old: &Prices, new: &Prices) -> Vec<PriceChange> {
    let pairs = old.per_unit.into_iter().zip(new.per_unit);
    let differing = PRICE_FIELDS.into_iter().zip(pairs).filter(|(_, (old, new))| old != new);
    differing
        .map(|(field, (old, new))| {
            let basis_points = match (old, new) {
                // Both are at most 10^22, by the check.
                (Some(old), Some(new)) if old.get() != 0 => {
                    Some((new.get() - old.get()) * 10_000 / old.get())
                }
                _ => None,
            };
            PriceChange { field, old: old.map(Price::new), new: new.map(Price::new), basis_points }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time::Time;

    fn entry(input: Option<&str>, from: Option<&str>) -> PriceEntry {
        PriceEntry {
            provider: "p".into(),
            model: "m".into(),
            input: input.map(|text| Price::per_million(text).unwrap()),
            effective_from: from.map(|text| Time::parse(text).unwrap()),
            ..PriceEntry::default()
        }
    }

    #[test]
    fn new_changed_and_same_are_told_apart() {
        let mut book = PriceBook::new();
        let later = Some("2026-02-01T00:00:00Z");
        assert_eq!(book.diff(&[entry(Some("2"), later)]).unwrap().new.len(), 1);
        book.apply(&[entry(Some("2"), None)], 1).unwrap();
        assert_eq!(book.diff(&[entry(Some("2"), later)]).unwrap().same, 1);
        // The fall-back written out changes nothing.
        let mut written_out = entry(Some("2"), later);
        written_out.cached_input = written_out.input;
        assert_eq!(book.diff(&[written_out]).unwrap().same, 1);

        let diff = book.diff(&[entry(Some("2.5"), later)]).unwrap();
        let changes = &diff.changed[0].changes;
        let fields: Vec<_> = changes.iter().map(|change| change.field).collect();
        assert_eq!(
            fields,
            ["input", "cached_input", "cache_write", "cache_write_1h", "audio_input"]
        );
        assert_eq!(changes[0].old.unwrap().to_per_million(), "2");
        assert_eq!(changes[0].new.unwrap().to_per_million(), "2.5");
        assert_eq!(changes[0].basis_points, Some(2_500));

        let withdrawn = book.diff(&[entry(None, later)]).unwrap();
        assert_eq!(withdrawn.changed[0].changes[0].new, None);
        assert!(book.diff(&[entry(Some("-1"), None)]).is_err());
    }
}
