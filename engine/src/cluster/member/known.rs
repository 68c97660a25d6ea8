//! What is known of the registry: reads and own writes merged.
//!
//! A read may be older than what is known already. So an entry is replaced only by one of a higher
//! revision, and an entry that a read lacks is forgotten only if that read is not behind: its newest
//! revision is at least the newest that is known. Where it was the newest entry that went, reads look
//! behind until somebody writes, which is at the next beat. Where they stay behind for long it is another
//! registry, and all that was known of the old one is forgotten.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use meterr_connectors::cluster::Entry;
use meterr_operators::ids::ShardId;
use serde::de::DeserializeOwned;

use crate::cluster::records::{Drain, Key, Lease, Pin, RecordError, Session, parse};

/// A value at its revision.
#[derive(Debug, Clone)]
pub(super) struct Seen<T> {
    pub(super) revision: u64,
    pub(super) value: Result<T, RecordError>,
}

impl<T> Seen<T> {
    pub(super) fn ok(&self) -> Option<&T> {
        self.value.as_ref().ok()
    }

    /// Whether a newer version wrote it: it is to be left alone.
    pub(super) fn newer(&self) -> bool {
        matches!(self.value, Err(RecordError::Newer { .. }))
    }
}

/// What a read brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Merged {
    /// It is as new as what is known.
    Current,
    /// It is older; only what is newer in it counts.
    Behind,
    /// It is of another registry.
    Replaced,
}

#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) nodes: BTreeMap<String, Seen<Session>>,
    pub(super) leases: BTreeMap<ShardId, Seen<Lease>>,
    pub(super) pins: BTreeMap<ShardId, Seen<Pin>>,
    pub(super) drains: BTreeMap<String, Seen<Drain>>,
    /// Revisions of all entries, others' than ours as well: what stands as it did needs no second look.
    revisions: BTreeMap<String, u64>,
    /// Counts changes.
    pub(super) changes: u64,
    newest: u64,
    behind_since: Option<Duration>,
}

impl Known {
    /// Takes a read in. Reads that are behind for longer than `patience` are of another registry.
    pub(super) fn merge(&mut self, now: Duration, entries: &[Entry], patience: Duration) -> Merged {
        let newest = entries.iter().map(|entry| entry.revision).max().unwrap_or(0);
        let mut merged = Merged::Current;
        if newest < self.newest {
            let since = *self.behind_since.get_or_insert(now);
            merged = Merged::Behind;
            if now.saturating_sub(since) > patience {
                *self = Known { changes: self.changes + 1, ..Known::default() };
                merged = Merged::Replaced;
            }
        }
        if merged != Merged::Behind {
            self.behind_since = None;
            self.forget_but(entries);
        }
        for entry in entries {
            self.put(&entry.key, entry.revision, &entry.value);
        }
        merged
    }

    /// Takes an own write in.
    pub(super) fn wrote(&mut self, key: &str, revision: u64, value: &Bytes) {
        self.put(key, revision, value);
    }

    /// Revision of a key, 0 when there is none.
    pub(super) fn revision(&self, key: &Key) -> u64 {
        match key {
            Key::Node(node) => self.nodes.get(node).map(|seen| seen.revision),
            Key::Lease(shard) => self.leases.get(shard).map(|seen| seen.revision),
            Key::Pin(shard) => self.pins.get(shard).map(|seen| seen.revision),
            Key::Drain(node) => self.drains.get(node).map(|seen| seen.revision),
            // No decision rests on it.
            Key::Load(_) => None,
        }
        .unwrap_or(0)
    }

    /// What cannot be read, for operators.
    pub(super) fn problems(&self) -> Vec<&RecordError> {
        fn of<K, T>(map: &BTreeMap<K, Seen<T>>) -> impl Iterator<Item = &RecordError> {
            map.values().filter_map(|seen| seen.value.as_ref().err())
        }
        of(&self.nodes)
            .chain(of(&self.leases))
            .chain(of(&self.pins))
            .chain(of(&self.drains))
            .collect()
    }

    fn put(&mut self, key: &str, revision: u64, value: &Bytes) {
        match self.revisions.get_mut(key) {
            Some(known) if *known >= revision => return,
            Some(known) => *known = revision,
            None => drop(self.revisions.insert(key.to_owned(), revision)),
        }
        self.changes += 1;
        self.newest = self.newest.max(revision);
        match Key::parse(key) {
            Some(Key::Node(node)) => put(&mut self.nodes, node, key, revision, value),
            Some(Key::Lease(shard)) => put(&mut self.leases, shard, key, revision, value),
            Some(Key::Pin(shard)) => put(&mut self.pins, shard, key, revision, value),
            Some(Key::Drain(node)) => put(&mut self.drains, node, key, revision, value),
            Some(Key::Load(_)) | None => {}
        }
    }

    fn forget_but(&mut self, entries: &[Entry]) {
        let known = |entry: &&Entry| self.revisions.contains_key(&entry.key);
        if entries.iter().filter(known).count() == self.revisions.len() {
            return;
        }
        self.changes += 1;
        let all: std::collections::BTreeSet<&str> =
            entries.iter().map(|entry| entry.key.as_str()).collect();
        self.revisions.retain(|key, _| all.contains(key.as_str()));
        let keys: std::collections::BTreeSet<Key> =
            entries.iter().filter_map(|entry| Key::parse(&entry.key)).collect();
        self.nodes.retain(|node, _| keys.contains(&Key::Node(node.clone())));
        self.leases.retain(|shard, _| keys.contains(&Key::Lease(*shard)));
        self.pins.retain(|shard, _| keys.contains(&Key::Pin(*shard)));
        self.drains.retain(|node, _| keys.contains(&Key::Drain(node.clone())));
    }
}

fn put<K: Ord, T: DeserializeOwned>(
    map: &mut BTreeMap<K, Seen<T>>,
    at: K,
    key: &str,
    revision: u64,
    value: &Bytes,
) {
    if map.get(&at).is_none_or(|seen| seen.revision < revision) {
        map.insert(at, Seen { revision, value: parse(key, value) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(key: &str, revision: u64, value: &'static str) -> Entry {
        Entry { key: key.into(), revision, value: Bytes::from_static(value.as_bytes()) }
    }

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_is_older_changes_nothing() {
        let mut known = Known::default();
        let pin = r#"{"format":1,"node":"a"}"#;
        let at = |s: u64| Duration::from_secs(s);
        assert_eq!(known.merge(at(0), &[entry("pin.1", 5, pin)], SECOND), Merged::Current);
        known.wrote("pin.2", 7, &Bytes::from_static(pin.as_bytes()));
        // Older, and without the write: nothing is forgotten, nothing goes back.
        let old = [entry("pin.1", 4, r#"{"format":1,"node":"b"}"#)];
        assert_eq!(known.merge(at(1), &old, SECOND), Merged::Behind);
        assert_eq!(known.pins[&ShardId(1)].ok().unwrap().node.as_deref(), Some("a"));
        assert_eq!(known.revision(&Key::Pin(ShardId(2))), 7);
        // Newer: what it lacks is gone.
        assert_eq!(known.merge(at(2), &[entry("pin.1", 8, pin)], SECOND), Merged::Current);
        assert_eq!(known.revision(&Key::Pin(ShardId(2))), 0);
        // Behind for too long: another registry.
        assert_eq!(known.merge(at(3), &old, SECOND), Merged::Behind);
        assert_eq!(known.merge(at(5), &old, SECOND), Merged::Replaced);
        assert_eq!(known.pins[&ShardId(1)].ok().unwrap().node.as_deref(), Some("b"));
    }

    #[test]
    fn what_cannot_be_read_is_told() {
        let mut known = Known::default();
        let newer = entry("lease.1", 5, r#"{"format":9}"#);
        known.merge(SECOND, &[newer, entry("node.x", 6, "?"), entry("other", 7, "?")], SECOND);
        let problems: Vec<String> = known.problems().iter().map(|p| p.to_string()).collect();
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(known.leases[&ShardId(1)].newer() && !known.nodes["x"].newer());
    }
}
