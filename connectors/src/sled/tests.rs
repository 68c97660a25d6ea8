//! Histories with failures, crashes and damage. The oracle of each is the list of checkpoints that
//! were acknowledged, with their bytes.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;
use proptest::sample::Index;

use super::*;
use crate::checkpoint_testing::{checkpoint, conforms, load, said, write};

pub(super) type Hook = Arc<dyn Fn(&str) -> Result<(), Fail> + Send + Sync>;

const STEPS: [&str; 5] =
    ["chunks", "chunks written", "chunks synced", "manifest written", "manifest synced"];

fn options(root: &Path) -> SledOptions {
    SledOptions::new(root.join("checkpoints"), 1)
}

fn open(root: &Path) -> (SledStore, OpenReport) {
    SledStore::open(options(root)).unwrap()
}

/// Opens a directory that must be well.
fn open_well(root: &Path) -> SledStore {
    let (store, report) = open(root);
    assert!(!report.damaged(), "{report:?}");
    store
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else {
            // Files come and go while a database is copied under its feet.
            let _ = fs::copy(entry.path(), target);
        }
    }
}

fn names(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn no_blobs(root: &Path) {
    assert_eq!(names(&root.join("checkpoints/blobs")), Vec::<String>::new());
}

/// What may be there: every prefix of every chain that was acknowledged, oldest first, the newest
/// last; and one that was tried.
#[derive(Default, Clone)]
struct Oracle {
    acknowledged: Vec<Chain>,
    tried: Option<Chain>,
}

impl Oracle {
    fn next(&self, shard: u16, base: bool, seed: u64, lens: &[usize]) -> (Manifest, Vec<Bytes>) {
        // What was tried may be there, which the next write must not mind.
        let tip = self.acknowledged.last().and_then(|chain| chain.last());
        let highest = self.acknowledged.iter().chain(&self.tried).map(|c| c[0].0.generation).max();
        match tip {
            Some((m, _)) if !base && Some(m.generation) == highest => {
                checkpoint(shard, m.generation, m.index + 1, seed, lens)
            }
            _ => checkpoint(shard, highest.unwrap_or(0) + 1, 0, seed, lens),
        }
    }

    fn chain_of(&self, part: &(Manifest, Vec<Bytes>)) -> Chain {
        let mut chain = match self.acknowledged.last() {
            Some(chain) if part.0.index > 0 => chain[..part.0.index as usize].to_vec(),
            _ => Chain::new(),
        };
        chain.push(part.clone());
        chain
    }

    fn acknowledge(&mut self, part: &(Manifest, Vec<Bytes>)) {
        let chain = self.chain_of(part);
        self.acknowledged.push(chain);
        self.tried = None;
    }

    /// The newest acknowledged one, or the one tried after it.
    fn newest(&self, found: &Option<Chain>) -> bool {
        *found == self.acknowledged.last().cloned() || found.is_some() && *found == self.tried
    }

    fn any(&self, found: &Option<Chain>) -> bool {
        found.is_none()
            || self.acknowledged.iter().chain(&self.tried).any(|c| Some(c) == found.as_ref())
    }
}

#[test]
fn it_keeps_the_rules_of_a_store() {
    let root = tempfile::tempdir().unwrap();
    let (store, report) = open(root.path());
    assert_eq!(report, OpenReport { created: true, ..OpenReport::default() });
    conforms(&store);
    no_blobs(root.path());
    drop(store);
    open_well(root.path());
    assert_eq!(names(root.path()), ["checkpoints", "checkpoints.lock"]);
}

#[test]
fn one_process_at_a_time() {
    let root = tempfile::tempdir().unwrap();
    let store = open_well(root.path());
    let text = said(SledStore::open(options(root.path())).map(drop));
    assert!(text.ends_with("is in use by another process; stop it first"), "{text}");
    drop(store);
    // Without our lock, sled's own is minded too, after some patience.
    let db = sled::open(root.path().join("checkpoints")).unwrap();
    let error = SledStore::open(options(root.path())).map(drop).unwrap_err();
    assert!(matches!(error, CheckpointError::Locked { .. }), "{error}");
    drop(db);
    for _ in 0..5 {
        open_well(root.path());
    }
}

#[test]
fn large_values_do_not_become_files_of_their_own() {
    let root = tempfile::tempdir().unwrap();
    let store = open_well(root.path());
    // Pruning ranges beside kept ones makes leaves merge.
    for generation in 1..=6 {
        for shard in 0..2 {
            write(&store, &checkpoint(shard, generation, 0, 1, &[65536; 6]));
            write(&store, &checkpoint(shard, generation, 1, 1, &[1, 40000, 3]));
            no_blobs(root.path());
        }
        store.prune(ShardId(0), 2).unwrap();
        no_blobs(root.path());
    }
    drop(store);
    let store = open_well(root.path());
    assert_eq!(store.list(ShardId(0)).unwrap().len(), 4);
    assert_eq!(store.list(ShardId(1)).unwrap().len(), 12);
    no_blobs(root.path());
}

#[test]
fn a_write_that_fails_is_not_believed_and_the_next_one_works() {
    for (step, panics) in STEPS.into_iter().flat_map(|step| [(step, false), (step, true)]) {
        let root = tempfile::tempdir().unwrap();
        let store = open_well(root.path());
        let parts = [(1, 0), (1, 1), (1, 1)].map(|(g, i)| checkpoint(9, g, i, 1, &[70_000 / 2; 2]));
        write(&store, &parts[0]);
        *store.hook.lock() = Some(Arc::new(move |name| {
            assert!(!(panics && name == step), "made to panic");
            if name == step { Err(Fail::Io("made to fail".to_owned())) } else { Ok(()) }
        }));
        let text = said(store.write(&parts[1].0, &parts[1].1));
        assert!(text.contains("checkpoint 1 of generation 1 of shard 9 not written"), "{text}");
        assert!(text.contains("made to"), "{text}");
        *store.hook.lock() = None;
        let found = load(&store, 9).unwrap();
        // After the manifest was written it may be there.
        assert!(found == parts[..1] || step.starts_with("manifest") && found == parts[..2]);
        let report = store.take_report();
        assert_eq!(report.moved_aside.len(), usize::from(panics), "{report:?}");
        assert_eq!(report.lost, []);
        write(&store, &parts[2]);
        drop(store);
        let store = open_well(root.path());
        assert_eq!(load(&store, 9), Some(vec![parts[0].clone(), parts[2].clone()]));
    }
}

#[test]
fn a_crash_at_any_step_leaves_what_was_acknowledged() {
    let root = tempfile::tempdir().unwrap();
    let store = open_well(root.path());
    let mut oracle = Oracle::default();
    let count = Arc::new(AtomicUsize::new(0));
    let copies = tempfile::tempdir().unwrap();
    let (from, to) = (root.path().join("checkpoints"), copies.path().to_owned());
    let counted = Arc::clone(&count);
    *store.hook.lock() = Some(Arc::new(move |_| {
        let n = counted.fetch_add(1, Ordering::Relaxed);
        copy(&from, &to.join(n.to_string()).join("checkpoints"));
        Ok(())
    }));
    let mut crashed = 0;
    for round in 0..5_u64 {
        let lens = [30_000, 10];
        // The last one replaces the delta before it.
        let part = match round {
            4 => checkpoint(2, 2, 1, 99, &lens),
            _ => oracle.next(2, round % 2 == 0, round, &lens),
        };
        oracle.tried = Some(oracle.chain_of(&part));
        let before = count.load(Ordering::Relaxed);
        write(&store, &part);
        for n in before..count.load(Ordering::Relaxed) {
            let (copied, report) = open(&copies.path().join(n.to_string()));
            let found = load(&copied, 2);
            let shorter = round == 4 && found == Some(oracle.acknowledged[2].clone());
            assert!(oracle.newest(&found) || shorter, "round {round}, step {}", n - before);
            assert!(!report.damaged(), "round {round}, step {}: {report:?}", n - before);
            crashed += 1;
        }
        oracle.acknowledge(&part);
    }
    assert_eq!(crashed, 25);
}

#[test]
fn copies_taken_during_writes_never_give_wrong_bytes() {
    let root = tempfile::tempdir().unwrap();
    let store = Arc::new(open_well(root.path()));
    let writer = std::thread::spawn({
        let store = Arc::clone(&store);
        move || {
            let mut oracle = Oracle::default();
            for round in 0..30 {
                let part = oracle.next(0, round % 6 == 0, round, &[50_000, 65_536, 7]);
                write(&*store, &part);
                oracle.acknowledge(&part);
                store.prune(ShardId(0), 2).unwrap();
            }
            oracle
        }
    });
    let mut copies = Vec::new();
    while !writer.is_finished() && copies.len() < 12 {
        let to = tempfile::tempdir().unwrap();
        copy(&root.path().join("checkpoints"), &to.path().join("checkpoints"));
        copies.push(to);
    }
    let oracle = writer.join().unwrap();
    for at in copies {
        let (store, _) = open(at.path());
        let found = load(&store, 0);
        assert!(oracle.any(&found));
        let next = checkpoint(0, 100, 0, 0, &[10]);
        write(&store, &next);
        assert_eq!(load(&store, 0), Some(vec![next]));
    }
}

#[test]
fn a_rewrite_that_was_cut_short_is_dropped_or_ended() {
    let root = tempfile::tempdir().unwrap();
    let at = |name: &str| root.path().join(format!("checkpoints{name}"));
    let part = checkpoint(1, 1, 0, 1, &[5000]);
    write(&open_well(root.path()), &part);

    // While it was written, and when it was complete but not yet in place.
    copy(&at(""), &at(".building"));
    fs::write(at(".building").join("db"), b"half").unwrap();
    copy(&at(""), &at(".ready"));
    fs::write(at(".ready").join("db"), b"older").unwrap();
    assert_eq!(load(&open_well(root.path()), 1), Some(vec![part.clone()]));
    assert_eq!(names(root.path()), ["checkpoints", "checkpoints.lock"]);

    // Between the two renames.
    fs::rename(at(""), at(".ready")).unwrap();
    copy(&at(".ready"), &at(".old"));
    assert_eq!(load(&open_well(root.path()), 1), Some(vec![part]));
    assert_eq!(names(root.path()), ["checkpoints", "checkpoints.lock"]);
}

#[test]
fn a_directory_that_has_grown_is_rewritten() {
    let root = tempfile::tempdir().unwrap();
    let part = |generation, index| checkpoint(0, generation, index, 1, &[60_000; 5]);
    let store = open_well(root.path());
    for generation in 1..=6 {
        write(&store, &part(generation, 0));
        write(&store, &part(generation, 1));
        store.prune(ShardId(0), 2).unwrap();
    }
    // Far below the floor.
    assert_eq!(store.take_report(), OpenReport::default());
    drop(store);

    // With limits that any directory is above: at opening, and after every pruning.
    let mut options = options(root.path());
    (options.compact_factor, options.compact_floor_bytes) = (0, 1);
    let (store, report) = SledStore::open(options).unwrap();
    let Compacted { before, after } = report.compacted.unwrap();
    // Two generations of 600,000 bytes; sled's segments are never full.
    assert!(after < before && after < 4 << 20, "{before} to {after}");
    assert!(!report.damaged(), "{report:?}");
    for generation in 7..=8 {
        write(&store, &part(generation, 0));
        store.prune(ShardId(0), 2).unwrap();
        let report = store.take_report();
        assert!(report.compacted.is_some() && !report.damaged(), "{report:?}");
    }
    assert!(store.disk_bytes().unwrap() < 4 << 20);
    drop(store);
    assert_eq!(names(root.path()), ["checkpoints", "checkpoints.lock"]);
    let store = open_well(root.path());
    assert_eq!(load(&store, 0), Some(vec![part(8, 0)]));
    assert_eq!(store.load(ShardId(0), Some(8)).unwrap(), Some(vec![part(7, 0)]));
    no_blobs(root.path());
}

#[test]
fn a_directory_that_is_no_database_is_moved_aside() {
    for (file, bytes) in [("conf", "nonsense that is long enough"), ("snap.0000000000000FFF", "x")]
    {
        let root = tempfile::tempdir().unwrap();
        let part = checkpoint(1, 4, 0, 1, &[5000]);
        write(&open_well(root.path()), &part);
        fs::write(root.path().join("checkpoints").join(file), bytes).unwrap();
        let (store, report) = open(root.path());
        let [moved] = report.moved_aside.as_slice() else { panic!("{report:?}") };
        assert_eq!(fs::read_to_string(moved.to.join(file)).unwrap(), bytes);
        assert!(moved.to.to_string_lossy().contains("checkpoints.damaged-2"), "{moved:?}");
        assert_eq!(report.lost, [LostCheckpoint { shard: ShardId(1), generation: 4, index: 0 }]);
        assert_eq!(load(&store, 1), None);
        write(&store, &part);
        drop(store);
        assert_eq!(load(&open_well(root.path()), 1), Some(vec![part]));
    }
}

#[test]
fn a_newer_version_is_named_and_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let part = checkpoint(1, 1, 0, 1, &[50]);
    let store = open_well(root.path());
    write(&store, &part);
    drop(store);

    // A manifest of a newer schema: not read, not overwritten, kept by a rewrite.
    let dir = root.path().join("checkpoints");
    let form = crate::checkpoint_record::MANIFEST_FORM;
    let newer = crate::frame::seal(crate::frame::Form { schema: 9, ..form }, b"unknown").unwrap();
    let db = sled::open(&dir).unwrap();
    db.insert(layout::manifest_key(1, (2, 0)), newer.clone()).unwrap();
    db.insert(layout::piece_key(1, (2, 0), 0, 0), b"what").unwrap();
    drop(db);
    let store = open_well(root.path());
    assert_eq!(load(&store, 1), Some(vec![part.clone()]));
    let newer_text =
        "checkpoint format 9 is newer than this binary reads (up to 1); use a newer meterr";
    assert_eq!(said(store.list(ShardId(1))), newer_text);
    let next = checkpoint(1, 3, 0, 1, &[50]);
    assert_eq!(said(store.write(&next.0, &next.1)), newer_text);
    // Damage beside it: what this version cannot read is carried over as it is.
    store.state.lock().db.as_ref().unwrap().remove(layout::piece_key(1, (1, 0), 0, 0)).unwrap();
    assert_eq!(said(store.load(ShardId(1), None)), newer_text);
    assert_eq!(said(store.list(ShardId(1))), newer_text);
    assert_eq!(store.take_report().moved_aside.len(), 1);
    let verified = store.verify(ShardId(1)).unwrap();
    let problem = verified[0].problem.clone().unwrap();
    assert_eq!(problem, "checkpoint 0: manifest schema 9 is newer than the known 1");
    let state = store.state.lock();
    let db = state.db.as_ref().unwrap();
    assert_eq!(db.get(layout::manifest_key(1, (2, 0))).unwrap().unwrap(), newer);
    assert_eq!(db.get(layout::piece_key(1, (2, 0), 0, 0)).unwrap().unwrap(), b"what");

    // A newer layout: not opened at all, nor moved.
    let form = crate::frame::Form { schema: 7, ..layout::STORE_FORM };
    db.insert(layout::STORE_KEY, crate::frame::seal(form, b"").unwrap()).unwrap();
    drop(state);
    drop(store);
    let before = names(root.path());
    let error = said(SledStore::open(options(root.path())).map(drop));
    assert_eq!(error, newer_text.replace('9', "7"));
    assert_eq!(names(root.path()), before);
}

fn damaged(dir: &Path, at: Index, within: Index, kind: u8, byte: u8) -> String {
    let mut files: Vec<_> = fs::read_dir(dir).unwrap().map(|f| f.unwrap().path()).collect();
    files.retain(|path| path.is_file());
    files.sort();
    // Most of the time the database, which has nearly all the bytes.
    let name = if kind < 6 { dir.join("db") } else { files[at.index(files.len())].clone() };
    let mut bytes = fs::read(&name).unwrap();
    let n = within.index(bytes.len());
    match kind % 6 {
        0 | 1 => bytes[n] ^= byte.max(1),
        2 => {
            let end = (n + usize::from(byte) * 16).min(bytes.len());
            bytes[n..end].fill(0);
        }
        3 => bytes.truncate(n),
        4 => {
            // A sector comes back from another place.
            let from = at.index(bytes.len());
            let len = 4096.min(bytes.len() - n.max(from));
            bytes.copy_within(from..from + len, n);
        }
        _ => bytes.iter_mut().skip(n).step_by(4099).for_each(|b| *b ^= byte.max(1)),
    }
    fs::write(&name, bytes).unwrap();
    format!("{name:?} at {n}, kind {kind}")
}

/// A closed store with its oracles, to be copied and damaged.
fn fixture() -> &'static (tempfile::TempDir, [Oracle; 2]) {
    static FIXTURE: std::sync::OnceLock<(tempfile::TempDir, [Oracle; 2])> =
        std::sync::OnceLock::new();
    FIXTURE.get_or_init(|| {
        let root = tempfile::tempdir().unwrap();
        let mut oracles = [Oracle::default(), Oracle::default()];
        for opened in 0..2_u64 {
            let store = open_well(root.path());
            for round in 0..6_u64 {
                for (shard, oracle) in (0_u16..).zip(&mut oracles) {
                    let lens = [9_000 * usize::from(shard + 1), 100, 20_000];
                    let part = oracle.next(shard, round % 3 == 0, opened * 100 + round, &lens);
                    write(&store, &part);
                    oracle.acknowledge(&part);
                    if round == 3 {
                        store.prune(ShardId(shard), 2).unwrap();
                    }
                }
            }
        }
        (root, oracles)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn damage_gives_an_acknowledged_state_or_is_reported(
        kind in 0..12_u8,
        at in any::<Index>(),
        within in any::<Index>(),
        byte in any::<u8>(),
    ) {
        let (source, oracles) = fixture();
        let root = tempfile::tempdir().unwrap();
        copy(source.path(), root.path());
        let dir = root.path().join("checkpoints");
        let what = damaged(&dir, at, within, kind, byte);
        let (store, mut report) = open(root.path());
        for (shard, oracle) in (0_u16..).zip(oracles) {
            let found = load(&store, shard);
            prop_assert!(oracle.any(&found), "{what}: bytes that nobody wrote");
            // Once more, since the next call keeps what verified in a fresh directory.
            prop_assert_eq!(&load(&store, shard), &found, "{}", what);
            let more = store.take_report();
            report.lost.extend(more.lost);
            report.moved_aside.extend(more.moved_aside);
            report.problems.extend(more.problems);
            prop_assert!(oracle.newest(&found) || report.damaged(), "{what}: lost without a word");
            for moved in &report.moved_aside {
                prop_assert!(moved.to.join("db").exists());
            }
            let next = checkpoint(shard, 1000, 0, 1, &[30_000]);
            write(&store, &next);
            prop_assert_eq!(load(&store, shard), Some(vec![next]));
        }
        drop(store);
        let (store, report) = open(root.path());
        prop_assert!(!report.damaged(), "{what}: {report:?}");
        prop_assert_eq!(load(&store, 0).unwrap()[0].0.generation, 1000);
        no_blobs(root.path());
    }
}

#[derive(Debug, Clone)]
enum Op {
    Write { shard: u16, base: bool, len: usize },
    Fail { shard: u16, base: bool, step: usize, panics: bool },
    Prune { shard: u16, keep: usize },
    Reopen,
    Lose { shard: u16, which: Index },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..3_u16, any::<bool>(), 0..70_000_usize)
            .prop_map(|(shard, base, len)| Op::Write { shard, base, len }),
        2 => (0..3_u16, any::<bool>(), 0..5_usize, any::<bool>())
            .prop_map(|(shard, base, step, panics)| Op::Fail { shard, base, step, panics }),
        2 => (0..3_u16, 0..4_usize).prop_map(|(shard, keep)| Op::Prune { shard, keep }),
        2 => Just(Op::Reopen),
        1 => (0..3_u16, any::<Index>()).prop_map(|(shard, which)| Op::Lose { shard, which }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn any_history_gives_the_newest_acknowledged_state(ops in proptest::collection::vec(op(), 1..16)) {
        let root = tempfile::tempdir().unwrap();
        let mut store = open_well(root.path());
        let mut oracles = [(); 3].map(|()| Oracle::default());
        for (seed, op) in (0_u64..).zip(ops) {
            match op {
                Op::Write { shard, base, len } => {
                    let lens = [len / 70, len % 65_536];
                    let oracle = &mut oracles[usize::from(shard)];
                    let part = oracle.next(shard, base, seed, &lens);
                    write(&store, &part);
                    oracle.acknowledge(&part);
                }
                Op::Fail { shard, base, step, panics } => {
                    let oracle = &mut oracles[usize::from(shard)];
                    let part = oracle.next(shard, base, seed, &[5000, 10]);
                    *store.hook.lock() = Some(Arc::new(move |name| {
                        assert!(!(panics && name == STEPS[step]), "made to panic");
                        match name == STEPS[step] {
                            true => Err(Fail::Io("made to fail".to_owned())),
                            false => Ok(()),
                        }
                    }));
                    prop_assert!(store.write(&part.0, &part.1).is_err());
                    *store.hook.lock() = None;
                    oracle.tried = Some(oracle.chain_of(&part));
                    // Settled by looking: from now on it is there, or it is not.
                    let found = load(&store, shard);
                    prop_assert!(oracle.newest(&found));
                    if found == oracle.tried {
                        oracle.acknowledge(&part);
                    }
                    oracle.tried = None;
                }
                Op::Prune { shard, keep } => store.prune(ShardId(shard), keep).unwrap(),
                Op::Reopen => {
                    drop(store);
                    store = open_well(root.path());
                }
                Op::Lose { shard, which } => {
                    // A piece vanishes inside sled: the state ends before it, and that is said.
                    let (from, end) =
                        (layout::chunks_from(shard, (0, 0)), layout::shard_chunks_end(shard));
                    let keys: Vec<_> = {
                        let state = store.state.lock();
                        let db = state.db.as_ref();
                        db.map(|db| db.range(from..end).keys().map(Result::unwrap).collect())
                            .unwrap_or_default()
                    };
                    if keys.is_empty() {
                        continue;
                    }
                    let key = &keys[which.index(keys.len())];
                    let (_, place, ..) = layout::piece_place(key).unwrap();
                    store.state.lock().db.as_ref().unwrap().remove(key).unwrap();
                    store.take_report();
                    let oracle = &mut oracles[usize::from(shard)];
                    let newest = oracle.acknowledged.last().unwrap()[0].0.generation;
                    let found = load(&store, shard);
                    prop_assert!(oracle.any(&found));
                    store.list(ShardId(shard)).unwrap();
                    let report = store.take_report();
                    if place.0 == newest {
                        prop_assert!(!oracle.newest(&found));
                        prop_assert_eq!(report.moved_aside.len(), 1);
                        match found {
                            Some(chain) => oracle.acknowledged.push(chain),
                            None => *oracle = Oracle::default(),
                        }
                    }
                }
            }
            for (shard, oracle) in (0_u16..).zip(&oracles) {
                prop_assert_eq!(&load(&store, shard), &oracle.acknowledged.last().cloned());
            }
        }
        no_blobs(root.path());
    }
}
