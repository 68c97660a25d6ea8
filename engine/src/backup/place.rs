//! The store that an address names, usable from any thread: what it does runs on a runtime of its own.

use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use futures::future::BoxFuture;
use meterr_connectors::blobs::{self, Blob, BlobError, Blobs};
use meterr_connectors::nats::blobs::NatsBlobs;
use meterr_connectors::nats::connection::NatsSettings;

use crate::nats::Background;
use crate::settings::Settings;

/// Opens a store: `file:///DIR`, `s3://BUCKET/PREFIX`, or the object store of NATS servers, for which the
/// rest of `[nats]` (credentials, certificates, replicas) counts where it is set.
///
/// # Errors
/// When the address is none of these, or the store cannot be opened.
pub fn blobs(url: &str, settings: &Settings) -> anyhow::Result<Arc<dyn Blobs>> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .thread_name("meterr-backup")
        .enable_all()
        .build()
        .context("cannot start a runtime")?;
    let inner: Arc<dyn Blobs> = match url.split_once("://") {
        Some(("nats" | "tls", _)) => {
            let (known, replicas) = settings
                .nats
                .as_ref()
                .map_or((NatsSettings::default(), 1), |n| (n.connection.clone(), n.replicas));
            let connection = NatsSettings { url: url.to_owned(), ..known };
            Arc::new(runtime.block_on(NatsBlobs::connect(&connection, replicas))?)
        }
        _ => {
            let _runtime = runtime.enter();
            blobs::open(url)?
        }
    };
    Ok(Arc::new(OnRuntime { inner, runtime: Background::new(runtime) }))
}

struct OnRuntime {
    inner: Arc<dyn Blobs>,
    runtime: Background,
}

impl OnRuntime {
    fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&dyn Blobs) -> BoxFuture<'static, Result<T, BlobError>>,
    ) -> BoxFuture<'static, Result<T, BlobError>> {
        let task = {
            let _runtime = self.runtime.enter();
            self.runtime.spawn(work(&*self.inner))
        };
        let store = self.inner.shown();
        Box::pin(async move {
            task.await.unwrap_or_else(|died| Err(BlobError { store, what: died.to_string() }))
        })
    }
}

impl Blobs for OnRuntime {
    fn shown(&self) -> String {
        self.inner.shown()
    }

    fn put(&self, name: &str, bytes: Bytes) -> BoxFuture<'static, Result<(), BlobError>> {
        self.run(|blobs| blobs.put(name, bytes))
    }

    fn get(&self, name: &str) -> BoxFuture<'static, Result<Option<Bytes>, BlobError>> {
        self.run(|blobs| blobs.get(name))
    }

    fn list(&self, prefix: &str) -> BoxFuture<'static, Result<Vec<Blob>, BlobError>> {
        self.run(|blobs| blobs.list(prefix))
    }

    fn delete(&self, name: &str) -> BoxFuture<'static, Result<(), BlobError>> {
        self.run(|blobs| blobs.delete(name))
    }
}
