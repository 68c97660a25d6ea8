//! The price book: read, change, and see what a change would do before it is made.

use actix_web::{HttpRequest, HttpResponse, web};

use super::problem::Problem;
use super::{State, accepted, body, ok, query};
use crate::requests::prices::PRICES;

pub(super) async fn book(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let parameters = query::of(&request, PRICES)?;
    ok(state.desk.prices(&parameters).await)
}

pub(super) async fn change(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    let mut held = state.budget.hold();
    let body = body::json(&request, payload, &state.settings, &mut held).await?;
    accepted(state.desk.set_prices(&body).await)
}

pub(super) async fn preview(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    let mut held = state.budget.hold();
    let body = body::json(&request, payload, &state.settings, &mut held).await?;
    ok(state.desk.preview_prices(&body).await)
}
