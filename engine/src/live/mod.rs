//! One shard at work on a worker thread: opened from its checkpoint, fed, committed, followed.
//!
//! What is visible is what is committed: queries run, followers hear and checkpoints are taken only
//! while no commit is under way. A crash at any point leaves either no commit record (the input is
//! taken in again) or a commit record (replay is silent).
//!
//! [`opening`] rebuilds the state, [`standing_by`] follows another node's commits and takes over; here
//! is what the owner does.

pub mod opening;
pub mod standing_by;

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::executor::block_on;
use meterr_connectors::api::{AsOf, StreamEvent};
use meterr_connectors::changes::{Announcer, OrgChanges};
use meterr_connectors::checkpoint::{CheckpointStore, Kind, Manifest, chunks_hash};
use meterr_connectors::log::{Log, LogError, Message, Record};
use meterr_operators::control::ControlChange;
use meterr_operators::event::{HashKey, Reason};
use meterr_operators::ids::{Positions, ShardId};
use meterr_operators::rollup::ViewSet;
use meterr_operators::shard::{Counts, Shard, ShardError};
use meterr_operators::time::Time;
use timely::worker::Worker;
use tokio::sync::{OwnedSemaphorePermit, mpsc, watch};

use self::opening::{Rebuilt, rebuild, take};
use self::standing_by::{Behind, Role};
use crate::announce::{self, Epochs};
use crate::epoch::Limits;
use crate::records::{control_changes, followed, message_hash};
use crate::recovery::Alarm;
use crate::settings;
use crate::snapshot;
use crate::wire::{Commit, PartWriter, Parts, Starts, stream_body};

/// The logs of a shard.
#[derive(Clone)]
pub struct Logs {
    /// Usage.
    pub usage: Arc<dyn Log>,
    /// Control.
    pub control: Arc<dyn Log>,
    /// Output.
    pub out: Arc<dyn Log>,
}

/// What a shard needs to be opened.
#[derive(Clone)]
pub struct ShardSpec {
    /// The shard.
    pub id: ShardId,
    /// Number of shards.
    pub shards: u16,
    /// Key of the hashes.
    pub key: HashKey,
    /// Its logs.
    pub logs: Logs,
    /// Where its checkpoints are.
    pub checkpoints: Arc<dyn CheckpointStore>,
    /// Which views it keeps.
    pub views: ViewSet,
    /// When its epochs close.
    pub limits: Limits,
    /// When its checkpoints are taken.
    pub checkpointing: Checkpointing,
    /// Jump of log time that stops it, in microseconds.
    pub time_jump_max: i64,
    /// Committed position, for those who wait.
    pub progress: watch::Sender<Progress>,
    /// Where subscribers outside of this process hear of commits, if anywhere.
    pub announcer: Option<Arc<dyn Announcer>>,
    /// Whether other nodes read and write the same checkpoints.
    pub shared_checkpoints: bool,
}

/// When a checkpoint is taken.
#[derive(Debug, Clone, Copy)]
pub struct Checkpointing {
    /// Time between two.
    pub interval: Duration,
    /// Differences since the last that call for one earlier.
    pub updates_max: usize,
    /// Size of deltas, as share of the base, that calls for a new base.
    pub base_ratio: f64,
}

impl From<&settings::Checkpoint> for Checkpointing {
    fn from(checkpoint: &settings::Checkpoint) -> Checkpointing {
        Checkpointing {
            interval: checkpoint.interval,
            updates_max: checkpoint.events_max as usize,
            base_ratio: checkpoint.base_ratio,
        }
    }
}

/// How far a shard is committed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Epoch.
    pub epoch: u64,
    /// Usage position.
    pub usage: u64,
    /// Control position.
    pub control: u64,
    /// Position of the commit record.
    pub commit: u64,
}

/// Why a shard stopped.
#[derive(Debug, thiserror::Error)]
pub enum StopReason {
    /// What was found at start does not fit together.
    #[error(transparent)]
    Alarm(#[from] Alarm),
    /// Its input cannot be taken in.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// A log failed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// Another node has taken the shard over: what this one holds may be old.
    #[error(
        "another node has taken this shard over (its commit stands at {actual} of the output log, ours \
         was at {expected}); nothing of what this node did since then was committed"
    )]
    TakenOver {
        /// Position of our last commit.
        expected: u64,
        /// Position of the other one's.
        actual: u64,
    },
    /// The log is sealed under a higher token than this node may use.
    #[error("the output log is sealed under token {found}, above {token} of this node's lease")]
    Outranked {
        /// Token of the lease.
        token: u64,
        /// Token of the last commit.
        found: u64,
    },
    /// Another node committed while this one was taking over.
    #[error("another node committed while this one was taking the shard over")]
    Raced,
    /// A checkpoint cannot be read.
    #[error("checkpoint: {0}")]
    Checkpoint(String),
    /// A record of our own logs is not what this version writes.
    #[error("{0}")]
    Format(String),
}

impl StopReason {
    /// What a commit that lost against another one means.
    pub fn of_commit(error: LogError) -> StopReason {
        match error {
            LogError::Conflict { expected, actual, .. } if actual > expected => {
                StopReason::TakenOver { expected, actual }
            }
            LogError::Conflict { expected, actual, .. } => {
                Alarm::RolledBack { what: "output", head: actual, published: expected }.into()
            }
            error => error.into(),
        }
    }

    /// Whether starting the shard again may help without anybody's doing.
    pub fn transient(&self) -> bool {
        matches!(self, StopReason::Log(LogError::Io { .. }) | StopReason::Raced)
    }

    /// Whether it is only the server of the logs that is away.
    pub fn unavailable(&self) -> bool {
        matches!(self, StopReason::Log(LogError::Unavailable { .. }))
    }
}

/// A checkpoint on its way to the store.
pub struct CheckpointJob {
    /// Its manifest.
    pub manifest: Manifest,
    /// Its chunks.
    pub chunks: Vec<Bytes>,
    /// Which opening of the shard took it, for whoever opens it more than once.
    pub opening: u64,
}

/// A commit under way.
struct Pending {
    progress: Progress,
    counts: Counts,
    rejected: Vec<Reason>,
    oldest: Option<Time>,
    records: u64,
    log_time: Time,
    started: Instant,
    appended: Instant,
    /// Changes of followed orgs.
    changes: Vec<(String, Bytes)>,
}

/// What one commit did, for metrics.
pub struct Committed {
    /// Events taken in.
    pub counts: Counts,
    /// Refusals.
    pub rejected: Vec<Reason>,
    /// Log time of the oldest message in it.
    pub oldest: Option<Time>,
    /// Position of the usage log it reaches.
    pub usage: u64,
    /// Records of the usage log in it.
    pub records: u64,
    /// Log time as of it.
    pub log_time: Time,
    /// Begin of taking in to append: what the worker thread worked on it.
    pub busy: Duration,
    /// Begin of taking in to acknowledgement.
    pub took: Duration,
    /// Append to acknowledgement.
    pub append_took: Duration,
}

/// A query, run between commits.
pub type Query = Box<dyn FnOnce(&mut LiveShard) + Send>;

/// A shard on a worker thread.
pub struct LiveShard {
    /// Gone before its followers' queues end, so that they can tell why one ended.
    life: Arc<()>,
    spec: ShardSpec,
    shard: Shard,
    progress: Progress,
    /// Token of the last commit, our own or another owner's.
    token: u64,
    role: Role,
    behind: Behind,
    usage: VecDeque<(Record, Arc<OwnedSemaphorePermit>)>,
    /// Last usage position given.
    usage_read: u64,
    control: VecDeque<(u64, ControlChange)>,
    control_read: u64,
    pending: Option<Pending>,
    queries: VecDeque<Query>,
    followers: HashMap<String, Vec<mpsc::Sender<StreamEvent>>>,
    starts: Starts,
    epochs: Epochs,
    /// The last usage message taken in.
    last_usage: Option<Message>,
    checkpoint: CheckpointState,
}

struct CheckpointState {
    at: Instant,
    epoch: u64,
    generation: u64,
    index: u32,
    base_bytes: u64,
    delta_bytes: u64,
    base_due: bool,
    under_way: bool,
}

impl LiveShard {
    /// Opens a shard in one go: rebuilds its state and takes it over with a sealing commit record.
    /// `heard` is told of the replay's progress.
    ///
    /// # Errors
    /// Why it must not go on.
    pub fn open(
        worker: &mut Worker,
        spec: ShardSpec,
        heard: impl FnMut(u64, u64, u64),
    ) -> Result<LiveShard, StopReason> {
        let mut live = LiveShard::stand_by(spec.clone(), rebuild(worker, &spec, heard)?)?;
        let outcome = block_on(live.seal(0)?);
        if live.sealed(outcome)? { Ok(live) } else { Err(StopReason::Raced) }
    }

    /// A shard as it was rebuilt: it stands by at the last commit.
    ///
    /// # Errors
    /// When the control log cannot be read.
    pub fn stand_by(spec: ShardSpec, rebuilt: Rebuilt) -> Result<LiveShard, StopReason> {
        let Rebuilt { shard, plan, commit, epochs, checkpoint } = rebuilt;
        let (position, commit) =
            commit.map_or((0, None), |(position, commit)| (position, Some(commit)));
        let progress = Progress {
            epoch: plan.epoch,
            usage: commit.as_ref().map_or(0, |c| c.usage_position),
            control: commit.as_ref().map_or(0, |c| c.control_position),
            commit: position,
        };
        spec.progress.send_replace(progress);
        let mut live = LiveShard {
            life: Arc::new(()),
            control_read: progress.control,
            usage_read: progress.usage,
            spec,
            shard,
            progress,
            token: commit.map_or(0, |commit| commit.token),
            role: Role::StandingBy,
            behind: Behind::from(position),
            usage: VecDeque::new(),
            control: VecDeque::new(),
            pending: None,
            queries: VecDeque::new(),
            followers: HashMap::new(),
            starts: Starts::default(),
            epochs,
            last_usage: None,
            checkpoint,
        };
        let waiting = control_changes(&*live.spec.logs.control, progress.control + 1, None)?;
        live.give_control(&waiting);
        Ok(live)
    }

    /// The shard's number.
    pub fn id(&self) -> ShardId {
        self.spec.id
    }

    /// The state, to answer queries from.
    pub fn shard(&mut self) -> &mut Shard {
        &mut self.shard
    }

    /// Token of the last commit.
    pub fn token(&self) -> u64 {
        self.token
    }

    /// What is committed.
    pub fn progress(&self) -> Progress {
        self.progress
    }

    /// What answers count up to.
    pub fn as_of(&self) -> AsOf {
        let mut as_of = Positions::default();
        as_of.raise(self.spec.id, self.progress.usage);
        as_of.control = Some(self.progress.control);
        let epochs = vec![(self.spec.id, self.progress.epoch)];
        AsOf { as_of, epochs, staleness_ms: None }
    }

    /// Takes usage records to be processed. Records that do not follow the last one taken are passed
    /// over: they come from a reader that was replaced while its last read was under way.
    pub fn give_usage(&mut self, records: Vec<Record>, credit: OwnedSemaphorePermit) {
        // The credit is given back when the last record of the read has been taken in.
        let credit = Arc::new(credit);
        for record in records {
            if record.position == self.usage_read + 1 {
                self.usage_read = record.position;
                self.usage.push_back((record, credit.clone()));
            }
        }
    }

    /// Takes control changes to be processed; those already known are passed over.
    pub fn give_control(&mut self, changes: &[(u64, ControlChange)]) {
        for (position, change) in changes {
            if *position > self.control_read {
                self.control_read = *position;
                self.control.push_back((*position, change.clone()));
            }
        }
    }

    /// Runs a query, now or after the commit under way.
    pub fn query(&mut self, query: Query) {
        if self.pending.is_some() {
            self.queries.push_back(query);
        } else {
            query(self);
        }
    }

    /// Whether an owner has anything that waits or is under way.
    pub fn busy(&self) -> bool {
        let waits = !self.usage.is_empty() || !self.control.is_empty();
        self.pending.is_some() || (self.owned() && waits)
    }

    /// Whether a commit is under way.
    pub fn committing(&self) -> bool {
        self.pending.is_some()
    }

    /// Registers a follower of an org, at the committed state. Its queue ends while what is returned is
    /// alive when it was too slow, otherwise with the shard on this node.
    pub fn follow(&mut self, org: &str, follower: mpsc::Sender<StreamEvent>) -> Weak<()> {
        self.followers.entry(org.to_owned()).or_default().push(follower);
        Arc::downgrade(&self.life)
    }

    /// Epoch of the last commit that changed an org, 0 for none; `None` when it is not known.
    pub fn epoch_of(&mut self, org: &str) -> Option<u64> {
        let number = self.shard.flow().shared().borrow().names.org(org);
        number.map_or(Some(0), |number| self.epochs.of(number))
    }

    /// All rows of an org.
    pub fn rows(&mut self, org: &str) -> OrgChanges {
        let number = self.shard.flow().shared().borrow().names.org(org);
        match number {
            Some(number) => {
                crate::wire::org_rows(&self.shard, number, self.spec.views, &mut self.starts)
            }
            None => OrgChanges { org: org.to_owned(), ..Default::default() },
        }
    }

    /// A snapshot of an org for a follower.
    pub fn snapshot(&mut self, org: &str) -> StreamEvent {
        let rows = self.rows(org);
        let (shard, epoch) = (self.spec.id, self.progress.epoch);
        let body = stream_body(shard, epoch, &self.as_of().as_of, &rows);
        StreamEvent::Snapshot { shard, epoch, body }
    }

    /// Closes an epoch over what waits, if no commit is under way. Returns the append to be awaited.
    ///
    /// # Errors
    /// When the shard must stop.
    pub fn pump(
        &mut self,
        worker: &mut Worker,
    ) -> Result<Option<futures::future::BoxFuture<'static, Result<u64, LogError>>>, StopReason>
    {
        let idle = self.usage.is_empty() && self.control.is_empty();
        if !self.owned() || self.pending.is_some() || idle {
            return Ok(None);
        }
        let started = Instant::now();
        let mut progress = self.progress;
        progress.epoch += 1;
        while let Some((position, change)) = self.control.pop_front() {
            self.shard.control(worker, position, &change)?;
            progress.control = position;
        }
        let (mut events, mut records) = (0, 0);
        let mut oldest = None;
        while let Some((record, credit)) = self.usage.pop_front() {
            oldest.get_or_insert(record.time);
            records += 1;
            events += take(&mut self.shard, &record, &*self.spec.logs.usage)?;
            progress.usage = record.position;
            self.last_usage = Some(record.message);
            drop(credit);
            if self.spec.limits.full(events, started.elapsed(), self.usage.len()) {
                break;
            }
        }
        let (counts, dead) = self.shard.close_epoch(worker, progress.epoch);
        let rejected = dead.iter().map(|dead| dead.rejection.reason).collect();
        let mut parts = PartWriter::new(progress.epoch, self.token, 1);
        let withdrawn = self.shard.take_withdrawn();
        parts.changes(&self.shard, &withdrawn, &mut self.starts);
        parts.dead_letters(self.spec.id, dead);
        self.shard.flow().shared().borrow_mut().rollup.clear_changes();
        let parts = parts.finish();
        let id = self.spec.id;
        let commit = Commit {
            epoch: progress.epoch,
            usage_position: progress.usage,
            control_position: progress.control,
            log_time: self.shard.log_time(),
            token: self.token,
            attempt: 1,
            parts: parts.parts.len() as u32,
            hash: parts.hash.clone(),
            seal: false,
        };
        let mut as_of = Positions { control: Some(progress.control), ..Positions::default() };
        as_of.raise(id, progress.usage);
        let changes = self.followed_changes(&parts.parts, progress.epoch, &as_of);
        let announce = self.announcements(&parts, progress.epoch, &as_of);
        let payload = serde_json::to_vec(&commit).expect("texts and numbers are always JSON");
        let messages = parts
            .parts
            .into_iter()
            .map(|part| Message::new(format!("out.{id}.part"), part))
            .collect();
        let record = Message::new(format!("out.{id}.commit"), payload);
        let append = self.spec.logs.out.commit(messages, record, self.progress.commit);
        let appended = Instant::now();
        let log_time = commit.log_time;
        self.pending = Some(Pending {
            progress,
            counts,
            rejected,
            oldest,
            records,
            log_time,
            started,
            appended,
            changes,
        });
        let announcer = self.spec.announcer.clone();
        Ok(Some(Box::pin(async move {
            let appended = append.await?;
            // Before the next epoch can be committed, so that subscribers hear them in order.
            if let Some(announcer) = announcer {
                announcer.announce(announce).await;
            }
            Ok(appended.last)
        })))
    }

    /// What subscribers outside of this process hear of an epoch once it is committed.
    fn announcements(
        &mut self,
        parts: &Parts,
        epoch: u64,
        as_of: &Positions,
    ) -> Vec<(String, Bytes)> {
        let shared = self.shard.flow().shared().borrow();
        let epochs = &mut self.epochs;
        if self.spec.announcer.is_none() {
            for piece in &parts.orgs {
                epochs.raise(piece.org, epoch);
            }
            return Vec::new();
        }
        let of = |org: u32| (shared.names.org_name(org).to_owned(), epochs.raise(org, epoch));
        announce::changes(self.spec.id, epoch, as_of, parts, of)
    }

    /// Bodies for orgs somebody follows.
    fn followed_changes(
        &self,
        parts: &[Bytes],
        epoch: u64,
        as_of: &Positions,
    ) -> Vec<(String, Bytes)> {
        if self.followers.is_empty() {
            return Vec::new();
        }
        let mut merged: Vec<OrgChanges> = Vec::new();
        for part in parts {
            for org in followed(part, |org| self.followers.contains_key(org)) {
                match merged.last_mut().filter(|last| last.org == org.org) {
                    // An org may be spread over two parts, a view over both.
                    Some(last) => {
                        for (view, rows) in org.views {
                            last.views.entry(view).or_default().extend(rows);
                        }
                    }
                    None => merged.push(org),
                }
            }
        }
        merged
            .into_iter()
            .map(|changes| {
                let body = stream_body(self.spec.id, epoch, as_of, &changes);
                (changes.org, body)
            })
            .collect()
    }

    /// Takes the acknowledgement of the commit under way: now it is visible.
    ///
    /// # Errors
    /// When the commit failed; the shard must stop, and its next opening decides.
    pub fn committed(&mut self, position: Result<u64, LogError>) -> Result<Committed, StopReason> {
        let pending = self.pending.take().expect("acknowledgements come for a commit under way");
        let position = position.map_err(StopReason::of_commit)?;
        self.progress = Progress { commit: position, ..pending.progress };
        self.tell_followers(pending.changes);
        self.spec.progress.send_replace(self.progress);
        while let Some(query) = self.queries.pop_front() {
            query(self);
        }
        Ok(Committed {
            counts: pending.counts,
            rejected: pending.rejected,
            oldest: pending.oldest,
            usage: self.progress.usage,
            records: pending.records,
            log_time: pending.log_time,
            busy: pending.appended.duration_since(pending.started),
            took: pending.started.elapsed(),
            append_took: pending.appended.elapsed(),
        })
    }

    /// Tells followers what the last commit changed.
    fn tell_followers(&mut self, changes: Vec<(String, Bytes)>) {
        for (org, body) in changes {
            let (shard, epoch) = (self.spec.id, self.progress.epoch);
            if let Some(followers) = self.followers.get_mut(&org) {
                followers.retain(|follower| {
                    // A full queue means a reader too slow to follow: it is let go, and resumes.
                    let change = StreamEvent::Change { shard, epoch, body: body.clone() };
                    follower.try_send(change).is_ok()
                });
            }
        }
        self.followers.retain(|_, followers| {
            followers.retain(|follower| !follower.is_closed());
            !followers.is_empty()
        });
    }

    /// Takes a checkpoint if one is due (or `now`), between commits. Only an owner does: checkpoints of
    /// two nodes at one epoch would be no use.
    ///
    /// # Errors
    /// When the state cannot be encoded or the log not be read.
    pub fn checkpoint(&mut self, now: bool) -> Result<Option<CheckpointJob>, StopReason> {
        if self.owned() { self.take_checkpoint(now) } else { Ok(None) }
    }

    fn take_checkpoint(&mut self, now: bool) -> Result<Option<CheckpointJob>, StopReason> {
        let state = &self.checkpoint;
        if self.pending.is_some() || state.under_way || self.progress.epoch == state.epoch {
            return Ok(None);
        }
        let due = now
            || state.at.elapsed() >= self.spec.checkpointing.interval
            || self.shard.delta_len() >= self.spec.checkpointing.updates_max;
        if !due {
            return Ok(None);
        }
        let grown =
            state.delta_bytes as f64 > state.base_bytes as f64 * self.spec.checkpointing.base_ratio;
        // Where a store has lost the chain, or another node's lies between.
        let above = self.spec.checkpoints.base_above(self.spec.id);
        let base = state.base_due || grown || above.is_some();
        let taken = if base { self.shard.take_base() } else { self.shard.take_delta() };
        let chunks = snapshot::encode(taken, self.epochs.take(base))
            .map_err(|e| StopReason::Checkpoint(e.to_string()))?;
        let bytes: u64 = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        let usage_hash = match (&self.last_usage, self.progress.usage) {
            (Some(message), _) => message_hash(message),
            (None, 0) => [0; 32],
            (None, position) => {
                let records = block_on(self.spec.logs.usage.read(position, 1))?;
                let record = records.first().ok_or_else(|| {
                    StopReason::Format(format!("the usage log has nothing at {position} any more"))
                })?;
                message_hash(&record.message)
            }
        };
        let state = &mut self.checkpoint;
        state.at = Instant::now();
        state.epoch = self.progress.epoch;
        state.under_way = true;
        if base {
            state.generation = state.generation.max(above.unwrap_or(0)) + 1;
            state.index = 0;
            state.base_bytes = bytes;
            state.delta_bytes = 0;
            state.base_due = false;
        } else {
            state.index += 1;
            state.delta_bytes += bytes;
        }
        let manifest = Manifest {
            format: snapshot::FORMAT,
            shard: self.spec.id.0,
            generation: state.generation,
            index: state.index,
            kind: if base { Kind::Base } else { Kind::Delta },
            usage_log: self.spec.logs.usage.identity().uuid.clone(),
            usage_position: self.progress.usage,
            usage_hash,
            control_log: self.spec.logs.control.identity().uuid.clone(),
            control_position: self.progress.control,
            log_time: self.shard.log_time().0,
            epoch: self.progress.epoch,
            commit_position: self.progress.commit,
            token: self.token,
            chunks: chunks.len() as u32,
            bytes,
            hash: chunks_hash(&chunks),
        };
        Ok(Some(CheckpointJob { manifest, chunks, opening: 0 }))
    }

    /// Takes the outcome of a checkpoint. A failed one is followed by a base, since what it held is
    /// in no delta any more.
    pub fn checkpointed(&mut self, written: bool) {
        self.checkpoint.under_way = false;
        if !written {
            self.checkpoint.base_due = true;
            self.checkpoint.epoch = 0;
        }
    }

    /// Whether a checkpoint is on its way to the store.
    pub fn checkpoint_under_way(&self) -> bool {
        self.checkpoint.under_way
    }

    /// Takes the shard down. Followers' streams end.
    pub fn close(self, worker: &mut Worker) {
        drop(self.life);
        self.shard.close(worker);
    }
}
