//! The directory underneath: opening and closing sled so that it cannot take the process along, what
//! its errors mean, and syncing what sled does not sync.

use std::any::Any;
use std::cell::Cell;
use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use crate::checkpoint::CheckpointError;

/// How long sled may take to open before it counts as stuck in a damaged file. sled reads about
/// half of its file when it opens, so this is far above what a sound one takes.
const OPEN_LIMIT: Duration = Duration::from_secs(600);

/// How long to wait for sled's threads to let go of the database. Its `drop` waits without end for a
/// background thread that has panicked.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// How long to wait for the lock of a database that was just closed in this process.
const LOCK_LIMIT: Duration = Duration::from_secs(3);

const CLOSING_THREAD: &str = "checkpoint-close";

/// Why something did not work, by what is to be done about it.
#[derive(Debug)]
pub(super) enum Fail {
    /// The machine's fault, such as a full disk. sled keeps the error: open it anew.
    Io(String),
    /// The files are not what was written, or sled panicked: nothing of them is trusted unchecked.
    Damaged(String),
    /// The database is locked.
    Locked,
    /// Not the store's fault.
    Refused(CheckpointError),
}

impl Fail {
    pub fn cause(self) -> String {
        match self {
            Fail::Io(cause) | Fail::Damaged(cause) => cause,
            Fail::Locked => "the database is locked".to_owned(),
            Fail::Refused(error) => error.to_string(),
        }
    }
}

impl From<CheckpointError> for Fail {
    fn from(error: CheckpointError) -> Fail {
        Fail::Refused(error)
    }
}

impl From<sled::Error> for Fail {
    fn from(error: sled::Error) -> Fail {
        match &error {
            sled::Error::Io(io) => {
                let text = io.to_string();
                if text.contains("could not acquire lock") {
                    Fail::Locked
                } else if text.contains("os error") || text.contains("Os { code") {
                    // sled hands its errors on as text, the operating system's number included.
                    Fail::Io(text)
                } else {
                    Fail::Damaged(text)
                }
            }
            // sled marks its thread pool, which the whole process shares, as broken for good.
            sled::Error::ReportableBug(what) if what.contains("IO thread") => {
                Fail::Io("a thread of sled panicked; restart the process".to_owned())
            }
            error => Fail::Damaged(error.to_string()),
        }
    }
}

impl From<io::Error> for Fail {
    fn from(error: io::Error) -> Fail {
        Fail::Io(error.to_string())
    }
}

/// Runs something that calls sled; a panic becomes an error.
pub(super) fn guard<T>(run: impl FnOnce() -> Result<T, Fail>) -> Result<T, Fail> {
    // sled's own locks do not poison, and after a panic its state is only read once more, each
    // read being verified by hash, before it is given up.
    GUARDS.set(GUARDS.get() + 1);
    let result = catch_unwind(AssertUnwindSafe(run));
    GUARDS.set(GUARDS.get() - 1);
    result.unwrap_or_else(|panic| Err(Fail::Damaged(said(&*panic))))
}

thread_local! {
    static GUARDS: Cell<u32> = const { Cell::new(0) };
}

/// Whether a panic of the current thread is one of sled's that is dealt with: it becomes an error,
/// or ends a background thread of sled's that the next operation will notice. For panic hooks that
/// end the process otherwise.
pub fn in_sled() -> bool {
    let thread = thread::current();
    let name = thread.name().unwrap_or_default();
    GUARDS.get() > 0
        || name.starts_with("sled-io-")
        || name == "log flusher"
        || name == CLOSING_THREAD
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
    // Some of sled's messages print whole pages.
    let end = text.char_indices().nth(300).map_or(text.len(), |(at, _)| at);
    format!("sled panicked: {}", &text[..end])
}

/// Opens the database of a directory on a thread of its own, since sled may panic on a damaged file,
/// and may hang while unwinding. Waits a little for a lock of this process to be let go.
pub(super) fn open_database(dir: &Path, cache_bytes: u64) -> Result<sled::Db, Fail> {
    let begun_at = Instant::now();
    let mut pause = Duration::from_millis(5);
    loop {
        match open_once(dir, cache_bytes) {
            Err(Fail::Locked) if begun_at.elapsed() < LOCK_LIMIT => thread::sleep(pause),
            result => return result,
        }
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

fn open_once(dir: &Path, cache_bytes: u64) -> Result<sled::Db, Fail> {
    let path = dir.to_owned();
    let (sender, receiver) = mpsc::sync_channel(1);
    let run = move || {
        let opened = guard(|| {
            let config = sled::Config::new()
                .path(&path)
                // The default is 1 GiB, and limits of cgroup v2 are not noticed.
                .cache_capacity(cache_bytes)
                // Not for durability, which we see to, but because space is only reclaimed by the
                // thread that this starts.
                .flush_every_ms(Some(500));
            Ok(config.open()?)
        });
        // Nobody waits any more after the limit: close what came too late.
        if let Err(mpsc::SendError(Ok(late))) = sender.send(opened) {
            drop(late);
        }
    };
    thread::Builder::new().name("checkpoint-open".to_owned()).spawn(run)?;
    match receiver.recv_timeout(OPEN_LIMIT) {
        Ok(opened) => opened,
        Err(mpsc::RecvTimeoutError::Timeout) => {
            Err(Fail::Damaged(format!("sled did not open within {} s", OPEN_LIMIT.as_secs())))
        }
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            Err(Fail::Damaged("sled's opening thread ended without a word".to_owned()))
        }
    }
}

/// Closes a database; false when sled does not let go of it in time. It is then leaked, since
/// waiting for ever would stop the process from ending.
pub(super) fn close_database(db: sled::Db) -> bool {
    let (sender, receiver) = mpsc::sync_channel(1);
    let run = move || {
        let _ = catch_unwind(AssertUnwindSafe(|| drop(db)));
        let _ = sender.send(());
    };
    let spawned = thread::Builder::new().name(CLOSING_THREAD.to_owned()).spawn(run);
    spawned.is_ok() && receiver.recv_timeout(CLOSE_LIMIT).is_ok()
}

/// Writes what sled has buffered and makes it durable. sled's `flush` alone does not on Linux: it
/// calls `sync_file_range`, which leaves out the file's length and the drive's cache.
pub(super) fn sync_database(db: &sled::Db, dir: &Path) -> Result<(), Fail> {
    db.flush()?;
    // A failed sync may have dropped the dirty pages, and a later one would say that all is well.
    let distrust = |error: io::Error| Fail::Damaged(format!("fsync failed: {error}"));
    let sync = |path: &Path| fs::OpenOptions::new().read(true).open(path)?.sync_all();
    sync(&dir.join("db")).map_err(distrust)?;
    // Values are kept too small for files of their own. Should sled make one all the same, it is
    // part of the state.
    let blobs = dir.join("blobs");
    let mut any = false;
    for blob in fs::read_dir(&blobs)? {
        any = true;
        match sync(&blob?.path()) {
            // sled's cleaning removes them at any time.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            result => result.map_err(distrust)?,
        }
    }
    if any { sync_dir(&blobs).map_err(distrust) } else { Ok(()) }
}

/// Makes a directory's entries durable.
pub(super) fn sync_dir(dir: &Path) -> io::Result<()> {
    // Windows cannot sync a directory, nor does it need to.
    if cfg!(windows) { Ok(()) } else { fs::File::open(dir)?.sync_all() }
}

/// Makes the entry of `path` in its parent durable.
pub(super) fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => sync_dir(parent),
        _ => sync_dir(Path::new(".")),
    }
}

/// A path beside the directory: its name with a suffix.
pub(super) fn beside(dir: &Path, suffix: &str) -> PathBuf {
    let mut name = dir.file_name().map(std::ffi::OsStr::to_owned).unwrap_or_default();
    name.push(".");
    name.push(suffix);
    dir.with_file_name(name)
}

/// Where a damaged directory goes: `<name>.damaged-<time>`, free at the moment.
pub(super) fn aside(dir: &Path) -> PathBuf {
    let now = jiff::Timestamp::now().strftime("%Y%m%dT%H%M%SZ").to_string();
    let numbered = |n: u32| match n {
        0 => beside(dir, &format!("damaged-{now}")),
        n => beside(dir, &format!("damaged-{now}-{n}")),
    };
    (0..).map(numbered).find(|path| !path.exists()).unwrap_or_else(|| numbered(0))
}

/// Removes a directory of ours that is not in use, if it is there.
pub(super) fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Bytes of all files in a directory and below.
pub(super) fn size_of(dir: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        match entry.metadata() {
            Ok(data) if data.is_dir() => bytes += size_of(&entry.path())?,
            Ok(data) => bytes += data.len(),
            // Removed by sled meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(bytes)
}
