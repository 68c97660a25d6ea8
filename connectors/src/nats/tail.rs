//! Following a stream: a consumer that fetches ahead of one sequential reader, within bounds.
//!
//! The consumer is a hint, never the truth: it is made anew at the next position wanted after every
//! error, silence or reconnection, and what it delivers must be the very next position. Before it goes
//! on after a reconnection the stream itself is looked at: its identity, its length and the last record
//! taken must be the same, since a server can come back with an older state of its files, and the
//! positions from there on would be given out a second time.

use std::collections::VecDeque;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use async_nats::jetstream::consumer::pull::Config;
use async_nats::jetstream::consumer::{AckPolicy, DeliverPolicy};
use futures::StreamExt;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{MissedTickBehavior, interval};

use super::log::{BackOff, Shared};
use super::read::SINGLE_BYTES;
use super::record::from_consumer;
use crate::log::Record;

/// Bytes fetched ahead of the reader.
const AHEAD_BYTES: usize = 4 * 1024 * 1024;
/// Messages asked for at once.
const BATCH_MESSAGES: usize = 256;
/// Signs of life on a quiet consumer; two missing ones end it.
const HEARTBEAT: Duration = Duration::from_secs(1);
/// How long the server keeps a request for messages.
const EXPIRES: Duration = Duration::from_secs(10);
/// How long the server keeps a consumer nobody asks.
const INACTIVE: Duration = Duration::from_secs(30);
/// Time between looks at the stream itself.
const LOOK: Duration = Duration::from_secs(5);
/// Records read one by one after the one a consumer does not bring.
const BY_LEADER: u64 = 16;
/// Time between looks at the connection.
const TICK: Duration = Duration::from_millis(250);

/// What was fetched ahead. One reader takes from it.
#[derive(Default)]
pub(super) struct Tail {
    inner: Mutex<Inner>,
    room: Notify,
}

#[derive(Default)]
struct Inner {
    records: VecDeque<Record>,
    bytes: usize,
    /// Position of the next record to come; 0 before anybody reads.
    next: u64,
    /// Raised when the reader goes elsewhere: what an older consumer brings is dropped.
    generation: u64,
    task: Option<AbortHandle>,
    /// The last record that came, to be recognised after a reconnection.
    last: Option<Record>,
}

impl Inner {
    fn first(&self) -> u64 {
        self.records.front().map_or(self.next, |record| record.position)
    }
}

impl Tail {
    /// Takes records that follow directly from `from` on, if they are here and more than one record
    /// is wanted.
    pub fn take(&self, from: u64, bytes_max: usize) -> Option<Vec<Record>> {
        let mut inner = self.inner.lock();
        if bytes_max <= SINGLE_BYTES || inner.records.front()?.position != from {
            return None;
        }
        let mut taken = Vec::new();
        let mut bytes = 0;
        while let Some(record) = inner.records.front() {
            let more = record.message.bytes();
            if !taken.is_empty() && bytes + more > bytes_max {
                break;
            }
            bytes += more;
            taken.extend(inner.records.pop_front());
        }
        inner.bytes = inner.bytes.saturating_sub(bytes);
        drop(inner);
        self.room.notify_one();
        Some(taken)
    }

    /// Whether the reader at this position finds something.
    pub fn has(&self, position: u64) -> bool {
        self.inner.lock().records.front().is_some_and(|record| record.position == position)
    }

    /// Waits for room; false when the reader has gone elsewhere.
    async fn room(&self, generation: u64) -> bool {
        loop {
            {
                let inner = self.inner.lock();
                if inner.generation != generation {
                    return false;
                }
                if inner.bytes < AHEAD_BYTES {
                    return true;
                }
            }
            self.room.notified().await;
        }
    }
}

/// Why a consumer ended.
enum Ended {
    /// Nobody wants more, or the stream failed.
    Done,
    /// It is to be made anew.
    Again(String),
}

impl Shared {
    /// Begins to follow from a position, unless that is where the tail is already.
    pub fn follow_from(self: &Arc<Self>, from: u64) {
        let mut inner = self.tail.inner.lock();
        if inner.task.is_some() && inner.first() == from {
            return;
        }
        if let Some(task) = inner.task.take() {
            task.abort();
        }
        inner.generation += 1;
        inner.records.clear();
        inner.bytes = 0;
        inner.next = from;
        inner.last = None;
        let run = run(Arc::downgrade(self), inner.generation);
        inner.task = Some(self.connections.runtime.spawn(run).abort_handle());
    }

    /// Looks whether the stream is the one followed so far.
    async fn look(&self) -> Result<(), Ended> {
        let failed = |error: crate::log::LogError| match error {
            crate::log::LogError::Unavailable { what, .. } => Ended::Again(what),
            // It has been told.
            _ => Ended::Done,
        };
        self.refresh().await.map_err(failed)?;
        let Some(last) = self.tail.inner.lock().last.clone() else { return Ok(()) };
        let found = self.read_single(last.position).await.map_err(failed)?;
        // Not by headers: how odd ones are read may depend on the way they come.
        let same = |found: &Record| {
            let (a, b) = (&found.message, &last.message);
            (found.time, &a.subject, &a.payload) == (last.time, &b.subject, &b.payload)
        };
        if !found.as_ref().is_some_and(same) {
            self.fail(format!(
                "the record at {} is not the one read before: another state of the stream was restored \
                 underneath",
                last.position
            ));
            return Err(Ended::Done);
        }
        Ok(())
    }

    async fn consume(self: &Arc<Self>, generation: u64) -> Ended {
        let from = {
            let inner = self.tail.inner.lock();
            if inner.generation != generation {
                return Ended::Done;
            }
            inner.next
        };
        let connects = || self.connections.input.connects();
        let connected = connects();
        if let Err(ended) = self.look().await {
            return ended;
        }
        let again = |error: &dyn std::fmt::Display| Ended::Again(error.to_string());
        let config = Config {
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: from },
            ack_policy: AckPolicy::None,
            inactive_threshold: INACTIVE,
            num_replicas: 1,
            memory_storage: true,
            ..Config::default()
        };
        let context = self.connections.input();
        let consumer = match context.create_consumer_on_stream(config, self.stream_name()).await {
            Ok(consumer) => consumer,
            Err(error) => return again(&error),
        };
        let bytes_max = AHEAD_BYTES.max(2 * self.connections.output.max_payload());
        let messages = consumer
            .stream()
            .max_messages_per_batch(BATCH_MESSAGES)
            .max_bytes_per_batch(bytes_max)
            .expires(EXPIRES)
            .heartbeat(HEARTBEAT)
            .messages();
        let mut messages = match messages.await {
            Ok(messages) => messages,
            Err(error) => return again(&error),
        };
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut looked = tokio::time::Instant::now();
        loop {
            let message = tokio::select! {
                message = messages.next() => Some(message),
                _ = tick.tick() => None,
            };
            if connects() != connected {
                return Ended::Again("the connection was lost in between".to_owned());
            }
            let message = match message {
                None => {
                    if looked.elapsed() >= LOOK {
                        looked = tokio::time::Instant::now();
                        if let Err(ended) = self.look().await {
                            return ended;
                        }
                    }
                    continue;
                }
                Some(None) => return Ended::Again("the consumer ended".to_owned()),
                Some(Some(Err(error))) => return again(&error),
                Some(Some(Ok(message))) => message,
            };
            let Some((record, pending)) = from_consumer(message, self.copied_to) else {
                return Ended::Again("a message without a position".to_owned());
            };
            if let Err(ended) = self.take_in(record, pending, generation).await {
                return ended;
            }
        }
    }

    /// Takes in what a consumer does not bring: a producer can forge headers that end the connection on
    /// delivery, or that the client takes for words of the server. The leader gives such a record in
    /// another form.
    async fn take_in_by_leader(&self, to: u64, generation: u64) -> Result<(), Ended> {
        loop {
            let next = {
                let inner = self.tail.inner.lock();
                if inner.generation != generation {
                    return Err(Ended::Done);
                }
                inner.next
            };
            if next > to {
                return Ok(());
            }
            match self.read_single(next).await {
                Ok(Some(record)) => Box::pin(self.take_in(record, 0, generation)).await?,
                Ok(None) if next <= self.state.lock().head => {
                    self.fail(format!("record {next} is missing in the stream"));
                    return Err(Ended::Done);
                }
                Ok(None) => return Ok(()),
                Err(error) => return Err(Ended::Again(error.to_string())),
            }
        }
    }

    async fn take_in(&self, record: Record, pending: u64, generation: u64) -> Result<(), Ended> {
        let next = self.tail.inner.lock().next;
        if record.position > next {
            self.take_in_by_leader(record.position - 1, generation).await?;
        }
        if !self.tail.room(generation).await {
            return Err(Ended::Done);
        }
        let mut inner = self.tail.inner.lock();
        if inner.generation != generation {
            return Err(Ended::Done);
        }
        if record.position < inner.next {
            return Ok(());
        }
        if record.position > inner.next {
            return Err(Ended::Again("records are missing".to_owned()));
        }
        let (position, time) = (record.position, record.time);
        inner.next = position + 1;
        inner.bytes += record.message.bytes();
        inner.last = Some(record.clone());
        inner.records.push_back(record);
        drop(inner);
        self.raise(position, Some(time));
        if pending > 0 {
            self.raise(position + pending, None);
        }
        Ok(())
    }
}

async fn run(shared: Weak<Shared>, generation: u64) {
    let mut wait = BackOff::new();
    let (mut position, mut fruitless) = (0, 0);
    loop {
        let Some(shared) = shared.upgrade() else { return };
        let Ended::Again(why) = shared.consume(generation).await else { return };
        let now = shared.tail.inner.lock().next;
        if std::mem::replace(&mut position, now) != now {
            (wait, fruitless) = (BackOff::new(), 0);
        }
        fruitless += 1;
        shared.connections.input.revive().await;
        if fruitless >= 2 {
            // Perhaps it is the record itself. Some more, since one who forges one forges many.
            let to = now.saturating_add(BY_LEADER);
            if let Err(Ended::Done) = shared.take_in_by_leader(to, generation).await {
                return;
            }
        }
        shared.connections.counters.consumers.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(stream = shared.stream_name(), why, "following anew");
        drop(shared);
        wait.wait().await;
    }
}
