//! Objects in an object store of NATS, as its tools know them: chunks in a replicated stream, and a
//! message that names them with their SHA-256.
//!
//! Chunks are published several at once and believed only by that message, so that an object is there
//! as a whole or not at all. What a writer left that died before it stays in the stream until the
//! bucket is removed. A name that has the same content already is not written again; another content
//! replaces it, and a reader of the old one who is not done by then gets an error.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::object_store::{
    DeleteErrorKind, GetErrorKind, InfoErrorKind, ObjectInfo, ObjectOptions, ObjectStore,
};
use async_nats::jetstream::stream::{Config, DiscardPolicy, RetentionPolicy, StorageType};
use async_nats::{HeaderMap, Subject};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE;
use bytes::Bytes;
use futures::StreamExt;
use futures::future::{BoxFuture, ready};
use futures::stream::FuturesOrdered;
use tokio::io::AsyncReadExt;
use tokio::runtime::Handle;
use tokio::time::timeout;

use super::connection::{Line, NatsSettings};
use super::log::{context, nonce, open_stream};
use super::registry::OpenError;
use super::write::told;
use crate::blobs::{BLOB_LEN_MAX, BLOBS_MAX, Blob, BlobError, Blobs, check, check_name};

/// Bucket of the objects.
pub const BUCKET: &str = "METERR_BLOBS";
/// Stream of the bucket.
pub const STREAM: &str = "OBJ_METERR_BLOBS";

/// Largest chunk, in bytes.
const CHUNK_LEN: usize = 512 * 1024;
/// Chunks on their way at once.
const WINDOW: usize = 8;
/// Longest time without any progress.
const STALL: Duration = Duration::from_secs(15);
/// Room for subject and headers beside a chunk.
const OVERHEAD_BYTES: usize = 1024;

/// An object store on a connection of its own; clones share it.
#[derive(Clone)]
pub struct NatsBlobs {
    shared: Arc<Shared>,
}

struct Shared {
    line: Line,
    runtime: Handle,
    shown: String,
    nonce: String,
    next: AtomicU64,
}

/// How the bucket is made.
fn config(replicas: usize) -> Config {
    Config {
        name: STREAM.to_owned(),
        description: Some("meterr: checkpoints and what else nodes share; only nodes write".into()),
        subjects: vec![format!("$O.{BUCKET}.C.>"), format!("$O.{BUCKET}.M.>")],
        storage: StorageType::File,
        num_replicas: replicas,
        discard: DiscardPolicy::New,
        max_bytes: -1,
        max_messages: -1,
        max_messages_per_subject: -1,
        max_message_size: -1,
        allow_rollup: true,
        // What names an object is read from the leader, not from a replica that is behind.
        allow_direct: false,
        ..Config::default()
    }
}

/// What is wrong with it, each with what mends it.
fn wrong(found: &Config, replicas: usize) -> Vec<String> {
    let wanted = config(replicas);
    let edit = |flags: &str| format!("run: nats stream edit {STREAM} {flags}");
    let limited = found.max_bytes > 0 || found.max_messages > 0;
    let wrong = [
        (
            found.subjects != wanted.subjects,
            "its subjects are not those of an object store",
            "--help",
        ),
        (
            found.num_replicas < replicas,
            "it has too few replicas",
            &format!("--replicas={replicas}"),
        ),
        (!found.max_age.is_zero(), "objects expire (max age)", "--max-age=-1"),
        (
            found.max_messages_per_subject > 0,
            "it keeps only some chunks of an object",
            "--max-msgs-per-subject=-1",
        ),
        (
            limited && found.discard != DiscardPolicy::New,
            "when full it would discard old objects",
            "--discard=new",
        ),
        (!found.allow_rollup, "objects cannot be replaced", "--allow-rollup"),
        (found.retention != RetentionPolicy::Limits, "its retention is not \"limits\"", "--help"),
        (found.storage != StorageType::File, "it is kept in memory only", "--help"),
    ];
    let wrong = wrong.into_iter().filter(|(is, ..)| *is);
    wrong.map(|(_, what, flags)| format!("{what}; {}", edit(flags))).collect()
}

impl NatsBlobs {
    /// Connects and opens the bucket, which is created with so many replicas if it is not there.
    /// Requests run on the runtime of the caller.
    ///
    /// # Errors
    /// When no server answers, or the bucket is set in a way that could lose objects, with what to do.
    pub async fn connect(settings: &NatsSettings, replicas: usize) -> Result<NatsBlobs, OpenError> {
        let line = Line::connect(settings, "meterr blobs").await?;
        let wrong = |found: &Config| wrong(found, replicas);
        open_stream(&context(line.client()), STREAM, Some(&config(replicas)), wrong).await?;
        let shown = format!("{} object store {BUCKET}", super::connection::shown(&settings.url));
        let (runtime, next) = (Handle::current(), AtomicU64::new(0));
        let shared = Shared { line, runtime, shown, nonce: nonce(), next };
        Ok(NatsBlobs { shared: Arc::new(shared) })
    }

    /// Runs on the runtime, so that callers may wait with any executor.
    fn run<T: Send + 'static>(
        &self,
        name: &str,
        work: impl Future<Output = Result<T, String>> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, BlobError>> {
        let (shared, name) = (self.shared.clone(), name.to_owned());
        let task = self.shared.runtime.spawn(async move {
            let done = work.await;
            if done.is_err() {
                // The next call may find a client that lives.
                shared.line.revive().await;
            }
            done.map_err(|why| BlobError::new(&shared.shown, format!("{name}: {why}")))
        });
        let shown = self.shared.shown.clone();
        Box::pin(
            async move { task.await.unwrap_or_else(|error| Err(BlobError::new(&shown, error))) },
        )
    }
}

/// Gives up after some time without an answer.
async fn within<T, E: std::error::Error>(
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, String> {
    match timeout(STALL, work).await {
        Ok(done) => done.map_err(|error| told(&error)),
        Err(_) => Err(format!("no answer within {STALL:?}")),
    }
}

impl Shared {
    async fn store(&self) -> Result<(jetstream::Context, ObjectStore), String> {
        let context = context(self.line.client());
        let store = within(context.get_object_store(BUCKET)).await?;
        Ok((context, store))
    }

    async fn put(&self, name: &str, bytes: Bytes) -> Result<(), String> {
        let digest = ring::digest::digest(&ring::digest::SHA256, &bytes);
        let digest = format!("SHA-256={}", URL_SAFE.encode(digest));
        let (context, store) = self.store().await?;
        let before = match timeout(STALL, store.info(name)).await {
            Ok(Ok(info)) if info.deleted => None,
            Ok(Ok(info)) => Some(info),
            Ok(Err(error)) if error.kind() == InfoErrorKind::NotFound => None,
            Ok(Err(error)) => return Err(told(&error)),
            Err(_) => return Err(format!("no answer within {STALL:?}")),
        };
        let same =
            |info: &ObjectInfo| info.size == bytes.len() && info.digest.as_ref() == Some(&digest);
        if before.as_ref().is_some_and(same) {
            return Ok(());
        }
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let nuid = format!("{}{n:08}", self.nonce);
        let chunks = match self.put_chunks(&context, &nuid, &bytes).await {
            Ok(chunks) => chunks,
            Err(why) => {
                // Nothing names them. What cannot be purged now stays.
                let _ = purge(&context, &nuid).await;
                return Err(why);
            }
        };
        let info = ObjectInfo {
            name: name.to_owned(),
            description: None,
            metadata: Default::default(),
            headers: None,
            options: Some(ObjectOptions { link: None, max_chunk_size: Some(CHUNK_LEN) }),
            bucket: BUCKET.to_owned(),
            nuid,
            size: bytes.len(),
            chunks,
            modified: None,
            digest: Some(digest),
            deleted: false,
        };
        let info = serde_json::to_vec(&info).map_err(|error| error.to_string())?;
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Rollup", "sub");
        let subject = format!("$O.{BUCKET}.M.{}", URL_SAFE.encode(name));
        // Without an acknowledgement it may stand all the same: then the chunks must stay.
        within(async { context.publish_with_headers(subject, headers, info.into()).await?.await })
            .await?;
        if let Some(before) = before {
            purge(&context, &before.nuid).await?;
        }
        Ok(())
    }

    /// Publishes the chunks of an object, in order; says how many.
    async fn put_chunks(
        &self,
        context: &jetstream::Context,
        nuid: &str,
        bytes: &Bytes,
    ) -> Result<usize, String> {
        let room = self.line.client().server_info().max_payload;
        let len = CHUNK_LEN.min(room.saturating_sub(OVERHEAD_BYTES)).max(1);
        let subject = Subject::from(format!("$O.{BUCKET}.C.{nuid}"));
        let chunks = bytes.len().div_ceil(len);
        let mut acks = FuturesOrdered::new();
        let mut last = 0;
        for chunk in 0..chunks {
            let payload = bytes.slice(chunk * len..bytes.len().min((chunk + 1) * len));
            let ack = within(context.publish(subject.clone(), payload)).await?;
            acks.push_back(within(ack.into_future()));
            while acks.len() >= WINDOW || (chunk + 1 == chunks && !acks.is_empty()) {
                let Some(ack) = acks.next().await else { break };
                let sequence = ack?.sequence;
                // They are read in the order of the stream.
                if sequence <= last {
                    return Err("the chunks were stored out of order".to_owned());
                }
                last = sequence;
            }
        }
        Ok(chunks)
    }

    async fn get(&self, name: &str) -> Result<Option<Bytes>, String> {
        let (_, store) = self.store().await?;
        let mut object = match timeout(STALL, store.get(name)).await {
            Ok(Ok(object)) => object,
            Ok(Err(error)) if error.kind() == GetErrorKind::NotFound => return Ok(None),
            Ok(Err(error)) => return Err(told(&error)),
            Err(_) => return Err(format!("no answer within {STALL:?}")),
        };
        let size = object.info().size;
        if size > BLOB_LEN_MAX {
            return Err(format!("it has more than {BLOB_LEN_MAX} bytes"));
        }
        let mut bytes = Vec::with_capacity(size);
        // The hash is checked by the client with the last chunk.
        while within(object.read_buf(&mut bytes)).await? > 0 {
            if bytes.len() > size {
                return Err("it has more bytes than were said".to_owned());
            }
            bytes.reserve(CHUNK_LEN.min(size - bytes.len()).max(1));
        }
        if bytes.len() < size {
            return Err(format!("{} bytes of {size} came", bytes.len()));
        }
        Ok(Some(bytes.into()))
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Blob>, String> {
        let (_, store) = self.store().await?;
        let mut listed = within(store.list()).await?;
        let mut found = Vec::new();
        loop {
            let next = timeout(STALL, listed.next()).await;
            let Some(info) = next.map_err(|_| "the listing did not come to its end".to_owned())?
            else {
                break;
            };
            let info = info.map_err(|error| told(&error))?;
            if !info.name.starts_with(prefix) || crate::blobs::problem_of_name(&info.name).is_some()
            {
                continue;
            }
            if found.len() >= BLOBS_MAX {
                return Err(format!("more than {BLOBS_MAX} objects"));
            }
            found.push(Blob { name: info.name, bytes: info.size as u64 });
        }
        found.sort_by(|a: &Blob, b: &Blob| a.name.cmp(&b.name));
        Ok(found)
    }

    async fn delete(&self, name: &str) -> Result<(), String> {
        let (_, store) = self.store().await?;
        match timeout(STALL, store.delete(name)).await {
            Ok(Err(error)) if error.kind() != DeleteErrorKind::NotFound => Err(told(&error)),
            Ok(_) => Ok(()),
            Err(_) => Err(format!("no answer within {STALL:?}")),
        }
    }
}

/// Removes the chunks of an object.
async fn purge(context: &jetstream::Context, nuid: &str) -> Result<(), String> {
    let stream = within(context.get_stream_no_info(STREAM)).await?;
    let subject = format!("$O.{BUCKET}.C.{nuid}");
    within(stream.purge().filter(subject).into_future()).await.map(drop)
}

impl Blobs for NatsBlobs {
    fn shown(&self) -> String {
        self.shared.shown.clone()
    }

    fn put(&self, name: &str, bytes: Bytes) -> BoxFuture<'static, Result<(), BlobError>> {
        if let Err(error) = check(&self.shared.shown, name, &bytes) {
            return Box::pin(ready(Err(error)));
        }
        let (shared, place) = (self.shared.clone(), name.to_owned());
        self.run(name, async move { shared.put(&place, bytes).await })
    }

    fn get(&self, name: &str) -> BoxFuture<'static, Result<Option<Bytes>, BlobError>> {
        if let Err(error) = check_name(&self.shared.shown, name) {
            return Box::pin(ready(Err(error)));
        }
        let (shared, place) = (self.shared.clone(), name.to_owned());
        self.run(name, async move { shared.get(&place).await })
    }

    fn list(&self, prefix: &str) -> BoxFuture<'static, Result<Vec<Blob>, BlobError>> {
        let (shared, place) = (self.shared.clone(), prefix.to_owned());
        self.run(prefix, async move { shared.list(&place).await })
    }

    fn delete(&self, name: &str) -> BoxFuture<'static, Result<(), BlobError>> {
        if let Err(error) = check_name(&self.shared.shown, name) {
            return Box::pin(ready(Err(error)));
        }
        let (shared, place) = (self.shared.clone(), name.to_owned());
        self.run(name, async move { shared.delete(&place).await })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_created_is_right() {
        assert_eq!(wrong(&config(3), 3), Vec::<String>::new());
        let old = Config { discard: DiscardPolicy::Old, max_bytes: 1, ..config(1) };
        let wrong = wrong(&old, 3);
        assert_eq!(wrong.len(), 2, "{wrong:?}");
        assert!(wrong[0].contains("--replicas=3") && wrong[1].contains("--discard=new"));
    }
}
