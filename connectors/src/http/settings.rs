//! An org's time zone: what its days and months go by.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Deserialize;

use super::problem::Problem;
use super::{State, accepted, body, ok, query};
use crate::requests;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NewTimeZone {
    time_zone: String,
}

pub(super) async fn time_zone(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    ok(state.desk.time_zone(query::org(&request, 2)?).await)
}

pub(super) async fn set_time_zone(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    let org = query::org(&request, 2)?;
    let mut held = state.budget.hold();
    let body = body::json(&request, payload, &state.settings, &mut held).await?;
    let NewTimeZone { time_zone } = requests::parsed(&body)?;
    accepted(state.desk.set_time_zone(org, time_zone).await)
}
