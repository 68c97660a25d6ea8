//! One process per data directory. Two writers on one log would overwrite each other's records, so
//! the engine takes this lock before it opens anything.
//!
//! The lock is the operating system's (flock): it goes with the process, however that ends, and the
//! file left behind means nothing. The process id inside only serves the error message.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

/// Name of the lock file in the data directory.
const FILE: &str = "meterr.lock";

/// Holds a data directory until dropped.
#[derive(Debug)]
pub struct DataDirLock {
    file: File,
}

/// Why the data directory could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error(
        "data directory {dir:?} is in use by process {holder}; stop it or choose another directory"
    )]
    Held {
        /// The directory.
        dir: PathBuf,
        /// Process id as the lock file tells it, or `unknown`.
        holder: String,
    },
    /// The lock file cannot be used.
    #[error("cannot lock data directory {dir:?}")]
    Io {
        /// The directory.
        dir: PathBuf,
        /// The failure.
        #[source]
        source: io::Error,
    },
}

impl DataDirLock {
    /// Takes the directory, which is made if there is none.
    ///
    /// # Errors
    /// [`LockError::Held`] at once when another process has it; this one never waits.
    pub fn acquire(dir: &Path) -> Result<DataDirLock, LockError> {
        let failed = |source| LockError::Io { dir: dir.to_owned(), source };
        std::fs::create_dir_all(dir).map_err(failed)?;
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.join(FILE))
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(LockError::Held { dir: dir.to_owned(), holder: holder(&mut file) });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        file.set_len(0).map_err(failed)?;
        writeln!(file, "{}", std::process::id()).map_err(failed)?;
        Ok(DataDirLock { file })
    }
}

impl Drop for DataDirLock {
    fn drop(&mut self) {
        // Closing the file releases the lock too; doing it here frees it even where a child
        // process inherited the descriptor.
        let _ = self.file.unlock();
    }
}

fn holder(file: &mut File) -> String {
    let mut text = String::new();
    // The file is ours only by name: take no more of it than a process id can be long.
    match file.take(20).read_to_string(&mut text) {
        Ok(_) if text.trim().parse::<u32>().is_ok() => text.trim().to_owned(),
        _ => "unknown".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn second_holder_is_refused_with_the_first_ones_pid_and_gets_it_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let lock = DataDirLock::acquire(dir.path()).unwrap();
        let refused = DataDirLock::acquire(dir.path()).unwrap_err().to_string();
        assert!(
            refused.contains(&format!("in use by process {}", std::process::id())),
            "{refused}"
        );
        drop(lock);
        DataDirLock::acquire(dir.path()).unwrap();
    }
}
