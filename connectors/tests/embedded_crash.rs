//! What power failure, failed writes and decay may do to the embedded log, and what they may not:
//! random histories against a list of what was appended.

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::task::{Context, Poll};

use futures::executor::block_on;
use futures::future::BoxFuture;
use futures::task::noop_waker;
use meterr_connectors::embedded::{
    Damage, EmbeddedLog, EmbeddedOptions, FaultFs, FileSystem, RecoveryReport,
};
use meterr_connectors::log::{Appended, Clock, Log, LogError, LogResult, Message};
use meterr_operators::time::Time;
use proptest::prelude::*;

const DIR: &str = "data/log/USAGE_3";

/// Small segments, so that a few records fill several; little memory, so that reads use the files.
fn options() -> EmbeddedOptions {
    EmbeddedOptions { segment_bytes: 4096, tail_bytes: 2000, ..EmbeddedOptions::default() }
}

fn clock() -> Clock {
    let now = Arc::new(AtomicI64::new(0));
    Arc::new(move || Time(now.fetch_add(1, Ordering::Relaxed)))
}

fn open(fs: &FaultFs) -> LogResult<(Arc<EmbeddedLog>, RecoveryReport)> {
    EmbeddedLog::open(Path::new(DIR), "USAGE_3", options(), Arc::new(fs.clone()), clock())
}

fn contents(log: &EmbeddedLog) -> Vec<Message> {
    let mut messages = Vec::new();
    while (messages.len() as u64) < log.head() {
        for record in block_on(log.read(messages.len() as u64 + 1, 3000)).unwrap() {
            assert_eq!(record.position, messages.len() as u64 + 1);
            messages.push(record.message);
        }
    }
    assert_eq!(block_on(log.read(log.head() + 1, 3000)).unwrap(), []);
    messages
}

fn message() -> impl Strategy<Value = Message> {
    let payload = prop_oneof![
        4 => prop::collection::vec(any::<u8>(), 0..60),
        // Zeros and whole sectors, which look like what a crash leaves.
        1 => (0..1400_usize).prop_map(|n| vec![0; n]),
        2 => prop::collection::vec(any::<u8>(), 400..1400),
    ];
    let headers = prop::collection::vec(("[a-z]{1,4}", "[a-z]{0,4}"), 0..2);
    ("usage\\.3\\.[a-z]{1,6}", headers, payload).prop_map(|(subject, headers, payload)| Message {
        subject,
        headers,
        payload: payload.into(),
    })
}

fn batches(n: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Vec<Message>>> {
    prop::collection::vec(prop::collection::vec(message(), 1..5), n)
}

/// What goes wrong in a round.
#[derive(Debug, Clone)]
enum Trouble {
    /// Power fails while the `syncs`-th sync from now is under way.
    Crash { syncs: u64, seed: u64 },
    /// The disk is full at the `nth` write from now.
    Full { nth: u64, keep: usize },
    /// The `nth` sync from now fails.
    Sync { nth: u64 },
    /// None: the log is closed.
    None,
}

fn trouble() -> impl Strategy<Value = Trouble> {
    prop_oneof![
        4 => (0..5_u64, any::<u64>()).prop_map(|(syncs, seed)| Trouble::Crash { syncs, seed }),
        1 => (1..4_u64, 0..3000_usize).prop_map(|(nth, keep)| Trouble::Full { nth, keep }),
        1 => (1..4_u64).prop_map(|nth| Trouble::Sync { nth }),
        1 => Just(Trouble::None),
    ]
}

#[derive(Debug, Clone)]
struct Round {
    answered: Vec<Vec<Message>>,
    flying: Vec<Vec<Message>>,
    trouble: Trouble,
    /// Power fails once more after it, with whatever is still unsynced.
    again: Option<u64>,
    /// Power fails during the recovery that follows, at this sync.
    in_recovery: Option<(u64, u64)>,
}

fn round() -> impl Strategy<Value = Round> {
    (
        batches(0..4),
        batches(0..5),
        trouble(),
        prop::option::of(any::<u64>()),
        prop::option::weighted(0.3, (0..5_u64, any::<u64>())),
    )
        .prop_map(|(answered, flying, trouble, again, in_recovery)| Round {
            answered,
            flying,
            trouble,
            again,
            in_recovery,
        })
}

/// Appends under way, with what they append.
struct Flying(VecDeque<(BoxFuture<'static, LogResult<Appended>>, Vec<Message>)>);

impl Flying {
    /// Polls the oldest; gives what is done, in order.
    fn done(&mut self) -> Option<(LogResult<Appended>, Vec<Message>)> {
        let waker = noop_waker();
        let (future, _) = self.0.front_mut()?;
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(result) => Some((result, self.0.pop_front().unwrap().1)),
            Poll::Pending => None,
        }
    }
}

/// Opens the log, with a power failure on the way where the round says so.
fn reopen(fs: &FaultFs, crash: Option<(u64, u64)>) -> (Arc<EmbeddedLog>, RecoveryReport) {
    if let Some((pass, seed)) = crash {
        fs.hold_syncs(pass);
        let opening = std::thread::spawn({
            let fs = fs.clone();
            move || drop(open(&fs))
        });
        while !fs.sync_held() && !opening.is_finished() {
            std::thread::yield_now();
        }
        fs.crash(seed);
        opening.join().unwrap();
    }
    open(fs).unwrap()
}

fn run(rounds: Vec<Round>) {
    let fs = FaultFs::new();
    let mut model: Vec<Message> = Vec::new();
    let mut identity = None;
    let mut in_recovery = None;
    for round in rounds {
        let (log, report) = reopen(&fs, in_recovery.take());
        assert_eq!(report.damaged, []);
        assert_eq!(contents(&log), model);
        assert_eq!(report.records, model.len() as u64);
        // Once a log has answered, it is for ever the same one.
        if !model.is_empty() {
            assert_eq!(identity.as_ref(), Some(log.identity()));
        }
        identity = Some(log.identity().clone());
        for batch in &round.answered {
            let appended = block_on(log.append(batch.clone())).unwrap();
            assert_eq!(appended.first, model.len() as u64 + 1);
            model.extend(batch.iter().cloned());
            assert_eq!((appended.last, log.head()), (model.len() as u64, model.len() as u64));
        }
        match round.trouble {
            Trouble::Crash { syncs, .. } => fs.hold_syncs(syncs),
            Trouble::Full { nth, keep } => fs.fail_write(nth, keep),
            Trouble::Sync { nth } => fs.fail_sync(nth),
            Trouble::None => {}
        }
        let mut flying = Flying(VecDeque::new());
        for batch in round.flying {
            flying.0.push_back((log.append(batch.clone()), batch));
            // The first poll hands it to the writer, in this order.
            let waker = noop_waker();
            let mut context = Context::from_waker(&waker);
            let (future, _) = flying.0.back_mut().unwrap();
            if let Poll::Ready(result) = future.as_mut().poll(&mut context) {
                let batch = flying.0.pop_back().unwrap().1;
                flying.0.push_back((Box::pin(std::future::ready(result)), batch));
            }
        }
        let mut maybe: Vec<Message> = Vec::new();
        while !flying.0.is_empty() && !fs.sync_held() {
            match flying.done() {
                Some((Ok(_), batch)) => model.extend(batch),
                Some((Err(LogError::Poisoned { .. }), batch)) => maybe.extend(batch),
                Some((Err(other), _)) => panic!("{other}"),
                None => std::thread::yield_now(),
            }
        }
        if let Trouble::Crash { seed, .. } = round.trouble {
            fs.crash(seed);
        } else {
            let _ = log.close();
        }
        // All that were answered before the power went count, the others may be there.
        while !flying.0.is_empty() {
            match flying.done() {
                Some((Ok(_), batch)) => {
                    assert!(maybe.is_empty());
                    model.extend(batch);
                }
                Some((Err(_), batch)) => maybe.extend(batch),
                None => std::thread::yield_now(),
            }
        }
        drop(log);
        if let Some(seed) = round.again {
            fs.crash(seed);
        }
        fs.heal();
        let (log, report) = reopen(&fs, round.in_recovery);
        assert_eq!(report.damaged, []);
        let found = contents(&log);
        assert!(found.len() >= model.len(), "{} of {} acknowledged", found.len(), model.len());
        let kept = found.len() - model.len();
        assert_eq!(found[..model.len()], model);
        assert!(kept <= maybe.len());
        assert_eq!(found[model.len()..], maybe[..kept]);
        // What has once been read stays, also without any further write.
        model = found;
        assert_eq!(log.verify().unwrap(), []);
        drop(log);
        in_recovery = round.in_recovery.map(|(pass, seed)| (pass, !seed));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn acknowledged_records_survive_and_others_are_a_prefix(
        rounds in prop::collection::vec(round(), 1..5)
    ) {
        run(rounds);
    }
}

/// Layout as documented in `segment.rs`: what the damaged bytes belong to.
fn frame_bytes(message: &Message) -> usize {
    let headers: usize = message.headers.iter().map(|(n, v)| 8 + n.len() + v.len()).sum();
    44 + 8 + message.subject.len() + headers + message.payload.len()
}

/// Byte ranges of all frames by position - 1: (segment, from, to).
fn layout(paths: &[PathBuf], messages: &[Message]) -> Vec<(PathBuf, usize, usize)> {
    let first = |path: &PathBuf| path.file_stem().unwrap().to_str().unwrap().parse::<usize>();
    let mut frames = Vec::new();
    let segments: Vec<&PathBuf> = paths.iter().filter(|path| first(path).is_ok()).collect();
    for (n, path) in segments.iter().enumerate() {
        let next = segments.get(n + 1).map_or(messages.len() + 1, |next| first(next).unwrap());
        let mut at = 40;
        for message in &messages[first(path).unwrap() - 1..next - 1] {
            frames.push(((*path).clone(), at, at + frame_bytes(message)));
            at += frame_bytes(message);
        }
    }
    frames
}

#[derive(Debug, Clone)]
enum Decay {
    Flip(u8),
    Zeros,
    Noise(u64),
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn damage_anywhere_never_gives_a_wrong_record_and_spares_all_others(
        batches in batches(1..16),
        file in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        len in prop_oneof![3 => 1..8_usize, 2 => 1..700_usize, 1 => 1..5000_usize],
        decay in prop_oneof![
            (1..=255_u8).prop_map(Decay::Flip),
            Just(Decay::Zeros),
            any::<u64>().prop_map(Decay::Noise),
        ],
        after in batches(1..3),
    ) {
        let fs = FaultFs::new();
        let (log, _) = open(&fs).unwrap();
        let mut messages: Vec<Message> = Vec::new();
        for batch in batches {
            block_on(log.append(batch.clone())).unwrap();
            messages.extend(batch);
        }
        log.close().unwrap();
        drop(log);

        let paths: Vec<PathBuf> =
            fs.paths().into_iter().filter(|path| !path.ends_with("identity")).collect();
        let frames = layout(&paths, &messages);
        let path = file.get(&paths);
        let good = fs.bytes(path).unwrap();
        let from = at.index(good.len());
        let to = good.len().min(from + len);
        let mut bad = good.clone();
        for (n, byte) in bad[from..to].iter_mut().enumerate() {
            match decay {
                Decay::Flip(mask) => *byte ^= mask,
                Decay::Zeros => *byte = 0,
                Decay::Noise(seed) => {
                    *byte = (seed.wrapping_mul(n as u64 * 2 + 0x9e37_79b9) >> 29) as u8;
                }
            }
        }
        fs.put(path, bad.clone());
        let spared = |position: u64| {
            let (segment, start, end) = &frames[position as usize - 1];
            segment != path || bad[*start..*end] == good[*start..*end]
        };

        let (log, report) = open(&fs).unwrap();
        let check = |log: &EmbeddedLog| -> Result<u64, TestCaseError> {
            let mut lost = 0;
            for (position, message) in (1_u64..).zip(&messages) {
                match block_on(log.read(position, 1)) {
                    Ok(records) => match records.first() {
                        Some(record) => {
                            prop_assert_eq!(record.position, position);
                            prop_assert_eq!(&record.message, message);
                        }
                        None => {
                            lost += 1;
                            prop_assert!(position > log.head() && !spared(position));
                        }
                    },
                    Err(LogError::Damaged { from, resume, .. }) => {
                        lost += 1;
                        prop_assert!(from <= position && position < resume);
                        prop_assert!(!spared(position), "{position} is whole");
                    }
                    Err(other) => return Err(TestCaseError::fail(other.to_string())),
                }
            }
            Ok(lost)
        };
        let lost = check(&log)?;
        let verified = log.verify().unwrap();
        let named: u64 = verified.iter().map(|Damage { from, resume, .. }| resume - from).sum();
        let cut = messages.len() as u64 - log.head();
        prop_assert_eq!(named + cut, lost);
        let reported = !verified.is_empty() || !report.damaged.is_empty() || report.cut_bytes > 0;
        // Zeros in the index of the last segment look like a seal cut short, and mean no more.
        let in_vain = matches!(decay, Decay::Zeros) && cut == 0 && lost == 0;
        prop_assert!(reported || in_vain || bad == good);

        // The log goes on behind the damage, and stays readable where it was.
        if cut == 0 {
            let mut expected = log.head();
            for batch in after {
                let appended = block_on(log.append(batch.clone())).unwrap();
                prop_assert_eq!(appended.first, expected + 1);
                expected = appended.last;
            }
            log.close().unwrap();
            drop(log);
            let (log, _) = open(&fs).unwrap();
            prop_assert_eq!(log.head(), expected);
            prop_assert_eq!(check(&log)?, lost);
        }
    }

    #[test]
    fn any_file_cut_at_any_byte_opens_or_is_refused_and_never_gives_a_wrong_record(
        batches in batches(1..16),
        file in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
    ) {
        let fs = FaultFs::new();
        let (log, _) = open(&fs).unwrap();
        let mut messages: Vec<Message> = Vec::new();
        for batch in batches {
            block_on(log.append(batch.clone())).unwrap();
            messages.extend(batch);
        }
        drop(log);
        let paths = fs.paths();
        let frames = layout(&paths, &messages);
        let path = file.get(&paths);
        let mut bytes = fs.bytes(path).unwrap();
        let len = at.index(bytes.len());
        bytes.truncate(len);
        fs.put(path, bytes);
        let log = match open(&fs) {
            Ok((log, _)) => log,
            Err(error) => {
                prop_assert!(path.ends_with("identity"), "{error}");
                return Ok(());
            }
        };
        for (position, message) in (1_u64..).zip(&messages) {
            let (segment, _, end) = &frames[position as usize - 1];
            let kept = segment != path || *end <= len;
            match block_on(log.read(position, 1)) {
                Ok(records) if !records.is_empty() => {
                    prop_assert!(kept);
                    prop_assert_eq!(&records[0].message, message);
                }
                Ok(_) => prop_assert!(!kept && position > log.head()),
                Err(LogError::Damaged { .. }) => prop_assert!(!kept),
                Err(other) => return Err(TestCaseError::fail(other.to_string())),
            }
        }
    }
}

/// A copy of the files as they are, as after a killed process: not closed.
fn killed(fs: &FaultFs) -> FaultFs {
    let copy = FaultFs::new();
    for path in fs.paths() {
        copy.put(&path, fs.bytes(&path).unwrap());
    }
    copy
}

fn text(subject: &str, payload: &str) -> Message {
    Message::new(subject, payload.to_owned())
}

fn segment(first: u64) -> PathBuf {
    Path::new(DIR).join(format!("{first:020}.log"))
}

/// A log with three groups: `first`, then `second` and `third` in one write.
fn three_in_two_groups() -> FaultFs {
    let fs = FaultFs::new();
    let (log, _) = open(&fs).unwrap();
    block_on(log.append(vec![text("usage.3.a", "first")])).unwrap();
    let big = "second ".repeat(200);
    block_on(log.append(vec![text("usage.3.a", &big), text("usage.3.a", "third")])).unwrap();
    killed(&fs)
}

#[test]
fn a_torn_tail_is_cut_and_zeros_after_it_too() {
    for extra in [vec![0; 700], b"\xf5mr\xc1 a frame that never got further".to_vec()] {
        let fs = three_in_two_groups();
        let mut bytes = fs.bytes(&segment(1)).unwrap();
        let whole = bytes.len();
        bytes.extend_from_slice(&extra);
        fs.put(&segment(1), bytes);
        let (log, report) = open(&fs).unwrap();
        assert_eq!((report.records, report.cut_bytes), (3, extra.len() as u64));
        assert_eq!(report.damaged, []);
        assert_eq!(log.records_bytes(), whole as u64);
        assert_eq!(fs.bytes(&segment(1)).unwrap().len(), whole);
    }
}

#[test]
fn an_empty_sector_in_the_last_group_is_a_torn_write_and_the_group_goes() {
    let fs = three_in_two_groups();
    let mut bytes = fs.bytes(&segment(1)).unwrap();
    bytes[512..1024].fill(0);
    fs.put(&segment(1), bytes);
    let (log, report) = open(&fs).unwrap();
    assert_eq!((report.records, report.damaged.len()), (1, 0));
    assert!(report.cut_bytes > 1400);
    assert_eq!(contents(&log).len(), 1);
}

#[test]
fn other_damage_in_the_last_group_is_kept_since_it_may_have_been_acknowledged() {
    let fs = three_in_two_groups();
    let mut bytes = fs.bytes(&segment(1)).unwrap();
    bytes[600] ^= 1;
    fs.put(&segment(1), bytes);
    let (log, report) = open(&fs).unwrap();
    assert_eq!((report.records, report.cut_bytes), (3, 0));
    assert_eq!((report.damaged[0].from, report.damaged[0].resume), (2, 3));
    assert_eq!(block_on(log.read(3, 1)).unwrap()[0].message, text("usage.3.a", "third"));
}

#[test]
fn an_empty_sector_in_an_acknowledged_group_is_damage_and_nothing_is_cut() {
    let fs = three_in_two_groups();
    let (log, _) = open(&fs).unwrap();
    block_on(log.append(vec![text("usage.3.a", "fourth")])).unwrap();
    let fs = killed(&fs);
    let mut bytes = fs.bytes(&segment(1)).unwrap();
    bytes[512..1024].fill(0);
    fs.put(&segment(1), bytes);
    let (log, report) = open(&fs).unwrap();
    assert_eq!((report.records, report.cut_bytes), (4, 0));
    assert_eq!((report.damaged[0].from, report.damaged[0].resume), (2, 3));
    let error = block_on(log.read(2, 1)).unwrap_err().to_string();
    assert!(error.contains("00000000000000000001.log:"), "{error}");
    assert!(error.contains("records 2 to 2"), "{error}");
    assert_eq!(block_on(log.read(3, 5000)).unwrap().len(), 2);
    // An answer that begins before the damage ends there.
    assert_eq!(block_on(log.read(1, 5000)).unwrap().len(), 1);
}

#[test]
fn a_failed_sync_is_not_believed_on_the_next_open() {
    let fs = FaultFs::new();
    let (log, _) = open(&fs).unwrap();
    block_on(log.append(vec![text("usage.3.a", "first")])).unwrap();
    fs.fail_sync(1);
    let error = block_on(log.append(vec![text("usage.3.a", "second")])).unwrap_err();
    assert!(matches!(error, LogError::Poisoned { .. }), "{error}");
    let later = block_on(log.append(vec![text("usage.3.a", "third")])).unwrap_err();
    assert_eq!(later.to_string(), error.to_string());
    assert_eq!(contents(&log).len(), 1);
    assert!(log.close().is_err());
    drop(log);
    // The page cache shows the second record, the disk does not have it. Whoever believes it must
    // have brought it to the disk.
    let (log, report) = open(&fs).unwrap();
    assert_eq!((report.records, log.head()), (2, 2));
    drop(log);
    fs.crash(0);
    let (log, _) = open(&fs).unwrap();
    assert_eq!(contents(&log).len(), 2);
}

#[test]
fn a_segment_whose_creation_was_cut_short_is_removed() {
    let fs = FaultFs::new();
    let (log, _) = open(&fs).unwrap();
    block_on(log.append(vec![text("usage.3.a", "first")])).unwrap();
    drop(log);
    fs.put(&segment(2), vec![0; 40]);
    let (log, report) = open(&fs).unwrap();
    assert_eq!((report.records, report.cut_bytes, report.segments), (1, 40, 1));
    assert_eq!(block_on(log.append(vec![text("usage.3.a", "second")])).unwrap().first, 2);
    assert_eq!(contents(&log).len(), 2);
}

/// A log of some segments, closed.
fn long() -> (FaultFs, Vec<u64>) {
    let fs = FaultFs::new();
    let (log, _) = open(&fs).unwrap();
    for n in 0..30 {
        let payload = format!("{n:0600}");
        block_on(log.append(vec![text("usage.3.a", &payload)])).unwrap();
    }
    drop(log);
    let firsts = fs.paths().iter().filter_map(|p| p.file_stem()?.to_str()?.parse().ok()).collect();
    (fs, firsts)
}

#[test]
fn a_missing_segment_is_reported_and_all_others_are_read() {
    let (fs, firsts) = long();
    assert!(firsts.len() >= 5, "{firsts:?}");
    for (n, missing) in firsts.iter().enumerate().take(firsts.len() - 1) {
        let fs = killed(&fs);
        fs.remove(&segment(*missing)).unwrap();
        let next = firsts[n + 1];
        let (log, report) = open(&fs).unwrap();
        let place = format!("{missing:020}.log (file missing)");
        assert_eq!(report.damaged, [Damage { place, from: *missing, resume: next }]);
        assert_eq!(log.verify().unwrap(), report.damaged);
        for position in 1..=30 {
            let read = block_on(log.read(position, 1));
            if (*missing..next).contains(&position) {
                let error = read.unwrap_err();
                assert!(
                    matches!(&error, LogError::Damaged { from, resume, .. }
                        if (*from, *resume) == (*missing, next)),
                    "{error}"
                );
            } else {
                assert_eq!(read.unwrap()[0].position, position);
            }
        }
    }
}

#[test]
fn a_directory_that_is_not_this_log_is_refused_with_the_reason() {
    let refused = |change: &dyn Fn(&FaultFs, &[u64])| {
        let (fs, firsts) = long();
        change(&fs, &firsts);
        open(&fs).map(|_| ()).unwrap_err().to_string()
    };
    let identity = Path::new(DIR).join("identity");
    let error = refused(&|fs, _| fs.remove(&identity).unwrap());
    assert!(error.contains("identity file is missing"), "{error}");
    let error = refused(&|fs, _| fs.put(&identity, b"meterr log, format 1\n".to_vec()));
    assert!(error.contains("identity file is damaged"), "{error}");
    let error = refused(&|fs, firsts| {
        firsts.iter().for_each(|first| fs.remove(&segment(*first)).unwrap());
    });
    assert!(error.contains("all segment files are missing"), "{error}");
    let error = refused(&|fs, firsts| {
        fs.put(&segment(firsts[1]), long().0.bytes(&segment(firsts[1])).unwrap());
    });
    assert!(error.contains("belongs to another log"), "{error}");
    let error = refused(&|fs, firsts| {
        fs.rename(&segment(firsts[1]), &segment(firsts[1] + 1)).unwrap();
    });
    assert!(error.contains("was it renamed"), "{error}");
    let (fs, _) = long();
    let other = EmbeddedLog::open(Path::new(DIR), "OUT_3", options(), Arc::new(fs), clock());
    let error = other.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("holds stream \"USAGE_3\", not \"OUT_3\""), "{error}");
}

#[test]
fn the_header_of_a_new_segment_whose_sync_failed_is_written_again() {
    let fs = FaultFs::new();
    let (log, _) = open(&fs).unwrap();
    let large = text("usage.3.a", &"x".repeat(4000));
    block_on(log.append(vec![large.clone()])).unwrap();
    // The first sync seals the old segment, the second one is the new segment's.
    fs.fail_sync(2);
    block_on(log.append(vec![large.clone()])).unwrap_err();
    drop(log);
    let (log, _) = open(&fs).unwrap();
    assert_eq!(block_on(log.append(vec![large])).unwrap().first, 2);
    drop(log);
    fs.crash(0);
    let (log, report) = open(&fs).unwrap();
    assert_eq!((report.damaged, report.records), (vec![], 2));
    assert_eq!(contents(&log).len(), 2);
}
