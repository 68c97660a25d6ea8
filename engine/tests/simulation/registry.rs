//! The registry: compare-and-set with revisions, and its last states, so that a read can be old.

use std::collections::VecDeque;
use std::rc::Rc;

use bytes::Bytes;
use meterr_connectors::cluster::{Entry, RegistryError};

/// States kept.
const KEPT: usize = 6;

pub struct Registry {
    revision: u64,
    states: VecDeque<Rc<Vec<Entry>>>,
}

impl Registry {
    pub fn new() -> Registry {
        Registry { revision: 0, states: VecDeque::from([Rc::default()]) }
    }

    /// A state, `age` writes old if that is kept.
    pub fn read(&self, age: usize) -> Rc<Vec<Entry>> {
        let at = self.states.len() - 1 - age.min(self.states.len() - 1);
        self.states[at].clone()
    }

    pub fn get(&self, key: &str) -> Option<Entry> {
        self.read(0).iter().find(|entry| entry.key == key).cloned()
    }

    pub fn write(&mut self, key: &str, value: &Bytes, expected: u64) -> Result<u64, RegistryError> {
        if self.get(key).map_or(0, |entry| entry.revision) != expected {
            return Err(RegistryError::Conflict { key: key.to_owned(), expected });
        }
        self.set(key, value.clone());
        Ok(self.revision)
    }

    /// Writes whatever it was.
    pub fn set(&mut self, key: &str, value: Bytes) {
        self.revision += 1;
        let mut entries = Vec::clone(&self.states[self.states.len() - 1]);
        match entries.iter_mut().find(|entry| entry.key == key) {
            Some(entry) => (entry.revision, entry.value) = (self.revision, value),
            None => entries.push(Entry { key: key.to_owned(), revision: self.revision, value }),
        }
        if self.states.len() == KEPT {
            self.states.pop_front();
        }
        self.states.push_back(Rc::new(entries));
    }
}
