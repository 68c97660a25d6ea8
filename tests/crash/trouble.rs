//! What publishers send, with all the trouble the promise names.

use meterr_operators::rng::Rng;
use meterr_operators::time::{DAY, Time};

use crate::model::{MODELS, START, Version};

/// Makes batches of new events, duplicates, revisions, voids and late events.
pub struct Source {
    n: u64,
    /// Whatever else is left to chance.
    pub rng: Rng,
    next: u64,
    /// Every version made so far, by id; sent at least once.
    made: Vec<(String, Vec<Version>)>,
    /// Versions made but held back: a later one goes first.
    held: Vec<(String, Version)>,
}

impl Source {
    /// One of several; their ids differ.
    pub fn new(n: u64, seed: u64) -> Source {
        let rng = Rng::stream(seed, n);
        Source { n, rng, next: 0, made: Vec::new(), held: Vec::new() }
    }

    fn version(&mut self, revision: u32, first: Option<&Version>) -> Version {
        let rng = &mut self.rng;
        let late = if rng.percent(10) { rng.below(20 * DAY as u64) as i64 } else { 0 };
        // Milliseconds, as events have them.
        let time = Time((START.0 + 30 * DAY + rng.below(DAY as u64) as i64 - late) / 1_000 * 1_000);
        let org = first.map_or_else(|| rng.below(5).min(rng.below(5)) as usize, |v| v.org);
        let input = rng.below(20_000) as i64;
        Version {
            revision,
            original: first.map_or(time, |v| v.original),
            time,
            org,
            user: rng.below(12),
            model: rng.below(MODELS.len() as u64) as usize,
            feature: rng.below(4),
            input,
            cached: rng.below(input as u64 + 1) as i64,
            output: rng.below(2_000) as i64,
            void: revision > 0 && rng.percent(30),
        }
    }

    /// Events to send now. Never empty.
    pub fn batch(&mut self) -> Vec<(String, Version)> {
        let mut batch = Vec::new();
        let wanted = 1 + self.rng.below(60);
        for tried in 0.. {
            if tried >= wanted && !batch.is_empty() {
                break;
            }
            let known = !self.made.is_empty();
            let kind = self.rng.below(100);
            if kind < 70 || !known {
                let id = format!("p{}-{}", self.n, self.next);
                self.next += 1;
                let version = self.version(0, None);
                let mut versions = vec![version.clone()];
                if self.rng.percent(5) {
                    // The correction overtakes what it corrects.
                    let second = self.version(1, Some(&version));
                    batch.push((id.clone(), second.clone()));
                    self.held.push((id.clone(), version));
                    versions.push(second);
                } else {
                    batch.push((id.clone(), version));
                }
                self.made.push((id, versions));
                continue;
            }
            let at = self.rng.below(self.made.len() as u64) as usize;
            let (id, versions) = self.made[at].clone();
            if kind < 80 {
                // A duplicate of any version, also of one replaced since.
                let version = self.rng.pick(&versions).clone();
                batch.push((id, version));
            } else if kind < 97 {
                let version = self.version(versions.len() as u32, Some(&versions[0]));
                self.made[at].1.push(version.clone());
                batch.push((id, version));
            } else if let Some(held) = self.held.pop() {
                batch.push(held);
            }
        }
        batch
    }
    /// The same id and revision as one of a batch with other content: it never counts, if it is sent
    /// after that one was acknowledged.
    pub fn forged(&mut self, batch: &[(String, Version)]) -> (String, Version) {
        let (id, version) = self.rng.pick(batch);
        let forged = Version { input: version.input + 1, void: false, ..version.clone() };
        (id.clone(), forged)
    }
}
