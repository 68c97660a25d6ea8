//! The store that an address names.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::bail;
use bytes::Bytes;
use futures::future::BoxFuture;
use meterr_connectors::blobs::{Blob, BlobError, Blobs};

use crate::settings::Settings;

/// Opens a store.
pub fn blobs(url: &str, _: &Settings) -> anyhow::Result<Arc<dyn Blobs>> {
    match url.strip_prefix("file://") {
        Some(dir) => Ok(Arc::new(Local(dir.into()))),
        None => bail!("{url:?} is no store; give file:///DIR"),
    }
}

/// Stands in until the stores of `meterr_connectors::blobs` are there.
struct Local(PathBuf);

impl Local {
    fn failed(&self, name: &str, error: std::io::Error) -> BlobError {
        BlobError { store: self.shown(), what: format!("{name}: {error}") }
    }

    fn now<T: Send + 'static>(
        &self,
        name: &str,
        result: std::io::Result<T>,
    ) -> BoxFuture<'static, Result<T, BlobError>> {
        Box::pin(std::future::ready(result.map_err(|error| self.failed(name, error))))
    }
}

impl Blobs for Local {
    fn shown(&self) -> String {
        format!("file://{}", self.0.display())
    }

    fn put(&self, name: &str, bytes: Bytes) -> BoxFuture<'static, Result<(), BlobError>> {
        let path = self.0.join(name);
        let part = self.0.join(format!("{}.part{}", name.replace('/', "_"), std::process::id()));
        let put = || {
            std::fs::create_dir_all(path.parent().unwrap_or(&self.0))?;
            std::fs::write(&part, &bytes)?;
            std::fs::File::open(&part)?.sync_all()?;
            std::fs::rename(&part, &path)
        };
        self.now(name, put())
    }

    fn get(&self, name: &str) -> BoxFuture<'static, Result<Option<Bytes>, BlobError>> {
        let got = match std::fs::read(self.0.join(name)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            other => other.map(|bytes| Some(bytes.into())),
        };
        self.now(name, got)
    }

    fn list(&self, prefix: &str) -> BoxFuture<'static, Result<Vec<Blob>, BlobError>> {
        let folder = prefix.trim_end_matches('/');
        let list = || {
            let mut found = Vec::new();
            let entries = match std::fs::read_dir(self.0.join(folder)) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
                other => other?,
            };
            for entry in entries {
                let entry = entry?;
                let name = format!("{folder}/{}", entry.file_name().to_string_lossy());
                match entry.metadata() {
                    Ok(metadata) => found.push(Blob { name, bytes: metadata.len() }),
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => return Err(error),
                }
            }
            found.sort_by(|a, b| a.name.cmp(&b.name));
            Ok(found)
        };
        self.now(prefix, list())
    }

    fn delete(&self, name: &str) -> BoxFuture<'static, Result<(), BlobError>> {
        let deleted = match std::fs::remove_file(self.0.join(name)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => other,
        };
        self.now(name, deleted)
    }
}
