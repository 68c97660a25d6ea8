//! Checkpoints kept twice: on this node, for a quick restart, and where other nodes find them.
//!
//! What counts is the local store: a checkpoint that stands there is written. A shared store that fails
//! is noted, and its chain is then broken: deltas would be behind something that is not there, so it
//! gets nothing until the next base. [`Layered::base_above`] asks for that base, at once after a load
//! that left the two different, and after a failure in a while, longer each time, since a base costs
//! much more than a delta.
//!
//! Generations count over both stores: a base must be above every generation either of them has.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use meterr_operators::ids::ShardId;
use parking_lot::Mutex;

use crate::checkpoint::{
    Chain, CheckpointError, CheckpointStore, Kind, Manifest, Notice, Verified,
};

/// Time from a failure of the shared store to the base that is asked for, the first time.
const PAUSE_MIN: Duration = Duration::from_secs(30);
/// The same after many failures.
const PAUSE_MAX: Duration = Duration::from_secs(1_800);

/// Two stores as one.
pub struct Layered {
    local: Arc<dyn CheckpointStore>,
    shared: Arc<dyn CheckpointStore>,
    pause_min: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Shards whose next checkpoint in the shared store must be a base.
    broken: HashMap<ShardId, Broken>,
    notices: Vec<Notice>,
}

struct Broken {
    /// When a base is asked for.
    at: Instant,
    pause: Duration,
    /// Newest generation known in either store.
    generation: u64,
}

impl Layered {
    /// A store of a local one and one that nodes share.
    pub fn new(local: Arc<dyn CheckpointStore>, shared: Arc<dyn CheckpointStore>) -> Layered {
        Layered { local, shared, pause_min: PAUSE_MIN, state: Mutex::default() }
    }

    fn note(&self, what: String) {
        self.state.lock().notices.push(Notice::Later(what));
    }

    /// The shared chain of a shard has ended. A base is asked for at once, or after a pause.
    fn broke(&self, shard: ShardId, generation: u64, at_once: bool) {
        let mut state = self.state.lock();
        let before = state.broken.get(&shard);
        let pause = match before {
            Some(before) if !at_once => (before.pause * 2).min(PAUSE_MAX),
            _ => self.pause_min,
        };
        let generation = before.map_or(0, |before| before.generation).max(generation);
        let at = if at_once { Instant::now() } else { Instant::now() + pause };
        state.broken.insert(shard, Broken { at, pause, generation });
    }

    /// What the shared store has, or a notice.
    fn shared_list(&self, shard: ShardId) -> Option<Vec<Manifest>> {
        match self.shared.list(shard) {
            Ok(list) => Some(list),
            Err(error) => {
                self.note(format!("shared checkpoints of shard {shard}: {}", told(&error)));
                None
            }
        }
    }

    fn write_shared(&self, manifest: &Manifest, chunks: &[Bytes]) {
        let shard = manifest.shard_id();
        if manifest.kind == Kind::Delta && self.state.lock().broken.contains_key(&shard) {
            return;
        }
        let Err(error) = self.shared.write(manifest, chunks) else {
            if manifest.kind == Kind::Base {
                self.state.lock().broken.remove(&shard);
            }
            return;
        };
        self.note(format!(
            "checkpoint {} of generation {} of shard {shard} is only on this node: {}",
            manifest.index,
            manifest.generation,
            told(&error)
        ));
        // Another node may have begun a generation meanwhile that is as high.
        let list = self.shared.list(shard).unwrap_or_default();
        let newest = list.iter().map(|m| m.generation).max().max(self.shared.base_above(shard));
        let newest = newest.unwrap_or(0);
        let at_once = manifest.kind == Kind::Base && newest >= manifest.generation;
        self.broke(shard, newest.max(manifest.generation), at_once);
    }
}

/// An error with its cause.
fn told(error: &CheckpointError) -> String {
    match error {
        CheckpointError::Store { what, cause } => format!("{what}: {cause}"),
        error => error.to_string(),
    }
}

/// Last epoch and token of a chain.
fn reaches(chain: Option<&Chain>) -> Option<(u64, u64)> {
    chain?.last().map(|(manifest, _)| (manifest.epoch, manifest.token))
}

impl CheckpointStore for Layered {
    fn write(&self, manifest: &Manifest, chunks: &[Bytes]) -> Result<(), CheckpointError> {
        self.local.write(manifest, chunks)?;
        self.write_shared(manifest, chunks);
        Ok(())
    }

    fn list(&self, shard: ShardId) -> Result<Vec<Manifest>, CheckpointError> {
        let mut joined = self.local.list(shard)?;
        for manifest in self.shared_list(shard).unwrap_or_default() {
            if !joined.contains(&manifest) {
                joined.push(manifest);
            }
        }
        joined.sort_by_key(|m| (m.generation, m.index, m.epoch, m.token));
        Ok(joined)
    }

    fn shards(&self) -> Result<Vec<ShardId>, CheckpointError> {
        let mut shards = self.local.shards()?;
        match self.shared.shards() {
            Ok(more) => shards.extend(more),
            Err(error) => self.note(format!("shared checkpoints: {}", told(&error))),
        }
        shards.sort_unstable();
        shards.dedup();
        Ok(shards)
    }

    fn load(&self, shard: ShardId, before: Option<u64>) -> Result<Option<Chain>, CheckpointError> {
        let local = self.local.load(shard, before);
        let reached = reaches(local.as_ref().ok().and_then(Option::as_ref));
        let listed = self.shared_list(shard);
        // Not fetched when it cannot be newer. A listing that failed says nothing.
        let wanted = |m: &Manifest| before.is_none_or(|before| m.generation < before);
        let newest =
            listed.iter().flatten().filter(|m| wanted(m)).map(|m| (m.epoch, m.token)).max();
        let shared = match newest > reached || listed.is_none() || local.is_err() {
            true => self.shared.load(shard, before).unwrap_or_else(|error| {
                self.note(format!("shared checkpoints of shard {shard}: {}", told(&error)));
                None
            }),
            false => None,
        };
        let chain = match (local, shared) {
            (Ok(local), shared) if reaches(shared.as_ref()) > reached => shared.or(local),
            (Ok(local), _) => local,
            (Err(error), Some(shared)) => {
                self.note(format!("local checkpoints of shard {shard}: {}", told(&error)));
                Some(shared)
            }
            (Err(error), None) => return Err(error),
        };
        if before.is_none() {
            let here = self.local.list(shard).unwrap_or_default();
            let there = listed.unwrap_or_default();
            let last = chain.as_ref().and_then(|chain| chain.last()).map(|(m, _)| m);
            let generation = here.iter().chain(&there).map(|m| m.generation).max().unwrap_or(0);
            if here.last() == last && there.last() == last {
                self.state.lock().broken.remove(&shard);
            } else {
                self.broke(shard, generation, true);
            }
        }
        Ok(chain)
    }

    fn verify(&self, shard: ShardId) -> Result<Vec<Verified>, CheckpointError> {
        let mut verified = self.local.verify(shard)?;
        match self.shared.verify(shard) {
            Ok(shared) => verified.extend(shared.into_iter().map(|mut verified| {
                let problem = verified.problem.take();
                verified.problem = problem.map(|problem| format!("in the shared store: {problem}"));
                verified
            })),
            Err(error) => self.note(format!("shared checkpoints of {shard}: {}", told(&error))),
        }
        Ok(verified)
    }

    fn take_notices(&self) -> Vec<Notice> {
        let mut notices = self.local.take_notices();
        notices.extend(self.shared.take_notices());
        notices.append(&mut self.state.lock().notices);
        notices
    }

    fn base_above(&self, shard: ShardId) -> Option<u64> {
        let state = self.state.lock();
        let due = state.broken.get(&shard).filter(|broken| Instant::now() >= broken.at);
        due.map(|broken| broken.generation).or_else(|| self.local.base_above(shard))
    }

    fn prune(&self, shard: ShardId, keep: usize) -> Result<(), CheckpointError> {
        self.local.prune(shard, keep)?;
        if let Err(error) = self.shared.prune(shard, keep) {
            self.note(format!("old shared checkpoints of shard {shard} stay: {}", told(&error)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
