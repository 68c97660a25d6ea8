//! Live messages: what subscribers on NATS hear of each commit, and what they get when they ask.
//!
//! The form is [`LiveMessage`](meterr_connectors::changes::LiveMessage). Rows are arrays as in the
//! output log: the rows of a commit are copied from its parts as they stand, not written anew.

use std::collections::HashMap;

use bytes::Bytes;
use meterr_connectors::changes::{LiveKind, OrgChanges, Row};
use meterr_operators::ids::{Positions, ShardId};
use serde::ser::{Serialize, SerializeSeq, Serializer};

use crate::wire::{PART_LEN_MAX, Parts};

/// Epoch of the last commit that changed each org of a shard, by the org's number.
///
/// It lets a subscriber see that it missed something: every change names the epoch before it. Kept in
/// checkpoints, since nothing else in the state knows epochs.
#[derive(Debug, Default)]
pub struct Epochs {
    last: HashMap<u32, u64>,
    /// Changed since the last checkpoint.
    changed: HashMap<u32, u64>,
}

impl Epochs {
    /// Takes in that a commit changed an org; returns the epoch of the one before, 0 for none.
    pub fn raise(&mut self, org: u32, epoch: u64) -> u64 {
        let previous = self.last.insert(org, epoch).unwrap_or(0);
        self.changed.insert(org, epoch);
        previous
    }

    /// Epoch of the last commit that changed an org, if it is known: checkpoints of the first format
    /// did not keep it.
    pub fn of(&self, org: u32) -> Option<u64> {
        self.last.get(&org).copied()
    }

    /// What a checkpoint keeps: all of it, or what changed since the last one. By number, so that the
    /// same state gives the same bytes.
    pub fn take(&mut self, base: bool) -> Vec<(u32, u64)> {
        let changed = std::mem::take(&mut self.changed);
        let mut taken: Vec<_> = if base {
            self.last.iter().map(|(o, e)| (*o, *e)).collect()
        } else {
            changed.into_iter().collect()
        };
        taken.sort_unstable();
        taken
    }

    /// Takes in what checkpoints kept, older ones first.
    pub fn restore(&mut self, kept: impl IntoIterator<Item = (u32, u64)>) {
        self.last.extend(kept);
    }
}

/// The live messages of a commit, by org.
pub fn changes(
    shard: ShardId,
    epoch: u64,
    as_of: &Positions,
    parts: &Parts,
    mut org_of: impl FnMut(u32) -> (String, u64),
) -> Vec<(String, Bytes)> {
    let mut messages = Vec::with_capacity(parts.orgs.len());
    for pieces in parts.orgs.chunk_by(|a, b| a.org == b.org) {
        let (org, previous) = org_of(pieces[0].org);
        for (n, piece) in pieces.iter().enumerate() {
            let head = Head {
                kind: LiveKind::Change,
                shard,
                epoch,
                previous: Some(previous),
                as_of,
                org: &org,
                piece: n,
                pieces: pieces.len(),
            };
            let views = &parts.parts[piece.part][piece.views.clone()];
            messages.push((org.clone(), head.with(views)));
        }
    }
    messages
}

/// The messages that carry rows of an org: as many as they need.
pub fn rows(
    kind: LiveKind,
    shard: ShardId,
    epoch: u64,
    previous: Option<u64>,
    as_of: &Positions,
    changes: &OrgChanges,
) -> Vec<Bytes> {
    let mut pieces: Vec<Vec<u8>> = Vec::new();
    let mut open = vec![b'{'];
    for (view, rows) in &changes.views {
        let name = serde_json::to_vec(view).expect("a text is always JSON");
        let begin = |open: &mut Vec<u8>| {
            if open.len() > 1 {
                open.push(b',');
            }
            open.extend_from_slice(&name);
            open.extend_from_slice(b":[");
        };
        begin(&mut open);
        for (n, row) in rows.iter().enumerate() {
            let row = serde_json::to_vec(&AsArray(row)).expect("texts and numbers are always JSON");
            if open.len() + row.len() > PART_LEN_MAX {
                open.extend_from_slice(b"]}");
                pieces.push(std::mem::replace(&mut open, vec![b'{']));
                begin(&mut open);
            } else if n > 0 {
                open.push(b',');
            }
            open.extend_from_slice(&row);
        }
        open.push(b']');
    }
    open.push(b'}');
    pieces.push(open);
    let count = pieces.len();
    let message = |(n, views): (usize, Vec<u8>)| {
        let head = Head {
            kind,
            shard,
            epoch,
            previous,
            as_of,
            org: &changes.org,
            piece: n,
            pieces: count,
        };
        head.with(&views)
    };
    pieces.into_iter().enumerate().map(message).collect()
}

/// The message that says that nothing was missed.
pub fn current(shard: ShardId, epoch: u64, as_of: &Positions, org: &str) -> Bytes {
    let (kind, previous) = (LiveKind::Current, None);
    Head { kind, shard, epoch, previous, as_of, org, piece: 0, pieces: 1 }.with(b"{}")
}

/// Marks the messages of an answer, all but the last: more follow.
pub fn answer(mut messages: Vec<Bytes>) -> Vec<Bytes> {
    let last = messages.len().saturating_sub(1);
    for message in &mut messages[..last] {
        let mut body = message.strip_suffix(b"}").unwrap_or(message).to_vec();
        body.extend_from_slice(b",\"more\":true}");
        *message = body.into();
    }
    messages
}

struct Head<'a> {
    kind: LiveKind,
    shard: ShardId,
    epoch: u64,
    previous: Option<u64>,
    as_of: &'a Positions,
    org: &'a str,
    piece: usize,
    pieces: usize,
}

impl Head<'_> {
    fn with(&self, views: &[u8]) -> Bytes {
        use std::io::Write;
        let kind = match self.kind {
            LiveKind::Snapshot => "snapshot",
            LiveKind::Change => "change",
            LiveKind::Current => "current",
        };
        let (shard, epoch, as_of, org) = (self.shard, self.epoch, self.as_of, self.org);
        let mut body = Vec::with_capacity(views.len() + 256);
        let mut write = |text: std::fmt::Arguments<'_>| {
            body.write_fmt(text).expect("writing to memory cannot fail");
        };
        write(format_args!("{{\"kind\":\"{kind}\",\"shard\":{shard},\"epoch\":{epoch}"));
        if let Some(previous) = self.previous {
            write(format_args!(",\"previous\":{previous}"));
        }
        // Orgs are [A-Za-z0-9_-] and positions digits, so neither needs an escape.
        write(format_args!(",\"as_of\":\"{as_of}\",\"org\":\"{org}\""));
        write(format_args!(",\"piece\":{},\"pieces\":{}", self.piece, self.pieces));
        body.extend_from_slice(b",\"views\":");
        body.extend_from_slice(views);
        body.push(b'}');
        body.into()
    }
}

/// A row as the output log has it.
pub(crate) struct AsArray<'a>(pub &'a Row);

impl Serialize for AsArray<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Row { window_start, key, figures } = self.0;
        let (meters, costs) = (figures.meters(), figures.costs);
        let used = meters.iter().rposition(|n| *n != 0).map_or(0, |at| at + 1);
        let other = [costs.compute, costs.storage, costs.bandwidth];
        let mut row = serializer.serialize_seq(None)?;
        row.serialize_element(window_start)?;
        row.serialize_element(key)?;
        row.serialize_element(&figures.events)?;
        row.serialize_element(&figures.cost)?;
        row.serialize_element(&figures.unpriced_events)?;
        row.serialize_element(&meters[..used])?;
        if other != [meterr_operators::money::Atto::ZERO; 3] {
            row.serialize_element(&other)?;
        }
        row.end()
    }
}

#[cfg(test)]
mod tests {
    use meterr_connectors::changes::{LiveMessage, figures_of};
    use meterr_operators::event::METERS;
    use meterr_operators::money::Atto;
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn row()(
            key in proptest::option::of("[a-z\"\\\\é]{0,9}"),
            start in proptest::option::of("[0-9]{4}"),
            events in -2_i64..9,
            meters in proptest::array::uniform10(0_i64..5),
            cost in proptest::option::of(0_i128..9),
            costs in proptest::array::uniform3(0_i128..2),
            unpriced in 0_i64..3,
        ) -> Row {
            let meters: [i64; METERS] = meters;
            let costs = costs.map(Atto::new);
            let figures = figures_of(events, &meters, cost.map(Atto::new), costs, unpriced);
            Row { window_start: start, key, figures }
        }
    }

    proptest! {
        #[test]
        fn rows_read_as_they_were_written(rows_of in proptest::collection::vec(row(), 0..9)) {
            let changes = OrgChanges {
                org: "acme".to_owned(),
                views: [("user_day".to_owned(), rows_of.clone())].into(),
            };
            let as_of: Positions = "3:118,c:19".parse().unwrap();
            let shard = ShardId(3);
            let bodies = rows(LiveKind::Change, shard, 17, Some(12), &as_of, &changes);
            prop_assert_eq!(bodies.len(), 1);
            let read: LiveMessage = serde_json::from_slice(&bodies[0]).unwrap();
            prop_assert_eq!((read.kind, read.epoch, read.previous), (LiveKind::Change, 17, Some(12)));
            prop_assert_eq!((read.piece, read.pieces, read.more), (0, 1, false));
            prop_assert_eq!(&read.views["user_day"], &rows_of);
            let both = answer(vec![bodies[0].clone(), bodies[0].clone()]);
            prop_assert_eq!(&both[1], &bodies[0]);
            let more: LiveMessage = serde_json::from_slice(&both[0]).unwrap();
            prop_assert_eq!(more, LiveMessage { more: true, ..read });
        }
    }

    #[test]
    fn what_is_too_long_for_a_message_comes_in_pieces() {
        let figures = figures_of(1, &[1; METERS], Some(Atto::usd(1)), [Atto::ZERO; 3], 0);
        let row = |n| Row { window_start: None, key: Some(format!("{n:0>90}")), figures };
        let all: Vec<Row> = (0..20_000).map(row).collect();
        let views = [("a".to_owned(), all.clone()), ("b".to_owned(), vec![row(0)])].into();
        let changes = OrgChanges { org: "acme".to_owned(), views };
        let as_of = Positions::default();
        let bodies = answer(rows(LiveKind::Snapshot, ShardId(0), 1, None, &as_of, &changes));
        assert!(bodies.len() > 2);
        let mut read = Vec::new();
        for (n, body) in bodies.iter().enumerate() {
            assert!(body.len() < 1_000_000);
            let message: LiveMessage = serde_json::from_slice(body).unwrap();
            assert_eq!((message.piece as usize, message.pieces as usize), (n, bodies.len()));
            assert_eq!(message.more, n + 1 < bodies.len());
            read.extend(message.views.into_iter().filter(|(v, _)| v == "a").flat_map(|(_, r)| r));
        }
        assert_eq!(read, all);
    }

    #[test]
    fn epochs_are_kept_in_bases_and_deltas() {
        let mut epochs = Epochs::default();
        assert_eq!(epochs.raise(7, 1), 0);
        assert_eq!(epochs.raise(3, 2), 0);
        let base = epochs.take(true);
        assert_eq!(base, [(3, 2), (7, 1)]);
        assert_eq!(epochs.raise(7, 5), 1);
        let delta = epochs.take(false);
        assert_eq!(delta, [(7, 5)]);
        let mut restored = Epochs::default();
        restored.restore(base.into_iter().chain(delta));
        assert_eq!((restored.of(3), restored.of(7), restored.of(8)), (Some(2), Some(5), None));
    }
}
