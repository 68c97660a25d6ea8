//! The life of one message: attempt, decision, wait, until it is acknowledged, refused or out of time.

use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::client::{Request, RequestErrorKind};
use async_nats::connection::State;
use async_nats::header::{NATS_EXPECTED_STREAM, NATS_MESSAGE_ID};
use async_nats::jetstream::{self, Context};
use async_nats::{Client, HeaderMap, Subject};
use meterr_operators::ids::ShardId;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, oneshot, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::decision::{self, Acked, Failure, WhatNow, ack_wait, back_off, read_answer, what_now};
use super::hearing::Heard;
use super::{NotSent, ProducerSettings, shards};
use crate::log::Message;
use crate::nats::log::nonce;
use crate::nats::record::to_headers;
use crate::nats::subjects;

/// A stream must be found missing for so long, twice, before it is believed: right after a start a
/// server may not know all of them.
const MISSING_FOR: Duration = Duration::from_secs(2);
/// How often the state of a lost connection is looked at, beside hearing of it.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

#[derive(Default)]
pub(super) struct Counters {
    pub sent: AtomicU64,
    pub acked: AtomicU64,
    pub retried: AtomicU64,
    pub duplicates: AtomicU64,
    pub failed: AtomicU64,
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Streams as listed at some time, or why they could not be.
type Listed = Option<(Instant, Result<Vec<ShardId>, String>)>;

/// What all messages of a producer share.
pub(super) struct Shared {
    pub client: Client,
    pub context: Context,
    pub settings: ProducerSettings,
    heard: watch::Receiver<Heard>,
    /// When everything must be through.
    pub finish: watch::Sender<Option<Instant>>,
    nonce: String,
    next: AtomicU64,
    pub counters: Counters,
    /// What stands in the way at present.
    pub trouble: Mutex<Option<String>>,
    /// Streams as last listed.
    listed: tokio::sync::Mutex<Listed>,
    random: RandomState,
}

type Permits = (Option<OwnedSemaphorePermit>, Option<OwnedSemaphorePermit>);

/// Sends a message until it is acknowledged, refused for good, or time is up.
pub(super) async fn deliver(
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
    pub fn new(
        client: Client,
        settings: ProducerSettings,
        heard: watch::Receiver<Heard>,
    ) -> Shared {
        Shared {
            context: jetstream::new(client.clone()),
            client,
            settings,
            heard,
            finish: watch::Sender::new(None),
            nonce: nonce(),
            next: AtomicU64::new(0),
            counters: Counters::default(),
            trouble: Mutex::new(None),
            listed: tokio::sync::Mutex::new(None),
            random: RandomState::new(),
        }
    }

    async fn delivered(&self, shard: ShardId, message: Message) -> Result<Acked, NotSent> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let id = format!("{}-{number}", self.nonce);
        let outgoing = match Outgoing::new(&message, shard, &id) {
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
                found = Failure::Missing(subjects::usage_stream(shard));
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
                    || heard.denied_since(&outgoing.subjects, denials)
            }) => {
                let Ok(now) = changed else { return Err(Failure::Lost) };
                return Err(match &now.deaf {
                    Some(why) => Failure::Denied(why.clone()),
                    None if now.denied_since(&outgoing.subjects, denials) => {
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
            *self.trouble.lock() = Some(Failure::Away.to_string());
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
    /// Its subject, and what a server's mapping makes of it: permissions may name either.
    subjects: [String; 2],
    headers: HeaderMap,
}

impl<'a> Outgoing<'a> {
    fn new(message: &'a Message, shard: ShardId, id: &str) -> Result<Outgoing<'a>, Failure> {
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
        headers.insert(NATS_EXPECTED_STREAM, subjects::usage_stream(shard));
        let mapped = match message.subject.strip_prefix("usage.") {
            Some(org) if !org.contains('.') => subjects::usage(shard, org),
            _ => message.subject.clone(),
        };
        let subjects = [message.subject.clone(), mapped];
        Ok(Outgoing { message, subject, subjects, headers })
    }
}
