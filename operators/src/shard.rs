//! One shard: everything that follows from a prefix of its usage log and of the control log.
//!
//! Pure: messages and control changes go in, differences flow, views and dead letters come out. What
//! has to be fetched (the version of an event that a correction replaces stands in the log) is asked
//! of a [`History`] the caller gives.
//!
//! The caller feeds messages in the order of their positions and control changes in the order of
//! theirs, and closes epochs with [`Shard::close_epoch`]. In an epoch control changes come first.
//! The same prefixes with the same boundaries always give the same state.

use timely::worker::Worker;

use crate::control::ControlChange;
use crate::dataflow::{Flow, UsageKey, UsageUpdate};
use crate::dedupe::{AHEAD_MAX, Dedupe, DedupeState, Place, Verdict};
use crate::dictionary::{Lengths, Names};
use crate::event::{Event, HashKey, Reason, Rejection};
use crate::ids::{ShardId, shard_of};
use crate::rollup::{Declared, ViewSet};
use crate::time::{DAY, SECOND, Time};
use crate::usage::Usage;

/// Reads earlier versions of events back from the log.
pub trait History {
    /// The event at a place, decoded by the decoder in force.
    ///
    /// # Errors
    /// When the log cannot give it; the shard stops then, since going on would leave a wrong figure.
    fn event_at(&mut self, place: Place) -> Result<Event<'static>, String>;
}

/// A line that was not counted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dead {
    /// Subject of its message.
    pub subject: String,
    /// Where it stands.
    pub place: Place,
    /// Why it was not counted.
    pub rejection: Rejection,
    /// The line, cut to what is kept.
    pub raw: Vec<u8>,
    /// Whether it was cut.
    pub truncated: bool,
}

/// Most bytes of a dead letter kept.
pub const DEAD_LEN_MAX: usize = 64 * 1024;

/// Why a shard stops. None of these may be passed over: the figures would be wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShardError {
    /// Log time jumped ahead.
    #[error(
        "log time jumps from {from} to {to}, more than {hours} h ahead; check the clock of the log, then allow the jump at start"
    )]
    TimeJump {
        /// Last log time.
        from: Time,
        /// Log time of the next message.
        to: Time,
        /// The limit.
        hours: i64,
    },
    /// The version a correction replaces cannot be read back.
    #[error("the event at position {}, line {} cannot be read back: {why}", place.position, place.line)]
    History {
        /// Where it should be.
        place: Place,
        /// What the log said.
        why: String,
    },
    /// A control change does not apply.
    #[error("control change at {position}: {why}")]
    Control {
        /// Its position.
        position: u64,
        /// What is wrong.
        why: String,
    },
    /// The state of a checkpoint does not fit together.
    #[error("checkpoint state: {0}")]
    State(String),
}

/// A message of the usage log, decoded.
#[derive(Debug)]
pub struct Incoming<'a, L> {
    /// Position in the shard's log.
    pub position: u64,
    /// Time the log gave it.
    pub time: Time,
    /// Subject.
    pub subject: &'a str,
    /// Lines: number from 1, bytes, event or refusal.
    pub lines: L,
}

/// What was counted since the last closing of an epoch.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Lines seen.
    pub lines: u64,
    /// Events that changed the usage.
    pub counted: u64,
    /// Duplicates and superseded versions.
    pub repeated: u64,
}

/// The whole state, or what changed since the last time it was taken.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShardState {
    /// Names numbered.
    pub names: Names,
    /// Usage rows, consolidated; in a delta, their differences.
    pub usage: Vec<UsageUpdate>,
    /// Ids remembered.
    pub ids: DedupeState,
    /// Log time in microseconds since 1970.
    pub log_time: i64,
    /// Last usage position.
    pub usage_position: u64,
    /// Epochs with dead letters, and how many.
    pub dead: Vec<(u64, u32)>,
}

/// What control changes of an epoch took out of the views under the names rows had: whoever keeps rows
/// by name must hear of it.
#[derive(Debug, Default)]
pub struct Withdrawn {
    /// Orgs that got another zone, by number, and the zone they had: their days and months began at
    /// other instants.
    pub zones: Vec<(u32, u32)>,
    /// Declared views removed or replaced.
    pub views: Vec<Declared>,
}

/// A shard.
#[derive(Debug)]
pub struct Shard {
    id: ShardId,
    shards: u16,
    key: HashKey,
    time_jump_max: i64,
    dedupe: Dedupe,
    flow: Flow,
    log_time: Time,
    usage_position: u64,
    control_position: u64,
    updates: Vec<UsageUpdate>,
    dead: Vec<Dead>,
    counts: Counts,
    withdrawn: Withdrawn,
    /// Usage since the last checkpoint.
    delta: Vec<UsageUpdate>,
    delta_wanted: bool,
    names_taken: Lengths,
    /// Epochs with dead letters.
    dead_epochs: Vec<(u64, u32)>,
    dead_epochs_taken: usize,
}

/// Default for how far log time may jump ahead: 24 h.
pub const TIME_JUMP_MAX: i64 = DAY;

impl Shard {
    /// A shard that has seen nothing.
    pub fn new(
        worker: &mut Worker,
        id: ShardId,
        shards: u16,
        key: HashKey,
        views: ViewSet,
    ) -> Shard {
        Shard {
            id,
            shards,
            key,
            time_jump_max: TIME_JUMP_MAX,
            dedupe: Dedupe::default(),
            flow: Flow::new(worker, views),
            log_time: Time::MIN,
            usage_position: 0,
            control_position: 0,
            updates: Vec::new(),
            dead: Vec::new(),
            counts: Counts::default(),
            withdrawn: Withdrawn::default(),
            delta: Vec::new(),
            delta_wanted: false,
            names_taken: Lengths::default(),
            dead_epochs: Vec::new(),
            dead_epochs_taken: 0,
        }
    }

    /// Sets how far log time may jump ahead, in microseconds.
    pub fn allow_time_jump(&mut self, most: i64) {
        self.time_jump_max = most;
    }

    /// Keeps what changes between checkpoints, so that [`Shard::take_delta`] can be asked.
    pub fn want_deltas(&mut self) {
        self.delta_wanted = true;
    }

    /// The shard's number.
    pub fn id(&self) -> ShardId {
        self.id
    }

    /// Last usage position taken in.
    pub fn usage_position(&self) -> u64 {
        self.usage_position
    }

    /// Last control position taken in.
    pub fn control_position(&self) -> u64 {
        self.control_position
    }

    /// Log time.
    pub fn log_time(&self) -> Time {
        self.log_time
    }

    /// Dataflow and views.
    pub fn flow(&self) -> &Flow {
        &self.flow
    }

    /// Dataflow and views, to visit usage.
    pub fn flow_mut(&mut self) -> &mut Flow {
        &mut self.flow
    }

    /// Ids remembered.
    pub fn dedupe(&self) -> &Dedupe {
        &self.dedupe
    }

    /// Epochs with dead letters, ascending, and how many each has.
    pub fn dead_epochs(&self) -> &[(u64, u32)] {
        &self.dead_epochs
    }

    /// Takes in one message.
    ///
    /// # Errors
    /// When the shard must stop. The message is then half taken in; the state is worthless.
    pub fn message<'a>(
        &mut self,
        message: Incoming<'_, impl Iterator<Item = (u32, &'a [u8], Result<Event<'a>, Rejection>)>>,
        history: &mut dyn History,
    ) -> Result<(), ShardError> {
        let Incoming { position, time, subject, lines } = message;
        if self.usage_position > 0 && time.0 > self.log_time.0.saturating_add(self.time_jump_max) {
            let hours = self.time_jump_max / crate::time::HOUR;
            return Err(ShardError::TimeJump { from: self.log_time, to: time, hours });
        }
        self.log_time = self.log_time.max(time);
        self.usage_position = position;
        self.dedupe.advance(self.log_time);
        let source = Source::of(subject);
        for (line, raw, event) in lines {
            self.counts.lines += 1;
            let place = Place { position, line };
            let refused = match event {
                Ok(event) => match self.check(&event, &source) {
                    Ok(()) => self.take(&event, place, history)?,
                    Err(rejection) => Some(rejection),
                },
                Err(rejection) => Some(rejection),
            };
            if let Some(rejection) = refused {
                let kept = raw.len().min(DEAD_LEN_MAX);
                self.dead.push(Dead {
                    subject: subject.to_owned(),
                    place,
                    rejection,
                    raw: raw[..kept].to_vec(),
                    truncated: kept < raw.len(),
                });
            }
        }
        Ok(())
    }

    fn check(&self, event: &Event<'_>, source: &Source<'_>) -> Result<(), Rejection> {
        let home = shard_of(&event.org, self.shards);
        if home != self.id {
            let detail = format!(
                "org {:?} lives in shard {home}, this is the log of shard {}",
                &*event.org, self.id
            );
            return Err(Rejection::new(Reason::WrongShard, detail));
        }
        if let Source::Org(org) = source
            && *org != event.org
        {
            let detail = format!("org {:?} came by the subject of {org:?}", &*event.org);
            return Err(Rejection::new(Reason::OrgMismatch, detail));
        }
        for (field, time) in [("time", Some(event.time)), ("original_time", event.original_time)] {
            if let Some(time) = time.filter(|t| t.0 > self.log_time.0 + AHEAD_MAX) {
                let detail = format!(
                    "{field} {time} is more than 1 h ahead of log time {}; check the producer's clock",
                    self.log_time
                );
                return Err(Rejection::new(Reason::TooFarAhead, detail));
            }
        }
        let first = event.original_time.unwrap_or(event.time);
        if !matches!(source, Source::Backfill) && self.dedupe.too_late(first) {
            let end = self.dedupe.expired_through().unwrap_or_default();
            let detail = format!(
                "time {first} is so old that an earlier copy may be forgotten (ids of before {end} \
                 are); send it by @backfill if it never came before"
            );
            return Err(Rejection::new(Reason::TooLate, detail));
        }
        Ok(())
    }

    /// Counts an event, or says why not.
    fn take(
        &mut self,
        event: &Event<'_>,
        place: Place,
        history: &mut dyn History,
    ) -> Result<Option<Rejection>, ShardError> {
        let fingerprint = event.fingerprint(&self.key);
        let content = event.content_hash(&self.key);
        match self.dedupe.admit(fingerprint, event.revision, content, place) {
            Verdict::Fresh => {}
            Verdict::Duplicate | Verdict::Superseded => {
                self.counts.repeated += 1;
                return Ok(None);
            }
            Verdict::Conflict => {
                let detail = format!(
                    "id {:?} came before with revision {} and other content; send a correction with \
                     a higher revision",
                    &*event.id, event.revision
                );
                return Ok(Some(Rejection::new(Reason::ConflictingDuplicate, detail)));
            }
            Verdict::Replaces(old) => {
                let known =
                    history.event_at(old).map_err(|why| ShardError::History { place: old, why })?;
                if known.fingerprint(&self.key) != fingerprint {
                    let why = "another event stands there".to_owned();
                    return Err(ShardError::History { place: old, why });
                }
                if !known.void {
                    let usage = Usage::of(&known).negated();
                    let key = self.key_of(&known);
                    self.updates.push((key, usage));
                }
            }
        }
        self.counts.counted += 1;
        if !event.void {
            let key = self.key_of(event);
            self.updates.push((key, Usage::of(event)));
        }
        Ok(None)
    }

    fn key_of(&mut self, event: &Event<'_>) -> UsageKey {
        let numbers = self.flow.shared().borrow_mut().names.number(event);
        let slot = event.time.slot().0;
        UsageKey { rate: numbers.rate, slot, user: numbers.user, label: numbers.label }
    }

    /// Takes in one control change. Messages of the same epoch come after it.
    ///
    /// # Errors
    /// When it does not apply; the shard must stop.
    pub fn control(
        &mut self,
        worker: &mut Worker,
        position: u64,
        change: &ControlChange,
    ) -> Result<(), ShardError> {
        let refuse = |why: String| ShardError::Control { position, why };
        match change {
            ControlChange::Prices(change) => {
                let mut book = self.flow.shared().borrow().book.clone();
                let touched = book.apply(&change.prices, position).map_err(|errors| {
                    refuse(errors.first().map(ToString::to_string).unwrap_or_default())
                })?;
                self.flow.set_book(worker, book, &touched);
            }
            ControlChange::TimeZone(change) => {
                let (org, zone) = (&change.org, &change.time_zone);
                self.withdrawn.zones.extend(self.flow.set_zone(worker, org, zone).map_err(refuse)?);
            }
            ControlChange::View(view) => {
                let view = Declared::new(view.name.clone(), view.by.clone(), view.window);
                self.withdrawn.views.extend(self.flow.declare_view(worker, view));
            }
            ControlChange::ViewRemoved(view) => {
                self.withdrawn.views.extend(self.flow.remove_view(&view.name));
            }
            ControlChange::Horizon(change) => {
                self.dedupe.set_horizon(change.seconds as i64 * SECOND);
            }
            ControlChange::Seed(seed) if seed.shards != self.shards => {
                let why = format!("{} shards, but this node has {}", seed.shards, self.shards);
                return Err(refuse(why));
            }
            ControlChange::Seed(_) | ControlChange::DeadLetterReplayed(_) => {}
        }
        self.control_position = position;
        Ok(())
    }

    /// Lets what came in flow into the views.
    pub fn close_epoch(&mut self, worker: &mut Worker, epoch: u64) -> (Counts, Vec<Dead>) {
        if !self.updates.is_empty() {
            if self.delta_wanted {
                self.delta.extend_from_slice(&self.updates);
            }
            self.flow.add_usage(worker, self.updates.drain(..));
        }
        let dead = std::mem::take(&mut self.dead);
        if !dead.is_empty() {
            self.dead_epochs.push((epoch, dead.len() as u32));
        }
        (std::mem::take(&mut self.counts), dead)
    }

    /// What control changes took out of the views since this was last asked.
    pub fn take_withdrawn(&mut self) -> Withdrawn {
        std::mem::take(&mut self.withdrawn)
    }

    /// Usage differences waiting for the next closing.
    pub fn pending(&self) -> usize {
        self.updates.len()
    }

    /// Whether dead letters wait for the next closing.
    pub fn has_dead(&self) -> bool {
        !self.dead.is_empty()
    }

    /// Differences kept for the next checkpoint delta.
    pub fn delta_len(&self) -> usize {
        self.delta.len()
    }

    /// The whole state. Deltas continue from here.
    pub fn take_base(&mut self) -> ShardState {
        self.delta.clear();
        let mut usage = Vec::new();
        self.flow.visit_all(|key, row| usage.push((*key, row.clone())));
        let ids = self.dedupe.take_base();
        self.dead_epochs_taken = 0;
        self.state(Lengths::default(), usage, ids)
    }

    /// What changed since the last base or delta. Only after [`Shard::want_deltas`].
    pub fn take_delta(&mut self) -> ShardState {
        let mut usage = std::mem::take(&mut self.delta);
        differential_dataflow::consolidation::consolidate(&mut usage);
        let ids = self.dedupe.take_delta();
        self.state(self.names_taken, usage, ids)
    }

    fn state(&mut self, from: Lengths, usage: Vec<UsageUpdate>, ids: DedupeState) -> ShardState {
        let shared = self.flow.shared().borrow();
        self.names_taken = shared.names.lengths();
        let dead = self.dead_epochs[self.dead_epochs_taken..].to_vec();
        self.dead_epochs_taken = self.dead_epochs.len();
        ShardState {
            names: shared.names.since(from),
            usage,
            ids,
            log_time: self.log_time.0,
            usage_position: self.usage_position,
            dead,
        }
    }

    /// Rebuilds a new shard from a base and its deltas. Control changes up to the checkpoint's
    /// position must have been given before, so that the usage meets the right prices and zones.
    ///
    /// # Errors
    /// When the state does not fit together.
    pub fn restore(
        &mut self,
        worker: &mut Worker,
        states: Vec<ShardState>,
    ) -> Result<(), ShardError> {
        let broken = |what: &str| ShardError::State(what.to_owned());
        let mut usage = Vec::new();
        for state in states {
            self.flow.shared().borrow_mut().names.restore(state.names).map_err(broken)?;
            self.dedupe.restore(&state.ids).map_err(broken)?;
            usage.extend(state.usage);
            self.log_time = Time(state.log_time);
            self.usage_position = state.usage_position;
            self.dead_epochs.extend(state.dead);
        }
        differential_dataflow::consolidation::consolidate(&mut usage);
        {
            let shared = self.flow.shared().borrow();
            let names = shared.names.names();
            let sound = usage.iter().all(|(key, _)| {
                (key.rate as usize) < names.rates.len()
                    && (key.user as usize) < names.users.len()
                    && (key.label as usize) < names.labels.len()
            });
            if !sound {
                return Err(broken("a usage row refers to a name that is not there"));
            }
            self.names_taken = shared.names.lengths();
        }
        self.dead_epochs_taken = self.dead_epochs.len();
        // In pieces, so that the batches stay in the size the merger likes.
        let mut rows = usage.into_iter().peekable();
        while rows.peek().is_some() {
            let piece: Vec<UsageUpdate> = rows.by_ref().take(100_000).collect();
            self.flow.add_usage(worker, piece);
        }
        self.flow.shared().borrow_mut().rollup.clear_changes();
        Ok(())
    }

    /// Takes the shard's dataflow down.
    pub fn close(self, worker: &mut Worker) {
        self.flow.close(worker);
    }
}

/// How a message came.
enum Source<'a> {
    Org(&'a str),
    Batch,
    Backfill,
}

impl Source<'_> {
    fn of(subject: &str) -> Source<'_> {
        match subject.rsplit('.').next().unwrap_or_default() {
            // A tick has no lines. What somebody sends by its subject counts: nothing is dropped.
            "@batch" | "@tick" => Source::Batch,
            "@backfill" => Source::Backfill,
            org => Source::Org(org),
        }
    }
}
