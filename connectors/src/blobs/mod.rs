//! A place for immutable objects: checkpoints on their way from node to node, and backups.
//!
//! | file | what |
//! |---|---|
//! | [`local`] | a directory |
//! | [`s3`] | a bucket of an S3-compatible store |
//! | [`crate::nats::blobs`] | an object store of NATS |
//! | [`memory`] | in memory, for tests, with failures on demand |

pub mod local;
pub mod memory;
pub mod s3;
#[cfg(test)]
pub(crate) mod testing;

use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;

use self::local::LocalBlobs;
use self::s3::S3Blobs;

/// Largest object, in bytes. Whoever has more cuts it.
pub const BLOB_LEN_MAX: usize = 64 * 1024 * 1024;

/// Longest name, in bytes.
pub const NAME_LEN_MAX: usize = 512;
/// Longest part of a name, in bytes: a file system's limit, with room for a suffix.
pub const PART_LEN_MAX: usize = 200;
/// Most objects a listing may have.
pub const BLOBS_MAX: usize = 1_000_000;

/// One object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Blob {
    /// Its name: parts of `[a-zA-Z0-9_.-]` joined by `/`, none of which begins with a dot.
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

impl BlobError {
    pub(crate) fn new(store: &str, what: impl std::fmt::Display) -> BlobError {
        BlobError { store: store.to_owned(), what: what.to_string() }
    }
}

/// Keeps objects. Reads and listings may be a moment old. Names are chosen so that one name always has one content.
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

/// Opens the store a URL names: `file:///path` or a plain path, or `s3://bucket/prefix`, whose
/// credentials, region and endpoint come from the environment (`AWS_ACCESS_KEY_ID`,
/// `AWS_SECRET_ACCESS_KEY`, `AWS_REGION`, `AWS_ENDPOINT`, `AWS_ALLOW_HTTP` and more).
///
/// # Errors
/// When the URL is none of these, the directory cannot be made, or the settings do not fit.
pub fn open(url: &str) -> Result<Arc<dyn Blobs>, BlobError> {
    match url.split_once("://") {
        Some(("file", path)) if path.starts_with('/') => Ok(Arc::new(LocalBlobs::open(path)?)),
        Some(("s3", place)) => Ok(Arc::new(S3Blobs::open(place)?)),
        None if !url.is_empty() => Ok(Arc::new(LocalBlobs::open(url)?)),
        // Not the whole of it, which may hold a password.
        Some((scheme, _)) => Err(BlobError::new(
            &format!("{scheme}://…"),
            "an object store is a path, file:///path or s3://bucket/prefix",
        )),
        None => Err(BlobError::new("", "an object store needs a path or s3://bucket/prefix")),
    }
}

/// What is wrong with a name, if anything.
pub fn problem_of_name(name: &str) -> Option<String> {
    let good = |part: &str| {
        (1..=PART_LEN_MAX).contains(&part.len())
            && !part.starts_with('.')
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
    };
    let fine = name.len() <= NAME_LEN_MAX && name.split('/').all(good);
    (!fine).then(|| {
        format!(
            "{name:?} is no name of an object: parts of letters, digits, '_', '.' and '-' that begin \
             with no dot, joined by '/', at most {NAME_LEN_MAX} bytes"
        )
    })
}

/// Checks what is to be written.
pub(crate) fn check(store: &str, name: &str, bytes: &Bytes) -> Result<(), BlobError> {
    check_name(store, name)?;
    if bytes.len() > BLOB_LEN_MAX {
        let len = bytes.len();
        return Err(BlobError::new(store, format!("{name}: {len} bytes of {BLOB_LEN_MAX}")));
    }
    Ok(())
}

pub(crate) fn check_name(store: &str, name: &str) -> Result<(), BlobError> {
    problem_of_name(name).map_or(Ok(()), |problem| Err(BlobError::new(store, problem)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_place() {
        for good in ["a", "a/b.c/D-1_2", "checkpoint/3/0001-7/0-ab"] {
            assert_eq!(problem_of_name(good), None, "{good}");
        }
        let (long, many) = ("x".repeat(PART_LEN_MAX + 1), "x/".repeat(400) + "x");
        for bad in [
            "", "/", "/a", "a/", "a//b", ".", "..", "a/../b", "a/.b", "a b", "a\\b", "ä", "a\0",
            &long, &many,
        ] {
            assert!(problem_of_name(bad).is_some(), "{bad:?}");
        }
    }

    #[test]
    fn a_url_names_a_store() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_str().unwrap();
        assert_eq!(open(path).unwrap().shown(), open(&format!("file://{path}")).unwrap().shown());
        for bad in ["", "file://relative", "ftp://user:secret@host/x", "s3://", "s3://b/../c"] {
            let Err(error) = open(bad) else { panic!("{bad:?} is no store") };
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    }
}
