//! Moving a deployment: its logs copied record by record, with positions, times and identities.
//!
//! 1. [`plan`] looks without writing: whether the target is empty or holds the beginning of the same
//!    logs, and whether it can take every record that is missing.
//! 2. [`copy`] appends what is missing. A copy that was interrupted is planned and copied again, and
//!    goes on behind the last record it finds.
//! 3. [`compare`] reads both sides and compares every record.
//!
//! A copied log has the identity of its source, so checkpoints made from one are good for the other.
//! The source must stand still meanwhile; that is checked, since records that come later would be
//! missing without a word. Logs are copied in the order given: the control log last, so that a
//! deployment without its end is not taken for a whole one.
//!
//! All functions here block; call them from a thread that may.

use std::collections::VecDeque;
use std::sync::Arc;

use futures::executor::block_on;
use futures::future::BoxFuture;
use serde::Serialize;

use crate::log::{Log, LogError, LogIdentity, LogResult, Message, Record};

/// Bytes of payload read at once; also what is made durable together.
pub const CHUNK_BYTES: usize = 4 * 1024 * 1024;
/// Records that a target cannot take, and differences, listed at most.
pub const LISTED_MAX: usize = 20;

/// A log that takes records where they stood elsewhere.
pub trait Import: Log {
    /// Appends records that follow on the head, each at its position and time. Resolves when they are
    /// durable; after an error a prefix of them may be there.
    ///
    /// # Errors
    /// When they do not follow on the head, or cannot be written.
    fn import(&self, records: Vec<Record>) -> BoxFuture<'static, LogResult<()>>;
}

/// A place that holds the logs of a deployment, to copy from or to.
pub trait Place {
    /// Streams of a deployment that are there.
    ///
    /// # Errors
    /// When the place cannot be looked into.
    fn streams(&self) -> LogResult<Vec<String>>;

    /// A stream as it is there, if it is.
    ///
    /// # Errors
    /// When it cannot be opened.
    fn find(&self, stream: &str) -> LogResult<Option<Arc<dyn Log>>>;

    /// Whether what is there is a copy that was not finished. Streams count once they were found.
    ///
    /// # Errors
    /// When that cannot be seen.
    fn unfinished(&self) -> LogResult<bool>;

    /// Why a stream there could not take a message and what to do; `None` when it can.
    fn refuses(&self, stream: &str, message: &Message) -> Option<String>;

    /// Why nothing can be copied behind what a stream found there has; `None` when it can.
    fn obstacle(&self, stream: &str) -> Option<String> {
        let _ = stream;
        None
    }

    /// Called before anything is written: the place holds an unfinished copy from now on.
    ///
    /// # Errors
    /// When that cannot be noted.
    fn begin(&self) -> LogResult<()>;

    /// A stream to write to, created with this identity if it is not there. `to` is the position of
    /// the last record it will be given. All are opened before the first record is copied.
    ///
    /// # Errors
    /// When it cannot be opened or created.
    fn open(&self, identity: &LogIdentity, to: u64) -> LogResult<Arc<dyn Import>>;

    /// Called when everything was copied and found right. Nothing is written after it.
    ///
    /// # Errors
    /// When that cannot be noted.
    fn finish(&self) -> LogResult<()>;
}

/// Whether a name is that of a stream of a deployment.
pub fn belongs(stream: &str) -> bool {
    let numbered = stream.strip_prefix("USAGE_").or_else(|| stream.strip_prefix("OUT_"));
    match numbered {
        Some(number) => number.parse::<u16>().is_ok_and(|n| n.to_string() == number),
        None => stream == "CONTROL",
    }
}

/// Why a copy was not made.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// A log cannot be read or written.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The target is not empty and not the beginning of the same deployment.
    #[error(
        "the target holds another log {stream:?}: {what}; nothing was copied. Name an empty target, or \
         remove what is there if it is not needed"
    )]
    Foreign {
        /// The stream.
        stream: String,
        /// In what it is another.
        what: String,
    },
    /// Records that the target cannot take.
    #[error("the target cannot take {total} records; nothing was copied:\n{}", records.join("\n"))]
    Unfit {
        /// How many.
        total: u64,
        /// The first of them: stream, position, reason.
        records: Vec<String>,
    },
    /// The source is in use.
    #[error(
        "log {stream:?} grew from {from} to {to} records meanwhile: stop whoever writes to the source \
         and run this again, which goes on where it stopped"
    )]
    Moved {
        /// The stream.
        stream: String,
        /// Its end when the copy was planned.
        from: u64,
        /// Its end now.
        to: u64,
    },
    /// The source lacks records.
    #[error("log {stream:?} has no record at position {position}; only whole logs can be copied")]
    Missing {
        /// The stream.
        stream: String,
        /// The first position that is missing.
        position: u64,
    },
}

/// A log to copy.
pub struct Step {
    /// The source.
    pub source: Arc<dyn Log>,
    /// Position of the last record that the target has.
    pub there: u64,
    /// Position of the last record that it is to have.
    pub to: u64,
}

/// What there is to copy.
pub struct Plan {
    /// The logs, in the order they are copied.
    pub steps: Vec<Step>,
    /// Records of all of them.
    pub records: u64,
    /// Records that the target lacks.
    pub missing: u64,
}

/// Told of work done: so many records more.
pub type Heard<'a> = &'a mut dyn FnMut(u64);

/// The records of a log in order, every one of them.
struct Reader<'a> {
    log: &'a dyn Log,
    next: u64,
    to: u64,
}

impl Reader<'_> {
    /// The next few; none at the end.
    fn chunk(&mut self) -> Result<Vec<Record>, CopyError> {
        if self.next > self.to {
            return Ok(Vec::new());
        }
        let mut records = block_on(self.log.read(self.next, CHUNK_BYTES))?;
        records.retain(|record| record.position <= self.to);
        for (position, record) in (self.next..).zip(&records) {
            if record.position != position {
                return Err(self.missing(position));
            }
        }
        let Some(last) = records.last() else { return Err(self.missing(self.next)) };
        self.next = last.position + 1;
        Ok(records)
    }

    fn missing(&self, position: u64) -> CopyError {
        CopyError::Missing { stream: self.log.identity().stream.clone(), position }
    }
}

/// Looks whether and what to copy; writes no record. `heard` is told of records looked at.
///
/// # Errors
/// When the target holds something else or cannot take a record, or a log cannot be read.
pub fn plan(
    sources: &[Arc<dyn Log>],
    target: &dyn Place,
    heard: Heard<'_>,
) -> Result<Plan, CopyError> {
    for stream in target.streams()? {
        if !sources.iter().any(|source| source.identity().stream == stream) {
            let what = "the source has no such log".to_owned();
            return Err(CopyError::Foreign { stream, what });
        }
    }
    let mut plan = Plan { steps: Vec::new(), records: 0, missing: 0 };
    for source in sources {
        block_on(source.refresh())?;
        let to = source.head();
        if source.first() > 1 && to > 0 {
            let stream = source.identity().stream.clone();
            return Err(CopyError::Missing { stream, position: 1 });
        }
        let there = match target.find(&source.identity().stream)? {
            Some(found) => common(&**source, &*found, to)?,
            None => 0,
        };
        let stream = &source.identity().stream;
        if there < to
            && there > 0
            && let Some(what) = target.obstacle(stream)
        {
            return Err(CopyError::Foreign { stream: stream.clone(), what });
        }
        plan.records += to;
        plan.missing += to - there;
        plan.steps.push(Step { source: source.clone(), there, to });
    }
    let (mut total, mut unfit) = (0, Vec::new());
    for step in &plan.steps {
        let stream = &step.source.identity().stream;
        let mut reader = Reader { log: &*step.source, next: step.there + 1, to: step.to };
        loop {
            let records = reader.chunk()?;
            if records.is_empty() {
                break;
            }
            for record in &records {
                let Some(why) = target.refuses(stream, &record.message) else { continue };
                total += 1;
                if unfit.len() < LISTED_MAX {
                    unfit.push(format!("  {stream} position {}: {why}", record.position));
                }
            }
            heard(records.len() as u64);
        }
    }
    if total > 0 {
        return Err(CopyError::Unfit { total, records: unfit });
    }
    Ok(plan)
}

/// How many records the target has of the source, whose end is `to`: all it has must be the source's.
/// Its last one is looked at here; all are in [`compare`].
fn common(source: &dyn Log, found: &dyn Log, to: u64) -> Result<u64, CopyError> {
    let foreign =
        |what: String| Err(CopyError::Foreign { stream: source.identity().stream.clone(), what });
    let (theirs, ours) = (found.identity(), source.identity());
    if theirs != ours {
        return foreign(format!("its identity is {}, the source's is {}", theirs.uuid, ours.uuid));
    }
    block_on(found.refresh())?;
    let head = found.head();
    if head > to {
        return foreign(format!("it has {head} records, more than the source's {to}"));
    }
    if head > 0 {
        let last = |log| Reader { log, next: head, to: head }.chunk();
        let (theirs, ours) = (last(found)?, last(source)?);
        let pair = theirs.first().zip(ours.first());
        if let Some(what) = pair.and_then(|(theirs, ours)| difference(ours, theirs)) {
            return foreign(format!(
                "its last record, at {head}, has another {what} than the source's"
            ));
        }
    }
    Ok(head)
}

/// Copies what the plan says is missing. Call [`Place::finish`] once all was compared.
///
/// # Errors
/// When a log cannot be read or written, or the source grew. What was copied stays, and a new plan
/// goes on from there.
pub fn copy(plan: &Plan, target: &dyn Place, heard: Heard<'_>) -> Result<(), CopyError> {
    target.begin()?;
    let mut logs = Vec::new();
    for step in &plan.steps {
        logs.push(target.open(step.source.identity(), step.to)?);
    }
    for (step, log) in plan.steps.iter().zip(logs) {
        let mut reader = Reader { log: &*step.source, next: step.there + 1, to: step.to };
        loop {
            let records = reader.chunk()?;
            if records.is_empty() {
                break;
            }
            let n = records.len() as u64;
            block_on(log.import(records))?;
            heard(n);
        }
    }
    stands_still(plan)
}

/// Whether the sources still end where they did when the plan was made.
///
/// # Errors
/// [`CopyError::Moved`] when not.
pub fn stands_still(plan: &Plan) -> Result<(), CopyError> {
    for step in &plan.steps {
        block_on(step.source.refresh())?;
        let (from, to) = (step.to, step.source.head());
        if from != to {
            let stream = step.source.identity().stream.clone();
            return Err(CopyError::Moved { stream, from, to });
        }
    }
    Ok(())
}

/// What a comparison found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Compared {
    /// Records compared.
    pub records: u64,
    /// Bytes of their payloads.
    pub bytes: u64,
    /// Records that differ, or that one side lacks.
    pub differences_total: u64,
    /// The first of them, in words.
    pub differences: Vec<String>,
}

impl Compared {
    fn differs(&mut self, what: String) {
        self.differences_total += 1;
        if self.differences.len() < LISTED_MAX {
            self.differences.push(what);
        }
    }
}

/// In what two records differ. Headers are compared by name: their order means nothing, and JetStream
/// does not keep it.
pub fn difference(a: &Record, b: &Record) -> Option<&'static str> {
    let headers = |record: &Record| {
        let mut headers = record.message.headers.clone();
        headers.sort_by(|a, b| a.0.cmp(&b.0));
        headers
    };
    if a.position != b.position {
        Some("position")
    } else if a.time != b.time {
        Some("time")
    } else if a.message.subject != b.message.subject {
        Some("subject")
    } else if a.message.payload != b.message.payload {
        Some("payload")
    } else if headers(a) != headers(b) {
        Some("headers")
    } else {
        None
    }
}

/// Compares two logs record by record, up to the end of the longer one.
///
/// # Errors
/// When one cannot be read.
pub fn compare(
    source: &dyn Log,
    copied: &dyn Log,
    compared: &mut Compared,
    heard: Heard<'_>,
) -> Result<(), CopyError> {
    block_on(source.refresh())?;
    block_on(copied.refresh())?;
    let stream = &source.identity().stream;
    if source.identity() != copied.identity() {
        compared.differs(format!("{stream}: the identities differ"));
    }
    let (to, there) = (source.head(), copied.head());
    if to != there {
        compared.differs(format!("{stream}: {to} records in the source, {there} in the copy"));
    }
    let to = to.min(there);
    let mut left = Reader { log: source, next: 1, to };
    let mut right = Reader { log: copied, next: 1, to };
    let mut waiting: VecDeque<Record> = VecDeque::new();
    loop {
        let records = left.chunk()?;
        if records.is_empty() {
            return Ok(());
        }
        let n = records.len() as u64;
        for record in records {
            if waiting.is_empty() {
                waiting = right.chunk()?.into();
            }
            let Some(other) = waiting.pop_front() else {
                return Err(right.missing(record.position));
            };
            compared.records += 1;
            compared.bytes += record.message.payload.len() as u64;
            if let Some(what) = difference(&record, &other) {
                compared
                    .differs(format!("{stream} position {}: the {what} differs", record.position));
            }
        }
        heard(n);
    }
}
