//! Spend, declared views, top lists and what lacks a price.

use std::time::Instant;

use actix_web::{HttpRequest, HttpResponse, web};
use serde::Serialize;

use super::cursor::{Page, Question};
use super::problem::Problem;
use super::query::{self, Query};
use super::{State, views};
use crate::api::{AsOf, GroupBy, SpendQuery, SpendRow, TopBy, TopQuery, Window};

/// Rows of a page when `limit` is left out.
const PAGE_ROWS: u64 = 1_000;
/// Most rows of a page.
const PAGE_ROWS_MAX: u64 = 10_000;
/// Most rows of a top list.
const TOP_ROWS_MAX: u64 = 1_000;

/// A page of spend as it is sent.
#[derive(Debug, Serialize)]
struct SpendPage<'a> {
    rows: &'a [SpendRow],
    next_cursor: Option<&'a str>,
    #[serde(flatten)]
    as_of: &'a AsOf,
}

/// Rows that are not paged, as they are sent.
#[derive(Debug, Serialize)]
struct Rows<T> {
    rows: Vec<T>,
    #[serde(flatten)]
    as_of: AsOf,
}

pub(super) async fn of_org(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let org = query::org(&request, 2)?;
    spend(&state, &request, org, None).await
}

pub(super) async fn of_user(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let org = query::org(&request, 2)?;
    let user = query::name(&request, 4, "user")?;
    spend(&state, &request, org, Some(user)).await
}

async fn spend(
    state: &State,
    request: &HttpRequest,
    org: String,
    user: Option<String>,
) -> Result<HttpResponse, Problem> {
    let known = ["window", "from", "to", "by", "min_position", "timeout_ms", "limit", "cursor"];
    let query = Query::of(request, &known)?;
    let spend = SpendQuery {
        org,
        user,
        window: query.window()?.unwrap_or(Window::All),
        by: query.group_by()?.unwrap_or(GroupBy::None),
        ..range(state, &query)?
    };
    let question = Question { view: None, query: spend };
    paged(state, &query, question, query.any(&["window", "by", "from", "to"])).await
}

/// Rows of a declared view, which has its own window and dimensions.
pub(super) async fn of_view(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let view = views::name(&request)?;
    let org = query::org(&request, 4)?;
    let known = ["from", "to", "min_position", "timeout_ms", "limit", "cursor"];
    let query = Query::of(&request, &known)?;
    let spend = SpendQuery { org, ..range(&state, &query)? };
    let question = Question { view: Some(view), query: spend };
    paged(&state, &query, question, query.any(&["from", "to"])).await
}

/// The parts of a query that spend and views have in common.
fn range(state: &State, query: &Query) -> Result<SpendQuery, Problem> {
    let (from, to) = (query.time("from")?, query.time("to")?);
    if let (Some(from), Some(to)) = (from, to)
        && from > to
    {
        return Err(Problem::parameter(
            "to",
            &to.to_string(),
            &format!("at or after from, which is {from}"),
        ));
    }
    Ok(SpendQuery {
        org: String::new(),
        user: None,
        window: Window::All,
        from,
        to,
        by: GroupBy::None,
        min_position: query.min_position(state.shards())?,
    })
}

async fn paged(
    state: &State,
    query: &Query,
    question: Question,
    given: bool,
) -> Result<HttpResponse, Problem> {
    let limit = query.number("limit", 1..=PAGE_ROWS_MAX)?.unwrap_or(PAGE_ROWS) as usize;
    let timeout = query.timeout(state.settings.min_position_timeout)?;
    let page = match query.text("cursor") {
        Some(cursor) => state.cursors.next(cursor, &question, given, limit, Instant::now())?,
        None => {
            let asked = question.query.clone();
            let position = asked.min_position.clone();
            let asking = match &question.view {
                Some(view) => state.api.view_rows(view.clone(), asked),
                None => state.api.spend(asked),
            };
            let answer = state.answer(asking, position.as_ref(), timeout).await?;
            state.cursors.first(question, answer, limit, Instant::now())?
        }
    };
    let Page { answer, rows, next_cursor } = page;
    Ok(HttpResponse::Ok().json(SpendPage {
        rows: &answer.rows[rows],
        next_cursor: next_cursor.as_deref(),
        as_of: &answer.as_of,
    }))
}

pub(super) async fn top(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let known = ["by", "window", "at", "n", "org", "min_position", "timeout_ms"];
    let query = Query::of(&request, &known)?;
    let choices = [
        ("org", TopBy::Org),
        ("user", TopBy::User),
        ("model", TopBy::Model),
        ("feature", TopBy::Feature),
    ];
    let by = query.choice("by", &choices)?.unwrap_or(TopBy::Org);
    let window = query.window()?.unwrap_or(Window::All);
    if window == Window::Hour && by != TopBy::Org {
        return Err(Problem::parameter("window", "hour", "one of day, month, all unless by=org"));
    }
    let org = query.text("org").map(str::to_owned);
    if let Some(org) = &org {
        if !meterr_operators::ids::org_valid(org) {
            return Err(query::org_wrong(org));
        }
        if by == TopBy::Org {
            return Err(Problem::parameter("org", org, "left out with by=org"));
        }
    }
    let asked = TopQuery {
        by,
        window,
        at: query.time("at")?,
        n: query.number("n", 1..=TOP_ROWS_MAX)?.unwrap_or(10) as usize,
        org,
        min_position: query.min_position(state.shards())?,
    };
    let timeout = query.timeout(state.settings.min_position_timeout)?;
    let position = asked.min_position.clone();
    let (rows, as_of) = state.answer(state.api.top(asked), position.as_ref(), timeout).await?;
    Ok(HttpResponse::Ok().json(Rows { rows, as_of }))
}

pub(super) async fn unpriced(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    let org = query::org(&request, 2)?;
    let query = Query::of(&request, &["min_position", "timeout_ms"])?;
    let position = query.min_position(state.shards())?;
    let timeout = query.timeout(state.settings.min_position_timeout)?;
    let asking = state.api.unpriced(org, position.clone());
    let (rows, as_of) = state.answer(asking, position.as_ref(), timeout).await?;
    Ok(HttpResponse::Ok().json(Rows { rows, as_of }))
}
