//! A data directory as a place to copy logs from and to.
//!
//! Each log is created with the identity of the one it is copied from and takes records at the
//! positions and times they had there, in groups that are synced once each; what `recovery.rs` says of
//! a crash holds here too, so an interrupted copy goes on behind the last record found.
//!
//! ```text
//! <data>/copy-unfinished     there from before the first record until the copy is found right
//! ```
//!
//! While that file is there the directory holds a part of a deployment, which must not be served: it
//! would go on from where the part ends.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::future::BoxFuture;
use meterr_operators::time::Time;
use parking_lot::Mutex;

use crate::copy::{Import, Place, belongs};
use crate::embedded::file::FileSystem;
use crate::embedded::identity;
use crate::embedded::writer::Kind;
use crate::embedded::{EmbeddedLog, EmbeddedOptions};
use crate::log::{Log, LogError, LogIdentity, LogResult, Message, Record, system_clock};

/// Says that a copy has not been finished.
const UNFINISHED: &str = "copy-unfinished";

/// Whether a data directory holds a copy that was begun and not finished.
///
/// # Errors
/// When the directory cannot be read.
pub fn unfinished_copy(fs: &dyn FileSystem, data: &Path) -> io::Result<bool> {
    match fs.list(data) {
        Ok(names) => Ok(names.iter().any(|name| name == UNFINISHED)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}

impl Import for EmbeddedLog {
    fn import(&self, records: Vec<Record>) -> BoxFuture<'static, LogResult<()>> {
        let shared = self.shared.clone();
        Box::pin(async move {
            let Some(first) = records.first().map(|record| record.position) else { return Ok(()) };
            if let Some((at, _)) =
                (first..).zip(&records).find(|(at, record)| *at != record.position)
            {
                let what = format!("the records to be taken have a gap before position {at}");
                return Err(LogError::Format { stream: shared.identity.log.stream.clone(), what });
            }
            let messages: Vec<(Message, Time)> =
                records.into_iter().map(|record| (record.message, record.time)).collect();
            shared.submit(messages, Kind::Import { first }).await.map(drop)
        })
    }
}

/// A data directory that logs are copied from or into. The caller holds its
/// [`DataDirLock`](crate::embedded::DataDirLock).
pub struct EmbeddedPlace {
    data: PathBuf,
    options: EmbeddedOptions,
    fs: Arc<dyn FileSystem>,
    opened: Mutex<BTreeMap<String, Arc<EmbeddedLog>>>,
}

impl EmbeddedPlace {
    /// Looks at nothing yet.
    pub fn new(data: &Path, options: EmbeddedOptions, fs: Arc<dyn FileSystem>) -> EmbeddedPlace {
        EmbeddedPlace { data: data.to_owned(), options, fs, opened: Mutex::default() }
    }

    fn dir(&self, stream: &str) -> PathBuf {
        self.data.join("log").join(stream)
    }

    fn names(&self, dir: &Path, stream: &str) -> LogResult<Vec<String>> {
        match self.fs.list(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            other => other.map_err(|e| failed(stream, "cannot list", dir, e)),
        }
    }

    fn log(&self, stream: &str, uuid: Option<&str>) -> LogResult<Arc<EmbeddedLog>> {
        let mut opened = self.opened.lock();
        if let Some(log) = opened.get(stream) {
            return Ok(log.clone());
        }
        let dir = self.dir(stream);
        let (options, fs) = (self.options.clone(), self.fs.clone());
        let (log, _) = EmbeddedLog::start(&dir, stream, uuid, options, fs, system_clock())?;
        opened.insert(stream.to_owned(), log.clone());
        Ok(log)
    }
}

fn failed(stream: &str, what: &str, path: &Path, source: io::Error) -> LogError {
    let what = format!("{what} {}", path.display());
    LogError::Io { stream: stream.to_owned(), what, source }
}

impl Place for EmbeddedPlace {
    fn streams(&self) -> LogResult<Vec<String>> {
        let mut streams = Vec::new();
        for name in self.names(&self.data.join("log"), "CONTROL")? {
            // A directory without an identity is a log whose creation was cut short.
            if belongs(&name) && self.find(&name)?.is_some() {
                streams.push(name);
            }
        }
        Ok(streams)
    }

    fn find(&self, stream: &str) -> LogResult<Option<Arc<dyn Log>>> {
        let names = self.names(&self.dir(stream), stream)?;
        if !names.iter().any(|name| name == identity::FILE) {
            return Ok(None);
        }
        Ok(Some(self.log(stream, None)?))
    }

    fn unfinished(&self) -> LogResult<bool> {
        unfinished_copy(&*self.fs, &self.data)
            .map_err(|e| failed("CONTROL", "cannot list", &self.data, e))
    }

    fn refuses(&self, _: &str, message: &Message) -> Option<String> {
        let (bytes, max) = (message.bytes(), self.options.message_bytes_max);
        (bytes > max).then(|| format!("{bytes} bytes, above the limit of {max}"))
    }

    fn begin(&self) -> LogResult<()> {
        let path = self.data.join(UNFINISHED);
        let write = || {
            self.fs.create_dir(&self.data)?;
            if !unfinished_copy(&*self.fs, &self.data)? {
                self.fs.create(&path)?.sync_data()?;
            }
            self.fs.sync_dir(&self.data)
        };
        write().map_err(|e| failed("CONTROL", "cannot write", &path, e))
    }

    fn open(&self, identity: &LogIdentity, _: u64) -> LogResult<Arc<dyn Import>> {
        Ok(self.log(&identity.stream, Some(&identity.uuid))?)
    }

    fn finish(&self) -> LogResult<()> {
        for log in self.opened.lock().values() {
            log.close()?;
        }
        let path = self.data.join(UNFINISHED);
        let remove = || {
            if unfinished_copy(&*self.fs, &self.data)? {
                self.fs.remove(&path)?;
            }
            self.fs.sync_dir(&self.data)
        };
        remove().map_err(|e| failed("CONTROL", "cannot remove", &path, e))
    }
}
