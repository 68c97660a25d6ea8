//! What nodes of one deployment share beside the logs: a small registry with compare-and-set, and
//! questions from node to node.
//!
//! The registry says who is there and who owns which shard. It gives liveness only: that no figure is
//! published twice or lost is the work of the fenced commit of every epoch (see
//! [`Log::commit`](crate::log::Log::commit)).

use bytes::Bytes;
use futures::future::BoxFuture;
use std::sync::Arc;
use std::time::Duration;

/// One entry of the registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its key, of `[a-zA-Z0-9_.-]`.
    pub key: String,
    /// Raised by every write to any key of the registry; never given twice.
    pub revision: u64,
    /// Its value.
    pub value: Bytes,
}

/// Why the registry did not do it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    /// The key is not at the revision expected; somebody else wrote it.
    #[error("entry {key:?} is not at revision {expected} any more")]
    Conflict {
        /// The key.
        key: String,
        /// What the caller believed.
        expected: u64,
    },
    /// It did not answer in time. Whether the write happened is not known.
    #[error("the registry is not available: {0}")]
    Unavailable(String),
}

/// A small replicated table with compare-and-set. Every write is acknowledged by a majority.
pub trait Registry: Send + Sync + 'static {
    /// All entries as they stand. May be a moment old; a write decides.
    fn read(&self) -> BoxFuture<'static, Result<Vec<Entry>, RegistryError>>;

    /// Writes a value if the key's newest revision is `expected` (0: there is no such key). Returns the
    /// new revision. A write whose acknowledgement was lost is looked up and not repeated: values that
    /// belong to a writer name it, so that its own can be told from another's. So a write may be called
    /// again after [`RegistryError::Unavailable`]: the same value at a newer revision counts as written.
    fn write(
        &self,
        key: String,
        value: Bytes,
        expected: u64,
    ) -> BoxFuture<'static, Result<u64, RegistryError>>;

    /// Removes a key if its newest revision is `expected`.
    fn remove(&self, key: String, expected: u64) -> BoxFuture<'static, Result<(), RegistryError>>;

    /// Tells every other node that something changed, so that it need not wait for its next look.
    /// Best effort.
    fn nudge(&self) -> BoxFuture<'static, ()>;

    /// Resolves when another node nudged after the call.
    fn nudged(&self) -> BoxFuture<'static, ()>;
}

/// Why a node did not answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// Nobody of that name listens.
    #[error("node {0:?} does not listen")]
    Absent(String),
    /// It did not answer in time, or not all of it came.
    #[error("node {node:?} did not answer: {what}")]
    Silent {
        /// The node.
        node: String,
        /// What was awaited.
        what: String,
    },
}

/// Answers a question of another node.
pub type Answerer = Arc<dyn Fn(Bytes) -> BoxFuture<'static, Bytes> + Send + Sync>;

/// Questions from node to node. Answers may be larger than a message of the transport.
pub trait Peers: Send + Sync + 'static {
    /// Asks a node.
    fn ask(
        &self,
        node: &str,
        question: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, PeerError>>;

    /// Answers questions to a node of this name until the transport is closed. Returns once questions
    /// are heard.
    fn serve(&self, node: &str, answerer: Answerer) -> BoxFuture<'static, Result<(), PeerError>>;
}
