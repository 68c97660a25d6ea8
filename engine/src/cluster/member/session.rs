//! Being there, and who is not there any more.
//!
//! **Beats.** A node writes its session anew every quarter of the lease time, by compare-and-set from
//! the revision it knows; one write is under way at a time. One without an acknowledgement is tried again at once, from the same
//! revision: a node must not lose more of its lease time than the outage took. A conflict is looked at: where the session
//! still stands it goes on (an acknowledgement was lost); where it was buried or taken, it is over: the
//! node lets go of every shard and begins a new one.
//!
//! **Names.** A session of another process that changes twice while it is watched is alive: this node
//! refuses to run. One that stands still for the lease time is taken over.
//!
//! **Deaths.** A node is taken to be dead when its entry stood still for the lease time *while this
//! node's own beats were acknowledged throughout that time*, with no gap longer than half of it. So when
//! the registry is away nobody dies of it: afterwards it takes a whole lease time of acknowledged beats
//! before anybody may be buried, and by then the living have beaten. Burying is a compare-and-set from
//! the revision that stood still; a beat in between makes it fail. Only the buried and those that left
//! lose their leases. An owner that could not beat for an hour and was not buried just goes on.
//!
//! **Leaving.** A node that leaves says so in its session, is no place for shards any more, and others
//! take its shards by planned moves. When nothing is owned, nobody else is there or time is up, it
//! finishes what it still owns and marks its session as left, which frees all its leases at once.

use std::collections::BTreeMap;
use std::time::Duration;

use meterr_operators::rng::Rng;

use super::{Action, Member, Told, at, bytes_of};
use crate::cluster::Held;
use crate::cluster::records::{FORMAT, Key, Session};
use meterr_operators::ids::ShardId;

#[derive(Debug, PartialEq, Eq)]
enum Phase {
    /// Not there: the name is looked at.
    Starting,
    Active,
    Left,
    Refused(String),
}

#[derive(Debug, Clone, Copy)]
struct Leaving {
    since: Duration,
    /// Set when it finishes what it still owns, since then.
    finishing: Option<Duration>,
    /// Set when it wrote that it is gone.
    marked: bool,
}

/// This node's session.
#[derive(Debug)]
pub(super) struct Own {
    pub(super) key: String,
    pub(super) id: String,
    pub(super) beat: u64,
    pub(super) nudge: bool,
    phase: Phase,
    rng: Rng,
    next_beat: Duration,
    leaving: Option<Leaving>,
    /// Changes of a foreign session under this name.
    foreign: u32,
    /// Whether the registry was read since this session was begun.
    looked: bool,
    /// Acknowledged beats without a gap: since when, and the last.
    beats: Option<(Duration, Duration)>,
}

impl Own {
    pub(super) fn new(node: &str, seed: u64) -> Own {
        let mut own = Own {
            key: Key::Node(node.to_owned()).to_string(),
            id: String::new(),
            beat: 0,
            nudge: false,
            phase: Phase::Starting,
            rng: Rng::new(seed),
            next_beat: Duration::ZERO,
            leaving: None,
            foreign: 0,
            looked: false,
            beats: None,
        };
        own.begin();
        own
    }

    fn begin(&mut self) {
        self.id = format!("{:016x}{:016x}", self.rng.bits(), self.rng.bits());
        self.beat = 0;
        self.phase = Phase::Starting;
        self.foreign = 0;
        self.beats = None;
    }

    pub(super) fn active(&self) -> bool {
        self.phase == Phase::Active
    }

    pub(super) fn left(&self) -> bool {
        self.phase == Phase::Left
    }

    pub(super) fn leaving(&self) -> bool {
        self.leaving.is_some()
    }

    /// Whether it finishes what it still owns, to be gone.
    pub(super) fn finishing(&self) -> bool {
        self.leaving.is_some_and(|leaving| leaving.finishing.is_some())
    }

    pub(super) fn refused(&self) -> Option<String> {
        match &self.phase {
            Phase::Refused(why) => Some(why.clone()),
            _ => None,
        }
    }

    pub(super) fn leave(&mut self, now: Duration) {
        if self.leaving.is_none() {
            self.leaving = Some(Leaving { since: now, finishing: None, marked: false });
            self.next_beat = now;
        }
    }

    /// The last beat may not have happened: the next one is due, in a moment, so that a registry that
    /// refuses at once is not asked without a pause.
    pub(super) fn beat_again(&mut self, now: Duration, ttl: Duration) {
        self.next_beat = self.next_beat.min(now + ttl / 32);
    }

    pub(super) fn acknowledged(&mut self, now: Duration, ttl: Duration) {
        self.beats = match self.beats {
            Some((since, last)) if now.saturating_sub(last) <= ttl / 2 => Some((since, now)),
            _ => Some((now, now)),
        };
    }

    /// Whether beats were acknowledged throughout the last lease time.
    fn heard_throughout(&self, now: Duration, ttl: Duration) -> bool {
        self.beats.is_some_and(|(since, last)| {
            now.saturating_sub(since) >= ttl && now.saturating_sub(last) <= ttl / 2
        })
    }
}

/// How long the entries of nodes have stood still, by this node's clock.
#[derive(Debug, Default)]
pub(super) struct Deaths {
    /// Revision, 0 for none, and since when it is seen to stand.
    still: BTreeMap<String, (u64, Duration)>,
    /// When the last read was begun and when it ended.
    read: Option<(Duration, Duration)>,
}

impl Deaths {
    pub(super) fn seen_alive(&mut self, node: &str, now: Duration) {
        if let Some((_, since)) = self.still.get_mut(node) {
            *since = now;
        }
    }

    /// How long a node was seen to stand still: up to the begin of the last read.
    fn still_for(&self, node: &str) -> Duration {
        match (self.read, self.still.get(node)) {
            (Some((begun, _)), Some((_, since))) => begun.saturating_sub(*since),
            _ => Duration::ZERO,
        }
    }

    /// How long ago a node's entry changed.
    pub(super) fn heard(&self, node: &str, now: Duration) -> Duration {
        self.still.get(node).map_or(Duration::ZERO, |(_, since)| now.saturating_sub(*since))
    }
}

impl Member {
    /// Notes which entries of nodes stand still, after a read.
    pub(super) fn observe(&mut self, begun: Duration, now: Duration) {
        let ttl = self.settings.ttl;
        // After a gap between reads nothing is known of what stood still in it: a beat may have been
        // written and overwritten, and a registry that was away may have let nobody write.
        let gap = self.deaths.read.is_none_or(|(_, last)| now.saturating_sub(last) > ttl / 2);
        let mut names = self.nodes_with_leases();
        names.extend(self.known.nodes.keys().cloned());
        self.deaths.still.retain(|node, _| names.contains(node));
        for node in names {
            let revision = self.known.revision(&Key::Node(node.clone()));
            let before = self.deaths.still.get(&node).copied();
            let own = node == self.settings.node;
            if own && before.is_some_and(|(before, _)| before != revision) {
                self.own.foreign += 1;
            }
            if gap || before.is_none_or(|(before, _)| before != revision) {
                self.deaths.still.insert(node, (revision, now));
            }
        }
        self.deaths.read = Some((begun, now));
        self.own.looked = true;
    }

    /// Keeps this node's session.
    pub(super) fn session(&mut self, now: Duration, held: &[Held], actions: &mut Vec<Action>) {
        match self.own.phase {
            Phase::Starting => self.start(now, actions),
            Phase::Active => {
                let standing = self.known.nodes.get(&self.settings.node);
                // A missing entry was removed by an operator, or the registry is a new one: it is
                // written again.
                let ours = standing.is_none_or(|seen| {
                    seen.ok().is_some_and(|session| session.session == self.own.id)
                });
                let ended = standing.and_then(|seen| seen.ok()).filter(|session| session.over());
                match ended {
                    _ if !ours => self.own.begin(),
                    Some(session) if session.left => self.own.phase = Phase::Left,
                    Some(_) => self.own.begin(),
                    None => self.beat(now, held, actions),
                }
            }
            Phase::Left | Phase::Refused(_) => {}
        }
    }

    /// Enters, when nobody else is there under this name.
    fn start(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let me = self.settings.node.clone();
        if self.own.leaving() {
            self.own.phase = Phase::Left;
            return;
        }
        if !self.own.looked || !self.free(&self.own.key.clone()) {
            return;
        }
        if let Some(seen) = self.known.nodes.get(&me) {
            match &seen.value {
                Ok(session) if session.session == self.own.id && !session.over() => {
                    self.own.phase = Phase::Active;
                    self.own.nudge = true;
                    return;
                }
                Ok(session) if session.over() => {}
                Err(error) if seen.newer() => {
                    self.own.phase = Phase::Refused(error.to_string());
                    return;
                }
                // Somebody's, or none that can be read.
                _ if self.own.foreign >= 2 => {
                    self.own.phase = Phase::Refused(format!(
                        "a node named {me:?} is already running; give this one another name, or stop that one"
                    ));
                    return;
                }
                _ if self.deaths.still_for(&me) < self.settings.ttl => return,
                _ => {}
            }
        }
        self.send_beat(now, actions);
    }

    fn beat(&mut self, now: Duration, held: &[Held], actions: &mut Vec<Action>) {
        if self.leave_step(now, held) {
            let mut gone = self.said();
            gone.left = true;
            self.write(&Key::Node(self.settings.node.clone()), bytes_of(&gone), true, actions);
        } else if now >= self.own.next_beat {
            self.send_beat(now, actions);
        }
    }

    fn send_beat(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if !self.free(&self.own.key) {
            return;
        }
        self.own.beat += 1;
        self.own.next_beat = now + self.settings.ttl / 4;
        let said = bytes_of(&self.said());
        // What others act upon, they hear at once.
        let nudge = self.own.beat == 1 || self.own.leaving();
        self.write(&Key::Node(self.settings.node.clone()), said, nudge, actions);
    }

    /// Goes on with leaving; whether this node is to be marked as gone now.
    fn leave_step(&mut self, now: Duration, held: &[Held]) -> bool {
        let Some(mut leaving) = self.own.leaving else { return false };
        let owned: Vec<ShardId> =
            (0..self.settings.shards).map(ShardId).filter(|shard| self.owns(*shard)).collect();
        let heirs = self.placement.nodes().iter().any(|node| node.node != self.settings.node);
        let waited = now.saturating_sub(leaving.since);
        if leaving.finishing.is_none()
            && (owned.is_empty() || !heirs || waited >= self.settings.leave_max)
        {
            leaving.finishing = Some(now);
        }
        let finished = owned.iter().all(|shard| match at(held, shard.0) {
            Held::Owned { .. } | Held::Releasing => false,
            // Told to own and not begun: it is told to finish before.
            _ => !matches!(
                self.shards[usize::from(shard.0)].told,
                Some((Told::Own(_), told)) if now < told + self.settings.ttl
            ),
        });
        if let Some(since) = leaving.finishing {
            leaving.marked |= finished || now.saturating_sub(since) >= self.settings.leave_max / 3;
        }
        self.own.leaving = Some(leaving);
        leaving.marked
    }

    /// Buries the dead.
    pub(super) fn bury(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let ttl = self.settings.ttl;
        if !self.own.heard_throughout(now, ttl) {
            return;
        }
        let dead: Vec<String> = self
            .deaths
            .still
            .keys()
            .filter(|node| **node != self.settings.node && self.deaths.still_for(node) >= ttl)
            .cloned()
            .collect();
        for node in dead {
            let seen = self.known.nodes.get(&node);
            if seen.is_some_and(|seen| seen.newer() || seen.ok().is_some_and(Session::over)) {
                continue;
            }
            // Its last words, with who buried it. A node without an entry has none.
            let last = seen.and_then(|seen| seen.ok().cloned()).unwrap_or(Session {
                format: FORMAT,
                session: String::new(),
                beat: 0,
                capacity: 1.0,
                replica: false,
                draining: false,
                http: String::new(),
                version: String::new(),
                figures: BTreeMap::new(),
                left: false,
                buried_by: None,
            });
            let buried = Session { buried_by: Some(self.settings.node.clone()), ..last };
            self.write(&Key::Node(node), bytes_of(&buried), true, actions);
        }
    }
}
