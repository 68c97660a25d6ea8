//! How a shard's state is rebuilt: its checkpoint is loaded, then its logs are replayed in silence to
//! the last commit.
//!
//! In two halves, so that neither stops the other shards of a thread for long: [`load`] fetches and
//! decodes, on any thread; [`Opening`] builds the state on the worker's thread, in steps.

use std::collections::{HashMap, VecDeque};
use std::iter::Peekable;
use std::time::{Duration, Instant};

use futures::FutureExt;
use futures::executor::block_on;
use futures::future::BoxFuture;
use meterr_connectors::checkpoint::{Kind, Manifest};
use meterr_connectors::codec::decode_message;
use meterr_connectors::log::{Log, LogResult, Record};
use meterr_operators::control::ControlChange;
use meterr_operators::dedupe::Place;
use meterr_operators::event::Event;
use meterr_operators::shard::{History, Incoming, Shard, ShardState};
use timely::worker::Worker;

use super::{CheckpointState, ShardSpec, StopReason};
use crate::announce::Epochs;
use crate::records::{
    READ_BYTES, control_changes, each_commit, message_hash, orgs_of, parse_commit,
};
use crate::recovery::{self, Alarm, Facts};
use crate::snapshot;
use crate::wire::Commit;

/// Events of neighbouring epochs that are replayed as one.
const TOGETHER: usize = 50_000;

/// Reads replaced versions back from the usage log.
struct LogHistory<'a>(&'a dyn Log);

impl History for LogHistory<'_> {
    fn event_at(&mut self, place: Place) -> Result<Event<'static>, String> {
        let records = block_on(self.0.read(place.position, 1)).map_err(|e| e.to_string())?;
        let record = records.into_iter().next().filter(|r| r.position == place.position);
        let record = record.ok_or("the log does not have that position")?;
        let decoded = decode_message(&record.message);
        let line = decoded.lines().find(|(number, ..)| *number == place.line);
        let (_, _, event) = line.ok_or("the message has no such line")?;
        event.map(Event::into_owned).map_err(|rejection| rejection.to_string())
    }
}

/// Takes one record into a shard; returns the number of its lines.
pub(super) fn take(
    shard: &mut Shard,
    record: &Record,
    usage: &dyn Log,
) -> Result<usize, StopReason> {
    let decoded = decode_message(&record.message);
    let mut lines = 0;
    let message = Incoming {
        position: record.position,
        time: record.time,
        subject: &record.message.subject,
        lines: decoded.lines().inspect(|_| lines += 1),
    };
    shard.message(message, &mut LogHistory(usage))?;
    Ok(lines)
}

/// What checkpoint and logs hold of a shard.
pub struct Loaded {
    plan: recovery::Plan,
    /// Control changes up to the checkpoint's position.
    known: Vec<(u64, ControlChange)>,
    states: Vec<ShardState>,
    epochs: Epochs,
    /// The last commit record and its position.
    commit: Option<(u64, Commit)>,
    /// Commit records behind the checkpoint.
    commits: Vec<(u64, Commit)>,
    /// Epochs of orgs in the parts of those.
    touched: HashMap<String, u64>,
    /// Control changes behind the checkpoint.
    changes: Vec<(u64, ControlChange)>,
    checkpoint: CheckpointState,
}

/// Fetches and decodes what a shard's state is rebuilt from. Writes nothing.
///
/// # Errors
/// Why the shard must not go on.
pub fn load(spec: &ShardSpec) -> Result<Loaded, StopReason> {
    let ShardSpec { logs, id, .. } = spec;
    // The checkpoint first: its owner may be at work and write commits and checkpoints meanwhile, and a
    // checkpoint is of a commit that stands.
    let chain = spec
        .checkpoints
        .load(*id, None)
        .map_err(|error| StopReason::Checkpoint(error.to_string()))?;
    // Then the last commit: what it counts up to is then known to be in the other logs.
    block_on(logs.out.refresh())?;
    let commit = match block_on(logs.out.last_commit())? {
        Some(record) => Some((record.position, parse_commit(&record)?)),
        None => None,
    };
    block_on(logs.usage.refresh())?;
    block_on(logs.control.refresh())?;
    let newest = chain.as_ref().and_then(|chain| chain.last()).map(|(manifest, _)| manifest);
    let usage_hash = match newest {
        Some(manifest) if manifest.usage_position > 0 => {
            let records = block_on(logs.usage.read(manifest.usage_position, 1))?;
            records.first().map(|record| message_hash(&record.message))
        }
        _ => None,
    };
    let plan = recovery::plan(&Facts {
        checkpoint: newest,
        commit: commit.as_ref().map(|(_, commit)| commit),
        usage_log: &logs.usage.identity().uuid,
        control_log: &logs.control.identity().uuid,
        usage_head: logs.usage.head(),
        control_head: logs.control.head(),
        usage_hash,
    })?;
    let mut checkpoint = CheckpointState {
        at: Instant::now(),
        epoch: 0,
        generation: 0,
        index: 0,
        base_bytes: 0,
        delta_bytes: 0,
        base_due: true,
        under_way: false,
    };
    let (mut known, mut states, mut epochs) = (Vec::new(), Vec::new(), Epochs::default());
    if let Some(chain) = chain.filter(|_| plan.load) {
        let (base, rest) = chain.split_first().expect("a chain has its base");
        let last = rest.last().unwrap_or(base);
        known = control_changes(&*logs.control, 1, Some(last.0.control_position))?;
        checkpoint.epoch = last.0.epoch;
        checkpoint.generation = last.0.generation;
        checkpoint.index = last.0.index;
        checkpoint.base_bytes = base.0.bytes;
        checkpoint.delta_bytes = rest.iter().map(|(manifest, _)| manifest.bytes).sum();
        // Damage may have hidden newer checkpoints: then the next one begins a generation above them.
        let newest = spec.checkpoints.list(*id).ok().and_then(newest_of);
        checkpoint.base_due = newest.as_ref() != Some(&last.0);
        if let Some(newest) = newest {
            checkpoint.generation = checkpoint.generation.max(newest.generation);
        }
        for (_, chunks) in chain {
            let decoded = snapshot::decode(&chunks);
            let (state, kept) =
                decoded.map_err(|error| StopReason::Checkpoint(error.to_string()))?;
            states.push(state);
            epochs.restore(kept);
        }
    }
    let mut commits = Vec::new();
    let mut touched: HashMap<String, u64> = HashMap::new();
    let newest = commit.as_ref().map_or(0, |(position, _)| *position);
    each_commit(&*logs.out, plan.commit_from, |position, commit, parts| {
        if position > newest {
            // Its owner goes on meanwhile; that is followed, once the state stands by.
            return Ok(());
        }
        for part in parts {
            for org in orgs_of(&part.message.payload) {
                touched.insert(org, commit.epoch);
            }
        }
        commits.push((position, commit));
        Ok(())
    })?;
    let changes = control_changes(&*logs.control, plan.control_from, None)?;
    Ok(Loaded { plan, known, states, epochs, commit, commits, touched, changes, checkpoint })
}

fn newest_of(mut list: Vec<Manifest>) -> Option<Manifest> {
    debug_assert!(list.first().is_none_or(|first| first.kind == Kind::Base));
    list.pop()
}

/// A shard's state rebuilt from checkpoint and logs.
pub struct Rebuilt {
    /// The state at the last commit.
    pub shard: Shard,
    /// What was decided.
    pub plan: recovery::Plan,
    /// The last commit record and its position.
    pub commit: Option<(u64, Commit)>,
    /// When each org changed last.
    pub epochs: Epochs,
    pub(super) checkpoint: CheckpointState,
}

/// A state being rebuilt.
pub struct Opening {
    shard: Shard,
    plan: recovery::Plan,
    epochs: Epochs,
    commit: Option<(u64, Commit)>,
    touched: HashMap<String, u64>,
    checkpoint: CheckpointState,
    commits: std::vec::IntoIter<(u64, Commit)>,
    /// The epoch being replayed.
    at: Option<Commit>,
    changes: Peekable<std::vec::IntoIter<(u64, ControlChange)>>,
    /// Usage read and not yet taken in.
    waiting: VecDeque<Record>,
    /// The read under way: ahead of what is taken in, so that neither waits for the other.
    reading: Option<BoxFuture<'static, LogResult<Vec<Record>>>>,
    next: u64,
    last: u64,
}

/// Where a replay stands after a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// There is more to do at once.
    Goes,
    /// It waits for a log.
    Waits,
    /// The last commit is reached.
    Reached,
}

impl Opening {
    /// Builds the state of the checkpoint.
    ///
    /// # Errors
    /// When it does not fit together.
    pub fn begin(
        worker: &mut Worker,
        spec: &ShardSpec,
        loaded: Loaded,
    ) -> Result<Opening, StopReason> {
        let mut shard = Shard::new(worker, spec.id, spec.shards, spec.key, spec.views);
        shard.allow_time_jump(spec.time_jump_max);
        shard.want_deltas();
        let Loaded { plan, known, states, epochs, commit, commits, touched, changes, checkpoint } =
            loaded;
        let restore = || -> Result<(), StopReason> {
            for (position, change) in &known {
                shard.control(worker, *position, change)?;
            }
            if !states.is_empty() {
                shard.restore(worker, states)?;
            }
            Ok(())
        };
        if let Err(reason) = restore() {
            shard.close(worker);
            return Err(reason);
        }
        let last = commits.last().map_or(0, |(_, commit)| commit.usage_position);
        Ok(Opening {
            shard,
            next: plan.usage_from,
            last: last.max(plan.usage_from.saturating_sub(1)),
            plan,
            epochs,
            commit,
            touched,
            checkpoint,
            commits: commits.into_iter(),
            at: None,
            changes: changes.into_iter().peekable(),
            waiting: VecDeque::new(),
            reading: None,
        })
    }

    /// Replays committed epochs in silence for about as long as told. Neighbouring epochs without a
    /// control change between them are taken as one: only control changes make a boundary matter.
    ///
    /// # Errors
    /// Why the shard must not go on.
    pub fn step(
        &mut self,
        worker: &mut Worker,
        spec: &ShardSpec,
        long: Duration,
    ) -> Result<Step, StopReason> {
        let until = Instant::now() + long;
        loop {
            if self.at.is_none() {
                let Some((_, commit)) = self.commits.by_ref().find(|(_, commit)| !commit.seal)
                else {
                    self.shard.close_epoch(worker, self.plan.epoch);
                    return Ok(Step::Reached);
                };
                let mut changed = false;
                let due = commit.control_position;
                while let Some((position, change)) = self.changes.next_if(|(p, _)| *p <= due) {
                    if !changed {
                        self.shard.close_epoch(worker, commit.epoch.saturating_sub(1));
                        changed = true;
                    }
                    self.shard.control(worker, position, &change)?;
                }
                self.at = Some(commit);
            }
            let Some(commit) = &self.at else { continue };
            while self.next <= commit.usage_position {
                if Instant::now() >= until {
                    return Ok(Step::Goes);
                }
                if self.waiting.is_empty() {
                    let reading = self.reading.take();
                    let mut reading =
                        reading.unwrap_or_else(|| spec.logs.usage.read(self.next, READ_BYTES));
                    let Some(records) = (&mut reading).now_or_never() else {
                        self.reading = Some(reading);
                        return Ok(Step::Waits);
                    };
                    self.waiting = records?.into();
                    self.reading = match self.waiting.back() {
                        Some(read) if read.position < self.last => {
                            Some(spec.logs.usage.read(read.position + 1, READ_BYTES))
                        }
                        _ => None,
                    };
                }
                let Some(record) = self.waiting.pop_front() else {
                    let head = self.next.saturating_sub(1);
                    let published = commit.usage_position;
                    return Err(Alarm::RolledBack { what: "usage", head, published }.into());
                };
                self.next = record.position + 1;
                take(&mut self.shard, &record, &*spec.logs.usage)?;
            }
            if self.shard.pending() >= TOGETHER || self.shard.has_dead() {
                self.shard.close_epoch(worker, commit.epoch);
            }
            self.at = None;
        }
    }

    /// Waits for the log.
    fn wait(&mut self) {
        if let Some(reading) = self.reading.take() {
            let read = block_on(reading);
            self.reading = Some(Box::pin(futures::future::ready(read)));
        }
    }

    /// How far it is: first, present and last usage position of the replay.
    pub fn progress(&self) -> (u64, u64, u64) {
        (self.plan.usage_from.saturating_sub(1), self.next.saturating_sub(1), self.last)
    }

    /// The state, once [`Opening::step`] has reached the last commit.
    pub fn finish(self) -> Rebuilt {
        let Opening { mut shard, plan, commit, mut epochs, touched, checkpoint, .. } = self;
        for (org, epoch) in touched {
            let number = shard.flow().shared().borrow().names.org(&org);
            if let Some(number) = number {
                epochs.raise(number, epoch);
            }
        }
        shard.flow().shared().borrow_mut().rollup.clear_changes();
        shard.take_withdrawn();
        Rebuilt { shard, plan, commit, epochs, checkpoint }
    }

    /// Gives the rebuilding up.
    pub fn close(self, worker: &mut Worker) {
        self.shard.close(worker);
    }
}

/// Rebuilds a shard in one go. `heard` is told of the replay's progress. Writes nothing.
///
/// # Errors
/// Why it must not go on.
pub fn rebuild(
    worker: &mut Worker,
    spec: &ShardSpec,
    mut heard: impl FnMut(u64, u64, u64),
) -> Result<Rebuilt, StopReason> {
    let mut opening = Opening::begin(worker, spec, load(spec)?)?;
    loop {
        let reached = opening.step(worker, spec, Duration::from_secs(1));
        let (from, at, to) = opening.progress();
        heard(from, at, to);
        match reached {
            Ok(Step::Reached) => return Ok(opening.finish()),
            Ok(Step::Goes) => {}
            Ok(Step::Waits) => opening.wait(),
            Err(reason) => {
                opening.close(worker);
                return Err(reason);
            }
        }
    }
}
