//! From publishing an event until subscribers on core NATS have the change, on an idle system and at
//! a fixed rate.
//!
//! At a fixed rate every message has its moment, whatever became of the ones before, and latency
//! counts from that moment: a system that falls behind shows it. Changes are only taken down while the
//! load lasts and matched with what was published afterwards.

use std::collections::{BTreeMap, HashSet};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use async_nats::Client;
use async_nats::jetstream::context::{ContextBuilder, PublishAckFuture};
use async_nats::jetstream::message::PublishMessage;
use bytes::Bytes;
use futures::StreamExt;
use meterr_connectors::changes::LiveMessage;
use meterr_operators::ids::{Positions, ShardId};
use serde::Deserialize;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::latency::{Latencies, ORG, Probe, event};
use super::nats::{Batch, Stage, org_of};

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// One event at a time: published to `usage.<org>`, and once its change has come, the next.
///
/// # Errors
/// When a change does not come, or the last one shows another number of events.
pub fn idle(stage: &Stage, events: usize) -> Result<Latencies> {
    let (publisher, subscriber) = (stage.connect()?, stage.connect()?);
    let mut probe = Probe::new(stage.directory())?;
    stage.runtime.block_on(async {
        let mut latencies = Latencies::default();
        let mut changes = subscriber.subscribe(format!("spend.{ORG}")).await?;
        subscriber.flush().await?;
        let context = async_nats::jetstream::new(publisher);
        let mut last = Bytes::new();
        for n in 0..events {
            let line = event(&format!("view-{n}"));
            let sent = Instant::now();
            let ms = || sent.elapsed().as_secs_f64() * 1e3;
            let acknowledged = context.publish(format!("usage.{ORG}"), line.into()).await?;
            let acknowledged = async {
                acknowledged.await?;
                Ok::<_, anyhow::Error>(ms())
            };
            let shown = async {
                let change = tokio::time::timeout(PATIENCE, changes.next()).await;
                let change = change.context("no change came")?.context("the connection ended")?;
                Ok((ms(), change.payload))
            };
            let (acknowledged, (view, change)) = tokio::try_join!(acknowledged, shown)?;
            latencies.acknowledged.push(acknowledged);
            latencies.view.push(view);
            last = change;
            // In between, since what the disk does changes from minute to minute.
            latencies.fsync.push(probe.sync()?);
        }
        let last: LiveMessage = serde_json::from_slice(&last)?;
        let shown = last.views.get("org_all").and_then(|rows| rows.first());
        let shown = shown.map(|row| row.figures.events);
        if shown != Some(events as i64) {
            bail!("the last change shows {shown:?} events instead of {events}");
        }
        Ok(latencies)
    })
}

/// What a fixed rate led to.
#[derive(Debug, Default)]
pub struct Offered {
    /// Milliseconds from the moment an event was to be published until the change that shows it, one
    /// number an event of a followed org.
    pub view: Vec<f64>,
    /// Milliseconds by which messages were late to leave the publisher.
    pub late: Vec<f64>,
    /// Where everything stands.
    pub positions: Positions,
    /// Changes that came.
    pub changes: usize,
}

/// Publishes messages at `rate` events a second and follows every `nth` org.
///
/// # Errors
/// When a message is not taken, a change does not come, or changes are not in order.
pub fn offered(stage: &Stage, messages: &[Batch], rate: f64, nth: usize) -> Result<Offered> {
    let mut waiting = Waiting::of(messages, nth)?;
    let orgs: Vec<String> = waiting.orgs.keys().cloned().collect();
    let (publisher, subscriber) = (stage.connect()?, stage.connect()?);
    let mut heard = stage.runtime.block_on(follow(subscriber, orgs))?;
    let handle = stage.runtime.handle().clone();
    // Soon, so that the first is not late.
    let begin = Instant::now() + Duration::from_millis(50);
    let (acks, late) = thread::scope(|scope| {
        // A clone: with the last one the connection goes, and acknowledgements still under way.
        scope.spawn(|| on_schedule(&handle, publisher.clone(), messages, begin, rate)).join()
    })
    .map_err(|_| anyhow::anyhow!("the publisher panicked"))??;
    let mut offered = Offered { late, ..Offered::default() };
    stage.runtime.block_on(async {
        let mut events = 0;
        for (n, (message, ack)) in messages.iter().zip(acks).enumerate() {
            let position = ack.await?.sequence;
            offered.positions.raise(message.shard, position);
            let due = begin + due(events, rate);
            events += message.events;
            for org in waiting.orgs.values_mut() {
                org.published(n, due, position);
            }
        }
        while !waiting.done() {
            let heard = tokio::time::timeout(PATIENCE, heard.recv()).await;
            let (at, body) = heard.context("a change did not come")?.context("no subscriber")?;
            waiting.heard(at, &body, &mut offered)?;
        }
        Ok(offered)
    })
}

/// When the message behind so many events is due.
fn due(events: usize, rate: f64) -> Duration {
    Duration::from_secs_f64(events as f64 / rate)
}

/// Hands each message over when it is due, and says how late it left. Acknowledgements are taken
/// later: what comes back waits.
///
/// # Errors
/// When the connection is gone.
pub fn on_schedule(
    handle: &Handle,
    client: Client,
    messages: &[Batch],
    begin: Instant,
    rate: f64,
) -> Result<(Vec<PublishAckFuture>, Vec<f64>)> {
    let _entered = handle.enter();
    let context = ContextBuilder::new()
        .max_ack_inflight(messages.len() + 1)
        .timeout(PATIENCE)
        .ack_timeout(PATIENCE)
        .build(client);
    let mut acks = Vec::with_capacity(messages.len());
    let mut late = Vec::with_capacity(messages.len());
    let mut events = 0;
    for message in messages {
        let due = begin + due(events, rate);
        events += message.events;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        late.push(due.elapsed().as_secs_f64() * 1e3);
        let publish = PublishMessage::build().payload(message.lines.clone());
        acks.push(handle.block_on(context.send_publish(message.subject(), publish))?);
    }
    Ok((acks, late))
}

type Heard = (Instant, Bytes);

/// Subscribes to the orgs; what comes is taken down with its time.
async fn follow(client: Client, orgs: Vec<String>) -> Result<mpsc::UnboundedReceiver<Heard>> {
    let (to, heard) = mpsc::unbounded_channel();
    for org in orgs {
        let mut changes = client.subscribe(format!("spend.{org}")).await?;
        let to = to.clone();
        tokio::spawn(async move {
            while let Some(change) = changes.next().await {
                if to.send((Instant::now(), change.payload)).is_err() {
                    return;
                }
            }
        });
    }
    client.flush().await?;
    Ok(heard)
}

/// What followed orgs are to show.
struct Waiting {
    orgs: BTreeMap<String, Org>,
}

struct Org {
    shard: ShardId,
    /// Messages that hold events of it for the first time.
    messages: Vec<Part>,
    /// The next of them to be published, and to be shown.
    published: usize,
    shown: usize,
    /// Epoch of the last change.
    epoch: u64,
}

/// The events of an org in a message.
struct Part {
    /// Number of the message.
    message: usize,
    events: usize,
    /// When it was due, and its position.
    published: Option<(Instant, u64)>,
}

impl Org {
    fn published(&mut self, message: usize, due: Instant, position: u64) {
        if let Some(next) = self.messages.get_mut(self.published)
            && next.message == message
        {
            next.published = Some((due, position));
            self.published += 1;
        }
    }
}

/// The head of a live message.
#[derive(Deserialize)]
struct Head {
    epoch: u64,
    previous: u64,
    as_of: Positions,
    org: String,
    piece: u32,
}

impl Waiting {
    fn of(messages: &[Batch], nth: usize) -> Result<Waiting> {
        let mut orgs: BTreeMap<String, Org> = BTreeMap::new();
        // An event that comes a second time changes nothing, so no change shows it.
        let mut ids: HashSet<&[u8]> = HashSet::new();
        for (number, message) in messages.iter().enumerate() {
            for line in message.lines.split_inclusive(|byte| *byte == b'\n') {
                let org = org_of(line).context("a line names its org")?;
                if !ids.insert(line.get(..27).context("a line begins with its id")?) {
                    continue;
                }
                let shard = message.shard;
                let org = orgs.entry(org.to_owned()).or_insert_with(|| Org {
                    shard,
                    messages: Vec::new(),
                    published: 0,
                    shown: 0,
                    epoch: 0,
                });
                match org.messages.last_mut().filter(|last| last.message == number) {
                    Some(last) => last.events += 1,
                    None => org.messages.push(Part { message: number, events: 1, published: None }),
                }
            }
        }
        let orgs = orgs.into_iter().step_by(nth).collect();
        Ok(Waiting { orgs })
    }

    fn done(&self) -> bool {
        self.orgs.values().all(|org| org.shown == org.messages.len())
    }

    fn heard(&mut self, at: Instant, body: &[u8], offered: &mut Offered) -> Result<()> {
        let head: Head = serde_json::from_slice(body)?;
        offered.changes += 1;
        let org = self.orgs.get_mut(&head.org).context("a change of an org not followed")?;
        if head.piece > 0 {
            return Ok(());
        }
        if head.previous != org.epoch || head.epoch <= org.epoch {
            let Head { epoch, previous, org: name, .. } = head;
            bail!("{name}: epoch {epoch} says to follow {previous}, but {} came last", org.epoch);
        }
        org.epoch = head.epoch;
        let shown = head.as_of.of(org.shard).context("a change names its position")?;
        while let Some(part) = org.messages.get(org.shown)
            && let Some((due, position)) = part.published
            && position <= shown
        {
            let ms = at.saturating_duration_since(due).as_secs_f64() * 1e3;
            offered.view.extend(std::iter::repeat_n(ms, part.events));
            org.shown += 1;
        }
        Ok(())
    }
}
