//! Objects as files below a directory.
//!
//! A file is written beside its place under a name of its own, synced, renamed, and the directory
//! synced (also those above it that were made): on return it outlives a power failure, and at no moment
//! is part of it under its name. A crash leaves the file beside, which the next opening removes once it
//! is a day old; another process may still be at work on a younger one.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;

use super::{BLOB_LEN_MAX, BLOBS_MAX, Blob, BlobError, Blobs, check, check_name};

/// What the names of unfinished files begin with; no object's name does.
const UNFINISHED: &str = ".unfinished-";
/// Age of an unfinished file that nobody works on any more.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);

/// A directory as store.
#[derive(Clone)]
pub struct LocalBlobs {
    root: Arc<Path>,
    shown: Arc<str>,
}

impl LocalBlobs {
    /// Opens a directory, which is made if it is not there.
    ///
    /// # Errors
    /// When it cannot be made or read.
    pub fn open(dir: impl AsRef<Path>) -> Result<LocalBlobs, BlobError> {
        let dir = dir.as_ref();
        let failed = |error: std::io::Error| BlobError::new(&dir.display().to_string(), error);
        let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty());
        make(dir, parent.unwrap_or(Path::new("."))).map_err(failed)?;
        let root = dir.canonicalize().map_err(failed)?;
        let shown = root.display().to_string().into();
        let blobs = LocalBlobs { root: root.into(), shown };
        let mut found = Vec::new();
        blobs.walk(&blobs.root, &mut |path, name, meta| {
            let age = meta.modified().ok().and_then(|at| at.elapsed().ok());
            if name.starts_with(UNFINISHED) && age > Some(ABANDONED) {
                found.push(path.to_owned());
            }
            Ok(())
        })?;
        for path in found {
            // Another process may have done it.
            let _ = fs::remove_file(path);
        }
        Ok(blobs)
    }

    fn failed(&self, name: &str, error: &dyn std::fmt::Display) -> BlobError {
        BlobError::new(&self.shown, format!("{name}: {error}"))
    }

    /// Runs on a thread that may block.
    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&LocalBlobs) -> Result<T, BlobError> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, BlobError>> {
        let blobs = self.clone();
        Box::pin(async move {
            let shown = blobs.shown.clone();
            let done = tokio::task::spawn_blocking(move || work(&blobs)).await;
            done.unwrap_or_else(|error| Err(BlobError::new(&shown, error)))
        })
    }

    /// Where an object is. The name was checked, so that it is below the root.
    fn place(&self, name: &str) -> Result<PathBuf, BlobError> {
        check_name(&self.shown, name)?;
        Ok(name.split('/').fold(self.root.to_path_buf(), |path, part| path.join(part)))
    }

    fn write(&self, name: &str, bytes: &Bytes) -> Result<(), BlobError> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = self.place(name)?;
        let dir = path.parent().unwrap_or(&self.root);
        let beside =
            format!("{UNFINISHED}{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let unfinished = dir.join(beside);
        let done = (|| {
            make(dir, &self.root)?;
            let mut file = File::create(&unfinished)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            drop(file);
            fs::rename(&unfinished, &path)?;
            sync(dir)
        })();
        if done.is_err() {
            // What cannot be removed now is removed when it is old.
            let _ = fs::remove_file(&unfinished);
        }
        done.map_err(|error| self.failed(name, &error))
    }

    fn read(&self, name: &str) -> Result<Option<Bytes>, BlobError> {
        let path = self.place(name)?;
        let read = || {
            let file = File::open(&path)?;
            let len = file.metadata()?.len();
            let mut bytes = Vec::with_capacity(len.min(BLOB_LEN_MAX as u64) as usize);
            file.take(BLOB_LEN_MAX as u64 + 1).read_to_end(&mut bytes)?;
            Ok::<_, std::io::Error>(bytes)
        };
        match read() {
            Ok(bytes) if bytes.len() > BLOB_LEN_MAX => {
                Err(self.failed(name, &format!("it has more than {BLOB_LEN_MAX} bytes")))
            }
            Ok(bytes) => Ok(Some(bytes.into())),
            Err(error) if absent(&error) => Ok(None),
            Err(error) => Err(self.failed(name, &error)),
        }
    }

    fn remove(&self, name: &str) -> Result<(), BlobError> {
        let path = self.place(name)?;
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if absent(&error) => return Ok(()),
            Err(error) => return Err(self.failed(name, &error)),
        }
        // Directories that became empty go with it; one that is not empty stays.
        let mut dir = path.parent();
        while let Some(empty) = dir.filter(|dir| **dir != *self.root) {
            if fs::remove_dir(empty).is_err() {
                break;
            }
            dir = empty.parent();
        }
        Ok(())
    }

    fn found(&self, prefix: &str) -> Result<Vec<Blob>, BlobError> {
        let mut blobs = Vec::new();
        // Only what is below the last whole part of the prefix is looked at.
        let from = match prefix.rsplit_once('/') {
            Some((dir, _)) => self.place(dir)?,
            None => self.root.to_path_buf(),
        };
        self.walk(&from, &mut |path, _, meta| {
            let below = path.strip_prefix(&self.root).unwrap_or(path);
            let parts: Option<Vec<&str>> = below.iter().map(|part| part.to_str()).collect();
            let name = parts.unwrap_or_default().join("/");
            if name.starts_with(prefix) && super::problem_of_name(&name).is_none() {
                if blobs.len() >= BLOBS_MAX {
                    return Err(self.failed(prefix, &format!("more than {BLOBS_MAX} objects")));
                }
                blobs.push(Blob { name, bytes: meta.len() });
            }
            Ok(())
        })?;
        blobs.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(blobs)
    }

    /// Visits every file below a directory. Links are not followed; what vanishes is passed over.
    fn walk(
        &self,
        from: &Path,
        visit: &mut dyn FnMut(&Path, &str, &fs::Metadata) -> Result<(), BlobError>,
    ) -> Result<(), BlobError> {
        let mut dirs = vec![from.to_path_buf()];
        while let Some(dir) = dirs.pop() {
            let failed = |error| self.failed(&dir.display().to_string(), &error);
            let entries = match fs::read_dir(&dir) {
                Err(error) if absent(&error) => continue,
                entries => entries.map_err(failed)?,
            };
            for entry in entries {
                let entry = entry.map_err(failed)?;
                let meta = match entry.metadata() {
                    Err(error) if absent(&error) => continue,
                    meta => meta.map_err(failed)?,
                };
                if meta.is_dir() {
                    dirs.push(entry.path());
                } else if meta.is_file() {
                    visit(&entry.path(), &entry.file_name().to_string_lossy(), &meta)?;
                }
            }
        }
        Ok(())
    }
}

fn absent(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

/// Makes directories below `root`, each durable in the one above it.
fn make(dir: &Path, root: &Path) -> std::io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(above) = dir.parent().filter(|above| *above != root && dir != root) {
        make(above, root)?;
    }
    match fs::create_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    match dir.parent().filter(|above| !above.as_os_str().is_empty()) {
        Some(above) => sync(above),
        None => Ok(()),
    }
}

fn sync(dir: &Path) -> std::io::Result<()> {
    File::open(dir)?.sync_all()
}

impl Blobs for LocalBlobs {
    fn shown(&self) -> String {
        self.shown.to_string()
    }

    fn put(&self, name: &str, bytes: Bytes) -> BoxFuture<'static, Result<(), BlobError>> {
        let name = name.to_owned();
        self.run(move |blobs| {
            check(&blobs.shown, &name, &bytes)?;
            // A directory that was emptied may be removed while this is written into it.
            blobs.write(&name, &bytes).or_else(|_| blobs.write(&name, &bytes))
        })
    }

    fn get(&self, name: &str) -> BoxFuture<'static, Result<Option<Bytes>, BlobError>> {
        let name = name.to_owned();
        self.run(move |blobs| blobs.read(&name))
    }

    fn list(&self, prefix: &str) -> BoxFuture<'static, Result<Vec<Blob>, BlobError>> {
        let prefix = prefix.to_owned();
        self.run(move |blobs| blobs.found(&prefix))
    }

    fn delete(&self, name: &str) -> BoxFuture<'static, Result<(), BlobError>> {
        let name = name.to_owned();
        self.run(move |blobs| blobs.remove(&name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blobs::testing::conforms;

    #[tokio::test]
    async fn it_keeps_the_rules_of_a_store() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = LocalBlobs::open(dir.path().join("a/b")).unwrap();
        conforms(&blobs).await;
        // Nothing is left but the directory.
        assert_eq!(fs::read_dir(dir.path().join("a/b")).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn what_was_not_finished_is_no_object_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        let blobs = LocalBlobs::open(dir.path()).unwrap();
        blobs.put("a/b", Bytes::from_static(b"x")).await.unwrap();
        let (young, old) =
            (dir.path().join("a/.unfinished-1-1"), dir.path().join(".unfinished-1-2"));
        fs::write(&young, "half").unwrap();
        let file = File::create(&old).unwrap();
        file.set_modified(std::time::SystemTime::now() - 2 * ABANDONED).unwrap();
        // Nor is what stands behind a link, or has a name that is none.
        std::os::unix::fs::symlink("/etc", dir.path().join("link")).unwrap();
        fs::write(dir.path().join("no name"), "x").unwrap();
        let names = |found: Vec<Blob>| found.into_iter().map(|b| b.name).collect::<Vec<_>>();
        assert_eq!(names(blobs.list("").await.unwrap()), ["a/b"]);
        drop(LocalBlobs::open(dir.path()).unwrap());
        assert!(young.exists() && !old.exists());
        assert!(blobs.list("../").await.is_err());
    }
}
