//! The embedded log as its users see it, and that the log in memory is the same to them.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::executor::block_on;
use futures::future::join_all;
use futures::task::noop_waker;
use meterr_connectors::embedded::{EmbeddedLog, EmbeddedOptions, FaultFs, RealFs};
use meterr_connectors::log::{
    Clock, Log, LogError, LogResult, MESSAGE_BYTES_MAX, Message, system_clock,
};
use meterr_connectors::memory::MemoryLog;
use meterr_operators::time::Time;
use proptest::prelude::*;

const DIR: &str = "data/log/OUT_3";

fn small() -> EmbeddedOptions {
    EmbeddedOptions { segment_bytes: 2000, tail_bytes: 500, ..EmbeddedOptions::default() }
}

fn open_with(fs: &FaultFs, options: EmbeddedOptions, clock: Clock) -> Arc<EmbeddedLog> {
    EmbeddedLog::open(Path::new(DIR), "OUT_3", options, Arc::new(fs.clone()), clock).unwrap().0
}

fn open(fs: &FaultFs) -> Arc<EmbeddedLog> {
    open_with(fs, small(), system_clock())
}

fn event(n: usize) -> Message {
    Message::new("usage.3.acme", format!("{{\"id\":\"{n}\"}}"))
}

fn part(n: usize) -> Message {
    Message::new("out.3.part", format!("part {n}"))
}

fn commit(n: usize) -> Message {
    Message::new("out.3.commit", format!("commit {n}"))
}

#[test]
fn files_on_a_real_disk_keep_everything_over_a_restart() {
    let data = tempfile::tempdir().unwrap();
    let dir = data.path().join("log").join("USAGE_3");
    let open = || {
        let fs = Arc::new(RealFs);
        EmbeddedLog::open(&dir, "USAGE_3", small(), fs, system_clock()).unwrap()
    };
    let (log, report) = open();
    assert!(report.created);
    let identity = log.identity().clone();
    assert_eq!((identity.stream.as_str(), identity.uuid.len()), ("USAGE_3", 36));
    assert_eq!((log.head(), log.first(), log.last_time()), (0, 1, None));
    assert_eq!(block_on(log.read(1, 1000)).unwrap(), []);
    let mut message = event(0);
    message.headers = vec![("ce-id".into(), "7".into()), ("ce-source".into(), "ü".into())];
    block_on(log.append(vec![message.clone()])).unwrap();
    for n in 1..100 {
        assert_eq!(block_on(log.append(vec![event(n)])).unwrap().last, n as u64 + 1);
    }
    let before = block_on(log.read(1, usize::MAX)).unwrap();
    assert_eq!(before.len(), 100);
    assert_eq!(before[0].message, message);
    log.close().unwrap();
    drop(log);

    let (log, report) = open();
    assert_eq!(log.identity(), &identity);
    assert_eq!((report.created, report.records, report.cut_bytes), (false, 100, 0));
    assert!(report.segments > 3 && report.damaged.is_empty());
    assert_eq!(report.bytes, log.records_bytes());
    assert_eq!(block_on(log.read(1, usize::MAX)).unwrap(), before);
    assert_eq!(log.last_time(), Some(before[99].time));
    assert_eq!(log.verify().unwrap(), []);
    assert_eq!(block_on(log.append(vec![event(100)])).unwrap().first, 101);
}

#[test]
fn concurrent_appenders_get_consecutive_positions_and_share_syncs() {
    let fs = FaultFs::new();
    let log = open_with(&fs, EmbeddedOptions::default(), system_clock());
    let syncs = fs.syncs();
    // The first append is under way while all others gather behind it.
    fs.hold_syncs(0);
    let first = std::thread::spawn({
        let log = log.clone();
        move || block_on(log.append(vec![event(0)])).unwrap()
    });
    while !fs.sync_held() {
        std::thread::yield_now();
    }
    let mut futures: Vec<_> =
        (1..=64).map(|n| log.append(vec![event(2 * n), event(2 * n + 1)])).collect();
    let waker = noop_waker();
    for future in &mut futures {
        assert!(future.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    }
    assert_eq!((log.head(), log.last_time()), (0, None), "nothing is visible before it is durable");
    assert_eq!(block_on(log.read(1, 1000)).unwrap(), []);
    fs.release_syncs();
    assert_eq!(first.join().unwrap().first, 1);
    let answers = block_on(join_all(futures));
    for (n, appended) in answers.into_iter().enumerate() {
        let appended = appended.unwrap();
        assert_eq!((appended.first, appended.last), (2 * n as u64 + 2, 2 * n as u64 + 3));
    }
    assert_eq!(fs.syncs() - syncs, 2);

    let threads: Vec<_> = (0..8)
        .map(|_| {
            let log = log.clone();
            std::thread::spawn(move || {
                let append = |n| block_on(log.append(vec![event(n)])).unwrap().first;
                (0..50).map(append).collect::<Vec<u64>>()
            })
        })
        .collect();
    let mut positions: Vec<u64> = Vec::new();
    for thread in threads {
        let own = thread.join().unwrap();
        assert!(own.is_sorted());
        positions.extend(own);
    }
    positions.sort_unstable();
    assert_eq!(positions, (130..530).collect::<Vec<u64>>());
}

#[test]
fn of_commits_with_the_same_predecessor_one_wins_and_the_others_write_nothing() {
    let fs = FaultFs::new();
    let log = open(&fs);
    assert_eq!(block_on(log.last_commit()).unwrap(), None);
    let first = block_on(log.commit(vec![part(0), part(1)], commit(0), 0)).unwrap();
    assert_eq!((first.first, first.last), (1, 3));
    let threads: Vec<_> = (0..8)
        .map(|n| {
            let log = log.clone();
            std::thread::spawn(move || block_on(log.commit(vec![part(n)], commit(n), 3)))
        })
        .collect();
    let results: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
    let (won, lost): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert_eq!((won.len(), log.head()), (1, 5));
    for error in lost {
        assert_eq!(
            error.unwrap_err().to_string(),
            "log \"OUT_3\" has its last commit at 5, not at 3 as expected"
        );
    }
    // Other records in between are no conflict.
    block_on(log.append(vec![part(9)])).unwrap();
    block_on(log.commit(vec![], commit(9), 5)).unwrap();
    let newest = block_on(log.last_commit()).unwrap().unwrap();
    assert_eq!((newest.position, &newest.message), (7, &commit(9)));
    let error = block_on(log.commit(vec![], part(1), 7)).unwrap_err().to_string();
    assert!(error.contains("\".commit\", not \"out.3.part\""), "{error}");

    // The newest one is found again, however far back.
    for n in 0..100 {
        block_on(log.append(vec![part(n)])).unwrap();
    }
    drop(log);
    let log = open(&fs);
    assert_eq!(block_on(log.last_commit()).unwrap().unwrap(), newest);
    let error = block_on(log.commit(vec![], commit(10), 5)).unwrap_err();
    assert!(matches!(error, LogError::Conflict { expected: 5, actual: 7, .. }), "{error}");
    assert_eq!(block_on(log.commit(vec![], commit(10), 7)).unwrap().first, 108);
}

#[test]
fn a_commit_that_damage_may_hide_is_an_error_not_an_older_commit() {
    let fs = FaultFs::new();
    let log = open_with(&fs, EmbeddedOptions::default(), system_clock());
    block_on(log.commit(vec![], commit(0), 0)).unwrap();
    block_on(log.commit(vec![], commit(1), 1)).unwrap();
    block_on(log.append(vec![part(1)])).unwrap();
    let path = Path::new(DIR).join("00000000000000000001.log");
    let intact = fs.bytes(&path).unwrap();
    drop(log);
    let sealed = fs.bytes(&path).unwrap();
    // With the trailer the position is known, without it nothing is.
    for bytes in [intact, sealed] {
        let frame = 44 + 8 + "out.3.commit".len() + "commit 0".len();
        let mut bad = bytes.clone();
        bad[40 + frame + 3] ^= 1;
        fs.put(&path, bad);
        // Closing in between writes a trailer, which must not vouch for the older commit.
        drop(open_with(&fs, EmbeddedOptions::default(), system_clock()));
        let log = open_with(&fs, EmbeddedOptions::default(), system_clock());
        let error = block_on(log.last_commit()).unwrap_err();
        assert!(matches!(error, LogError::Damaged { from: 2, resume: 3, .. }), "{error}");
        let error = block_on(log.commit(vec![], commit(2), 1)).unwrap_err();
        assert!(matches!(error, LogError::Conflict { expected: 1, actual: 2, .. }), "{error}");
        assert_eq!(block_on(log.commit(vec![], commit(2), 2)).unwrap().last, 4);
        assert_eq!(block_on(log.last_commit()).unwrap().unwrap().position, 4);
        drop(log);
        // An undamaged twin.
        fs.put(&path, bytes);
        let log = open_with(&fs, EmbeddedOptions::default(), system_clock());
        assert_eq!(block_on(log.last_commit()).unwrap().unwrap().position, 2);
    }
}

#[test]
fn a_full_disk_poisons_until_the_log_is_opened_anew() {
    let fs = FaultFs::new();
    let log = open_with(&fs, EmbeddedOptions::default(), system_clock());
    block_on(log.append(vec![event(0)])).unwrap();
    fs.fail_write(1, 50);
    let error = block_on(log.append(vec![event(1), event(2)])).unwrap_err().to_string();
    assert!(
        error.starts_with("log \"OUT_3\" stopped after a failed write: cannot write"),
        "{error}"
    );
    assert!(log.poisoned().is_some());
    let later = [block_on(log.append(vec![event(3)])), block_on(log.commit(vec![], commit(1), 0))];
    assert!(later.iter().all(|result| matches!(result, Err(LogError::Poisoned { .. }))));
    assert_eq!(block_on(log.read(1, 1000)).unwrap().len(), 1);
    // Nobody waits for what will not come.
    block_on(log.wait_beyond(1));
    drop(log);
    let log = open_with(&fs, EmbeddedOptions::default(), system_clock());
    assert_eq!(log.head(), 1);
    assert_eq!(block_on(log.append(vec![event(3)])).unwrap().first, 2);
}

#[test]
fn waiting_ends_with_the_head_or_with_the_log() {
    let fs = FaultFs::new();
    let log = open(&fs);
    // One after the other on one thread: the wait has to be woken by the append.
    block_on(async { futures::join!(log.wait_beyond(0), log.append(vec![event(0)])) }).1.unwrap();
    block_on(log.wait_beyond(0));
    let mut beyond = log.wait_beyond(1);
    let waker = noop_waker();
    assert!(beyond.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    log.close().unwrap();
    block_on(beyond);
    let error = block_on(log.append(vec![event(1)])).unwrap_err();
    assert!(matches!(error, LogError::Io { .. }), "{error}");
    assert_eq!(block_on(log.read(1, 1)).unwrap().len(), 1, "reads go on");
}

#[test]
fn closing_makes_durable_what_waits() {
    let fs = FaultFs::new();
    let log = open_with(&fs, EmbeddedOptions::default(), system_clock());
    let mut futures: Vec<_> = (0..20).map(|n| log.append(vec![event(n)])).collect();
    let waker = noop_waker();
    futures.iter_mut().for_each(|future| {
        let _: Poll<_> = future.as_mut().poll(&mut Context::from_waker(&waker));
    });
    log.close().unwrap();
    assert!(block_on(join_all(futures)).iter().all(Result::is_ok));
    drop(log);
    fs.crash(1);
    assert_eq!(open(&fs).head(), 20);
}

#[test]
fn messages_up_to_the_limit_are_taken_and_larger_ones_refused_before_writing() {
    let fs = FaultFs::new();
    let log = open(&fs);
    // Lengths of subject and header list, then the subject.
    let most = MESSAGE_BYTES_MAX - 8 - 1;
    let large = Message::new("s", Bytes::from(vec![7; most]));
    let error = Message::new("s", Bytes::from(vec![7; most + 1]));
    let error = block_on(log.append(vec![event(0), error])).unwrap_err().to_string();
    assert_eq!(error, "a message of 17825793 bytes is above the log's limit of 17825792");
    assert_eq!((log.head(), fs.bytes(&Path::new(DIR).join("identity")).is_some()), (0, true));
    block_on(log.append(vec![event(0), large.clone(), event(1)])).unwrap();
    drop(log);
    let log = open(&fs);
    assert_eq!(block_on(log.read(2, 1)).unwrap()[0].message, large);
    assert_eq!(block_on(log.read(1, 1000)).unwrap().len(), 1);
    assert_eq!(block_on(log.read(3, 1000)).unwrap()[0].message, event(1));
}

#[test]
fn an_append_larger_than_the_queue_goes_through() {
    let fs = FaultFs::new();
    let options = EmbeddedOptions { queue_bytes_max: 4096, ..small() };
    let log = open_with(&fs, options, system_clock());
    let large = Message::new("s", vec![1; 10_000]);
    let appends = (0..5).map(|_| log.append(vec![large.clone(), event(1)]));
    assert!(block_on(join_all(appends)).iter().all(Result::is_ok));
    assert_eq!(log.head(), 10);
}

#[test]
fn log_time_never_falls_even_over_a_restart() {
    let fs = FaultFs::new();
    let now = Arc::new(AtomicI64::new(100));
    let clock: Clock = Arc::new({
        let now = now.clone();
        move || Time(now.load(Ordering::Relaxed))
    });
    let at = |log: &EmbeddedLog, time| {
        now.store(time, Ordering::Relaxed);
        block_on(log.append(vec![event(1)])).unwrap().time.0
    };
    let log = open_with(&fs, small(), clock.clone());
    assert_eq!([at(&log, 100), at(&log, 90), at(&log, 110)], [100, 100, 110]);
    drop(log);
    let log = open_with(&fs, small(), clock);
    assert_eq!([at(&log, 50), at(&log, 111)], [110, 111]);
    let times: Vec<i64> =
        block_on(log.read(1, 10_000)).unwrap().iter().map(|record| record.time.0).collect();
    assert_eq!(times, [100, 100, 110, 110, 111]);
}

#[test]
fn a_payload_that_looks_like_records_is_never_taken_for_some() {
    let fs = FaultFs::new();
    let log = open_with(&fs, EmbeddedOptions::default(), system_clock());
    for n in 0..20 {
        block_on(log.append(vec![event(n)])).unwrap();
    }
    let path = Path::new(DIR).join("00000000000000000001.log");
    let frames = fs.bytes(&path).unwrap();
    // A log of another salt, one record long, then the copied bytes as a payload of the next.
    let fs = FaultFs::new();
    let log = open_with(&fs, EmbeddedOptions::default(), system_clock());
    block_on(log.append(vec![event(100), Message::new("s", frames), event(101)])).unwrap();
    block_on(log.append(vec![event(102)])).unwrap();
    drop(log);
    let mut bytes = fs.bytes(&path).unwrap();
    // The header of the second frame: where its payload ends is no longer known.
    let second = 40 + 44 + 8 + "usage.3.acme".len() + event(100).payload.len();
    bytes[second + 5] ^= 1;
    fs.put(&path, bytes);
    let log = open_with(&fs, EmbeddedOptions::default(), system_clock());
    assert_eq!(log.head(), 4);
    let error = block_on(log.read(2, 1)).unwrap_err();
    assert!(matches!(error, LogError::Damaged { from: 2, resume: 3, .. }), "{error}");
    assert_eq!(block_on(log.read(3, 1)).unwrap()[0].message, event(101));
}

#[derive(Debug, Clone)]
enum Step {
    Append(Vec<usize>),
    Commit { parts: usize, stale: bool },
    Read { from: u64, bytes: usize },
    LastCommit,
    Reopen,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => prop::collection::vec(0..300_usize, 0..6).prop_map(Step::Append),
        2 => (0..4_usize, prop::bool::weighted(0.2))
            .prop_map(|(parts, stale)| Step::Commit { parts, stale }),
        4 => (0..60_u64, prop_oneof![0..2_usize, 0..5000_usize])
            .prop_map(|(from, bytes)| Step::Read { from, bytes }),
        1 => Just(Step::LastCommit),
        1 => Just(Step::Reopen),
    ]
}

fn comparable<T: std::fmt::Debug>(result: LogResult<T>) -> String {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(error) => error.to_string(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn embedded_and_memory_log_answer_the_same(
        steps in prop::collection::vec(step(), 1..40),
        tail_bytes in prop_oneof![Just(0), 0..3000_usize],
    ) {
        let ticking = || -> Clock {
            let now = AtomicI64::new(0);
            Arc::new(move || Time(now.fetch_add(1, Ordering::Relaxed) * 7 % 100))
        };
        let clock = ticking();
        let fs = FaultFs::new();
        let options = EmbeddedOptions { tail_bytes, ..small() };
        let mut embedded = open_with(&fs, options.clone(), clock.clone());
        let memory = MemoryLog::with_clock("OUT_3", ticking());
        for step in steps {
            let (a, b) = match step {
                Step::Append(sizes) => {
                    let messages: Vec<Message> =
                        sizes.iter().map(|n| Message::new("usage.3.a", vec![b'x'; *n])).collect();
                    (
                        comparable(block_on(embedded.append(messages.clone()))),
                        comparable(block_on(memory.append(messages))),
                    )
                }
                Step::Commit { parts, stale } => {
                    let last = block_on(memory.last_commit()).unwrap();
                    let previous = last.map_or(0, |r| r.position) + u64::from(stale);
                    let parts: Vec<Message> = (0..parts).map(part).collect();
                    (
                        comparable(block_on(embedded.commit(parts.clone(), commit(1), previous))),
                        comparable(block_on(memory.commit(parts, commit(1), previous))),
                    )
                }
                Step::Read { from, bytes } => (
                    comparable(block_on(embedded.read(from, bytes))),
                    comparable(block_on(memory.read(from, bytes))),
                ),
                Step::LastCommit => (
                    comparable(block_on(embedded.last_commit())),
                    comparable(block_on(memory.last_commit())),
                ),
                Step::Reopen => {
                    drop(embedded);
                    embedded = open_with(&fs, options.clone(), clock.clone());
                    (String::new(), String::new())
                }
            };
            prop_assert_eq!(a, b);
            prop_assert_eq!(embedded.head(), memory.head());
            prop_assert_eq!(embedded.last_time(), memory.last_time());
        }
    }
}
