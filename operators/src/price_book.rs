//! Prices with validity ranges in event time.

use serde::{Deserialize, Serialize};

/// One entry of a price book, as written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PriceEntry {
    /// Provider.
    pub provider: String,
}
