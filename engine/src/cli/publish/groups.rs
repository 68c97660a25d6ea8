//! Lines brought together by shard, each group one message. Pure.

use meterr_operators::ids::ShardId;

/// Bytes of all open groups together: beyond them everything is closed, however small.
const OPEN_BYTES_MAX: usize = 16 * 1024 * 1024;

/// Lines of one shard, each with its line end.
#[derive(Debug, PartialEq, Eq)]
pub struct Group {
    pub shard: ShardId,
    pub body: Vec<u8>,
    pub lines: u64,
    /// Number in the file of its first line.
    pub first: u64,
}

/// The groups being filled.
pub struct Groups {
    lines_max: u64,
    bytes_max: usize,
    open: Vec<Group>,
    bytes: usize,
}

impl Groups {
    /// For so many shards. A group has at most `lines_max` lines and `bytes_max` bytes.
    pub fn new(shards: u16, lines_max: u64, bytes_max: usize) -> Groups {
        let open = (0..shards).map(|shard| Group::empty(ShardId(shard))).collect();
        Groups { lines_max, bytes_max, open, bytes: 0 }
    }

    /// Longest line taken, without its end.
    pub fn line_len_max(&self) -> usize {
        self.bytes_max.saturating_sub(1)
    }

    /// Takes a line of a shard, without its end, and gives the groups that are complete with it.
    /// The line must not be longer than [`Groups::line_len_max`].
    pub fn add(&mut self, shard: ShardId, number: u64, line: &[u8]) -> Vec<Group> {
        debug_assert!(line.len() <= self.line_len_max());
        let mut complete = Vec::new();
        if self.of(shard).body.len() + line.len() + 1 > self.bytes_max {
            complete.extend(self.close(shard));
        }
        let group = self.of(shard);
        if group.lines == 0 {
            group.first = number;
        }
        group.lines += 1;
        group.body.extend_from_slice(line);
        group.body.push(b'\n');
        let full = group.lines;
        self.bytes += line.len() + 1;
        if full >= self.lines_max {
            complete.extend(self.close(shard));
        }
        if self.bytes > OPEN_BYTES_MAX {
            complete.extend(self.close_all());
        }
        complete
    }

    /// All groups that are not empty.
    pub fn close_all(&mut self) -> Vec<Group> {
        let shards: Vec<ShardId> = self.open.iter().map(|group| group.shard).collect();
        shards.into_iter().filter_map(|shard| self.close(shard)).collect()
    }

    /// Whether there is none to close.
    pub fn empty(&self) -> bool {
        self.bytes == 0
    }

    /// Lines in open groups.
    pub fn lines(&self) -> u64 {
        self.open.iter().map(|group| group.lines).sum()
    }

    fn of(&mut self, shard: ShardId) -> &mut Group {
        &mut self.open[usize::from(shard.0)]
    }

    fn close(&mut self, shard: ShardId) -> Option<Group> {
        let group = std::mem::replace(self.of(shard), Group::empty(shard));
        self.bytes -= group.body.len();
        (group.lines > 0).then_some(group)
    }
}

impl Group {
    fn empty(shard: ShardId) -> Group {
        Group { shard, body: Vec::new(), lines: 0, first: 0 }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_line_is_in_one_group_of_its_shard_in_order_and_groups_are_bounded(
            lines in prop::collection::vec((0..4_u16, 0..40_usize), 0..300),
            lines_max in 1..20_u64,
            bytes_max in 41..200_usize,
        ) {
            let mut groups = Groups::new(4, lines_max, bytes_max);
            let mut complete = Vec::new();
            let mut expected: BTreeMap<u16, Vec<u8>> = BTreeMap::new();
            for (number, (shard, len)) in (1..).zip(&lines) {
                let line = format!("{number:0>len$}").into_bytes();
                let line = &line[..line.len().min(40)];
                complete.extend(groups.add(ShardId(*shard), number, line));
                let all = expected.entry(*shard).or_default();
                all.extend_from_slice(line);
                all.push(b'\n');
            }
            let open = groups.lines();
            let rest = groups.close_all();
            prop_assert_eq!(rest.iter().map(|group| group.lines).sum::<u64>(), open);
            prop_assert!(groups.empty());
            complete.extend(rest);
            let mut found: BTreeMap<u16, Vec<u8>> = BTreeMap::new();
            for group in &complete {
                prop_assert!((1..=lines_max).contains(&group.lines));
                prop_assert!(group.body.len() <= bytes_max);
                let ends = group.body.iter().filter(|byte| **byte == b'\n').count();
                prop_assert_eq!(ends as u64, group.lines);
                prop_assert_eq!(lines[group.first as usize - 1].0, group.shard.0);
                found.entry(group.shard.0).or_default().extend_from_slice(&group.body);
            }
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn many_bytes_in_many_shards_close_everything() {
        let mut groups = Groups::new(256, 1_000, 900_000);
        let line = vec![b'x'; 200_000];
        let closed: usize = (0..100).map(|n| groups.add(ShardId(n), 1, &line).len()).max().unwrap();
        assert_eq!(closed, OPEN_BYTES_MAX / 200_001 + 1);
    }
}
