//! Dead letters: list, look at, and publish again, mended or as they are.

use actix_web::{HttpRequest, HttpResponse, web};
use bytes::Bytes;
use meterr_operators::event::{ALL_REASONS, Reason};
use meterr_operators::ids::ShardId;
use serde::Serialize;

use super::problem::Problem;
use super::query::{self, Query};
use super::{Position, State, body};
use crate::api::{DeadLetter, DeadLetterQuery};

/// Rows when `limit` is left out.
const ROWS: u64 = 100;
/// Most rows.
const ROWS_MAX: u64 = 1_000;

#[derive(Debug, Serialize)]
struct List<'a> {
    rows: &'a [DeadLetter],
    /// `before` of the next page; null on the last.
    next_before: Option<&'a str>,
}

pub(super) async fn list(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let query = Query::of(&request, &["reason", "shard", "before", "limit"])?;
    let reasons: Vec<(&str, Reason)> = ALL_REASONS.iter().map(|r| (r.name(), *r)).collect();
    let last = u64::from(state.shards() - 1);
    let before = match query.text("before") {
        Some(id) if !id_valid(id) => return Err(id_wrong("before", id)),
        before => before.map(str::to_owned),
    };
    let limit = query.number("limit", 1..=ROWS_MAX)?.unwrap_or(ROWS) as usize;
    // One more than asked for tells whether there is another page.
    let asked = DeadLetterQuery {
        reason: query.choice("reason", &reasons)?,
        shard: query.number("shard", 0..=last)?.map(|shard| ShardId(shard as u16)),
        before,
        limit: limit + 1,
    };
    let mut rows = state.plain(state.api.dead_letters(asked)).await?;
    let more = rows.len() > limit;
    rows.truncate(limit);
    let next_before = rows.last().filter(|_| more).map(|letter| letter.id.as_str());
    Ok(HttpResponse::Ok().json(List { rows: &rows, next_before }))
}

pub(super) async fn one(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    Query::of(&request, &[])?;
    let letter = state.plain(state.api.dead_letter(id(&request)?)).await?;
    Ok(HttpResponse::Ok().json(letter))
}

/// Publishes the event again: as it was with an empty body, else the body in its place.
pub(super) async fn replay(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    Query::of(&request, &[])?;
    let id = id(&request)?;
    let mut held = state.budget.hold();
    let body = body::read(&request, payload, &state.settings, &mut held).await?;
    let line = super::one_line(body.trim_ascii());
    let mended = if line.is_empty() {
        None
    } else {
        body::media_type(&request, &["application/json", "application/cloudevents+json"])?;
        if line.len() >= state.settings.batch_bytes_max {
            return Err(Problem::too_large(
                format!("the event has {} bytes", line.len()),
                state.settings.batch_bytes_max,
            ));
        }
        // A line that would only become another dead letter is refused here, where it can be mended.
        (state.decoders.decode)(&line).map_err(Problem::rejection)?;
        Some(Bytes::from(line))
    };
    let position = state.plain(state.api.replay_dead_letter(id, mended)).await?;
    Ok(HttpResponse::Accepted().json(Position { position }))
}

fn id(request: &HttpRequest) -> Result<String, Problem> {
    let id = query::segment(request, 2, "id")?;
    if id_valid(&id) { Ok(id) } else { Err(id_wrong("id", &id)) }
}

fn id_wrong(parameter: &str, id: &str) -> Problem {
    Problem::parameter(parameter, id, "the id of a dead letter, such as 3-1042-0")
}

/// Three numbers: shard, epoch, n.
fn id_valid(id: &str) -> bool {
    let mut parts = id.split('-');
    let mut number = || {
        parts.next().is_some_and(|part| {
            (1..=20).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit())
        })
    };
    number() && number() && number() && parts.next().is_none()
}
