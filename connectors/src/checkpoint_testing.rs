//! What the tests of all checkpoint stores share: checkpoints by seed, and the rules of the trait.

use bytes::Bytes;
use meterr_operators::ids::ShardId;

use crate::checkpoint::{
    CHUNK_LEN_MAX, Chain, CheckpointError, CheckpointStore, Kind, Manifest, chunks_hash,
};

/// A manifest and its chunks.
pub(crate) type Part = (Manifest, Vec<Bytes>);

/// A checkpoint whose content follows from its place and a seed.
pub(crate) fn checkpoint(
    shard: u16,
    generation: u64,
    index: u32,
    seed: u64,
    lens: &[usize],
) -> Part {
    let chunk = |(i, len): (usize, &usize)| {
        let key = blake3::hash(format!("{shard}/{generation}/{index}/{seed}/{i}").as_bytes());
        let mut bytes = vec![0; *len];
        blake3::Hasher::new_keyed(key.as_bytes()).finalize_xof().fill(&mut bytes);
        Bytes::from(bytes)
    };
    let chunks: Vec<Bytes> = lens.iter().enumerate().map(chunk).collect();
    let step = generation * 1000 + u64::from(index);
    let manifest = Manifest {
        format: 1,
        shard,
        generation,
        index,
        kind: if index == 0 { Kind::Base } else { Kind::Delta },
        usage_log: "5f0c2a9e-usage".to_owned(),
        usage_position: step * 10,
        usage_hash: [7; 32],
        control_log: "5f0c2a9e-control".to_owned(),
        control_position: step,
        log_time: 1_767_322_800_000_000 + step as i64,
        epoch: step,
        commit_position: step * 2,
        token: 1,
        chunks: chunks.len() as u32,
        bytes: lens.iter().map(|len| *len as u64).sum(),
        hash: chunks_hash(&chunks),
    };
    (manifest, chunks)
}

pub(crate) fn write(store: &dyn CheckpointStore, part: &Part) {
    store.write(&part.0, &part.1).unwrap();
}

pub(crate) fn load(store: &dyn CheckpointStore, shard: u16) -> Option<Chain> {
    store.load(ShardId(shard), None).unwrap()
}

/// The text of an error with its cause.
pub(crate) fn said<T: std::fmt::Debug>(result: Result<T, CheckpointError>) -> String {
    match result.unwrap_err() {
        CheckpointError::Store { what, cause } => format!("{what}: {cause}"),
        error => error.to_string(),
    }
}

/// What every store does, on an empty one.
pub(crate) fn conforms(store: &dyn CheckpointStore) {
    let shard = ShardId(3);
    assert_eq!(store.load(shard, None).unwrap(), None);
    assert_eq!(store.shards().unwrap(), []);
    assert!(store.verify(shard).unwrap().is_empty());
    store.prune(shard, 2).unwrap();

    // A generation grows, and a neighbour does not disturb it.
    let base = checkpoint(3, 5, 0, 1, &[CHUNK_LEN_MAX, 0, 100]);
    let deltas: Vec<_> = (1..4).map(|i| checkpoint(3, 5, i, 1, &[i as usize])).collect();
    let empty = checkpoint(255, 1, 0, 1, &[]);
    write(store, &base);
    write(store, &empty);
    deltas.iter().for_each(|delta| write(store, delta));
    let whole: Chain = [vec![base.clone()], deltas.clone()].concat();
    assert_eq!(load(store, 3), Some(whole.clone()));
    assert_eq!(load(store, 255), Some(vec![empty]));
    assert_eq!(store.shards().unwrap(), [shard, ShardId(255)]);
    let manifests: Vec<Manifest> = whole.iter().map(|(manifest, _)| manifest.clone()).collect();
    assert_eq!(store.list(shard).unwrap(), manifests);

    // The rules of a chain.
    let next = checkpoint(3, 5, 4, 1, &[9]);
    let refuse = |change: &dyn Fn(&mut Part), why: &str| {
        let mut part = next.clone();
        change(&mut part);
        let text = said(store.write(&part.0, &part.1));
        assert!(text.starts_with("checkpoint refused") && text.contains(why), "{text:?}: {why:?}");
    };
    refuse(&|p| p.0.index = 5, "has nothing before it");
    refuse(&|p| p.0.generation = 4, "has nothing before it");
    refuse(&|p| p.0.index = 0, "cannot have index 0");
    refuse(&|p| p.0.kind = Kind::Base, "cannot have index 4");
    refuse(&|p| p.0.shard = 256, "shard 256 is above 255");
    refuse(&|p| p.0.usage_log = "other".to_owned(), "belongs to other logs");
    refuse(&|p| p.0.usage_log = "x".repeat(300), "has 300 bytes of 256");
    refuse(&|p| p.0.epoch = 1, "epoch is behind");
    refuse(&|p| p.0.format = 0, "format 0 follows 1");
    refuse(&|p| p.0.hash[0] ^= 1, "do not hash to the manifest");
    refuse(&|p| p.0.bytes = 10, "chunks have 9 bytes, the manifest says 10");
    refuse(&|p| p.0.chunks = 2, "1 chunks of 2");
    refuse(&|p| p.1[0] = Bytes::from(vec![0; CHUNK_LEN_MAX + 1]), "at most 65536");
    refuse(&|p| *p = checkpoint(3, 5, 0, 2, &[1]), "not above the newest, 5");
    refuse(&|p| *p = checkpoint(3, 0, 0, 2, &[1]), "count from 1");
    assert_eq!(load(store, 3), Some(whole.clone()));

    // A delta that repeats an index replaces it and all after it.
    let again = checkpoint(3, 5, 2, 2, &[70, 80]);
    write(store, &again);
    let shorter: Chain = [whole[..2].to_vec(), vec![again]].concat();
    assert_eq!(load(store, 3), Some(shorter.clone()));

    // Newer generations come first; `before` leaves them out; pruning keeps the newest.
    let parts: Vec<_> = [7, 8, 9].map(|g| checkpoint(3, g, 0, 1, &[300, 5])).into();
    parts.iter().for_each(|part| write(store, part));
    assert_eq!(load(store, 3), Some(vec![parts[2].clone()]));
    assert_eq!(store.load(shard, Some(9)).unwrap(), Some(vec![parts[1].clone()]));
    assert_eq!(store.load(shard, Some(7)).unwrap(), Some(shorter));
    assert_eq!(store.load(shard, Some(5)).unwrap(), None);
    refuse(&|p| *p = checkpoint(3, 5, 3, 1, &[1]), "the newest is 9");
    let generations = || -> Vec<u64> {
        let verified = store.verify(shard).unwrap();
        assert!(verified.iter().all(|v| v.problem.is_none() && v.sound == v.total));
        verified.iter().map(|v| v.generation).collect()
    };
    assert_eq!(generations(), [5, 7, 8, 9]);
    store.prune(shard, 2).unwrap();
    assert_eq!(generations(), [8, 9]);
    store.prune(shard, 0).unwrap();
    assert_eq!(generations(), [9]);
    assert!(load(store, 255).is_some());

    // A format above the known one is not believed, and named when there is nothing else.
    let mut newer = checkpoint(3, 10, 0, 1, &[4]);
    newer.0.format = 2;
    write(store, &newer);
    assert_eq!(load(store, 3), Some(vec![parts[2].clone()]));
    let mut only = checkpoint(4, 1, 0, 1, &[4]);
    only.0.format = 2;
    write(store, &only);
    assert!(matches!(
        store.load(ShardId(4), None),
        Err(CheckpointError::Newer { found: 2, known: 1 })
    ));
    let problem = store.verify(ShardId(4)).unwrap()[0].problem.clone().unwrap();
    assert_eq!(problem, "checkpoint 0: format 2 is newer than the known 1");
}
