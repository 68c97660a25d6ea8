use meterr_operators::rng::Rng;

use super::*;
use crate::blobs::local::LocalBlobs;
use crate::blobs::memory::MemoryBlobs;
use crate::checkpoint::chunks_hash;
use crate::checkpoint_testing::{Part, checkpoint, conforms, load, said, write};

const SHARD: ShardId = ShardId(3);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

fn store(blobs: &MemoryBlobs, runtime: &tokio::runtime::Runtime) -> BlobCheckpoints {
    let mut store = BlobCheckpoints::new(Arc::new(blobs.clone()), runtime.handle().clone(), 1);
    store.part_len = 100;
    store
}

#[test]
fn it_keeps_the_rules_of_a_store() {
    let runtime = runtime();
    let blobs = MemoryBlobs::new();
    conforms(&store(&blobs, &runtime));
    assert!(
        blobs.names().iter().any(|name| name.ends_with(".00001")),
        "parts: {:?}",
        blobs.names()
    );
    let dir = tempfile::tempdir().unwrap();
    let local = Arc::new(LocalBlobs::open(dir.path()).unwrap());
    conforms(&BlobCheckpoints::new(local, runtime.handle().clone(), 1));
}

#[test]
fn names_are_read_as_they_are_written() {
    let (manifest, _) = checkpoint(7, 12, 3, 1, &[5]);
    let name = name_of(&manifest, &[0xab; 32]);
    let dir = "checkpoint/007/00000000000000000012-00000000000000000001/";
    assert_eq!(name.text, format!("{dir}0000000003-abababababababab"));
    let rest = name.text.strip_prefix("checkpoint/007/").unwrap();
    assert_eq!(parse(rest), Some((12, 1, 3, None)));
    assert_eq!(parse(&part_name(rest, 9)), Some((12, 1, 3, Some(9))));
    let zeros = "0".repeat(20);
    for strange in [
        "",
        "a/b",
        "1-1/1-ab",
        &format!("{zeros}-{zeros}/0000000000-ABABABABABABABAB"),
        &format!("{zeros}-{zeros}/0000000000-abababababababab.x"),
        &format!("+{}-{zeros}/0000000000-abababababababab", &zeros[1..]),
        &format!("{}-{zeros}/0000000000-abababababababab", "9".repeat(20)),
    ] {
        assert_eq!(parse(strange), None, "{strange}");
    }
}

#[test]
fn strangers_and_crashes_leave_nothing_that_is_believed() {
    let (runtime, blobs) = (runtime(), MemoryBlobs::new());
    let store = store(&blobs, &runtime);
    let (base, next) = (checkpoint(3, 1, 0, 1, &[300, 300]), checkpoint(3, 1, 1, 1, &[300]));
    write(&store, &base);
    // A write that fails at any point leaves the chain as it was.
    for fail in 1..=2 {
        blobs.fail_writes(fail);
        assert!(said(store.write(&next.0, &next.1)).contains("on demand"));
        blobs.fail_writes(0);
        assert_eq!(load(&store, 3), Some(vec![base.clone()]));
    }
    let put = |name: &str, bytes: &[u8]| {
        let bytes = Bytes::copy_from_slice(bytes);
        runtime.block_on(blobs.put(name, bytes)).unwrap();
    };
    let dir = "checkpoint/003/00000000000000000009-00000000000000000009/0000000000-";
    put(&format!("{dir}0000000000000000"), b"not a manifest");
    put(&format!("{dir}1111111111111111.00000"), b"chunks of nothing");
    put("checkpoint/003/elsewhere", b"x");
    put("checkpoint/xyz/elsewhere", b"x");
    // One that stands in another's place: whoever copies it there does not make it newer.
    let manifest = blobs.names().into_iter().find(|name| !name.contains('.')).unwrap();
    let bytes = runtime.block_on(blobs.get(&manifest)).unwrap().unwrap();
    put(&format!("{dir}2222222222222222"), &bytes);
    assert_eq!(load(&store, 3), Some(vec![base.clone()]));
    assert_eq!(store.list(SHARD).unwrap(), std::slice::from_ref(&base.0));
    assert_eq!(store.shards().unwrap(), [SHARD]);
    assert_eq!(store.verify(SHARD).unwrap().len(), 2);
}

#[test]
fn a_delta_is_not_written_behind_the_wrong_checkpoint() {
    let (runtime, blobs) = (runtime(), MemoryBlobs::new());
    let (old, new) = (store(&blobs, &runtime), store(&blobs, &runtime));
    let of = |token: u64, index: u32, seed: u64| {
        let (mut manifest, chunks) = checkpoint(3, 1, index, seed, &[50]);
        manifest.token = token;
        (manifest, chunks)
    };
    write(&old, &of(1, 0, 1));
    assert!(new.load(SHARD, None).unwrap().is_some());
    // Both go on from there, each behind its own.
    write(&old, &of(1, 1, 1));
    write(&new, &of(2, 1, 2));
    // The newer owner's stands; the old one is behind it from now on, if it asks anew.
    write(&new, &of(2, 2, 3));
    let chain = load(&new, 3).unwrap();
    assert_eq!(chain, vec![of(1, 0, 1), of(2, 1, 2), of(2, 2, 3)]);
    let third = store(&blobs, &runtime);
    let unknown = said(third.write(&of(3, 2, 4).0, &of(3, 2, 4).1));
    assert!(unknown.contains("several checkpoints before it"), "{unknown}");
    // Nor when what it continues is lost and another stands in its place.
    let name = blobs.names().into_iter().find(|n| n.contains("2/0000000002-")).unwrap();
    assert!(blobs.lose(&name));
    write(&old, &of(1, 2, 1));
    let lost = said(new.write(&of(2, 3, 4).0, &of(2, 3, 4).1));
    assert!(lost.contains("has lost what is before it"), "{lost}");
    // The old one cannot begin a generation that the new one began.
    let base = |token: u64| {
        let (mut manifest, chunks) = checkpoint(3, 2, 0, token, &[50]);
        manifest.token = token;
        (manifest, chunks)
    };
    write(&new, &base(2));
    assert!(said(old.write(&base(1).0, &base(1).1)).contains("not above the newest"));
    // The other way round it can: what a frozen owner wrote last does not stop its successor.
    write(&third, &base(3));
    assert_eq!(load(&new, 3), Some(vec![base(3)]));
}

/// A checkpoint somebody tried to write, with all it continues.
#[derive(Clone)]
struct Tried {
    chain: Chain,
    names: Vec<String>,
}

impl Tried {
    fn rank(&self) -> (u64, u64) {
        self.chain.last().map(|(m, _)| (m.epoch, m.token)).unwrap()
    }

    fn then(&self, part: Part) -> Tried {
        let mut tried = self.clone();
        tried.chain.push(part);
        let mut previous = NO_PREVIOUS;
        tried.names.clear();
        for (manifest, _) in &tried.chain {
            let record = Record { manifest: manifest.clone(), previous };
            previous = record_hash(&record.encode().unwrap());
            tried.names.push(name_of(manifest, &previous).text);
        }
        tried
    }
}

/// A node that writes, as a shard at work does.
struct Writer {
    store: BlobCheckpoints,
    token: u64,
    /// What its next delta continues; none: a base is due.
    at: Option<Tried>,
    epoch: u64,
}

impl Writer {
    fn next(&mut self, rng: &mut Rng) -> Option<Tried> {
        let list = self.store.list(SHARD).ok()?;
        let base = self.at.is_none() || rng.percent(15);
        let (generation, index) = match &self.at {
            Some(at) if !base => at.chain.last().map(|(m, _)| (m.generation, m.index + 1)).unwrap(),
            _ => (list.iter().map(|m| m.generation).max().unwrap_or(0) + 1, 0),
        };
        let lens: Vec<usize> = (0..rng.below(4)).map(|_| rng.below(150) as usize).collect();
        let (mut manifest, chunks) = checkpoint(3, generation, index, rng.below(1 << 40), &lens);
        (manifest.token, manifest.epoch) = (self.token, self.epoch);
        let ordinal = self.epoch;
        (manifest.usage_position, manifest.control_position) = (ordinal, ordinal);
        (manifest.log_time, manifest.commit_position) = (ordinal as i64, ordinal);
        manifest.hash = chunks_hash(&chunks);
        let nothing = Tried { chain: Vec::new(), names: Vec::new() };
        let before = self.at.as_ref().filter(|_| index > 0).unwrap_or(&nothing);
        Some(before.then((manifest, chunks)))
    }
}

/// What is loaded is what is there whole of all that anybody tried to write, and reaches furthest.
fn history(seed: u64) -> [usize; 3] {
    let runtime = runtime();
    let mut rng = Rng::new(seed);
    let blobs = MemoryBlobs::new();
    let mut tried: Vec<Tried> = Vec::new();
    // What was damaged or lost, and what it was: damaged twice, or written again, it is whole.
    let mut spoilt: BTreeMap<String, Bytes> = BTreeMap::new();
    let first = Writer { store: store(&blobs, &runtime), token: 1, at: None, epoch: 1 };
    let (mut now, mut frozen) = (first, None::<Writer>);
    let (mut written, mut fallbacks, mut branches) = (0, 0, 0);
    for _ in 0..80 {
        match rng.below(20) {
            0 => blobs.fail_writes(1 + rng.below(3) as u32),
            1 => blobs.lose_answers(1),
            2 => {
                let names = blobs.names();
                if !names.is_empty() {
                    let name = &names[rng.below(names.len() as u64) as usize];
                    let was = runtime.block_on(blobs.get(name)).unwrap().unwrap();
                    spoilt.entry(name.clone()).or_insert(was);
                    let _ = if rng.percent(50) { blobs.damage(name) } else { blobs.lose(name) };
                }
            }
            3 => {
                let keep = 1 + rng.below(2) as usize;
                let pruner = frozen.as_ref().filter(|_| rng.percent(30)).unwrap_or(&now);
                let _ = pruner.store.prune(SHARD, keep);
            }
            4 | 5 => {
                // Another takes over; this one goes on for a while without knowing.
                let store = store(&blobs, &runtime);
                let chain = store.load(SHARD, None).unwrap();
                let newest = store.list(SHARD).unwrap().pop();
                let last = chain.as_ref().and_then(|chain| chain.last()).map(|(m, _)| m.clone());
                let at = chain.filter(|_| newest == last).map(|chain| {
                    let same = |t: &&Tried| t.chain == chain;
                    tried.iter().find(same).cloned().expect("it was written")
                });
                let epoch = now.epoch + 1;
                let next = Writer { store, token: now.token + 1, at, epoch };
                frozen = Some(std::mem::replace(&mut now, next));
            }
            at => {
                let writer = match frozen.as_mut() {
                    Some(frozen) if at < 8 => frozen,
                    _ => {
                        now.epoch += rng.below(3);
                        &mut now
                    }
                };
                if let Some(next) = writer.next(&mut rng) {
                    tried.push(next.clone());
                    let (manifest, chunks) = next.chain.last().unwrap();
                    let done = writer.store.write(manifest, chunks);
                    written += usize::from(done.is_ok());
                    writer.at = done.is_ok().then_some(next);
                }
            }
        }
        let there: BTreeSet<String> = blobs.names().into_iter().collect();
        let is = |name: &str| runtime.block_on(blobs.get(name)).unwrap();
        let broken = spoilt.iter().filter(|(name, was)| is(name).as_ref() != Some(was));
        let broken: Vec<&String> = broken.map(|(name, _)| name).collect();
        let of = |tried: &Tried, blob: &str| tried.names.iter().any(|name| blob.starts_with(name));
        let whole = |tried: &&Tried| {
            tried.names.iter().all(|name| there.contains(name))
                && !broken.iter().any(|broken| of(tried, broken))
        };
        let best = tried.iter().filter(whole).map(Tried::rank).max();
        let reader = store(&blobs, &runtime);
        let loaded = reader.load(SHARD, None).unwrap();
        let reached = loaded.as_ref().and_then(|c| c.last()).map(|(m, _)| (m.epoch, m.token));
        assert_eq!(reached, best, "seed {seed}: {:?}", reader.take_notices());
        if let Some(chain) = loaded {
            assert!(
                tried.iter().any(|tried| tried.chain == chain),
                "seed {seed}: a chain of nobody"
            );
        }
        let furthest = tried.iter().map(Tried::rank).max();
        fallbacks += usize::from(best != furthest);
        let verified = reader.verify(SHARD).unwrap();
        branches += usize::from(verified.iter().any(|v| v.total > 1));
    }
    [written, fallbacks, branches]
}

#[test]
fn what_is_whole_and_reaches_furthest_is_loaded() {
    let seeds = std::env::var("METERR_CHECKPOINT_SEEDS").map_or(60, |text| text.parse().unwrap());
    let mut sums = [0; 3];
    for seed in 0..seeds {
        let counts = history(seed);
        sums.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
    }
    // Otherwise nothing was shown.
    assert!(sums.iter().all(|sum| *sum > seeds as usize), "{sums:?}");
}
