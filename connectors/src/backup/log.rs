//! A log as a backup has it, to be read like any other: restoring is copying from such logs.

use std::sync::Arc;

use futures::future::BoxFuture;
use meterr_operators::time::Time;
use parking_lot::Mutex;

use super::BackupError;
use super::manifest::{LogPart, SegmentPart};
use super::store::Store;
use crate::log::{Appended, Log, LogError, LogIdentity, LogResult, Message, Record};

/// A segment's number and its records.
type Cached = Option<(usize, Arc<Vec<Record>>)>;

/// A log of a backup, up to some position. Cannot be written.
pub struct BackupLog {
    identity: LogIdentity,
    shared: Arc<Shared>,
    head: u64,
}

struct Shared {
    store: Store,
    part: LogPart,
    /// The segment read last: reading goes on from where it was.
    cached: Mutex<Cached>,
}

impl Shared {
    fn segment(&self, number: usize) -> Result<Arc<Vec<Record>>, BackupError> {
        let mut cached = self.cached.lock();
        if let Some((at, records)) = &*cached
            && *at == number
        {
            return Ok(records.clone());
        }
        let records = match self.part.segments.get(number) {
            Some(part) => Arc::new(self.store.segment(&self.part.identity.stream, part)?),
            None => Arc::default(),
        };
        *cached = Some((number, records.clone()));
        Ok(records)
    }

    /// The segment that holds a position, or the next one.
    fn number(&self, position: u64) -> usize {
        self.part.segments.partition_point(|part: &SegmentPart| part.last < position)
    }

    fn failed(&self, error: BackupError) -> LogError {
        let stream = self.part.identity.stream.clone();
        match error {
            BackupError::Log(error) => error,
            BackupError::Blob(error) => LogError::Unavailable { stream, what: error.to_string() },
            error => LogError::Changed { stream, what: error.to_string() },
        }
    }

    fn read(&self, from: u64, to: u64, bytes_max: usize) -> Result<Vec<Record>, BackupError> {
        let from = from.max(1);
        if from > to {
            return Ok(Vec::new());
        }
        let segment = self.segment(self.number(from))?;
        let mut left = bytes_max;
        let mut records = Vec::new();
        let wanted = segment.iter().filter(|record| (from..=to).contains(&record.position));
        for record in wanted {
            let bytes = record.message.payload.len();
            if !records.is_empty() && bytes > left {
                break;
            }
            left = left.saturating_sub(bytes);
            records.push(record.clone());
        }
        Ok(records)
    }
}

impl BackupLog {
    /// The whole log, under its own identity.
    pub fn new(store: &Store, part: &LogPart) -> BackupLog {
        let (store, part) = (store.clone(), part.clone());
        let (identity, head) = (part.identity.clone(), part.head);
        let shared = Arc::new(Shared { store, part, cached: Mutex::default() });
        BackupLog { identity, shared, head }
    }

    /// The same log up to a position, under an identity.
    #[must_use]
    pub fn cut(&self, to: u64, identity: LogIdentity) -> BackupLog {
        BackupLog { identity, shared: self.shared.clone(), head: to.min(self.head) }
    }

    /// Position of the last record whose log time is not after `time`: the records that the log had
    /// then. 0: none.
    ///
    /// # Errors
    /// When a segment cannot be read.
    pub fn position_at(&self, time: Time) -> Result<u64, BackupError> {
        let parts = &self.shared.part.segments;
        let number = parts.partition_point(|part| part.time <= time);
        let before = number.checked_sub(1).and_then(|before| parts.get(before));
        let mut position = before.map_or(0, |part| part.last);
        if number < parts.len() {
            for record in self.shared.segment(number)?.iter() {
                if record.time > time {
                    break;
                }
                position = record.position;
            }
        }
        Ok(position.min(self.head))
    }

    /// Calls `each` with every record from position `to` back to the first, until it says stop.
    ///
    /// # Errors
    /// When a segment cannot be read.
    pub fn backwards(
        &self,
        to: u64,
        mut each: impl FnMut(&Record) -> bool,
    ) -> Result<(), BackupError> {
        let to = to.min(self.head);
        if to == 0 {
            return Ok(());
        }
        for number in (0..=self.shared.number(to)).rev() {
            for record in self.shared.segment(number)?.iter().rev() {
                if record.position <= to && !each(record) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn read_only(&self) -> LogError {
        let what = "it is a backup, which cannot be written".to_owned();
        LogError::Format { stream: self.identity.stream.clone(), what }
    }
}

impl Log for BackupLog {
    fn identity(&self) -> &LogIdentity {
        &self.identity
    }

    fn head(&self) -> u64 {
        self.head
    }

    fn first(&self) -> u64 {
        1
    }

    fn last_time(&self) -> Option<Time> {
        let segment = self.shared.part.segments.get(self.shared.number(self.head))?;
        (self.head > 0).then_some(segment.time)
    }

    fn append(&self, _: Vec<Message>) -> BoxFuture<'static, LogResult<Appended>> {
        Box::pin(std::future::ready(Err(self.read_only())))
    }

    fn commit(
        &self,
        _: Vec<Message>,
        _: Message,
        _: u64,
    ) -> BoxFuture<'static, LogResult<Appended>> {
        Box::pin(std::future::ready(Err(self.read_only())))
    }

    fn last_commit(&self) -> BoxFuture<'static, LogResult<Option<Record>>> {
        let mut found = None;
        let looked = self.backwards(self.head, |record| {
            let commit = record.message.subject.ends_with(".commit");
            if commit {
                found = Some(record.clone());
            }
            !commit
        });
        let answer = looked.map(|()| found).map_err(|error| self.shared.failed(error));
        Box::pin(std::future::ready(answer))
    }

    fn read(&self, from: u64, bytes_max: usize) -> BoxFuture<'static, LogResult<Vec<Record>>> {
        let answer = self.shared.read(from, self.head, bytes_max);
        let answer = answer.map_err(|error| self.shared.failed(error));
        Box::pin(std::future::ready(answer))
    }

    fn wait_beyond(&self, _: u64) -> BoxFuture<'static, ()> {
        // It never grows.
        Box::pin(std::future::ready(()))
    }

    fn failure(&self) -> Option<LogError> {
        None
    }
}

/// The identity of a restored log: another than that of the log it was, since both may go on from here
/// and would have different records under the same positions. It tells which restore made it (`restore`,
/// a random text of hexadecimal digits), so that one that was interrupted goes on under the same, and
/// depends on what was restored, so that no other can go on in its place.
pub fn restored_identity(
    original: &LogIdentity,
    restore: &str,
    manifest: &str,
    to: u64,
) -> LogIdentity {
    let mut hasher = blake3::Hasher::new_derive_key("meterr 2026-11 identity of a restored log");
    for part in [&original.stream, &original.uuid, restore, manifest, &to.to_string()] {
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    let hash = hasher.finalize().to_hex();
    LogIdentity { stream: original.stream.clone(), uuid: format!("{restore}-{}", &hash[..32]) }
}
