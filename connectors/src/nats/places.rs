//! Places for requests, so that what is worked on at once is bounded, and counts of what became of
//! them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Semaphore;

/// What was done with the requests of an endpoint.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counted {
    /// Answered.
    pub answers: u64,
    /// Refused, for whatever reason.
    pub problems: u64,
    /// Of these, refused because all places were taken.
    pub overloads: u64,
    /// Without a reply subject that may be published to.
    pub ignored: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub answers: AtomicU64,
    pub problems: AtomicU64,
    pub overloads: AtomicU64,
    pub ignored: AtomicU64,
}

impl Counters {
    pub fn read(&self) -> Counted {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counted {
            answers: of(&self.answers),
            problems: of(&self.problems),
            overloads: of(&self.overloads),
            ignored: of(&self.ignored),
        }
    }
}

/// Adds one.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Places for requests.
pub(super) struct Places {
    pub now: Arc<Semaphore>,
    /// For those that wait for a position.
    pub waiting: Arc<Semaphore>,
    pub now_max: usize,
    pub waiting_max: usize,
}

impl Places {
    pub fn new(now_max: usize, waiting_max: usize) -> Places {
        Places {
            now: Arc::new(Semaphore::new(now_max)),
            waiting: Arc::new(Semaphore::new(waiting_max)),
            now_max,
            waiting_max,
        }
    }
}
