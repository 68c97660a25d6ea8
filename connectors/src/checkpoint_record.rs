//! A manifest as it is stored, and the rules of a chain that every store keeps.
//!
//! Each manifest is stored with the hash of the one before it ([`Record`]), so that a generation is
//! a hash chain. Chunks are already covered by their manifest's hash; the link covers the order: a
//! delta that a damaged store brings back from an earlier life of the same generation and index
//! verifies by itself, but not behind a chain it was not written for.

use bytes::Bytes;
use meterr_operators::ids::SHARDS_MAX;

use crate::checkpoint::{CHUNK_LEN_MAX, CheckpointError, Kind, Manifest, Verified, chunks_hash};
use crate::frame::{self, Form, FrameError};

/// Form of a framed manifest: a [`Record`].
pub const MANIFEST_FORM: Form = Form { kind: 1, schema: 1, len_max: 4096 };

/// Form of a framed chunk: its bytes as they are.
pub const CHUNK_FORM: Form = Form { kind: 2, schema: 1, len_max: CHUNK_LEN_MAX as u32 };

/// Memory that decoding a manifest may take.
const MANIFEST_MEMORY_MAX: usize = 16 * 1024;

/// Longest identity of a log, in bytes.
const IDENTITY_LEN_MAX: usize = 256;

/// What the first manifest of a generation has for the hash of the one before it.
pub const NO_PREVIOUS: [u8; 32] = [0; 32];

/// A manifest and what it follows.
#[derive(Debug, Clone, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct Record {
    /// The manifest.
    pub manifest: Manifest,
    /// [`record_hash`] of the manifest before it in the generation; zero for a base.
    pub previous: [u8; 32],
}

impl Record {
    /// The record as a frame.
    ///
    /// # Errors
    /// When the manifest is above the limits.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        frame::encode::<Record, MANIFEST_MEMORY_MAX>(MANIFEST_FORM, self)
    }

    /// The record of a frame.
    ///
    /// # Errors
    /// When the bytes are not exactly one sound frame of a manifest in a known schema.
    pub fn decode(bytes: &[u8]) -> Result<Record, FrameError> {
        frame::decode::<Record, MANIFEST_MEMORY_MAX>(MANIFEST_FORM, bytes)
    }
}

/// Hash of a framed record, which the next one refers to.
pub fn record_hash(frame: &[u8]) -> [u8; 32] {
    *blake3::hash(frame).as_bytes()
}

/// Place of a checkpoint in its shard: generation and index.
pub type Place = (u64, u32);

/// A place and what stands there.
pub(crate) type SlotAt = (Place, Slot);

/// A record read back, with its hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stored {
    pub record: Record,
    pub hash: [u8; 32],
}

/// What stands at the place of a manifest.
#[derive(Debug, Clone)]
pub(crate) enum Slot {
    /// A readable manifest.
    Sound(Box<Stored>),
    /// One of a newer schema.
    Newer { found: u16, known: u16 },
    /// Bytes that are no manifest of this place.
    Unsound(String),
}

impl Slot {
    /// Reads the manifest stored for a place.
    pub(crate) fn read(bytes: &[u8], shard: u16, generation: u64, index: u32) -> Slot {
        let record = match Record::decode(bytes) {
            Ok(record) => record,
            Err(FrameError::Newer { found, known }) => return Slot::Newer { found, known },
            Err(error) => return Slot::Unsound(error.to_string()),
        };
        let Manifest { shard: s, generation: g, index: i, .. } = record.manifest;
        if (s, g, i) != (shard, generation, index) {
            return Slot::Unsound(format!(
                "manifest of shard {s}, generation {g}, index {i} stands in this place"
            ));
        }
        Slot::Sound(Box::new(Stored { record, hash: record_hash(bytes) }))
    }

    pub(crate) fn sound(&self) -> Option<&Stored> {
        match self {
            Slot::Sound(stored) => Some(stored),
            _ => None,
        }
    }
}

/// What is wrong with a manifest and chunks that are to be stored together, if anything.
pub(crate) fn problem_of(manifest: &Manifest, chunks: &[Bytes]) -> Option<String> {
    let Manifest { shard, generation, index, kind, .. } = manifest;
    if *shard >= SHARDS_MAX {
        return Some(format!("shard {shard} is above {}", SHARDS_MAX - 1));
    }
    if *generation == 0 {
        return Some("generations count from 1".to_owned());
    }
    if (*kind == Kind::Base) != (*index == 0) {
        return Some(format!("a {kind:?} cannot have index {index}; the base has 0, deltas more"));
    }
    for (name, log) in [("usage", &manifest.usage_log), ("control", &manifest.control_log)] {
        if log.len() > IDENTITY_LEN_MAX {
            let len = log.len();
            return Some(format!(
                "identity of the {name} log has {len} bytes of {IDENTITY_LEN_MAX}"
            ));
        }
    }
    problem_of_chunks(manifest, chunks)
}

/// What is wrong with the chunks of a manifest, if anything.
pub(crate) fn problem_of_chunks(manifest: &Manifest, chunks: &[Bytes]) -> Option<String> {
    if chunks.len() != manifest.chunks as usize {
        return Some(format!("{} chunks of {}", chunks.len(), manifest.chunks));
    }
    if let Some((i, chunk)) = chunks.iter().enumerate().find(|(_, c)| c.len() > CHUNK_LEN_MAX) {
        return Some(format!("chunk {i} has {} bytes of at most {CHUNK_LEN_MAX}", chunk.len()));
    }
    let bytes: u64 = chunks.iter().map(|chunk| chunk.len() as u64).sum();
    if bytes != manifest.bytes {
        return Some(format!("chunks have {bytes} bytes, the manifest says {}", manifest.bytes));
    }
    (chunks_hash(chunks) != manifest.hash).then(|| "chunks do not hash to the manifest".to_owned())
}

/// What is wrong with `next` as the continuation of `previous` (none for a base), if anything.
pub(crate) fn problem_of_link(previous: Option<&Stored>, next: &Record) -> Option<String> {
    let Record { manifest: b, previous: link } = next;
    let Some(previous) = previous else {
        return if b.kind != Kind::Base || b.index != 0 {
            Some(format!("index {} has no base before it", b.index))
        } else {
            (*link != NO_PREVIOUS).then(|| "a base refers to a manifest before it".to_owned())
        };
    };
    if *link != previous.hash {
        return Some("was not written behind the manifest before it".to_owned());
    }
    problem_of_order(&previous.record.manifest, b)
}

/// What is wrong with the order of two manifests of a generation, if anything.
pub(crate) fn problem_of_order(a: &Manifest, b: &Manifest) -> Option<String> {
    if (a.shard, a.generation) != (b.shard, b.generation) || b.kind != Kind::Delta {
        return Some("is not a delta of the same generation".to_owned());
    }
    if Some(b.index) != a.index.checked_add(1) {
        return Some(format!("index {} follows {}", b.index, a.index));
    }
    if a.format != b.format {
        return Some(format!("format {} follows {} in one generation", b.format, a.format));
    }
    if (&a.usage_log, &a.control_log) != (&b.usage_log, &b.control_log) {
        return Some("belongs to other logs than the manifest before it".to_owned());
    }
    let fell = [
        ("usage position", a.usage_position > b.usage_position),
        ("control position", a.control_position > b.control_position),
        ("log time", a.log_time > b.log_time),
        ("epoch", a.epoch > b.epoch),
        ("commit position", a.commit_position > b.commit_position),
        ("token", a.token > b.token),
    ];
    let (name, _) = fell.into_iter().find(|(_, fell)| *fell)?;
    Some(format!("its {name} is behind that of the manifest before it"))
}

/// Decides whether a checkpoint may be written behind `slots`, all that the shard has in ascending
/// order, and what it links to.
///
/// A base begins a generation above all readable ones. A delta follows a readable manifest of the
/// newest readable generation; it replaces what stands at its own index and above, which a caller
/// does that restored only the part before.
pub(crate) fn link_of(slots: &[SlotAt], manifest: &Manifest) -> Result<[u8; 32], CheckpointError> {
    if let Some((found, known)) = newer_of(slots) {
        // Behind checkpoints of a newer version nothing is written: that version would take ours
        // for the continuation.
        return Err(CheckpointError::Newer { found, known });
    }
    let newest = slots.iter().rev().find_map(|(at, slot)| slot.sound().map(|_| at.0)).unwrap_or(0);
    let Manifest { shard, generation, index, kind, .. } = manifest;
    match kind {
        Kind::Base if *generation > newest => Ok(NO_PREVIOUS),
        Kind::Base => Err(refused(format!(
            "base of generation {generation} of shard {shard} is not above the newest, {newest}"
        ))),
        Kind::Delta => {
            let before = index.checked_sub(1).map(|before| (*generation, before));
            let before = slots.iter().find(|(at, _)| Some(*at) == before);
            let Some(before) = before.and_then(|(_, slot)| slot.sound()) else {
                return Err(refused(format!(
                    "delta {index} of generation {generation} of shard {shard} has nothing before it"
                )));
            };
            if *generation != newest {
                return Err(refused(format!(
                    "delta of generation {generation} of shard {shard}: the newest is {newest}"
                )));
            }
            match problem_of_order(&before.record.manifest, manifest) {
                None => Ok(before.hash),
                Some(problem) => Err(refused(format!("delta of shard {shard}: {problem}"))),
            }
        }
    }
}

/// A manifest of a newer schema, if there is one.
pub(crate) fn newer_of(slots: &[SlotAt]) -> Option<(u16, u16)> {
    slots.iter().find_map(|(_, slot)| match slot {
        Slot::Newer { found, known } => Some((*found, *known)),
        _ => None,
    })
}

/// The caller asked for what the rules of a chain do not allow; the store is well.
pub(crate) fn refused(cause: String) -> CheckpointError {
    CheckpointError::Store { what: "checkpoint refused".to_owned(), cause }
}

/// How far a generation is sound.
pub(crate) struct Sound<T> {
    /// What the visitor gave for each sound checkpoint, base first.
    pub parts: Vec<T>,
    /// Checkpoints there are, sound or not.
    pub total: u32,
    /// What is wrong with the first unsound one.
    pub problem: Option<String>,
    /// Whether the problem is a newer format: (found, known).
    pub newer: Option<(u16, u16)>,
}

impl<T> Sound<T> {
    pub(crate) fn verified(&self, shard: u16, generation: u64) -> Verified {
        let sound = self.parts.len() as u32;
        Verified { shard, generation, sound, total: self.total, problem: self.problem.clone() }
    }
}

/// Walks the chain of one generation as far as it is sound. `chunks_of` reads the chunks of a
/// checkpoint; `Ok(Err(problem))` says that they are not all there.
pub(crate) fn walk<T, E>(
    slots: &[SlotAt],
    format_known: u16,
    mut chunks_of: impl FnMut(&Manifest) -> Result<Result<Vec<Bytes>, String>, E>,
    mut take: impl FnMut(&Stored, Vec<Bytes>) -> T,
) -> Result<Sound<T>, E> {
    let mut sound = Sound { parts: Vec::new(), total: 0, problem: None, newer: None };
    sound.total = u32::try_from(slots.len()).unwrap_or(u32::MAX);
    let mut previous: Option<&Stored> = None;
    for ((_, index), slot) in slots {
        let problem = match slot {
            Slot::Newer { found, known } => {
                sound.newer = Some((*found, *known));
                Some(format!("manifest schema {found} is newer than the known {known}"))
            }
            Slot::Unsound(problem) => Some(problem.clone()),
            Slot::Sound(stored) if stored.record.manifest.format > format_known => {
                let found = stored.record.manifest.format;
                sound.newer = Some((found, format_known));
                Some(format!("format {found} is newer than the known {format_known}"))
            }
            Slot::Sound(stored) => match problem_of_link(previous, &stored.record) {
                Some(problem) => Some(problem),
                None => match chunks_of(&stored.record.manifest)? {
                    Err(problem) => Some(problem),
                    Ok(chunks) => {
                        let problem = problem_of_chunks(&stored.record.manifest, &chunks);
                        if problem.is_none() {
                            sound.parts.push(take(stored, chunks));
                            previous = Some(stored);
                        }
                        problem
                    }
                },
            },
        };
        if let Some(problem) = problem {
            sound.problem = Some(format!("checkpoint {index}: {problem}"));
            break;
        }
    }
    Ok(sound)
}

/// Splits a shard's slots by generation, oldest first.
pub(crate) fn by_generation(slots: &[SlotAt]) -> impl DoubleEndedIterator<Item = (u64, &[SlotAt])> {
    slots.chunk_by(|a, b| a.0.0 == b.0.0).map(|part| (part[0].0.0, part))
}
