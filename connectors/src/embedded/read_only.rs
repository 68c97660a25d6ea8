//! A data directory that another process has open, looked at without touching it.
//!
//! [`ReadOnlyFs`] reads files as they are and lets every change go by without doing it. A log opened
//! on it is the one that a restart would find at this moment: what recovery cuts off a log that a crash
//! left is here what is just being written. It stays as it was when it was opened, whatever the owner
//! appends. Nothing may be appended to it.
//!
//! Records read this way were written, though the last group may not yet be durable nor acknowledged.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use crate::embedded::file::{File, FileSystem, RealFs};

/// The machine's file system, for reading.
#[derive(Debug, Clone, Copy, Default)]
pub struct ReadOnlyFs;

struct ReadOnlyFile {
    file: std::fs::File,
    /// Its size when it was opened; it may grow.
    bytes: u64,
}

impl File for ReadOnlyFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes)
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        Ok(())
    }
}

fn refused(what: &str, path: &Path) -> io::Error {
    let what = format!("cannot {what} {}: it is only looked at", path.display());
    io::Error::new(io::ErrorKind::ReadOnlyFilesystem, what)
}

impl FileSystem for ReadOnlyFs {
    fn create_dir(&self, dir: &Path) -> io::Result<()> {
        if dir.is_dir() { Ok(()) } else { Err(refused("make", dir)) }
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        RealFs.list(dir)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let file = OpenOptions::new().read(true).open(path)?;
        let bytes = file.metadata()?.len();
        Ok(Arc::new(ReadOnlyFile { file, bytes }))
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        Err(refused("create", path))
    }

    fn rename(&self, from: &Path, _: &Path) -> io::Result<()> {
        Err(refused("rename", from))
    }

    fn remove(&self, _: &Path) -> io::Result<()> {
        // Only a segment that is just being made, or a temporary file, which is passed over.
        Ok(())
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use futures::executor::block_on;

    use super::*;
    use crate::copy::Place;
    use crate::embedded::{EmbeddedLog, EmbeddedOptions, EmbeddedPlace};
    use crate::log::{Log, Message, system_clock};

    fn contents(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files: Vec<_> = std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| (path.clone(), std::fs::read(path).unwrap()))
            .collect();
        files.sort();
        files
    }

    #[test]
    fn a_log_at_work_is_read_as_it_is_now_and_not_touched() {
        let data = tempfile::tempdir().unwrap();
        let dir = data.path().join("log/USAGE_0");
        let options = EmbeddedOptions { segment_bytes: 2000, ..EmbeddedOptions::default() };
        let fs: Arc<dyn FileSystem> = Arc::new(RealFs);
        let opened = EmbeddedLog::open(&dir, "USAGE_0", options.clone(), fs, system_clock());
        let log = opened.unwrap().0;
        let message = |n: u64| Message::new("usage.0.acme", vec![n as u8; 300]);
        let mut seen = Vec::new();
        for n in 1..=40 {
            block_on(log.append(vec![message(n)])).unwrap();
            if n % 7 == 0 {
                let before = contents(&dir);
                let place = EmbeddedPlace::new(data.path(), options.clone(), Arc::new(ReadOnlyFs));
                let found = place.find("USAGE_0").unwrap().unwrap();
                assert_eq!((found.head(), found.identity()), (n, log.identity()));
                seen.push((n, found, place));
                assert_eq!(contents(&dir), before);
            }
        }
        let all = |log: &dyn Log, to: u64| {
            let mut records = Vec::new();
            while (records.len() as u64) < to {
                records.extend(block_on(log.read(records.len() as u64 + 1, 1000)).unwrap());
            }
            records.truncate(to as usize);
            records
        };
        for (n, found, _) in &seen {
            assert_eq!(found.head(), *n, "it stays as it was");
            assert_eq!(all(&**found, *n), all(&*log, *n));
        }
        // Closing seals the last file of a log; not of one that is only looked at.
        let before = contents(&dir);
        drop(seen);
        assert_eq!(contents(&dir), before);
        block_on(log.append(vec![message(41)])).unwrap();

        // A group that is half written is not there yet.
        let mut files = contents(&dir);
        files.retain(|(path, _)| path.extension().is_some());
        let (path, bytes) = files.pop().unwrap();
        log.close().unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 100]).unwrap();
        let place = EmbeddedPlace::new(data.path(), options, Arc::new(ReadOnlyFs));
        assert_eq!(place.find("USAGE_0").unwrap().unwrap().head(), 40);
        assert!(place.find("USAGE_1").unwrap().is_none());
        assert!(!data.path().join("log/USAGE_1").exists());
    }
}
