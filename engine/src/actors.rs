//! The control plane as actors: a node, its shards, the checkpoint writer.
//!
//! ```text
//! worker threads ──events──► NodeActor ──► ShardActor (one a shard: its life, its log reader)
//!                                └───────► CheckpointActor (own thread: blocking writes)
//! ```
//!
//! Data does not pass through mailboxes: readers hand records straight to the worker threads, bounded
//! by credits. Mailboxes are bounded and waited for, never bypassed. actix does not survive panics by
//! itself, so the node notices dead worker threads and starts them anew, and every shard's life is
//! decided by [`Lifecycle`].

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use meterr_connectors::checkpoint::CheckpointStore;
use meterr_connectors::log::{Log, LogError, Message as LogMessage};
use meterr_operators::ids::ShardId;
use meterr_operators::time::{HOUR, Time};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::lifecycle::{Action, Happened, Lifecycle, State};
use crate::live::{CheckpointJob, ShardSpec};
use crate::metrics::ShardMetrics;
use crate::node::{NodeShared, now};
use crate::records::READ_BYTES;
use crate::worker::{Command, Event, WorkerHandle};

/// Reads under way or waiting per shard.
const READS_MAX: usize = 2;

/// Ends a node: drains every shard.
#[derive(Message)]
#[rtype(result = "()")]
pub struct DrainNode;

/// Something happened to a shard.
#[derive(Message)]
#[rtype(result = "()")]
struct Tell(Happened);

/// A checkpoint to be written.
#[derive(Message)]
#[rtype(result = "()")]
struct WriteCheckpoint {
    job: CheckpointJob,
    shard: ShardId,
}

struct WorkerEvent(Event);

/// Watches over worker threads and shards.
pub struct NodeActor {
    shared: Arc<NodeShared>,
    shards: Vec<Addr<ShardActor>>,
    checkpoints: Addr<CheckpointActor>,
    workers: Vec<Option<WorkerHandle>>,
    events: mpsc::Sender<Event>,
    incoming: Option<mpsc::Receiver<Event>>,
    metrics: Vec<ShardMetrics>,
    released: watch::Sender<usize>,
    /// Shards that were live at least once.
    opened: BTreeSet<ShardId>,
}

impl NodeActor {
    /// Starts threads and actors. The watch tells how many shards are released.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start_all(
        shared: Arc<NodeShared>,
        specs: Vec<ShardSpec>,
        store: Arc<dyn CheckpointStore>,
        keep: usize,
        workers: usize,
    ) -> std::io::Result<(Addr<NodeActor>, watch::Receiver<usize>)> {
        // As many events as all shards may cause at once; a slow node holds the workers up.
        let (events, incoming) = mpsc::channel(1024);
        let mut handles = Vec::new();
        for index in 0..workers {
            let handle = WorkerHandle::start(index, events.clone(), shared.runtime.clone())?;
            shared.workers.write().push(handle.sender());
            handles.push(Some(handle));
        }
        let metrics: Vec<ShardMetrics> =
            specs.iter().map(|spec| shared.metrics.shard(spec.id)).collect();
        let arbiter = Arbiter::new();
        let writer =
            CheckpointActor { store, keep, shared: shared.clone(), metrics: metrics.clone() };
        let checkpoints = CheckpointActor::start_in_arbiter(&arbiter.handle(), move |_| writer);
        let shards = specs
            .into_iter()
            .map(|spec| ShardActor::new(spec, shared.clone(), events.clone()).start())
            .collect();
        let (released, seen) = watch::channel(0);
        let node = NodeActor {
            shared,
            shards,
            checkpoints,
            workers: handles,
            events,
            incoming: Some(incoming),
            metrics,
            released,
            opened: BTreeSet::new(),
        };
        Ok((node.start(), seen))
    }

    fn tell(&self, shard: ShardId, happened: Happened, ctx: &mut Context<Self>) {
        let told = self.shards[usize::from(shard.0)].send(Tell(happened));
        // Waiting holds up the event stream and so the workers: back-pressure, not a growing queue.
        ctx.wait(told.into_actor(self).map(|_, _, _| ()));
    }
}

impl Actor for NodeActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        let incoming = self.incoming.take().expect("an actor starts once");
        let events = futures::stream::unfold(incoming, |mut incoming| async move {
            incoming.recv().await.map(|event| (WorkerEvent(event), incoming))
        });
        ctx.add_stream(events);
        for shard in 0..self.shards.len() {
            self.tell(ShardId(shard as u16), Happened::Start, ctx);
        }
    }
}

impl StreamHandler<WorkerEvent> for NodeActor {
    fn handle(&mut self, event: WorkerEvent, ctx: &mut Context<Self>) {
        match event.0 {
            Event::Replaying(shard, from, at, to) => {
                self.metrics[usize::from(shard.0)].replay(from, at, to);
                self.tell(shard, Happened::Replaying, ctx);
            }
            Event::Opened(shard, progress) => {
                tracing::debug!(%shard, epoch = progress.epoch, position = progress.usage, "shard is live");
                if self.opened.insert(shard) && self.opened.len() == self.shards.len() {
                    tracing::info!(shards = self.shards.len(), "every shard is live");
                }
                self.metrics[usize::from(shard.0)].stopped(false);
                self.tell(shard, Happened::Opened, ctx);
            }
            Event::Committed(shard, committed, state) => {
                let at = usize::from(shard.0);
                let metrics = &self.metrics[at];
                metrics.events(committed.counts.counted);
                metrics.duplicates(committed.counts.repeated);
                for reason in committed.rejected {
                    metrics.rejected(reason, 1);
                }
                if let Some(oldest) = committed.oldest {
                    let micros = now().0.saturating_sub(oldest.0).max(0) as u64;
                    metrics.event_to_view(Duration::from_micros(micros));
                }
                metrics.epoch(committed.counts.lines, committed.took, committed.append_took);
                metrics.state(state.rows, state.bytes);
                let seen = self.shared.progress[at].borrow().usage;
                metrics.lag(self.shared.logs[at].usage.head().saturating_sub(seen));
                self.tell(shard, Happened::Committed, ctx);
            }
            Event::Checkpoint(shard, job) => {
                let written = self.checkpoints.send(WriteCheckpoint { job, shard });
                // Not waited for: at most one a shard is under way, and shards need not stop for it.
                ctx.spawn(written.into_actor(self).map(|_, _, _| ()));
            }
            Event::Stopped(shard, reason) => {
                self.metrics[usize::from(shard.0)].stopped(true);
                let (transient, away) = (reason.transient(), reason.unavailable());
                let mut text = reason.to_string();
                let mut cause = std::error::Error::source(&reason);
                while let Some(error) = cause {
                    text = format!("{text}: {error}");
                    cause = error.source();
                }
                let happened = if away {
                    tracing::warn!(%shard, reason = text, "waiting for the server of the logs");
                    Happened::Away { reason: text }
                } else {
                    Happened::Stopped { reason: text, transient }
                };
                self.tell(shard, happened, ctx);
            }
            Event::Drained(shard) => {
                self.tell(shard, Happened::Drained, ctx);
            }
            Event::Panicked(index, culprit, reason) => {
                let blamed = culprit.map(|shard| shard.to_string()).unwrap_or_default();
                tracing::error!(
                    worker = index,
                    shard = blamed,
                    reason,
                    "worker thread panicked; starting it anew"
                );
                match WorkerHandle::start(index, self.events.clone(), self.shared.runtime.clone()) {
                    Ok(handle) => {
                        self.shared.workers.write()[index] = handle.sender();
                        self.workers[index] = Some(handle);
                    }
                    Err(error) => {
                        tracing::error!(%error, "no new worker thread; its shards stay down")
                    }
                }
                for shard in 0..self.shards.len() {
                    let shard = ShardId(shard as u16);
                    if self.shared.worker_of(shard) == index {
                        let culprit = culprit.is_none_or(|culprit| culprit == shard);
                        let reason = format!("panic: {reason}");
                        self.tell(shard, Happened::ThreadDied { culprit, reason }, ctx);
                    }
                }
            }
        }
        let released = self.shared.states.iter().filter(|s| s.lock().0 == State::Released).count();
        self.released.send_if_modified(|known| std::mem::replace(known, released) != released);
    }
}

impl Handler<DrainNode> for NodeActor {
    type Result = ();

    fn handle(&mut self, _: DrainNode, ctx: &mut Context<Self>) {
        for shard in 0..self.shards.len() {
            self.tell(ShardId(shard as u16), Happened::Drain, ctx);
        }
        // Shards that were stopped are released without a word from their worker.
        let shared = self.shared.clone();
        let released = self.released.clone();
        ctx.run_interval(Duration::from_millis(10), move |_, _| {
            let n = shared.states.iter().filter(|s| s.lock().0 == State::Released).count();
            released.send_if_modified(|known| std::mem::replace(known, n) != n);
        });
    }
}

/// Ends the worker threads; a node's last message.
#[derive(Message)]
#[rtype(result = "()")]
pub struct EndWorkers;

impl Handler<EndWorkers> for NodeActor {
    type Result = ();

    fn handle(&mut self, _: EndWorkers, ctx: &mut Context<Self>) {
        for worker in self.workers.iter_mut().filter_map(Option::take) {
            worker.end();
        }
        ctx.stop();
    }
}

/// One shard: its life and the reader of its log.
struct ShardActor {
    spec: ShardSpec,
    shared: Arc<NodeShared>,
    events: mpsc::Sender<Event>,
    life: Lifecycle,
    reader: Option<tokio::task::JoinHandle<()>>,
}

impl ShardActor {
    fn new(spec: ShardSpec, shared: Arc<NodeShared>, events: mpsc::Sender<Event>) -> ShardActor {
        ShardActor { spec, shared, events, life: Lifecycle::default(), reader: None }
    }

    fn stop_reader(&mut self) {
        if let Some(reader) = self.reader.take() {
            reader.abort();
        }
    }

    fn act(&mut self, action: Action, ctx: &mut Context<Self>) {
        let shard = self.spec.id;
        match action {
            Action::OpenAfter(wait) => {
                let (shared, spec) = (self.shared.clone(), self.spec.clone());
                let open = async move {
                    tokio::time::sleep(wait).await;
                    shared.tell(shard, Command::Open(Box::new(spec))).await;
                };
                ctx.spawn(open.into_actor(self));
            }
            Action::StartReader => {
                self.stop_reader();
                let from = self.spec.progress.borrow().usage + 1;
                let reading = read(self.shared.clone(), shard, from, self.events.clone());
                self.reader = Some(self.shared.runtime.spawn(reading));
            }
            Action::StopReader => self.stop_reader(),
            Action::DrainWorker => {
                let shared = self.shared.clone();
                let drain = async move { shared.tell(shard, Command::Drain(shard)).await };
                ctx.spawn(drain.into_actor(self));
            }
            Action::RaiseAlarm(reason) => {
                tracing::error!(%shard, reason, "shard stopped; its figures stay as committed until this is mended and the node restarted");
            }
        }
    }
}

impl Actor for ShardActor {
    type Context = Context<Self>;
}

impl Handler<Tell> for ShardActor {
    type Result = ();

    fn handle(&mut self, Tell(happened): Tell, ctx: &mut Context<Self>) {
        for action in self.life.on(happened) {
            self.act(action, ctx);
        }
        let problem = match self.life.state() {
            State::Stopped(reason) => Some(reason.clone()),
            _ => None,
        };
        let state = self.life.state().clone();
        *self.shared.states[usize::from(self.spec.id.0)].lock() = (state, problem);
    }
}

/// Reads a shard's usage log on and hands records to its worker, bounded by credits that come back
/// when records are taken in. Writes a tick into an idle log once an hour of its time.
async fn read(shared: Arc<NodeShared>, shard: ShardId, mut from: u64, events: mpsc::Sender<Event>) {
    let usage = shared.logs[usize::from(shard.0)].usage.clone();
    let credits = Arc::new(Semaphore::new(READS_MAX));
    loop {
        let Ok(credit) = credits.clone().acquire_owned().await else { return };
        let idle = tokio::time::timeout(Duration::from_secs(60), usage.wait_beyond(from - 1)).await;
        if idle.is_err() {
            tick(&*usage, shard).await;
            continue;
        }
        match usage.read(from, READ_BYTES).await {
            Ok(records) => {
                let Some(last) = records.last() else {
                    // Woken without a record: the log takes no more. Everything before the failure
                    // has been handed on, so the shard commits it and then stands still; whoever
                    // watches must be told.
                    if let Some(error) = usage.failure() {
                        drop(events.send(Event::Stopped(shard, error.into())).await);
                        return;
                    }
                    // It is being closed.
                    if usage.head() < from {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                    continue;
                };
                from = last.position + 1;
                shared.tell(shard, Command::Usage(shard, records, credit)).await;
            }
            Err(LogError::Unavailable { what, .. }) => {
                tracing::warn!(%shard, what, "usage log not available; trying on");
            }
            Err(error) => {
                // A closed channel means that the node is gone.
                drop(events.send(Event::Stopped(shard, error.into())).await);
                return;
            }
        }
    }
}

async fn tick(usage: &dyn Log, shard: ShardId) {
    let due = usage.last_time().is_some_and(|Time(last)| now().0 - last >= HOUR);
    if due {
        let message = LogMessage::new(format!("usage.{shard}.@tick"), Vec::new());
        // A failed append shows at the next one that matters.
        drop(usage.append(vec![message]).await);
    }
}

/// Writes checkpoints, one after the other, on a thread of its own.
struct CheckpointActor {
    store: Arc<dyn CheckpointStore>,
    keep: usize,
    shared: Arc<NodeShared>,
    metrics: Vec<ShardMetrics>,
}

impl Actor for CheckpointActor {
    type Context = Context<Self>;
}

impl Handler<WriteCheckpoint> for CheckpointActor {
    type Result = ();

    fn handle(&mut self, WriteCheckpoint { job, shard }: WriteCheckpoint, ctx: &mut Context<Self>) {
        let started = Instant::now();
        let CheckpointJob { manifest, chunks } = job;
        let written = self.store.write(&manifest, &chunks);
        if written.is_ok()
            && manifest.index == 0
            && let Err(error) = self.store.prune(shard, self.keep)
        {
            tracing::warn!(%shard, %error, "old checkpoints could not be pruned");
        }
        for notice in self.store.take_notices() {
            tracing::error!(notice, "checkpoint store; what is missing is rebuilt from the log");
        }
        match &written {
            Ok(()) => {
                self.metrics[usize::from(shard.0)].checkpoint(started.elapsed(), manifest.bytes);
                let (generation, index, bytes) =
                    (manifest.generation, manifest.index, manifest.bytes);
                tracing::debug!(%shard, generation, index, bytes, epoch = manifest.epoch, "checkpoint written");
            }
            Err(error) => {
                tracing::warn!(%shard, %error, "checkpoint not written; the log keeps everything, the next one is a base");
            }
        }
        let shared = self.shared.clone();
        let told = async move {
            shared.tell(shard, Command::Checkpointed(shard, written.is_ok())).await;
        };
        ctx.spawn(told.into_actor(self));
    }
}
