//! Records of every format there has been are read, those of one there will be are refused with a
//! sentence that says so, and members that a later version adds are passed over where they may be.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use meterr_connectors::changes::{LIVE_FORMAT, LiveKind, LiveMessage};
use meterr_connectors::log::Message;
use meterr_connectors::memory::MemoryLog;
use meterr_engine::live::StopReason;
use meterr_engine::records::{commits_behind, control_changes, each_commit};
use meterr_engine::wire::{COMMIT_FORMAT, Commit, PART_FORMAT, Part};
use meterr_operators::control::{CONTROL_FORMAT, ControlChange};
use meterr_operators::rng::Rng;
use meterr_operators::time::Time;
use serde_json::{Value, json};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/format-1").join(name)
}

fn read(name: &str) -> Vec<u8> {
    std::fs::read(golden(name)).unwrap().trim_ascii_end().to_vec()
}

/// Names of the golden records in a folder.
fn names(folder: &str) -> Vec<String> {
    let files = std::fs::read_dir(golden(folder)).unwrap();
    let name = |file: std::fs::DirEntry| file.file_name().into_string().unwrap();
    let mut names: Vec<String> =
        files.map(|file| format!("{folder}/{}", name(file.unwrap()))).collect();
    names.sort();
    assert!(!names.is_empty(), "{folder}");
    names
}

/// Reads a record of whichever kind its name says; what is wrong with it otherwise.
fn taken(name: &str, record: &[u8]) -> Result<String, String> {
    Ok(match name.split_once('/').unwrap() {
        ("control", _) => format!("{:?}", ControlChange::parse(record)?),
        ("live", _) => format!("{:?}", LiveMessage::read(record)?),
        ("out", file) if file.starts_with("commit") => format!("{:?}", Commit::read(record)?),
        ("out", _) => format!("{:?}", Part::read(record)?),
        _ => panic!("{name}"),
    })
}

fn all() -> Vec<String> {
    ["control", "live", "out"].into_iter().flat_map(names).collect()
}

#[test]
fn records_of_the_first_format_are_read() {
    for name in all() {
        taken(&name, &read(&name)).unwrap_or_else(|why| panic!("{name}: {why}"));
    }
    // They have not been rewritten since.
    let mut hasher = blake3::Hasher::new();
    for name in all() {
        hasher.update(name.as_bytes());
        hasher.update(&read(&name));
    }
    assert_eq!(hasher.finalize().to_hex().as_str(), GOLDEN_HASH, "these files never change");

    let commit = Commit::read(&read("out/commit.json")).unwrap();
    let expected = Commit {
        epoch: 1,
        usage_position: 4,
        control_position: 5,
        log_time: Time::parse("2026-01-02T03:05:00Z").unwrap(),
        token: 1,
        attempt: 1,
        parts: 2,
        hash: "ccb442af00762993484ccb01ce47fc8b5b6b6c3240975a304519f6b711d69cd4".to_owned(),
        seal: false,
    };
    assert_eq!(commit, expected);
    assert!(Commit::read(&read("out/commit_sealing.json")).unwrap().seal);
    let change = LiveMessage::read(&read("live/change.json")).unwrap();
    assert_eq!((change.kind, change.org.as_str()), (LiveKind::Change, "acme"));
}

/// Of the golden files' names and contents.
const GOLDEN_HASH: &str = "21f2ac5ecd2537ebcbf7bdaaa679fd3f00db68cc92e28134f998ba30d77f9790";

/// An output log of the first format: parts, their commit record, and one that seals.
fn output() -> MemoryLog {
    let out = MemoryLog::new("OUT_15");
    append(&out, "out.15.part", read("out/part.json"));
    append(&out, "out.15.part", read("out/part_dead_letters.json"));
    append(&out, "out.15.commit", read("out/commit.json"));
    append(&out, "out.15.commit", read("out/commit_sealing.json"));
    out
}

fn append(log: &MemoryLog, subject: &str, payload: Vec<u8>) {
    let time = Time::parse("2026-01-02T03:05:00Z").unwrap();
    log.append_at(vec![Message::new(subject, payload)], time).unwrap();
}

#[test]
fn logs_of_the_first_format_are_read() {
    let mut found = Vec::new();
    each_commit(&output(), 0, |position, commit, parts| {
        // Against the hash in the commit record, too.
        found.push((position, commit.epoch, commit.seal, parts.len()));
        Ok(())
    })
    .unwrap();
    assert_eq!(found, [(3, 1, false, 2), (4, 2, true, 0)]);

    let control = MemoryLog::new("CONTROL");
    for name in names("control") {
        append(&control, "control", read(&name));
    }
    let changes = control_changes(&control, 1, None).unwrap();
    assert_eq!(changes.len(), names("control").len());
}

#[test]
fn logs_that_go_on_in_a_newer_format_are_refused() {
    let refused = "written by a newer meterr (format 2, this binary reads up to 1)";
    let out = output();
    append(&out, "out.15.commit", br#"{"epoch":3,"format":2,"all":"else is new"}"#.to_vec());
    let Err(StopReason::Format(why)) = commits_behind(&out, 0) else { panic!("it was read") };
    assert_eq!(why, format!("commit record at 5 cannot be read: {refused}"));

    let control = MemoryLog::new("CONTROL");
    append(&control, "control", read("control/horizon.json"));
    append(&control, "control", br#"{"type":"horizon","hours":840,"format":2}"#.to_vec());
    let Err(StopReason::Format(why)) = control_changes(&control, 1, None) else {
        panic!("it was read")
    };
    assert_eq!(why, format!("control record at 2: {refused}"));
    // What stands before it can be.
    assert_eq!(control_changes(&control, 1, Some(1)).unwrap().len(), 1);
}

/// Some JSON.
fn anything(rng: &mut Rng, depth: u32) -> Value {
    match rng.below(if depth == 0 { 5 } else { 7 }) {
        0 => Value::Null,
        1 => rng.percent(50).into(),
        2 => rng.bits().into(),
        3 => json!(-1.5),
        4 => format!("text {}", rng.below(100)).into(),
        5 => (0..rng.below(4)).map(|_| anything(rng, depth - 1)).collect::<Vec<_>>().into(),
        _ => {
            let members = (0..rng.below(4)).map(|n| (format!("m{n}"), anything(rng, depth - 1)));
            Value::Object(members.collect())
        }
    }
}

/// The record with members at random places.
fn with(rng: &mut Rng, record: &[u8], mut more: Vec<(String, Value)>) -> Vec<u8> {
    let Value::Object(members) = serde_json::from_slice(record).unwrap() else { panic!() };
    let mut members: Vec<(String, Value)> = members.into_iter().collect();
    while let Some(member) = more.pop() {
        let at = rng.below(members.len() as u64 + 1) as usize;
        members.insert(at, member);
    }
    let member = |(name, value): (String, Value)| format!("{}:{value}", Value::from(name));
    let members: Vec<String> = members.into_iter().map(member).collect();
    format!("{{{}}}", members.join(",")).into_bytes()
}

#[test]
fn members_of_a_later_version_are_passed_over_where_they_may_be() {
    for seed in 0..200 {
        let mut rng = Rng::stream(seed, 0);
        for name in all() {
            let record = read(&name);
            let mut more = vec![("added".to_owned(), anything(&mut rng, 3))];
            if rng.percent(50) {
                more.push(("format".to_owned(), 1.into()));
            }
            let changed = with(&mut rng, &record, more);
            let read = taken(&name, &changed);
            if name.starts_with("control/") {
                // Nothing that decides a figure may be passed over.
                let why = read.unwrap_err();
                assert!(why.contains("unknown field `added`"), "seed {seed} {name}: {why}");
            } else {
                assert_eq!(read, taken(&name, &record), "seed {seed} {name}");
            }
            let named = with(&mut rng, &record, vec![("format".to_owned(), 1.into())]);
            assert_eq!(taken(&name, &named), taken(&name, &record), "seed {seed} {name}");
        }
    }
}

#[test]
fn a_newer_format_is_refused_whatever_else_changed() {
    for seed in 0..200 {
        let mut rng = Rng::stream(seed, 1);
        for name in all() {
            let known = match name.split_once('/').unwrap() {
                ("control", _) => CONTROL_FORMAT,
                ("live", _) => LIVE_FORMAT,
                ("out", file) if file.starts_with("commit") => COMMIT_FORMAT,
                _ => PART_FORMAT,
            };
            // Some members as they were, some gone, some other, some new.
            let Value::Object(members) = serde_json::from_slice(&read(&name)).unwrap() else {
                panic!("{name}")
            };
            let mut kept = serde_json::Map::new();
            for (member, value) in members {
                match rng.below(3) {
                    0 => drop(kept.insert(member, value)),
                    1 => drop(kept.insert(member, anything(&mut rng, 2))),
                    _ => {}
                }
            }
            let format = u64::from(known) + 1 + rng.below(3);
            let record = serde_json::to_vec(&kept).unwrap();
            let record = with(&mut rng, &record, vec![("format".to_owned(), format.into())]);
            let expected = format!(
                "written by a newer meterr (format {format}, this binary reads up to {known})"
            );
            assert_eq!(taken(&name, &record), Err(expected), "seed {seed} {name}");
        }
    }
}
