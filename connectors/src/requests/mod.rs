//! What every surface does with a request: parameters become a typed question, the engine's answer
//! becomes JSON, a refusal becomes a problem document. HTTP and NATS only carry them.
//!
//! | file | what |
//! |---|---|
//! | `parameters` | named values, read strictly |
//! | `spend` | spend, declared views' rows, top lists, what lacks a price |
//! | `live` | what a reader of live changes lacks |
//! | `prices` `views` `time_zone` `dead_letters` | the smaller questions, and changes |
//! | `cluster` | nodes, and which shard is where |
//! | `cursor` | pages of one moment |
//! | [`problem`] | every refusal |
//!
//! Invariants: a request is answered in full or refused by a [`Problem`]; no parameter is ignored;
//! every wait has an end.

pub(crate) mod cluster;
pub(crate) mod cursor;
pub(crate) mod dead_letters;
pub(crate) mod live;
pub(crate) mod parameters;
pub(crate) mod prices;
pub mod problem;
pub(crate) mod spend;
pub(crate) mod time_zone;
pub(crate) mod views;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use meterr_operators::event::{Event, Reason, Rejection};
use meterr_operators::ids::Positions;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use self::problem::{Kind, Problem};
use crate::api::{Api, ApiResult, ShardStatus};

/// Limits and times that hold whatever carries the request.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Time for an answer to be found.
    pub request_timeout: Duration,
    /// Longest wait for `min_position`, and the one without `timeout_ms`.
    pub min_position_timeout: Duration,
    /// How long the pages of an answer stay the same.
    pub cursor_lifetime: Duration,
    /// Rows kept for cursors at most; about 400 bytes each.
    pub cursor_rows_max: usize,
    /// Bytes of a mended event at most.
    pub line_bytes_max: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            request_timeout: Duration::from_secs(30),
            min_position_timeout: Duration::from_secs(30),
            cursor_lifetime: Duration::from_secs(60),
            cursor_rows_max: 200_000,
            line_bytes_max: 1_000_000,
        }
    }
}

/// Lines of a body, each with its number from 1, or why nothing of it can be taken.
pub type SplitResult<'a> = Result<Vec<(u32, Cow<'a, [u8]>)>, Rejection>;
/// Splits a body by its media type into lines.
pub type Split = for<'a> fn(Option<&str>, &'a [u8]) -> SplitResult<'a>;
/// Decodes and checks one line.
pub type Decode = for<'a> fn(&'a [u8]) -> Result<Event<'a>, Rejection>;

/// The codec, as far as surfaces need it. Its default refuses everything.
#[derive(Clone, Copy)]
pub struct Decoders {
    /// Splits bodies that are not NDJSON (those are walked in place).
    pub split: Split,
    /// Decodes a line.
    pub decode: Decode,
}

impl Default for Decoders {
    fn default() -> Self {
        fn refused() -> Rejection {
            Rejection::new(Reason::Malformed, "no decoder is set up")
        }
        Decoders { split: |_, _| Err(refused()), decode: |_| Err(refused()) }
    }
}

impl std::fmt::Debug for Decoders {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Decoders")
    }
}

/// The JSON of an answer, or the refusal.
pub(crate) type Answer = Result<Bytes, Problem>;

/// Where a surface's requests are answered.
pub(crate) struct Desk {
    pub api: Arc<dyn Api>,
    pub decoders: Decoders,
    pub limits: Limits,
    pub cursors: cursor::Cursors,
    /// Becomes true once, when the surface begins to stop.
    pub stopping: Arc<watch::Sender<bool>>,
}

impl Desk {
    /// `node` stands in the cursors, for surfaces whose requests may come to other nodes.
    pub fn new(api: Arc<dyn Api>, decoders: Decoders, limits: Limits, node: &str) -> Desk {
        Desk {
            api,
            decoders,
            cursors: cursor::Cursors::new(limits.cursor_lifetime, limits.cursor_rows_max, node),
            limits,
            stopping: Arc::new(watch::Sender::new(false)),
        }
    }

    /// Number of shards, at least 1.
    pub fn shards(&self) -> u16 {
        self.api.shards().max(1)
    }

    pub fn stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Waits for an answer that needs no position.
    pub async fn plain<T>(&self, asking: BoxFuture<'static, ApiResult<T>>) -> Result<T, Problem> {
        match tokio::time::timeout(self.limits.request_timeout, asking).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(self.late()),
        }
    }

    /// Waits for an answer that includes `position`, if one is given, for at most `timeout`.
    pub async fn answer<T>(
        &self,
        mut asking: BoxFuture<'static, ApiResult<T>>,
        position: Option<&Positions>,
        timeout: Duration,
    ) -> Result<T, Problem> {
        let Some(position) = position else { return self.plain(asking).await };
        let mut stopping = self.stopping.subscribe();
        tokio::select! {
            biased;
            answer = &mut asking => return Ok(answer?),
            _ = stopping.wait_for(|stopping| *stopping) => {
                return Err(Problem::new(Kind::Unavailable, "the server is stopping"));
            }
            () = tokio::time::sleep(timeout) => {}
        }
        let current = self.current(position).await?;
        if covers(&current, position) {
            // The position is there; only the answer takes its time, which `timeout` does not limit.
            return self.plain(asking).await;
        }
        Err(Problem::new(
            Kind::Timeout,
            format!("position {position} was not reached within {timeout:?}"),
        )
        .member("current", current.to_string()))
    }

    /// Where the logs named in `asked` stand.
    async fn current(&self, asked: &Positions) -> Result<Positions, Problem> {
        let status = self.shard_status().await?;
        let mut current = Positions::default();
        for shard in status.iter().filter(|shard| asked.of(shard.shard).is_some()) {
            current.raise(shard.shard, shard.usage_position);
        }
        // Control records reach each shard by itself; the one furthest behind counts.
        if asked.control.is_some() {
            let relevant =
                |shard: &&ShardStatus| asked.shards.is_empty() || asked.of(shard.shard).is_some();
            current.control = status.iter().filter(relevant).map(|s| s.control_position).min();
        }
        Ok(current)
    }

    pub async fn shard_status(&self) -> Result<Vec<ShardStatus>, Problem> {
        tokio::time::timeout(self.limits.request_timeout, self.api.status())
            .await
            .map_err(|_| self.late())
    }

    /// State of every shard.
    pub async fn status(&self) -> Answer {
        #[derive(Serialize)]
        struct Shards {
            shards: Vec<ShardStatus>,
        }
        json(&Shards { shards: self.shard_status().await? })
    }

    fn late(&self) -> Problem {
        Problem::new(
            Kind::Timeout,
            format!("the answer was not found within {:?}", self.limits.request_timeout),
        )
    }
}

/// Whether `current` has reached every position of `asked`.
fn covers(current: &Positions, asked: &Positions) -> bool {
    asked.shards.iter().all(|(shard, position)| current.of(*shard) >= Some(*position))
        && current.control >= asked.control
}

/// Answer to a change: where its record stands. A read with it as `min_position` shows the change.
#[derive(Debug, Serialize)]
struct Changed {
    position: Positions,
}

/// The answer to a change.
fn changed(position: Positions) -> Answer {
    json(&Changed { position })
}

/// An answer as it is sent.
fn json(answer: &impl Serialize) -> Answer {
    serde_json::to_vec(answer).map(Bytes::from).map_err(|error| {
        Problem::new(Kind::Internal, format!("the answer cannot be written as JSON: {error}"))
    })
}

/// JSON of a known form.
pub(crate) fn parsed<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, Problem> {
    serde_json::from_slice(body).map_err(|error| malformed(&error))
}

/// The refusal of a body that is no JSON, or not of the form expected.
fn malformed(error: &serde_json::Error) -> Problem {
    let what: String = error.to_string().chars().take(300).collect();
    Problem::new(Kind::Body, format!("the body is not JSON of the form expected: {what}"))
        .member("line", error.line())
        .member("column", error.column())
}

/// JSON on one line: outside of strings line ends are white space, inside they cannot stand.
pub(crate) fn one_line(json: &[u8]) -> Vec<u8> {
    json.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }).collect()
}
