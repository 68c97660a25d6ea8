//! A thread that runs the dataflows of several shards.
//!
//! Each thread has one single-threaded timely worker of its own and hosts shards as separate
//! dataflows, so a shard can be started, stopped and moved alone, and a panic costs one thread's
//! shards. Work comes by a bounded channel: everything that waits there is taken first, then every
//! shard with input closes an epoch. Appends are awaited on the runtime; their outcome comes back by
//! the same channel.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
use meterr_connectors::log::{LogError, Record};
use meterr_operators::control::ControlChange;
use meterr_operators::ids::ShardId;
use timely::WorkerConfig;
use timely::communication::Allocator;
use timely::communication::allocator::thread::Thread;
use timely::worker::Worker;
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use crate::live::{CheckpointJob, Committed, LiveShard, Progress, Query, ShardSpec, StopReason};

/// Commands that may wait. Usage is bounded by credits below this, so it never blocks the runtime.
const COMMANDS_MAX: usize = 4096;

/// No shard is being worked on.
const NOBODY: u32 = u32::MAX;

/// What a worker is told.
pub enum Command {
    /// Open a shard.
    Open(Box<ShardSpec>),
    /// Usage for a shard.
    Usage(ShardId, Vec<Record>, OwnedSemaphorePermit),
    /// Control changes, for every shard of the thread.
    Control(Arc<Vec<(u64, ControlChange)>>),
    /// The outcome of a commit's append.
    Appended(ShardId, Result<u64, LogError>),
    /// The outcome of a checkpoint's writing.
    Checkpointed(ShardId, bool),
    /// A query.
    Query(ShardId, Query),
    /// Finish what came in, take a last checkpoint and close.
    Drain(ShardId),
    /// End the thread. Shards still open are dropped as they are.
    End,
}

/// What a worker tells.
pub enum Event {
    /// Replay goes on: first, present and last position.
    Replaying(ShardId, u64, u64, u64),
    /// The shard is live.
    Opened(ShardId, Progress),
    /// An epoch is committed.
    Committed(ShardId, Committed, State),
    /// A checkpoint is to be written.
    Checkpoint(ShardId, CheckpointJob),
    /// The shard stopped.
    Stopped(ShardId, StopReason),
    /// The shard drained and is closed.
    Drained(ShardId),
    /// The thread died; the shard it worked on, if any, and what the panic said.
    Panicked(usize, Option<ShardId>, String),
}

/// Size of a shard's state.
#[derive(Debug, Clone, Copy, Default)]
pub struct State {
    /// Rows of views.
    pub rows: u64,
    /// Bytes of views and remembered ids.
    pub bytes: u64,
    /// Ids remembered.
    pub ids: u64,
}

/// A running worker thread.
pub struct WorkerHandle {
    commands: Sender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl WorkerHandle {
    /// Starts a thread. Events go to `events`; appends are awaited on `runtime`.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start(
        index: usize,
        events: mpsc::Sender<Event>,
        runtime: tokio::runtime::Handle,
    ) -> std::io::Result<WorkerHandle> {
        let (commands, receiver) = bounded(COMMANDS_MAX);
        let sender = commands.clone();
        let thread = std::thread::Builder::new().name(format!("meterr-worker-{index}")).spawn(
            move || {
                let current = Arc::new(AtomicU32::new(NOBODY));
                let seen = current.clone();
                let told = events.clone();
                let run = AssertUnwindSafe(|| run(&receiver, &sender, &events, &runtime, &current));
                if let Err(panic) = catch_unwind(run) {
                    let at = seen.load(Ordering::Relaxed);
                    let shard = (at != NOBODY).then_some(ShardId(at as u16));
                    let event = Event::Panicked(index, shard, panic_text(&*panic));
                    // The node may be gone already; then nobody needs to know.
                    drop(told.blocking_send(event));
                }
            },
        )?;
        Ok(WorkerHandle { commands, thread: Some(thread) })
    }

    /// Hands a command over without blocking.
    ///
    /// # Errors
    /// Gives the command back when the queue is full or the thread is gone.
    pub fn tell(&self, command: Command) -> Result<(), Box<Command>> {
        self.commands.try_send(command).map_err(|error| match error {
            TrySendError::Full(command) | TrySendError::Disconnected(command) => Box::new(command),
        })
    }

    /// A sender for tasks that feed the thread.
    pub fn sender(&self) -> Sender<Command> {
        self.commands.clone()
    }

    /// Ends the thread and waits for it.
    pub fn end(mut self) {
        // A full queue is read on; a dead thread needs no command.
        drop(self.commands.send(Command::End));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "panic".to_owned())
}

/// A single-threaded timely worker that merges while idle and parks at once: on small machines a
/// spinning worker takes the core the runtime needs.
pub fn timely_worker() -> Worker {
    let mut config = WorkerConfig::default();
    let merging = differential_dataflow::Config::default().idle_merge_effort(Some(1000));
    differential_dataflow::configure(&mut config, &merging);
    let config = config.idle_spin(Duration::ZERO);
    Worker::new(config, Allocator::Thread(Thread::default()), Some(Instant::now()))
}

struct Hosted {
    live: LiveShard,
    draining: bool,
    /// Whether the last checkpoint was tried: a failing one must not hold up the end.
    last_taken: bool,
}

fn run(
    receiver: &Receiver<Command>,
    sender: &Sender<Command>,
    events: &mpsc::Sender<Event>,
    runtime: &tokio::runtime::Handle,
    current: &AtomicU32,
) {
    let mut worker = timely_worker();
    let mut shards: BTreeMap<ShardId, Hosted> = BTreeMap::new();
    // A closed channel means that the node is gone: then there is nobody to tell.
    let tell = |event| drop(events.blocking_send(event));
    loop {
        let first = match receiver.recv_timeout(Duration::from_millis(200)) {
            Ok(command) => Some(command),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if first.is_none() {
            // Idle: let arrangements merge.
            worker.step();
        }
        let mut stopped: Vec<(ShardId, StopReason)> = Vec::new();
        for command in first.into_iter().chain(receiver.try_iter()) {
            match command {
                Command::End => {
                    for (_, hosted) in shards {
                        hosted.live.close(&mut worker);
                    }
                    return;
                }
                Command::Open(spec) => {
                    let id = spec.id;
                    current.store(u32::from(id.0), Ordering::Relaxed);
                    let heard = |from, at, to| tell(Event::Replaying(id, from, at, to));
                    match LiveShard::open(&mut worker, *spec, heard) {
                        Ok(live) => {
                            tell(Event::Opened(id, live.progress()));
                            shards.insert(id, Hosted { live, draining: false, last_taken: false });
                        }
                        Err(reason) => tell(Event::Stopped(id, reason)),
                    }
                }
                Command::Usage(id, records, credit) => {
                    if let Some(hosted) = shards.get_mut(&id) {
                        hosted.live.give_usage(records, credit);
                    }
                }
                Command::Control(changes) => {
                    for hosted in shards.values_mut() {
                        hosted.live.give_control(&changes);
                    }
                }
                Command::Appended(id, result) => {
                    let Some(hosted) = shards.get_mut(&id) else { continue };
                    match hosted.live.committed(result) {
                        Ok(committed) => {
                            let state = state(&mut hosted.live);
                            tell(Event::Committed(id, committed, state));
                        }
                        Err(reason) => stopped.push((id, reason)),
                    }
                }
                Command::Checkpointed(id, written) => {
                    if let Some(hosted) = shards.get_mut(&id) {
                        hosted.live.checkpointed(written);
                    }
                }
                Command::Query(id, query) => {
                    // Without the shard the query is dropped, and whoever asked hears that.
                    if let Some(hosted) = shards.get_mut(&id) {
                        hosted.live.query(query);
                    }
                }
                Command::Drain(id) => match shards.get_mut(&id) {
                    Some(hosted) => hosted.draining = true,
                    None => tell(Event::Drained(id)),
                },
            }
        }
        for (id, reason) in stopped {
            if let Some(hosted) = shards.remove(&id) {
                hosted.live.close(&mut worker);
            }
            tell(Event::Stopped(id, reason));
        }
        let ids: Vec<ShardId> = shards.keys().copied().collect();
        for id in ids {
            current.store(u32::from(id.0), Ordering::Relaxed);
            let Some(hosted) = shards.get_mut(&id) else { continue };
            match work(hosted, &mut worker, sender, runtime) {
                Ok(Some(job)) => tell(Event::Checkpoint(id, job)),
                Ok(None) => {}
                Err(reason) => {
                    if let Some(hosted) = shards.remove(&id) {
                        hosted.live.close(&mut worker);
                    }
                    tell(Event::Stopped(id, reason));
                    continue;
                }
            }
            if hosted_done(&shards, id)
                && let Some(hosted) = shards.remove(&id)
            {
                hosted.live.close(&mut worker);
                tell(Event::Drained(id));
            }
        }
        current.store(NOBODY, Ordering::Relaxed);
    }
}

fn hosted_done(shards: &BTreeMap<ShardId, Hosted>, id: ShardId) -> bool {
    shards.get(&id).is_some_and(|hosted| {
        hosted.draining && !hosted.live.busy() && !hosted.live.checkpoint_under_way()
    })
}

/// Lets one shard take a checkpoint or close an epoch, whichever is due.
fn work(
    hosted: &mut Hosted,
    worker: &mut Worker,
    sender: &Sender<Command>,
    runtime: &tokio::runtime::Handle,
) -> Result<Option<CheckpointJob>, StopReason> {
    // A checkpoint first: it wants a moment without a commit under way, which a loaded shard has only
    // between two of them.
    let last = hosted.draining && !hosted.live.busy() && !hosted.last_taken;
    hosted.last_taken |= last;
    let job = hosted.live.checkpoint(last)?;
    if let Some(append) = hosted.live.pump(worker)? {
        let (sender, id) = (sender.clone(), hosted.live.id());
        runtime.spawn(async move {
            let mut command = Command::Appended(id, append.await);
            // The queue is as long as all that can wait for; a full one is momentary.
            while let Err(TrySendError::Full(back)) = sender.try_send(command) {
                command = back;
                tokio::task::yield_now().await;
            }
        });
    }
    Ok(job)
}

fn state(live: &mut LiveShard) -> State {
    let shard = live.shard();
    let ids = shard.dedupe().len();
    let id_bytes = shard.dedupe().bytes() as u64;
    let shared = shard.flow().shared().borrow();
    let rows =
        meterr_operators::rollup::ALL_VIEWS.iter().map(|v| shared.rollup.table(*v).len() as u64);
    State { rows: rows.sum(), bytes: shared.rollup.bytes() as u64 + id_bytes, ids }
}
