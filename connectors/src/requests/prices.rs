//! The price book: read, change, and see what a change would do before it is made.

use meterr_operators::ids::Positions;
use meterr_operators::price_book::PriceEntry;
use serde::{Deserialize, Serialize};

use super::parameters::Parameters;
use super::problem::{Kind, Problem};
use super::{Answer, Desk, changed, json, parsed};

/// Parameters of [`Desk::prices`].
pub(crate) const PRICES: &[&str] = &["model"];

/// The body of a change.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct PriceList {
    prices: Vec<PriceEntry>,
}

#[derive(Debug, Serialize)]
struct Book {
    prices: Vec<PriceEntry>,
    /// Up to where price changes are in it.
    as_of: Positions,
}

impl Desk {
    /// The price book in force.
    pub async fn prices(&self, parameters: &Parameters) -> Answer {
        let model = parameters.text("model").map(str::to_owned);
        let (prices, as_of) = self.plain(self.api.prices(model)).await?;
        json(&Book { prices, as_of })
    }

    /// Changes prices.
    pub async fn set_prices(&self, body: &[u8]) -> Answer {
        changed(self.plain(self.api.set_prices(entries(body)?)).await?)
    }

    /// What changing prices would do.
    pub async fn preview_prices(&self, body: &[u8]) -> Answer {
        json(&self.plain(self.api.preview_prices(entries(body)?)).await?)
    }
}

fn entries(body: &[u8]) -> Result<Vec<PriceEntry>, Problem> {
    let list: PriceList = parsed(body)?;
    if list.prices.is_empty() {
        return Err(Problem::new(Kind::Body, "\"prices\" holds no entry"));
    }
    Ok(list.prices)
}
