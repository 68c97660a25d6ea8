//! Dead letters: list, look at, and publish again, mended or as they are.

use bytes::Bytes;
use meterr_operators::event::{ALL_REASONS, Reason};
use meterr_operators::ids::ShardId;
use serde::Serialize;

use super::parameters::Parameters;
use super::problem::Problem;
use super::{Answer, Desk, changed, json, one_line};
use crate::api::{DeadLetter, DeadLetterQuery};

/// Parameters of [`Desk::dead_letters`].
pub(crate) const DEAD_LETTERS: &[&str] = &["reason", "shard", "before", "limit"];
/// What an id looks like.
pub(crate) const ID_FORM: &str = "the id of a dead letter, such as 3-1042-0";

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

impl Desk {
    /// Dead letters, newest first.
    pub async fn dead_letters(&self, parameters: &Parameters) -> Answer {
        let reasons: Vec<(&str, Reason)> = ALL_REASONS.iter().map(|r| (r.name(), *r)).collect();
        let last = u64::from(self.shards() - 1);
        let before = parameters.text("before").map(|text| id("before", text)).transpose()?;
        let limit = parameters.number("limit", 1..=ROWS_MAX)?.unwrap_or(ROWS) as usize;
        // One more than asked for tells whether there is another page.
        let asked = DeadLetterQuery {
            reason: parameters.choice("reason", &reasons)?,
            shard: parameters.number("shard", 0..=last)?.map(|shard| ShardId(shard as u16)),
            before,
            limit: limit + 1,
        };
        let mut rows = self.plain(self.api.dead_letters(asked)).await?;
        let more = rows.len() > limit;
        rows.truncate(limit);
        let next_before = rows.last().filter(|_| more).map(|letter| letter.id.as_str());
        json(&List { rows: &rows, next_before })
    }

    /// One dead letter with its bytes.
    pub async fn dead_letter(&self, id: String) -> Answer {
        json(&self.plain(self.api.dead_letter(id)).await?)
    }

    /// The line of an event that takes a dead letter's place; none when the body is blank.
    pub fn mended(&self, body: &[u8]) -> Result<Option<Bytes>, Problem> {
        let line = one_line(body.trim_ascii());
        if line.is_empty() {
            return Ok(None);
        }
        if line.len() >= self.limits.line_bytes_max {
            return Err(Problem::too_large(
                format!("the event has {} bytes", line.len()),
                self.limits.line_bytes_max,
            ));
        }
        // A line that would only become another dead letter is refused here, where it can be mended.
        (self.decoders.decode)(&line).map_err(Problem::rejection)?;
        Ok(Some(Bytes::from(line)))
    }

    /// Publishes the event again: as it was, or the mended line in its place.
    pub async fn replay_dead_letter(&self, id: String, mended: Option<Bytes>) -> Answer {
        changed(self.plain(self.api.replay_dead_letter(id, mended)).await?)
    }
}

/// The id of a dead letter in a parameter, checked.
pub(crate) fn id(parameter: &str, text: &str) -> Result<String, Problem> {
    if id_valid(text) {
        Ok(text.to_owned())
    } else {
        Err(Problem::parameter(parameter, text, ID_FORM))
    }
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
