//! The registry of a deployment: a replicated bucket of JetStream as [`Registry`].
//!
//! An entry is the newest message of `$KV.METERR.<key>`, its revision the message's sequence, and a
//! removed key a message with `KV-Operation: DEL`. Every write names the sequence it must follow on, so
//! of several writers one wins.
//!
//! An acknowledgement that did not come says nothing, and with replicas neither does a refusal: the
//! leader refuses a write also while another one to the same key is on its way through the replicas,
//! be it an earlier attempt of the same write. So after anything but an acknowledgement the leader is
//! asked what stands. Each write carries a mark of its own in a header, by which it is recognised; so is
//! the same value, from an earlier call whose time had run out:
//!
//! | what stands | then |
//! |---|---|
//! | our mark, or our value and newer than expected | it landed |
//! | what was expected | it is tried again, while there is time |
//! | something newer | another writer was faster: a conflict |
//! | something older than expected | who answered is behind; it is asked again |
//!
//! A write whose time ran out may still land: it is on its way, and stands if nothing else came before.
//! Writes of one process to one key wait for each other.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::client::{Request, RequestErrorKind};
use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use tokio::runtime::Handle;
use tokio::sync::{Mutex, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout, timeout_at};

use super::bucket::{self, VALUE_LEN_MAX};
use super::connection::{ConnectError, Line, NatsSettings, echoes};
use super::log::{BackOff, context, nonce, open_stream};
pub use super::registry_entry::KEY_LEN_MAX;
use super::registry_entry::{MARK, OPERATION, Standing, Verdict, Wrote, strange, verdict};
use super::subjects::{CLUSTER_CHANGED, REGISTRY, REGISTRY_STREAM};
use super::write::told;
use crate::cluster::{Entry, Registry, RegistryError};
use crate::log::LogError;

/// Time a call may take before it says that the registry is not available.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// Time one request to the server may take.
pub(super) const ATTEMPT: Duration = Duration::from_millis(700);

/// Writes that may be on their way at once; those to one key wait for each other.
const TURNS: usize = 64;

/// The registry cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is no connection.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The bucket cannot be used or did not answer.
    #[error(transparent)]
    Stream(#[from] LogError),
}

/// A bucket as registry, on a connection of its own; clones share it.
#[derive(Clone)]
pub struct NatsRegistry {
    shared: Arc<Shared>,
    /// Ends the listening with the last clone.
    _listening: Arc<Listening>,
}

struct Listening(AbortHandle);

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.abort();
    }
}

pub(super) struct Shared {
    pub line: Line,
    pub patience: Duration,
    runtime: Handle,
    /// Makes marks and nudges of this registry unlike those of any other.
    nonce: String,
    writes: AtomicU64,
    turns: Vec<Mutex<()>>,
    nudges: watch::Sender<u64>,
}

impl NatsRegistry {
    /// Connects and opens the bucket, which is created with so many replicas if it is not there.
    /// Requests run on the runtime of the caller.
    ///
    /// # Errors
    /// When no server answers, or the bucket is set in a way that could lose entries, with what to do.
    pub async fn connect(
        settings: &NatsSettings,
        replicas: usize,
    ) -> Result<NatsRegistry, OpenError> {
        let line = Line::connect(settings, "meterr registry").await?;
        let wrong = |found: &_| bucket::wrong(found, replicas);
        let create = bucket::config(replicas);
        open_stream(&context(line.client()), REGISTRY_STREAM, Some(&create), wrong).await?;
        let shared = Arc::new(Shared {
            line,
            patience: PATIENCE,
            runtime: Handle::current(),
            nonce: nonce(),
            writes: AtomicU64::new(0),
            turns: (0..TURNS).map(|_| Mutex::new(())).collect(),
            nudges: watch::Sender::new(0),
        });
        let (heard, listens) = tokio::sync::oneshot::channel();
        let listening = tokio::spawn(listen(shared.clone(), heard)).abort_handle();
        let listening = Arc::new(Listening(listening));
        // Nudges are best effort; without them the registry is only slower to notice.
        let _ = timeout(PATIENCE, listens).await;
        Ok(NatsRegistry { shared, _listening: listening })
    }

    /// Connections made so far, and whether there is one now.
    pub fn connection(&self) -> (u64, bool) {
        (self.shared.line.connects(), self.shared.line.connected())
    }

    /// Runs on the runtime, so that callers may wait with any executor, and one that goes away does
    /// not cut a write short.
    fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, RegistryError>> + Send + 'static,
    ) -> BoxFuture<'static, Result<T, RegistryError>> {
        let task = self.shared.runtime.spawn(work);
        Box::pin(async move {
            task.await.unwrap_or_else(|error| Err(RegistryError::Unavailable(error.to_string())))
        })
    }
}

/// Counts nudges of others. Ends with the registry; a client that died is replaced here.
async fn listen(shared: Arc<Shared>, heard: tokio::sync::oneshot::Sender<()>) {
    let mut heard = Some(heard);
    let mut wait = BackOff::new();
    loop {
        let client = shared.line.client();
        if let Ok(mut nudges) = client.subscribe(CLUSTER_CHANGED).await {
            if echoes(&client, PATIENCE).await {
                wait = BackOff::new();
                heard.take().map(|heard| heard.send(()));
            }
            while let Some(nudge) = nudges.next().await {
                if nudge.payload != shared.nonce.as_bytes() {
                    shared.nudges.send_modify(|count| *count = count.wrapping_add(1));
                }
            }
        }
        // Only a dead client ends a subscription. What was nudged meanwhile is not known.
        shared.line.revive().await;
        shared.nudges.send_modify(|count| *count = count.wrapping_add(1));
        wait.wait().await;
    }
}

impl Shared {
    /// A request with the time of one attempt, never beyond `until`. Nothing is sent while there is no
    /// connection: it would go out whenever that is back.
    pub(super) async fn ask(
        self: &Arc<Self>,
        subject: String,
        headers: HeaderMap,
        payload: Bytes,
        until: Instant,
    ) -> Result<Bytes, String> {
        if !self.line.connected() {
            return Err(super::asking::AWAY.to_owned());
        }
        let left = until.saturating_duration_since(Instant::now()).min(ATTEMPT);
        let request = Request::new().headers(headers).payload(payload).timeout(Some(left));
        // Where commands wait for a connection there may be no place for more.
        let answer = timeout(left, self.line.client().send_request(subject, request)).await;
        let why = match answer {
            Ok(Ok(message)) => return Ok(message.payload),
            Ok(Err(error)) if error.kind() == RequestErrorKind::TimedOut => told(&error),
            Ok(Err(error)) => return Err(told(&error)),
            Err(_) => "no answer in time".to_owned(),
        };
        if left == ATTEMPT {
            let shared = self.clone();
            self.runtime.spawn(async move { shared.line.probe().await });
        }
        Err(why)
    }

    async fn publish(
        self: &Arc<Self>,
        key: &str,
        headers: &HeaderMap,
        value: &Bytes,
        at: u64,
        until: Instant,
    ) -> Result<u64, String> {
        #[derive(serde::Deserialize)]
        struct Ack {
            #[serde(default)]
            seq: u64,
            error: Option<serde_json::Value>,
        }
        let mut headers = headers.clone();
        headers.insert("Nats-Expected-Last-Subject-Sequence", at.to_string());
        headers.insert("Nats-Expected-Stream", REGISTRY_STREAM);
        let answer = self.ask(format!("{REGISTRY}{key}"), headers, value.clone(), until).await?;
        let ack: Ack = serde_json::from_slice(&answer).map_err(|error| error.to_string())?;
        match ack.error {
            None if ack.seq > 0 => Ok(ack.seq),
            None => Err("the answer is no acknowledgement".to_owned()),
            Some(error) => Err(error["description"].as_str().unwrap_or("refused").to_owned()),
        }
    }

    /// Looks at what stands and decides, trying until somebody says something of use.
    async fn look(
        self: &Arc<Self>,
        key: &str,
        expected: u64,
        wrote: &Wrote,
        until: Instant,
    ) -> Result<Verdict, String> {
        let which = serde_json::json!({ "last_by_subj": format!("{REGISTRY}{key}") });
        let standing = self.of_leader(&which, until).await?.map(Standing::of);
        let older = standing.as_ref().is_none_or(|standing| standing.revision < expected);
        let head = if older && expected > 0 { self.head(until).await? } else { 0 };
        Ok(verdict(standing.as_ref(), head, expected, wrote))
    }

    /// Writes a value, or removes the key, if it is at the revision expected.
    async fn change(
        self: &Arc<Self>,
        key: String,
        value: Option<Bytes>,
        expected: u64,
    ) -> Result<u64, RegistryError> {
        let until = Instant::now() + self.patience;
        if let Some(problem) = strange(&key) {
            return Err(RegistryError::Unavailable(problem));
        }
        if let Some(len) = value.as_ref().map(Bytes::len).filter(|len| *len > VALUE_LEN_MAX) {
            return Err(RegistryError::Unavailable(format!(
                "the value of {key:?} has {len} bytes; at most {VALUE_LEN_MAX}"
            )));
        }
        let n = self.writes.fetch_add(1, Ordering::Relaxed);
        let mark = format!("{}-{n}", self.nonce);
        let mut headers = HeaderMap::new();
        headers.insert(MARK, mark.as_str());
        if value.is_none() {
            headers.insert(OPERATION, "DEL");
        }
        let wrote = Wrote { value, mark };
        let value = wrote.value.clone().unwrap_or_default();
        let unavailable = |why: &str| RegistryError::Unavailable(format!("writing {key:?}: {why}"));
        let place = crc32c::crc32c(key.as_bytes()) as usize % TURNS;
        let turn = timeout_at(until, self.turns[place].lock()).await;
        let _turn = turn.map_err(|_| unavailable("writes to the same key before it hang"))?;
        let mut at = expected;
        let mut wait = BackOff::new();
        loop {
            let mut why = match self.publish(&key, &headers, &value, at, until).await {
                Ok(revision) => return Ok(revision),
                Err(why) => why,
            };
            loop {
                if Instant::now() >= until {
                    return Err(unavailable(&why));
                }
                match self.look(&key, expected, &wrote, until).await {
                    Ok(Verdict::Landed(revision)) => return Ok(revision),
                    Ok(Verdict::Conflict) => return Err(RegistryError::Conflict { key, expected }),
                    Ok(Verdict::Again(sequence)) if sequence != at => {
                        at = sequence;
                        break;
                    }
                    Ok(Verdict::Again(_)) => {
                        wait.wait().await;
                        break;
                    }
                    Ok(Verdict::Behind) => why = "the server that answers is behind".to_owned(),
                    Err(error) => why = error,
                }
                wait.wait().await;
            }
            tracing::debug!(key, why, "writing it again");
        }
    }
}

impl Registry for NatsRegistry {
    fn read(&self) -> BoxFuture<'static, Result<Vec<Entry>, RegistryError>> {
        let shared = self.shared.clone();
        self.run(async move { shared.read().await.map_err(RegistryError::Unavailable) })
    }

    fn write(
        &self,
        key: String,
        value: Bytes,
        expected: u64,
    ) -> BoxFuture<'static, Result<u64, RegistryError>> {
        let shared = self.shared.clone();
        self.run(async move { shared.change(key, Some(value), expected).await })
    }

    fn remove(&self, key: String, expected: u64) -> BoxFuture<'static, Result<(), RegistryError>> {
        let shared = self.shared.clone();
        self.run(async move { shared.change(key, None, expected).await.map(drop) })
    }

    fn nudge(&self) -> BoxFuture<'static, ()> {
        let shared = self.shared.clone();
        Box::pin(async move {
            if shared.line.connected() {
                let whose = Bytes::from(shared.nonce.clone());
                let client = shared.line.client();
                let sent = timeout(ATTEMPT, client.publish(CLUSTER_CHANGED, whose)).await;
                tracing::trace!(?sent, "nudged");
            }
        })
    }

    fn nudged(&self) -> BoxFuture<'static, ()> {
        // From the call on, not from the first poll.
        let mut nudges = self.shared.nudges.subscribe();
        let shared = self.shared.clone();
        Box::pin(async move {
            // The sender lives as long as `shared`.
            let _ = nudges.changed().await;
            drop(shared);
        })
    }
}
