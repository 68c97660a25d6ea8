//! The control plane as actors: a node, its shards, the checkpoint writer.
//!
//! ```text
//! worker threads ──events──► NodeActor ──► ShardActor (one a shard: its life, its log readers)
//! leases ──────────wishes──────►  └──────► CheckpointActor (own thread: blocking writes)
//! ```
//!
//! Data does not pass through mailboxes: readers hand records straight to the worker threads, bounded
//! by credits. Mailboxes are bounded and waited for, never bypassed. actix does not survive panics by
//! itself, so the node notices dead worker threads and starts them anew, and every shard's life is
//! decided by [`Lifecycle`].

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use actix::prelude::*;
use meterr_connectors::checkpoint::{CheckpointStore, Notice};
use meterr_operators::ids::ShardId;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::lifecycle::{Action, Happened, Lifecycle, State, Wanted};
use crate::live::{CheckpointJob, ShardSpec, StopReason};
use crate::metrics::ShardMetrics;
use crate::node::{NodeShared, now};
use crate::readers::{read_commits, read_usage};
use crate::worker::{Command, Event, WorkerHandle};

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

/// What is wanted of a shard, on its way to its actor. May be repeated.
pub struct Wish(pub ShardId, pub Wanted);

/// Where wishes go.
pub type Wishes = mpsc::Sender<Wish>;

/// What comes to the node's actor from outside of the actors.
struct Incoming {
    events: mpsc::Receiver<Event>,
    wishes: mpsc::Receiver<Wish>,
}

/// Watches over worker threads and shards.
pub struct NodeActor {
    shared: Arc<NodeShared>,
    shards: Vec<Addr<ShardActor>>,
    checkpoints: Addr<CheckpointActor>,
    workers: Vec<Option<WorkerHandle>>,
    events: mpsc::Sender<Event>,
    incoming: Option<Incoming>,
    metrics: Vec<ShardMetrics>,
    released: watch::Sender<usize>,
    /// Shards that were live at least once.
    opened: BTreeSet<ShardId>,
}

impl NodeActor {
    /// Starts threads and actors. Nothing is opened before it is wished for. The watch tells how many
    /// shards are released.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start_all(
        shared: Arc<NodeShared>,
        specs: Vec<ShardSpec>,
        store: Arc<dyn CheckpointStore>,
        keep: usize,
        workers: usize,
    ) -> std::io::Result<(Addr<NodeActor>, Wishes, watch::Receiver<usize>)> {
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
        // A wish that finds no room is made again.
        let (wishes, wished) = mpsc::channel(1024);
        let node = NodeActor {
            shared,
            shards,
            checkpoints,
            workers: handles,
            events,
            incoming: Some(Incoming { events: incoming, wishes: wished }),
            metrics,
            released,
            opened: BTreeSet::new(),
        };
        Ok((node.start(), wishes, seen))
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
        let Incoming { events, wishes } = self.incoming.take().expect("an actor starts once");
        ctx.add_stream(futures::stream::unfold(events, |mut events| async move {
            events.recv().await.map(|event| (WorkerEvent(event), events))
        }));
        ctx.add_stream(futures::stream::unfold(wishes, |mut wishes| async move {
            wishes.recv().await.map(|wish| (wish, wishes))
        }));
    }
}

impl StreamHandler<Wish> for NodeActor {
    fn handle(&mut self, Wish(shard, wanted): Wish, ctx: &mut Context<Self>) {
        self.tell(shard, Happened::Want(wanted), ctx);
    }

    // The actor ends by its last message, not because one of its two streams ended.
    fn finished(&mut self, _: &mut Context<Self>) {}
}

impl StreamHandler<WorkerEvent> for NodeActor {
    fn handle(&mut self, WorkerEvent(event): WorkerEvent, ctx: &mut Context<Self>) {
        self.event(event, ctx);
    }

    fn finished(&mut self, _: &mut Context<Self>) {}
}

impl NodeActor {
    fn event(&mut self, event: Event, ctx: &mut Context<Self>) {
        match event {
            Event::Replaying(shard, from, at, to) => {
                self.metrics[usize::from(shard.0)].replay(from, at, to);
                self.tell(shard, Happened::Replaying, ctx);
            }
            Event::Opened(shard, progress) => {
                tracing::debug!(%shard, epoch = progress.epoch, position = progress.usage, "shard stands by");
                self.metrics[usize::from(shard.0)].stopped(false);
                self.shared.followed(shard, 0);
                self.tell(shard, Happened::Opened, ctx);
            }
            Event::Owned(shard, progress) => {
                tracing::debug!(%shard, epoch = progress.epoch, position = progress.usage, "shard is live");
                if self.opened.insert(shard) && self.opened.len() == self.shards.len() {
                    tracing::info!(shards = self.shards.len(), "every shard is live");
                }
                self.metrics[usize::from(shard.0)].stopped(false);
                self.shared.followed(shard, 0);
                self.tell(shard, Happened::Owned, ctx);
            }
            Event::Overtaken(shard) => self.tell(shard, Happened::Overtaken, ctx),
            Event::Released(shard) => {
                tracing::debug!(%shard, "shard can be handed over");
                self.metrics[usize::from(shard.0)].lag(0);
                self.shared.writing[usize::from(shard.0)].store(true, Ordering::Relaxed);
                self.tell(shard, Happened::HandedOver, ctx);
            }
            Event::Followed(shard, behind, state) => {
                let at = usize::from(shard.0);
                self.metrics[at].state(state.rows, state.bytes);
                // An owner's figure: nodes are added up.
                self.metrics[at].lag(0);
                self.shared.followed(shard, behind as u64);
                self.tell(shard, Happened::Committed, ctx);
            }
            Event::Committed(shard, committed, state) => {
                let at = usize::from(shard.0);
                self.shared.measured.committed(shard, &committed);
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
            Event::Checkpoint(shard, None) => self.shared.written(shard),
            Event::Checkpoint(shard, Some(job)) => {
                let written = self.checkpoints.send(WriteCheckpoint { job, shard });
                // Not waited for: at most one a shard is under way, and shards need not stop for it.
                ctx.spawn(written.into_actor(self).map(|_, _, _| ()));
            }
            Event::Stopped(
                shard,
                reason @ (StopReason::TakenOver { .. } | StopReason::Outranked { .. }),
            ) if self.shared.leased => {
                tracing::warn!(%shard, %reason, "shard lost");
                self.metrics[usize::from(shard.0)].lag(0);
                let found = match reason {
                    StopReason::Outranked { found, .. } => found,
                    _ => 0,
                };
                self.shared.lost[usize::from(shard.0)].store(found, Ordering::Relaxed);
                self.tell(shard, Happened::TakenOver, ctx);
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
    reader: Option<JoinHandle<()>>,
    following: Option<JoinHandle<()>>,
    /// Counts openings, so that a delayed one that is out of date is told from the present one.
    openings: u64,
}

fn stop(reader: &mut Option<JoinHandle<()>>) {
    if let Some(reader) = reader.take() {
        reader.abort();
    }
}

impl ShardActor {
    fn new(spec: ShardSpec, shared: Arc<NodeShared>, events: mpsc::Sender<Event>) -> ShardActor {
        let life = Lifecycle::default();
        ShardActor { spec, shared, events, life, reader: None, following: None, openings: 0 }
    }

    fn tell_worker(&self, command: Command, ctx: &mut Context<Self>) {
        let (shared, shard) = (self.shared.clone(), self.spec.id);
        let tell = async move { shared.tell(shard, command).await };
        // One after the other: the order of commands is the order of decisions.
        ctx.wait(tell.into_actor(self));
    }

    fn act(&mut self, action: Action, ctx: &mut Context<Self>) {
        let shard = self.spec.id;
        match action {
            Action::OpenAfter(wait) => {
                self.openings += 1;
                let opening = self.openings;
                let later = tokio::time::sleep(wait).into_actor(self).map(
                    move |(), actor: &mut ShardActor, ctx| {
                        // Unless it was let go of meanwhile, or is opened again for another reason.
                        if actor.openings == opening && *actor.life.state() == State::Restore {
                            let spec = Box::new(actor.spec.clone());
                            let open = Command::Open(spec, actor.life.goal());
                            actor.tell_worker(open, ctx);
                        }
                    },
                );
                ctx.spawn(later);
            }
            Action::OwnIt(token) => self.tell_worker(Command::Own(shard, token), ctx),
            Action::ReleaseIt => self.tell_worker(Command::Release(shard), ctx),
            Action::DropIt => self.tell_worker(Command::Drop(shard), ctx),
            Action::DrainIt => self.tell_worker(Command::Drain(shard), ctx),
            Action::StartReader => {
                if self.reader.as_ref().is_none_or(JoinHandle::is_finished) {
                    let from = self.spec.progress.borrow().usage + 1;
                    let reading = read_usage(self.shared.clone(), shard, from, self.events.clone());
                    self.reader = Some(self.shared.runtime.spawn(reading));
                }
            }
            Action::StartFollowing => {
                if self.following.as_ref().is_none_or(JoinHandle::is_finished) {
                    let from = self.spec.progress.borrow().commit + 1;
                    let reading =
                        read_commits(self.shared.clone(), shard, from, self.events.clone());
                    self.following = Some(self.shared.runtime.spawn(reading));
                }
            }
            Action::StopFollowing => stop(&mut self.following),
            Action::StopReaders => {
                stop(&mut self.reader);
                stop(&mut self.following);
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
        let at = usize::from(self.spec.id.0);
        self.shared.tokens[at].store(self.life.goal().unwrap_or(0), Ordering::Relaxed);
        *self.shared.states[at].lock() = (state, problem);
        // Whoever decides about leases looks again.
        self.shared.shards_changed.notify_one();
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
        let CheckpointJob { manifest, chunks, opening } = job;
        let written = self.store.write(&manifest, &chunks);
        if written.is_ok()
            && manifest.index == 0
            && let Err(error) = self.store.prune(shard, self.keep)
        {
            tracing::warn!(%shard, %error, "old checkpoints could not be pruned");
        }
        for notice in self.store.take_notices() {
            match notice {
                Notice::Lost(notice) => {
                    tracing::error!(
                        notice,
                        "checkpoint store; what is missing is rebuilt from the log"
                    );
                }
                Notice::Later(notice) => tracing::warn!(notice, "checkpoint store; trying on"),
            }
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
        self.shared.written(shard);
        let shared = self.shared.clone();
        let told = async move {
            shared.tell(shard, Command::Checkpointed(shard, opening, written.is_ok())).await;
        };
        ctx.spawn(told.into_actor(self));
    }
}
