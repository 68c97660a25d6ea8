//! The embedded log: files of one directory per stream, for a deployment without any server.
//!
//! ```text
//! <data>/log/USAGE_3/identity                    what the directory is        (identity.rs)
//!                    00000000000000000001.log    segments, named by the first (segment.rs)
//!                    00000000000000052311.log    position they hold
//! ```
//!
//! Invariants:
//! * A record is durable before it is acknowledged or can be read (`writer.rs`).
//! * What is read was written: every record's checksums and position are verified on every read
//!   from a file (`reader.rs`, `scan.rs`).
//! * Whatever a crash or damage left, opening finds every acknowledged record that still can be
//!   read, and says which cannot (`recovery.rs`, with a table of cases).
//!
//! Limits: a message of 17 MiB, 2³² frames and 2⁶⁴ bytes a segment, one process (the engine holds
//! [`DataDirLock`]). Nothing is trimmed. Memory per log: the newest 8 MiB of records, up to 64 MiB
//! of appends that wait, and 16 KiB for each segment of 64 MiB that was read from.
//!
//! On a crash: appends not acknowledged may be kept whole, kept as a prefix, or be gone. Files
//! never shrink but for a torn tail, and nothing is changed in place but for the last group, which
//! is written over itself with the same bytes.

mod fault;
mod file;
mod identity;
mod import;
mod lock;
mod read_only;
mod reader;
mod recovery;
mod scan;
mod segment;
mod state;
mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use futures::channel::oneshot;
use futures::future::BoxFuture;
use meterr_operators::time::Time;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Semaphore, watch};

pub use fault::FaultFs;
pub use file::{File, FileSystem, RealFs};
pub use import::{EmbeddedPlace, unfinished_copy};
pub use lock::{DataDirLock, LockError};
pub use read_only::ReadOnlyFs;

use crate::log::{
    Appended, Clock, Log, LogError, LogIdentity, LogResult, MESSAGE_BYTES_MAX, Message, Record,
};
use identity::Identity;
use segment::{FRAME, commit_subject, encode_frame};
use state::{CommitRecord, State};
use writer::{Kind, Part, Queue, Request, Writer};

/// Unit in which room in the queue is counted, in bytes.
const ROOM_BYTES: usize = 1024;

/// Sizes of a log.
#[derive(Debug, Clone)]
pub struct EmbeddedOptions {
    /// A new segment begins when the current one would grow beyond this many bytes. An append never
    /// spans two segments, so a large one can make a segment larger.
    pub segment_bytes: u64,
    /// Largest message, in [`Message::bytes`]. At most 1 GiB.
    pub message_bytes_max: usize,
    /// Bytes of the newest records kept in memory.
    pub tail_bytes: usize,
    /// Bytes of appends that may wait for the disk; further ones wait before they are encoded.
    pub queue_bytes_max: usize,
}

impl Default for EmbeddedOptions {
    fn default() -> Self {
        EmbeddedOptions {
            segment_bytes: 64 * 1024 * 1024,
            message_bytes_max: MESSAGE_BYTES_MAX,
            tail_bytes: 8 * 1024 * 1024,
            queue_bytes_max: 64 * 1024 * 1024,
        }
    }
}

/// Bytes of a log that are not what was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// File and offset.
    pub place: String,
    /// First position that cannot be read.
    pub from: u64,
    /// First readable position after it. Equal to `from` when no record is lost: a header, an index
    /// or foreign bytes between records.
    pub resume: u64,
}

/// What opening a log found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RecoveryReport {
    /// There was no log; it was created.
    pub created: bool,
    /// Records up to the head, lost ones included.
    pub records: u64,
    /// Segment files.
    pub segments: usize,
    /// Bytes of all segment files.
    pub bytes: u64,
    /// Bytes cut off the end: of appends that a crash interrupted. Not zero after a crash is normal,
    /// otherwise not.
    pub cut_bytes: u64,
    /// Damage seen without reading sealed segments in full, by position.
    pub damaged: Vec<Damage>,
}

/// A log in files. Closed when dropped; dropping waits for what is being written.
pub struct EmbeddedLog {
    shared: Arc<Shared>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    identity: Identity,
    dir: PathBuf,
    options: EmbeddedOptions,
    fs: Arc<dyn FileSystem>,
    clock: Clock,
    state: RwLock<State>,
    queue: Queue,
    room: Arc<Semaphore>,
    progress: watch::Sender<Progress>,
    last_opened: Mutex<Option<(u64, Arc<dyn File>)>>,
}

#[derive(Debug, Clone, Copy)]
struct Progress {
    head: u64,
    stopped: bool,
}

impl EmbeddedLog {
    /// Opens the log of a stream in its directory, creating both if there is none, and starts its
    /// writer thread. The caller sees to it that no other process has the directory open.
    ///
    /// # Errors
    /// [`LogError::Format`] when the directory holds another stream, another version's files or a
    /// mixture; [`LogError::Io`] when it cannot be read or written. Damage is no error here.
    pub fn open(
        dir: &Path,
        stream: &str,
        options: EmbeddedOptions,
        fs: Arc<dyn FileSystem>,
        clock: Clock,
    ) -> LogResult<(Arc<EmbeddedLog>, RecoveryReport)> {
        EmbeddedLog::start(dir, stream, None, options, fs, clock)
    }

    fn start(
        dir: &Path,
        stream: &str,
        uuid: Option<&str>,
        options: EmbeddedOptions,
        fs: Arc<dyn FileSystem>,
        clock: Clock,
    ) -> LogResult<(Arc<EmbeddedLog>, RecoveryReport)> {
        let opened = recovery::open(&*fs, dir, stream, uuid, options.tail_bytes)?;
        let room = (options.queue_bytes_max / ROOM_BYTES).clamp(1, Semaphore::MAX_PERMITS);
        let progress = Progress { head: opened.state.head, stopped: false };
        let shared = Arc::new(Shared {
            identity: opened.identity,
            dir: dir.to_owned(),
            options,
            fs,
            clock,
            state: RwLock::new(opened.state),
            queue: Queue::default(),
            room: Arc::new(Semaphore::new(room)),
            progress: watch::Sender::new(progress),
            last_opened: Mutex::new(None),
        });
        let writer = Writer::new(shared.clone(), opened.segment_commit);
        let thread = std::thread::Builder::new()
            .name(format!("log {stream}"))
            .spawn(move || writer.run())
            .map_err(|e| shared.io("cannot start the writer thread for", "", e))?;
        let log = EmbeddedLog { shared, writer: Mutex::new(Some(thread)) };
        Ok((Arc::new(log), opened.report))
    }

    /// Takes no more appends, makes those that wait durable, seals the last segment and ends the
    /// writer thread. Blocks until that is done. Reads go on.
    ///
    /// # Errors
    /// [`LogError::Poisoned`] when a write failed, now or before.
    pub fn close(&self) -> LogResult<()> {
        self.shared.room.close();
        self.shared.queue.close();
        if let Some(thread) = self.writer.lock().take()
            && thread.join().is_err()
        {
            self.shared.poison("the writer thread panicked".to_owned());
        }
        self.shared.check_poison()
    }

    /// Reads every byte of every record and reports all damage, by position. Takes as long as
    /// reading the files; appends and reads go on meanwhile.
    ///
    /// # Errors
    /// [`LogError::Io`] when a file cannot be read.
    pub fn verify(&self) -> LogResult<Vec<Damage>> {
        self.shared.verify()
    }

    /// Bytes of all segment files.
    pub fn records_bytes(&self) -> u64 {
        self.shared.state.read().file_bytes()
    }

    /// Why the log takes no appends any more, if a write failed.
    pub fn poisoned(&self) -> Option<String> {
        self.shared.state.read().poisoned.clone()
    }
}

impl Drop for EmbeddedLog {
    fn drop(&mut self) {
        if let Err(error) = self.close() {
            tracing::warn!(%error, "log closed after a failure");
        }
    }
}

impl Shared {
    fn io(&self, what: &str, name: &str, source: io::Error) -> LogError {
        let path = self.dir.join(name);
        LogError::Io {
            stream: self.identity.log.stream.clone(),
            what: format!("{what} {}", path.display()),
            source,
        }
    }

    fn poison(&self, cause: String) {
        self.state.write().poisoned.get_or_insert(cause);
        self.room.close();
        self.queue.close();
    }

    fn check_poison(&self) -> LogResult<()> {
        match &self.state.read().poisoned {
            Some(cause) => Err(LogError::Poisoned {
                stream: self.identity.log.stream.clone(),
                cause: cause.clone(),
            }),
            None => Ok(()),
        }
    }

    fn stop(&self) {
        self.room.close();
        self.queue.close();
        self.progress.send_modify(|progress| progress.stopped = true);
    }

    /// Why an append did not get through.
    fn stopped(&self) -> LogError {
        match self.check_poison() {
            Err(poisoned) => poisoned,
            Ok(()) => LogError::Io {
                stream: self.identity.log.stream.clone(),
                what: "cannot append".to_owned(),
                source: io::Error::new(io::ErrorKind::BrokenPipe, "the log is closed"),
            },
        }
    }

    async fn submit(
        self: Arc<Self>,
        messages: Vec<(Message, Time)>,
        kind: Kind,
    ) -> LogResult<Appended> {
        self.check_poison()?;
        let max = self.options.message_bytes_max.min(1 << 30);
        let mut bytes_total = 0;
        for (message, _) in &messages {
            let bytes = message.bytes();
            if bytes > max {
                return Err(LogError::TooLarge { bytes, max });
            }
            bytes_total += FRAME + bytes;
        }
        if messages.is_empty() {
            let state = self.state.read();
            let time = state.last_time.unwrap_or_default();
            return Ok(Appended { first: state.head + 1, last: state.head, time });
        }
        // An append larger than the whole queue waits until it has it for itself.
        let most = (self.options.queue_bytes_max / ROOM_BYTES).clamp(1, u32::MAX as usize);
        let units = bytes_total.div_ceil(ROOM_BYTES).min(most) as u32;
        let Ok(room) = self.room.clone().acquire_many_owned(units).await else {
            return Err(self.stopped());
        };
        let mut frames = Vec::with_capacity(bytes_total);
        let encode = |(message, time): (Message, Time)| {
            let start = frames.len();
            encode_frame(&message, self.identity.salt, &mut frames);
            Part { message, frame: start..frames.len(), time }
        };
        let parts = messages.into_iter().map(encode).collect();
        let (reply, answer) = oneshot::channel();
        if !self.queue.push(Request { kind, frames, parts, reply, _room: room }) {
            return Err(self.stopped());
        }
        match answer.await {
            Ok(outcome) => outcome,
            Err(oneshot::Canceled) => Err(self.stopped()),
        }
    }
}

/// Messages whose time the writer gives.
fn untimed(messages: Vec<Message>) -> Vec<(Message, Time)> {
    messages.into_iter().map(|message| (message, Time::default())).collect()
}

/// Appends take effect from the first poll on; dropping the future later does not take them back.
/// Reads block the polling thread for the time of a few reads from files, which the page cache
/// mostly answers; long scans belong on a thread that may block.
///
/// Where damage may hide the newest commit record, `last_commit` gives the damage as its error, and
/// `commit` takes `resume - 1` for the place of the last commit: nobody passes by accident, and who
/// has decided to go on can.
impl Log for EmbeddedLog {
    fn identity(&self) -> &LogIdentity {
        &self.shared.identity.log
    }

    fn head(&self) -> u64 {
        self.shared.state.read().head
    }

    fn first(&self) -> u64 {
        1
    }

    fn last_time(&self) -> Option<Time> {
        self.shared.state.read().last_time
    }

    fn append(&self, messages: Vec<Message>) -> BoxFuture<'static, LogResult<Appended>> {
        Box::pin(self.shared.clone().submit(untimed(messages), Kind::Append))
    }

    fn commit(
        &self,
        parts: Vec<Message>,
        commit: Message,
        previous: u64,
    ) -> BoxFuture<'static, LogResult<Appended>> {
        let shared = self.shared.clone();
        Box::pin(async move {
            if !commit_subject(&commit.subject) {
                return Err(LogError::Format {
                    stream: shared.identity.log.stream.clone(),
                    what: format!(
                        "the subject of a commit record ends in \".commit\", not {:?}",
                        commit.subject
                    ),
                });
            }
            let mut messages = parts;
            messages.push(commit);
            shared.submit(untimed(messages), Kind::Commit { previous }).await
        })
    }

    fn last_commit(&self) -> BoxFuture<'static, LogResult<Option<Record>>> {
        let record = self.shared.state.read().commit.record.clone();
        let answer = match record {
            CommitRecord::None => Ok(None),
            CommitRecord::Known(record) => Ok(Some(record)),
            CommitRecord::Damaged(damage) => Err(self.shared.damaged(damage)),
        };
        Box::pin(std::future::ready(answer))
    }

    fn read(&self, from: u64, bytes_max: usize) -> BoxFuture<'static, LogResult<Vec<Record>>> {
        let shared = self.shared.clone();
        Box::pin(async move { shared.read(from, bytes_max) })
    }

    fn wait_beyond(&self, position: u64) -> BoxFuture<'static, ()> {
        let mut progress = self.shared.progress.subscribe();
        Box::pin(async move {
            // An error means that the log is gone, which ends the wait too.
            let _ = progress.wait_for(|p| p.stopped || p.head > position).await;
        })
    }

    fn failure(&self) -> Option<LogError> {
        let stream = self.shared.identity.log.stream.clone();
        self.poisoned().map(|cause| LogError::Poisoned { stream, cause })
    }
}
