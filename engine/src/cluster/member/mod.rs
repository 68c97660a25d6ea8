//! What a node does about its membership and its shards. Pure: times, reads of the registry, outcomes
//! of own writes, requests of peers and what each shard is here go in; [`Action`]s come out.
//!
//! Decisions follow from what is known now, not from a plan made earlier: each [`Member::act`] looks at
//! every shard anew. So a lost acknowledgement, a late answer or a restart needs no case of its own:
//! the next read shows what became of it. Every write is a compare-and-set on a revision that was seen,
//! so a decision on an old view fails and is made again on a newer one.
//!
//! * `session`: being there, and who is not there any more;
//! * `leases`: taking shards that nobody owns, and keeping one's own;
//! * `moves`: planned moves from a live owner;
//! * `known`: what is known of the registry.
//!
//! Wrong decisions cost time and never figures: what makes a commit stand is the fenced commit alone.

mod known;
mod leases;
mod moves;
mod session;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::Bytes;
use meterr_connectors::cluster::{Entry, RegistryError};
use meterr_operators::ids::ShardId;

use crate::cluster::placement::{Candidate, Placement, weight};
use crate::cluster::records::{FORMAT, Key, Lease, RecordError, Session, write};
use crate::cluster::{Held, ShardView};
use known::{Known, Merged};
use session::{Deaths, Own};

pub use moves::{BEHIND_MAX, ReleaseAnswer, ReleaseRequest};

/// What a node is and how patient it is.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Its name.
    pub node: String,
    /// Number of shards.
    pub shards: u16,
    /// Capacity weight; 1 is usual.
    pub capacity: f64,
    /// Whether it only stands by for all shards.
    pub replica: bool,
    /// Where its HTTP listens.
    pub http: String,
    /// Version of its binary.
    pub version: String,
    /// How long a node may be silent before it is taken to be dead.
    pub ttl: Duration,
    /// How long nodes must have been the same before shards move for the balance.
    pub settle: Duration,
    /// How many nodes stand by for each shard, beside its owner.
    pub standbys: usize,
    /// Most shards it gains by planned moves at once.
    pub moves_max: usize,
    /// How long it waits for others to take its shards over when it leaves.
    pub leave_max: Duration,
}

impl Settings {
    /// The defaults for a node of a deployment.
    pub fn new(node: impl Into<String>, shards: u16) -> Settings {
        Settings {
            node: node.into(),
            shards,
            capacity: 1.0,
            replica: false,
            http: String::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ttl: Duration::from_secs(3),
            settle: Duration::from_secs(10),
            standbys: 0,
            moves_max: 4,
            leave_max: Duration::from_secs(30),
        }
    }
}

/// What to do. Shards' calls are those of [`Shards`](crate::cluster::Shards).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Write to the registry; the outcome goes to [`Member::wrote`].
    Write {
        /// The key.
        key: String,
        /// The value.
        value: Bytes,
        /// Revision the key must be at.
        expected: u64,
    },
    /// Tell other nodes that something changed.
    Nudge,
    /// Ask a node; its answer goes to [`Member::answered`].
    Ask {
        /// The node.
        node: String,
        /// The shard it is about.
        shard: ShardId,
        /// The question.
        question: Bytes,
    },
    /// Let a shard stand by.
    StandBy(ShardId),
    /// Own a shard under a token.
    Own(ShardId, u64),
    /// Finish a shard.
    Release(ShardId),
    /// Let go of a shard.
    Drop(ShardId),
}

/// What a shard was last told, so that it is not told again at every look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    StandBy,
    Own(u64),
    Release,
    Drop,
}

/// What a member remembers of a shard.
#[derive(Debug, Default)]
struct Local {
    told: Option<(Told, Duration)>,
    /// Since when nobody owns it, at this revision of its lease.
    vacant: Option<(u64, Duration)>,
    /// Since when it is not clear whether its owner's session is over, at this revision of its lease.
    unsure: Option<(u64, Duration)>,
    gain: Option<moves::Gain>,
    give: Option<moves::Give>,
    /// The lease at this revision is to be written anew before the shard goes on.
    renew: Option<u64>,
    /// What the token must be above.
    above: u64,
    /// When its lease was last written anew, and before when it is not again.
    renewed: Option<Duration>,
    rest: Option<Duration>,
}

/// A write under way.
#[derive(Debug)]
struct InFlight {
    value: Bytes,
    nudge: bool,
}

/// The decisions of one node.
#[derive(Debug)]
pub struct Member {
    settings: Settings,
    known: Known,
    own: Own,
    deaths: Deaths,
    in_flight: BTreeMap<String, InFlight>,
    shards: Vec<Local>,
    placement: Placement,
    pins: BTreeMap<ShardId, String>,
    /// What shards were placed after: changes of what is known, and whether this node leaves.
    placed: Option<(u64, bool)>,
    /// Since when the same nodes are there.
    stable_since: Duration,
    /// Keys whose last write did not do what it should: a read begun after this time must come first.
    unclear: BTreeMap<String, Duration>,
    look: bool,
    figures: BTreeMap<String, f64>,
}

impl Member {
    /// A node that is not there yet. Its sessions are drawn from `seed`, which must be random.
    pub fn new(settings: Settings, seed: u64) -> Member {
        let own = Own::new(&settings.node, seed);
        let shards = (0..settings.shards).map(|_| Local::default()).collect();
        Member {
            settings,
            known: Known::default(),
            own,
            deaths: Deaths::default(),
            in_flight: BTreeMap::new(),
            shards,
            placement: Placement::default(),
            pins: BTreeMap::new(),
            placed: None,
            stable_since: Duration::ZERO,
            unclear: BTreeMap::new(),
            look: true,
            figures: BTreeMap::new(),
        }
    }

    /// Takes a read of the registry in that was begun at `begun`. Times are of a clock that never goes
    /// back and goes on while the process is stopped.
    pub fn read(&mut self, begun: Duration, now: Duration, entries: &[Entry]) {
        let merged = self.known.merge(now, entries, 4 * self.settings.ttl);
        self.unclear.retain(|_, since| *since > begun);
        self.look = !self.unclear.is_empty();
        if merged != Merged::Behind {
            self.observe(begun, now);
        }
    }

    /// Takes the outcome of a write in.
    pub fn wrote(&mut self, now: Duration, key: &str, outcome: Result<u64, RegistryError>) {
        let Some(write) = self.in_flight.remove(key) else { return };
        match outcome {
            Ok(revision) => {
                self.known.wrote(key, revision, &write.value);
                if key == self.own.key {
                    self.own.acknowledged(now, self.settings.ttl);
                }
                self.own.nudge |= write.nudge;
            }
            // A beat is just tried again: if it did happen, the next one conflicts.
            Err(RegistryError::Unavailable(_)) if key == self.own.key => {
                self.own.beat_again(now, self.settings.ttl)
            }
            // Somebody else wrote, or it may have happened: look before anything else is tried.
            Err(error) => {
                self.unclear.insert(key.to_owned(), now);
                self.look = true;
                if let (RegistryError::Conflict { .. }, Some(Key::Node(node))) =
                    (error, Key::parse(key))
                {
                    self.deaths.seen_alive(&node, now);
                }
            }
        }
    }

    /// Whether a read of the registry should not wait.
    pub fn look(&self) -> bool {
        self.look
    }

    /// Decides what to do now, given what each shard is here.
    pub fn act(&mut self, now: Duration, held: &[Held]) -> Vec<Action> {
        let mut actions = Vec::new();
        self.session(now, held, &mut actions);
        if !self.own.active() {
            for number in 0..self.settings.shards {
                self.shards[usize::from(number)] =
                    Local { told: self.shards[usize::from(number)].told, ..Local::default() };
                self.want(now, ShardId(number), at(held, number), false, &mut actions);
            }
        } else {
            self.bury(now, &mut actions);
            self.place(now);
            for number in 0..self.settings.shards {
                self.shard(now, ShardId(number), at(held, number), &mut actions);
            }
        }
        if std::mem::take(&mut self.own.nudge) {
            actions.push(Action::Nudge);
        }
        actions
    }

    /// Why it cannot be part of the cluster, if that is so. It does not try again.
    pub fn refused(&self) -> Option<String> {
        self.own.refused()
    }

    /// Whether it has left.
    pub fn left(&self) -> bool {
        self.own.left()
    }

    /// Whether its session is in the registry.
    pub fn active(&self) -> bool {
        self.own.active()
    }

    /// Begins to leave: others take its shards over, then it is gone.
    pub fn leave(&mut self, now: Duration) {
        self.own.leave(now);
    }

    /// Sets what it says of its load, by name. What is no finite number is left out.
    pub fn report(&mut self, figures: BTreeMap<String, f64>) {
        self.figures = figures;
        self.figures.retain(|_, figure| figure.is_finite());
    }

    /// Takes in that an operator's request was written through this node.
    pub fn noted(&mut self, key: &str, revision: u64, value: &Bytes) {
        self.known.wrote(key, revision, value);
        self.own.nudge = true;
    }

    /// Revision of a key as far as known, 0 for none.
    pub fn revision(&self, key: &Key) -> u64 {
        self.known.revision(key)
    }

    /// Entries that cannot be read.
    pub fn problems(&self) -> Vec<&RecordError> {
        self.known.problems()
    }

    /// Number of shards it gains and gives by planned moves now.
    pub fn moves(&self) -> (usize, usize) {
        let count = |of: fn(&Local) -> bool| self.shards.iter().filter(|local| of(local)).count();
        (count(|local| local.gain.is_some()), count(|local| local.give.is_some()))
    }

    /// What it was made with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// All nodes and what they say of themselves; `None` where it cannot be read.
    pub(super) fn sessions(&self) -> impl Iterator<Item = (&str, Option<&Session>)> {
        self.known.nodes.iter().map(|(node, seen)| (node.as_str(), seen.ok()))
    }

    /// How long ago a node was heard.
    pub(super) fn heard(&self, node: &str, now: Duration) -> Duration {
        self.deaths.heard(node, now)
    }

    /// Whether an operator drains a node.
    pub(super) fn drained(&self, node: &str) -> bool {
        // One that cannot be read counts: no shard goes where it should perhaps not.
        let drain = self.known.drains.get(node);
        drain.is_some_and(|seen| seen.ok().is_none_or(|drain| drain.drained))
    }

    /// A shard as the registry has it.
    pub(super) fn shard_view(&self, shard: ShardId) -> ShardView {
        let seen = self.known.leases.get(&shard);
        let lease = seen.and_then(|seen| Some((seen.revision, seen.ok()?)));
        // A lease whose session is over belongs to nobody.
        let stands = |lease: &Lease, node: &str| {
            self.there(node).is_some_and(|session| session.session == lease.session)
        };
        ShardView {
            shard,
            owner: lease
                .and_then(|(_, lease)| lease.node.clone().filter(|node| stands(lease, node))),
            token: lease.map_or(0, |(revision, lease)| revision.saturating_add(lease.raise)),
            wanted: self.placement.wanted(shard).map(str::to_owned),
            pinned: self.pins.get(&shard).cloned(),
        }
    }

    fn me(&self) -> &str {
        &self.settings.node
    }

    /// Whether a key may be written: nothing is under way, and what became of the last write is known.
    fn free(&self, key: &str) -> bool {
        !self.in_flight.contains_key(key) && !self.unclear.contains_key(key)
    }

    fn write(&mut self, key: &Key, value: Bytes, nudge: bool, actions: &mut Vec<Action>) {
        let (name, expected) = (key.to_string(), self.known.revision(key));
        if self.free(&name) {
            self.in_flight.insert(name.clone(), InFlight { value: value.clone(), nudge });
            actions.push(Action::Write { key: name, value, expected });
        }
    }

    /// Whether a node is there: its session is not over.
    fn there(&self, node: &str) -> Option<&Session> {
        self.known.nodes.get(node)?.ok().filter(|session| !session.over())
    }

    /// Whether shards may be placed on a node.
    fn eligible(&self, node: &str, session: &Session) -> bool {
        !session.over() && !session.draining && !session.replica && !self.drained(node)
    }

    /// Places shards anew when nodes or pins changed.
    fn place(&mut self, now: Duration) {
        let after = (self.known.changes, self.own.leaving());
        if self.placed.replace(after) == Some(after) {
            return;
        }
        let mut nodes = Vec::new();
        for (node, seen) in &self.known.nodes {
            if let Some(session) = seen.ok().filter(|session| self.eligible(node, session)) {
                // What was asked of this node counts before the registry has it.
                if *node != self.settings.node || !self.own.leaving() {
                    nodes.push(Candidate { node: node.clone(), weight: weight(session.capacity) });
                }
            }
        }
        let pins: BTreeMap<ShardId, String> = self
            .known
            .pins
            .iter()
            .filter_map(|(shard, seen)| Some((*shard, seen.ok()?.node.clone()?)))
            .collect();
        let moved = nodes != self.placement.nodes();
        if moved {
            self.stable_since = now;
        }
        if moved || pins != self.pins {
            self.placement = Placement::new(self.settings.shards, &nodes, &pins);
            self.pins = pins;
        }
    }

    /// Tells a shard something, unless it was told the same not long ago.
    fn tell(&mut self, now: Duration, shard: ShardId, told: Told, actions: &mut Vec<Action>) {
        let last = &mut self.shards[usize::from(shard.0)].told;
        if matches!(last, Some((what, at)) if *what == told && now < *at + self.settings.ttl) {
            return;
        }
        *last = Some((told, now));
        actions.push(match told {
            Told::StandBy => Action::StandBy(shard),
            Told::Own(token) => Action::Own(shard, token),
            Told::Release => Action::Release(shard),
            Told::Drop => Action::Drop(shard),
        });
    }

    /// Lets a shard that is not owned stand by or not be here.
    fn want(
        &mut self,
        now: Duration,
        shard: ShardId,
        held: &Held,
        stand_by: bool,
        actions: &mut Vec<Action>,
    ) {
        match (held, stand_by) {
            (Held::Nothing | Held::Released, true) => {
                self.tell(now, shard, Told::StandBy, actions);
            }
            (Held::Opening | Held::StandingBy { .. } | Held::Stopped(_), true) => {}
            // What the shard is told under way may show here only later.
            (Held::Nothing, false) => {
                let told = self.shards[usize::from(shard.0)].told;
                if told.is_some_and(|(told, _)| told != Told::Drop) {
                    self.tell(now, shard, Told::Drop, actions);
                }
            }
            _ => self.tell(now, shard, Told::Drop, actions),
        }
    }

    /// What this node says of itself.
    fn said(&self) -> Session {
        Session {
            format: FORMAT,
            session: self.own.id.clone(),
            beat: self.own.beat,
            capacity: self.settings.capacity,
            replica: self.settings.replica,
            draining: self.own.leaving(),
            http: self.settings.http.clone(),
            version: self.settings.version.clone(),
            figures: self.figures.clone(),
            left: false,
            buried_by: None,
        }
    }

    fn nodes_with_leases(&self) -> BTreeSet<String> {
        let leases = self.known.leases.values().filter_map(|seen| seen.ok()?.node.clone());
        leases.collect()
    }
}

fn at(held: &[Held], number: u16) -> &Held {
    held.get(usize::from(number)).unwrap_or(&Held::Nothing)
}

fn bytes_of(session: &Session) -> Bytes {
    write(session)
}
