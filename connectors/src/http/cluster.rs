//! The cluster: who is there, which shard is where, and operators' wishes about both.

use actix_web::{HttpRequest, HttpResponse, web};
use meterr_operators::ids::ShardId;
use serde::Deserialize;

use super::problem::Problem;
use super::{State, accepted, body, ok, query};
use crate::api::{Drain, Move};
use crate::requests::{cluster, parsed};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Draining {
    drain: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Moving {
    // A null must be said.
    #[serde(deserialize_with = "Option::deserialize")]
    node: Option<String>,
}

pub(super) async fn show(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    ok(state.desk.cluster().await)
}

pub(super) async fn drain(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    let node = cluster::node(&query::segment(&request, 3, "node")?)?;
    let mut held = state.budget.hold();
    let body = body::json(&request, payload, &state.settings, &mut held).await?;
    let Draining { drain } = parsed(&body)?;
    accepted(state.desk.drain(Drain { node, drain }).await)
}

pub(super) async fn move_shard(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    query::of(&request, &[])?;
    let shard: ShardId = cluster::shard(&query::segment(&request, 3, "shard")?)?;
    let mut held = state.budget.hold();
    let body = body::json(&request, payload, &state.settings, &mut held).await?;
    let Moving { node } = parsed(&body)?;
    accepted(state.desk.move_shard(Move { shard, node }).await)
}
