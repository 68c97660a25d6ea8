//! The log: what meterr believes. One trait for usage, control and output logs; the embedded files,
//! the in-memory log and JetStream streams implement it.
//!
//! A log is a dense sequence of records at positions 1, 2, 3, … Nothing is ever changed in place.
//! Log time is the running maximum of the records' times.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use futures::future::BoxFuture;
use meterr_operators::time::Time;

/// One message to be appended, or read back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// Subject, such as `usage.3.acme`, `usage.3.@batch`, `out.3.commit`.
    pub subject: String,
    /// Headers, such as `ce-id` of a CloudEvent in binary mode. Mostly none.
    pub headers: Vec<(String, String)>,
    /// Payload.
    pub payload: Bytes,
}

impl Message {
    /// A message without headers.
    pub fn new(subject: impl Into<String>, payload: impl Into<Bytes>) -> Self {
        Message { subject: subject.into(), headers: Vec::new(), payload: payload.into() }
    }

    /// What counts against a log's limit: subject, headers and payload, and four bytes for each
    /// length to be written down (so that empty headers do not come for free).
    pub fn bytes(&self) -> usize {
        let headers: usize = self.headers.iter().map(|(k, v)| 8 + k.len() + v.len()).sum();
        8 + self.subject.len() + headers + self.payload.len()
    }
}

/// A message at its place in the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Position, from 1.
    pub position: u64,
    /// When the log took it, by the log's clock. May fall from one record to the next where the clock
    /// went back or another server took over; log time is the running maximum.
    pub time: Time,
    /// The message.
    pub message: Message,
}

/// What an append got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// Position of the first message.
    pub first: u64,
    /// Position of the last message.
    pub last: u64,
    /// Log time of the last message.
    pub time: Time,
}

/// What names a log for ever: a copy or an older state restored underneath has another identity or
/// other content at a known position.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct LogIdentity {
    /// The stream's name, such as `USAGE_3`, `CONTROL`, `OUT_3`.
    pub stream: String,
    /// Random, set at creation.
    pub uuid: String,
}

/// Why a log did not do it.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// Bytes of the log are damaged. Records `from..resume` cannot be read; those from `resume` on can.
    #[error("log {stream:?} is damaged at {place}: records {from} to {} cannot be read", resume - 1)]
    Damaged {
        /// The stream's name.
        stream: String,
        /// File and offset.
        place: String,
        /// First position that cannot be read.
        from: u64,
        /// First readable position after the damage (one past the head when there is none).
        resume: u64,
    },
    /// A fenced append came too late: another writer has committed since.
    #[error("log {stream:?} has its last commit at {actual}, not at {expected} as expected")]
    Conflict {
        /// The stream's name.
        stream: String,
        /// What the caller believed.
        expected: u64,
        /// What is.
        actual: u64,
    },
    /// A message above the limit.
    #[error("a message of {bytes} bytes is above the log's limit of {max}")]
    TooLarge {
        /// Its size.
        bytes: usize,
        /// The limit.
        max: usize,
    },
    /// Writing failed once; nothing more is acknowledged until the log is opened anew. What the
    /// failed write left behind is decided by recovery at that time.
    #[error("log {stream:?} stopped after a failed write: {cause}")]
    Poisoned {
        /// The stream's name.
        stream: String,
        /// The first failure.
        cause: String,
    },
    /// Reading or opening failed.
    #[error("log {stream:?}: {what}")]
    Io {
        /// The stream's name.
        stream: String,
        /// What was tried.
        what: String,
        /// The failure.
        #[source]
        source: std::io::Error,
    },
    /// The server that keeps the log did not do it in time. Whether an append happened is not known.
    #[error("log {stream:?} is not available: {what}")]
    Unavailable {
        /// The stream's name.
        stream: String,
        /// What was tried, and what became of it.
        what: String,
    },
    /// The log is not the one it was a moment ago; an operator must look.
    #[error("log {stream:?}: {what}")]
    Changed {
        /// The stream's name.
        stream: String,
        /// What was found.
        what: String,
    },
    /// The log's files are not what this version can read.
    #[error("log {stream:?}: {what}")]
    Format {
        /// The stream's name.
        stream: String,
        /// What is wrong and what to do.
        what: String,
    },
}

/// Result of a log's operations.
pub type LogResult<T> = Result<T, LogError>;

/// An append-only log. All methods may be called from any thread.
pub trait Log: Send + Sync + 'static {
    /// What names this log for ever.
    fn identity(&self) -> &LogIdentity;

    /// Position of the last *durable* record; 0 when empty.
    fn head(&self) -> u64;

    /// First position still kept (1 unless trimmed).
    fn first(&self) -> u64;

    /// Log time of the last durable record, if any.
    fn last_time(&self) -> Option<Time>;

    /// Learns the true end of the log where others write to it as well. Until then [`Log::head`] and
    /// [`Log::read`] may be behind. A log of this process alone is never behind.
    ///
    /// # Errors
    /// When the end is not to be learnt, or lies before what was known.
    fn refresh(&self) -> BoxFuture<'static, LogResult<()>> {
        Box::pin(futures::future::ready(Ok(())))
    }

    /// Appends messages in order. Resolves when they are durable (all of them, or an error: then none
    /// may be believed; some may stand). A crash may keep a prefix of them. Where other processes
    /// write as well, their messages may come between.
    fn append(&self, messages: Vec<Message>) -> BoxFuture<'static, LogResult<Appended>>;

    /// Appends messages in order and right behind position `head`, if the log still ends there. A crash
    /// may keep a prefix of them.
    ///
    /// # Errors
    /// [`LogError::Conflict`] when it does not.
    fn append_at(
        &self,
        messages: Vec<Message>,
        head: u64,
    ) -> BoxFuture<'static, LogResult<Appended>> {
        // Right for a log of this process alone whose callers take turns.
        if self.head() != head {
            let stream = self.identity().stream.clone();
            let conflict = LogError::Conflict { stream, expected: head, actual: self.head() };
            return Box::pin(futures::future::ready(Err(conflict)));
        }
        self.append(messages)
    }

    /// Appends parts and then the commit record, if the last commit record of this log still stands
    /// at `previous` (0: there is none). The commit record's subject ends in `.commit`.
    ///
    /// # Errors
    /// [`LogError::Conflict`] when another commit came between; nothing was written then.
    fn commit(
        &self,
        parts: Vec<Message>,
        commit: Message,
        previous: u64,
    ) -> BoxFuture<'static, LogResult<Appended>>;

    /// The newest record whose subject ends in `.commit`, if any.
    fn last_commit(&self) -> BoxFuture<'static, LogResult<Option<Record>>>;

    /// Reads durable records from position `from` on: as many as fit `bytes_max` of payload, at
    /// least one if there is any, none past the head.
    ///
    /// # Errors
    /// [`LogError::Damaged`] when `from` itself cannot be read (a damage further on ends the
    /// answer before it).
    fn read(&self, from: u64, bytes_max: usize) -> BoxFuture<'static, LogResult<Vec<Record>>>;

    /// Resolves once the head is beyond `position`, or the log is poisoned or closed.
    fn wait_beyond(&self, position: u64) -> BoxFuture<'static, ()>;

    /// The failure that poisoned the log, if one did: nothing more is acknowledged until it is opened
    /// anew.
    fn failure(&self) -> Option<LogError>;
}

/// Where a log takes its time from. Injected, so that tests and simulation own the clock.
pub type Clock = Arc<dyn Fn() -> Time + Send + Sync>;

/// The machine's clock.
pub fn system_clock() -> Clock {
    Arc::new(|| {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Time(i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
    })
}

/// Largest message a log takes by default, in [`Message::bytes`].
pub const MESSAGE_BYTES_MAX: usize = 17 * 1024 * 1024;
