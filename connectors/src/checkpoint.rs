//! Checkpoints: a shard's consolidated state at a committed epoch, so that a restart need not read
//! its log from the beginning. A cache of the log, never the truth.
//!
//! A *generation* is a base and a chain of deltas, each described by a [`Manifest`] and made of
//! chunks of at most [`CHUNK_LEN_MAX`] bytes. A generation is believed only when every chunk of the
//! chain is there and hashes to what the manifests say.

use bytes::Bytes;
use meterr_operators::ids::ShardId;
use meterr_operators::time::Time;

/// Largest chunk, in bytes. Larger values would become unsynced files in sled.
pub const CHUNK_LEN_MAX: usize = 64 * 1024;

/// Whether a checkpoint stands alone or continues another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bincode::Encode, bincode::Decode, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// The whole state.
    Base,
    /// What changed since the checkpoint before it in the same generation.
    Delta,
}

/// What a checkpoint is and where it stands.
#[derive(Debug, Clone, PartialEq, Eq, bincode::Encode, bincode::Decode, serde::Serialize)]
pub struct Manifest {
    /// Version of the chunks' format.
    pub format: u16,
    /// The shard.
    pub shard: u16,
    /// Counts bases of this shard, from 1.
    pub generation: u64,
    /// Place in the generation: 0 is the base.
    pub index: u32,
    /// Base or delta.
    pub kind: Kind,
    /// Identity (`uuid`) of the usage log.
    pub usage_log: String,
    /// Last usage position contained.
    pub usage_position: u64,
    /// blake3 of the message at `usage_position` (all zero when the position is 0).
    pub usage_hash: [u8; 32],
    /// Identity (`uuid`) of the control log.
    pub control_log: String,
    /// Last control position contained.
    pub control_position: u64,
    /// Log time in microseconds since 1970.
    pub log_time: i64,
    /// Last committed epoch contained.
    pub epoch: u64,
    /// Position of that epoch's commit record in the output log.
    pub commit_position: u64,
    /// Fencing token under which it was written.
    pub token: u64,
    /// Number of chunks.
    pub chunks: u32,
    /// Bytes of all chunks.
    pub bytes: u64,
    /// blake3 of all chunks, each preceded by its length as u64 little endian.
    pub hash: [u8; 32],
}

impl Manifest {
    /// The shard as an id.
    pub fn shard_id(&self) -> ShardId {
        ShardId(self.shard)
    }

    /// Log time as a time.
    pub fn log_time(&self) -> Time {
        Time(self.log_time)
    }
}

/// blake3 of chunks as a manifest states it.
pub fn chunks_hash(chunks: &[Bytes]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for chunk in chunks {
        hasher.update(&(chunk.len() as u64).to_le_bytes());
        hasher.update(chunk);
    }
    *hasher.finalize().as_bytes()
}

/// A generation that verified: manifests with their chunks, base first.
pub type Chain = Vec<(Manifest, Vec<Bytes>)>;

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The store failed; it must be opened anew. What was acknowledged before is there.
    #[error("checkpoint store: {what}")]
    Store {
        /// What was tried and what to do.
        what: String,
        /// The failure, as text, since the store's own error type stays inside.
        cause: String,
    },
    /// Another process has the directory open.
    #[error("checkpoint directory {dir:?} is in use by another process; stop it first")]
    Locked {
        /// The directory.
        dir: String,
    },
    /// Written by a newer version.
    #[error(
        "checkpoint format {found} is newer than this binary reads (up to {known}); use a newer meterr"
    )]
    Newer {
        /// Format found.
        found: u16,
        /// Newest format known.
        known: u16,
    },
    /// An import or export file is not sound.
    #[error("checkpoint file: {what}")]
    File {
        /// What is wrong.
        what: String,
    },
}

/// What `verify` says of one generation.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Verified {
    /// The shard.
    pub shard: u16,
    /// The generation.
    pub generation: u64,
    /// Manifests that are sound from the base on.
    pub sound: u32,
    /// Manifests there are.
    pub total: u32,
    /// What is wrong with the first unsound one.
    pub problem: Option<String>,
}

/// What a store noticed, as a sentence for the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// Something that was kept is gone: a directory was damaged, a checkpoint does not verify.
    Lost(String),
    /// Something could not be done now and will be tried again, such as a copy for other nodes.
    Later(String),
}

/// Keeps checkpoints. Blocking; called from a thread of its own.
pub trait CheckpointStore: Send + Sync + 'static {
    /// Writes a checkpoint. On return it is durable, power failure included. A base begins a new
    /// generation; a delta continues the newest one.
    ///
    /// # Errors
    /// When it is not durable; nothing of it is believed then.
    fn write(&self, manifest: &Manifest, chunks: &[Bytes]) -> Result<(), CheckpointError>;

    /// All manifests of a shard, oldest generation first, base first.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn list(&self, shard: ShardId) -> Result<Vec<Manifest>, CheckpointError>;

    /// Shards that have any checkpoint.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn shards(&self) -> Result<Vec<ShardId>, CheckpointError>;

    /// The newest state that verifies: the longest sound prefix of the newest generation whose base
    /// is sound. `before` leaves out that generation and newer ones.
    ///
    /// # Errors
    /// When the store cannot be read, or only a newer format was found.
    fn load(&self, shard: ShardId, before: Option<u64>) -> Result<Option<Chain>, CheckpointError>;

    /// Verifies every generation of a shard.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn verify(&self, shard: ShardId) -> Result<Vec<Verified>, CheckpointError>;

    /// What the store noticed and mended since this was last asked.
    fn take_notices(&self) -> Vec<Notice> {
        Vec::new()
    }

    /// Whether the next checkpoint of a shard must be a base, and then above which generation. Asked
    /// before each checkpoint: a store that keeps copies in several places may have lost the chain in
    /// one of them, and only a base makes it whole there.
    fn base_above(&self, _shard: ShardId) -> Option<u64> {
        None
    }

    /// Deletes generations older than the newest `keep` that verify wholly. Never deletes the newest.
    ///
    /// # Errors
    /// When the store cannot be written.
    fn prune(&self, shard: ShardId, keep: usize) -> Result<(), CheckpointError>;
}
