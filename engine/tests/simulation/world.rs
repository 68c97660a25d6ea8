//! The world: nodes, registry, logs and what goes wrong between them, in the order of a clock that only
//! this file moves. The same seed gives the same history.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use meterr_connectors::cluster::{Entry, RegistryError};
use meterr_connectors::log::LogError;
use meterr_engine::cluster::member::{Action, Member, Settings};
use meterr_engine::cluster::records::{self, Drain, FORMAT, Key, Pin};
use meterr_engine::lifecycle::{self, Happened, State as Life, Wanted};
use meterr_engine::live::StopReason;
use meterr_operators::ids::ShardId;
use meterr_operators::rng::Rng;

use crate::log::{EVENTS, Logs, Record, record};
use crate::node::{Checkpoint, Hosted, Live, Node, NodeShard, Role, rebuild};
use crate::registry::Registry;

/// A second, in the world's microseconds.
pub const SECOND: u64 = 1_000_000;
/// Time after which a silent node is taken to be dead.
pub const TTL: u64 = SECOND;
/// How long the driver waits for a read or a write.
const LIMIT: u64 = TTL / 4;
/// When faults begin.
const QUIET: u64 = 2 * SECOND;
/// Longest time after the last fault until everything must be in order again.
const MENDED: u64 = 30 * TTL;

/// A bug that is planted, for the simulation to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bug {
    None,
    /// Commits stand wherever the log ends.
    UnfencedCommit,
    /// What is replayed behind a checkpoint is published as new.
    RepeatedOutput,
    /// A node that is not acknowledged believes it is.
    UnheardDeaths,
    /// The outcome of a commit is taken for one of what was opened since.
    ForeignAcknowledgement,
}

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// Everything.
    All,
    /// The registry, and the logs with it, are away for all nodes alike.
    Outages,
}

/// What a history had in it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Figures {
    pub seed: u64,
    pub commits: u64,
    pub seals: u64,
    pub refused: u64,
    pub buried: u64,
    pub leases: u64,
    pub events: u64,
    pub crashes: u64,
    pub mended_after: u64,
}

enum Event {
    Read,
    ReadDone { begun: Duration, entries: Option<Rc<Vec<Entry>>> },
    Write { key: String, value: Bytes, expected: u64, sent: u64 },
    Wrote { key: String, outcome: Result<u64, RegistryError> },
    Ask { to: usize, shard: ShardId, question: Bytes },
    Answer { shard: ShardId, answer: Bytes },
    Nudged,
    Act,
    Open { shard: usize, asked: u64 },
    Loaded { shard: usize, opening: u64, live: Live },
    Work { shard: usize },
    Commit { shard: usize, opening: u64, record: Record, expected: u64, sent: u64 },
    Committed { shard: usize, opening: u64, seal: bool, outcome: Result<u64, LogError> },
    Checkpoint { shard: usize, checkpoint: Checkpoint },
    Start,
    Publish(usize),
    Fault,
    Calm,
    Look,
}

impl Event {
    /// Whether a node handles it: a process that is stopped does so later, one that is gone never.
    fn of_node(&self) -> bool {
        !matches!(
            self,
            Event::Write { .. }
                | Event::Commit { .. }
                | Event::Start
                | Event::Publish(_)
                | Event::Fault
                | Event::Calm
                | Event::Look
        )
    }
}

struct Due {
    at: u64,
    order: u64,
    node: usize,
    life: u32,
    event: Event,
}

impl PartialEq for Due {
    fn eq(&self, other: &Due) -> bool {
        (self.at, self.order) == (other.at, other.order)
    }
}
impl Eq for Due {}
impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Due) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Due {
    fn cmp(&self, other: &Due) -> Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

pub struct World {
    now: u64,
    rng: Rng,
    bug: Bug,
    faults: Faults,
    queue: BinaryHeap<Reverse<Due>>,
    order: u64,
    registry: Registry,
    logs: Vec<Logs>,
    nodes: Vec<Node>,
    /// Until when the registry takes no write, and answers no read; and the logs take nothing.
    writes_down: u64,
    reads_down: u64,
    logs_down: u64,
    calm_at: u64,
    calm: bool,
    openings: u64,
    failure: Option<String>,
    figures: Figures,
    done: bool,
    trace: bool,
}

/// Runs the history of a seed. `Err` says what did not hold.
pub fn run(seed: u64, faults: Faults, bug: Bug, trace: bool) -> Result<Figures, String> {
    let mut world = World::new(seed, faults, bug, trace);
    while let Some(Reverse(due)) = world.queue.pop() {
        world.now = due.at;
        world.handle(due);
        if let Some(failure) = world.failure {
            return Err(format!("at {:.3} s: {failure}", world.now as f64 / SECOND as f64));
        }
        if world.done {
            return Ok(world.figures);
        }
    }
    Err("the world stood still".to_owned())
}

impl World {
    fn new(seed: u64, faults: Faults, bug: Bug, trace: bool) -> World {
        let mut rng = Rng::stream(seed, 0);
        let nodes = 2 + rng.below(3) as usize;
        let shards = 1 + rng.below(3) as usize;
        let mut world = World {
            now: 0,
            bug,
            faults,
            queue: BinaryHeap::new(),
            order: 0,
            registry: Registry::new(),
            logs: (0..shards).map(|_| Logs::default()).collect(),
            nodes: Vec::new(),
            writes_down: 0,
            reads_down: 0,
            logs_down: 0,
            calm_at: QUIET + SECOND + rng.below(5 * SECOND),
            calm: false,
            openings: 0,
            failure: None,
            figures: Figures { seed, ..Figures::default() },
            done: false,
            trace,
            rng,
        };
        for number in 0..nodes {
            let clock = (world.rng.below(1_000 * SECOND), 970_000 + world.rng.below(60_000));
            world.nodes.push(Node {
                name: format!("n{number}"),
                life: 0,
                member: None,
                shards: Vec::new(),
                checkpoints: vec![None; shards],
                paused_until: 0,
                cut_until: 0,
                reading: false,
                read_due: 0,
                clock,
            });
            let at = world.rng.below(SECOND);
            world.after(at, number, Event::Start);
        }
        for shard in 0..shards {
            world.after(0, 0, Event::Publish(shard));
        }
        world.after(QUIET, 0, Event::Fault);
        world.after(world.calm_at, 0, Event::Calm);
        world
    }

    fn after(&mut self, wait: u64, node: usize, event: Event) {
        let life = self.nodes[node].life;
        self.put(self.now + wait, node, life, event);
    }

    fn put(&mut self, at: u64, node: usize, life: u32, event: Event) {
        self.order += 1;
        self.queue.push(Reverse(Due { at, order: self.order, node, life, event }));
    }

    /// How long a message takes.
    fn delay(&mut self) -> u64 {
        let most = match self.rng.below(100) {
            _ if self.faults == Faults::Outages => 20_000,
            0 => 2 * SECOND,
            1..=5 => SECOND / 3,
            _ => 20_000,
        };
        500 + self.rng.below(most)
    }

    fn fails(&mut self, percent: u32) -> bool {
        self.faults == Faults::All && self.rng.percent(percent)
    }

    fn fail(&mut self, what: String) {
        self.failure.get_or_insert(what);
    }

    fn cut(&self, node: usize) -> bool {
        self.now < self.nodes[node].cut_until
    }

    fn log(&self, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{:9.4} {}", self.now as f64 / SECOND as f64, what());
        }
    }

    fn handle(&mut self, due: Due) {
        let Due { node, life, event, .. } = due;
        if event.of_node() {
            let here = &self.nodes[node];
            if here.life != life || here.member.is_none() {
                return;
            }
            if self.now < here.paused_until {
                let until = here.paused_until;
                return self.put(until, node, life, event);
            }
        }
        match event {
            Event::Read => self.read(node),
            Event::ReadDone { begun, entries } => self.read_done(node, begun, entries),
            Event::Write { key, value, expected, sent } => {
                self.write(node, life, key, value, expected, sent);
            }
            Event::Wrote { key, outcome } => self.wrote(node, &key, outcome),
            Event::Ask { to, shard, question } => self.ask(node, to, shard, &question),
            Event::Answer { shard, answer } => {
                let time = self.nodes[node].time(self.now);
                if let Some(member) = &mut self.nodes[node].member {
                    member.answered(time, shard, Some(&answer));
                }
                self.act(node);
            }
            Event::Nudged => {
                self.nodes[node].read_due = self.now;
                self.read(node);
            }
            Event::Act => self.act(node),
            Event::Open { shard, asked } => self.open(node, shard, asked),
            Event::Loaded { shard, opening, live } => {
                let hosted = self.nodes[node].shards[shard].hosted.as_mut();
                let fits = |h: &&mut Hosted| h.opening == opening && h.live.is_none();
                if let Some(hosted) = hosted.filter(fits) {
                    hosted.live = Some(live);
                    self.tell(node, shard, Happened::Replaying);
                    self.tell(node, shard, Happened::Opened);
                }
            }
            Event::Work { shard } => {
                self.work(node, shard);
                let wait = 10_000 + self.rng.below(140_000);
                self.after(wait, node, Event::Work { shard });
            }
            Event::Commit { shard, opening, record, expected, sent } => {
                self.commit((node, life), shard, opening, record, expected, sent);
            }
            Event::Committed { shard, opening, seal, outcome } => {
                self.committed(node, shard, opening, seal, outcome);
            }
            Event::Checkpoint { shard, checkpoint } => {
                self.nodes[node].checkpoints[shard] = Some(checkpoint);
            }
            Event::Start => self.start(node),
            Event::Publish(shard) => self.publish(shard),
            Event::Fault => self.fault(),
            Event::Calm => self.calm(),
            Event::Look => self.look(),
        }
    }

    // Producers.

    fn publish(&mut self, shard: usize) {
        if self.calm {
            return;
        }
        if self.now >= self.logs_down {
            // Some more than once: producers repeat what they heard no acknowledgement of.
            let event = self.rng.below(u64::from(EVENTS)) as u8;
            self.logs[shard].usage.push(event);
            self.figures.events += 1;
        }
        let wait = 10_000 + self.rng.below(250_000);
        self.after(wait, 0, Event::Publish(shard));
    }

    // The node's process.

    fn start(&mut self, node: usize) {
        if self.nodes[node].member.is_some() {
            return;
        }
        let (seed, shards) = (self.rng.bits(), self.logs.len());
        let settings = Settings {
            ttl: Duration::from_micros(TTL),
            settle: Duration::from_micros(TTL),
            leave_max: Duration::from_micros(3 * TTL),
            standbys: usize::from(seed & 3 == 0),
            ..Settings::new(self.nodes[node].name.clone(), shards as u16)
        };
        let here = &mut self.nodes[node];
        here.life += 1;
        here.member = Some(Member::new(settings, seed));
        here.shards = (0..shards).map(|_| NodeShard::default()).collect();
        (here.reading, here.read_due, here.paused_until) = (false, self.now, 0);
        let life = here.life;
        self.log(|| format!("n{node} starts, life {life}"));
        self.after(0, node, Event::Read);
        for shard in 0..shards {
            self.after(0, node, Event::Work { shard });
        }
    }

    fn end(&mut self, node: usize, restart: u64) {
        self.log(|| format!("n{node} ends"));
        self.nodes[node].member = None;
        self.nodes[node].shards.clear();
        self.after(restart, node, Event::Start);
    }

    // The driver.

    fn read(&mut self, node: usize) {
        let here = &self.nodes[node];
        if here.reading || self.now < here.read_due {
            return;
        }
        let begun = here.time(self.now);
        let away = self.cut(node) || self.now < self.reads_down;
        let old = self.rng.percent(10);
        let age = if old { self.rng.below(5) as usize } else { 0 };
        let entries = (!away).then(|| self.registry.read(age));
        let wait = if away { LIMIT } else { self.delay() };
        let (entries, wait) = if wait >= LIMIT { (None, LIMIT) } else { (entries, wait) };
        self.nodes[node].reading = true;
        self.after(wait, node, Event::ReadDone { begun, entries });
    }

    fn read_done(&mut self, node: usize, begun: Duration, entries: Option<Rc<Vec<Entry>>>) {
        let here = &mut self.nodes[node];
        here.reading = false;
        here.read_due = self.now + TTL / 8;
        let time = here.time(self.now);
        if let (Some(entries), Some(member)) = (entries, &mut here.member) {
            member.read(begun, time, &entries);
        }
        self.after(TTL / 8, node, Event::Read);
        self.act(node);
    }

    fn act(&mut self, node: usize) {
        let here = &mut self.nodes[node];
        let time = here.time(self.now);
        let Some(member) = &mut here.member else { return };
        let held: Vec<_> = here.shards.iter().map(NodeShard::held).collect();
        let actions = member.act(time, &held);
        let (left, refused) = (member.left(), member.refused());
        if member.look() && here.read_due > self.now + TTL / 64 {
            here.read_due = self.now + TTL / 64;
            self.after(TTL / 64, node, Event::Read);
        }
        for action in actions {
            self.execute(node, action);
        }
        if left || refused.is_some() {
            let wait = self.rng.below(2 * SECOND);
            self.end(node, wait);
        }
    }

    fn execute(&mut self, node: usize, action: Action) {
        match action {
            Action::Write { key, value, expected } => {
                let (sent, limit, delay) = (self.now, LIMIT, self.delay());
                let cut = self.cut(node);
                if cut || delay >= limit {
                    let outcome = Err(RegistryError::Unavailable("late".to_owned()));
                    self.after(limit, node, Event::Wrote { key: key.clone(), outcome });
                }
                if !cut {
                    self.after(delay, node, Event::Write { key, value, expected, sent });
                }
            }
            Action::Nudge => {
                for other in (0..self.nodes.len()).filter(|other| *other != node) {
                    for _ in 0..1 + usize::from(self.fails(5)) {
                        if !self.cut(node) && !self.cut(other) && !self.fails(10) {
                            let wait = self.delay();
                            self.after(wait, other, Event::Nudged);
                        }
                    }
                }
            }
            Action::Ask { node: owner, shard, question } => {
                let Some(to) = self.nodes.iter().position(|other| other.name == owner) else {
                    return self.fail(format!("nobody is called {owner}"));
                };
                for _ in 0..1 + usize::from(self.fails(10)) {
                    if !self.cut(node) && !self.cut(to) && !self.fails(5) {
                        let wait = self.delay();
                        self.after(
                            wait,
                            node,
                            Event::Ask { to, shard, question: question.clone() },
                        );
                    }
                }
            }
            // A wish may find no room; whoever decides wishes again.
            _ if self.fails(1) => {}
            Action::StandBy(shard) => self.want(node, shard, Wanted::StandBy),
            Action::Own(shard, token) => self.want(node, shard, Wanted::Own(token)),
            Action::Release(shard) => self.want(node, shard, Wanted::Release),
            Action::Drop(shard) => self.want(node, shard, Wanted::Drop),
        }
    }

    fn want(&mut self, node: usize, shard: ShardId, wanted: Wanted) {
        self.log(|| format!("n{node} shard {shard}: {wanted:?}"));
        self.tell(node, usize::from(shard.0), Happened::Want(wanted));
    }

    fn ask(&mut self, node: usize, to: usize, shard: ShardId, question: &Bytes) {
        // Who is stopped answers too late, who is down not at all.
        let here = &mut self.nodes[to];
        let time = here.time(self.now);
        let stopped = self.now < here.paused_until;
        let Some(member) = here.member.as_mut().filter(|_| !stopped) else { return };
        let answer = member.asked(time, question);
        self.act(to);
        if !self.fails(5) {
            let wait = self.delay();
            self.after(wait, node, Event::Answer { shard, answer });
        }
    }

    // The registry.

    fn write(
        &mut self,
        node: usize,
        life: u32,
        key: String,
        value: Bytes,
        expected: u64,
        sent: u64,
    ) {
        let limit = sent + LIMIT;
        let away = || Err(RegistryError::Unavailable("no answer".to_owned()));
        if self.now < self.writes_down {
            if self.now < limit {
                self.put(limit, node, life, Event::Wrote { key, outcome: away() });
            }
            return;
        }
        let outcome = self.registry.write(&key, &value, expected);
        if outcome.is_ok() {
            self.figures.leases += u64::from(key.starts_with("lease."));
            if value.windows(11).any(|text| text == b"\"buried_by\"") {
                self.figures.buried += 1;
            }
            self.log(|| format!("n{node} wrote {key} {}", String::from_utf8_lossy(&value)));
        }
        if self.now >= limit {
            return;
        }
        let back = self.now + self.delay();
        if back >= limit || self.fails(3) {
            self.put(limit, node, life, Event::Wrote { key, outcome: away() });
        } else {
            self.put(back, node, life, Event::Wrote { key, outcome });
        }
    }

    fn wrote(&mut self, node: usize, key: &str, mut outcome: Result<u64, RegistryError>) {
        let here = &mut self.nodes[node];
        let time = here.time(self.now);
        let Some(member) = &mut here.member else { return };
        let unheard = matches!(outcome, Err(RegistryError::Unavailable(_)));
        if let (Bug::UnheardDeaths, true, Some(Key::Node(named))) =
            (self.bug, unheard, Key::parse(key))
            && named == here.name
            && member.active()
        {
            outcome = Ok(member.revision(&Key::Node(named)));
        }
        member.wrote(time, key, outcome);
        self.act(node);
    }

    // The life of a shard, and its worker.

    fn tell(&mut self, node: usize, shard: usize, happened: Happened) {
        let here = &mut self.nodes[node].shards[shard];
        for action in here.life.on(happened) {
            self.live(node, shard, action);
        }
        self.after(1_000, node, Event::Act);
    }

    fn live(&mut self, node: usize, shard: usize, action: lifecycle::Action) {
        use lifecycle::Action as Do;
        let here = &mut self.nodes[node].shards[shard];
        match action {
            Do::OpenAfter(wait) => {
                here.asked += 1;
                let asked = here.asked;
                let wait = wait.as_micros() as u64;
                self.after(wait, node, Event::Open { shard, asked });
            }
            Do::OwnIt(token) => {
                if let Some(hosted) = &mut here.hosted {
                    (hosted.releasing, hosted.wanted) = (false, Some(token));
                }
            }
            Do::ReleaseIt => match &mut here.hosted {
                Some(hosted) => hosted.releasing = true,
                None => self.tell(node, shard, Happened::HandedOver),
            },
            Do::DropIt => here.hosted = None,
            Do::DrainIt => self.fail("nobody drains here".to_owned()),
            Do::StartReader => here.reading = true,
            Do::StartFollowing => here.following = true,
            Do::StopFollowing => here.following = false,
            Do::StopReaders => (here.reading, here.following) = (false, false),
            Do::RaiseAlarm(why) => self.fail(format!("n{node} shard {shard} stopped: {why}")),
        }
    }

    fn open(&mut self, node: usize, shard: usize, asked: u64) {
        let here = &self.nodes[node].shards[shard];
        if here.asked != asked || *here.life.state() != Life::Restore {
            return;
        }
        self.openings += 1;
        let (opening, wanted) = (self.openings, here.life.goal());
        let hosted = Hosted { opening, live: None, wanted, releasing: false };
        self.nodes[node].shards[shard].hosted = Some(hosted);
        if self.cut(node) || self.now < self.logs_down {
            self.nodes[node].shards[shard].hosted = None;
            return self.tell(node, shard, Happened::Away { reason: "away".to_owned() });
        }
        // Its own checkpoint, one fetched from another node, or none that verifies.
        let from = match self.rng.below(10) {
            0 => None,
            1..=3 => Some(self.rng.below(self.nodes.len() as u64) as usize),
            _ => Some(node),
        };
        let checkpoint = from.and_then(|from| self.nodes[from].checkpoints[shard].as_ref());
        let silent = self.bug != Bug::RepeatedOutput;
        match rebuild(&self.logs[shard], checkpoint, silent) {
            Ok(live) => {
                let long = self.rng.percent(10);
                let wait = 5_000 + self.rng.below(if long { SECOND } else { 100_000 });
                self.after(wait, node, Event::Loaded { shard, opening, live });
            }
            Err(alarm) => self.fail(format!("n{node} shard {shard}: {alarm}")),
        }
    }

    fn work(&mut self, node: usize, shard: usize) {
        let reachable = !self.cut(node);
        let here = &mut self.nodes[node].shards[shard];
        let (reading, following) = (here.reading, here.following);
        let Some(hosted) = &mut here.hosted else { return };
        let Some(live) = &mut hosted.live else { return };
        if live.role == Role::Owner {
            let superseded = hosted.wanted.is_some_and(|token| token > live.token);
            if (hosted.releasing || superseded) && live.pending.is_none() {
                live.role = Role::StandingBy;
                live.known = 0;
                if std::mem::take(&mut hosted.releasing) {
                    hosted.wanted = None;
                    self.tell(node, shard, Happened::HandedOver);
                }
                return;
            }
            if hosted.wanted.is_some() && !superseded {
                hosted.wanted = None;
                self.tell(node, shard, Happened::Owned);
            }
            return self.pump(node, shard, reading && reachable);
        }
        if std::mem::take(&mut hosted.releasing) {
            hosted.wanted = None;
            return self.tell(node, shard, Happened::HandedOver);
        }
        if live.role != Role::StandingBy {
            return;
        }
        let logs = &self.logs[shard];
        let begun = live.commit;
        let slow = self.rng.percent(30);
        if following && reading && reachable && !slow {
            for record in logs.out.iter().filter(|record| record.position > begun) {
                while live.state.usage < record.commit.usage_position {
                    live.state.take(logs.usage[live.state.usage as usize]);
                }
                (live.epoch, live.usage) = (record.commit.epoch, record.commit.usage_position);
                (live.commit, live.token) = (record.position, record.commit.token);
            }
        }
        here.behind = logs.out.iter().filter(|record| record.position > live.commit).count() as u64;
        if live.commit > begun {
            return self.tell(node, shard, Happened::Committed);
        }
        if let Some(token) = hosted.wanted.filter(|_| live.commit >= live.known) {
            // As `LiveShard::seal` says it.
            let token = token.max(live.token + 1);
            live.role = Role::Sealing { token };
            let commit = record(live.epoch, live.usage, token, true);
            self.send(node, shard, commit, 0);
        }
    }

    /// Closes an epoch over some of what waits.
    fn pump(&mut self, node: usize, shard: usize, reading: bool) {
        let some = 1 + self.rng.below(8) as usize;
        let Some(hosted) = &mut self.nodes[node].shards[shard].hosted else { return };
        let Some(live) = hosted.live.as_mut().filter(|live| live.pending.is_none()) else { return };
        let usage = &self.logs[shard].usage;
        if hosted.releasing || !reading || live.usage as usize >= usage.len() {
            return;
        }
        // The state is at the last commit here, as queries see it.
        live.state.usage = live.usage;
        let before = live.state.seen;
        for event in &usage[live.usage as usize..usage.len().min(live.usage as usize + some)] {
            live.state.take(*event);
        }
        let (epoch, usage) = (live.epoch + 1, live.state.usage);
        live.pending = Some((epoch, usage));
        let fresh = live.state.seen & !before | std::mem::take(&mut live.again);
        let commit = record(epoch, usage, live.token, false);
        self.send(node, shard, commit, fresh);
    }

    /// Sends a commit record behind the last one known.
    fn send(&mut self, node: usize, shard: usize, commit: meterr_engine::wire::Commit, fresh: u64) {
        let Some(hosted) = &self.nodes[node].shards[shard].hosted else { return };
        let Some(live) = &hosted.live else { return };
        let (opening, expected, sum) = (hosted.opening, live.commit, live.state.sum);
        let writer = (node, self.nodes[node].life);
        let seal = commit.seal;
        let record = Record { position: 0, commit, fresh, sum, writer };
        let (sent, cut, delay) = (self.now, self.cut(node), self.delay());
        if cut || delay >= TTL {
            let outcome = unavailable();
            self.after(TTL, node, Event::Committed { shard, opening, seal, outcome });
        }
        if !cut {
            self.after(delay, node, Event::Commit { shard, opening, record, expected, sent });
        }
    }

    /// A commit reaches the log.
    fn commit(
        &mut self,
        (node, life): (usize, u32),
        shard: usize,
        opening: u64,
        record: Record,
        expected: u64,
        sent: u64,
    ) {
        let (seal, epoch, token) = (record.commit.seal, record.commit.epoch, record.commit.token);
        let mut outcome = unavailable();
        if self.now >= self.logs_down {
            let fenced = self.bug != Bug::UnfencedCommit;
            outcome = match self.logs[shard].commit(record, expected, fenced) {
                Ok(outcome) => outcome,
                Err(wrong) => return self.fail(format!("shard {shard}: {wrong}")),
            };
            match &outcome {
                Ok(_) if seal => self.figures.seals += 1,
                Ok(_) => self.figures.commits += 1,
                Err(_) => self.figures.refused += 1,
            }
            let what = if seal { "sealed" } else { "committed" };
            let how = if outcome.is_ok() { "" } else { "not " };
            self.log(|| format!("n{node} {how}{what} shard {shard}: epoch {epoch}, token {token}"));
        }
        if self.now - sent >= TTL {
            return;
        }
        let back = self.now + self.delay();
        let lost = back - sent >= TTL
            || self.fails(3)
            || matches!(outcome, Err(LogError::Unavailable { .. }));
        let at = if lost { sent + TTL } else { back };
        let outcome = if lost { unavailable() } else { outcome };
        self.put(at, node, life, Event::Committed { shard, opening, seal, outcome });
    }

    fn committed(
        &mut self,
        node: usize,
        shard: usize,
        opening: u64,
        seal: bool,
        outcome: Result<u64, LogError>,
    ) {
        let here = &mut self.nodes[node].shards[shard];
        let any = self.bug == Bug::ForeignAcknowledgement;
        let hosted = here.hosted.as_mut().filter(|hosted| any || hosted.opening == opening);
        let Some(hosted) = hosted else { return };
        let Some(live) = &mut hosted.live else { return };
        let outcome = outcome.map_err(StopReason::of_commit);
        let happened = match (seal, outcome) {
            (true, Ok(position)) => {
                let Role::Sealing { token } = live.role else { return };
                (live.role, live.token, live.commit) = (Role::Owner, token, position);
                hosted.wanted = None;
                Happened::Owned
            }
            (true, Err(StopReason::TakenOver { actual, .. })) => {
                (live.role, live.known) = (Role::StandingBy, actual);
                Happened::Overtaken
            }
            (false, Ok(position)) => {
                let Some((epoch, usage)) = live.pending.take() else {
                    return self.fail("an acknowledgement without a commit".to_owned());
                };
                // Committed is visible, and nothing else.
                let stands = |record: &Record| {
                    (record.position, record.commit.epoch, record.commit.usage_position)
                        == (position, epoch, usage)
                };
                if !self.logs[shard].out.iter().rev().any(stands) {
                    return self.fail(format!("epoch {epoch} is visible and not committed"));
                }
                (live.epoch, live.usage, live.commit) = (epoch, usage, position);
                let (state, token) = (live.state, live.token);
                let checkpoint = Checkpoint { state, epoch, commit: position, token };
                if self.rng.percent(15) {
                    // Written behind; a crash before loses it.
                    let wait = self.rng.below(SECOND);
                    self.after(wait, node, Event::Checkpoint { shard, checkpoint });
                }
                Happened::Committed
            }
            (_, Err(reason)) => {
                here.hosted = None;
                match reason {
                    StopReason::TakenOver { .. } => Happened::TakenOver,
                    reason if reason.unavailable() => Happened::Away { reason: reason.to_string() },
                    reason => {
                        let transient = reason.transient();
                        Happened::Stopped { reason: reason.to_string(), transient }
                    }
                }
            }
        };
        self.tell(node, shard, happened);
    }

    // Faults.

    fn fault(&mut self) {
        if self.calm {
            return;
        }
        let node = self.rng.below(self.nodes.len() as u64) as usize;
        let shard = self.rng.below(self.logs.len() as u64);
        let until = self.now + 100_000 + self.rng.below(3 * SECOND);
        let kind = match self.faults {
            Faults::All => self.rng.below(14),
            Faults::Outages => self.rng.below(3),
        };
        self.log(|| format!("fault {kind} at n{node} until {:.3}", until as f64 / SECOND as f64));
        let up = self.nodes[node].member.is_some();
        match kind {
            0 => self.writes_down = until,
            1 => (self.writes_down, self.reads_down, self.logs_down) = (until, until, until),
            2 => (self.writes_down, self.logs_down) = (until, until),
            3 | 4 if up => {
                self.figures.crashes += 1;
                self.end(node, until - self.now);
            }
            5..=7 => self.nodes[node].paused_until = until,
            8 | 9 => self.nodes[node].cut_until = until,
            10 => {
                let to = self.rng.percent(70).then(|| format!("n{node}"));
                let pin = records::write(&Pin { format: FORMAT, node: to });
                self.registry.set(&format!("pin.{shard}"), pin);
            }
            11 => {
                let drained = self.rng.percent(50);
                let drain = records::write(&Drain { format: FORMAT, drained });
                self.registry.set(&format!("drain.n{node}"), drain);
            }
            12 => {
                let here = &mut self.nodes[node];
                let time = here.time(self.now);
                if let Some(member) = &mut here.member {
                    member.leave(time);
                }
            }
            13 if up => {
                for shard in 0..self.logs.len() {
                    self.nodes[node].shards[shard].hosted = None;
                    let died = Happened::ThreadDied { culprit: false, reason: "x".to_owned() };
                    if *self.nodes[node].shards[shard].life.state() != Life::Claim {
                        self.tell(node, shard, died);
                    }
                }
            }
            _ => {}
        }
        let wait =
            50_000 + self.rng.below(if self.faults == Faults::All { SECOND } else { 4 * SECOND });
        self.after(wait, 0, Event::Fault);
    }

    /// The last fault is over.
    fn calm(&mut self) {
        self.log(|| "calm".to_owned());
        self.calm = true;
        (self.writes_down, self.reads_down, self.logs_down) = (0, 0, 0);
        for shard in 0..self.logs.len() {
            let pin = records::write(&Pin { format: FORMAT, node: None });
            self.registry.set(&format!("pin.{shard}"), pin);
        }
        for node in 0..self.nodes.len() {
            self.nodes[node].paused_until = 0;
            self.nodes[node].cut_until = 0;
            let drain = records::write(&Drain { format: FORMAT, drained: false });
            self.registry.set(&format!("drain.n{node}"), drain);
            self.after(0, node, Event::Start);
        }
        self.faults = Faults::Outages;
        self.after(SECOND, 0, Event::Look);
    }

    /// Whether everything is in order; it must be, some day.
    fn look(&mut self) {
        match self.disorder() {
            None => {
                self.figures.mended_after = self.now - self.calm_at;
                self.done = true;
            }
            Some(what) if self.now > self.calm_at + MENDED => {
                self.fail(format!("not in order long after the last fault: {what}"));
            }
            Some(_) => self.after(SECOND / 10, 0, Event::Look),
        }
    }

    fn disorder(&self) -> Option<String> {
        for node in &self.nodes {
            let Some(member) = &node.member else { return Some(format!("{} is down", node.name)) };
            if !member.active() || member.moves() != (0, 0) {
                return Some(format!("{} is not settled", node.name));
            }
            let view = member.view(node.time(self.now));
            for shard in &view.shards {
                if shard.owner.is_none() || shard.owner != shard.wanted {
                    return Some(format!("{} sees {shard:?}", node.name));
                }
            }
        }
        for (number, logs) in self.logs.iter().enumerate() {
            let owners = self.nodes.iter().filter(|node| {
                let shard = &node.shards[number];
                let owner = |hosted: &Hosted| {
                    hosted.live.as_ref().is_some_and(|live| live.role == Role::Owner)
                };
                *shard.life.state() == Life::Live && shard.hosted.as_ref().is_some_and(owner)
            });
            if owners.count() != 1 {
                return Some(format!("shard {number} has not one owner"));
            }
            if !logs.whole() {
                return Some(format!("shard {number} is not committed to its end"));
            }
        }
        None
    }
}

fn unavailable() -> Result<u64, LogError> {
    Err(LogError::Unavailable { stream: String::new(), what: String::new() })
}
