//! Spend, declared views, top lists and what lacks a price.

use actix_web::{HttpRequest, HttpResponse, web};

use super::problem::Problem;
use super::{State, ok, query};
use crate::requests::{spend, views};

pub(super) async fn of_org(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let org = query::org(&request, 2)?;
    let parameters = query::of(&request, spend::SPEND)?;
    ok(state.desk.spend(org, None, &parameters).await)
}

pub(super) async fn of_user(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let org = query::org(&request, 2)?;
    let user = query::name(&request, 4, "user")?;
    let parameters = query::of(&request, spend::SPEND)?;
    ok(state.desk.spend(org, Some(user), &parameters).await)
}

pub(super) async fn of_view(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let view = views::name(&query::segment(&request, 2, "name")?)?;
    let org = query::org(&request, 4)?;
    let parameters = query::of(&request, spend::VIEW)?;
    ok(state.desk.view(view, org, &parameters).await)
}

pub(super) async fn top(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let parameters = query::of(&request, spend::TOP)?;
    ok(state.desk.top(&parameters).await)
}

pub(super) async fn unpriced(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let org = query::org(&request, 2)?;
    let parameters = query::of(&request, spend::UNPRICED)?;
    ok(state.desk.unpriced(org, &parameters).await)
}
