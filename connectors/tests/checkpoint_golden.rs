//! Bytes that earlier versions wrote must stay readable. The files in `tests/golden` are kept for
//! each released format; `UPDATE_GOLDEN=1` writes those of the present one anew, which must only be
//! done together with a new schema number.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;

use bytes::Bytes;
use meterr_connectors::checkpoint::{CheckpointStore, Kind, Manifest, chunks_hash};
use meterr_connectors::checkpoint_file::{export, import, read};
use meterr_connectors::checkpoint_memory::MemoryCheckpointStore;
use meterr_connectors::checkpoint_record::{Record, record_hash};
use meterr_connectors::sled::{SledOptions, SledStore};
use meterr_operators::ids::ShardId;

/// Compares with a golden file, or writes it.
fn check(name: &str, found: &[u8]) -> Vec<u8> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, found).unwrap();
    }
    let golden = std::fs::read(&path).unwrap();
    assert!(golden == found, "{name}: what is written today differs from the golden file");
    golden
}

fn checkpoints() -> Vec<(Manifest, Vec<Bytes>)> {
    let part = |index: u32, chunks: Vec<Bytes>| {
        let manifest = Manifest {
            format: 1,
            shard: 11,
            generation: 42,
            index,
            kind: if index == 0 { Kind::Base } else { Kind::Delta },
            usage_log: "01890a5d-ac96-774b-bcce-b302099a8057".to_owned(),
            usage_position: 1_000_000 + u64::from(index),
            usage_hash: [0x5a; 32],
            control_log: "01890a5d-ac96-774b-bcce-b302099a8058".to_owned(),
            control_position: 19,
            log_time: 1_767_322_800_123_456 + i64::from(index),
            epoch: 70_000 + u64::from(index),
            commit_position: 210_000 + u64::from(index),
            token: 3,
            chunks: chunks.len() as u32,
            bytes: chunks.iter().map(|chunk| chunk.len() as u64).sum(),
            hash: chunks_hash(&chunks),
        };
        (manifest, chunks)
    };
    let all: Vec<u8> = (0..=255).collect();
    vec![
        part(0, vec![Bytes::from(all), Bytes::new(), Bytes::from_static(b"rows")]),
        part(1, vec![]),
        part(2, vec![Bytes::from_static(b"changed rows")]),
    ]
}

#[test]
fn a_framed_manifest_is_read() {
    let (manifest, _) = checkpoints().remove(2);
    let record = Record { manifest, previous: record_hash(b"the one before") };
    let golden = check("manifest-1.frame", &record.encode().unwrap());
    assert_eq!(Record::decode(&golden).unwrap(), record);
}

#[test]
fn an_exported_generation_is_read_and_imported() {
    let store = MemoryCheckpointStore::new(1);
    for (manifest, chunks) in checkpoints() {
        store.write(&manifest, &chunks).unwrap();
    }
    let mut file = Vec::new();
    export(&store, ShardId(11), &mut file).unwrap();
    let golden = check("generation-1.checkpoint", &file);
    assert_eq!(read(golden.as_slice()).unwrap(), checkpoints());

    let root = tempfile::tempdir().unwrap();
    let (store, _) = SledStore::open(SledOptions::new(root.path().join("checkpoints"), 1)).unwrap();
    assert_eq!(import(&store, 1, golden.as_slice()).unwrap().generation, 42);
    assert_eq!(store.load(ShardId(11), None).unwrap(), Some(checkpoints()));
}
