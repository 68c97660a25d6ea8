//! Logs copied into files: from memory, with power failures on the way, and into places that hold
//! something else.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use futures::executor::block_on;
use meterr_connectors::copy::{self, Compared, CopyError, Place, Plan, belongs, difference};
use meterr_connectors::embedded::{
    EmbeddedLog, EmbeddedOptions, EmbeddedPlace, FaultFs, unfinished_copy,
};
use meterr_connectors::log::{Log, LogError, Message, Record, system_clock};
use meterr_connectors::memory::MemoryLog;
use meterr_operators::time::Time;
use proptest::prelude::*;

const DATA: &str = "data";

fn options() -> EmbeddedOptions {
    EmbeddedOptions { segment_bytes: 4096, tail_bytes: 2000, ..EmbeddedOptions::default() }
}

fn target(fs: &FaultFs) -> EmbeddedPlace {
    EmbeddedPlace::new(Path::new(DATA), options(), Arc::new(fs.clone()))
}

fn opened(fs: &FaultFs, stream: &str) -> Arc<EmbeddedLog> {
    let dir = Path::new(DATA).join("log").join(stream);
    let fs = Arc::new(fs.clone());
    EmbeddedLog::open(&dir, stream, options(), fs, system_clock()).unwrap().0
}

fn message(subject: &str, n: u64) -> Message {
    let headers = vec![("ce-id".to_owned(), n.to_string()), ("a".to_owned(), "ü".to_owned())];
    let payload = vec![b'x'; 40 + (n as usize * 37) % 900];
    Message { subject: subject.to_owned(), headers, payload: payload.into() }
}

/// A deployment of one shard: usage, output with commit records, control.
fn deployment(n: u64) -> Vec<MemoryLog> {
    let [usage, out, control] = ["USAGE_0", "OUT_0", "CONTROL"].map(MemoryLog::new);
    for at in 1..=n {
        let time = Time(1_700_000_000_000_000 + at as i64 * 1_234_567);
        usage.append_at(vec![message("usage.0.acme", at)], time).unwrap();
        out.append_at(vec![message("out.0.part", at), message("out.0.commit", at)], time).unwrap();
    }
    control.append_at(vec![message("control", 1)], Time(5)).unwrap();
    vec![usage, out, control]
}

fn sources(logs: &[MemoryLog]) -> Vec<Arc<dyn Log>> {
    logs.iter().map(|log| Arc::new(log.clone()) as Arc<dyn Log>).collect()
}

fn planned(logs: &[MemoryLog], target: &dyn Place) -> Result<Plan, CopyError> {
    copy::plan(&sources(logs), target, &mut |_| ())
}

fn copied(logs: &[MemoryLog], target: &dyn Place) -> Result<u64, CopyError> {
    let plan = planned(logs, target)?;
    let mut heard = 0;
    copy::copy(&plan, target, &mut |n| heard += n)?;
    assert_eq!(heard, plan.missing);
    Ok(heard)
}

fn compared(logs: &[MemoryLog], target: &dyn Place) -> Compared {
    let mut compared = Compared::default();
    for log in logs {
        let found = target.find(&log.identity().stream).unwrap().unwrap();
        copy::compare(log, &*found, &mut compared, &mut |_| ()).unwrap();
    }
    compared
}

#[test]
fn a_copy_has_the_same_records_and_identities_and_can_be_repeated_and_continued() {
    let fs = FaultFs::new();
    let logs = deployment(60);
    let first = target(&fs);
    assert_eq!(copied(&logs, &first).unwrap(), 181);
    assert!(unfinished_copy(&fs, Path::new(DATA)).unwrap());
    let result = compared(&logs, &first);
    assert_eq!((result.records, result.differences_total), (181, 0), "{result:?}");
    first.finish().unwrap();
    drop(first);
    assert!(!unfinished_copy(&fs, Path::new(DATA)).unwrap());

    // Again: nothing is missing. With more in the source: only that.
    let again = target(&fs);
    assert_eq!(copied(&logs, &again).unwrap(), 0);
    logs[0].append_at(vec![message("usage.0.acme", 61)], Time(i64::MAX / 2)).unwrap();
    let on = target(&fs);
    drop(again);
    assert_eq!(copied(&logs, &on).unwrap(), 1);
    assert_eq!(compared(&logs, &on).differences_total, 0);
    on.finish().unwrap();
    drop(on);

    // What was copied is a log like any other, with the commit records where they belong, and its time
    // goes on from the last one copied.
    let out = opened(&fs, "OUT_0");
    assert_eq!(out.identity(), logs[1].identity());
    assert_eq!(block_on(out.last_commit()).unwrap(), block_on(logs[1].last_commit()).unwrap());
    let commit = Message::new("out.0.commit", "");
    let error = block_on(out.commit(vec![], commit.clone(), 118)).unwrap_err();
    assert!(matches!(error, LogError::Conflict { actual: 120, .. }), "{error}");
    assert_eq!(block_on(out.commit(vec![], commit, 120)).unwrap().last, 121);
    let usage = opened(&fs, "USAGE_0");
    let appended = block_on(usage.append(vec![message("usage.0.acme", 62)])).unwrap();
    assert_eq!((appended.last, appended.time), (62, Time(i64::MAX / 2)));
}

#[test]
fn times_that_fall_are_kept_as_they_are() {
    let fs = FaultFs::new();
    let dir = Path::new(DATA).join("log").join("USAGE_0");
    let identity = MemoryLog::new("USAGE_0").identity().clone();
    let log = target(&fs).open(&identity, 3).unwrap();
    let record = |position, time| Record {
        position,
        time: Time(time),
        message: message("usage.0.acme", position),
    };
    let records = vec![record(1, 50), record(2, 40), record(3, 45)];
    block_on(log.import(records.clone())).unwrap();
    drop(log);
    let (log, report) =
        EmbeddedLog::open(&dir, "USAGE_0", options(), Arc::new(fs.clone()), system_clock())
            .unwrap();
    assert!(report.damaged.is_empty());
    assert_eq!(block_on(log.read(1, 10_000)).unwrap(), records);
    assert_eq!(log.last_time(), Some(Time(50)), "log time is the running maximum");
}

#[test]
fn records_that_do_not_follow_are_refused() {
    let fs = FaultFs::new();
    let identity = MemoryLog::new("USAGE_0").identity().clone();
    let target = target(&fs);
    let log = target.open(&identity, 9).unwrap();
    let record =
        |position| Record { position, time: Time(1), message: message("usage.0.a", position) };
    block_on(log.import(vec![])).unwrap();
    block_on(log.import(vec![record(1), record(2)])).unwrap();
    for (records, what) in [
        (vec![record(2)], "from position 2 on do not follow its end at 2"),
        (vec![record(4)], "from position 4 on do not follow"),
        (vec![record(3), record(5)], "a gap before position 4"),
    ] {
        let error = block_on(log.import(records)).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
    block_on(log.import(vec![record(3)])).unwrap();
    assert_eq!(log.head(), 3);
}

#[test]
fn a_place_that_holds_something_else_is_left_alone() {
    let logs = deployment(5);
    let refused = |fs: &FaultFs, logs: &[MemoryLog]| match planned(logs, &target(fs)) {
        Err(CopyError::Foreign { stream, what }) => format!("{stream}: {what}"),
        other => panic!("{:?}", other.map(|plan| plan.records)),
    };
    // A log of another deployment, even an empty one.
    let fs = FaultFs::new();
    drop(opened(&fs, "CONTROL"));
    let what = refused(&fs, &logs);
    assert!(what.starts_with("CONTROL: its identity is"), "{what}");
    // More shards than the source has.
    let fs = FaultFs::new();
    drop(opened(&fs, "USAGE_1"));
    assert!(refused(&fs, &logs).starts_with("USAGE_1: the source has no such log"));
    // A copy that has gone on by itself, or is of a source that went another way.
    let fs = FaultFs::new();
    let whole = target(&fs);
    copied(&logs, &whole).unwrap();
    drop(whole);
    block_on(opened(&fs, "USAGE_0").append(vec![message("usage.0.acme", 9)])).unwrap();
    assert!(refused(&fs, &logs).contains("6 records, more than the source's 5"));
    logs[0].append_at(vec![message("usage.0.acme", 10)], Time(i64::MAX / 2)).unwrap();
    assert!(refused(&fs, &logs).contains("its last record, at 6, has another time"));
    assert_eq!(opened(&fs, "USAGE_0").head(), 6);
}

#[test]
fn what_cannot_be_copied_is_said_before_anything_is() {
    let fs = FaultFs::new();
    let logs = deployment(5);
    let small = EmbeddedOptions { message_bytes_max: 170, ..options() };
    let small = EmbeddedPlace::new(Path::new(DATA), small, Arc::new(fs.clone()));
    let error = planned(&logs, &small).map(|plan| plan.records).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, CopyError::Unfit { total: 9, .. }), "{text}");
    assert!(text.contains("\n  USAGE_0 position 3: 196 bytes, above the limit of 170"), "{text}");
    assert!(small.streams().unwrap().is_empty() && !unfinished_copy(&fs, Path::new(DATA)).unwrap());

    logs[1].damage(4);
    let error = planned(&logs, &target(&fs)).map(|plan| plan.records).unwrap_err();
    assert!(matches!(error, CopyError::Log(LogError::Damaged { from: 4, .. })), "{error}");
}

#[test]
fn a_source_that_grows_meanwhile_is_noticed() {
    let fs = FaultFs::new();
    let logs = deployment(5);
    let target = target(&fs);
    let plan = planned(&logs, &target).unwrap();
    let mut grow = Some(&logs[0]);
    let error = copy::copy(&plan, &target, &mut |_| {
        if let Some(log) = grow.take() {
            log.append_at(vec![message("usage.0.acme", 6)], Time(i64::MAX / 2)).unwrap();
        }
    })
    .unwrap_err();
    assert!(matches!(error, CopyError::Moved { from: 5, to: 6, .. }), "{error}");
    assert_eq!(copied(&logs, &target).unwrap(), 1, "the next run goes on");
    assert_eq!(compared(&logs, &target).differences_total, 0);
}

#[test]
fn every_part_of_a_record_is_compared() {
    let record = Record { position: 1, time: Time(1), message: message("usage.0.acme", 1) };
    let with = |change: fn(&mut Record)| {
        let mut other = record.clone();
        change(&mut other);
        difference(&record, &other)
    };
    assert_eq!(with(|_| ()), None);
    assert_eq!(with(|r| r.message.headers.reverse()), None);
    assert_eq!(with(|r| r.position = 2), Some("position"));
    assert_eq!(with(|r| r.time = Time(2)), Some("time"));
    assert_eq!(with(|r| r.message.subject.push('x')), Some("subject"));
    assert_eq!(with(|r| r.message.payload = "x".into()), Some("payload"));
    assert_eq!(with(|r| r.message.headers[0].1.push('x')), Some("headers"));
    assert_eq!(with(|r| drop(r.message.headers.pop())), Some("headers"));

    let (left, right) = (deployment(3), deployment(3));
    right[0].append_at(vec![message("usage.0.acme", 4)], Time(i64::MAX / 2)).unwrap();
    let mut found = Compared::default();
    copy::compare(&left[0], &right[0], &mut found, &mut |_| ()).unwrap();
    assert_eq!((found.records, found.differences_total), (3, 1), "{found:?}");
    let other = MemoryLog::new("USAGE_0");
    for at in 1..=3 {
        other.append_at(vec![message("usage.0.acme", at + 1)], Time(9)).unwrap();
    }
    let mut found = Compared::default();
    copy::compare(&left[0], &other, &mut found, &mut |_| ()).unwrap();
    assert_eq!(found.differences_total, 3);
    assert_eq!(found.differences[0], "USAGE_0 position 1: the time differs");
}

#[test]
fn names_of_streams() {
    for name in ["CONTROL", "USAGE_0", "OUT_255"] {
        assert!(belongs(name), "{name}");
    }
    for name in ["", "control", "USAGE_", "USAGE_01", "USAGE_x", "OUT_70000", "OTHER"] {
        assert!(!belongs(name), "{name}");
    }
}

/// What interrupts a copy.
#[derive(Debug, Clone)]
enum Trouble {
    /// Power fails once this many syncs have passed, and takes what the seed says.
    Crash { after_writes: u64, seed: u64 },
    /// A sync fails.
    Sync { nth: u64, seed: u64 },
}

fn trouble() -> impl Strategy<Value = Trouble> {
    prop_oneof![
        (1..12_u64, any::<u64>())
            .prop_map(|(after_writes, seed)| Trouble::Crash { after_writes, seed }),
        (1..12_u64, any::<u64>()).prop_map(|(nth, seed)| Trouble::Sync { nth, seed }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    /// However often it is interrupted, a copy is a prefix of its source, marked as unfinished, and
    /// becomes whole.
    #[test]
    fn an_interrupted_copy_goes_on(
        n in 1..80_u64,
        troubles in prop::collection::vec(trouble(), 1..4),
    ) {
        let fs = FaultFs::new();
        let logs = deployment(n);
        for trouble in &troubles {
            match trouble {
                Trouble::Crash { after_writes, .. } => fs.fail_write(*after_writes, 13),
                Trouble::Sync { nth, .. } => fs.fail_sync(*nth),
            }
            let interrupted = copied(&logs, &target(&fs)).is_err();
            let (Trouble::Crash { seed, .. } | Trouble::Sync { seed, .. }) = trouble;
            fs.crash(*seed);
            let began = unfinished_copy(&fs, Path::new(DATA)).unwrap();
            let any = !target(&fs).streams().unwrap().is_empty();
            prop_assert!(began || !any, "records without the mark");
            if !interrupted {
                prop_assert!(began && any);
            }
        }
        let last = target(&fs);
        copied(&logs, &last).unwrap();
        let result = compared(&logs, &last);
        prop_assert_eq!(result.differences_total, 0, "{:?}", result);
        last.finish().unwrap();
        drop(last);
        fs.crash(7);
        prop_assert!(!unfinished_copy(&fs, Path::new(DATA)).unwrap());
        let whole = target(&fs);
        prop_assert_eq!(compared(&logs, &whole).differences_total, 0);
    }
}
