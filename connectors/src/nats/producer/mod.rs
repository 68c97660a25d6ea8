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
//! `decision.rs` holds the rule, `hearing.rs` what the connection says, `shards.rs` how many shards
//! there are.
//!
//! Limits: [`ProducerSettings::window`] messages and [`ProducerSettings::window_bytes`] bytes, a task
//! each.

mod decision;
mod hearing;
mod shards;

use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context as TaskContext, Poll, ready};
use std::time::Duration;

use async_nats::client::{Request, RequestErrorKind};
use async_nats::connection::State;
use async_nats::header::{NATS_EXPECTED_STREAM, NATS_MESSAGE_ID};
use async_nats::jetstream::{self, Context};
use async_nats::{Client, HeaderMap, Subject};
use meterr_operators::ids::{Positions, ShardId};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::connection::{ConnectError, NatsSettings, connect_and_hear};
use super::log::nonce;
use super::record::to_headers;
use super::subjects;
use crate::log::Message;

pub use decision::{Acked, Failure, WhatNow, ack_wait, back_off, read_answer, what_now};
use hearing::Heard;
pub use shards::{ShardsError, shards_of};

/// A stream must be found missing for so long, twice, before it is believed: right after a start a
/// server may not know all of them.
const MISSING_FOR: Duration = Duration::from_secs(2);
/// How often the state of a lost connection is looked at, beside hearing of it.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

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

#[derive(Default)]
struct Counters {
    sent: AtomicU64,
    acked: AtomicU64,
    retried: AtomicU64,
    duplicates: AtomicU64,
    failed: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
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

struct Shared {
    client: Client,
    context: Context,
    settings: ProducerSettings,
    heard: watch::Receiver<Heard>,
    /// When everything must be through.
    finish: watch::Sender<Option<Instant>>,
    nonce: String,
    next: AtomicU64,
    counters: Counters,
    /// What stands in the way at present.
    trouble: Mutex<Option<String>>,
    /// Streams as last listed.
    listed: tokio::sync::Mutex<Option<(Instant, Result<Vec<ShardId>, String>)>>,
    random: RandomState,
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
            shared: Arc::new(Shared {
                context: jetstream::new(client.clone()),
                client,
                settings: ProducerSettings { window_bytes, ..settings },
                heard,
                finish: watch::Sender::new(None),
                nonce: nonce(),
                next: AtomicU64::new(0),
                counters: Counters::default(),
                trouble: Mutex::new(None),
                listed: tokio::sync::Mutex::new(None),
                random: RandomState::new(),
            }),
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

type Permits = (Option<OwnedSemaphorePermit>, Option<OwnedSemaphorePermit>);

/// Sends a message until it is acknowledged, refused for good, or time is up.
async fn deliver(
    shared: Arc<Shared>,
    shard: ShardId,
    message: Message,
    permits: Permits,
    settle: oneshot::Sender<Result<Acked, NotSent>>,
) {
    let outcome = shared.delivered(shard, message).await;
    drop(permits);
    // Nobody may want to know.
    drop(settle.send(outcome));
}

impl Shared {
    async fn delivered(&self, shard: ShardId, message: Message) -> Result<Acked, NotSent> {
        let stream = subjects::usage_stream(shard);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let id = format!("{}-{number}", self.nonce);
        let outgoing = match Outgoing::new(&message, &stream, &id) {
            Ok(outgoing) => outgoing,
            Err(failure) => {
                count(&self.counters.failed);
                return Err(NotSent {
                    subject: message.subject,
                    failure: Some(failure),
                    refused: true,
                    maybe_stored: false,
                    attempts: 0,
                });
            }
        };
        let until = self.settings.give_up_after.map(|after| Instant::now() + after);
        let (mut attempts, mut silences, mut maybe_stored) = (0, 0, false);
        let mut missing_since: Option<Instant> = None;
        let (failure, refused) = loop {
            if attempts > 0 {
                count(&self.counters.retried);
            }
            attempts += 1;
            let mut found = match self.attempt(shard, &outgoing, silences, until).await {
                Ok(acked) => {
                    count(&self.counters.acked);
                    if acked.duplicate {
                        count(&self.counters.duplicates);
                    }
                    *self.trouble.lock() = None;
                    return Ok(acked);
                }
                Err(failure) => failure,
            };
            silences = if found == Failure::Silent { silences + 1 } else { 0 };
            if found == Failure::NoStream && self.missing(shard, &mut missing_since).await {
                found = Failure::Missing(stream.clone());
            }
            let what = what_now(&found);
            maybe_stored |= what == WhatNow::Ambiguous;
            tracing::debug!(subject = message.subject, error = %found, attempts, "not acknowledged");
            *self.trouble.lock() = Some(found.to_string());
            let wait = back_off(attempts, self.drawn(number, attempts));
            if what == WhatNow::GiveUp {
                break (found, true);
            }
            tokio::select! {
                biased;
                () = self.expired(until) => break (found, false),
                () = sleep(wait) => {}
            }
        };
        count(&self.counters.failed);
        let subject = message.subject;
        Err(NotSent { subject, failure: Some(failure), refused, maybe_stored, attempts })
    }

    /// Sends a message once and waits for the answer.
    async fn attempt(
        &self,
        shard: ShardId,
        outgoing: &Outgoing<'_>,
        silences: u32,
        until: Option<Instant>,
    ) -> Result<Acked, Failure> {
        let mut heard = self.heard.clone();
        self.connected(&mut heard, until).await?;
        let (losses, denials) = {
            let now = heard.borrow_and_update();
            if let Some(why) = &now.deaf {
                return Err(Failure::Denied(why.clone()));
            }
            (now.losses, now.denials)
        };
        let wait = ack_wait(self.settings.ack_wait, silences);
        let request = Request::new()
            .headers(outgoing.headers.clone())
            .payload(outgoing.message.payload.clone())
            .timeout(Some(wait));
        let answer = tokio::select! {
            biased;
            answer = self.client.send_request(outgoing.subject.clone(), request) => answer,
            changed = heard.wait_for(|heard| {
                heard.losses != losses
                    || heard.deaf.is_some()
                    || heard.denied_since(&outgoing.message.subject, denials)
            }) => {
                let Ok(now) = changed else { return Err(Failure::Lost) };
                return Err(match &now.deaf {
                    Some(why) => Failure::Denied(why.clone()),
                    None if now.denied_since(&outgoing.message.subject, denials) => {
                        let subject = &outgoing.message.subject;
                        Failure::Denied(format!("this user may not publish to {subject:?}"))
                    }
                    None => Failure::Lost,
                });
            }
            () = self.expired(until) => return Err(Failure::Silent),
        };
        match answer {
            Ok(answer) => read_answer(shard, &answer.payload),
            Err(error) => Err(match error.kind() {
                RequestErrorKind::NoResponders => Failure::NoStream,
                RequestErrorKind::TimedOut => Failure::Silent,
                RequestErrorKind::MaxPayloadExceeded => Failure::TooLarge(decision::short(
                    &std::error::Error::source(&error)
                        .map_or_else(|| error.to_string(), ToString::to_string),
                )),
                RequestErrorKind::InvalidSubject => Failure::Unsendable(error.to_string()),
                RequestErrorKind::Other => Failure::Lost,
            }),
        }
    }

    /// Waits until there is a connection: what is sent without one would pile up in the client.
    async fn connected(
        &self,
        heard: &mut watch::Receiver<Heard>,
        until: Option<Instant>,
    ) -> Result<(), Failure> {
        loop {
            let there = heard.borrow_and_update().connected;
            if there || self.client.connection_state() == State::Connected {
                return Ok(());
            }
            tokio::select! {
                () = self.expired(until) => return Err(Failure::Away),
                changed = heard.changed() => if changed.is_err() {
                    return Err(Failure::Away);
                },
                // The client drops events that nobody takes in time.
                () = sleep(LOOK_AGAIN) => {}
            }
        }
    }

    /// Whether the shard's stream is known to be missing for a while, although there are others.
    async fn missing(&self, shard: ShardId, since: &mut Option<Instant>) -> bool {
        let mut listed = self.listed.lock().await;
        let fresh = |at: &Instant| at.elapsed() < MISSING_FOR / 2;
        if !listed.as_ref().is_some_and(|(at, _)| fresh(at)) {
            let shards = timeout(MISSING_FOR, shards::usage_shards(&self.context)).await;
            let shards = shards.unwrap_or_else(|_| Err("no answer".to_owned()));
            *listed = Some((Instant::now(), shards));
        }
        let there = match &*listed {
            Some((_, Ok(shards))) => shards.is_empty() || shards.contains(&shard),
            _ => true,
        };
        if there {
            *since = None;
            return false;
        }
        since.get_or_insert_with(Instant::now).elapsed() >= MISSING_FOR
    }

    /// Resolves when a message's time is up, or the producer's.
    async fn expired(&self, until: Option<Instant>) {
        let mut finish = self.finish.subscribe();
        loop {
            let finish_at = *finish.borrow_and_update();
            let at = match (until, finish_at) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
            let passed = async {
                match at {
                    Some(at) => sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = passed => return,
                changed = finish.changed() => {
                    if changed.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Between 0 and 1.
    fn drawn(&self, number: u64, attempt: u32) -> f64 {
        self.random.hash_one((number, attempt)) as f64 / u64::MAX as f64
    }
}

/// A message as it is sent, every time the same.
struct Outgoing<'a> {
    message: &'a Message,
    subject: Subject,
    headers: HeaderMap,
}

impl<'a> Outgoing<'a> {
    fn new(message: &'a Message, stream: &str, id: &str) -> Result<Outgoing<'a>, Failure> {
        let subject = Subject::from(message.subject.as_str());
        if !subject.is_valid() || message.subject.contains(['*', '>']) {
            return Err(Failure::Unsendable(format!(
                "{:?} is no subject to publish to",
                decision::short(&message.subject)
            )));
        }
        for (name, value) in &message.headers {
            let named = !name.is_empty() && name.bytes().all(|b| b.is_ascii_graphic() && b != b':');
            if !named || value.contains(['\r', '\n']) {
                return Err(Failure::Unsendable(format!(
                    "{:?} with {:?} is no header",
                    decision::short(name),
                    decision::short(value)
                )));
            }
        }
        let mut headers = to_headers(message);
        headers.insert(NATS_MESSAGE_ID, id);
        headers.insert(NATS_EXPECTED_STREAM, stream);
        Ok(Outgoing { message, subject, headers })
    }
}

impl Acked {
    /// Raises positions to this one's: the token `<shard>:<position>` that reads wait for.
    pub fn raise(&self, positions: &mut Positions) {
        positions.raise(self.shard, self.position);
    }
}
