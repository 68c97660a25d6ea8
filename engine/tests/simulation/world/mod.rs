//! The world: nodes, registry, logs and what goes wrong between them, in the order of a clock that only
//! this file moves. The same seed gives the same history.

mod driver;
mod faults;
mod worker;

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use meterr_connectors::cluster::{Entry, RegistryError};
use meterr_connectors::log::LogError;
use meterr_engine::lifecycle::Happened;
use meterr_operators::ids::ShardId;
use meterr_operators::rng::Rng;

use crate::log::{EVENTS, Logs, Record};
use crate::node::{Checkpoint, Hosted, Live, Node};
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
}
