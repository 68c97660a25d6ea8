//! What goes wrong, when that ends, and whether everything is in order afterwards.

use meterr_engine::cluster::records::{self, Drain, FORMAT, Pin};
use meterr_engine::lifecycle::{Happened, State as Life};

use super::{Event, Faults, MENDED, SECOND, World};
use crate::node::{Hosted, Role};

impl World {
    pub(super) fn fault(&mut self) {
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
    pub(super) fn calm(&mut self) {
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
    pub(super) fn look(&mut self) {
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

    pub(super) fn disorder(&self) -> Option<String> {
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
