//! At-least-once input becomes exactly-once: each (org, id) counts in its highest revision.
//!
//! Remembered of an id are a 128-bit fingerprint, the revision, a content hash and where in the log
//! its current version stands. Ids lie in buckets by *arrival* (hours of log time); a bucket is
//! forgotten one horizon after it ended.
//!
//! Why forgetting is exact: an event is refused as too late when its time − 1 h does not lie after
//! the end of the newest forgotten bucket. An id forgotten with that bucket had arrived before its
//! end, and no event is taken whose time lies more than 1 h after its arrival, so every later copy
//! of it is refused rather than counted again.
//!
//! Memory: entries of 32 bytes stand in arrival order in blocks that are never moved; hash tables of
//! 4-byte references find them. Forgetting raises a floor at once (that is the exact part) and gives
//! memory back a few entries per admission (that is only housekeeping), so a bucket that ends is no
//! pause. The reference tables are split in 64, so growing one is none either.

use std::collections::VecDeque;

use hashbrown::{HashMap, HashTable};

use crate::time::{HOUR, Time};

/// How far an event's time may lie ahead of log time, in microseconds: 1 h.
pub const AHEAD_MAX: i64 = HOUR;
/// Width of an arrival bucket, in microseconds: 1 h.
pub const BUCKET: i64 = HOUR;
/// Default horizon: 35 days.
pub const HORIZON_DEFAULT: i64 = 35 * 24 * HOUR;

/// Where a version of an event stands: position in the shard's log and line of the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Position, below 2⁴⁰.
    pub position: u64,
    /// Line from 1, below 2²⁴.
    pub line: u32,
}

impl Place {
    fn pack(self) -> u64 {
        debug_assert!(self.position < 1 << 40 && self.line < 1 << 24);
        self.position << 24 | u64::from(self.line)
    }

    fn unpack(packed: u64) -> Place {
        Place { position: packed >> 24, line: (packed & 0xff_ffff) as u32 }
    }
}

/// What is remembered of an id. 32 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct Entry {
    fingerprint: [u64; 2],
    content: u64,
    place: u64,
}

/// What becomes of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// First seen: it counts.
    Fresh,
    /// Same revision and content as known: nothing to do.
    Duplicate,
    /// A higher revision is known: nothing to do.
    Superseded,
    /// Same revision as known, but other content.
    Conflict,
    /// Replaces the version at this place.
    Replaces(Place),
}

const BLOCK: usize = 4096;
const TABLES: usize = 64;
/// Entries given back per admission while forgotten ones remain: more than one, so that it ends.
const RELEASED_PER_ADMISSION: usize = 2;

/// The memory of ids of one shard.
#[derive(Debug, Clone)]
pub struct Dedupe {
    horizon: i64,
    expired_through: Option<Time>,
    /// Start of an arrival bucket and sequence of its first entry, ascending.
    buckets: VecDeque<(Time, u64)>,
    /// Sequence of the first entry not forgotten.
    floor: u64,
    /// Sequence of the first entry still in memory; a multiple of `BLOCK`, or within the first block.
    base: u64,
    /// Sequence of the first entry whose references are still in the tables.
    released: u64,
    blocks: VecDeque<Vec<Entry>>,
    next: u64,
    tables: Vec<HashTable<u32>>,
    /// Revisions above 0, by sequence.
    revisions: HashMap<u64, u32>,
    /// Entries changed in place since the last [`Dedupe::take_delta`].
    changed: Vec<u64>,
    /// First entry not contained in an earlier delta.
    delta_from: u64,
}

/// What a checkpoint keeps: everything, or what changed since the last time it was asked.
#[derive(Debug, Clone, Default, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct DedupeState {
    /// Horizon in microseconds.
    pub horizon: i64,
    /// End of the newest forgotten bucket, in microseconds since 1970.
    pub expired_through: Option<i64>,
    /// Buckets: start in microseconds since 1970, sequence of the first entry.
    pub buckets: Vec<(i64, u64)>,
    /// First entry not forgotten.
    pub floor: u64,
    /// Sequence of the first of `entries`.
    pub from: u64,
    /// New entries in arrival order, with their revisions.
    pub entries: Vec<(Entry, u32)>,
    /// Entries changed in place: sequence, entry, revision.
    pub changed: Vec<(u64, Entry, u32)>,
}

impl Default for Dedupe {
    fn default() -> Self {
        Dedupe {
            horizon: HORIZON_DEFAULT,
            expired_through: None,
            buckets: VecDeque::new(),
            floor: 0,
            base: 0,
            released: 0,
            blocks: VecDeque::new(),
            next: 0,
            tables: vec![HashTable::new(); TABLES],
            revisions: HashMap::new(),
            changed: Vec::new(),
            delta_from: 0,
        }
    }
}

impl Dedupe {
    /// Sets the horizon, in microseconds. A shorter one forgets at the next [`Dedupe::advance`]; what
    /// was forgotten already stays forgotten when it grows.
    pub fn set_horizon(&mut self, horizon: i64) {
        self.horizon = horizon;
    }

    /// End of the newest forgotten bucket.
    pub fn expired_through(&self) -> Option<Time> {
        self.expired_through
    }

    /// Whether an event of this time (`original_time` where given) must be refused, since a copy of
    /// it could have been forgotten.
    pub fn too_late(&self, time: Time) -> bool {
        self.expired_through.is_some_and(|end| time.0 - AHEAD_MAX <= end.0)
    }

    /// Forgets the buckets that ended a horizon before `log_time`, and opens the bucket of
    /// `log_time`. Must be called before the events of a message are admitted.
    ///
    /// Only buckets that hold an id count: with an empty one nothing is forgotten, so a deployment
    /// that has merely stood there still takes history of any age.
    pub fn advance(&mut self, log_time: Time) {
        while let Some(&(start, first)) = self.buckets.front() {
            let end = Time(start.0 + BUCKET);
            if log_time.0 < end.0 + self.horizon {
                break;
            }
            self.buckets.pop_front();
            self.floor = self.buckets.front().map_or(self.next, |(_, first)| *first);
            if first < self.floor {
                self.expired_through = self.expired_through.max(Some(end));
            }
        }
        let bucket = Time(log_time.0.div_euclid(BUCKET) * BUCKET);
        match self.buckets.back_mut() {
            Some((start, _)) if *start >= bucket => {}
            Some((start, first)) if *first == self.next => *start = bucket,
            _ => self.buckets.push_back((bucket, self.next)),
        }
    }

    /// Decides about a version of an event and remembers it.
    pub fn admit(
        &mut self,
        fingerprint: u128,
        revision: u32,
        content: u64,
        place: Place,
    ) -> Verdict {
        self.release(RELEASED_PER_ADMISSION);
        let fingerprint = [fingerprint as u64, (fingerprint >> 64) as u64];
        let Some(sequence) = self.find(fingerprint) else {
            let entry = Entry { fingerprint, content, place: place.pack() };
            self.push(entry, revision);
            return Verdict::Fresh;
        };
        let known = self.revisions.get(&sequence).copied().unwrap_or(0);
        let entry = self.entry_mut(sequence);
        match revision.cmp(&known) {
            std::cmp::Ordering::Less => Verdict::Superseded,
            std::cmp::Ordering::Equal if entry.content == content => Verdict::Duplicate,
            std::cmp::Ordering::Equal => Verdict::Conflict,
            std::cmp::Ordering::Greater => {
                let old = Place::unpack(entry.place);
                entry.content = content;
                entry.place = place.pack();
                self.revisions.insert(sequence, revision);
                if sequence < self.delta_from {
                    self.changed.push(sequence);
                }
                Verdict::Replaces(old)
            }
        }
    }

    /// Ids remembered.
    pub fn len(&self) -> u64 {
        self.next - self.floor
    }

    /// Whether no id is remembered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory held, as allocated.
    pub fn bytes(&self) -> usize {
        let blocks: usize = self.blocks.iter().map(|b| b.capacity() * size_of::<Entry>()).sum();
        let tables: usize = self.tables.iter().map(HashTable::allocation_size).sum();
        blocks
            + tables
            + self.revisions.allocation_size()
            + self.buckets.capacity() * size_of::<(Time, u64)>()
            + self.changed.capacity() * size_of::<u64>()
    }

    fn find(&self, fingerprint: [u64; 2]) -> Option<u64> {
        let table = &self.tables[Self::table_of(fingerprint)];
        let found = table.find(fingerprint[1], |reference| {
            let sequence = self.sequence_of(*reference);
            sequence >= self.floor && self.entry(sequence).fingerprint == fingerprint
        });
        found.map(|reference| self.sequence_of(*reference))
    }

    fn push(&mut self, entry: Entry, revision: u32) {
        let sequence = self.next;
        assert!(
            sequence - self.base < u64::from(u32::MAX),
            "ids of one shard fit 32-bit references"
        );
        self.next += 1;
        if self.blocks.back().is_none_or(|block| block.len() == BLOCK) {
            self.blocks.push_back(Vec::with_capacity(BLOCK));
        }
        let block = self.blocks.back_mut().expect("pushed above when there was none");
        block.push(entry);
        if revision > 0 {
            self.revisions.insert(sequence, revision);
        }
        let (base, blocks) = (self.base, &self.blocks);
        self.tables[Self::table_of(entry.fingerprint)].insert_unique(
            entry.fingerprint[1],
            sequence as u32,
            |reference| {
                let offset = reference.wrapping_sub(base as u32) as usize;
                blocks[offset / BLOCK][offset % BLOCK].fingerprint[1]
            },
        );
    }

    /// Gives back memory of forgotten entries.
    fn release(&mut self, most: usize) {
        for _ in 0..most {
            if self.released >= self.floor {
                break;
            }
            let sequence = self.released;
            let fingerprint = self.entry(sequence).fingerprint;
            let reference = sequence as u32;
            let table = &mut self.tables[Self::table_of(fingerprint)];
            if let Ok(found) = table.find_entry(fingerprint[1], |r| *r == reference) {
                found.remove();
            }
            self.revisions.remove(&sequence);
            self.released += 1;
            if self.released - self.base >= BLOCK as u64 {
                self.blocks.pop_front();
                self.base += BLOCK as u64;
            }
        }
    }

    fn table_of(fingerprint: [u64; 2]) -> usize {
        fingerprint[0] as usize % TABLES
    }

    fn sequence_of(&self, reference: u32) -> u64 {
        self.base + u64::from(reference.wrapping_sub(self.base as u32))
    }

    fn entry(&self, sequence: u64) -> &Entry {
        let offset = (sequence - self.base) as usize;
        &self.blocks[offset / BLOCK][offset % BLOCK]
    }

    fn entry_mut(&mut self, sequence: u64) -> &mut Entry {
        let offset = (sequence - self.base) as usize;
        &mut self.blocks[offset / BLOCK][offset % BLOCK]
    }

    fn state(&self, from: u64, changed: &[u64]) -> DedupeState {
        let with_revision = |sequence: u64| {
            (*self.entry(sequence), self.revisions.get(&sequence).copied().unwrap_or(0))
        };
        DedupeState {
            horizon: self.horizon,
            expired_through: self.expired_through.map(|t| t.0),
            buckets: self.buckets.iter().map(|(start, first)| (start.0, *first)).collect(),
            floor: self.floor,
            from,
            entries: (from..self.next).map(with_revision).collect(),
            changed: changed
                .iter()
                .filter(|s| **s >= self.floor)
                .map(|s| {
                    let (entry, revision) = with_revision(*s);
                    (*s, entry, revision)
                })
                .collect(),
        }
    }

    /// The whole state, for a base; later deltas continue from here.
    pub fn take_base(&mut self) -> DedupeState {
        self.changed.clear();
        self.delta_from = self.next;
        self.state(self.floor, &[])
    }

    /// What changed since the last base or delta.
    pub fn take_delta(&mut self) -> DedupeState {
        let mut changed = std::mem::take(&mut self.changed);
        changed.sort_unstable();
        changed.dedup();
        let from = self.delta_from.max(self.floor);
        self.delta_from = self.next;
        self.state(from, &changed)
    }

    /// Rebuilds from a base and its deltas, applied in order to a fresh value.
    ///
    /// # Errors
    /// When the state does not continue what is here.
    pub fn restore(&mut self, state: &DedupeState) -> Result<(), &'static str> {
        if self.next == 0 || (state.from > self.next && state.from == state.floor) {
            // A base, or a delta before which everything was forgotten: sequences go on where they
            // were, so that later deltas fit.
            self.blocks.clear();
            self.tables.iter_mut().for_each(HashTable::clear);
            self.revisions.clear();
            self.base = state.from / BLOCK as u64 * BLOCK as u64;
            self.next = self.base;
            self.released = state.from;
            self.floor = state.from;
            // Entries before the first one of the block are never looked at.
            let filler = Entry { fingerprint: [0; 2], content: 0, place: 0 };
            let missing = (state.from - self.base) as usize;
            if missing > 0 {
                let mut block = Vec::with_capacity(BLOCK);
                block.resize(missing, filler);
                self.blocks.push_back(block);
                self.next = state.from;
            }
        }
        if state.from != self.next {
            return Err("ids of a checkpoint delta do not continue those before it");
        }
        for (entry, revision) in &state.entries {
            self.push(*entry, *revision);
        }
        for (sequence, entry, revision) in &state.changed {
            if *sequence < self.base || *sequence >= self.next {
                return Err("a checkpoint delta changes an id that is not there");
            }
            *self.entry_mut(*sequence) = *entry;
            self.revisions.insert(*sequence, *revision);
        }
        self.horizon = state.horizon;
        self.expired_through = state.expired_through.map(Time);
        self.buckets = state.buckets.iter().map(|(start, first)| (Time(*start), *first)).collect();
        self.floor = state.floor.min(self.next);
        self.delta_from = self.next;
        self.changed.clear();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(position: u64) -> Place {
        Place { position, line: 1 }
    }

    fn id(n: u128) -> u128 {
        // Spread as a real fingerprint is.
        n.wrapping_mul(0x9E37_79B9_7F4A_7C15_F39C_C060_5CED_C835)
    }

    #[test]
    fn revisions_replace_whatever_their_order() {
        let mut dedupe = Dedupe::default();
        dedupe.advance(Time(0));
        assert_eq!(dedupe.admit(id(1), 2, 22, at(1)), Verdict::Fresh);
        assert_eq!(dedupe.admit(id(1), 1, 11, at(2)), Verdict::Superseded);
        assert_eq!(dedupe.admit(id(1), 2, 22, at(3)), Verdict::Duplicate);
        assert_eq!(dedupe.admit(id(1), 2, 23, at(4)), Verdict::Conflict);
        assert_eq!(dedupe.admit(id(1), 3, 33, at(5)), Verdict::Replaces(at(1)));
        assert_eq!(dedupe.admit(id(1), 4, 33, at(6)), Verdict::Replaces(at(5)));
    }

    #[test]
    fn forgets_whole_buckets_one_horizon_after_their_end() {
        let mut dedupe = Dedupe::default();
        dedupe.set_horizon(10 * HOUR);
        dedupe.advance(Time(0));
        dedupe.admit(id(1), 0, 1, at(1));
        dedupe.advance(Time(11 * HOUR - 1));
        assert_eq!(dedupe.admit(id(1), 0, 1, at(2)), Verdict::Duplicate);
        assert!(!dedupe.too_late(Time(0)));
        dedupe.advance(Time(11 * HOUR));
        assert_eq!(dedupe.expired_through(), Some(Time(HOUR)));
        assert_eq!(
            (dedupe.too_late(Time(2 * HOUR)), dedupe.too_late(Time(2 * HOUR + 1))),
            (true, false)
        );
        assert_eq!(dedupe.admit(id(1), 0, 1, at(3)), Verdict::Fresh);
    }

    #[test]
    fn memory_is_given_back() {
        let mut dedupe = Dedupe::default();
        dedupe.set_horizon(HOUR);
        let mut most = 0;
        for hour in 0..40 {
            dedupe.advance(Time(hour * HOUR));
            for n in 0..20_000 {
                let fresh = dedupe.admit(id(hour as u128 * 1_000_000 + n), 0, 1, at(1));
                assert_eq!(fresh, Verdict::Fresh);
            }
            if hour == 10 {
                most = dedupe.bytes();
            }
        }
        assert!(dedupe.len() <= 60_000);
        assert!(dedupe.bytes() <= most * 5 / 4, "{} grew from {most}", dedupe.bytes());
    }

    #[test]
    fn an_id_costs_at_most_64_bytes_on_average_over_growth() {
        let mut dedupe = Dedupe::default();
        dedupe.advance(Time(0));
        let (mut sum, mut samples) = (0.0, 0);
        for n in 0..600_000_u64 {
            dedupe.admit(id(n.into()), 0, n, at(1));
            if n >= 100_000 && n % 10_000 == 0 {
                sum += dedupe.bytes() as f64 / (n + 1) as f64;
                samples += 1;
            }
        }
        let average = sum / f64::from(samples);
        println!("average bytes per remembered id: {average:.1}");
        assert!(average <= 64.0, "{average}");
    }

    #[test]
    fn a_restored_memory_decides_alike() {
        let mut live = Dedupe::default();
        live.set_horizon(3 * HOUR);
        let mut states = Vec::new();
        let mut n = 0_u128;
        for hour in 0..12 {
            live.advance(Time(hour * HOUR));
            for _ in 0..3_000 {
                n += 1;
                live.admit(id(n), 0, 7, at(n as u64));
                if n.is_multiple_of(5) && n > 4_000 {
                    live.admit(id(n - 4_000), 1 + hour as u32, 8, at(n as u64));
                }
            }
            states.push(if hour == 4 { live.take_base() } else { live.take_delta() });
        }
        let mut restored = Dedupe::default();
        for state in &states[4..] {
            restored.restore(state).unwrap();
        }
        assert_eq!(restored.len(), live.len());
        assert_eq!(restored.expired_through(), live.expired_through());
        for m in 1..=n {
            for revision in [0, 5, 20] {
                let (a, b) = (
                    live.admit(id(m), revision, 9, at(1)),
                    restored.admit(id(m), revision, 9, at(1)),
                );
                assert_eq!(a, b, "id {m} revision {revision}");
            }
        }
    }
}
