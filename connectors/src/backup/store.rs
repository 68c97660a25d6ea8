//! A store of backups: its manifests and segments, each checked when it is read.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use futures::executor::block_on;
use serde::Serialize;

use super::content::{CONTENT_LEN_MAX, Content, decode, encode, record_bytes};
use super::manifest::{FOLDER, Manifest, NoManifest, SegmentPart};
use super::object::{self, Key, Kind, Unusable};
use super::{BackupError, Heard};
use crate::blobs::Blobs;
use crate::log::Record;

const SEGMENTS: &str = "segment/";
/// Most bytes of a manifest: a million segments.
const MANIFEST_LEN_MAX: usize = 512 * 1024 * 1024;

/// A store of backups.
#[derive(Clone)]
pub struct Store {
    pub(super) blobs: Arc<dyn Blobs>,
    pub(super) key: Option<Key>,
}

/// A manifest in a list.
pub struct Listed {
    /// Its name.
    pub name: String,
    /// The manifest, or why it cannot be used.
    pub manifest: Result<Manifest, BackupError>,
}

/// What checking a backup found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Segments read.
    pub segments: u64,
    /// Records in them.
    pub records: u64,
    /// Bytes of their contents.
    pub bytes: u64,
    /// What is wrong, in words. Empty when the backup is sound.
    pub problems: Vec<String>,
}

/// A segment's object that is new in the store.
pub(super) struct Written {
    pub part: SegmentPart,
    /// Bytes written; 0 when it was there.
    pub stored: u64,
}

impl Store {
    /// A store, encrypted if there is a key.
    pub fn new(blobs: Arc<dyn Blobs>, key: Option<Key>) -> Store {
        Store { blobs, key }
    }

    /// What it is, for messages.
    pub fn shown(&self) -> String {
        self.blobs.shown()
    }

    /// Names of all backups, oldest first.
    ///
    /// # Errors
    /// When the store fails.
    pub fn names(&self) -> Result<Vec<String>, BackupError> {
        let blobs = block_on(self.blobs.list(FOLDER))?;
        let name = |blob: &crate::blobs::Blob| Some(blob.name.strip_prefix(FOLDER)?.to_owned());
        let mut names: Vec<String> = blobs.iter().filter_map(name).collect();
        names.sort();
        Ok(names)
    }

    /// All backups, oldest first, also those that cannot be used.
    ///
    /// # Errors
    /// When the store fails.
    pub fn list(&self) -> Result<Vec<Listed>, BackupError> {
        let mut listed = Vec::new();
        for name in self.names()? {
            match self.manifest(&name) {
                Err(error @ BackupError::Blob(_)) => return Err(error),
                // Deleted between.
                Err(BackupError::Absent { .. }) => {}
                manifest => listed.push(Listed { name, manifest }),
            }
        }
        Ok(listed)
    }

    /// The newest backup, or the one whose name begins so.
    ///
    /// # Errors
    /// When there is none, more than one, or it cannot be used.
    pub fn find(&self, name: Option<&str>) -> Result<Manifest, BackupError> {
        let names = self.names()?;
        let wanted = name.unwrap_or_default();
        let mut fitting = names.iter().rev().filter(|found| found.starts_with(wanted));
        let absent = || BackupError::Absent { store: self.shown(), name: wanted.to_owned() };
        let found = fitting.next().ok_or_else(absent)?;
        if name.is_some() && fitting.next().is_some() && found != wanted {
            return Err(absent());
        }
        self.manifest(found)
    }

    /// A backup, by its whole name.
    ///
    /// # Errors
    /// When it is not there or cannot be used.
    pub fn manifest(&self, name: &str) -> Result<Manifest, BackupError> {
        let full = format!("{FOLDER}{name}");
        let Some(object) = block_on(self.blobs.get(&full))? else {
            return Err(BackupError::Absent { store: self.shown(), name: name.to_owned() });
        };
        let bytes = self.open(Kind::Manifest, &full, &object, MANIFEST_LEN_MAX)?;
        let manifest = Manifest::parse(&bytes).map_err(|why| match why {
            NoManifest::Newer(format) => self.unusable(&full, Unusable::Newer(format)),
            NoManifest::Wrong(what) => self.unusable(&full, Unusable::Damaged(what)),
        })?;
        if manifest.name() != name {
            let what = format!("it is the manifest of {:?}", manifest.name());
            return Err(self.unusable(&full, Unusable::Damaged(what)));
        }
        Ok(manifest)
    }

    pub(super) fn put_manifest(&self, manifest: &Manifest) -> Result<u64, BackupError> {
        let full = format!("{FOLDER}{}", manifest.name());
        self.put(Kind::Manifest, &full, &manifest.to_bytes())
    }

    pub(super) fn delete_manifest(&self, name: &str) -> Result<(), BackupError> {
        Ok(block_on(self.blobs.delete(&format!("{FOLDER}{name}")))?)
    }

    /// Hashes of all segments in the store, with the size of each object.
    pub(super) fn segments(&self) -> Result<BTreeMap<String, u64>, BackupError> {
        let blobs = block_on(self.blobs.list(SEGMENTS))?;
        let hash = |blob: crate::blobs::Blob| {
            Some((blob.name.strip_prefix(SEGMENTS)?.to_owned(), blob.bytes))
        };
        Ok(blobs.into_iter().filter_map(hash).collect())
    }

    pub(super) fn delete_segment(&self, hash: &str) -> Result<(), BackupError> {
        Ok(block_on(self.blobs.delete(&format!("{SEGMENTS}{hash}")))?)
    }

    /// Writes a segment unless it is `known` to be there.
    pub(super) fn put_segment(
        &self,
        stream: &str,
        records: &[Record],
        time: meterr_operators::time::Time,
        full: bool,
        known: &BTreeMap<String, u64>,
    ) -> Result<Written, BackupError> {
        let content = encode(stream, records);
        let hash = object::hash(self.key.as_ref(), &content);
        let stored = if known.contains_key(&hash) {
            0
        } else {
            self.put(Kind::Segment, &format!("{SEGMENTS}{hash}"), &content)?
        };
        let position = |record: Option<&Record>| record.map_or(0, |record| record.position);
        let part = SegmentPart {
            first: position(records.first()),
            last: position(records.last()),
            time,
            bytes: content.len() as u64,
            hash,
            last_hash: records.last().map(|last| self.record_hash(last)).unwrap_or_default(),
            full,
        };
        Ok(Written { part, stored })
    }

    /// By which a log's record is known again; keyed like the names, since a manifest shows it.
    pub(super) fn record_hash(&self, record: &Record) -> String {
        object::hash(self.key.as_ref(), &encode("", std::slice::from_ref(record)))
    }

    /// The records of a segment, checked against what a manifest says of it.
    ///
    /// # Errors
    /// When it is missing or not what it was.
    pub fn segment(&self, stream: &str, part: &SegmentPart) -> Result<Vec<Record>, BackupError> {
        let name = format!("{SEGMENTS}{}", part.hash);
        let Some(object) = block_on(self.blobs.get(&name))? else {
            return Err(BackupError::Missing { store: self.shown(), name });
        };
        let bytes = self.open(Kind::Segment, &name, &object, CONTENT_LEN_MAX)?;
        let damaged = |what: &str| self.unusable(&name, Unusable::Damaged(what.to_owned()));
        if object::hash(self.key.as_ref(), &bytes) != part.hash {
            return Err(damaged("its hash is not its name"));
        }
        let Content { stream: of, records } = decode(&bytes).map_err(damaged)?;
        let ends = |at: Option<&Record>| at.map_or(0, |record| record.position);
        if of != stream || (ends(records.first()), ends(records.last())) != (part.first, part.last)
        {
            return Err(damaged("it holds other records than its manifest says"));
        }
        Ok(records)
    }

    /// Reads every segment of a backup and checks it: there, undamaged, positions dense, times as the
    /// manifest says. `heard` is told of records read.
    ///
    /// # Errors
    /// When the store fails. What is wrong with the backup is in the answer.
    pub fn verify(&self, manifest: &Manifest, heard: Heard<'_>) -> Result<Verified, BackupError> {
        let mut verified = Verified::default();
        for log in &manifest.logs {
            let stream = log.identity.stream.as_str();
            let mut time = meterr_operators::time::Time(i64::MIN);
            for part in &log.segments {
                let records = match self.segment(stream, part) {
                    Ok(records) => records,
                    Err(error @ BackupError::Blob(_)) => return Err(error),
                    Err(error) => {
                        let (first, last) = (part.first, part.last);
                        verified.problems.push(format!("{stream} {first} to {last}: {error}"));
                        heard(last - first + 1);
                        time = part.time;
                        continue;
                    }
                };
                time = records.iter().map(|record| record.time).fold(time, Ord::max);
                if time != part.time {
                    let (said, is) = (part.time, time);
                    let what = format!("{stream} {}: log time {is}, not {said}", part.last);
                    verified.problems.push(what);
                }
                verified.segments += 1;
                verified.records += records.len() as u64;
                verified.bytes += records.iter().map(record_bytes).sum::<usize>() as u64;
                heard(records.len() as u64);
            }
        }
        Ok(verified)
    }

    /// Segments that a manifest names and the store lacks, without reading any.
    pub(super) fn lacking(&self, manifest: &Manifest) -> Result<BTreeSet<String>, BackupError> {
        let there = self.segments()?;
        let lacking = manifest.segments().map(|(_, part)| part.hash.clone());
        Ok(lacking.filter(|hash| !there.contains_key(hash)).collect())
    }

    fn put(&self, kind: Kind, name: &str, content: &[u8]) -> Result<u64, BackupError> {
        let object = object::seal(self.key.as_ref(), kind, name, content)
            .map_err(|what| BackupError::damaged(&*self.blobs, name, what))?;
        let stored = object.len() as u64;
        block_on(self.blobs.put(name, object))?;
        Ok(stored)
    }

    fn open(
        &self,
        kind: Kind,
        name: &str,
        object: &[u8],
        len_max: usize,
    ) -> Result<Bytes, BackupError> {
        object::open(self.key.as_ref(), kind, name, object, len_max)
            .map_err(|why| self.unusable(name, why))
    }

    fn unusable(&self, name: &str, why: Unusable) -> BackupError {
        let name = name.to_owned();
        match why {
            Unusable::Damaged(what) => BackupError::Damaged { store: self.shown(), name, what },
            Unusable::Newer(found) => {
                BackupError::Newer { name, found, known: super::manifest::FORMAT }
            }
            Unusable::Locked(given) => BackupError::Locked { name, given },
        }
    }
}
