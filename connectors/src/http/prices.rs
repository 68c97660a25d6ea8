//! The price book: read, change, and see what a change would do before it is made.

use actix_web::{HttpRequest, HttpResponse, web};
use meterr_operators::ids::Positions;
use meterr_operators::price_book::PriceEntry;
use serde::{Deserialize, Serialize};

use super::problem::{Kind, Problem};
use super::query::Query;
use super::{Position, State, body};

/// The body of a change.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct PriceList {
    pub prices: Vec<PriceEntry>,
}

#[derive(Debug, Serialize)]
struct Book {
    prices: Vec<PriceEntry>,
    /// Up to where price changes are in it.
    as_of: Positions,
}

pub(super) async fn book(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let query = Query::of(&request, &["model"])?;
    let model = query.text("model").map(str::to_owned);
    let (prices, as_of) = state.plain(state.api.prices(model)).await?;
    Ok(HttpResponse::Ok().json(Book { prices, as_of }))
}

pub(super) async fn change(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let entries = entries(&state, &request, payload).await?;
    let position = state.plain(state.api.set_prices(entries)).await?;
    Ok(HttpResponse::Accepted().json(Position { position }))
}

pub(super) async fn preview(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let entries = entries(&state, &request, payload).await?;
    let effect = state.plain(state.api.preview_prices(entries)).await?;
    Ok(HttpResponse::Ok().json(effect))
}

async fn entries(
    state: &State,
    request: &HttpRequest,
    payload: web::Payload,
) -> Result<Vec<PriceEntry>, Problem> {
    Query::of(request, &[])?;
    let mut held = state.budget.hold();
    let list: PriceList = body::json(request, payload, &state.settings, &mut held).await?;
    if list.prices.is_empty() {
        return Err(Problem::new(Kind::Body, "\"prices\" holds no entry"));
    }
    Ok(list.prices)
}
