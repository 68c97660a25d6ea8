//! The manifest of a backup: which logs, how far, and the segments of each. Pure.
//!
//! JSON of a format version, with a hash over itself: BLAKE3 of the same JSON with an empty `hash`.
//! Its name holds the time it was begun and the first digits of that hash, so manifests sort by time.

use meterr_operators::ids::{SHARDS_MAX, ShardId};
use meterr_operators::time::Time;
use serde::{Deserialize, Serialize};

use crate::copy::belongs;
use crate::log::LogIdentity;

/// Newest format of manifests.
pub const FORMAT: u32 = 1;
/// What names of manifests begin with.
pub(super) const FOLDER: &str = "backup/";

/// Some records of a log in a row, one object of the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SegmentPart {
    /// Position of its first record.
    pub first: u64,
    /// Position of its last record.
    pub last: u64,
    /// Log time of its last record: the latest time of all records up to there.
    pub time: Time,
    /// Bytes of its content.
    pub bytes: u64,
    /// Hash of its content, keyed if encrypted; the object is `segment/<hash>`.
    pub hash: String,
    /// Hash of its last record, by which the log is known again.
    pub last_hash: String,
    /// Whether it is full, so that later backups have it too.
    pub full: bool,
}

/// A log in a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogPart {
    /// Name and identity of the log.
    #[serde(flatten)]
    pub identity: LogIdentity,
    /// Position of its last record here.
    pub head: u64,
    /// Its segments, by position.
    pub segments: Vec<SegmentPart>,
}

/// The newest commit record of a shard in a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LastCommit {
    /// The shard.
    pub shard: ShardId,
    /// Its position in the output log.
    pub position: u64,
    /// Its epoch.
    pub epoch: u64,
    /// Last usage position contained.
    pub usage_position: u64,
    /// Last control position contained.
    pub control_position: u64,
    /// Log time of the shard.
    pub log_time: Time,
    /// Fencing token of its writer.
    pub token: u64,
}

/// A backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Format of the manifest.
    pub format: u32,
    /// When it was begun, by the clock of whoever made it.
    pub begun_at: Time,
    /// Where the logs were, without secrets.
    pub source: String,
    /// Version of the binary that made it.
    pub version: String,
    /// Shards of the deployment.
    pub shards: u16,
    /// The logs, in the order they are restored: the control log last.
    pub logs: Vec<LogPart>,
    /// The newest commit of each shard that has one.
    pub commits: Vec<LastCommit>,
    /// Hash over all of it.
    pub hash: String,
}

/// Format alone, to tell a newer manifest from a damaged one.
#[derive(Deserialize)]
struct Version {
    format: u32,
}

/// Why bytes are no manifest.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum NoManifest {
    Newer(u32),
    Wrong(String),
}

impl Manifest {
    /// Fills in the hash.
    pub(super) fn sealed(mut self) -> Manifest {
        self.hash = self.own_hash();
        self
    }

    fn own_hash(&self) -> String {
        let bare = Manifest { hash: String::new(), ..self.clone() };
        let json = serde_json::to_vec(&bare).expect("a manifest has only text keys");
        blake3::hash(&json).to_hex().to_string()
    }

    /// What it is called in messages and on the command line: time and id.
    pub fn name(&self) -> String {
        let id = self.hash.get(..8).unwrap_or_default();
        format!("{}-{id}", compact(self.begun_at))
    }

    pub(super) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a manifest has only text keys")
    }

    /// Reads a manifest and checks all that can be checked without its segments.
    pub(super) fn parse(bytes: &[u8]) -> Result<Manifest, NoManifest> {
        let wrong = |what: String| NoManifest::Wrong(what);
        let version: Version = serde_json::from_slice(bytes).map_err(|e| wrong(e.to_string()))?;
        if version.format > FORMAT {
            return Err(NoManifest::Newer(version.format));
        }
        let manifest: Manifest = serde_json::from_slice(bytes).map_err(|e| wrong(e.to_string()))?;
        if manifest.hash != manifest.own_hash() {
            return Err(wrong("its hash is not that of its content".to_owned()));
        }
        manifest.check().map_err(wrong)?;
        Ok(manifest)
    }

    /// Positions must be dense and everything named once; whoever reads it relies on that.
    fn check(&self) -> Result<(), String> {
        if self.format == 0 || self.shards == 0 || self.shards > SHARDS_MAX {
            return Err(format!("format {} with {} shards is none", self.format, self.shards));
        }
        let mut names: Vec<&str> = Vec::new();
        for log in &self.logs {
            let stream = log.identity.stream.as_str();
            if !belongs(stream) || names.contains(&stream) {
                return Err(format!("log {stream:?} is none of a deployment, or there twice"));
            }
            names.push(stream);
            let mut next = 1;
            let mut time = Time(i64::MIN);
            for segment in &log.segments {
                let follows = segment.first == next && segment.last >= segment.first;
                if !follows || segment.time < time || segment.last == u64::MAX {
                    return Err(format!(
                        "log {stream:?} has records {} to {} where {next} is next",
                        segment.first, segment.last
                    ));
                }
                if !hex_hash(&segment.hash) || !hex_hash(&segment.last_hash) {
                    return Err(format!("log {stream:?} has a segment with a hash that is none"));
                }
                (next, time) = (segment.last + 1, segment.time);
            }
            if log.head + 1 != next {
                return Err(format!("log {stream:?} ends at {}, not at {}", next - 1, log.head));
            }
        }
        if self.commits.iter().any(|commit| commit.shard.0 >= self.shards) {
            return Err("it has a commit of a shard that is not there".to_owned());
        }
        Ok(())
    }

    /// A log, by name.
    pub fn log(&self, stream: &str) -> Option<&LogPart> {
        self.logs.iter().find(|log| log.identity.stream == stream)
    }

    /// Every segment, with the stream it is of.
    pub fn segments(&self) -> impl Iterator<Item = (&str, &SegmentPart)> {
        self.logs.iter().flat_map(|log| {
            log.segments.iter().map(move |segment| (log.identity.stream.as_str(), segment))
        })
    }

    /// Records of all logs.
    pub fn records(&self) -> u64 {
        self.logs.iter().map(|log| log.head).sum()
    }

    /// Bytes of all segments before compression.
    pub fn bytes(&self) -> u64 {
        self.segments().map(|(_, segment)| segment.bytes).sum()
    }
}

fn hex_hash(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// A time for names: `20260102T030405.123456Z`. Sorts as times do.
pub(super) fn compact(time: Time) -> String {
    let whole = Time(time.0.div_euclid(1_000_000) * 1_000_000).to_string();
    let digits: String = whole.chars().filter(|c| !matches!(c, '-' | ':' | 'Z')).collect();
    format!("{digits}.{:06}Z", time.0.rem_euclid(1_000_000))
}

/// The time in a name that begins as `compact` writes it.
pub fn name_time(name: &str) -> Option<Time> {
    let (date, clock) = name.split_once('Z')?.0.split_once('T')?;
    let digits = date.len() == 8 && clock.len() == 13 && clock.is_ascii() && date.is_ascii();
    if !digits {
        return None;
    }
    let (year, month, day) = (&date[..4], &date[4..6], &date[6..]);
    let (hour, minute, second) = (&clock[..2], &clock[2..4], &clock[4..]);
    Time::parse(&format!("{year}-{month}-{day}T{hour}:{minute}:{second}Z")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn time(text: &str) -> Time {
        Time::parse(text).unwrap()
    }

    fn manifest() -> Manifest {
        let segment = |first, last, at: &str, full| SegmentPart {
            first,
            last,
            time: time(at),
            bytes: 10,
            hash: "0".repeat(64),
            last_hash: "1".repeat(64),
            full,
        };
        let at = "2026-01-02T03:04:05Z";
        let log = |stream: &str, segments: Vec<SegmentPart>| LogPart {
            identity: LogIdentity { stream: stream.to_owned(), uuid: "u".to_owned() },
            head: segments.last().map_or(0, |segment| segment.last),
            segments,
        };
        let manifest = Manifest {
            format: FORMAT,
            begun_at: Time(time(at).0 + 6),
            source: "here".to_owned(),
            version: "0".to_owned(),
            shards: 1,
            logs: vec![
                log("USAGE_0", vec![segment(1, 5, at, true), segment(6, 6, at, false)]),
                log("OUT_0", vec![]),
                log("CONTROL", vec![segment(1, 1, at, false)]),
            ],
            commits: vec![],
            hash: String::new(),
        };
        manifest.sealed()
    }

    #[test]
    fn it_reads_what_it_writes() {
        let manifest = manifest();
        assert_eq!(Manifest::parse(&manifest.to_bytes()), Ok(manifest.clone()));
        assert_eq!((manifest.records(), manifest.bytes()), (7, 30));
        assert!(manifest.name().starts_with("20260102T030405.000006Z-"), "{}", manifest.name());
        assert_eq!(name_time(&manifest.name()), Some(manifest.begun_at));
        for wrong in [
            "",
            "20260102T030405.0",
            "20261302T030405.000000Z-a",
            "ü260102T030405.000000Z",
            "20260102T0304050000000Z",
        ] {
            assert_eq!(name_time(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn what_was_changed_or_cannot_be_is_refused() {
        let why = |change: &dyn Fn(&mut Manifest), sealed: bool| {
            let mut manifest = manifest();
            change(&mut manifest);
            let manifest = if sealed { manifest.sealed() } else { manifest };
            match Manifest::parse(&manifest.to_bytes()).unwrap_err() {
                NoManifest::Wrong(what) => what,
                NoManifest::Newer(format) => format!("newer {format}"),
            }
        };
        assert_eq!(why(&|m| m.shards = 2, false), "its hash is not that of its content");
        assert_eq!(why(&|m| m.format = 2, false), "newer 2");
        assert!(why(&|m| m.format = 0, true).contains("is none"));
        assert!(why(&|m| m.logs[0].segments[1].first = 7, true).contains("7 to 6 where 6"));
        assert!(why(&|m| m.logs[0].head = 9, true).contains("ends at 6, not at 9"));
        assert!(why(&|m| m.logs[0].segments[0].hash = "../x".to_owned(), true).contains("hash"));
        let twice = |m: &mut Manifest| m.logs[1].identity.stream = "CONTROL".to_owned();
        assert!(why(&twice, true).contains("there twice"));
        let foreign = |m: &mut Manifest| m.logs[1].identity.stream = "../x".to_owned();
        assert!(why(&foreign, true).contains("none of a deployment"));
    }
}
