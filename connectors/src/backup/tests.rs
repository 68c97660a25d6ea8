//! Backups of logs in memory: what is kept, what is written again, every kind of damage, encryption,
//! crashes, and clean-ups that come between.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures::executor::block_on;
use meterr_operators::time::Time;
use proptest::prelude::*;

use super::testing::MemoryBlobs;
use super::*;
use crate::copy::{Compared, compare};
use crate::log::{Log, Message};
use crate::memory::MemoryLog;

static NEVER: AtomicBool = AtomicBool::new(false);

const SECOND: i64 = 1_000_000;
const DAY: i64 = 24 * 3600 * SECOND;

fn at(second: i64) -> Time {
    Time(1_800_000_000 * SECOND + second * SECOND)
}

fn about(now: Time) -> About {
    let (source, version) = ("here".to_owned(), "0".to_owned());
    About { now, source, version, shards: 1, commits: vec![] }
}

/// A deployment of one shard.
struct Logs([MemoryLog; 3]);

impl Logs {
    fn new() -> Logs {
        Logs(["USAGE_0", "OUT_0", "CONTROL"].map(MemoryLog::new))
    }

    /// Appends a record of so many bytes to a log, at a second.
    fn put(&self, log: usize, bytes: usize, second: i64) {
        let subject = ["usage.0.acme", "out.0.commit", "control"][log];
        let head = self.0[log].head();
        let mut message = Message::new(subject, vec![head as u8; bytes]);
        message.headers.push(("ce-id".to_owned(), head.to_string()));
        self.0[log].append_at(vec![message], at(second)).unwrap();
    }

    fn wanted(&self) -> Vec<Wanted> {
        let wanted = |log: &MemoryLog| Wanted { log: Arc::new(log.clone()), to: log.head() };
        self.0.iter().map(wanted).collect()
    }

    fn back_up(&self, store: &Store, day: i64) -> Made {
        create(store, &self.wanted(), &about(Time(at(0).0 + day * DAY)), &NEVER, &mut |_| ())
            .unwrap()
    }

    /// Whether a backup holds these very records.
    fn compare(&self, store: &Store, manifest: &Manifest) {
        let mut compared = Compared::default();
        for log in &self.0 {
            let part = manifest.log(&log.identity().stream).unwrap();
            compare(log, &BackupLog::new(store, part), &mut compared, &mut |_| ()).unwrap();
        }
        assert_eq!(compared.differences, Vec::<String>::new());
        assert_eq!(compared.records, manifest.records());
    }
}

fn store(blobs: &Arc<MemoryBlobs>, key: Option<u8>) -> Store {
    Store::new(blobs.clone(), key.map(|key| Key::new(&[key; 32])))
}

/// Three megabytes a record: two and a bit fill a segment.
const LARGE: usize = 3 * 1024 * 1024;

#[test]
fn the_second_backup_writes_what_is_new() {
    let (blobs, logs) = (MemoryBlobs::new(), Logs::new());
    let store = store(&blobs, None);
    for n in 0..7 {
        logs.put(0, LARGE, n);
    }
    logs.put(2, 10, 9);
    let first = logs.back_up(&store, 0);
    let lasts = |made: &Made| -> Vec<(u64, bool)> {
        made.manifest.logs[0].segments.iter().map(|part| (part.last, part.full)).collect()
    };
    assert_eq!(lasts(&first), [(2, true), (4, true), (6, true), (7, false)]);
    assert_eq!((first.segments_written, first.records_read), (5, 8));
    logs.compare(&store, &first.manifest);

    // Nothing new: the unfinished segments are read, found the same, and nothing but a manifest is put.
    let again = logs.back_up(&store, 1);
    assert_eq!((again.segments_written, again.records_read), (0, 2));
    for n in 7..10 {
        logs.put(0, LARGE, n);
    }
    let more = logs.back_up(&store, 2);
    assert_eq!(lasts(&more)[3..], [(8, true), (10, false)]);
    assert_eq!((more.segments_written, more.records_read), (2, 5));
    for made in [&first, &again, &more] {
        let verified = store.verify(&made.manifest, &mut |_| ()).unwrap();
        assert_eq!(verified.problems, Vec::<String>::new());
        assert_eq!(verified.records, made.manifest.records());
    }
    logs.compare(&store, &more.manifest);
    assert_eq!(store.find(None).unwrap(), more.manifest);
    assert_eq!(store.find(Some(&first.manifest.name()[..8])).unwrap(), first.manifest);
    let unknown = store.find(Some("2031")).unwrap_err().to_string();
    assert!(unknown.contains("has no backup \"2031\""), "{unknown}");
}

#[test]
fn a_log_put_underneath_is_not_mixed_with_the_old_one() {
    let (blobs, logs) = (MemoryBlobs::new(), Logs::new());
    let store = store(&blobs, None);
    (0..7).for_each(|n| logs.put(0, LARGE, n));
    logs.back_up(&store, 0);
    // The same identity, another record at a position that was full.
    logs.0[0].roll_back_to(3);
    (0..5).for_each(|n| logs.put(0, LARGE - 1, 50 + n));
    let made = logs.back_up(&store, 1);
    logs.compare(&store, &made.manifest);
    assert_eq!(made.records_read, 8);
}

#[test]
fn a_log_with_a_damaged_record_is_not_backed_up() {
    let (blobs, logs) = (MemoryBlobs::new(), Logs::new());
    (0..3).for_each(|n| logs.put(0, 10, n));
    logs.0[0].damage(2);
    let error = create(&store(&blobs, None), &logs.wanted(), &about(at(0)), &NEVER, &mut |_| ());
    let error = error.unwrap_err().to_string();
    assert!(error.contains("records 2 to 2 cannot be read"), "{error}");
    assert_eq!((blobs.names("backup/").len(), blobs.names("making/").len()), (0, 0));
}

#[test]
fn every_damage_is_found_and_the_next_backup_mends_what_is_missing() {
    let (blobs, logs) = (MemoryBlobs::new(), Logs::new());
    let store = store(&blobs, None);
    (0..5).for_each(|n| logs.put(0, LARGE, n));
    logs.put(2, 10, 9);
    let made = logs.back_up(&store, 0);
    let sound = blobs.objects.lock().clone();
    let problems = || store.verify(&made.manifest, &mut |_| ()).unwrap().problems;
    assert_eq!(problems(), Vec::<String>::new());
    for name in blobs.names("segment/") {
        let object = sound[&name].clone();
        let spoiled = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = object.to_vec();
            change(&mut bytes);
            Some(Bytes::from(bytes))
        };
        let other = sound.iter().find(|(other, _)| **other != name).map(|(_, bytes)| bytes);
        let damages = [
            None,
            spoiled(&|bytes| bytes.truncate(bytes.len() / 2)),
            spoiled(&|bytes| bytes.clear()),
            spoiled(&|bytes| bytes.push(0)),
            spoiled(&|bytes| *bytes.last_mut().unwrap() ^= 1),
            spoiled(&|bytes| bytes[0] ^= 1),
            spoiled(&|bytes| bytes[8] = 9),
            spoiled(&|bytes| bytes[9] = 2),
            spoiled(&|bytes| bytes[10] = 1),
            other.cloned(),
        ];
        for damage in damages {
            match damage {
                Some(bytes) => blobs.objects.lock().insert(name.clone(), bytes),
                None => blobs.objects.lock().remove(&name),
            };
            let found = problems();
            assert_eq!(found.len(), 1, "{name}: {found:?}");
            assert!(found[0].contains(&name), "{found:?}");
            blobs.objects.lock().clone_from(&sound);
        }
        blobs.objects.lock().remove(&name);
        let mended = logs.back_up(&store, 1);
        assert_eq!(mended.segments_written, 1, "{name}");
        assert_eq!(problems(), Vec::<String>::new());
        store.delete_manifest(&mended.manifest.name()).unwrap();
    }
}

#[test]
fn a_damaged_manifest_is_named_and_the_others_are_listed() {
    let (blobs, logs) = (MemoryBlobs::new(), Logs::new());
    let store = store(&blobs, None);
    logs.put(0, 10, 1);
    let (first, second) = (logs.back_up(&store, 0), logs.back_up(&store, 1));
    let name = format!("backup/{}", first.manifest.name());
    let object = blobs.objects.lock()[&name].clone();
    let mut spoiled = object.to_vec();
    spoiled.truncate(spoiled.len() - 4);
    let under_another_name =
        blobs.objects.lock()[&format!("backup/{}", second.manifest.name())].clone();
    for bytes in [spoiled.into(), under_another_name, Bytes::from_static(b"x")] {
        blobs.objects.lock().insert(name.clone(), bytes);
        let listed = store.list().unwrap();
        assert_eq!(listed.len(), 2);
        let error = listed[0].manifest.as_ref().unwrap_err().to_string();
        assert!(error.contains(&name) && error.contains("damaged"), "{error}");
        assert_eq!(listed[1].manifest.as_ref().unwrap(), &second.manifest);
        // Nobody knows what it needs, so nothing is deleted until it is old enough to go itself.
        let pruned = prune(&store, at(0), at(1)).unwrap();
        assert!(pruned.stopped.unwrap().contains("segments are left alone"));
        assert_eq!((pruned.backups.len(), pruned.segments), (0, 0));
    }
    assert_eq!(prune(&store, at(5), at(6)).unwrap().backups, [first.manifest.name()]);
}

#[test]
fn with_a_key_nothing_shows_and_only_the_key_opens() {
    let (blobs, logs) = (MemoryBlobs::new(), Logs::new());
    let mut message = Message::new("usage.0.acme", "secret-word ".repeat(50));
    message.headers.push(("secret-word".to_owned(), String::new()));
    logs.0[0].append_at(vec![message], at(1)).unwrap();
    let keyed = store(&blobs, Some(1));
    let made = logs.back_up(&keyed, 0);
    logs.compare(&keyed, &made.manifest);
    let contains =
        |bytes: &Bytes, text: &str| bytes.windows(text.len()).any(|w| w == text.as_bytes());
    for (name, bytes) in &*blobs.objects.lock() {
        for text in ["secret-word", "acme", "USAGE_0", "CONTROL"] {
            assert!(!contains(bytes, text) && !name.contains(text), "{text} in {name}");
        }
    }
    for (key, said) in
        [(None, "is encrypted; give its key"), (Some(2), "is encrypted with another key")]
    {
        let error = store(&blobs, key).find(None).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
    // Another deployment of the same content under another key has no name in common.
    let others = MemoryBlobs::new();
    logs.back_up(&store(&others, Some(2)), 0);
    let names = |blobs: &MemoryBlobs| blobs.names("segment/").into_iter().collect::<BTreeSet<_>>();
    assert!(names(&blobs).is_disjoint(&names(&others)));
    // The key is changed: everything is written anew beside the old, and each opens its own.
    let again = logs.back_up(&store(&blobs, Some(2)), 1);
    assert_eq!(again.segments_written, made.segments_written);
    assert_eq!(keyed.find(Some(&made.manifest.name())).unwrap(), made.manifest);
}

#[test]
fn a_clean_up_deletes_what_no_backup_needs_and_keeps_the_last_one() {
    let (blobs, logs) = (MemoryBlobs::new(), Logs::new());
    let store = store(&blobs, None);
    let mut made = Vec::new();
    for day in 0..5 {
        (0..3).for_each(|n| logs.put(0, LARGE, day * 10 + n));
        made.push(logs.back_up(&store, day).manifest);
    }
    let before = blobs.names("segment/").len();
    let now = Time(at(0).0 + 5 * DAY);
    let pruned = prune(&store, Time(at(0).0 + 3 * DAY), now).unwrap();
    assert_eq!(pruned.backups, made[..3].iter().map(Manifest::name).collect::<Vec<_>>());
    assert_eq!(pruned.stopped, None);
    assert_eq!(blobs.names("segment/").len() as u64, before as u64 - pruned.segments);
    assert!(pruned.segments > 0 && pruned.bytes > 0);
    for manifest in &made[3..] {
        assert!(store.verify(manifest, &mut |_| ()).unwrap().problems.is_empty());
    }
    let pruned = prune(&store, Time(i64::MAX), now).unwrap();
    assert_eq!(pruned.backups, [made[3].name()]);
    assert_eq!(store.names().unwrap(), [made[4].name()]);
    assert!(store.verify(&made[4], &mut |_| ()).unwrap().problems.is_empty());
    assert_eq!(blobs.names("pruning/").len() + blobs.names("making/").len(), 0);
}

#[test]
fn a_clean_up_that_stops_anywhere_leaves_every_backup_whole() {
    let logs = Logs::new();
    (0..3).for_each(|n| logs.put(0, LARGE, n));
    for steps in 0..30 {
        let blobs = MemoryBlobs::new();
        let store = store(&blobs, None);
        let first = logs.back_up(&store, 0);
        let mut shorter = logs.wanted();
        shorter[0].to = 1;
        let kept =
            create(&store, &shorter, &about(Time(at(0).0 + DAY)), &NEVER, &mut |_| ()).unwrap();
        *blobs.fails_after.lock() = Some(steps);
        let pruned = prune(&store, at(1), at(2));
        *blobs.fails_after.lock() = None;
        for listed in store.list().unwrap() {
            let manifest = listed.manifest.unwrap();
            assert!(store.verify(&manifest, &mut |_| ()).unwrap().problems.is_empty(), "{steps}");
        }
        // The next one finishes it.
        assert_eq!(prune(&store, at(1), Time(at(2).0 + DAY)).unwrap().stopped, None);
        assert_eq!(store.names().unwrap(), [kept.manifest.name()]);
        let needed = kept.manifest.segments().count();
        assert_eq!(blobs.names("segment/").len(), needed, "{steps}: {:?}", first.manifest.name());
        if pruned.is_ok() {
            return;
        }
    }
    panic!("it never came to its end");
}

#[test]
fn a_backup_that_stops_anywhere_is_none_and_the_next_one_uses_what_it_wrote() {
    let logs = Logs::new();
    (0..7).for_each(|n| logs.put(0, LARGE, n));
    let mut written = BTreeSet::new();
    for steps in 0..40 {
        let blobs = MemoryBlobs::new();
        let store = store(&blobs, None);
        *blobs.fails_after.lock() = Some(steps);
        let made = create(&store, &logs.wanted(), &about(at(0)), &NEVER, &mut |_| ());
        *blobs.fails_after.lock() = None;
        for listed in store.list().unwrap() {
            // Only the mark was not removed, or the last look failed.
            let verified = store.verify(&listed.manifest.unwrap(), &mut |_| ()).unwrap();
            assert!(verified.problems.is_empty(), "{steps}");
        }
        let next = logs.back_up(&store, 1);
        logs.compare(&store, &next.manifest);
        written.insert(next.segments_written);
        if made.is_ok() {
            assert_eq!(written, BTreeSet::from([0, 1, 2, 3, 4]));
            return;
        }
    }
    panic!("it never came to its end");
}

#[test]
fn a_backup_that_is_asked_to_stop_leaves_no_mark() {
    let (blobs, logs) = (MemoryBlobs::new(), Logs::new());
    (0..9).for_each(|n| logs.put(0, LARGE, n));
    let store = store(&blobs, None);
    let stop = AtomicBool::new(false);
    let heard = &mut |n: u64| stop.store(n > 0, Ordering::Relaxed);
    let made = create(&store, &logs.wanted(), &about(at(0)), &stop, heard);
    assert!(matches!(made, Err(BackupError::Stopped)));
    assert!(blobs.names("").iter().all(|name| name.starts_with("segment/")));
    assert!(logs.back_up(&store, 1).segments_written < 5);
}

/// Runs something once, when an object of a kind is first touched.
fn when(
    blobs: &Arc<MemoryBlobs>,
    what: &'static str,
    prefix: &'static str,
    run: impl Fn() + Send + Sync + 'static,
) {
    let done = AtomicBool::new(false);
    *blobs.watch.lock() = Some(Box::new(move |op, name| {
        if op == what && name.starts_with(prefix) && !done.swap(true, Ordering::SeqCst) {
            run();
        }
    }));
}

#[test]
fn a_clean_up_gives_way_to_a_backup_and_a_backup_waits_for_a_clean_up() {
    let (blobs, logs) = (MemoryBlobs::new(), Logs::new());
    (0..3).for_each(|n| logs.put(0, LARGE, n));
    let store = store(&blobs, None);
    // Segments that nobody names: a backup that was interrupted wrote them.
    let orphans = logs.back_up(&store, 0);
    store.delete_manifest(&orphans.manifest.name()).unwrap();

    // A clean-up begins while a backup has looked at what is there.
    let said = Arc::new(parking_lot::Mutex::new(None));
    let (heard, objects) = (said.clone(), Arc::downgrade(&blobs));
    when(&blobs, "put", "backup/", move || {
        // A second process: the same objects, seen as they are now.
        let blobs = objects.upgrade().unwrap();
        let copy = MemoryBlobs::new();
        copy.objects.lock().clone_from(&blobs.objects.lock());
        let store = Store::new(copy.clone(), None);
        *heard.lock() = Some(prune(&store, at(0), at(5)).unwrap());
        blobs.objects.lock().clone_from(&copy.objects.lock());
    });
    let made = logs.back_up(&store, 0);
    *blobs.watch.lock() = None;
    assert_eq!(made.segments_written, 0);
    let pruned = said.lock().take().unwrap();
    assert!(pruned.stopped.unwrap().contains("a backup is being made since"));
    assert!(store.verify(&made.manifest, &mut |_| ()).unwrap().problems.is_empty());

    // A backup begins while a clean-up is under way: it waits until the mark is gone.
    let mark = "pruning/20270115T080000.000000Z-0".to_owned();
    assert!(name_time("20270115T080000.000000Z-0").unwrap() == at(0));
    blobs.objects.lock().insert(mark.clone(), Bytes::new());
    let objects = Arc::downgrade(&blobs);
    let looks = std::sync::atomic::AtomicU32::new(0);
    *blobs.watch.lock() = Some(Box::new(move |op, name| {
        if op == "list" && name == "pruning/" && looks.fetch_add(1, Ordering::SeqCst) == 1 {
            objects.upgrade().unwrap().objects.lock().remove(&mark);
        }
    }));
    logs.back_up(&store, 0);
    *blobs.watch.lock() = None;

    // Marks that a crash left do not count for ever.
    for folder in ["making/", "pruning/"] {
        let name = format!("{folder}20270115T080000.000000Z-0");
        blobs.objects.lock().insert(name, Bytes::new());
    }
    let later = Time(at(1).0 + DAY);
    assert_eq!(prune(&store, at(0), later).unwrap().stopped, None);
    create(&store, &logs.wanted(), &about(later), &NEVER, &mut |_| ()).unwrap();
    assert_eq!(blobs.names("making/").len() + blobs.names("pruning/").len(), 0);
}

#[test]
fn segments_that_vanish_while_a_backup_is_made_are_written_again() {
    let (blobs, logs) = (MemoryBlobs::new(), Logs::new());
    (0..3).for_each(|n| logs.put(0, LARGE, n));
    let store = store(&blobs, None);
    logs.back_up(&store, 0);
    let objects = Arc::downgrade(&blobs);
    when(&blobs, "put", "backup/", move || {
        objects.upgrade().unwrap().objects.lock().retain(|name, _| !name.starts_with("segment/"));
    });
    let made = logs.back_up(&store, 1);
    *blobs.watch.lock() = None;
    assert_eq!(made.segments_written, 2);
    assert!(store.verify(&made.manifest, &mut |_| ()).unwrap().problems.is_empty());
}

#[test]
fn a_restored_log_has_an_identity_of_its_own() {
    let log = MemoryLog::new("USAGE_0");
    let of = |restore: &str, manifest: &str, to| {
        restored_identity(log.identity(), restore, manifest, to)
    };
    let one = of("00112233", "a", 5);
    assert_eq!(one, of("00112233", "a", 5));
    assert_eq!(one.stream, "USAGE_0");
    assert!(one.uuid.starts_with("00112233-") && one.uuid.len() <= 64, "{}", one.uuid);
    for other in [of("00112234", "a", 5), of("00112233", "b", 5), of("00112233", "a", 6)] {
        assert_ne!(one.uuid, other.uuid);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Random logs, backed up after random growth: every backup holds exactly what the log held then,
    /// reading from anywhere and asking for any time give what the log itself gives.
    #[test]
    fn backups_are_what_the_logs_were(
        growth in prop::collection::vec((0_usize..3, 1_usize..9_000_000, 0_i64..40), 1..12),
        every in 1_usize..5,
        key in prop::option::of(any::<u8>()),
        from in 1_u64..10,
        second in -1_i64..41,
    ) {
        let (blobs, logs) = (MemoryBlobs::new(), Logs::new());
        let store = store(&blobs, key);
        let mut made = Vec::new();
        for (n, (log, bytes, second)) in growth.into_iter().enumerate() {
            logs.put(log, bytes, second);
            if n % every == 0 {
                let records = logs.0.clone().map(|log| log.records());
                made.push((records, logs.back_up(&store, n as i64).manifest));
            }
        }
        for (records, manifest) in &made {
            for (records, part) in records.iter().zip(&manifest.logs) {
                let log = BackupLog::new(&store, part);
                prop_assert_eq!(log.head(), records.len() as u64);
                prop_assert_eq!(log.last_time(), records.last().map(|record| record.time));
                let mut read = Vec::new();
                while let Some(last) = block_on(log.read(read.len() as u64 + 1, 100)).unwrap().last() {
                    read.extend(block_on(log.read(read.len() as u64 + 1, 100)).unwrap());
                    prop_assert_eq!(read.last().unwrap().position, last.position);
                }
                prop_assert_eq!(&read, records);
                let behind = block_on(log.read(from, usize::MAX)).unwrap();
                prop_assert_eq!(behind.is_empty(), from > log.head());
                let upto = records.iter().take_while(|record| record.time <= at(second)).count();
                prop_assert_eq!(log.position_at(at(second)).unwrap(), upto as u64);
                let commit = records.iter().rev().find(|r| r.message.subject.ends_with(".commit"));
                let last = block_on(log.last_commit()).unwrap();
                prop_assert_eq!(last.as_ref(), commit);
                let cut = log.cut(from, log.identity().clone());
                prop_assert_eq!(cut.head(), from.min(log.head()));
                prop_assert!(block_on(cut.read(from + 1, 100)).unwrap().is_empty());
            }
        }
    }
}
