//! Appends and commits of a stream.
//!
//! An acknowledgement that did not come says nothing: appends are repeated under the same message id,
//! and commits are read back before they are repeated.

use std::sync::atomic::Ordering;

use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use tokio::time::Instant;

use super::log::{BackOff, Counters, PATIENCE, Shared, unavailable};
use super::record::to_headers;
use crate::log::{Appended, LogError, LogResult, Message, system_clock};

/// Room for subject, headers and framing beside a payload.
const OVERHEAD_BYTES: usize = 8 * 1024;

impl Shared {
    /// Publishes a message until it is acknowledged; `id` keeps repetitions from being stored twice.
    async fn append_one(&self, message: &Message, id: &str) -> LogResult<u64> {
        let max = self.connections.output.max_payload();
        let bytes = message.bytes();
        if bytes > max {
            return Err(LogError::TooLarge { bytes, max });
        }
        let until = Instant::now() + PATIENCE;
        let mut wait = BackOff::new();
        loop {
            let publish = PublishMessage::build()
                .payload(message.payload.clone())
                .headers(to_headers(message))
                .message_id(id)
                .expected_stream(self.stream_name());
            let acknowledged =
                async { self.context.send_publish(message.subject.clone(), publish).await?.await };
            let error = match acknowledged.await {
                Ok(ack) => return Ok(ack.sequence),
                Err(error) => error,
            };
            if error.kind() == PublishErrorKind::MaxPayloadExceeded {
                return Err(LogError::TooLarge { bytes, max });
            }
            if Instant::now() >= until {
                return Err(unavailable(self.stream_name(), "no acknowledgement", &told(&error)));
            }
            Counters::count(&self.connections.counters.retries);
            tracing::debug!(stream = self.stream_name(), error = told(&error), "sending it again");
            wait.wait().await;
        }
    }

    pub async fn append(&self, messages: Vec<Message>) -> LogResult<Appended> {
        let (mut first, mut last) = (0, 0);
        for message in &messages {
            let n = self.next_id.fetch_add(1, Ordering::Relaxed);
            last = self.append_one(message, &format!("{}-{n}", self.nonce)).await?;
            if first == 0 {
                first = last;
            }
        }
        let time = system_clock()();
        self.raise(last, Some(time));
        Ok(Appended { first, last, time })
    }

    /// Publishes messages each of which must follow directly on the one before, the first on `head`.
    pub async fn append_at(&self, messages: Vec<Message>, head: u64) -> LogResult<Appended> {
        let mut at = head;
        let until = Instant::now() + PATIENCE;
        let mut wait = BackOff::new();
        let first = head + 1;
        let mut messages = messages.iter();
        let mut next = messages.next();
        while let Some(message) = next {
            let publish = PublishMessage::build()
                .payload(message.payload.clone())
                .headers(to_headers(message))
                .expected_stream(self.stream_name())
                .expected_last_sequence(at);
            let acknowledged =
                async { self.context.send_publish(message.subject.clone(), publish).await?.await };
            match acknowledged.await {
                Ok(ack) => {
                    at = ack.sequence;
                    next = messages.next();
                }
                Err(error) => {
                    // Whether it is stored is seen in the log.
                    let info = self.info().await?;
                    let stands = info.state.last_sequence;
                    let ours = stands > at && {
                        let found = self.read_single(at + 1).await?;
                        found.is_some_and(|record| record.message == *message)
                    };
                    if ours {
                        at += 1;
                        next = messages.next();
                    } else if stands > at {
                        let stream = self.identity.stream.clone();
                        return Err(LogError::Conflict { stream, expected: at, actual: stands });
                    } else if Instant::now() >= until {
                        let why = told(&error);
                        return Err(unavailable(self.stream_name(), "no acknowledgement", &why));
                    } else {
                        Counters::count(&self.connections.counters.retries);
                        wait.wait().await;
                    }
                }
            }
        }
        let time = system_clock()();
        self.raise(at, Some(time));
        Ok(Appended { first, last: at, time })
    }

    /// Sends parts and commit record in one go: the record only stands if the parts stand right before
    /// it and the last commit is the one expected. Nothing is waited for in between.
    async fn try_commit(
        &self,
        parts: &[Message],
        commit: &Message,
        previous: u64,
        head: u64,
    ) -> Result<u64, String> {
        let mut acks = Vec::with_capacity(parts.len());
        for part in parts {
            let publish = PublishMessage::build()
                .payload(part.payload.clone())
                .expected_stream(self.stream_name());
            let sent = self.context.send_publish(part.subject.clone(), publish).await;
            acks.push(sent.map_err(|error| told(&error))?);
        }
        let publish = PublishMessage::build()
            .payload(commit.payload.clone())
            .expected_stream(self.stream_name())
            .expected_last_sequence(head + parts.len() as u64)
            .expected_last_subject_sequence(previous);
        let record = self.context.send_publish(commit.subject.clone(), publish).await;
        let record = record.map_err(|error| told(&error))?;
        for ack in acks {
            ack.await.map_err(|error| told(&error))?;
        }
        match record.await {
            Ok(ack) => Ok(ack.sequence),
            Err(error) => Err(told(&error)),
        }
    }

    /// Commits, however long it takes, unless another writer was faster.
    pub async fn commit(
        &self,
        parts: Vec<Message>,
        commit: Message,
        previous: u64,
    ) -> LogResult<Appended> {
        let max = self.connections.output.max_payload();
        let largest = parts.iter().chain([&commit]).map(|m| m.payload.len()).max().unwrap_or(0);
        if largest + OVERHEAD_BYTES > max {
            return Err(LogError::TooLarge { bytes: largest + OVERHEAD_BYTES, max });
        }
        let mut wait = BackOff::new();
        let mut told_of_trouble = false;
        loop {
            let head = self.state.lock().head;
            let error = match self.try_commit(&parts, &commit, previous, head).await {
                Ok(position) => return Ok(self.stands(&parts, position)),
                Err(error) => error,
            };
            // Whether it stands is only seen in the log.
            let found = loop {
                match self.last_commit(&commit.subject).await {
                    Ok(found) => break found,
                    Err(LogError::Unavailable { what, .. }) => {
                        tracing::debug!(stream = self.stream_name(), what, "commit not confirmed");
                    }
                    Err(error) => return Err(error),
                }
            };
            let actual = found.as_ref().map_or(0, |record| record.position);
            if let Some(record) = found.filter(|record| record.message.payload == commit.payload) {
                Counters::count(&self.connections.counters.landed);
                return Ok(self.stands(&parts, record.position));
            }
            if actual != previous {
                Counters::count(&self.connections.counters.conflicts);
                let stream = self.identity.stream.clone();
                return Err(LogError::Conflict { stream, expected: previous, actual });
            }
            Counters::count(&self.connections.counters.retries);
            if !std::mem::replace(&mut told_of_trouble, true) {
                tracing::warn!(
                    stream = self.stream_name(),
                    error,
                    "commit not taken yet; trying on"
                );
            }
            wait.wait().await;
            let info = self.info().await;
            match info {
                // Not raised but set: parts of a failed attempt may or may not stand.
                Ok(info) => self.state.lock().head = info.state.last_sequence,
                Err(LogError::Unavailable { .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn stands(&self, parts: &[Message], position: u64) -> Appended {
        let time = system_clock()();
        self.raise(position, Some(time));
        Appended { first: position - parts.len() as u64, last: position, time }
    }
}

/// An error with its cause, which holds the server's words.
pub(super) fn told(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    }
}
