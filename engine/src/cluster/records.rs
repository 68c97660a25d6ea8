//! What stands in the registry: JSON with a `format` in every value.
//!
//! | key | value |
//! |---|---|
//! | `node.<name>` | a node's [session](Session): written by the node at every beat, and once by whoever buries it |
//! | `lease.<shard>` | who [owns](Lease) a shard: written when that changes and never else |
//! | `pin.<shard>` | the node an operator [moved](Pin) a shard to |
//! | `drain.<name>` | whether an operator [drains](Drain) a node |
//! | `backup.lock` | which node makes a backup; read and written by `backup` alone |
//! | `load.<shard>` | what [came in](Load) for a shard, by hour: added to by owners now and then |
//!
//! What an operator takes back is written as such and not removed, so that the newest revision of the
//! registry never falls. A value in a newer format is not read: whoever finds one leaves it and what it concerns alone.

use std::collections::BTreeMap;

use bytes::Bytes;
use meterr_operators::ids::{SHARDS_MAX, ShardId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::load::ShardLoad;
use crate::settings::node_name_valid;

/// Version of the values' format that this version writes, and the newest that it reads.
pub const FORMAT: u32 = 1;

/// Largest value that is read, in bytes.
pub const VALUE_BYTES_MAX: usize = 64 * 1024;

/// A node's session: one life of one process under that name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Session {
    /// Version of the format.
    pub format: u32,
    /// Random, 32 hexadecimal digits, never used twice.
    pub session: String,
    /// Counts its beats.
    pub beat: u64,
    /// Capacity weight.
    pub capacity: f64,
    /// Whether it is a replica: stands by for all shards and owns none.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub replica: bool,
    /// Whether it is about to leave.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub draining: bool,
    /// Where its HTTP listens.
    #[serde(default)]
    pub http: String,
    /// Version of its binary.
    #[serde(default)]
    pub version: String,
    /// What it says of its load, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub figures: BTreeMap<String, f64>,
    /// Set when it left in order.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub left: bool,
    /// Node that took it to be dead.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub buried_by: Option<String>,
}

impl Session {
    /// Whether it ended: what it owned may be taken.
    pub fn over(&self) -> bool {
        self.left || self.buried_by.is_some()
    }
}

/// Who owns a shard. The fencing token is `raise` plus the revision of this value.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Version of the format.
    pub format: u32,
    /// The owner; none when it is free.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The owner's session.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub session: String,
    /// What is added to the revision. Above 0 where the shard's log has seen higher tokens than the
    /// registry has revisions: after a restore into a new registry, or when somebody worked without it.
    #[serde(default)]
    pub raise: u64,
}

/// The node an operator moved a shard to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// Version of the format.
    pub format: u32,
    /// The node; none when placement decides again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

/// Whether an operator drains a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// Version of the format.
    pub format: u32,
    /// Whether its shards go to others.
    pub drained: bool,
}

/// What came in for a shard. Takes half of [`VALUE_BYTES_MAX`] at most.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Load {
    /// Version of the format.
    pub format: u32,
    /// By hour.
    pub load: ShardLoad,
}

/// Why a value is not read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// A newer version wrote it.
    #[error(
        "entry {key:?} was written by a newer meterr (format {found}, this one reads up to {FORMAT}); upgrade this node"
    )]
    Newer {
        /// The key.
        key: String,
        /// Its format.
        found: u32,
    },
    /// It is none of ours.
    #[error("entry {key:?} cannot be read: {what}")]
    Damaged {
        /// The key.
        key: String,
        /// What is wrong.
        what: String,
    },
}

#[derive(Deserialize)]
struct Head {
    format: u32,
}

/// Reads a value.
///
/// # Errors
/// When a newer version wrote it, or it is damaged.
pub fn parse<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T, RecordError> {
    let damaged = |what: String| RecordError::Damaged { key: key.to_owned(), what };
    if value.len() > VALUE_BYTES_MAX {
        return Err(damaged(format!("{} bytes, at most {VALUE_BYTES_MAX}", value.len())));
    }
    let Head { format } = serde_json::from_slice(value).map_err(|e| damaged(e.to_string()))?;
    match format {
        0 => Err(damaged("it has format 0".to_owned())),
        1..=FORMAT => serde_json::from_slice(value).map_err(|e| damaged(e.to_string())),
        found => Err(RecordError::Newer { key: key.to_owned(), found }),
    }
}

/// Writes a value.
pub fn write<T: Serialize>(value: &T) -> Bytes {
    serde_json::to_vec(value).expect("texts and numbers are always JSON").into()
}

/// What a key is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Key {
    /// A node's session.
    Node(String),
    /// A shard's owner.
    Lease(ShardId),
    /// An operator's move.
    Pin(ShardId),
    /// An operator's drain.
    Drain(String),
    /// A shard's load.
    Load(ShardId),
}

impl Key {
    /// Reads a key; `None` for one of something else.
    pub fn parse(key: &str) -> Option<Key> {
        let (kind, rest) = key.split_once('.')?;
        match kind {
            "node" => node_name_valid(rest).then(|| Key::Node(rest.to_owned())),
            "drain" => node_name_valid(rest).then(|| Key::Drain(rest.to_owned())),
            "lease" => shard(rest).map(Key::Lease),
            "pin" => shard(rest).map(Key::Pin),
            "load" => shard(rest).map(Key::Load),
            _ => None,
        }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Key::Node(node) => write!(f, "node.{node}"),
            Key::Lease(shard) => write!(f, "lease.{shard}"),
            Key::Pin(shard) => write!(f, "pin.{shard}"),
            Key::Drain(node) => write!(f, "drain.{node}"),
            Key::Load(shard) => write!(f, "load.{shard}"),
        }
    }
}

fn shard(text: &str) -> Option<ShardId> {
    let number: u16 = text.parse().ok().filter(|number| *number < SHARDS_MAX)?;
    // One spelling for one shard.
    (number.to_string() == text).then_some(ShardId(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session() -> Session {
        Session {
            format: FORMAT,
            session: "0123456789abcdef0123456789abcdef".into(),
            beat: 7,
            capacity: 1.5,
            replica: false,
            draining: false,
            http: "10.0.0.1:8321".into(),
            version: "0.1.0".into(),
            figures: BTreeMap::from([("lag_events".into(), 3.0)]),
            left: false,
            buried_by: None,
        }
    }

    #[test]
    fn values_come_back_and_look_like_this() {
        assert_eq!(
            write(&session()),
            r#"{"format":1,"session":"0123456789abcdef0123456789abcdef","beat":7,"capacity":1.5,"http":"10.0.0.1:8321","version":"0.1.0","figures":{"lag_events":3.0}}"#
        );
        assert_eq!(parse::<Session>("node.a", &write(&session())).unwrap(), session());
        let lease =
            Lease { format: 1, node: Some("a".into()), session: session().session, raise: 0 };
        assert_eq!(
            write(&lease),
            r#"{"format":1,"node":"a","session":"0123456789abcdef0123456789abcdef","raise":0}"#
        );
        assert_eq!(parse::<Lease>("lease.0", &write(&lease)).unwrap(), lease);
        assert_eq!(parse::<Lease>("lease.0", br#"{"format":1}"#).unwrap().node, None);
        assert_eq!(
            parse::<Pin>("pin.0", br#"{"format":1,"node":"b"}"#).unwrap().node.unwrap(),
            "b"
        );
        assert_eq!(write(&Pin { format: 1, node: None }), r#"{"format":1}"#);
        assert_eq!(write(&Drain { format: 1, drained: true }), r#"{"format":1,"drained":true}"#);
    }

    #[test]
    fn what_is_newer_or_damaged_is_not_read() {
        let error = |value: &[u8]| parse::<Lease>("lease.3", value).unwrap_err().to_string();
        let newer = error(br#"{"format":2,"owners":["a"]}"#);
        assert!(newer.contains("\"lease.3\" was written by a newer meterr (format 2"), "{newer}");
        for damaged in [&b"{"[..], b"", b"null", br#"{"format":0}"#, br#"{"node":"a"}"#] {
            assert!(error(damaged).contains("cannot be read"), "{}", error(damaged));
        }
        let long = vec![b' '; VALUE_BYTES_MAX + 1];
        assert!(error(&long).contains("65537 bytes, at most 65536"));
    }

    #[test]
    fn keys_come_back_and_others_are_none() {
        for key in ["node.a-1", "lease.0", "lease.255", "pin.7", "drain.B_2", "load.3"] {
            assert_eq!(Key::parse(key).unwrap().to_string(), key);
        }
        let long = format!("node.{}", "x".repeat(65));
        for key in ["node.", "node.a.b", "lease.256", "lease.07", "lease.", "pin.-1", "x", &long] {
            assert_eq!(Key::parse(key), None, "{key}");
        }
    }
}
