//! Spend, declared views, top lists and what lacks a price.

use std::time::Instant;

use meterr_operators::ids::org_valid;
use serde::Serialize;

use super::cursor::{Page, Question};
use super::parameters::{ORG_FORM, Parameters};
use super::problem::Problem;
use super::{Answer, Desk, json};
use crate::api::{AsOf, GroupBy, SpendQuery, SpendRow, TopBy, TopQuery, Window};

/// Parameters of [`Desk::spend`].
pub(crate) const SPEND: &[&str] =
    &["window", "from", "to", "by", "min_position", "timeout_ms", "limit", "cursor"];
/// Parameters of [`Desk::view`].
pub(crate) const VIEW: &[&str] = &["from", "to", "min_position", "timeout_ms", "limit", "cursor"];
/// Parameters of [`Desk::top`].
pub(crate) const TOP: &[&str] = &["by", "window", "at", "n", "org", "min_position", "timeout_ms"];
/// Parameters of [`Desk::unpriced`].
pub(crate) const UNPRICED: &[&str] = &["min_position", "timeout_ms"];

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

impl Desk {
    /// Spend of an org, or of one of its users.
    pub async fn spend(
        &self,
        org: String,
        user: Option<String>,
        parameters: &Parameters,
    ) -> Answer {
        let spend = SpendQuery {
            org,
            user,
            window: parameters.window()?.unwrap_or(Window::All),
            by: parameters.group_by()?.unwrap_or(GroupBy::None),
            ..self.range(parameters)?
        };
        let question = Question { view: None, query: spend };
        self.paged(parameters, question, parameters.any(&["window", "by", "from", "to"])).await
    }

    /// Rows of a declared view, which has its own window and dimensions.
    pub async fn view(&self, name: String, org: String, parameters: &Parameters) -> Answer {
        let spend = SpendQuery { org, ..self.range(parameters)? };
        let question = Question { view: Some(name), query: spend };
        self.paged(parameters, question, parameters.any(&["from", "to"])).await
    }

    /// The parts of a query that spend and views have in common.
    fn range(&self, parameters: &Parameters) -> Result<SpendQuery, Problem> {
        let (from, to) = (parameters.time("from")?, parameters.time("to")?);
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
            min_position: parameters.min_position(self.shards())?,
        })
    }

    async fn paged(&self, parameters: &Parameters, question: Question, given: bool) -> Answer {
        let limit = parameters.number("limit", 1..=PAGE_ROWS_MAX)?.unwrap_or(PAGE_ROWS) as usize;
        let timeout = parameters.timeout(self.limits.min_position_timeout)?;
        let page = match parameters.text("cursor") {
            Some(cursor) => self.cursors.next(cursor, &question, given, limit, Instant::now())?,
            None => {
                let asked = question.query.clone();
                let position = asked.min_position.clone();
                let asking = match &question.view {
                    Some(view) => self.api.view_rows(view.clone(), asked),
                    None => self.api.spend(asked),
                };
                let answer = self.answer(asking, position.as_ref(), timeout).await?;
                self.cursors.first(question, answer, limit, Instant::now())?
            }
        };
        let Page { answer, rows, next_cursor } = page;
        json(&SpendPage {
            rows: &answer.rows[rows],
            next_cursor: next_cursor.as_deref(),
            as_of: &answer.as_of,
        })
    }

    /// Largest spenders.
    pub async fn top(&self, parameters: &Parameters) -> Answer {
        let choices = [
            ("org", TopBy::Org),
            ("user", TopBy::User),
            ("model", TopBy::Model),
            ("feature", TopBy::Feature),
        ];
        let by = parameters.choice("by", &choices)?.unwrap_or(TopBy::Org);
        let window = parameters.window()?.unwrap_or(Window::All);
        if window == Window::Hour && by != TopBy::Org {
            return Err(Problem::parameter(
                "window",
                "hour",
                "one of day, month, all unless by=org",
            ));
        }
        let org = parameters.text("org").map(str::to_owned);
        if let Some(org) = &org {
            if !org_valid(org) {
                return Err(Problem::parameter("org", org, ORG_FORM));
            }
            if by == TopBy::Org {
                return Err(Problem::parameter("org", org, "left out with by=org"));
            }
        }
        let asked = TopQuery {
            by,
            window,
            at: parameters.time("at")?,
            n: parameters.number("n", 1..=TOP_ROWS_MAX)?.unwrap_or(10) as usize,
            org,
            min_position: parameters.min_position(self.shards())?,
        };
        let timeout = parameters.timeout(self.limits.min_position_timeout)?;
        let position = asked.min_position.clone();
        let (rows, as_of) = self.answer(self.api.top(asked), position.as_ref(), timeout).await?;
        json(&Rows { rows, as_of })
    }

    /// Usage of an org that lacks a price.
    pub async fn unpriced(&self, org: String, parameters: &Parameters) -> Answer {
        let position = parameters.min_position(self.shards())?;
        let timeout = parameters.timeout(self.limits.min_position_timeout)?;
        let asking = self.api.unpriced(org, position.clone());
        let (rows, as_of) = self.answer(asking, position.as_ref(), timeout).await?;
        json(&Rows { rows, as_of })
    }
}
