//! The entry `backup.lock` of the registry: which node makes a backup. It saves work and nothing
//! more: a store takes two backups at once, so that clocks that disagree do no harm.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::executor::block_on;
use meterr_connectors::cluster::{Entry, Registry, RegistryError};
use meterr_operators::time::Time;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// Key of the entry.
const KEY: &str = "backup.lock";
/// How long it counts; it is written anew while a backup goes on.
const COUNTS: Duration = Duration::from_secs(600);

/// What the entry says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Held {
    node: String,
    /// Microseconds since 1970, by the node's clock.
    until: i64,
}

/// The lock, held.
pub(super) struct Lock {
    registry: Arc<dyn Registry>,
    node: String,
    state: Mutex<State>,
}

struct State {
    revision: u64,
    until: Time,
}

fn until(now: Time) -> Time {
    Time(now.0.saturating_add(COUNTS.as_micros() as i64))
}

fn value(node: &str, until: Time) -> Bytes {
    let held = Held { node: node.to_owned(), until: until.0 };
    serde_json::to_vec(&held).expect("it has only text keys").into()
}

/// The revision at which the lock can be taken; `None`: another node has it.
fn free(entries: &[Entry], node: &str, now: Time) -> Option<u64> {
    let Some(entry) = entries.iter().find(|entry| entry.key == KEY) else { return Some(0) };
    match serde_json::from_slice::<Held>(&entry.value) {
        // A clock that is ahead by more than it counts must not hold it for ever.
        Ok(held)
            if held.node != node && held.until > now.0 && held.until <= until(until(now)).0 =>
        {
            None
        }
        Ok(_) | Err(_) => Some(entry.revision),
    }
}

impl Lock {
    /// Takes the lock, if no other node has it.
    pub(super) fn take(
        registry: &Arc<dyn Registry>,
        node: &str,
        now: Time,
    ) -> Result<Option<Lock>, RegistryError> {
        let entries = block_on(registry.read())?;
        let Some(expected) = free(&entries, node, now) else { return Ok(None) };
        let until = until(now);
        match block_on(registry.write(KEY.to_owned(), value(node, until), expected)) {
            Ok(revision) => {
                let state = Mutex::new(State { revision, until });
                Ok(Some(Lock { registry: registry.clone(), node: node.to_owned(), state }))
            }
            Err(RegistryError::Conflict { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Writes it anew when half of its time is over. That it cannot be is no reason to stop.
    pub(super) fn renew(&self, now: Time) {
        let mut state = self.state.lock();
        if state.until.0.saturating_sub(now.0) > COUNTS.as_micros() as i64 / 2 {
            return;
        }
        let until = until(now);
        let write = self.registry.write(KEY.to_owned(), value(&self.node, until), state.revision);
        match block_on(write) {
            Ok(revision) => *state = State { revision, until },
            Err(error) => {
                tracing::warn!(%error, "the lock of backups cannot be renewed");
                // Not again at every segment.
                state.until = until;
            }
        }
    }

    /// Lets go of it. If that fails it ends by itself.
    pub(super) fn release(self) {
        let revision = self.state.into_inner().revision;
        if let Err(error) = block_on(self.registry.remove(KEY.to_owned(), revision)) {
            tracing::debug!(%error, "the lock of backups was not removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lock_of_another_node_that_still_counts_is_in_the_way() {
        let now = Time(1_800_000_000_000_000);
        let entry = |node: &str, until: Time| {
            vec![Entry { key: KEY.to_owned(), revision: 7, value: value(node, until) }]
        };
        let second = 1_000_000;
        assert_eq!(free(&[], "a", now), Some(0));
        assert_eq!(free(&entry("b", Time(now.0 + second)), "a", now), None);
        assert_eq!(free(&entry("a", Time(now.0 + second)), "a", now), Some(7));
        assert_eq!(free(&entry("b", now), "a", now), Some(7));
        assert_eq!(free(&entry("b", Time(i64::MAX)), "a", now), Some(7));
        let damaged = Entry { key: KEY.to_owned(), revision: 9, value: Bytes::from_static(b"x") };
        assert_eq!(free(&[damaged], "a", now), Some(9));
    }
}
