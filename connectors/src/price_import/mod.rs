//! Price books from elsewhere, and price books as files.
//!
//! [`litellm::import`] reads LiteLLM's model price map, the largest public one. What an import
//! cannot carry over is counted and named, never dropped in silence. `config/PRICES.md` says how
//! fields map and where costs differ from LiteLLM's own.

use std::collections::BTreeMap;

use meterr_operators::price_book::{PriceEntry, PriceList};

pub mod litellm;
mod providers;

pub use providers::provider_name;
pub(crate) use providers::renamed;

/// What an import found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Import {
    /// Entries, ascending by provider, model, tier and context bound. They pass
    /// [`meterr_operators::price_book::check_entries`].
    pub entries: Vec<PriceEntry>,
    /// Prices with more than eighteen decimals a unit, rounded half to even.
    pub rounded: Vec<Rounded>,
    /// Fields that state a price or a rule of pricing and were not carried over, by name.
    pub unmapped: BTreeMap<String, Unmapped>,
    /// Models without entries, by their key in the source.
    pub skipped: Vec<Skipped>,
}

/// A price that was rounded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rounded {
    /// Key of the model in the source.
    pub key: String,
    /// Field.
    pub field: String,
    /// The price as written there.
    pub text: String,
}

/// A field that was not carried over.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unmapped {
    /// Number of models that have it.
    pub models: usize,
    /// Keys of the first of them, at most [`EXAMPLES_MAX`].
    pub examples: Vec<String>,
}

/// Most example models kept per field.
pub const EXAMPLES_MAX: usize = 3;

/// A model without entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    /// Key of the model in the source.
    pub key: String,
    /// Why.
    pub reason: String,
}

/// Why nothing was imported, or a price book file not read.
#[derive(Debug, thiserror::Error)]
pub enum PriceImportError {
    /// Larger than is read at all.
    #[error("price map has {0} bytes; at most {max} are read", max = litellm::BYTES_MAX)]
    TooLarge(usize),
    /// Not a JSON object of models.
    #[error("price map is not a JSON object of models")]
    Json(#[source] serde_json::Error),
    /// Not a price book.
    #[error("not a price book: {0}")]
    Toml(String),
}

/// Writes entries as a price book file. `header` goes on top, as comment lines.
///
/// # Errors
/// When an entry holds something TOML cannot; no checked entry does.
pub fn write_toml(entries: &[PriceEntry], header: &str) -> Result<String, PriceImportError> {
    let mut text = String::new();
    for line in header.lines() {
        text.push_str(format!("# {line}").trim_end());
        text.push('\n');
    }
    let list = PriceList { prices: entries.to_vec() };
    text.push('\n');
    let prices = toml::to_string(&list);
    text.push_str(&prices.map_err(|error| PriceImportError::Toml(error.to_string()))?);
    Ok(text)
}

/// Reads a price book file. The entries are still to be checked by the book.
///
/// # Errors
/// When the text is no TOML of the documented form; the message names line and field.
pub fn read_toml(text: &str) -> Result<Vec<PriceEntry>, PriceImportError> {
    let list: PriceList =
        toml::from_str(text).map_err(|error| PriceImportError::Toml(error.to_string()))?;
    Ok(list.prices)
}
