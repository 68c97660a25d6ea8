//! One node: the real member and the real life of each shard, around a model of the worker that does what
//! `worker.rs` does.

use std::time::Duration;

use meterr_connectors::checkpoint::{Kind, Manifest};
use meterr_engine::cluster::Held;
use meterr_engine::cluster::member::Member;
use meterr_engine::lifecycle::{self, Lifecycle};
use meterr_engine::recovery::{Facts, plan};

use crate::log::{Logs, State};

/// A checkpoint of a shard.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    pub state: State,
    pub epoch: u64,
    pub commit: u64,
    pub token: u64,
}

/// A state that stands by or is owned.
#[derive(Debug, Clone)]
pub struct Live {
    pub state: State,
    pub epoch: u64,
    /// Usage position committed.
    pub usage: u64,
    /// Position of the last commit record.
    pub commit: u64,
    pub token: u64,
    pub role: Role,
    /// A commit under way: its epoch and usage position.
    pub pending: Option<(u64, u64)>,
    /// Position of a commit that others are known to have made.
    pub known: u64,
    /// Events that a planted bug publishes once more.
    pub again: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    StandingBy,
    Sealing { token: u64 },
    Owner,
}

/// A shard on a worker.
pub struct Hosted {
    /// Which opening it is of.
    pub opening: u64,
    /// None while it is loaded.
    pub live: Option<Live>,
    pub wanted: Option<u64>,
    pub releasing: bool,
}

#[derive(Default)]
pub struct NodeShard {
    pub life: Lifecycle,
    /// Counts openings asked for by the life.
    pub asked: u64,
    pub hosted: Option<Hosted>,
    pub reading: bool,
    pub following: bool,
    pub behind: u64,
    /// Token the log was found sealed under when it was lost, 0 if that is not known.
    pub lost: u64,
}

impl NodeShard {
    /// As `ownership.rs` says it.
    pub fn held(&self) -> Held {
        use lifecycle::State;
        let goal = self.life.goal();
        match (self.life.state(), goal) {
            (State::Claim, _) => Held::Nothing,
            (State::Restore | State::Replay, None) => Held::Opening,
            (State::Restore | State::Replay | State::Seal, _) => {
                Held::Owned { token: goal.unwrap_or(0), live: false }
            }
            (State::StandBy, _) => Held::StandingBy { behind: self.behind },
            (State::Live, _) => Held::Owned { token: goal.unwrap_or(0), live: true },
            (State::Release | State::Drain, _) => Held::Releasing,
            (State::HandOver | State::Released, _) => Held::Released,
            (State::Lost, _) => Held::Lost { token: self.lost },
            (State::Stopped(why), _) => Held::Stopped(why.clone()),
        }
    }
}

pub struct Node {
    pub name: String,
    /// Counts its processes; what an earlier one sent or awaits means nothing to this one.
    pub life: u32,
    /// None while it is down.
    pub member: Option<Member>,
    pub shards: Vec<NodeShard>,
    /// Its disk: what survives a crash.
    pub checkpoints: Vec<Option<Checkpoint>>,
    pub paused_until: u64,
    /// Until when nothing of it reaches anything.
    pub cut_until: u64,
    pub reading: bool,
    pub read_due: u64,
    /// Its clock: begin, and speed in millionths.
    pub clock: (u64, u64),
}

impl Node {
    /// Its clock at a time of the world.
    pub fn time(&self, now: u64) -> Duration {
        Duration::from_micros(self.clock.0 + now * self.clock.1 / 1_000_000)
    }
}

fn manifest(checkpoint: &Checkpoint) -> Manifest {
    Manifest {
        format: 1,
        shard: 0,
        generation: 1,
        index: 0,
        kind: Kind::Base,
        usage_log: "u".to_owned(),
        usage_position: checkpoint.state.usage,
        usage_hash: hash(checkpoint.state.usage),
        control_log: "c".to_owned(),
        control_position: 0,
        log_time: 0,
        epoch: checkpoint.epoch,
        commit_position: checkpoint.commit,
        token: checkpoint.token,
        chunks: 0,
        bytes: 0,
        hash: [0; 32],
    }
}

fn hash(position: u64) -> [u8; 32] {
    [position as u8; 32]
}

/// Rebuilds a state from a checkpoint and the logs as they are, by the real plan: silently to the last
/// commit. `silent: false` plants a bug: what replay changed is published with the next epoch.
///
/// # Errors
/// An alarm, which no history here may raise.
pub fn rebuild(logs: &Logs, checkpoint: Option<&Checkpoint>, silent: bool) -> Result<Live, String> {
    let manifest = checkpoint.map(manifest);
    let plan = plan(&Facts {
        checkpoint: manifest.as_ref(),
        commit: logs.last().map(|record| &record.commit),
        usage_log: "u",
        control_log: "c",
        usage_head: logs.usage.len() as u64,
        control_head: 0,
        usage_hash: checkpoint.map(|checkpoint| hash(checkpoint.state.usage)),
    })
    .map_err(|alarm| alarm.to_string())?;
    let mut state = checkpoint.filter(|_| plan.load).map_or(State::default(), |c| c.state);
    if state.usage + 1 != plan.usage_from {
        return Err(format!("a plan from {} on a state at {}", plan.usage_from, state.usage));
    }
    let loaded = state.seen;
    let (mut commit, mut token) = (plan.commit_from, 0);
    for record in logs.out.iter().filter(|record| record.position > plan.commit_from) {
        while state.usage < record.commit.usage_position {
            state.take(logs.usage[state.usage as usize]);
        }
        commit = record.position;
        token = record.commit.token;
    }
    if let (0, Some(checkpoint)) = (token, checkpoint) {
        token = checkpoint.token;
    }
    Ok(Live {
        usage: state.usage,
        state,
        epoch: plan.epoch,
        commit,
        token,
        role: Role::StandingBy,
        pending: None,
        known: 0,
        again: if silent { 0 } else { state.seen & !loaded },
    })
}
