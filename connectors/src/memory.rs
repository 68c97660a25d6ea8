//! A log in memory, for tests and simulation: what [`crate::embedded::EmbeddedLog`] does, without
//! files and threads, with faults on demand and any time a test wants.
//!
//! Nothing here outlives the value. [`MemoryLog::reopen`] stands for the restart after a failure.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures::future::BoxFuture;
use meterr_operators::time::Time;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::log::{
    Appended, Clock, Log, LogError, LogIdentity, LogResult, MESSAGE_BYTES_MAX, Message, Record,
    system_clock,
};

/// The log; clones share it.
#[derive(Clone)]
pub struct MemoryLog {
    shared: Arc<Shared>,
}

struct Shared {
    identity: LogIdentity,
    clock: Clock,
    state: Mutex<State>,
    /// Raised with every change that a waiter may wait for.
    changed: watch::Sender<()>,
}

#[derive(Default)]
struct State {
    records: Vec<Record>,
    /// Position of the last commit record, 0: none.
    commit: u64,
    damaged: BTreeSet<u64>,
    poisoned: Option<String>,
    fault: Option<Fault>,
}

#[derive(Clone, Copy)]
enum Fault {
    /// Nothing is kept.
    Fail,
    /// All is kept, and the appender does not learn of it.
    LoseAnswer,
}

impl MemoryLog {
    /// An empty log by the machine's clock. Its identity follows from its name, so that a test
    /// repeats exactly.
    pub fn new(stream: &str) -> MemoryLog {
        MemoryLog::with_clock(stream, system_clock())
    }

    /// An empty log by another clock.
    pub fn with_clock(stream: &str, clock: Clock) -> MemoryLog {
        let identity = LogIdentity { stream: stream.to_owned(), uuid: format!("memory-{stream}") };
        MemoryLog {
            shared: Arc::new(Shared {
                identity,
                clock,
                state: Mutex::default(),
                changed: watch::Sender::new(()),
            }),
        }
    }

    /// Appends at a time of the test's choice (or that of the last record, if that is later).
    ///
    /// # Errors
    /// As [`Log::append`].
    pub fn append_at(&self, messages: Vec<Message>, time: Time) -> LogResult<Appended> {
        self.shared.append(messages, None, Some(time))
    }

    /// The next append (or commit that has no conflict) fails, nothing of it is kept and the log is
    /// poisoned.
    pub fn fail_next_append(&self) {
        self.shared.state.lock().fault = Some(Fault::Fail);
    }

    /// The next append (or commit that has no conflict) is kept, but fails for its appender, and
    /// the log is poisoned.
    pub fn lose_next_answer(&self) {
        self.shared.state.lock().fault = Some(Fault::LoseAnswer);
    }

    /// Makes a record unreadable.
    pub fn damage(&self, position: u64) {
        self.shared.state.lock().damaged.insert(position);
    }

    /// Ends poisoning, as opening an embedded log anew does.
    pub fn reopen(&self) {
        let mut state = self.shared.state.lock();
        state.poisoned = None;
        state.fault = None;
    }

    /// Forgets the records after a position, as if an older copy had been restored.
    pub fn roll_back_to(&self, position: u64) {
        let mut state = self.shared.state.lock();
        let keep = usize::try_from(position).unwrap_or(usize::MAX);
        state.records.truncate(keep);
        let commit = state.records.iter().rev().find(|r| r.message.subject.ends_with(".commit"));
        state.commit = commit.map_or(0, |record| record.position);
        state.damaged.retain(|damaged| *damaged <= position);
    }

    /// All records, damaged ones included.
    pub fn records(&self) -> Vec<Record> {
        self.shared.state.lock().records.clone()
    }
}

impl State {
    fn head(&self) -> u64 {
        self.records.len() as u64
    }

    fn record(&self, position: u64) -> Option<&Record> {
        self.records.get(usize::try_from(position.checked_sub(1)?).ok()?)
    }
}

impl Shared {
    fn poisoned(&self, cause: &str) -> LogError {
        LogError::Poisoned { stream: self.identity.stream.clone(), cause: cause.to_owned() }
    }

    fn append(
        &self,
        messages: Vec<Message>,
        previous: Option<u64>,
        time: Option<Time>,
    ) -> LogResult<Appended> {
        let mut state = self.state.lock();
        if let Some(cause) = &state.poisoned {
            return Err(self.poisoned(cause));
        }
        let too_large = messages.iter().map(Message::bytes).find(|b| *b > MESSAGE_BYTES_MAX);
        if let Some(bytes) = too_large {
            return Err(LogError::TooLarge { bytes, max: MESSAGE_BYTES_MAX });
        }
        if let Some(expected) = previous
            && expected != state.commit
        {
            let stream = self.identity.stream.clone();
            return Err(LogError::Conflict { stream, expected, actual: state.commit });
        }
        let last_time = state.records.last().map(|record| record.time);
        if messages.is_empty() {
            let time = last_time.unwrap_or_default();
            return Ok(Appended { first: state.head() + 1, last: state.head(), time });
        }
        let fault = state.fault.take();
        if matches!(fault, Some(Fault::Fail)) {
            return Err(self.fail(state, "made to fail"));
        }
        let time = time.unwrap_or_else(|| (self.clock)());
        let time = last_time.map_or(time, |last| last.max(time));
        let first = state.head() + 1;
        for message in messages {
            let position = state.head() + 1;
            if message.subject.ends_with(".commit") {
                state.commit = position;
            }
            state.records.push(Record { position, time, message });
        }
        let appended = Appended { first, last: state.head(), time };
        if matches!(fault, Some(Fault::LoseAnswer)) {
            return Err(self.fail(state, "made to lose the answer"));
        }
        drop(state);
        self.changed.send_replace(());
        Ok(appended)
    }

    fn fail(&self, mut state: parking_lot::MutexGuard<'_, State>, cause: &str) -> LogError {
        state.poisoned = Some(cause.to_owned());
        drop(state);
        self.changed.send_replace(());
        self.poisoned(cause)
    }

    fn done(&self, position: u64) -> bool {
        let state = self.state.lock();
        state.poisoned.is_some() || state.head() > position
    }

    fn damaged(&self, state: &State, position: u64) -> LogError {
        let damaged = |p: &u64| state.damaged.contains(p);
        let before = (1..position).rev().take_while(damaged).count() as u64;
        let after = (position..=state.head()).take_while(damaged).count() as u64;
        LogError::Damaged {
            stream: self.identity.stream.clone(),
            place: format!("memory:{position}"),
            from: position - before,
            resume: position + after,
        }
    }

    fn read(&self, from: u64, bytes_max: usize) -> LogResult<Vec<Record>> {
        let state = self.state.lock();
        let from = from.max(1);
        if from <= state.head() && state.damaged.contains(&from) {
            return Err(self.damaged(&state, from));
        }
        let mut records: Vec<Record> = Vec::new();
        let mut left = bytes_max;
        for position in from..=state.head() {
            let Some(record) = state.record(position) else { break };
            let bytes = record.message.payload.len();
            if state.damaged.contains(&position) || (!records.is_empty() && bytes > left) {
                break;
            }
            left = left.saturating_sub(bytes);
            records.push(record.clone());
        }
        Ok(records)
    }
}

impl Log for MemoryLog {
    fn identity(&self) -> &LogIdentity {
        &self.shared.identity
    }

    fn head(&self) -> u64 {
        self.shared.state.lock().head()
    }

    fn first(&self) -> u64 {
        1
    }

    fn last_time(&self) -> Option<Time> {
        self.shared.state.lock().records.last().map(|record| record.time)
    }

    fn append(&self, messages: Vec<Message>) -> BoxFuture<'static, LogResult<Appended>> {
        let shared = self.shared.clone();
        Box::pin(async move { shared.append(messages, None, None) })
    }

    fn commit(
        &self,
        parts: Vec<Message>,
        commit: Message,
        previous: u64,
    ) -> BoxFuture<'static, LogResult<Appended>> {
        let shared = self.shared.clone();
        Box::pin(async move {
            if !commit.subject.ends_with(".commit") {
                return Err(LogError::Format {
                    stream: shared.identity.stream.clone(),
                    what: format!(
                        "the subject of a commit record ends in \".commit\", not {:?}",
                        commit.subject
                    ),
                });
            }
            let mut messages = parts;
            messages.push(commit);
            shared.append(messages, Some(previous), None)
        })
    }

    fn last_commit(&self) -> BoxFuture<'static, LogResult<Option<Record>>> {
        let state = self.shared.state.lock();
        let position = state.commit;
        let answer = if state.damaged.contains(&position) {
            Err(self.shared.damaged(&state, position))
        } else {
            Ok(state.record(position).cloned())
        };
        Box::pin(std::future::ready(answer))
    }

    fn read(&self, from: u64, bytes_max: usize) -> BoxFuture<'static, LogResult<Vec<Record>>> {
        let shared = self.shared.clone();
        Box::pin(async move { shared.read(from, bytes_max) })
    }

    fn wait_beyond(&self, position: u64) -> BoxFuture<'static, ()> {
        let shared = self.shared.clone();
        Box::pin(async move {
            let mut changed = shared.changed.subscribe();
            loop {
                let done = shared.done(position);
                // Subscribed before looking, so no change between the two is missed.
                if done || changed.changed().await.is_err() {
                    return;
                }
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use futures::executor::block_on;

    use super::*;

    fn message(n: u8) -> Message {
        Message::new("usage.0.a", vec![n])
    }

    #[test]
    fn times_are_the_tests_own_and_never_fall() {
        let log = MemoryLog::new("USAGE_0");
        let at = |t| log.append_at(vec![message(1)], Time(t)).unwrap().time;
        assert_eq!([at(5), at(3), at(9)], [Time(5), Time(5), Time(9)]);
    }

    #[test]
    fn a_failed_append_leaves_nothing_and_a_lost_answer_leaves_all() {
        let log = MemoryLog::new("USAGE_0");
        block_on(log.append(vec![message(1)])).unwrap();
        log.fail_next_append();
        for _ in 0..2 {
            let error = block_on(log.append(vec![message(2)])).unwrap_err();
            assert!(matches!(error, LogError::Poisoned { .. }));
        }
        block_on(log.wait_beyond(7));
        log.reopen();
        assert_eq!(log.head(), 1);
        log.lose_next_answer();
        block_on(log.append(vec![message(2), message(3)])).unwrap_err();
        log.reopen();
        assert_eq!(log.head(), 3);
        assert_eq!(block_on(log.append(vec![message(4)])).unwrap().first, 4);
    }

    #[test]
    fn damage_ends_an_answer_and_is_an_error_at_its_own_place() {
        let log = MemoryLog::new("USAGE_0");
        for n in 1..=5 {
            log.append_at(vec![message(n)], Time(0)).unwrap();
        }
        log.damage(3);
        log.damage(4);
        assert_eq!(block_on(log.read(1, 100)).unwrap().len(), 2);
        for position in [3, 4] {
            let error = block_on(log.read(position, 100)).unwrap_err();
            assert!(matches!(error, LogError::Damaged { from: 3, resume: 5, .. }), "{error}");
        }
        assert_eq!(block_on(log.read(5, 100)).unwrap().len(), 1);
    }

    #[test]
    fn rolling_back_takes_the_last_commit_along() {
        let log = MemoryLog::new("OUT_0");
        let commit = || Message::new("out.0.commit", "");
        block_on(log.commit(vec![], commit(), 0)).unwrap();
        block_on(log.commit(vec![message(1)], commit(), 1)).unwrap();
        log.roll_back_to(2);
        assert_eq!(block_on(log.last_commit()).unwrap().unwrap().position, 1);
        assert_eq!(log.records().len(), 2);
    }
}
