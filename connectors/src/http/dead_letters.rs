//! Dead letters: list, look at, and publish again, mended or as they are.

use actix_web::{HttpRequest, HttpResponse, web};

use super::problem::Problem;
use super::{State, accepted, body, ok, query};
use crate::requests::dead_letters::{self, DEAD_LETTERS};

pub(super) async fn list(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let parameters = query::of(&request, DEAD_LETTERS)?;
    ok(state.desk.dead_letters(&parameters).await)
}

pub(super) async fn one(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    ok(state.desk.dead_letter(id(&request)?).await)
}

/// Publishes the event again: as it was with an empty body, else the body in its place.
pub(super) async fn replay(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    let id = id(&request)?;
    let mut held = state.budget.hold();
    let body = body::read(&request, payload, &state.settings, &mut held).await?;
    if !body.trim_ascii().is_empty() {
        body::media_type(&request, &["application/json", "application/cloudevents+json"])?;
    }
    let mended = state.desk.mended(&body)?;
    accepted(state.desk.replay_dead_letter(id, mended).await)
}

fn id(request: &HttpRequest) -> Result<String, Problem> {
    dead_letters::id("id", &query::segment(request, 2, "id")?)
}
