//! An org's time zone: what its days and months go by.

use actix_web::{HttpRequest, HttpResponse, web};
use serde::{Deserialize, Serialize};

use super::problem::{Kind, Problem};
use super::query::{self, Query};
use super::{Position, State, body};

/// Longest name of a time zone; the longest in use has 32 bytes.
const TIME_ZONE_LEN_MAX: usize = 64;

#[derive(Debug, Serialize)]
struct TimeZone {
    org: String,
    time_zone: String,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NewTimeZone {
    pub time_zone: String,
}

pub(super) async fn time_zone(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    Query::of(&request, &[])?;
    let org = query::org(&request, 2)?;
    let time_zone = state.plain(state.api.time_zone(org.clone())).await?;
    Ok(HttpResponse::Ok().json(TimeZone { org, time_zone }))
}

pub(super) async fn set_time_zone(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    Query::of(&request, &[])?;
    let org = query::org(&request, 2)?;
    let mut held = state.budget.hold();
    let NewTimeZone { time_zone } =
        body::json(&request, payload, &state.settings, &mut held).await?;
    // Whether there is such a zone is for the engine, which knows the database version in force.
    let form = (1..=TIME_ZONE_LEN_MAX).contains(&time_zone.len())
        && time_zone.bytes().all(|b| b.is_ascii_alphanumeric() || b"/_+-".contains(&b));
    if !form {
        return Err(Problem::new(
            Kind::Body,
            format!(
                "time_zone {:?} is not an IANA name such as \"Europe/Berlin\"",
                meterr_operators::event::excerpt(&time_zone)
            ),
        ));
    }
    let position = state.plain(state.api.set_time_zone(org, time_zone)).await?;
    Ok(HttpResponse::Accepted().json(Position { position }))
}
