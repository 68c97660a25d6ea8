//! Messages to usage streams, repeated until they are acknowledged.
//!
//! A producer keeps a window of messages that are not acknowledged yet; [`Producer::send`] waits while
//! it is full. Every message carries an id (`Nats-Msg-Id`) that stays the same at each repetition, so
//! that a stream stores it once within its duplicate window (2 min), and the name of the stream it
//! belongs to. A repetition that comes later may be stored twice; its events still count once, by their
//! own ids.
//!
//! Messages land in any order: one that is repeated comes later than those sent after it. Events do not
//! need order, since revisions carry their number.
//!
//! What may pass (no answer, no connection, no leader, busy, full) is tried again, for ever or up to
//! [`ProducerSettings::give_up_after`]; what stays (no permission, too large, another stream) is told.
//! `sending.rs` is the life of one message, `decision.rs` the rule, `hearing.rs` what the connection
//! says, `shards.rs` how many shards there are.
//!
//! Limits: [`ProducerSettings::window`] messages and [`ProducerSettings::window_bytes`] bytes, a task
//! each.

mod decision;
mod hearing;
mod sending;
mod shards;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context as TaskContext, Poll, ready};
use std::time::Duration;

use meterr_operators::ids::{Positions, ShardId};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::time::Instant;

use super::connection::{ConnectError, NatsSettings, connect_and_hear};
use crate::log::Message;

pub use decision::{Acked, Failure, WhatNow, ack_wait, back_off, read_answer, what_now};
use hearing::Heard;
use sending::{Counters, Shared, count, deliver};
pub use shards::{ShardsError, shards_of};

/// How a producer sends.
#[derive(Debug, Clone)]
pub struct ProducerSettings {
    /// Messages under way at once.
    pub window: usize,
    /// Bytes of payload under way at once; a larger message goes alone.
    pub window_bytes: usize,
    /// How long an acknowledgement is awaited before the message is sent again. Doubles with each
    /// silence, up to 30 s.
    pub ack_wait: Duration,
    /// How long a message is tried; `None`: for ever.
    pub give_up_after: Option<Duration>,
}

impl Default for ProducerSettings {
    fn default() -> ProducerSettings {
        ProducerSettings {
            window: 256,
            window_bytes: 32 * 1024 * 1024,
            ack_wait: Duration::from_secs(5),
            give_up_after: None,
        }
    }
}

/// What a producer has done so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Messages taken over.
    pub sent: u64,
    /// Messages acknowledged.
    pub acked: u64,
    /// Attempts beyond the first.
    pub retried: u64,
    /// Acknowledgements that said an earlier attempt had been stored.
    pub duplicates: u64,
    /// Messages given up.
    pub failed: u64,
}

/// A message that is not known to be durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotSent {
    /// Its subject.
    pub subject: String,
    /// What the last attempt ended in; `None` when there was none.
    pub failure: Option<Failure>,
    /// Whether sending it again leads nowhere; otherwise time was up.
    pub refused: bool,
    /// Whether it may be in the log all the same.
    pub maybe_stored: bool,
    /// Attempts made.
    pub attempts: u32,
}

impl std::fmt::Display for NotSent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = if self.refused { "was refused" } else { "was not acknowledged in time" };
        let s = if self.attempts == 1 { "" } else { "s" };
        write!(f, "a message to {:?} {what} ({} attempt{s}", self.subject, self.attempts)?;
        f.write_str(if self.maybe_stored { "; it may have been stored)" } else { ")" })
    }
}

impl std::error::Error for NotSent {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.failure.as_ref().map(|failure| failure as &(dyn std::error::Error + 'static))
    }
}

impl NotSent {
    /// Whether it failed because no server answered.
    pub fn silent(&self) -> bool {
        matches!(
            self.failure,
            None | Some(Failure::Silent | Failure::Lost | Failure::Away | Failure::NoStream)
        )
    }
}

/// The outcome of one message. Dropped, the message is sent all the same.
#[derive(Debug)]
pub struct Sent {
    outcome: oneshot::Receiver<Result<Acked, NotSent>>,
    subject: String,
}

impl Future for Sent {
    type Output = Result<Acked, NotSent>;

    fn poll(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<Self::Output> {
        let outcome = ready!(Pin::new(&mut self.outcome).poll(context));
        // Without an outcome the runtime has ended the task.
        Poll::Ready(outcome.unwrap_or_else(|_| {
            Err(NotSent {
                subject: self.subject.clone(),
                failure: None,
                refused: false,
                maybe_stored: true,
                attempts: 0,
            })
        }))
    }
}

/// Sends messages to usage streams.
#[derive(Clone)]
pub struct Producer {
    shared: Arc<Shared>,
    window: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
}

impl Producer {
    /// Connects, under a name that the server's list of connections shows.
    ///
    /// # Errors
    /// When there is no server to connect to.
    pub async fn connect(
        nats: &NatsSettings,
        name: &str,
        settings: ProducerSettings,
    ) -> Result<Producer, ConnectError> {
        let (hear, heard) = watch::channel(Heard::connected());
        let client = connect_and_hear(nats, name, move |event| {
            hear.send_if_modified(|heard| heard.hear(event));
        })
        .await?;
        let window_bytes = settings.window_bytes.clamp(1, Semaphore::MAX_PERMITS >> 1);
        Ok(Producer {
            window: Arc::new(Semaphore::new(settings.window.max(1))),
            bytes: Arc::new(Semaphore::new(window_bytes)),
            shared: Arc::new(Shared::new(
                client,
                ProducerSettings { window_bytes, ..settings },
                heard,
            )),
        })
    }

    /// Number of shards of the deployment.
    ///
    /// # Errors
    /// When there is no deployment on the server, or the server does not say.
    pub async fn shards(&self) -> Result<u16, ShardsError> {
        shards_of(&self.shared.context).await
    }

    /// Bytes the server takes in a message, headers included.
    pub fn message_bytes_max(&self) -> usize {
        self.shared.client.max_payload()
    }

    /// Takes a message over once the window has room for it. Its subject must be one of the shard's:
    /// `usage.<shard>.…`, or `usage.<org>` where the server maps it.
    pub async fn send(&self, shard: ShardId, message: Message) -> Sent {
        let len = message.payload.len().clamp(1, self.shared.settings.window_bytes);
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        // Neither semaphore is ever closed; without permits the window would only be wider.
        let permits = (
            self.window.clone().acquire_owned().await.ok(),
            self.bytes.clone().acquire_many_owned(len).await.ok(),
        );
        let (settle, outcome) = oneshot::channel();
        let subject = message.subject.clone();
        count(&self.shared.counters.sent);
        tokio::spawn(deliver(self.shared.clone(), shard, message, permits, settle));
        Sent { outcome, subject }
    }

    /// Whether the window has no room for a further message.
    pub fn full(&self) -> bool {
        self.window.available_permits() == 0 || self.bytes.available_permits() == 0
    }

    /// Gives up, from then on, what is not acknowledged within `patience`.
    pub fn finish_within(&self, patience: Duration) {
        self.shared.finish.send_replace(Some(Instant::now() + patience));
    }

    /// What has been done so far.
    pub fn counts(&self) -> Counts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { sent, acked, retried, duplicates, failed } = &self.shared.counters;
        Counts {
            sent: of(sent),
            acked: of(acked),
            retried: of(retried),
            duplicates: of(duplicates),
            failed: of(failed),
        }
    }

    /// What stands in the way at present: the last failure, until a message is acknowledged again.
    pub fn trouble(&self) -> Option<String> {
        self.shared.trouble.lock().clone()
    }
}

impl Acked {
    /// Raises positions to this one's: the token `<shard>:<position>` that reads wait for.
    pub fn raise(&self, positions: &mut Positions) {
        positions.raise(self.shard, self.position);
    }
}
