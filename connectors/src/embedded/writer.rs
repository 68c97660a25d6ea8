//! The writer thread: one per log, the only one that writes.
//!
//! It takes all appends that wait, up to 8 MiB, writes them in one go, syncs once and answers them
//! all (group commit): while the disk works on one group the next one gathers, so the rate grows
//! with the number of concurrent appenders without any delay being added for a single one.
//!
//! Life of a group: conflicts decided, positions and log time given → (a new segment begun) →
//! written → synced → visible to readers → answered. A failure at any step poisons the log: nothing
//! of this group or after it is ever acknowledged, and no step is tried again, since a second sync
//! after a failed one says nothing. A crash at any step leaves what `recovery.rs` decides on.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures::channel::oneshot;
use meterr_operators::time::Time;
use parking_lot::{Condvar, Mutex};
use tokio::sync::OwnedSemaphorePermit;

use crate::embedded::Shared;
use crate::embedded::file::File;
use crate::embedded::recovery::create_segment;
use crate::embedded::segment::{
    HEADER, INDEX_BYTES, IndexEntry, commit_subject, encode_seal, file_name, finish_frame,
};
use crate::embedded::state::{Active, Commit, CommitRecord, Sealed};
use crate::log::{Appended, LogError, LogResult, Message, Record};

/// A group takes no further append beyond this.
const GROUP_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Appends from this size on are written from where they are instead of being gathered.
const GATHER_BYTES_MAX: usize = 256 * 1024;

/// On what condition messages are appended, and when they were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// On none, now.
    Append,
    /// If the last commit record stands there, now.
    Commit { previous: u64 },
    /// If the next position is this one, at the times that stand in the parts.
    Import { first: u64 },
}

/// An append on its way.
pub(super) struct Request {
    pub kind: Kind,
    /// The frames, complete but for what only the writer knows.
    pub frames: Vec<u8>,
    pub parts: Vec<Part>,
    pub reply: oneshot::Sender<LogResult<Appended>>,
    /// Room in the queue, given back when the request goes.
    pub _room: OwnedSemaphorePermit,
}

/// One message of a request; its payload is in the frames.
pub(super) struct Part {
    pub message: Message,
    pub frame: Range<usize>,
    /// Its log time, which the writer gives unless the message is imported.
    pub time: Time,
}

/// Appends that wait. Its length is bounded by the room each of them had to get first.
#[derive(Default)]
pub(super) struct Queue {
    inner: Mutex<Waiting>,
    ready: Condvar,
}

#[derive(Default)]
struct Waiting {
    requests: VecDeque<Request>,
    closed: bool,
}

impl Queue {
    /// Adds a request. Gives false, and drops it, when the queue is closed.
    pub fn push(&self, request: Request) -> bool {
        let mut inner = self.inner.lock();
        if inner.closed {
            return false;
        }
        inner.requests.push_back(request);
        drop(inner);
        self.ready.notify_one();
        true
    }

    /// Takes nothing more; what waits is still written.
    pub fn close(&self) {
        self.inner.lock().closed = true;
        self.ready.notify_one();
    }

    /// All requests that wait, once there are any; none when closed and empty.
    fn take(&self) -> Option<VecDeque<Request>> {
        let mut inner = self.inner.lock();
        while inner.requests.is_empty() {
            if inner.closed {
                return None;
            }
            self.ready.wait(&mut inner);
        }
        Some(std::mem::take(&mut inner.requests))
    }

    fn clear(&self) {
        let dropped = std::mem::take(&mut self.inner.lock().requests);
        drop(dropped);
    }
}

/// The thread's own state.
pub(super) struct Writer {
    shared: Arc<Shared>,
    file: Arc<dyn File>,
    first: u64,
    /// Where the next frame goes.
    offset: u64,
    next: u64,
    time: Option<Time>,
    /// Position of the last commit record.
    commit: u64,
    /// The last one in this segment.
    segment_commit: IndexEntry,
    indexed: Option<u64>,
    buffer: Vec<u8>,
}

/// Stops the log when the thread ends, however it does.
struct Ending(Arc<Shared>);

impl Drop for Ending {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.poison("the writer thread panicked".to_owned());
        }
        self.0.stop();
        // Their appenders find the reply dropped and the log stopped.
        self.0.queue.clear();
    }
}

/// What becomes of a request of a group.
struct Taken {
    request: Request,
    outcome: LogResult<Appended>,
}

impl Writer {
    /// Takes over from recovery; `segment_commit` is the last commit in the active segment.
    pub fn new(shared: Arc<Shared>, segment_commit: IndexEntry) -> Writer {
        let state = shared.state.read();
        let (file, first) = (state.active.file.clone(), state.active.first);
        let (offset, next) = (state.active.frames_end, state.head + 1);
        let (time, commit) = (state.last_time, state.commit.position);
        let indexed = state.active.index.last().map(|entry| entry.offset);
        drop(state);
        let buffer = Vec::new();
        Writer { shared, file, first, offset, next, time, commit, segment_commit, indexed, buffer }
    }

    /// Writes until the queue is closed or a write fails.
    pub fn run(mut self) {
        let ending = Ending(self.shared.clone());
        while let Some(mut requests) = self.shared.queue.take() {
            while !requests.is_empty() {
                if let Err(cause) = self.group(&mut requests) {
                    tracing::error!(
                        stream = self.shared.identity.log.stream,
                        cause,
                        "log poisoned: writing failed"
                    );
                    return;
                }
            }
        }
        if self.next > self.first
            && let Err(e) = self.seal()
        {
            self.shared.poison(format!("cannot seal {}: {e}", file_name(self.first)));
        }
        drop(ending);
    }

    /// Makes one group durable and answers it. On failure the log is poisoned before any reply is
    /// dropped, so that every appender learns the cause.
    fn group(&mut self, requests: &mut VecDeque<Request>) -> Result<(), String> {
        let mut taken = Vec::with_capacity(requests.len().min(1024));
        let mut bytes = 0;
        let first = self.next;
        let fits = |bytes: usize, next: &Request| {
            bytes == 0 || bytes + next.frames.len() <= GROUP_BYTES_MAX
        };
        while requests.front().is_some_and(|next| fits(bytes, next))
            && let Some(mut request) = requests.pop_front()
        {
            let outcome = self.decide(&mut request);
            if outcome.is_ok() {
                bytes += request.frames.len();
            }
            taken.push(Taken { request, outcome });
        }
        if bytes > 0
            && let Err(cause) = self.write(first, bytes, &mut taken)
        {
            self.shared.poison(cause.clone());
            return Err(cause);
        }
        if bytes > 0 {
            self.publish(&mut taken);
        }
        for Taken { request, outcome } in taken {
            // The appender may have gone; its messages are in the log all the same.
            let _ = request.reply.send(outcome);
        }
        Ok(())
    }

    /// Gives positions and time, or refuses a commit that another one came before, or an import that
    /// does not follow. Deciding here, on the only thread that appends, is what makes check and
    /// append one step.
    fn decide(&mut self, request: &mut Request) -> LogResult<Appended> {
        let stream = || self.shared.identity.log.stream.clone();
        let mut time = self.time;
        match request.kind {
            Kind::Commit { previous } if previous != self.commit => {
                let (expected, actual) = (previous, self.commit);
                return Err(LogError::Conflict { stream: stream(), expected, actual });
            }
            Kind::Import { first } if first != self.next => {
                return Err(LogError::Format {
                    stream: stream(),
                    what: format!(
                        "records from position {first} on do not follow its end at {}",
                        self.next - 1
                    ),
                });
            }
            Kind::Import { .. } => time = time.max(request.parts.iter().map(|p| p.time).max()),
            Kind::Append | Kind::Commit { .. } => {
                time = time.max(Some((self.shared.clock)()));
                for part in &mut request.parts {
                    part.time = time.unwrap_or_default();
                }
            }
        }
        let first = self.next;
        for part in &request.parts {
            if commit_subject(&part.message.subject) {
                self.commit = self.next;
            }
            self.next += 1;
        }
        self.time = time;
        Ok(Appended { first, last: self.next - 1, time: time.unwrap_or_default() })
    }

    fn write(&mut self, first: u64, bytes: usize, taken: &mut [Taken]) -> Result<(), String> {
        let room = self.shared.options.segment_bytes.saturating_sub(self.offset);
        if self.offset > HEADER as u64 && bytes as u64 > room {
            self.roll(first)?;
        }
        let failed =
            |what: &str, e: io::Error| format!("cannot {what} {}: {e}", file_name(self.first));
        let salt = self.shared.identity.salt;
        let mut at = self.offset;
        self.buffer.clear();
        for Taken { request, outcome } in taken {
            let Ok(appended) = outcome else { continue };
            for (position, part) in (appended.first..).zip(&request.parts) {
                let frame = &mut request.frames[part.frame.clone()];
                finish_frame(frame, salt, position, part.time, first - 1);
            }
            let large = request.frames.len() >= GATHER_BYTES_MAX;
            if large || self.buffer.len() >= GROUP_BYTES_MAX / 2 {
                self.file.write_at(&self.buffer, at).map_err(|e| failed("write", e))?;
                at += self.buffer.len() as u64;
                self.buffer.clear();
            }
            if large {
                self.file.write_at(&request.frames, at).map_err(|e| failed("write", e))?;
                at += request.frames.len() as u64;
            } else {
                self.buffer.extend_from_slice(&request.frames);
            }
        }
        if !self.buffer.is_empty() {
            self.file.write_at(&self.buffer, at).map_err(|e| failed("write", e))?;
        }
        self.file.sync_data().map_err(|e| failed("sync", e))
    }

    /// Shows a durable group to readers.
    fn publish(&mut self, taken: &mut [Taken]) {
        let mut state = self.shared.state.write();
        for Taken { request, outcome } in taken {
            let Ok(appended) = outcome else { continue };
            let frames = Bytes::from(std::mem::take(&mut request.frames));
            for (position, part) in (appended.first..).zip(request.parts.drain(..)) {
                let entry = IndexEntry { position, offset: self.offset + part.frame.start as u64 };
                if self.indexed.is_none_or(|last| entry.offset - last >= INDEX_BYTES) {
                    state.active.index.push(entry);
                    self.indexed = Some(entry.offset);
                }
                let mut message = part.message;
                // Not the caller's buffer, which may be part of something much larger.
                let payload_at = part.frame.end - message.payload.len();
                message.payload = frames.slice(payload_at..part.frame.end);
                let record = Record { position, time: part.time, message };
                if commit_subject(&record.message.subject) {
                    self.segment_commit = entry;
                    state.commit =
                        Commit { position, record: CommitRecord::Known(detached(&record)) };
                }
                state.tail.push(record, part.frame.len());
            }
            self.offset += frames.len() as u64;
        }
        state.active.frames_end = self.offset;
        state.head = self.next - 1;
        state.last_time = self.time;
        drop(state);
        let head = self.next - 1;
        self.shared.progress.send_modify(|progress| progress.head = head);
    }

    /// Writes index and trailer behind the frames, which are durable already.
    fn seal(&mut self) -> io::Result<(Vec<IndexEntry>, u64)> {
        let state = self.shared.state.read();
        let index = state.active.index.clone();
        let (last, time) = (state.head, state.last_time.unwrap_or_default());
        drop(state);
        let bytes = encode_seal(
            self.shared.identity.salt,
            self.first,
            last,
            time,
            self.segment_commit,
            self.offset,
            &index,
        );
        self.file.write_at(&bytes, self.offset)?;
        self.file.sync_data()?;
        Ok((index, self.offset + bytes.len() as u64))
    }

    /// Seals the segment and begins the next one at `next_first`.
    fn roll(&mut self, next_first: u64) -> Result<(), String> {
        let (index, file_bytes) =
            self.seal().map_err(|e| format!("cannot seal {}: {e}", file_name(self.first)))?;
        let shared = &self.shared;
        self.file = create_segment(&*shared.fs, &shared.dir, &shared.identity, next_first)
            .map_err(|e| format!("cannot begin {}: {e}", file_name(next_first)))?;
        let sealed = Sealed {
            first: self.first,
            last: next_first - 1,
            frames_end: self.offset,
            file_bytes,
            index: Some(index.into()),
        };
        (self.first, self.offset) = (next_first, HEADER as u64);
        (self.segment_commit, self.indexed) = (IndexEntry::default(), None);
        let mut state = shared.state.write();
        state.sealed.push(sealed);
        state.active = Active {
            first: self.first,
            file: self.file.clone(),
            frames_end: self.offset,
            index: Vec::new(),
        };
        Ok(())
    }
}

/// The record with a payload of its own: it is kept for long, and must not keep the whole append.
fn detached(record: &Record) -> Record {
    let mut record = record.clone();
    record.message.payload = Bytes::copy_from_slice(&record.message.payload);
    record
}
