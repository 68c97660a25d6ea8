//! Reads of a stream outside of its tail: batches from any replica, single records from the leader.

use std::time::Duration;

use async_nats::jetstream;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::RawMessage;
use bytes::Bytes;
use futures::StreamExt;
use serde_json::json;
use tokio::time::{Instant, timeout_at};

use super::log::{ANSWER, BackOff, Counters, PATIENCE, Shared, unavailable};
use super::record::{from_raw, from_stream};
use crate::log::{LogResult, Record};

/// Messages of one direct read; the server's own limit is 1,000.
const BATCH_MESSAGES: u64 = 1_000;
/// Reads up to this size are single records, for which no batch is asked.
pub(super) const SINGLE_BYTES: usize = 64 * 1024;

/// What a leader answers.
#[derive(serde::Deserialize)]
struct Stored {
    message: RawMessage,
}

impl Shared {
    /// The newest record of a subject, by the stream's leader.
    pub async fn last_commit(&self, subject: &str) -> LogResult<Option<Record>> {
        self.of_leader(&json!({ "last_by_subj": subject })).await
    }

    /// One record, by the stream's leader.
    pub async fn read_single(&self, position: u64) -> LogResult<Option<Record>> {
        self.of_leader(&json!({ "seq": position })).await
    }

    async fn of_leader(&self, which: &serde_json::Value) -> LogResult<Option<Record>> {
        let until = Instant::now() + PATIENCE;
        let mut wait = BackOff::new();
        loop {
            let subject = format!("STREAM.MSG.GET.{}", self.stream_name());
            let answer = self.context.request::<_, _, Response<Stored>>(subject, which).await;
            let error = match answer {
                Ok(Response::Ok(Stored { message })) => match from_raw(message, self.copied_to) {
                    Ok(record) => return Ok(Some(record)),
                    Err(error) => error,
                },
                Ok(Response::Err { error })
                    if error.error_code() == jetstream::ErrorCode::NO_MESSAGE_FOUND =>
                {
                    return Ok(None);
                }
                Ok(Response::Err { error }) => error.to_string(),
                Err(error) => error.to_string(),
            };
            if Instant::now() >= until {
                return Err(unavailable(self.stream_name(), "cannot read it", &error));
            }
            wait.wait().await;
        }
    }

    /// Reads records from `from` on with one request to any replica. Empty also when that replica has
    /// none yet, or what stands there cannot come this way (see [`Line`](super::connection::Line)).
    async fn read_batch(&self, from: u64, bytes_max: usize) -> Vec<Record> {
        let mut wait = BackOff::new();
        for attempt in 0..2 {
            match self.try_batch(from, bytes_max).await {
                Ok(records) => return records,
                Err(why) => tracing::debug!(stream = self.stream_name(), why, attempt, "no batch"),
            }
            self.connections.input.revive().await;
            wait.wait().await;
        }
        Vec::new()
    }

    async fn try_batch(&self, from: u64, bytes_max: usize) -> Result<Vec<Record>, String> {
        let client = self.connections.input.client();
        let connected = self.connections.input.connects();
        let text = |error: &dyn std::fmt::Display| error.to_string();
        let inbox = client.new_inbox();
        let mut answers = client.subscribe(inbox.clone()).await.map_err(|e| text(&e))?;
        let subject = format!("$JS.API.DIRECT.GET.{}", self.stream_name());
        let request =
            format!("{{\"seq\":{from},\"batch\":{BATCH_MESSAGES},\"max_bytes\":{bytes_max}}}");
        let sent = client.publish_with_reply(subject, inbox, Bytes::from(request)).await;
        sent.map_err(|e| text(&e))?;
        let mut records: Vec<Record> = Vec::new();
        let until = Instant::now() + ANSWER;
        loop {
            let soon = Instant::now() + Duration::from_millis(100);
            let answer = match timeout_at(soon.min(until), answers.next()).await {
                Ok(Some(answer)) => answer,
                lost => {
                    let waits = lost.is_err() && Instant::now() < until;
                    if waits && self.connections.input.connects() == connected {
                        continue;
                    }
                    // What came so far is in order and without gaps.
                    let some = !records.is_empty();
                    return if some { Ok(records) } else { Err("no answer in time".to_owned()) };
                }
            };
            match answer.status.map_or(200, |status| status.as_u16()) {
                200 => {}
                // End of the batch; nothing from that position on.
                204 | 404 => return Ok(records),
                503 => return Err("no server has the stream".to_owned()),
                status => {
                    return Err(format!("{status} {}", answer.description.unwrap_or_default()));
                }
            }
            let message = StreamMessage::try_from(answer).map_err(|e| text(&e))?;
            let record = from_stream(message, self.copied_to);
            if record.position < from + records.len() as u64 {
                return Err(format!("position {} came twice", record.position));
            }
            let gap = record.position > from + records.len() as u64;
            if gap && !records.is_empty() {
                return Ok(records);
            }
            records.push(record);
            if gap {
                return Ok(records);
            }
        }
    }

    pub async fn read(&self, from: u64, bytes_max: usize) -> LogResult<Vec<Record>> {
        if let Some(error) = self.failure() {
            return Err(error);
        }
        let mut records = if bytes_max <= SINGLE_BYTES {
            Vec::new()
        } else {
            self.read_batch(from, bytes_max).await
        };
        if records.is_empty() && (from <= self.state.lock().head || bytes_max <= SINGLE_BYTES) {
            records.extend(self.read_single(from).await?);
            if records.is_empty() && from <= self.state.lock().head {
                // It is known to have been there.
                self.refresh().await?;
                return Err(self.gone(from, from + 1));
            }
            if bytes_max > SINGLE_BYTES {
                Counters::count(&self.connections.counters.stale_reads);
            }
        }
        match records.first().map(|record| record.position) {
            Some(first) if first != from => return Err(self.gone(from, first)),
            _ => {}
        }
        if let Some(last) = records.last() {
            self.raise(last.position, Some(last.time));
        }
        Ok(records)
    }
}
