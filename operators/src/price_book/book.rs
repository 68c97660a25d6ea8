//! The book: entries by key and start, and the piecewise constant prices they amount to.

use std::collections::{BTreeMap, BTreeSet};

use crate::event::{CONTEXT_BOUNDS, METERS, Meter, Meters, Tier};
use crate::money::Atto;
use crate::time::{Slot, Time};

use super::entry::{EntryError, PriceEntry, check_entries};

/// Price of one unit of each meter, indexed by `Meter as usize`, fall-backs applied; absent where no
/// price is known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Prices {
    /// The prices.
    pub per_unit: [Option<Atto>; METERS],
}

impl Prices {
    /// The prices of an entry, fall-backs inside the entry applied.
    pub fn of(entry: &PriceEntry) -> Prices {
        let per_unit = |price: Option<super::Price>| price.map(super::Price::get);
        let (input, output) = (per_unit(entry.input), per_unit(entry.output));
        let cache_write = per_unit(entry.cache_write).or(input);
        Prices {
            per_unit: [
                input,
                per_unit(entry.cached_input).or(input),
                cache_write,
                per_unit(entry.cache_write_1h).or(cache_write),
                output,
                per_unit(entry.reasoning).or(output),
                per_unit(entry.audio_input).or(input),
                per_unit(entry.audio_output).or(output),
                per_unit(entry.image),
                per_unit(entry.search),
            ],
        }
    }

    /// The price of one unit of a meter.
    pub fn get(&self, meter: Meter) -> Option<Atto> {
        self.per_unit[meter as usize]
    }

    /// Cost of the meters that have a price, and the set of those used but without one (bit
    /// `Meter as usize`).
    pub fn cost(&self, meters: &Meters) -> (Atto, u16) {
        let mut cost = Atto::ZERO;
        let mut lacking = 0;
        for (meter, count) in meters.iter().enumerate() {
            match self.per_unit[meter] {
                Some(price) => cost += price * i64::from(*count),
                None => lacking |= u16::from(*count > 0) << meter,
            }
        }
        (cost, lacking)
    }
}

/// What a price is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RateKey<'a> {
    /// The org that made the request.
    pub org: &'a str,
    /// Provider.
    pub provider: &'a str,
    /// Model.
    pub model: &'a str,
    /// Service tier.
    pub tier: Tier,
    /// Class of the request's input size, an index into [`CONTEXT_BOUNDS`]; a larger one counts as
    /// the last.
    pub context: u8,
}

/// Prices over event time: each holds from its slot to the next one's. The first slot is
/// [`Slot::MIN`], slots ascend, neighbours differ. `None`: nothing is known.
pub type Timeline = Vec<(Slot, Option<Prices>)>;

/// All price knowledge. See [`crate::price_book`] for the rules.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PriceBook {
    /// By provider, then model.
    models: BTreeMap<String, BTreeMap<String, ModelBook>>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct ModelBook {
    everyone: Rows,
    orgs: BTreeMap<String, Rows>,
}

/// Entries of one model and org, by tier and `min_input_tokens`, then by start.
type Rows = BTreeMap<(Tier, u64), BTreeMap<Slot, Held>>;

#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    entry: PriceEntry,
    /// `None`: a withdrawal.
    prices: Option<Prices>,
    position: u64,
}

fn start(entry: &PriceEntry) -> Slot {
    entry.effective_from.unwrap_or(Time::MIN).slot()
}

impl PriceBook {
    /// A book that knows nothing.
    pub fn new() -> PriceBook {
        PriceBook::default()
    }

    /// Takes in a list of entries, learned at `position` of the control log: all of them or none.
    /// Returns the (provider, model) pairs with an entry that is new or differs from what was held,
    /// ascending; an entry already held as it is keeps its earlier position.
    ///
    /// # Errors
    /// Everything that is wrong with the entries; the book is then unchanged.
    pub fn apply(
        &mut self,
        entries: &[PriceEntry],
        position: u64,
    ) -> Result<Vec<(String, String)>, Vec<EntryError>> {
        check_entries(entries)?;
        let mut touched = BTreeSet::new();
        for entry in entries {
            let models = self.models.entry(entry.provider.clone()).or_default();
            let book = models.entry(entry.model.clone()).or_default();
            let rows = match &entry.org {
                None => &mut book.everyone,
                Some(org) => book.orgs.entry(org.clone()).or_default(),
            };
            let row = rows.entry((entry.tier, entry.min_input_tokens)).or_default();
            let from = start(entry);
            if row.get(&from).is_some_and(|held| held.entry == *entry) {
                continue;
            }
            let prices = (!entry.withdraws()).then(|| Prices::of(entry));
            row.insert(from, Held { entry: entry.clone(), prices, position });
            touched.insert((entry.provider.clone(), entry.model.clone()));
        }
        Ok(touched.into_iter().collect())
    }

    /// What requests of one kind cost over event time.
    pub fn timeline(&self, key: &RateKey<'_>) -> Timeline {
        let Some(book) = self.models.get(key.provider).and_then(|models| models.get(key.model))
        else {
            return vec![(Slot::MIN, None)];
        };
        let context = usize::from(key.context).min(CONTEXT_BOUNDS.len() - 1);
        let bound = CONTEXT_BOUNDS[context];
        // The rows that may decide, the one that decides first in front.
        let mut rows = Vec::new();
        for book in book.orgs.get(key.org).into_iter().chain([&book.everyone]) {
            let mut tiers = vec![key.tier];
            if key.tier != Tier::Standard {
                tiers.push(Tier::Standard);
            }
            for tier in tiers {
                rows.extend(book.range((tier, 0)..=(tier, bound)).rev().map(|(_, row)| row));
            }
        }
        let mut starts: Vec<Slot> = rows.iter().flat_map(|row| row.keys().copied()).collect();
        starts.push(Slot::MIN);
        starts.sort_unstable();
        starts.dedup();
        let mut timeline: Timeline = Vec::with_capacity(starts.len());
        for slot in starts {
            let prices = rows.iter().find_map(|row| in_force(row, slot)?.prices);
            if timeline.last().is_none_or(|(_, before)| *before != prices) {
                timeline.push((slot, prices));
            }
        }
        timeline
    }

    /// The prices of one kind of request at one instant.
    pub fn at(&self, key: &RateKey<'_>, slot: Slot) -> Option<Prices> {
        let timeline = self.timeline(key);
        let next = timeline.partition_point(|(from, _)| *from <= slot);
        timeline[next - 1].1
    }

    /// All entries, or those of one model (whichever provider), ascending by provider, model, org
    /// (entries for everyone first), tier, `min_input_tokens` and start.
    pub fn entries(&self, model: Option<&str>) -> Vec<PriceEntry> {
        self.held(model).map(|held| held.entry.clone()).collect()
    }

    /// As [`PriceBook::entries`], each with the control position it came by. Applying them again one
    /// by one with their positions rebuilds the book.
    pub fn listing(&self, model: Option<&str>) -> Vec<(PriceEntry, u64)> {
        self.held(model).map(|held| (held.entry.clone(), held.position)).collect()
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.held(None).count()
    }

    /// Whether it knows nothing.
    pub fn is_empty(&self) -> bool {
        self.models.is_empty()
    }

    fn held<'a>(&'a self, model: Option<&'a str>) -> impl Iterator<Item = &'a Held> {
        let models = self.models.values().flatten();
        let wanted = models.filter(move |(name, _)| model.is_none_or(|model| model == *name));
        let rows =
            wanted.flat_map(|(_, book)| [&book.everyone].into_iter().chain(book.orgs.values()));
        rows.flat_map(|rows| rows.values().flat_map(|row| row.values()))
    }

    /// The entry of the same key in force at the start of `entry`.
    pub(super) fn before(&self, entry: &PriceEntry) -> Option<&PriceEntry> {
        let book = self.models.get(&entry.provider)?.get(&entry.model)?;
        let rows = match &entry.org {
            None => &book.everyone,
            Some(org) => book.orgs.get(org)?,
        };
        let row = rows.get(&(entry.tier, entry.min_input_tokens))?;
        in_force(row, start(entry)).map(|held| &held.entry)
    }
}

fn in_force(row: &BTreeMap<Slot, Held>, slot: Slot) -> Option<&Held> {
    row.range(..=slot).next_back().map(|(_, held)| held)
}
