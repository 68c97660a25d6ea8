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
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use crate::live::opening::{Loaded, Opening, Step, load};
use crate::live::standing_by::FollowedCommit;
use crate::live::{CheckpointJob, Committed, LiveShard, Progress, Query, ShardSpec, StopReason};

/// Commands that may wait. Usage is bounded by credits below this, so it never blocks the runtime.
const COMMANDS_MAX: usize = 4096;

/// No shard is being worked on.
const NOBODY: u32 = u32::MAX;

/// Longest a shard that is opened or followed keeps the others of its thread waiting at a time.
const STEP: Duration = Duration::from_millis(10);

/// Longest wait for a command while nothing is under way.
const IDLE: Duration = Duration::from_millis(200);

/// Wait for a command while a shard waits for its log.
const POLL: Duration = Duration::from_millis(2);

/// Shards of a thread whose checkpoints are fetched and decoded at once.
const LOADS_MAX: usize = 2;

/// What a worker is told.
pub enum Command {
    /// Open a shard: to own it under at least this token, or to let it stand by.
    Open(Box<ShardSpec>, Option<u64>),
    /// The outcome of fetching what an opening needs; which opening it was.
    Loaded(ShardId, u64, Result<Box<Loaded>, StopReason>),
    /// Take a shard over under at least this token, once it has followed to the end.
    Own(ShardId, u64),
    /// The outcome of a sealing record's append; of which opening.
    Sealed(ShardId, u64, Result<u64, LogError>),
    /// Commits of the owner of a shard that stands by.
    Commits(ShardId, Vec<FollowedCommit>, OwnedSemaphorePermit),
    /// Finish the commit under way and stand by from then on.
    Release(ShardId),
    /// Close a shard as it is.
    Drop(ShardId),
    /// Usage for a shard.
    Usage(ShardId, Vec<Record>, OwnedSemaphorePermit),
    /// Control changes, for every shard of the thread.
    Control(Arc<Vec<(u64, ControlChange)>>),
    /// The outcome of a commit's append; of which opening.
    Appended(ShardId, u64, Result<u64, LogError>),
    /// The outcome of a checkpoint's writing; of which opening.
    Checkpointed(ShardId, u64, bool),
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
    /// The shard stands by.
    Opened(ShardId, Progress),
    /// The shard is owned: it stands sealed.
    Owned(ShardId, Progress),
    /// It could not be sealed since another commit came between, which is to be followed first.
    Overtaken(ShardId),
    /// A shard that stands by took in commits; how many wait still.
    Followed(ShardId, usize, State),
    /// The shard is not owned any more and stands by.
    Released(ShardId),
    /// An epoch is committed.
    Committed(ShardId, Committed, State),
    /// A checkpoint is to be written; or none is, after [`Event::Released`].
    Checkpoint(ShardId, Option<CheckpointJob>),
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

/// A shard on this thread.
struct Hosted {
    stage: Stage,
    /// Which opening it is: what an earlier one still awaited does not concern it.
    opening: u64,
    /// Token under which it is to be owned, if it is and not yet.
    wanted: Option<u64>,
    releasing: bool,
    draining: bool,
    /// Whether the last checkpoint was tried: a failing one must not hold up the end.
    last_taken: bool,
}

enum Stage {
    /// What it needs is being fetched.
    Loading(Box<ShardSpec>),
    /// Its state is being rebuilt.
    Opening(Box<ShardSpec>, Box<Opening>),
    /// It stands by or is owned.
    Open(Box<LiveShard>),
}

/// What there is of a shard after it was worked on.
enum Worked {
    /// Nothing to do until something comes.
    Waits,
    /// It waits for something that does not come as a command.
    Polls,
    /// There is more to do at once.
    Goes,
    /// It is done.
    Done,
}

/// Everything on this thread.
struct Hosts<'a> {
    worker: Worker,
    shards: BTreeMap<ShardId, Hosted>,
    sender: &'a Sender<Command>,
    events: &'a mpsc::Sender<Event>,
    runtime: &'a tokio::runtime::Handle,
    loads: Arc<Semaphore>,
    openings: u64,
    /// The shard being worked on, for whoever looks after a panic.
    current: &'a AtomicU32,
}

fn run(
    receiver: &Receiver<Command>,
    sender: &Sender<Command>,
    events: &mpsc::Sender<Event>,
    runtime: &tokio::runtime::Handle,
    current: &AtomicU32,
) {
    let mut hosts = Hosts {
        worker: timely_worker(),
        shards: BTreeMap::new(),
        sender,
        events,
        runtime,
        loads: Arc::new(Semaphore::new(LOADS_MAX)),
        openings: 0,
        current,
    };
    let mut wait = IDLE;
    loop {
        let first = match receiver.recv_timeout(wait) {
            Ok(command) => Some(command),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => return,
        };
        if first.is_none() && wait == IDLE {
            // Idle: let arrangements merge.
            hosts.worker.step();
        }
        for command in first.into_iter().chain(receiver.try_iter()) {
            if matches!(command, Command::End) {
                let ids: Vec<ShardId> = hosts.shards.keys().copied().collect();
                ids.into_iter().for_each(|id| hosts.close(id));
                return;
            }
            hosts.hear(command);
        }
        wait = IDLE;
        let ids: Vec<ShardId> = hosts.shards.keys().copied().collect();
        for id in ids {
            current.store(u32::from(id.0), Ordering::Relaxed);
            match hosts.work(id) {
                Ok(Worked::Waits) => {}
                Ok(Worked::Polls) => wait = wait.min(POLL),
                Ok(Worked::Goes) => wait = Duration::ZERO,
                Ok(Worked::Done) => {
                    hosts.close(id);
                    hosts.tell(Event::Drained(id));
                }
                Err(reason) => hosts.stop(id, reason),
            }
        }
        current.store(NOBODY, Ordering::Relaxed);
    }
}

impl Hosts<'_> {
    fn tell(&self, event: Event) {
        // A closed channel means that the node is gone: then there is nobody to tell.
        drop(self.events.blocking_send(event));
    }

    fn close(&mut self, id: ShardId) {
        match self.shards.remove(&id).map(|hosted| hosted.stage) {
            Some(Stage::Open(live)) => live.close(&mut self.worker),
            Some(Stage::Opening(_, opening)) => opening.close(&mut self.worker),
            Some(Stage::Loading(..)) | None => {}
        }
    }

    fn stop(&mut self, id: ShardId, reason: StopReason) {
        self.close(id);
        self.tell(Event::Stopped(id, reason));
    }

    /// Awaits something on the runtime and hears of its outcome as a command.
    fn await_for(&self, outcome: impl Future<Output = Command> + Send + 'static) {
        let sender = self.sender.clone();
        self.runtime.spawn(async move {
            let mut command = outcome.await;
            // The queue is as long as all that can wait for; a full one is momentary.
            while let Err(TrySendError::Full(back)) = sender.try_send(command) {
                command = back;
                tokio::task::yield_now().await;
            }
        });
    }

    fn live(&mut self, id: ShardId) -> Option<&mut LiveShard> {
        match &mut self.shards.get_mut(&id)?.stage {
            Stage::Open(live) => Some(live),
            _ => None,
        }
    }

    /// The shard, if it is the one of this opening.
    fn live_of(&mut self, id: ShardId, opening: u64) -> Option<&mut LiveShard> {
        self.shards.get(&id).filter(|hosted| hosted.opening == opening)?;
        self.live(id)
    }

    fn hear(&mut self, command: Command) {
        match command {
            Command::End => {}
            Command::Open(spec, wanted) => self.open(spec, wanted),
            Command::Loaded(id, opening, loaded) => self.loaded(id, opening, loaded),
            Command::Own(id, token) => {
                if let Some(hosted) = self.shards.get_mut(&id) {
                    hosted.releasing = false;
                    hosted.wanted = Some(token);
                }
            }
            Command::Sealed(id, opening, outcome) => {
                let Some(live) = self.live_of(id, opening) else { return };
                let sealed = live.sealed(outcome);
                let progress = live.progress();
                match sealed {
                    Ok(true) => {
                        if let Some(hosted) = self.shards.get_mut(&id) {
                            hosted.wanted = None;
                        }
                        self.tell(Event::Owned(id, progress));
                    }
                    Ok(false) => self.tell(Event::Overtaken(id)),
                    Err(reason) => self.stop(id, reason),
                }
            }
            Command::Usage(id, records, credit) => {
                if let Some(live) = self.live(id) {
                    live.give_usage(records, credit);
                }
            }
            Command::Commits(id, commits, credit) => {
                if let Some(live) = self.live(id) {
                    live.give_commits(commits, credit);
                }
            }
            Command::Control(changes) => {
                for hosted in self.shards.values_mut() {
                    if let Stage::Open(live) = &mut hosted.stage {
                        live.give_control(&changes);
                    }
                }
            }
            Command::Appended(id, opening, result) => {
                let Some(live) = self.live_of(id, opening) else { return };
                match live.committed(result) {
                    Ok(committed) => {
                        let state = state(live);
                        self.tell(Event::Committed(id, committed, state));
                    }
                    Err(reason) => self.stop(id, reason),
                }
            }
            Command::Checkpointed(id, opening, written) => {
                if let Some(live) = self.live_of(id, opening) {
                    live.checkpointed(written);
                }
            }
            Command::Query(id, query) => {
                // Without the shard the query is dropped, and whoever asked hears that.
                if let Some(live) = self.live(id) {
                    live.query(query);
                }
            }
            Command::Release(id) => match self.shards.get_mut(&id) {
                Some(hosted) => hosted.releasing = true,
                None => {
                    self.tell(Event::Released(id));
                    self.tell(Event::Checkpoint(id, None));
                }
            },
            Command::Drop(id) => self.close(id),
            Command::Drain(id) => match self.shards.get_mut(&id) {
                Some(hosted) => hosted.draining = true,
                None => self.tell(Event::Drained(id)),
            },
        }
    }

    /// Begins to open a shard, in place of what there is of it.
    fn open(&mut self, spec: Box<ShardSpec>, wanted: Option<u64>) {
        let id = spec.id;
        self.close(id);
        self.openings += 1;
        let (opening, loads, of) = (self.openings, self.loads.clone(), (*spec).clone());
        self.await_for(async move {
            let permit = loads.acquire_owned().await;
            let loaded = tokio::task::spawn_blocking(move || load(&of).map(Box::new)).await;
            drop(permit);
            let died = |error: tokio::task::JoinError| StopReason::Checkpoint(error.to_string());
            Command::Loaded(id, opening, loaded.unwrap_or_else(|error| Err(died(error))))
        });
        let hosted = Hosted {
            stage: Stage::Loading(spec),
            opening,
            wanted,
            releasing: false,
            draining: false,
            last_taken: false,
        };
        self.shards.insert(id, hosted);
    }

    fn loaded(&mut self, id: ShardId, opening: u64, loaded: Result<Box<Loaded>, StopReason>) {
        let Some(hosted) = self.shards.get_mut(&id) else { return };
        if hosted.opening != opening {
            return;
        }
        let Stage::Loading(spec) = &hosted.stage else { return };
        let spec = spec.clone();
        self.current.store(u32::from(id.0), Ordering::Relaxed);
        let begun = loaded.and_then(|loaded| Opening::begin(&mut self.worker, &spec, *loaded));
        match begun {
            Ok(opening) => hosted.stage = Stage::Opening(spec, Box::new(opening)),
            Err(reason) => self.stop(id, reason),
        }
    }

    /// Does what is due for one shard.
    fn work(&mut self, id: ShardId) -> Result<Worked, StopReason> {
        let Some(hosted) = self.shards.get_mut(&id) else { return Ok(Worked::Waits) };
        let owned = matches!(&hosted.stage, Stage::Open(live) if live.owned());
        if hosted.draining && !owned {
            let writing = matches!(&hosted.stage, Stage::Open(live) if live.checkpoint_under_way());
            return Ok(if writing { Worked::Waits } else { Worked::Done });
        }
        match &mut hosted.stage {
            Stage::Loading(..) => Ok(Worked::Waits),
            Stage::Opening(spec, opening) => {
                let step = opening.step(&mut self.worker, spec, STEP)?;
                let (from, at, to) = opening.progress();
                if step == Step::Waits {
                    return Ok(Worked::Polls);
                }
                self.tell(Event::Replaying(id, from, at, to));
                if step == Step::Reached {
                    self.opened(id)?;
                }
                Ok(Worked::Goes)
            }
            Stage::Open(live) if owned => {
                let superseded = hosted.wanted.is_some_and(|token| token > live.token());
                if (hosted.releasing || superseded) && !live.committing() {
                    live.step_back();
                    if std::mem::take(&mut hosted.releasing) {
                        hosted.wanted = None;
                        // Said before the checkpoint is encoded: somebody waits for the shard.
                        let opening = hosted.opening;
                        self.tell(Event::Released(id));
                        let job = self.live(id).map_or(Ok(None), LiveShard::last_checkpoint)?;
                        let job = job.map(|job| CheckpointJob { opening, ..job });
                        self.tell(Event::Checkpoint(id, job));
                    }
                    return Ok(Worked::Goes);
                }
                if hosted.wanted.is_some() && !superseded {
                    hosted.wanted = None;
                    let progress = live.progress();
                    self.tell(Event::Owned(id, progress));
                }
                self.commit(id)
            }
            Stage::Open(live) => {
                if hosted.releasing {
                    hosted.releasing = false;
                    hosted.wanted = None;
                    self.tell(Event::Released(id));
                    self.tell(Event::Checkpoint(id, None));
                    return Ok(Worked::Goes);
                }
                let changed = live.follow_commits(&mut self.worker, STEP)?;
                if changed {
                    let (behind, state) = (live.behind(), state(live));
                    self.tell(Event::Followed(id, behind, state));
                    return Ok(Worked::Goes);
                }
                if let Some(token) = hosted.wanted
                    && live.sealable()
                {
                    let (append, opening) = (live.seal(token)?, hosted.opening);
                    self.await_for(async move { Command::Sealed(id, opening, append.await) });
                }
                Ok(Worked::Waits)
            }
        }
    }

    /// A rebuilt shard stands by.
    fn opened(&mut self, id: ShardId) -> Result<(), StopReason> {
        let Some(hosted) = self.shards.get_mut(&id) else { return Ok(()) };
        let spec = match &hosted.stage {
            Stage::Opening(spec, _) => spec.clone(),
            _ => return Ok(()),
        };
        let loading = Stage::Loading(spec.clone());
        let Stage::Opening(_, opening) = std::mem::replace(&mut hosted.stage, loading) else {
            return Ok(());
        };
        let live = LiveShard::stand_by(*spec, opening.finish())?;
        let progress = live.progress();
        hosted.stage = Stage::Open(Box::new(live));
        self.tell(Event::Opened(id, progress));
        Ok(())
    }

    /// Lets an owned shard take a checkpoint or close an epoch, whichever is due.
    fn commit(&mut self, id: ShardId) -> Result<Worked, StopReason> {
        let Some(hosted) = self.shards.get_mut(&id) else { return Ok(Worked::Waits) };
        let Stage::Open(live) = &mut hosted.stage else { return Ok(Worked::Waits) };
        // A checkpoint first: it wants a moment without a commit under way, which a loaded shard has
        // only between two of them.
        let last = hosted.draining && !live.busy() && !hosted.last_taken;
        hosted.last_taken |= last;
        let job = live.checkpoint(last)?;
        let append = if hosted.releasing { None } else { live.pump(&mut self.worker)? };
        let done = hosted.draining && !live.busy() && job.is_none() && !live.checkpoint_under_way();
        let opening = hosted.opening;
        if let Some(append) = append {
            self.await_for(async move { Command::Appended(id, opening, append.await) });
        }
        if let Some(job) = job {
            let job = CheckpointJob { opening, ..job };
            self.tell(Event::Checkpoint(id, Some(job)));
        }
        Ok(if done { Worked::Done } else { Worked::Waits })
    }
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
