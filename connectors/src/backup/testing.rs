//! A store in memory, and random records, for the tests.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::BoxFuture;
use meterr_operators::time::Time;
use parking_lot::Mutex;
use proptest::prelude::*;

use crate::blobs::{Blob, BlobError, Blobs};
use crate::log::{Message, Record};

/// Called before each operation with its name and the object's.
type Watch = Box<dyn Fn(&str, &str) + Send + Sync>;

#[derive(Default)]
pub struct MemoryBlobs {
    pub objects: Mutex<BTreeMap<String, Bytes>>,
    /// Operations that still succeed; `None`: all.
    pub fails_after: Mutex<Option<u32>>,
    pub watch: Mutex<Option<Watch>>,
}

impl MemoryBlobs {
    pub fn new() -> Arc<MemoryBlobs> {
        Arc::default()
    }

    pub fn names(&self, prefix: &str) -> Vec<String> {
        self.objects.lock().keys().filter(|name| name.starts_with(prefix)).cloned().collect()
    }

    fn step(&self, what: &str, name: &str) -> Result<(), BlobError> {
        if let Some(watch) = &*self.watch.lock() {
            watch(what, name);
        }
        let mut left = self.fails_after.lock();
        match &mut *left {
            Some(0) => {
                Err(BlobError { store: self.shown(), what: format!("cannot {what} {name:?}") })
            }
            Some(left) => {
                *left -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn done<T: Send + 'static>(
        &self,
        what: &str,
        name: &str,
        does: impl FnOnce(&mut BTreeMap<String, Bytes>) -> T,
    ) -> BoxFuture<'static, Result<T, BlobError>> {
        let done = self.step(what, name).map(|()| does(&mut self.objects.lock()));
        Box::pin(std::future::ready(done))
    }
}

impl Blobs for MemoryBlobs {
    fn shown(&self) -> String {
        "memory".to_owned()
    }

    fn put(&self, name: &str, bytes: Bytes) -> BoxFuture<'static, Result<(), BlobError>> {
        self.done("put", name, |objects| drop(objects.insert(name.to_owned(), bytes)))
    }

    fn get(&self, name: &str) -> BoxFuture<'static, Result<Option<Bytes>, BlobError>> {
        self.done("get", name, |objects| objects.get(name).cloned())
    }

    fn list(&self, prefix: &str) -> BoxFuture<'static, Result<Vec<Blob>, BlobError>> {
        self.done("list", prefix, |objects| {
            let found = objects.iter().filter(|(name, _)| name.starts_with(prefix));
            let blob = |(name, bytes): (&String, &Bytes)| Blob {
                name: name.clone(),
                bytes: bytes.len() as u64,
            };
            found.map(blob).collect()
        })
    }

    fn delete(&self, name: &str) -> BoxFuture<'static, Result<(), BlobError>> {
        self.done("delete", name, |objects| drop(objects.remove(name)))
    }
}

/// Records in a row, from position 7.
pub fn records(count: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Record>> {
    let headers = prop::collection::btree_map("[a-z]{1,5}", "[a-zü]{0,5}", 0..3);
    let payload = prop::collection::vec(any::<u8>(), 0..50);
    let one = (any::<i64>(), "[a-z.@]{0,9}", headers, payload);
    prop::collection::vec(one, count).prop_map(|records| {
        let record = |(position, (time, subject, headers, payload)): (u64, (_, _, _, Vec<u8>))| {
            let headers: BTreeMap<String, String> = headers;
            let message = Message {
                subject,
                headers: headers.into_iter().collect(),
                payload: payload.into(),
            };
            Record { position, time: Time(time), message }
        };
        (7..).zip(records).map(record).collect()
    })
}
