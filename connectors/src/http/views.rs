//! Declared views: groupings that are kept live. Their rows are served by `spend.rs`.

use actix_web::{HttpRequest, HttpResponse, web};

use super::problem::Problem;
use super::{State, accepted, body, ok, query};
use crate::requests::views;

pub(super) async fn list(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    ok(state.desk.views().await)
}

pub(super) async fn declare(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    let mut held = state.budget.hold();
    let body = body::json(&request, payload, &state.settings, &mut held).await?;
    accepted(state.desk.declare_view(&body).await)
}

pub(super) async fn remove(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    let name = views::name(&query::segment(&request, 2, "name")?)?;
    accepted(state.desk.remove_view(name).await)
}
