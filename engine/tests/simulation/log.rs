//! The logs of a shard, and what must hold of them after every append. An event is a number below 64 and
//! counts `weight` once, however often it is in the usage log.

use meterr_connectors::log::LogError;
use meterr_engine::wire::Commit;
use meterr_operators::time::Time;

/// Different events of a shard.
pub const EVENTS: u8 = 64;

/// What an event counts.
pub fn weight(event: u8) -> u64 {
    1 + u64::from(event) * 7
}

/// What was counted: a set and its sum, as the state of a shard.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct State {
    pub seen: u64,
    pub sum: u64,
    pub usage: u64,
}

impl State {
    /// Takes the next event of the usage log in.
    pub fn take(&mut self, event: u8) {
        self.usage += 1;
        if self.seen & (1 << event) == 0 {
            self.seen |= 1 << event;
            self.sum += weight(event);
        }
    }
}

/// A commit record with what its parts say.
#[derive(Debug, Clone)]
pub struct Record {
    pub position: u64,
    pub commit: Commit,
    /// Events that its parts publish as counted for the first time.
    pub fresh: u64,
    /// The total that its parts publish.
    pub sum: u64,
    /// Node and life of the writer.
    pub writer: (usize, u32),
}

/// A commit record as such.
pub fn record(epoch: u64, usage: u64, token: u64, seal: bool) -> Commit {
    Commit {
        epoch,
        usage_position: usage,
        control_position: 0,
        log_time: Time(0),
        token,
        attempt: u32::from(!seal),
        parts: u32::from(!seal),
        hash: String::new(),
        seal,
    }
}

/// Usage and output log of a shard.
#[derive(Debug, Default)]
pub struct Logs {
    pub usage: Vec<u8>,
    pub out: Vec<Record>,
    /// Everything published.
    published: State,
}

impl Logs {
    pub fn last(&self) -> Option<&Record> {
        self.out.last()
    }

    /// Position of the last commit record.
    pub fn end(&self) -> u64 {
        self.last().map_or(0, |last| last.position)
    }

    /// Whether everything acknowledged is committed.
    pub fn whole(&self) -> bool {
        self.published.usage == self.usage.len() as u64
    }

    /// Appends a commit behind `expected`, or not: the fence.
    pub fn commit(
        &mut self,
        mut record: Record,
        expected: u64,
        fenced: bool,
    ) -> Result<Result<u64, LogError>, String> {
        let actual = self.end();
        if fenced && actual != expected {
            return Ok(Err(LogError::Conflict { stream: String::new(), expected, actual }));
        }
        // Its parts stand before it.
        record.position = actual + 1 + u64::from(record.commit.parts);
        self.check(&record)?;
        let position = record.position;
        self.out.push(record);
        Ok(Ok(position))
    }

    /// What must hold of a record that is about to stand.
    fn check(&mut self, new: &Record) -> Result<(), String> {
        let Record { commit, fresh, sum, writer, .. } = new;
        let (epoch, usage, token) = self
            .last()
            .map_or((0, 0, 0), |r| (r.commit.epoch, r.commit.usage_position, r.commit.token));
        let wrong = |what: &str| Err(format!("{what}: {new:?} behind {:?}", self.last()));
        if commit.seal {
            if commit.epoch != epoch || commit.usage_position != usage || *fresh != 0 {
                return wrong("a sealing record that is no repetition");
            }
            if commit.token <= token {
                return wrong("a token that does not grow");
            }
            return Ok(());
        }
        if commit.token != token || self.last().is_none_or(|last| last.writer != *writer) {
            return wrong("a commit of somebody who did not seal last");
        }
        if commit.epoch != epoch + 1 {
            return wrong("epochs are not dense");
        }
        if commit.usage_position <= usage || commit.usage_position > self.usage.len() as u64 {
            return wrong("a position that does not grow, or is not there");
        }
        if fresh & self.published.seen != 0 {
            return wrong("published twice");
        }
        let mut state = self.published;
        let taken = self.usage[usage as usize..commit.usage_position as usize].iter();
        taken.for_each(|event| state.take(*event));
        if self.published.seen | fresh != state.seen || *sum != state.sum {
            return wrong(&format!("the total is not that of its events ({})", state.sum));
        }
        self.published = state;
        Ok(())
    }
}
