//! Checkpoints in memory, for tests and simulation. Keeps the same rules as the store on disk, and
//! damages or refuses on demand. Everything is lost with the process.

use std::collections::BTreeMap;

use bytes::Bytes;
use meterr_operators::ids::ShardId;
use parking_lot::Mutex;

use crate::checkpoint::{Chain, CheckpointError, CheckpointStore, Manifest, Verified};
use crate::checkpoint_record::{
    Record, Slot, SlotAt, Sound, Stored, by_generation, link_of, newer_of, problem_of, refused,
    walk,
};

/// Shard, generation, index.
type Key = (u16, u64, u32);
type Slots = Vec<SlotAt>;

#[derive(Default)]
struct State {
    checkpoints: BTreeMap<Key, (Vec<u8>, Vec<Bytes>)>,
    failures: u32,
}

/// A [`CheckpointStore`] in memory.
pub struct MemoryCheckpointStore {
    format_known: u16,
    state: Mutex<State>,
}

impl MemoryCheckpointStore {
    /// An empty store that believes chunks of formats up to `format_known`.
    pub fn new(format_known: u16) -> Self {
        MemoryCheckpointStore { format_known, state: Mutex::new(State::default()) }
    }

    /// Lets the next `n` writes fail without leaving anything.
    pub fn fail_writes(&self, n: u32) {
        self.state.lock().failures = n;
    }

    /// Changes a byte of a checkpoint's first chunk with any bytes, or of its manifest when there is
    /// none. Says whether there was such a checkpoint.
    pub fn damage(&self, shard: ShardId, generation: u64, index: u32) -> bool {
        let mut state = self.state.lock();
        let place = (shard.0, generation, index);
        let Some((manifest, chunks)) = state.checkpoints.get_mut(&place) else { return false };
        match chunks.iter_mut().find(|chunk| !chunk.is_empty()) {
            Some(chunk) => {
                let mut bytes = chunk.to_vec();
                bytes[0] ^= 1;
                *chunk = Bytes::from(bytes);
            }
            None => manifest[20] ^= 1,
        }
        true
    }

    fn slots(state: &State, shard: ShardId) -> Slots {
        let places = (shard.0, 0, 0)..=(shard.0, u64::MAX, u32::MAX);
        let slot = |(place, (bytes, _)): (&Key, &(Vec<u8>, Vec<Bytes>))| {
            ((place.1, place.2), Slot::read(bytes, place.0, place.1, place.2))
        };
        state.checkpoints.range(places).map(slot).collect()
    }

    fn walk(&self, state: &State, slots: &[SlotAt]) -> Sound<(Manifest, Vec<Bytes>)> {
        let chunks_of = |m: &Manifest| {
            let found = state.checkpoints.get(&(m.shard, m.generation, m.index));
            let chunks = found.map(|(_, chunks)| chunks.clone()).unwrap_or_default();
            Ok::<_, std::convert::Infallible>(Ok(chunks))
        };
        let take = |stored: &Stored, chunks| (stored.record.manifest.clone(), chunks);
        match walk(slots, self.format_known, chunks_of, take) {
            Ok(sound) => sound,
            Err(never) => match never {},
        }
    }
}

impl CheckpointStore for MemoryCheckpointStore {
    fn write(&self, manifest: &Manifest, chunks: &[Bytes]) -> Result<(), CheckpointError> {
        if let Some(problem) = problem_of(manifest, chunks) {
            return Err(refused(problem));
        }
        let mut state = self.state.lock();
        if state.failures > 0 {
            state.failures -= 1;
            return Err(CheckpointError::Store {
                what: "write failed on demand".to_owned(),
                cause: "a test asked for it".to_owned(),
            });
        }
        let previous = link_of(&Self::slots(&state, manifest.shard_id()), manifest)?;
        let record = Record { manifest: manifest.clone(), previous };
        let bytes = record.encode().map_err(|error| refused(error.to_string()))?;
        let place = (manifest.shard, manifest.generation, manifest.index);
        // What stood here and above is replaced; keys of other shards begin with another number.
        state.checkpoints.retain(|at, _| at.0 != place.0 || *at < place);
        state.checkpoints.insert(place, (bytes, chunks.to_vec()));
        Ok(())
    }

    fn list(&self, shard: ShardId) -> Result<Vec<Manifest>, CheckpointError> {
        let slots = Self::slots(&self.state.lock(), shard);
        if let Some((found, known)) = newer_of(&slots) {
            return Err(CheckpointError::Newer { found, known });
        }
        let sound = slots.iter().filter_map(|(_, slot)| slot.sound());
        Ok(sound.map(|stored| stored.record.manifest.clone()).collect())
    }

    fn shards(&self) -> Result<Vec<ShardId>, CheckpointError> {
        let mut shards: Vec<ShardId> =
            self.state.lock().checkpoints.keys().map(|place| ShardId(place.0)).collect();
        shards.dedup();
        Ok(shards)
    }

    fn load(&self, shard: ShardId, before: Option<u64>) -> Result<Option<Chain>, CheckpointError> {
        let state = self.state.lock();
        let slots = Self::slots(&state, shard);
        let mut newer = None;
        for (generation, slots) in by_generation(&slots).rev() {
            if before.is_some_and(|before| generation >= before) {
                continue;
            }
            let sound = self.walk(&state, slots);
            if !sound.parts.is_empty() {
                return Ok(Some(sound.parts));
            }
            newer = newer.or(sound.newer);
        }
        match newer {
            Some((found, known)) => Err(CheckpointError::Newer { found, known }),
            None => Ok(None),
        }
    }

    fn verify(&self, shard: ShardId) -> Result<Vec<Verified>, CheckpointError> {
        let state = self.state.lock();
        let slots = Self::slots(&state, shard);
        let verified = by_generation(&slots)
            .map(|(generation, slots)| self.walk(&state, slots).verified(shard.0, generation));
        Ok(verified.collect())
    }

    fn prune(&self, shard: ShardId, keep: usize) -> Result<(), CheckpointError> {
        let mut state = self.state.lock();
        let slots = Self::slots(&state, shard);
        let mut kept = 0;
        for (generation, slots) in by_generation(&slots).rev() {
            let sound = self.walk(&state, slots);
            kept += usize::from(sound.problem.is_none());
            if kept >= keep.max(1) {
                state.checkpoints.retain(|at, _| at.0 != shard.0 || at.1 >= generation);
                break;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint_testing::{checkpoint, conforms, load, said, write};

    #[test]
    fn it_keeps_the_rules_of_a_store() {
        conforms(&MemoryCheckpointStore::new(1));
    }

    #[test]
    fn faults_on_demand() {
        let store = MemoryCheckpointStore::new(1);
        let parts = [(1, 0), (1, 1), (2, 0), (2, 1)].map(|(g, i)| checkpoint(0, g, i, 1, &[10]));
        store.fail_writes(1);
        assert!(said(store.write(&parts[0].0, &parts[0].1)).contains("on demand"));
        parts.iter().for_each(|part| write(&store, part));

        assert!(store.damage(ShardId(0), 2, 1));
        assert_eq!(load(&store, 0), Some(parts[2..3].to_vec()));
        assert!(store.damage(ShardId(0), 2, 0));
        assert_eq!(load(&store, 0), Some(parts[..2].to_vec()));
        assert!(!store.damage(ShardId(0), 3, 0));
        // The one generation that verifies wholly is kept, and the newest.
        store.prune(ShardId(0), 1).unwrap();
        assert_eq!(store.verify(ShardId(0)).unwrap().len(), 2);
    }
}
