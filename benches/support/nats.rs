//! The real binary on a NATS server of its own, and events as messages for it.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use async_nats::Client;
use async_nats::jetstream::context::{ContextBuilder, PublishAckFuture};
use async_nats::jetstream::message::PublishMessage;
use bytes::Bytes;
use meterr_operators::ids::{Positions, ShardId, shard_of};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::nats_server::{NatsOptions, NatsServer};
use super::server::Server;

/// Shards of a deployment, unless told otherwise.
pub const SHARDS: u16 = 16;
/// Events of a message. More cost hardly less, fewer much more.
pub const MESSAGE_EVENTS: usize = 100;
/// Messages a publisher has under way without an acknowledgement.
pub const WINDOW: usize = 256;

/// When the NATS server syncs what it acknowledges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// Every two minutes, as a server without configuration does.
    Default,
    /// Each message before it is acknowledged.
    Always,
}

impl Sync {
    /// Both.
    pub const BOTH: [Sync; 2] = [Sync::Default, Sync::Always];

    /// As it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Sync::Default => "sync default",
            Sync::Always => "sync always",
        }
    }
}

/// A NATS server with the streams of a deployment on it and the price book of SPEND-1 in force.
pub struct Stage {
    binary: PathBuf,
    /// The NATS server. Dropped before the directory it is in.
    pub nats: NatsServer,
    /// For what the bench does itself.
    pub runtime: Runtime,
    directory: TempDir,
}

impl Stage {
    /// Starts the server below `parent` and the binary once, which makes streams and price book.
    ///
    /// # Errors
    /// When one of them does not start or stop.
    pub fn new(binary: &Path, parent: &Path, sync: Sync) -> Result<Stage> {
        let directory = tempfile::tempdir_in(parent)?;
        let options = NatsOptions::new().mapping(SHARDS).directory(directory.path());
        let options = if sync == Sync::Always { options.sync_always() } else { options };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("bench")
            .enable_all()
            .build()?;
        let nats = NatsServer::start(options);
        let stage = Stage { binary: binary.to_owned(), nats, runtime, directory };
        stage.serve()?.stop()?;
        Ok(stage)
    }

    /// Starts the binary; returns when it is ready.
    ///
    /// # Errors
    /// When it does not get ready.
    pub fn serve(&self) -> Result<Server> {
        Server::start_with(&self.binary, self.directory.path(), &["--nats", &self.nats.url()])
    }

    /// Where the binary keeps its data.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// A connection of its own.
    ///
    /// # Errors
    /// When the server does not answer.
    pub fn connect(&self) -> Result<Client> {
        Ok(self.runtime.block_on(async_nats::connect(self.nats.url()))?)
    }

    /// Publishes messages with so many of them not yet acknowledged; returns where they stand.
    ///
    /// # Errors
    /// When the server does not take one.
    pub fn publish(&self, messages: &[Batch], window: usize) -> Result<Positions> {
        let client = self.connect()?;
        self.runtime.block_on(publish(client, messages, window))
    }
}

/// A message of several events of one shard.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Their shard.
    pub shard: ShardId,
    /// The events as lines.
    pub lines: Bytes,
    /// How many.
    pub events: usize,
}

impl Batch {
    /// Where it is published.
    pub fn subject(&self) -> String {
        format!("usage.{}.@batch", self.shard)
    }
}

/// Events as messages, each of one shard, in the order in which they get full.
///
/// # Errors
/// When a line names no org.
pub fn batches(text: &[u8], shards: u16, events: usize) -> Result<Vec<Batch>> {
    let mut batches = Vec::new();
    let mut open = vec![(Vec::new(), 0); usize::from(shards)];
    let close = |shard: usize, (lines, events): (Vec<u8>, usize)| Batch {
        shard: ShardId(shard as u16),
        lines: lines.into(),
        events,
    };
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        let org = org_of(line).with_context(|| String::from_utf8_lossy(line).into_owned())?;
        let shard = usize::from(shard_of(org, shards).0);
        open[shard].0.extend_from_slice(line);
        open[shard].1 += 1;
        if open[shard].1 == events {
            batches.push(close(shard, std::mem::take(&mut open[shard])));
        }
    }
    let rest = open.into_iter().enumerate().filter(|(_, (_, events))| *events > 0);
    batches.extend(rest.map(|(shard, open)| close(shard, open)));
    Ok(batches)
}

/// The org of a line in the form of SPEND-1.
pub fn org_of(line: &[u8]) -> Option<&str> {
    let name = br#""org":""#;
    let start = memchr::memmem::find(line, name)? + name.len();
    let end = start + memchr::memchr(b'"', &line[start..])?;
    std::str::from_utf8(&line[start..end]).ok()
}

async fn publish(client: Client, messages: &[Batch], window: usize) -> Result<Positions> {
    let context = ContextBuilder::new()
        .max_ack_inflight(window + 1)
        .ack_timeout(std::time::Duration::from_secs(60))
        .build(client);
    let mut positions = Positions::default();
    let mut under_way: VecDeque<(ShardId, PublishAckFuture)> = VecDeque::with_capacity(window);
    for message in messages {
        if under_way.len() == window
            && let Some((shard, ack)) = under_way.pop_front()
        {
            positions.raise(shard, ack.await?.sequence);
        }
        let publish = PublishMessage::build().payload(message.lines.clone());
        under_way
            .push_back((message.shard, context.send_publish(message.subject(), publish).await?));
    }
    for (shard, ack) in under_way {
        positions.raise(shard, ack.await?.sequence);
    }
    Ok(positions)
}
