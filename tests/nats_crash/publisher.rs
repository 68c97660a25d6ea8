//! Publishers on NATS, with the plain client and nothing of ours: they send messages of one event or
//! many, wait for acknowledgements, and send again what got none. Some messages carry an id by which
//! the server knows a repetition, others leave that to the ids of their events.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_nats::jetstream::context::{ContextBuilder, PublishAckFuture};
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::{Context, publish::PublishAck};
use bytes::Bytes;
use futures::future::join_all;
use meterr_operators::ids::shard_of;
use meterr_operators::rng::Rng;

use crate::model::{Model, ORGS, Version};
use crate::stage::Stage;
use crate::trouble::Source;
use crate::{SHARDS, connect};

/// What all publishers got acknowledged.
#[derive(Debug, Default)]
pub struct Sent {
    /// Everything that must be counted.
    pub model: Model,
    /// Last position acknowledged, by stream.
    pub positions: BTreeMap<String, u64>,
    /// Lines acknowledged.
    pub lines: u64,
    /// Lines at which publishers wait to be allowed more: a slow machine shall not have more to catch
    /// up with than a fast one.
    pub allowed: u64,
    /// Messages sent again.
    pub repeated: u64,
    /// Messages of which the server knew that it had them.
    pub known: u64,
}

impl Sent {
    /// Notes what was acknowledged; returns what was not.
    fn take(&mut self, sent: Vec<Outgoing>, answers: Vec<Option<PublishAck>>) -> Vec<Outgoing> {
        let mut again = Vec::new();
        for (message, answer) in sent.into_iter().zip(answers) {
            let Some(ack) = answer else {
                self.repeated += 1;
                again.push(message);
                continue;
            };
            let position = self.positions.entry(ack.stream).or_default();
            *position = ack.sequence.max(*position);
            self.lines += message.lines;
            self.known += u64::from(ack.duplicate);
        }
        again
    }

    /// The position that includes everything acknowledged.
    pub fn position(&self) -> String {
        let of = |(stream, at): (&String, &u64)| {
            format!("{}:{at}", stream.strip_prefix("USAGE_").expect("usage goes nowhere else"))
        };
        self.positions.iter().map(of).collect::<Vec<_>>().join(",")
    }
}

struct Outgoing {
    subject: String,
    body: Bytes,
    id: Option<String>,
    lines: u64,
}

/// Divides events into messages: by org for a subject of its own, with or without the shard, or by
/// shard as a gateway does. The order of an org's events stays.
fn messages(rng: &mut Rng, events: &[(String, Version)]) -> Vec<Outgoing> {
    let mut by_subject: BTreeMap<String, (String, u64)> = BTreeMap::new();
    let how = rng.below(3);
    for (id, version) in events {
        let org = ORGS[version.org];
        let shard = shard_of(org, SHARDS);
        let subject = match how {
            0 => format!("usage.{org}"),
            1 => format!("usage.{shard}.{org}"),
            _ => format!("usage.{shard}.@batch"),
        };
        let (body, lines) = by_subject.entry(subject).or_default();
        body.push_str(&version.line(id));
        *lines += 1;
    }
    let with_id = rng.percent(70);
    let mut message = |(subject, (body, lines)): (String, (String, u64))| {
        let id = with_id.then(|| format!("{:016x}{:016x}", rng.bits(), rng.bits()));
        Outgoing { subject, body: body.into(), id, lines }
    };
    by_subject.into_iter().map(&mut message).collect()
}

async fn send(context: &Context, message: &Outgoing) -> Option<PublishAckFuture> {
    let mut publish = PublishMessage::build().payload(message.body.clone());
    if let Some(id) = &message.id {
        publish = publish.message_id(id);
    }
    context.send_publish(message.subject.clone(), publish).await.ok()
}

/// Sends messages, all at once, until each is acknowledged.
async fn insist(context: &Context, mut messages: Vec<Outgoing>, sent: &Mutex<Sent>) {
    while !messages.is_empty() {
        // Handed over one after the other: an org's messages keep their order.
        let mut waiting = Vec::new();
        for message in &messages {
            waiting.push(send(context, message).await);
        }
        let answers = join_all(waiting.into_iter().map(|ack| async move {
            match ack {
                Some(ack) => ack.await.ok(),
                None => None,
            }
        }));
        let answers: Vec<Option<PublishAck>> = answers.await;
        messages = sent.lock().unwrap().take(messages, answers);
        if !messages.is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

/// Publishes until told to stop.
pub async fn publish(n: u64, seed: u64, url: &str, stage: &Stage, sent: &Mutex<Sent>) {
    let context = ContextBuilder::new()
        .ack_timeout(Duration::from_millis(700))
        .timeout(Duration::from_millis(700))
        .build(connect(url).await);
    let mut source = Source::new(n, seed);
    while !stage.closing.load(Ordering::SeqCst) {
        tokio::time::sleep(Duration::from_micros(source.rng.below(20_000))).await;
        let going = {
            let sent = sent.lock().unwrap();
            sent.lines < sent.allowed
        };
        if !going {
            continue;
        }
        let batch = source.batch();
        insist(&context, messages(&mut source.rng, &batch), sent).await;
        for (id, version) in &batch {
            sent.lock().unwrap().model.sent(id, version);
        }
        if source.rng.percent(3) {
            let forged = source.forged(&batch);
            insist(&context, messages(&mut source.rng, &[forged]), sent).await;
        }
    }
}

/// Sends everything once more.
pub async fn repeat(url: &str, lines: &[(String, Version)], sent: &Mutex<Sent>) {
    let context = ContextBuilder::new().build(connect(url).await);
    let mut rng = Rng::stream(0, 0);
    for chunk in lines.chunks(500) {
        insist(&context, messages(&mut rng, chunk), sent).await;
    }
}
