//! Reading the registry: all entries by one request to any replica, or one by one from the leader
//! where that cannot be had.
//!
//! Both are bounded: a bucket with more than [`ENTRIES_MAX`] keys or [`BYTES_MAX`] bytes is not read.
//! Removed keys leave a message each; where many have gathered, old ones are purged, which cannot
//! touch a key that was written again since.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_nats::HeaderMap;
use async_nats::jetstream;
use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::response::Response;
use async_nats::jetstream::stream::RawMessage;
use bytes::Bytes;
use futures::StreamExt;
use serde_json::json;
use tokio::time::{Instant, timeout_at};

use super::bucket::subjects;
use super::log::BackOff;
use super::record::{from_raw, from_stream};
use super::registry::{ATTEMPT, Shared};
use super::registry_entry::entry;
use super::subjects::REGISTRY_STREAM;
use super::write::told;
use crate::cluster::Entry;
use crate::log::Record;

/// Most keys that are read, removed ones included.
pub const ENTRIES_MAX: usize = 4_096;
/// Most bytes that are read.
pub const BYTES_MAX: usize = 4 * 1024 * 1024;

/// So many removed keys may leave a message.
const REMOVED_MAX: usize = 256;
/// Nobody writes any more who may want to recognise a removal of his this long ago, in microseconds.
const REMOVED_US: i64 = 600_000_000;
/// Removed keys purged at once.
const PURGED_MAX: usize = 64;

/// What a leader answers.
#[derive(serde::Deserialize)]
struct Stored {
    message: RawMessage,
}

/// Messages of the bucket within the bounds, the newest of each subject.
#[derive(Default)]
struct Found {
    records: BTreeMap<String, Record>,
    bytes: usize,
}

impl Found {
    /// Takes one in.
    fn take(&mut self, record: Record) -> Result<(), String> {
        self.bytes += record.message.bytes();
        if self.bytes > BYTES_MAX || self.records.len() >= ENTRIES_MAX {
            return Err(format!(
                "the registry holds more than {ENTRIES_MAX} keys or {BYTES_MAX} bytes; remove what is \
                 not of use from bucket METERR"
            ));
        }
        self.records.insert(record.message.subject.clone(), record);
        Ok(())
    }
}

impl Shared {
    /// All entries as one replica or the leader has them.
    pub(super) async fn read(self: &Arc<Self>) -> Result<Vec<Entry>, String> {
        let until = Instant::now() + self.patience;
        let found = match self.batch(until.min(Instant::now() + ATTEMPT)).await {
            Ok(found) => found,
            Err(why) => {
                tracing::debug!(why, "reading the registry one by one");
                self.one_by_one(until).await?
            }
        };
        let records: Vec<Record> = found.records.into_values().collect();
        let mut removed: Vec<(i64, u64, String)> = Vec::new();
        let newest = records.iter().map(|record| record.time.0).max().unwrap_or(0);
        let mut entries = Vec::with_capacity(records.len());
        for record in records {
            let place = (record.time.0, record.position, record.message.subject.clone());
            match entry(record) {
                Some(entry) => entries.push(entry),
                None => removed.push(place),
            }
        }
        if removed.len() > REMOVED_MAX {
            removed.sort_unstable();
            removed.retain(|(time, ..)| newest.saturating_sub(*time) > REMOVED_US);
            removed.truncate(PURGED_MAX);
            self.purge(removed, until).await;
        }
        Ok(entries)
    }

    /// Purges what removals left. Best effort.
    async fn purge(self: &Arc<Self>, removed: Vec<(i64, u64, String)>, until: Instant) {
        for (_, position, subject) in removed {
            let which = json!({ "filter": subject, "seq": position + 1 });
            let purge = format!("$JS.API.STREAM.PURGE.{REGISTRY_STREAM}");
            let which = Bytes::from(which.to_string());
            if self.ask(purge, HeaderMap::new(), which, until).await.is_err() {
                return;
            }
        }
    }

    /// The newest message of every subject, by one request.
    async fn batch(&self, until: Instant) -> Result<Found, String> {
        if !self.line.connected() {
            return Err(super::asking::AWAY.to_owned());
        }
        let client = self.line.client();
        let inbox = client.new_inbox();
        let request = json!({ "multi_last": [subjects()], "max_bytes": BYTES_MAX });
        let sent = async {
            let answers = client.subscribe(inbox.clone()).await.map_err(|e| told(&e))?;
            let subject = format!("$JS.API.DIRECT.GET.{REGISTRY_STREAM}");
            let request = Bytes::from(request.to_string());
            let sent = client.publish_with_reply(subject, inbox, request).await;
            sent.map_err(|e| told(&e)).map(|()| answers)
        };
        let late = |_| "no answer in time".to_owned();
        let mut answers = timeout_at(until, sent).await.map_err(late)??;
        let mut found = Found::default();
        // Messages still to come by the one before.
        let mut pending: Option<u64> = None;
        loop {
            let answer = timeout_at(until, answers.next()).await.map_err(late)?;
            let answer = answer.ok_or("the connection was closed")?;
            let left = answer.headers.as_ref().and_then(|headers| {
                headers.get_last("Nats-Num-Pending")?.as_str().parse::<u64>().ok()
            });
            match answer.status.map_or(200, |status| status.as_u16()) {
                200 => {}
                204 if pending == Some(0) => return Ok(found),
                204 => return Err("not all of the answer came".to_owned()),
                // No key at all.
                404 if pending.is_none() => return Ok(found),
                status => {
                    return Err(format!("{status} {}", answer.description.unwrap_or_default()));
                }
            }
            let left = left.ok_or("an answer without a count")?;
            if pending.is_some_and(|pending| left.checked_add(1) != Some(pending)) {
                return Err("a part of the answer is missing".to_owned());
            }
            pending = Some(left);
            let message = StreamMessage::try_from(answer).map_err(|e| e.to_string())?;
            found.take(from_stream(message, 0))?;
        }
    }

    /// The newest message of every subject, by the leader. One that is written while this goes on may
    /// be seen as it was or as it is; none is missed, since a write moves it ahead.
    async fn one_by_one(self: &Arc<Self>, until: Instant) -> Result<Found, String> {
        let mut found = Found::default();
        let mut from = 1;
        let mut wait = BackOff::new();
        let mut turns = 0;
        loop {
            let which = json!({ "seq": from, "next_by_subj": subjects() });
            let why = match self.of_leader(&which, until).await {
                Ok(None) => return Ok(found),
                // Writes ahead of it could keep it going for ever.
                Ok(Some(_)) if turns > 2 * ENTRIES_MAX => "it changes too fast".to_owned(),
                Ok(Some(record)) if record.position >= from => {
                    turns += 1;
                    from = record.position + 1;
                    found.take(record)?;
                    if Instant::now() < until {
                        continue;
                    }
                    "it takes too long".to_owned()
                }
                Ok(Some(_)) => "the answer is not what was asked for".to_owned(),
                Err(why) => why,
            };
            if Instant::now() >= until {
                return Err(format!("reading it: {why}"));
            }
            wait.wait().await;
        }
    }

    /// One message, by the bucket's leader.
    pub(super) async fn of_leader(
        self: &Arc<Self>,
        which: &serde_json::Value,
        until: Instant,
    ) -> Result<Option<Record>, String> {
        let subject = format!("$JS.API.STREAM.MSG.GET.{REGISTRY_STREAM}");
        let which = Bytes::from(which.to_string());
        let answer = self.ask(subject, HeaderMap::new(), which, until).await?;
        match serde_json::from_slice::<Response<Stored>>(&answer) {
            Ok(Response::Ok(Stored { message })) => from_raw(message, 0).map(Some),
            Ok(Response::Err { error })
                if error.error_code() == jetstream::ErrorCode::NO_MESSAGE_FOUND =>
            {
                Ok(None)
            }
            Ok(Response::Err { error }) => Err(error.to_string()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The newest sequence of the bucket, by its leader.
    pub(super) async fn head(self: &Arc<Self>, until: Instant) -> Result<u64, String> {
        let subject = format!("$JS.API.STREAM.INFO.{REGISTRY_STREAM}");
        let answer = self.ask(subject, HeaderMap::new(), Bytes::new(), until).await?;
        let info: serde_json::Value =
            serde_json::from_slice(&answer).map_err(|error| error.to_string())?;
        if info["cluster"].is_object() && !info["cluster"]["leader"].is_string() {
            return Err("the bucket has no leader".to_owned());
        }
        info["state"]["last_seq"].as_u64().ok_or_else(|| "it has no state".to_owned())
    }
}
