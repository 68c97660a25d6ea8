//! Backups of a deployment in a store of blobs: its logs, cut into segments, and manifests that say
//! which segments make a backup.
//!
//! ```text
//! segment/<hash>            some records of one log in a row             (content.rs, object.rs)
//! backup/<time>-<id>        manifest: the logs, and the segments of each (manifest.rs)
//! making/<time>-<id>        a backup is being made     } marks, by which a clean-up and a backup
//! pruning/<time>-<id>       a clean-up is under way    } that is being made keep apart (prune.rs)
//! ```
//!
//! **Incremental.** A log is always cut at the same positions: a segment is full when the next record
//! would make it larger than [`SEGMENT_BYTES`] or the [`SEGMENT_RECORDS`] are reached, counted from the
//! log's first record. So what was there the last time gives the same segments, which have the same
//! names and are not written again; only the last segment of each log, if it was not full, is.
//!
//! **A consistent cut.** Three kinds of logs grow while they are read. A commit record names the
//! positions of usage and control that it contains, so whoever restores needs at least these. The ends
//! of all output logs are therefore learnt *first*, at their last commit record, and those of usage
//! and control afterwards: by then these reach at least as far as any commit seen, since an epoch is
//! committed only after what it contains was durable. What lies in usage and control behind the last
//! commit is acknowledged and is kept; a restored engine counts it when it starts. (Seen the other way
//! round, a commit could come between and name records that the backup lacks.)
//!
//! **Written last.** The manifest is written when every segment it names is in the store, so a backup
//! that was interrupted is none; what it had written is used by the next one.
//!
//! **Believed only when checked.** A segment is named by the hash of its content, a manifest holds a
//! hash of itself, and both are checked on every read, with the positions. With a [`Key`] everything is
//! encrypted and authenticated, and names are keyed, so that a store shows no content, nor whether
//! two deployments with different keys have the same.
//!
//! Functions here block; call them from a thread that may.

mod content;
mod create;
mod log;
mod manifest;
mod object;
mod prune;
mod store;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use content::{SEGMENT_BYTES, SEGMENT_RECORDS};
pub use create::{About, Made, Wanted, create};
pub use log::{BackupLog, restored_identity};
pub use manifest::{FORMAT, LastCommit, LogPart, Manifest, SegmentPart, name_time};
pub use object::{Key, KeyError};
pub use prune::{Pruned, prune};
pub use store::{Listed, Store, Verified};

use crate::blobs::BlobError;
use crate::log::LogError;

/// Told of work done: so many records, or objects, more.
pub type Heard<'a> = &'a mut dyn FnMut(u64);

/// Why a backup was not made or cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// The store failed.
    #[error(transparent)]
    Blob(#[from] BlobError),
    /// A log cannot be read.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The store has no such backup.
    #[error("{store} has no backup {name:?}; `meterr backup list` shows those there are")]
    Absent {
        /// The store.
        store: String,
        /// Name asked for.
        name: String,
    },
    /// An object that a backup needs is not there.
    #[error("{name:?} is missing from {store}")]
    Missing {
        /// The store.
        store: String,
        /// The object.
        name: String,
    },
    /// An object is not what was written.
    #[error("{name:?} in {store} is damaged: {what}")]
    Damaged {
        /// The store.
        store: String,
        /// The object.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// A newer version wrote it.
    #[error("{name:?} has format {found}, written by a newer meterr; this one knows up to {known}")]
    Newer {
        /// The object.
        name: String,
        /// Its format.
        found: u32,
        /// The newest format known.
        known: u32,
    },
    /// It is encrypted, and no key or another one was given.
    #[error("{name:?} is encrypted{}", if *given { " with another key than the one given" } else { "; give its key (--key-file, or backup.key_file)" })]
    Locked {
        /// The object.
        name: String,
        /// Whether a key was given.
        given: bool,
    },
    /// A log lost or lacks records.
    #[error(
        "log {stream:?} has no record at position {position}; only whole logs can be backed up"
    )]
    Gap {
        /// The stream.
        stream: String,
        /// The first position that is missing.
        position: u64,
    },
    /// It was asked to stop.
    #[error("broken off; what was written is used by the next backup")]
    Stopped,
    /// Somebody else is busy in the store.
    #[error("{store} is being cleaned up by another process since {since}; try again in a while")]
    Busy {
        /// The store.
        store: String,
        /// Since when.
        since: String,
    },
}

impl BackupError {
    fn damaged(store: &dyn crate::blobs::Blobs, name: &str, what: impl Into<String>) -> Self {
        BackupError::Damaged { store: store.shown(), name: name.to_owned(), what: what.into() }
    }
}
