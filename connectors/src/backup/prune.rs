//! Cleaning up a store: backups older than wanted, and segments that no backup needs.
//!
//! Manifests go first, then segments, so a crash between leaves segments too many and never a backup
//! with too few. The newest backup that can be read stays, however old: if backups fail for a month,
//! the last good one is what is needed. A backup that cannot be read and is not old enough to go stops
//! the clean-up, since nobody knows what it needs.
//!
//! A backup that is being made may count on segments that no manifest names yet. So each side writes a
//! mark and then looks for the other's: a clean-up gives way to a backup that is being made, a backup
//! waits for a clean-up that had begun. Of two that begin at once at least one sees the other (the
//! store shows what was written). Marks carry a time: one left by a crash counts for as long as its
//! owner could still be at work, which the owner watches itself.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::executor::block_on;
use meterr_operators::time::Time;
use serde::Serialize;

use super::BackupError;
use super::manifest::{compact, name_time};
use super::store::Store;

const MAKING: &str = "making/";
const PRUNING: &str = "pruning/";
/// How long the mark of a backup being made counts.
const MAKING_COUNTS: Duration = Duration::from_secs(24 * 3600);
/// How long the mark of a clean-up counts.
const PRUNING_COUNTS: Duration = Duration::from_secs(3600);
/// A clean-up stops after this long; the rest is for the next one.
const PRUNING_MAX: Duration = Duration::from_secs(1800);
/// How long a backup waits for a clean-up.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time between looks.
const LOOK: Duration = Duration::from_millis(500);

/// What a clean-up did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Pruned {
    /// Names of backups deleted.
    pub backups: Vec<String>,
    /// Segments deleted.
    pub segments: u64,
    /// Bytes of their objects.
    pub bytes: u64,
    /// Why it did nothing, or not all.
    pub stopped: Option<String>,
}

/// A mark of this process in the store.
pub(super) struct Mark(String);

impl Mark {
    fn put(store: &Store, folder: &str, now: Time) -> Result<Mark, BackupError> {
        let unique = blake3::hash(
            format!("{}{:?}{:?}", std::process::id(), std::thread::current().id(), Instant::now())
                .as_bytes(),
        );
        let name = format!("{folder}{}-{}", compact(now), &unique.to_hex()[..16]);
        block_on(store.blobs.put(&name, Bytes::from_static(b"meterr")))?;
        Ok(Mark(name))
    }

    /// Says that a backup is being made, and waits for a clean-up that has begun.
    pub(super) fn making(store: &Store, now: Time) -> Result<Mark, BackupError> {
        let mark = Mark::put(store, MAKING, now)?;
        let until = Instant::now() + PATIENCE;
        loop {
            let busy = match others(store, PRUNING, now, PRUNING_COUNTS) {
                Ok(busy) => busy,
                Err(error) => {
                    let _ = mark.remove(store);
                    return Err(error);
                }
            };
            let Some(since) = busy else { return Ok(mark) };
            if Instant::now() >= until {
                mark.remove(store)?;
                return Err(BackupError::Busy { store: store.shown(), since });
            }
            std::thread::sleep(LOOK);
        }
    }

    pub(super) fn remove(&self, store: &Store) -> Result<(), BackupError> {
        Ok(block_on(store.blobs.delete(&self.0))?)
    }
}

/// Since when another mark is there that still counts. Those that do not are removed.
fn others(
    store: &Store,
    folder: &str,
    now: Time,
    counts: Duration,
) -> Result<Option<String>, BackupError> {
    let mut since = None;
    for blob in block_on(store.blobs.list(folder))? {
        let made = blob.name.strip_prefix(folder).and_then(name_time);
        let old = made.is_some_and(|made| {
            now.0.saturating_sub(made.0) > i64::try_from(counts.as_micros()).unwrap_or(i64::MAX)
        });
        if old {
            block_on(store.blobs.delete(&blob.name))?;
        } else {
            since = Some(made.map_or_else(|| blob.name.clone(), |made| made.to_string()));
        }
    }
    Ok(since)
}

/// Deletes backups begun before `keep_from`, and segments that no backup needs.
///
/// # Errors
/// When the store fails. What is left is for the next time.
pub fn prune(store: &Store, keep_from: Time, now: Time) -> Result<Pruned, BackupError> {
    let mark = Mark::put(store, PRUNING, now)?;
    let pruned = match others(store, MAKING, now, MAKING_COUNTS) {
        Ok(None) => sweep(store, keep_from),
        Ok(Some(since)) => Ok(Pruned {
            stopped: Some(format!("a backup is being made since {since}")),
            ..Pruned::default()
        }),
        Err(error) => Err(error),
    };
    let unmarked = mark.remove(store);
    let pruned = pruned?;
    unmarked?;
    Ok(pruned)
}

fn sweep(store: &Store, keep_from: Time) -> Result<Pruned, BackupError> {
    let began = Instant::now();
    let mut pruned = Pruned::default();
    let listed = store.list()?;
    let newest = listed.iter().rev().find(|listed| listed.manifest.is_ok());
    let newest = newest.map(|listed| listed.name.clone());
    let mut needed = BTreeSet::new();
    for listed in listed {
        let old = name_time(&listed.name).is_some_and(|made| made < keep_from);
        if old && newest.as_ref() != Some(&listed.name) {
            store.delete_manifest(&listed.name)?;
            pruned.backups.push(listed.name);
            continue;
        }
        match listed.manifest {
            Ok(manifest) => needed.extend(manifest.segments().map(|(_, part)| part.hash.clone())),
            Err(error) => {
                pruned.stopped = Some(format!("segments are left alone: {error}"));
            }
        }
    }
    if pruned.stopped.is_some() {
        return Ok(pruned);
    }
    for (hash, bytes) in store.segments()? {
        if needed.contains(&hash) {
            continue;
        }
        if began.elapsed() > PRUNING_MAX {
            pruned.stopped = Some("it took too long; the rest is for the next time".to_owned());
            break;
        }
        store.delete_segment(&hash)?;
        pruned.segments += 1;
        pruned.bytes += bytes;
    }
    Ok(pruned)
}
