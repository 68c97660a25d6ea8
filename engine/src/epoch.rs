//! When an epoch closes. Pure.
//!
//! Group commit: while a commit is under way, input gathers; when it is acknowledged, what gathered
//! becomes the next epoch. So a lone event is committed at once, and a flood in large epochs.

use std::time::Duration;

use crate::settings::Epoch;

/// Limits of an epoch.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most events.
    pub events_max: usize,
    /// Longest time spent on taking events in while the shard keeps up.
    pub age_max: Duration,
    /// The same when more input waits than one epoch takes.
    pub age_max_loaded: Duration,
}

impl From<&Epoch> for Limits {
    fn from(epoch: &Epoch) -> Limits {
        let Epoch { events_max, age_max, age_max_loaded } = *epoch;
        Limits { events_max, age_max, age_max_loaded }
    }
}

impl Limits {
    /// Whether an epoch that took in `events` for `age` must close although input waits; `waiting`
    /// says how many messages do.
    pub fn full(&self, events: usize, age: Duration, waiting: usize) -> bool {
        let loaded = waiting > 1;
        events >= self.events_max || age >= if loaded { self.age_max_loaded } else { self.age_max }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closes_by_events_or_age() {
        let limits = Limits {
            events_max: 10,
            age_max: Duration::from_millis(20),
            age_max_loaded: Duration::from_millis(250),
        };
        let ms = Duration::from_millis;
        assert!(!limits.full(9, ms(19), 0));
        assert!(limits.full(10, ms(0), 0));
        assert!(limits.full(1, ms(20), 1));
        assert!(!limits.full(1, ms(20), 2));
        assert!(limits.full(1, ms(250), 2));
    }
}
