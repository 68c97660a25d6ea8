//! The life of a shard on a node and its worker: opening, following, sealing, committing.

use meterr_connectors::log::LogError;
use meterr_engine::lifecycle::{self, Happened, State as Life};
use meterr_engine::live::StopReason;
use meterr_engine::wire::Commit;

use super::{Bug, Event, SECOND, TTL, World};
use crate::log::{Record, record};
use crate::node::{Checkpoint, Hosted, Role, rebuild};

impl World {
    pub(super) fn tell(&mut self, node: usize, shard: usize, happened: Happened) {
        let here = &mut self.nodes[node].shards[shard];
        for action in here.life.on(happened) {
            self.live(node, shard, action);
        }
        self.after(1_000, node, Event::Act);
    }

    pub(super) fn live(&mut self, node: usize, shard: usize, action: lifecycle::Action) {
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

    pub(super) fn open(&mut self, node: usize, shard: usize, asked: u64) {
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

    pub(super) fn work(&mut self, node: usize, shard: usize) {
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
            if live.token > token {
                here.lost = live.token;
                here.hosted = None;
                return self.tell(node, shard, Happened::TakenOver);
            }
            let token = token.max(live.token + 1);
            live.role = Role::Sealing { token };
            let commit = record(live.epoch, live.usage, token, true);
            self.send(node, shard, commit, 0);
        }
    }

    /// Closes an epoch over some of what waits.
    pub(super) fn pump(&mut self, node: usize, shard: usize, reading: bool) {
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
    pub(super) fn send(&mut self, node: usize, shard: usize, commit: Commit, fresh: u64) {
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
    pub(super) fn commit(
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

    pub(super) fn committed(
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
                here.lost = 0;
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
}

fn unavailable() -> Result<u64, LogError> {
    Err(LogError::Unavailable { stream: String::new(), what: String::new() })
}
