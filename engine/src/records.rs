//! Reading a shard's logs: committed epochs with their parts, control records, rows of an org.
//!
//! A part is believed only behind a commit record that names it by number and hash.

use futures::executor::block_on;
use meterr_connectors::changes::OrgChanges;
use meterr_connectors::log::{Log, Message, Record};
use meterr_operators::control::ControlChange;

use crate::live::StopReason;
use crate::wire::{Commit, parts_hash};

/// Bytes of a log read at once.
pub const READ_BYTES: usize = 1024 * 1024;

/// Hash of a message, as manifests keep it.
pub fn message_hash(message: &Message) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(message.subject.len() as u64).to_le_bytes());
    hasher.update(message.subject.as_bytes());
    hasher.update(&message.payload);
    *hasher.finalize().as_bytes()
}

/// Goes through the committed epochs behind an output position: position and commit record, and its
/// parts. Parts without a commit are passed over.
///
/// # Errors
/// When the log cannot be read, a record is not known, or parts are not those of their commit.
pub fn each_commit(
    out: &dyn Log,
    position: u64,
    mut each: impl FnMut(u64, Commit, &[Record]) -> Result<(), StopReason>,
) -> Result<(), StopReason> {
    let mut parts: Vec<Record> = Vec::new();
    let mut from = position + 1;
    loop {
        let records = block_on(out.read(from, READ_BYTES))?;
        let Some(last) = records.last() else { return Ok(()) };
        from = last.position + 1;
        for record in records {
            if !record.message.subject.ends_with(".commit") {
                parts.push(record);
                continue;
            }
            let commit = parse_commit(&record)?;
            let own = own_parts(&parts, &commit, record.position)?;
            each(record.position, commit, own)?;
            parts.clear();
        }
    }
}

/// The parts of a commit: those right before its record, if they are what it says.
///
/// # Errors
/// When they are not.
pub fn own_parts<'a>(
    before: &'a [Record],
    commit: &Commit,
    position: u64,
) -> Result<&'a [Record], StopReason> {
    let own = before.len().checked_sub(commit.parts as usize).map(|at| &before[at..]);
    own.filter(|own| parts_hash(own.iter().map(|r| &r.message.payload[..])) == commit.hash)
        .ok_or_else(|| {
            StopReason::Format(format!(
                "the parts of epoch {} are not those that its commit record at {position} names",
                commit.epoch
            ))
        })
}

/// Reads the commit records behind an output position.
///
/// # Errors
/// As [`each_commit`].
pub fn commits_behind(out: &dyn Log, position: u64) -> Result<Vec<(u64, Commit)>, StopReason> {
    let mut commits = Vec::new();
    each_commit(out, position, |position, commit, _| {
        commits.push((position, commit));
        Ok(())
    })?;
    Ok(commits)
}

/// Reads a commit record.
///
/// # Errors
/// When it is not one this version knows.
pub fn parse_commit(record: &Record) -> Result<Commit, StopReason> {
    Commit::read(&record.message.payload).map_err(|why| {
        StopReason::Format(format!("commit record at {} cannot be read: {why}", record.position))
    })
}

/// Reads the control records `from..=to` (all there are, without `to`).
///
/// # Errors
/// When the log cannot be read, or a record is not known.
pub fn control_changes(
    control: &dyn Log,
    mut from: u64,
    to: Option<u64>,
) -> Result<Vec<(u64, ControlChange)>, StopReason> {
    let mut changes = Vec::new();
    while to.is_none_or(|to| from <= to) {
        let records = block_on(control.read(from, READ_BYTES))?;
        let Some(last) = records.last() else { break };
        from = last.position + 1;
        for record in records {
            if to.is_some_and(|to| record.position > to) {
                break;
            }
            let change = ControlChange::parse(&record.message.payload).map_err(|why| {
                StopReason::Format(format!("control record at {}: {why}", record.position))
            })?;
            changes.push((record.position, change));
        }
    }
    Ok(changes)
}

/// The orgs a part has rows of.
pub fn orgs_of(part: &[u8]) -> Vec<String> {
    #[derive(serde::Deserialize)]
    struct Outer {
        #[serde(default)]
        orgs: Vec<Named>,
    }
    #[derive(serde::Deserialize)]
    struct Named {
        org: String,
    }
    let outer = serde_json::from_slice::<Outer>(part).ok();
    outer.map_or_else(Vec::new, |outer| outer.orgs.into_iter().map(|named| named.org).collect())
}

/// The changes of some orgs out of a part.
pub fn followed(part: &[u8], wanted: impl Fn(&str) -> bool) -> Vec<OrgChanges> {
    #[derive(serde::Deserialize)]
    struct Outer<'a> {
        #[serde(default, borrow)]
        orgs: Vec<Named<'a>>,
    }
    #[derive(serde::Deserialize)]
    struct Named<'a> {
        org: &'a str,
        #[serde(borrow)]
        views: &'a serde_json::value::RawValue,
    }
    let Ok(outer) = serde_json::from_slice::<Outer<'_>>(part) else { return Vec::new() };
    let orgs = outer.orgs.into_iter().filter(|named| wanted(named.org));
    orgs.filter_map(|named| {
        let views = serde_json::from_str(named.views.get()).ok()?;
        Some(OrgChanges { org: named.org.to_owned(), views })
    })
    .collect()
}
