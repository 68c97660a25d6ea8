//! `POST /v1/events`: the way in.
//!
//! Lines are decoded where they arrive, so that whatever needs no state is refused at once and by
//! line; the rest is grouped by shard, written, and answered once durable. One bad line spoils only
//! itself. What passes here is decoded again by its shard: the log holds lines as sent.
//!
//! This is the hot path. NDJSON is walked in place; a line costs one decode and one copy into its
//! shard's batch, and no allocation of its own. Batches are cut at
//! [`HttpSettings::batch_bytes_max`](super::HttpSettings::batch_bytes_max), so that each is one
//! message of the log. Work yields to other requests of the thread every 256 KiB.

use std::borrow::Cow;
use std::collections::VecDeque;

use actix_web::{HttpRequest, HttpResponse, web};
use bytes::Bytes;
use meterr_operators::event::{Reason, Rejection};
use meterr_operators::ids::{Positions, ShardId, shard_of};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::body::{self, TURN_BYTES};
use super::problem::{Kind, Problem};
use super::{Decoders, State, query};
use crate::api::{ShardBatch, ShardOutcome};

/// Refused lines listed in one answer; more are counted only.
pub const REJECTED_MAX: usize = 1_000;

/// Media types that hold one event a line, whatever the bytes look like.
const LINES: [&str; 5] = [
    "application/x-ndjson",
    "application/ndjson",
    "application/jsonl",
    "application/jsonlines",
    "application/x-jsonlines",
];

/// All media types taken. The last ones are what `curl` and others say when nobody told them. (That
/// a foreign web page could send them too is the concern of `guard.rs`.)
const MEDIA_TYPES: [&str; 12] = [
    LINES[0],
    LINES[1],
    LINES[2],
    LINES[3],
    LINES[4],
    "application/json",
    "application/cloudevents+json",
    "application/cloudevents-batch+json",
    "text/json",
    "text/plain",
    "application/octet-stream",
    "application/x-www-form-urlencoded",
];

/// A line that was refused at once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RejectedLine {
    /// Line of the body, from 1; in an array, the number of the element.
    pub line: u32,
    /// Reason code.
    pub reason: Reason,
    /// What is wrong.
    pub detail: String,
}

/// Lines of one shard whose write failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FailedLines {
    /// The shard.
    pub shard: ShardId,
    /// Why.
    pub detail: String,
    /// Their lines.
    pub lines: Vec<u32>,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accepted {
    /// Events that are durable.
    pub accepted: usize,
    /// The first [`REJECTED_MAX`] refused lines, ascending.
    pub rejected: Vec<RejectedLine>,
    /// All refused lines.
    pub rejected_total: usize,
    /// Where the durable ones stand; `min_position` of a read that must show them.
    pub position: Positions,
}

pub(super) async fn publish(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    let backfill = query::of(&request, &["backfill"])?.flag("backfill")?;
    let media_type = body::media_type(&request, &MEDIA_TYPES)?;
    let mut held = state.budget.hold();
    let body = body::read(&request, payload, &state.settings, &mut held).await?;
    // The batches together are a second copy.
    held.grow(body.len())?;
    let sorter = Sorter {
        decoders: state.desk.decoders,
        shards: state.desk.shards(),
        suffix: if backfill { "@backfill" } else { "@batch" },
        lines_max: state.settings.lines_max,
        batch_bytes_max: state.settings.batch_bytes_max,
        ..Sorter::default()
    };
    let sorted = sorted(sorter, media_type.as_deref(), &body).await?;
    drop(body);
    if sorted.batches.is_empty() && sorted.rejected_total == 0 {
        return Err(Problem::new(Kind::Body, "the body holds no event"));
    }
    let mut answer = Accepted {
        accepted: 0,
        rejected: sorted.rejected,
        rejected_total: sorted.rejected_total,
        position: Positions::default(),
    };
    if sorted.batches.is_empty() {
        return Ok(HttpResponse::Accepted().json(answer));
    }
    let sent: Vec<_> = sorted.batches.iter().map(|b| (b.shard, b.lines.clone())).collect();
    let writing = state.desk.api.publish(sorted.batches);
    let outcomes =
        tokio::time::timeout(state.settings.request_timeout, writing).await.map_err(|_| {
            Problem::new(
                Kind::Timeout,
                "the write was not confirmed in time; it may or may not have happened. Send the \
                 request again: ids count once",
            )
        })?;
    let failed = settled(sent, outcomes, &mut answer);
    if failed.is_empty() {
        return Ok(HttpResponse::Accepted().json(answer));
    }
    let lost: usize = failed.iter().map(|failed| failed.lines.len()).sum();
    tracing::warn!(lines = lost, shard = %failed[0].shard, detail = %failed[0].detail, "write failed");
    Err(Problem::new(
        Kind::NotWritten,
        format!(
            "{lost} events in {} batches are not known to be durable; send these lines or the whole \
             request again",
            failed.len()
        ),
    )
    .member("accepted", answer.accepted)
    .member("rejected", json!(answer.rejected))
    .member("rejected_total", answer.rejected_total)
    .member("position", answer.position.to_string())
    .member("failed", json!(failed)))
}

/// Brings outcomes and lines together: counts what is durable into `answer`, returns the rest.
/// An outcome that is missing counts as a failure: silence is no promise.
fn settled(
    sent: Vec<(ShardId, Vec<u32>)>,
    outcomes: Vec<ShardOutcome>,
    answer: &mut Accepted,
) -> Vec<FailedLines> {
    let mut outcomes: VecDeque<ShardOutcome> = outcomes.into();
    let mut failed = Vec::new();
    for (shard, lines) in sent {
        // Outcomes come in the order of the batches; another order among shards does no harm.
        let at = outcomes.iter().position(|outcome| outcome.shard == shard);
        let result = at
            .and_then(|at| outcomes.remove(at))
            .map_or(Err("the shard did not report an outcome".to_owned()), |found| found.result);
        match result {
            Ok(position) => {
                answer.accepted += lines.len();
                answer.position.raise(shard, position);
            }
            Err(detail) => failed.push(FailedLines { shard, detail, lines }),
        }
    }
    failed
}

/// Lines brought into batches by shard, and those refused.
#[derive(Default)]
struct Sorter {
    decoders: Decoders,
    shards: u16,
    suffix: &'static str,
    lines_max: usize,
    batch_bytes_max: usize,
    /// The batch being filled, by shard.
    open: Vec<Open>,
    batches: Vec<ShardBatch>,
    lines: usize,
    rejected: Vec<RejectedLine>,
    rejected_total: usize,
}

#[derive(Default)]
struct Open {
    payload: Vec<u8>,
    lines: Vec<u32>,
}

async fn sorted(
    mut sorter: Sorter,
    media_type: Option<&str>,
    body: &[u8],
) -> Result<Sorter, Problem> {
    sorter.open.resize_with(usize::from(sorter.shards), Open::default);
    let mut turn = 0;
    if media_type.is_some_and(|media_type| LINES.contains(&media_type)) {
        let mut start = 0;
        let mut number = 0u32;
        while start < body.len() {
            let end = memchr::memchr(b'\n', &body[start..]).map_or(body.len(), |n| start + n);
            number = number.saturating_add(1);
            sorter.line(number, &body[start..end])?;
            turn += end + 1 - start;
            start = end + 1;
            if turn >= TURN_BYTES {
                turn = 0;
                tokio::task::yield_now().await;
            }
        }
    } else {
        let lines = (sorter.decoders.split)(media_type, body).map_err(refused_whole)?;
        for (number, line) in lines {
            turn += line.len();
            // The splitter promises lines without newline. One that slipped through would be read
            // back as two events, so the promise is kept here too: in JSON that parses, a newline
            // is white space.
            let line: Cow<'_, [u8]> = match memchr::memchr2(b'\n', b'\r', &line) {
                None => line,
                Some(_) => Cow::Owned(crate::requests::one_line(&line)),
            };
            sorter.line(number, &line)?;
            if turn >= TURN_BYTES {
                turn = 0;
                tokio::task::yield_now().await;
            }
        }
    }
    for shard in 0..sorter.shards {
        sorter.close(ShardId(shard));
    }
    Ok(sorter)
}

/// A body the splitter could take nothing of.
fn refused_whole(rejection: Rejection) -> Problem {
    match rejection.reason {
        Reason::TooLarge => Problem::new(Kind::TooLarge, rejection.detail),
        _ => Problem::rejection(rejection),
    }
}

impl Sorter {
    fn line(&mut self, number: u32, line: &[u8]) -> Result<(), Problem> {
        let line = line.trim_ascii();
        if line.is_empty() {
            return Ok(());
        }
        self.lines += 1;
        if self.lines > self.lines_max {
            return Err(Problem::too_large(
                format!("the body has more than {} events", self.lines_max),
                self.lines_max,
            ));
        }
        if line.len() >= self.batch_bytes_max {
            self.reject(
                number,
                Rejection::new(
                    Reason::TooLarge,
                    format!(
                        "the line has {} bytes; it must have fewer than {}",
                        line.len(),
                        self.batch_bytes_max
                    ),
                ),
            );
            return Ok(());
        }
        let shard = match (self.decoders.decode)(line) {
            Ok(event) => shard_of(&event.org, self.shards),
            Err(rejection) => {
                self.reject(number, rejection);
                return Ok(());
            }
        };
        let open = &mut self.open[usize::from(shard.0)];
        if open.payload.len() + line.len() + 1 > self.batch_bytes_max {
            self.close(shard);
        }
        let open = &mut self.open[usize::from(shard.0)];
        open.payload.extend_from_slice(line);
        open.payload.push(b'\n');
        open.lines.push(number);
        Ok(())
    }

    fn close(&mut self, shard: ShardId) {
        let open = std::mem::take(&mut self.open[usize::from(shard.0)]);
        if !open.lines.is_empty() {
            self.batches.push(ShardBatch {
                shard,
                subject: format!("usage.{shard}.{}", self.suffix),
                payload: Bytes::from(open.payload),
                lines: open.lines,
            });
        }
    }

    fn reject(&mut self, line: u32, rejection: Rejection) {
        self.rejected_total += 1;
        if self.rejected.len() < REJECTED_MAX {
            let Rejection { reason, detail } = rejection;
            self.rejected.push(RejectedLine { line, reason, detail });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing() -> Accepted {
        Accepted {
            accepted: 0,
            rejected: Vec::new(),
            rejected_total: 0,
            position: Positions::default(),
        }
    }

    #[test]
    fn outcomes_find_their_lines_in_any_order() {
        let (a, b) = (ShardId(1), ShardId(2));
        let sent = vec![(a, vec![1]), (b, vec![2, 3]), (a, vec![4])];
        let outcome = |shard, result| ShardOutcome { shard, result };
        let outcomes =
            vec![outcome(b, Ok(9)), outcome(a, Ok(5)), outcome(a, Err("disk full".to_owned()))];
        let mut answer = nothing();
        let failed = settled(sent, outcomes, &mut answer);
        assert_eq!((answer.accepted, answer.position.to_string().as_str()), (3, "1:5,2:9"));
        let detail = "disk full".to_owned();
        assert_eq!(failed, [FailedLines { shard: a, detail, lines: vec![4] }]);
    }

    #[test]
    fn a_missing_outcome_is_a_failure() {
        let mut answer = nothing();
        let failed = settled(vec![(ShardId(1), vec![1, 2])], Vec::new(), &mut answer);
        assert_eq!((answer.accepted, failed[0].lines.as_slice()), (0, [1, 2].as_slice()));
    }
}
