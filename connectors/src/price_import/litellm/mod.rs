//! LiteLLM's price map: a JSON object, key = model, prices in USD per single unit as JSON numbers.
//!
//! Numbers are read as decimal text and never become floats. The files beside this one have the
//! rules: `names.rs` what a model is called in events, `rates.rs` what its fields amount to. A field
//! counts as carried over when a rate was taken from it or when it says the same as one that was;
//! every other field that speaks of money is reported.

use std::collections::{BTreeMap, BTreeSet};

use meterr_operators::price_book::{PriceEntry, check_entries};
use meterr_operators::time::Time;
use serde_json::{Map, Value};

use super::{EXAMPLES_MAX, Import, PriceImportError, Rounded, Skipped};
use fields::Fields;

mod fields;
mod names;
mod rates;

/// Largest map read: twenty times today's.
pub const BYTES_MAX: usize = 64 << 20;

/// Keys of the map that are no models.
const NO_MODELS: [(&str, &str); 2] = [
    ("sample_spec", "an example of the format, not a model"),
    ("fallback_generalizations", "rules for routing, not a model"),
];

/// Reads a price map. Every entry takes effect at `stamp`, or from the beginning without one: the
/// map itself has no dates.
///
/// # Errors
/// When the text is too large or no JSON object. Models that cannot be read are skipped and named.
pub fn import(json: &[u8], stamp: Option<Time>) -> Result<Import, PriceImportError> {
    if json.len() > BYTES_MAX {
        return Err(PriceImportError::TooLarge(json.len()));
    }
    let models: Map<String, Value> =
        serde_json::from_slice(json).map_err(PriceImportError::Json)?;
    let mut import = Import::default();
    for (key, model) in named(&models, &mut import.skipped) {
        one(&model, key, stamp, &mut import);
    }
    import.entries.sort_by(|a, b| order(a).cmp(&order(b)));
    import.skipped.sort_by(|a, b| a.key.cmp(&b.key));
    Ok(import)
}

fn order(entry: &PriceEntry) -> (&str, &str, meterr_operators::event::Tier, u64) {
    (&entry.provider, &entry.model, entry.tier, entry.min_input_tokens)
}

/// A model of the map under the name events have for it.
struct Named<'a> {
    provider: &'a str,
    model: &'a str,
    fields: &'a Map<String, Value>,
}

/// Models by name. Two keys for one name: the one with the provider's prefix wins, since LiteLLM
/// looks that one up first.
fn named<'a>(
    models: &'a Map<String, Value>,
    skipped: &mut Vec<Skipped>,
) -> Vec<(&'a str, Named<'a>)> {
    let mut skip = |key: &str, reason: String| skipped.push(Skipped { key: key.into(), reason });
    let mut by_name: BTreeMap<(&str, &str), (&str, Named<'_>)> = BTreeMap::new();
    for (key, value) in models {
        if let Some((_, reason)) = NO_MODELS.iter().find(|(name, _)| name == key) {
            skip(key, (*reason).to_owned());
            continue;
        }
        let Value::Object(fields) = value else {
            skip(key, "not an object".to_owned());
            continue;
        };
        let Some(Value::String(litellm_provider)) = fields.get("litellm_provider") else {
            skip(key, "litellm_provider is missing".to_owned());
            continue;
        };
        let (provider, model) = names::name(key, litellm_provider);
        let found = Named { provider, model, fields };
        match by_name.get_mut(&(provider, model)) {
            None => {
                by_name.insert((provider, model), (key, found));
            }
            Some(held) => {
                let (winner, loser) = if key.len() > held.0.len() {
                    (key.as_str(), held.0)
                } else {
                    (held.0, key.as_str())
                };
                skip(loser, format!("same provider and model as {winner:?}, which wins"));
                if winner == key {
                    *held = (key, found);
                }
            }
        }
    }
    by_name.into_values().collect()
}

fn one(model: &Named<'_>, key: &str, stamp: Option<Time>, import: &mut Import) {
    let fields = Fields::new(model.fields);
    let mut skip = |reason: String| import.skipped.push(Skipped { key: key.to_owned(), reason });
    let resolved = rates::resolve(model.provider, &fields);
    match resolved {
        Err(reason) => skip(reason),
        Ok(rows) if rows.is_empty() => {
            skip("no price per token, image or search".to_owned());
        }
        Ok(rows) => {
            let entries: Vec<PriceEntry> =
                rows.into_iter().map(|row| row.entry(model.provider, model.model, stamp)).collect();
            match check_entries(&entries) {
                Ok(()) => import.entries.extend(entries),
                Err(errors) => skip(errors[0].detail.clone()),
            }
        }
    }
    let (rounded, unmapped) = fields.report();
    import.rounded.extend(rounded.into_iter().map(|(field, text)| Rounded {
        key: key.to_owned(),
        field,
        text,
    }));
    for field in unmapped.into_iter().collect::<BTreeSet<_>>() {
        let unmapped = import.unmapped.entry(field).or_default();
        unmapped.models += 1;
        if unmapped.examples.len() < EXAMPLES_MAX {
            unmapped.examples.push(key.to_owned());
        }
    }
}
