//! A node's process: what `driver` does with what its member decides, and the registry that it reaches.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use meterr_connectors::cluster::{Entry, RegistryError};
use meterr_engine::cluster::member::{Action, Member, Settings};
use meterr_engine::cluster::records::Key;
use meterr_engine::lifecycle::{Happened, Wanted};
use meterr_operators::ids::ShardId;

use super::{Bug, Event, LIMIT, SECOND, TTL, World};
use crate::node::NodeShard;

impl World {
    pub(super) fn start(&mut self, node: usize) {
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

    pub(super) fn end(&mut self, node: usize, restart: u64) {
        self.log(|| format!("n{node} ends"));
        self.nodes[node].member = None;
        self.nodes[node].shards.clear();
        self.after(restart, node, Event::Start);
    }

    pub(super) fn read(&mut self, node: usize) {
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

    pub(super) fn read_done(
        &mut self,
        node: usize,
        begun: Duration,
        entries: Option<Rc<Vec<Entry>>>,
    ) {
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

    pub(super) fn act(&mut self, node: usize) {
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

    pub(super) fn execute(&mut self, node: usize, action: Action) {
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

    pub(super) fn want(&mut self, node: usize, shard: ShardId, wanted: Wanted) {
        self.log(|| format!("n{node} shard {shard}: {wanted:?}"));
        self.tell(node, usize::from(shard.0), Happened::Want(wanted));
    }

    pub(super) fn ask(&mut self, node: usize, to: usize, shard: ShardId, question: &Bytes) {
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

    pub(super) fn write(
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

    pub(super) fn wrote(
        &mut self,
        node: usize,
        key: &str,
        mut outcome: Result<u64, RegistryError>,
    ) {
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
}
