//! Objects in memory, for tests, with failures on demand. Everything is lost with the process.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::{BoxFuture, ready};
use parking_lot::Mutex;

use super::{Blob, BlobError, Blobs, check, check_name};

#[derive(Default)]
struct State {
    objects: BTreeMap<String, Bytes>,
    failing: bool,
    failures: u32,
    lost: u32,
}

/// A store in memory; clones share it.
#[derive(Clone, Default)]
pub struct MemoryBlobs {
    state: Arc<Mutex<State>>,
}

impl MemoryBlobs {
    /// An empty store.
    pub fn new() -> MemoryBlobs {
        MemoryBlobs::default()
    }

    /// Whether every call fails from now on.
    pub fn fail(&self, failing: bool) {
        self.state.lock().failing = failing;
    }

    /// Lets the next `n` writes fail without leaving anything.
    pub fn fail_writes(&self, n: u32) {
        self.state.lock().failures = n;
    }

    /// Lets `n` writes after those be done, and said to have failed.
    pub fn lose_answers(&self, n: u32) {
        self.state.lock().lost = n;
    }

    /// Changes a byte of an object, in the middle. Says whether there was one.
    pub fn damage(&self, name: &str) -> bool {
        let mut state = self.state.lock();
        let Some(object) = state.objects.get_mut(name) else { return false };
        let mut bytes = object.to_vec();
        let middle = bytes.len() / 2;
        let Some(byte) = bytes.get_mut(middle) else { return false };
        *byte ^= 1;
        *object = bytes.into();
        true
    }

    /// Loses an object. Says whether there was one.
    pub fn lose(&self, name: &str) -> bool {
        self.state.lock().objects.remove(name).is_some()
    }

    /// Names of all objects.
    pub fn names(&self) -> Vec<String> {
        self.state.lock().objects.keys().cloned().collect()
    }

    fn call<T: Send + 'static>(
        &self,
        write: bool,
        work: impl FnOnce(&mut State) -> Result<T, BlobError>,
    ) -> BoxFuture<'static, Result<T, BlobError>> {
        let mut state = self.state.lock();
        let failed = || Err(BlobError::new(SHOWN, "failed on demand"));
        if state.failing || (write && state.failures > 0) {
            state.failures -= u32::from(write && !state.failing);
            return Box::pin(ready(failed()));
        }
        let done = work(&mut state);
        if write && state.lost > 0 {
            state.lost -= 1;
            return Box::pin(ready(failed()));
        }
        Box::pin(ready(done))
    }
}

const SHOWN: &str = "memory";

impl Blobs for MemoryBlobs {
    fn shown(&self) -> String {
        SHOWN.to_owned()
    }

    fn put(&self, name: &str, bytes: Bytes) -> BoxFuture<'static, Result<(), BlobError>> {
        self.call(true, |state| {
            check(SHOWN, name, &bytes)?;
            state.objects.insert(name.to_owned(), bytes);
            Ok(())
        })
    }

    fn get(&self, name: &str) -> BoxFuture<'static, Result<Option<Bytes>, BlobError>> {
        self.call(false, |state| {
            check_name(SHOWN, name)?;
            Ok(state.objects.get(name).cloned())
        })
    }

    fn list(&self, prefix: &str) -> BoxFuture<'static, Result<Vec<Blob>, BlobError>> {
        self.call(false, |state| {
            let blob = |(name, bytes): (&String, &Bytes)| Blob {
                name: name.clone(),
                bytes: bytes.len() as u64,
            };
            let found = state.objects.range(prefix.to_owned()..);
            Ok(found.take_while(|(name, _)| name.starts_with(prefix)).map(blob).collect())
        })
    }

    fn delete(&self, name: &str) -> BoxFuture<'static, Result<(), BlobError>> {
        self.call(true, |state| {
            check_name(SHOWN, name)?;
            state.objects.remove(name);
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blobs::testing::conforms;

    #[tokio::test]
    async fn it_keeps_the_rules_of_a_store() {
        conforms(&MemoryBlobs::new()).await;
    }

    #[tokio::test]
    async fn faults_on_demand() {
        let blobs = MemoryBlobs::new();
        let put = |name: &str| blobs.put(name, Bytes::from_static(b"abc"));
        blobs.fail_writes(1);
        blobs.lose_answers(1);
        assert!(put("a").await.is_err() && blobs.names().is_empty());
        assert!(put("a").await.is_err() && blobs.names() == ["a"]);
        put("a").await.unwrap();
        assert!(blobs.damage("a") && !blobs.damage("b"));
        assert_eq!(blobs.get("a").await.unwrap().unwrap(), "acc");
        blobs.fail(true);
        assert!(blobs.get("a").await.is_err() && put("a").await.is_err());
        blobs.fail(false);
        assert!(blobs.lose("a") && !blobs.lose("a"));
    }
}
