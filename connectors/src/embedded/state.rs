//! What an open log knows in memory: its segments, its head, and the newest records.
//!
//! Everything here is durable: the writer thread changes it only after the sync that made a group
//! so. Readers take a short lock to find out where to read, then read without it.

use std::collections::VecDeque;
use std::sync::Arc;

use meterr_operators::time::Time;

use crate::embedded::Damage;
use crate::embedded::file::File;
use crate::embedded::segment::IndexEntry;
use crate::log::Record;

/// Everything behind the lock.
pub(super) struct State {
    /// Segments no longer written to, in order. They need not be adjacent: a file may be missing.
    pub sealed: Vec<Sealed>,
    pub active: Active,
    /// Position of the last durable record.
    pub head: u64,
    pub last_time: Option<Time>,
    pub commit: Commit,
    pub tail: Tail,
    /// The first failure of a write.
    pub poisoned: Option<String>,
}

/// The newest commit record.
pub(super) struct Commit {
    /// 0: none.
    pub position: u64,
    pub record: CommitRecord,
}

/// Whether it can be had.
#[derive(Clone)]
pub(super) enum CommitRecord {
    None,
    Known(Record),
    /// It, or one that may be newer, is damaged.
    Damaged(Damage),
}

/// A segment no longer written to.
#[derive(Clone)]
pub(super) struct Sealed {
    pub first: u64,
    /// Last position it holds or held; `first - 1` when none.
    pub last: u64,
    /// Where its frames end.
    pub frames_end: u64,
    /// Length of the file.
    pub file_bytes: u64,
    /// None: still to be read from the file's end.
    pub index: Option<Arc<[IndexEntry]>>,
}

/// The segment written to.
pub(super) struct Active {
    pub first: u64,
    pub file: Arc<dyn File>,
    /// Where the next frame goes.
    pub frames_end: u64,
    pub index: Vec<IndexEntry>,
}

/// The newest records, up to a number of bytes.
pub(super) struct Tail {
    records: VecDeque<(Record, usize)>,
    bytes: usize,
    bytes_max: usize,
}

impl Tail {
    pub fn new(bytes_max: usize) -> Tail {
        Tail { records: VecDeque::new(), bytes: 0, bytes_max }
    }

    /// Adds the record after the last one; `bytes` is what it takes on disk.
    pub fn push(&mut self, record: Record, bytes: usize) {
        self.records.push_back((record, bytes));
        self.bytes += bytes;
        while self.bytes > self.bytes_max
            && let Some((_, bytes)) = self.records.pop_front()
        {
            self.bytes -= bytes;
        }
    }

    /// Records from a position on, as [`crate::log::Log::read`] gives them; none when it is not
    /// held.
    pub fn read(&self, from: u64, bytes_max: usize) -> Option<Vec<Record>> {
        let first = self.records.front()?.0.position;
        let skip = usize::try_from(from.checked_sub(first)?).ok()?;
        let mut budget = Budget::new(bytes_max);
        let wanted = self.records.iter().skip(skip).map(|(record, _)| record);
        let records: Vec<Record> =
            wanted.take_while(|r| budget.take(r.message.payload.len())).cloned().collect();
        if records.is_empty() { None } else { Some(records) }
    }
}

/// Counts payload bytes of an answer: at least one record, then as many as fit.
pub(super) struct Budget {
    left: usize,
    taken: bool,
}

impl Budget {
    pub fn new(bytes_max: usize) -> Budget {
        Budget { left: bytes_max, taken: false }
    }

    /// Whether one more record of so many bytes goes in.
    pub fn take(&mut self, bytes: usize) -> bool {
        if self.taken && bytes > self.left {
            return false;
        }
        self.taken = true;
        self.left = self.left.saturating_sub(bytes);
        true
    }
}

impl State {
    /// Bytes of all segment files.
    pub fn file_bytes(&self) -> u64 {
        self.sealed.iter().map(|s| s.file_bytes).sum::<u64>() + self.active.frames_end
    }
}
