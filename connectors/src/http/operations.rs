//! What operators and their machines ask: alive, ready, shards, metrics, the description of this
//! surface.

use actix_web::http::header;
use actix_web::{HttpRequest, HttpResponse, web};
use serde_json::json;

use super::problem::{Kind, Problem};
use super::{State, ok, openapi, query};
use crate::nats::asyncapi;
use crate::requests::problem;

/// The process answers. Says nothing about shards: a restart would not help a stopped one.
pub(super) async fn healthz(request: HttpRequest) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    Ok(HttpResponse::Ok().json(json!({"status": "ok"})))
}

/// Every shard is live, so every org can be asked and published to. Shards of other nodes are theirs to
/// answer for: one that is down must not take all the others out of service.
pub(super) async fn readyz(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    let shards = state.desk.shard_status().await?;
    let elsewhere = shards.iter().filter(|shard| shard.elsewhere).count();
    let expected = usize::from(state.desk.shards()) - elsewhere;
    let live = shards.iter().filter(|shard| !shard.elsewhere && shard.state == "live").count();
    if live == expected && !state.desk.stopping() {
        return Ok(HttpResponse::Ok().json(json!({"status": "ready", "shards": shards})));
    }
    let detail = match state.desk.stopping() {
        true => "the server is stopping".to_owned(),
        false => format!("{live} of {expected} shards are live"),
    };
    Err(Problem::new(Kind::Unavailable, detail).member("shards", json!(shards)))
}

pub(super) async fn shards(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    ok(state.desk.status().await)
}

pub(super) async fn metrics(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    Ok(HttpResponse::Ok().content_type("text/plain; version=0.0.4").body(state.desk.api.metrics()))
}

pub(super) async fn openapi(request: HttpRequest) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    Ok(HttpResponse::Ok().content_type("application/json").body(openapi::DOCUMENT))
}

pub(super) async fn asyncapi(request: HttpRequest) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    Ok(HttpResponse::Ok().content_type("application/json").body(asyncapi::DOCUMENT))
}

/// What a problem's `type` means.
pub(super) async fn problem_kind(request: HttpRequest) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    let kind = query::segment(&request, 1, "kind")?;
    match problem::described(&kind) {
        Some(description) => Ok(HttpResponse::Ok()
            .insert_header((header::CACHE_CONTROL, "max-age=86400"))
            .json(description)),
        None => Err(Problem::new(
            Kind::NotFound,
            format!("there is no problem {:?}", meterr_operators::event::excerpt(&kind)),
        )),
    }
}
