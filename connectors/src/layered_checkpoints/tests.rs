use meterr_operators::rng::Rng;
use tokio::runtime::Runtime;

use super::*;
use crate::blob_checkpoints::BlobCheckpoints;
use crate::blobs::memory::MemoryBlobs;
use crate::checkpoint::chunks_hash;
use crate::checkpoint_memory::MemoryCheckpointStore;
use crate::checkpoint_testing::{checkpoint, conforms};

const SHARD: ShardId = ShardId(3);

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn shared(blobs: &MemoryBlobs, runtime: &Runtime) -> Arc<BlobCheckpoints> {
    Arc::new(BlobCheckpoints::new(Arc::new(blobs.clone()), runtime.handle().clone(), 1))
}

#[test]
fn it_keeps_the_rules_of_a_store() {
    let (runtime, blobs) = (runtime(), MemoryBlobs::new());
    let local = Arc::new(MemoryCheckpointStore::new(1));
    // Both alike: a verification shows each generation twice, so the rules hold for one with nothing
    // in the other.
    blobs.fail(true);
    conforms(&Layered::new(local, shared(&blobs, &runtime)));
}

/// One shard on one node, which takes checkpoints as a shard at work does.
struct Node {
    local: Arc<MemoryCheckpointStore>,
    store: Layered,
    generation: u64,
    index: u32,
    base_due: bool,
    /// Epoch of the last checkpoint: a delta holds what came since.
    since: u64,
    epoch: u64,
    token: u64,
}

impl Node {
    fn new(local: Arc<MemoryCheckpointStore>, shared: Arc<dyn CheckpointStore>) -> Node {
        let mut store = Layered::new(local.clone(), shared);
        store.pause_min = Duration::ZERO;
        let (generation, index, base_due, since, epoch, token) = (0, 0, true, 0, 0, 0);
        Node { local, store, generation, index, base_due, since, epoch, token }
    }

    /// Restores, as the owner under a token, what was committed up to an epoch.
    fn restore(&mut self, token: u64, committed: u64) {
        let chain = self.store.load(SHARD, None).unwrap();
        let reached = chain.as_ref().map_or(0, contiguous);
        assert!(reached <= committed);
        (self.generation, self.index, self.base_due) = (0, 0, true);
        if let Some((last, _)) = chain.as_ref().and_then(|chain| chain.last()) {
            let newest = self.store.list(SHARD).unwrap().pop();
            self.base_due = newest.as_ref() != Some(last);
            self.index = last.index;
            self.generation = newest.map_or(0, |newest| newest.generation).max(last.generation);
        }
        (self.since, self.epoch, self.token) = (reached, committed, token);
    }

    /// Takes a checkpoint; says whether it is on this node, and whether it is a base.
    fn checkpoint(&mut self, seed: u64) -> (bool, bool) {
        let above = self.store.base_above(SHARD);
        let base = self.base_due || above.is_some();
        if base {
            self.generation = self.generation.max(above.unwrap_or(0)) + 1;
        }
        self.index = if base { 0 } else { self.index + 1 };
        let (mut manifest, _) = checkpoint(3, self.generation, self.index, seed, &[]);
        // What it holds: the epochs after the first, up to the second.
        let from = if base { 0 } else { self.since };
        let chunks = vec![Bytes::from(format!("{from} {} {seed}", self.epoch))];
        (manifest.epoch, manifest.token) = (self.epoch, self.token);
        (manifest.usage_position, manifest.control_position) = (self.epoch, self.epoch);
        (manifest.log_time, manifest.commit_position) = (self.epoch as i64, self.epoch);
        (manifest.chunks, manifest.bytes) = (1, chunks[0].len() as u64);
        manifest.hash = chunks_hash(&chunks);
        let done = self.store.write(&manifest, &chunks).is_ok();
        self.base_due = !done;
        self.since = self.epoch;
        (done, base)
    }
}

/// The epoch a chain reaches; nothing in between may be missing.
fn contiguous(chain: &Chain) -> u64 {
    let mut reached = 0;
    for (manifest, chunks) in chain {
        let text = String::from_utf8(chunks[0].to_vec()).unwrap();
        let mut numbers = text.split(' ').map(|number| number.parse::<u64>().unwrap());
        assert_eq!(numbers.next(), Some(reached), "generation {}", manifest.generation);
        reached = numbers.next().unwrap();
        assert_eq!(manifest.epoch, reached);
    }
    reached
}

/// A shard that goes from node to node, with a shared store that fails now and then. Returns how often
/// the shared store failed, how often a node took over, and how often what is shared was behind.
fn history(seed: u64) -> [usize; 3] {
    let (runtime, blobs) = (runtime(), MemoryBlobs::new());
    let mut rng = Rng::new(seed);
    let node = |local| Node::new(local, shared(&blobs, &runtime));
    let fresh = || Arc::new(MemoryCheckpointStore::new(1));
    let mut nodes = [node(fresh()), node(fresh())];
    let (mut owner, mut token, mut committed) = (0, 1, 1);
    nodes[owner].restore(token, committed);
    let (mut failures, mut moves, mut behind) = (0, 0, 0);
    let (mut failing, damages) = (false, seed.is_multiple_of(2));
    for _ in 0..120 {
        match rng.below(12) {
            0 => {
                failing = !failing;
                blobs.fail(failing);
                failures += usize::from(failing);
            }
            1 => blobs.fail_writes(1),
            2 => blobs.lose_answers(1),
            3 => nodes[owner].local.fail_writes(1),
            4 => {
                let names = blobs.names();
                if !names.is_empty() && damages {
                    blobs.damage(&names[rng.below(names.len() as u64) as usize]);
                }
            }
            5 => {
                // The node starts again, with its own disk or an empty one.
                let local = if rng.percent(70) { nodes[owner].local.clone() } else { fresh() };
                nodes[owner] = node(local);
                token += 1;
                nodes[owner].restore(token, committed);
            }
            6 => {
                // Another takes over; this one writes once more, without knowing.
                let frozen = owner;
                owner = 1 - owner;
                token += 1;
                moves += 1;
                nodes[owner].restore(token, committed);
                if rng.percent(50) {
                    nodes[frozen].checkpoint(rng.below(1 << 40));
                }
            }
            7 => nodes[owner].store.prune(SHARD, 2).unwrap_or_default(),
            _ => {
                committed += rng.below(3);
                let owner = &mut nodes[owner];
                owner.epoch = committed;
                if owner.epoch > owner.since || owner.base_due {
                    owner.checkpoint(rng.below(1 << 40));
                }
            }
        }
        // Whoever restores gets the better of both.
        let there = shared(&blobs, &runtime).load(SHARD, None).ok().flatten();
        let here = nodes[owner].local.load(SHARD, None).unwrap();
        let best = here.as_ref().map(contiguous).max(there.as_ref().map(contiguous));
        let reader = Layered::new(nodes[owner].local.clone(), shared(&blobs, &runtime));
        let loaded = reader.load(SHARD, None).unwrap();
        assert_eq!(loaded.as_ref().map(contiguous), best, "seed {seed}");
        behind += usize::from(there.as_ref().map(contiguous) < here.as_ref().map(contiguous));
    }
    // Once nothing fails any more both are whole within a few checkpoints.
    blobs.fail(false);
    blobs.fail_writes(0);
    blobs.lose_answers(0);
    let node = &mut nodes[owner];
    node.local.fail_writes(0);
    let mut turns = 0;
    loop {
        committed += 1;
        node.epoch = committed;
        // Damage is noticed at the next load only; until then a base now and then mends it.
        node.base_due |= damages && turns == 2;
        let (done, _) = node.checkpoint(turns);
        assert!(done, "seed {seed}: the local store is well");
        let there = shared(&blobs, &runtime).load(SHARD, None).unwrap();
        if there.as_ref().map(contiguous) == Some(committed) {
            break;
        }
        turns += 1;
        assert!(turns < 4, "seed {seed}: {:?}", node.store.take_notices());
    }
    // And go on with deltas.
    committed += 1;
    node.epoch = committed;
    assert_eq!(node.checkpoint(99), (true, false), "seed {seed}");
    [failures, moves, behind]
}

#[test]
fn a_shard_goes_from_node_to_node_through_failures() {
    let seeds = std::env::var("METERR_CHECKPOINT_SEEDS").map_or(60, |text| text.parse().unwrap());
    let mut sums = [0; 3];
    for seed in 0..seeds {
        history(seed).into_iter().zip(&mut sums).for_each(|(count, sum)| *sum += count);
    }
    // Otherwise nothing was shown.
    assert!(sums.iter().all(|sum| *sum > seeds as usize), "{sums:?}");
}

#[test]
fn a_failing_shared_store_is_noted_and_asks_for_a_base_later() {
    let (runtime, blobs) = (runtime(), MemoryBlobs::new());
    let local = Arc::new(MemoryCheckpointStore::new(1));
    let layered = Layered::new(local.clone(), shared(&blobs, &runtime));
    let write = |generation, index| {
        let (manifest, chunks) = checkpoint(3, generation, index, 1, &[10]);
        layered.write(&manifest, &chunks).unwrap();
    };
    write(1, 0);
    write(1, 1);
    assert_eq!((layered.take_notices().len(), layered.base_above(SHARD)), (0, None));
    blobs.fail(true);
    write(1, 2);
    let notices = layered.take_notices();
    let later = matches!(&notices[0], Notice::Later(what) if what.contains("checkpoint 2 of generation 1 of shard 3"));
    assert!(later, "{notices:?}");
    // Not at once: it would most likely fail as well, and a base is dear.
    assert_eq!(layered.base_above(SHARD), None);
    blobs.fail(false);
    write(1, 3);
    assert_eq!(layered.shared.list(SHARD).unwrap().len(), 2);
    assert_eq!(layered.list(SHARD).unwrap().len(), 4);
    // After a load it is: the two are known to differ, and there is time.
    let chain = layered.load(SHARD, None).unwrap().unwrap();
    assert_eq!((chain.len(), layered.base_above(SHARD)), (4, Some(1)));
    write(2, 0);
    assert_eq!(layered.base_above(SHARD), None);
    assert_eq!(layered.shared.load(SHARD, None).unwrap(), local.load(SHARD, None).unwrap());
    assert_eq!(layered.shards().unwrap(), [SHARD]);
    assert_eq!(layered.verify(SHARD).unwrap().len(), 4);
    layered.prune(SHARD, 1).unwrap();
    assert_eq!(layered.verify(SHARD).unwrap().len(), 2);
}
