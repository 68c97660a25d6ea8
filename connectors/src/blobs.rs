//! A place for immutable objects: checkpoints on their way from node to node, and backups. Local
//! directories, S3-compatible stores and NATS object stores implement it.

use bytes::Bytes;
use futures::future::BoxFuture;

/// Largest object, in bytes. Whoever has more cuts it.
pub const BLOB_LEN_MAX: usize = 64 * 1024 * 1024;

/// One object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// Its name: parts of `[a-zA-Z0-9_.-]` joined by `/`.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
#[error("{store}: {what}")]
pub struct BlobError {
    /// The store, for messages, without secrets.
    pub store: String,
    /// What was tried and what came of it.
    pub what: String,
}

/// Keeps objects. Names are chosen so that one name always has one content.
pub trait Blobs: Send + Sync + 'static {
    /// What it is, for messages, without secrets.
    fn shown(&self) -> String;

    /// Writes an object. On return it is as durable as the store makes anything. Writing the same
    /// name again replaces it as a whole: a reader gets one content or the other.
    fn put(&self, name: &str, bytes: Bytes) -> BoxFuture<'static, Result<(), BlobError>>;

    /// Reads an object, `None` when there is none.
    fn get(&self, name: &str) -> BoxFuture<'static, Result<Option<Bytes>, BlobError>>;

    /// All objects whose name begins with `prefix`, by name.
    fn list(&self, prefix: &str) -> BoxFuture<'static, Result<Vec<Blob>, BlobError>>;

    /// Deletes an object; one that is not there is no error.
    fn delete(&self, name: &str) -> BoxFuture<'static, Result<(), BlobError>>;
}
