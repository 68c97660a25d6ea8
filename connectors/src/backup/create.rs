//! Making a backup.
//!
//! A backup made before of the same logs says which segments are full already; of those only the last
//! is looked at again, by the hash of its last record. If the log has another record there, or another
//! identity, or the store lacks a segment, the log is read from its beginning (from the first segment
//! that is missing).
//!
//! On a crash there is no manifest, so no backup; segments written are found by the next one, or
//! cleaned up. The mark `making/…` keeps a clean-up away meanwhile; if it is left behind it counts for
//! a day.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::executor::block_on;
use meterr_operators::time::Time;

use super::content::{SEGMENT_BYTES, SEGMENT_RECORDS, record_bytes};
use super::manifest::{FORMAT, LastCommit, LogPart, Manifest, SegmentPart};
use super::prune::Mark;
use super::store::Store;
use super::{BackupError, Heard};
use crate::log::{Log, Record};

/// Bytes of a log read at once.
const READ_BYTES: usize = 4 * 1024 * 1024;
/// Attempts at a manifest whose segments went missing meanwhile.
const ATTEMPTS: u32 = 3;

/// A log to be backed up.
pub struct Wanted {
    /// The log.
    pub log: Arc<dyn Log>,
    /// Position of the last record to be in the backup.
    pub to: u64,
}

/// What the manifest says beside the logs.
#[derive(Debug, Clone)]
pub struct About {
    /// Now, by this machine's clock.
    pub now: Time,
    /// Where the logs are, without secrets.
    pub source: String,
    /// Version of the binary.
    pub version: String,
    /// Shards of the deployment.
    pub shards: u16,
    /// The newest commit of each shard that has one.
    pub commits: Vec<LastCommit>,
}

/// A backup that was made.
#[derive(Debug, Clone)]
pub struct Made {
    /// Its manifest.
    pub manifest: Manifest,
    /// Segments written now.
    pub segments_written: u64,
    /// Bytes of the objects written now.
    pub bytes_written: u64,
    /// Records read.
    pub records_read: u64,
    /// Bytes of records read.
    pub bytes_read: u64,
}

/// Makes a backup of logs, which must be given in the order they are to be restored. `heard` is told
/// of records that are in it, read or known. It is broken off when `stop` is set.
///
/// # Errors
/// Why it was not made. What was written of it is used by the next one.
pub fn create(
    store: &Store,
    logs: &[Wanted],
    about: &About,
    stop: &AtomicBool,
    heard: Heard<'_>,
) -> Result<Made, BackupError> {
    let mark = Mark::making(store, about.now)?;
    let made = attempts(store, logs, about, stop, heard);
    // Left behind it only delays a clean-up.
    let unmarked = mark.remove(store);
    let made = made?;
    unmarked?;
    Ok(made)
}

fn attempts(
    store: &Store,
    logs: &[Wanted],
    about: &About,
    stop: &AtomicBool,
    heard: Heard<'_>,
) -> Result<Made, BackupError> {
    let mut attempt = 1;
    loop {
        let made = once(store, logs, about, stop, heard)?;
        // A backup that took longer than its mark counts may have lost segments to a clean-up.
        let Some(lost) = store.lacking(&made.manifest)?.pop_first() else { return Ok(made) };
        store.delete_manifest(&made.manifest.name())?;
        if attempt == ATTEMPTS {
            let name = format!("segment/{lost}");
            return Err(BackupError::Missing { store: store.shown(), name });
        }
        attempt += 1;
    }
}

fn once(
    store: &Store,
    logs: &[Wanted],
    about: &About,
    stop: &AtomicBool,
    heard: Heard<'_>,
) -> Result<Made, BackupError> {
    let known = store.segments()?;
    let before = before(store, logs)?;
    let mut making = Making { store, stop, known, read: (0, 0), written: (0, 0) };
    let mut parts = Vec::new();
    for wanted in logs {
        let identity = wanted.log.identity().clone();
        let before = before.as_ref().and_then(|manifest| manifest.log(&identity.stream));
        let before = before.filter(|part| part.identity == identity);
        let segments = making.log(wanted, before, heard)?;
        parts.push(LogPart { identity, head: wanted.to, segments });
    }
    let manifest = Manifest {
        format: FORMAT,
        begun_at: about.now,
        source: about.source.clone(),
        version: about.version.clone(),
        shards: about.shards,
        logs: parts,
        commits: about.commits.clone(),
        hash: String::new(),
    }
    .sealed();
    let bytes = store.put_manifest(&manifest)?;
    Ok(Made {
        manifest,
        segments_written: making.written.0,
        bytes_written: making.written.1 + bytes,
        records_read: making.read.0,
        bytes_read: making.read.1,
    })
}

/// The newest backup of any of these logs that can be read. Others are of no use, and no obstacle.
fn before(store: &Store, logs: &[Wanted]) -> Result<Option<Manifest>, BackupError> {
    for name in store.names()?.iter().rev() {
        match store.manifest(name) {
            Ok(manifest) => {
                let known = |part: &LogPart| {
                    logs.iter().any(|wanted| *wanted.log.identity() == part.identity)
                };
                if manifest.logs.iter().any(known) {
                    return Ok(Some(manifest));
                }
            }
            Err(error @ BackupError::Blob(_)) => return Err(error),
            Err(_) => {}
        }
    }
    Ok(None)
}

struct Making<'a> {
    store: &'a Store,
    stop: &'a AtomicBool,
    /// Segments in the store.
    known: BTreeMap<String, u64>,
    /// Records and their bytes.
    read: (u64, u64),
    /// Segments and bytes of their objects.
    written: (u64, u64),
}

impl Making<'_> {
    fn log(
        &mut self,
        wanted: &Wanted,
        before: Option<&LogPart>,
        heard: Heard<'_>,
    ) -> Result<Vec<SegmentPart>, BackupError> {
        let mut parts = self.kept(wanted, before)?;
        heard(parts.last().map_or(0, |part| part.last));
        let next = parts.last().map_or(1, |part| part.last + 1);
        let mut time = parts.last().map_or(Time(i64::MIN), |part| part.time);
        let stream = wanted.log.identity().stream.clone();
        let (mut waiting, mut bytes) = (Vec::<Record>::new(), 0);
        let mut close = |making: &mut Self, waiting: &mut Vec<Record>, full| {
            time = waiting.iter().map(|record| record.time).fold(time, Ord::max);
            let written = making.store.put_segment(&stream, waiting, time, full, &making.known)?;
            if written.stored > 0 {
                making.written.0 += 1;
                making.written.1 += written.stored;
                making.known.insert(written.part.hash.clone(), written.stored);
            }
            heard(waiting.len() as u64);
            waiting.clear();
            parts.push(written.part);
            Ok::<(), BackupError>(())
        };
        let mut at = next;
        while at <= wanted.to {
            if self.stop.load(Ordering::Relaxed) {
                return Err(BackupError::Stopped);
            }
            let records = read(&*wanted.log, at, wanted.to)?;
            at += records.len() as u64;
            for record in records {
                let len = record_bytes(&record);
                self.read.0 += 1;
                self.read.1 += len as u64;
                if !waiting.is_empty()
                    && (bytes + len > SEGMENT_BYTES || waiting.len() >= SEGMENT_RECORDS)
                {
                    close(self, &mut waiting, true)?;
                    bytes = 0;
                }
                bytes += len;
                waiting.push(record);
            }
        }
        if !waiting.is_empty() {
            close(self, &mut waiting, false)?;
        }
        Ok(parts)
    }

    /// The full segments of a backup made before that need not be read again.
    fn kept(
        &self,
        wanted: &Wanted,
        before: Option<&LogPart>,
    ) -> Result<Vec<SegmentPart>, BackupError> {
        let Some(before) = before else { return Ok(Vec::new()) };
        let usable = |part: &&SegmentPart| {
            part.full && part.last <= wanted.to && self.known.contains_key(&part.hash)
        };
        let kept: Vec<_> = before.segments.iter().take_while(usable).cloned().collect();
        let Some(last) = kept.last() else { return Ok(kept) };
        let records = read(&*wanted.log, last.last, last.last)?;
        let same = records.iter().all(|record| self.store.record_hash(record) == last.last_hash);
        Ok(if same { kept } else { Vec::new() })
    }
}

/// Records from a position on, at least one, none beyond `to`.
fn read(log: &dyn Log, from: u64, to: u64) -> Result<Vec<Record>, BackupError> {
    let mut records = block_on(log.read(from, READ_BYTES))?;
    records.retain(|record| record.position <= to);
    let gap = |position| BackupError::Gap { stream: log.identity().stream.clone(), position };
    if records.is_empty() {
        return Err(gap(from));
    }
    for (position, record) in (from..).zip(&records) {
        if record.position != position {
            return Err(gap(position));
        }
    }
    Ok(records)
}
