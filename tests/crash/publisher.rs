//! Who sends: publishers with all the trouble the promise names, and an administrator. Each sends
//! again what got no answer, and notes what was acknowledged.

use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Duration;

use meterr_operators::rng::Rng;
use meterr_operators::time::{DAY, Time};
use serde_json::{Value, json};

use crate::Stage;
use crate::model::{MODELS, Model, ORGS, START, Version, ZONES, entry};
use crate::support::{agent, ask};

/// Posts lines once; the answer must be that all of them are durable.
pub fn post(url: &str, lines: &str) -> anyhow::Result<()> {
    let media_type = "application/x-ndjson";
    let answer = ask(&agent(), "POST", &format!("{url}/v1/events"), media_type, lines.as_bytes())?;
    match answer.status {
        202 => {
            let value = answer.json();
            assert_eq!(value["rejected_total"], 0, "{value}");
            assert_eq!(value["accepted"], lines.lines().count(), "{value}");
            Ok(())
        }
        // Draining, a write that failed because the process is going, or a machine so busy that the
        // request's head took longer than the server waits: nothing was acknowledged, send again.
        408 | 503 => anyhow::bail!("{}", answer.text),
        status => panic!("status {status}: {}", answer.text),
    }
}

/// Does something until it is acknowledged, on whatever server there is.
fn insist(stage: &Stage, mut attempt: impl FnMut(&str) -> anyhow::Result<()>) -> u64 {
    for attempts in 1.. {
        if attempt(&stage.url()).is_ok() {
            return attempts;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    unreachable!("the loop has no end")
}

struct Publisher {
    n: u64,
    rng: Rng,
    next: u64,
    /// Every version made so far, by id; sent at least once.
    made: Vec<(String, Vec<Version>)>,
    /// Versions made but held back: a later one goes first.
    held: Vec<(String, Version)>,
}

impl Publisher {
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

    fn batch(&mut self) -> Vec<(String, Version)> {
        let mut batch = Vec::new();
        for _ in 0..1 + self.rng.below(60) {
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
}

/// Publishes until told to stop; returns how many lines were acknowledged.
pub fn publish(n: u64, seed: u64, stage: &Stage, model: &Mutex<Model>) -> u64 {
    let rng = Rng::stream(seed, n);
    let mut publisher = Publisher { n, rng, next: 0, made: Vec::new(), held: Vec::new() };
    let mut lines = 0;
    while !stage.closing.load(Ordering::SeqCst) {
        let batch = publisher.batch();
        if batch.is_empty() {
            continue;
        }
        let text: String = batch.iter().map(|(id, version)| version.line(id)).collect();
        insist(stage, |url| post(url, &text));
        lines += batch.len() as u64;
        let mut model = model.lock().unwrap();
        for (id, version) in &batch {
            model.sent(id, version);
        }
        drop(model);
        if publisher.rng.percent(3) {
            conflict(&mut publisher, &batch, stage);
        }
        std::thread::sleep(Duration::from_micros(publisher.rng.below(4_000)));
    }
    lines
}

/// The same id and revision with other content, after the right one was acknowledged: never counts.
fn conflict(publisher: &mut Publisher, batch: &[(String, Version)], stage: &Stage) {
    let (id, version) = publisher.rng.pick(batch);
    let forged = Version { input: version.input + 1, void: false, ..version.clone() };
    let text = forged.line(id);
    insist(stage, |url| post(url, &text));
}

fn change(url: &str, method: &str, path: &str, body: &Value) -> anyhow::Result<()> {
    let body = body.to_string();
    let answer =
        ask(&agent(), method, &format!("{url}{path}"), "application/json", body.as_bytes())?;
    match answer.status {
        202 => Ok(()),
        408 | 503 => anyhow::bail!("{}", answer.text),
        status => panic!("status {status}: {}", answer.text),
    }
}

/// Changes prices and time zones, one after the other; returns how many changes were acknowledged.
pub fn administer(seed: u64, stage: &Stage, model: &Mutex<Model>) -> u64 {
    let mut rng = Rng::stream(seed, 100);
    let mut changes = 0;
    while !stage.closing.load(Ordering::SeqCst) {
        if rng.percent(60) {
            // "large" has no price at first, so its usage is unpriced until this comes by.
            let of = rng.below(MODELS.len() as u64) as usize;
            let from = Time(START.0 + rng.below(32 * 4) as i64 * (DAY / 4));
            let rates = [0; 3].map(|_| i128::from(rng.below(20_000_000)));
            let body = json!({ "prices": [entry(of, from, rates)] });
            insist(stage, |url| change(url, "POST", "/v1/prices", &body));
            model.lock().unwrap().prices.insert((of, from), rates);
        } else {
            let org = rng.below(ORGS.len() as u64) as usize;
            let zone = rng.below(ZONES.len() as u64) as usize;
            let body = json!({ "time_zone": ZONES[zone].0 });
            let path = format!("/v1/orgs/{}/time-zone", ORGS[org]);
            insist(stage, |url| change(url, "PUT", &path, &body));
            model.lock().unwrap().zones.insert(org, zone);
        }
        changes += 1;
        std::thread::sleep(Duration::from_millis(rng.below(150)));
    }
    changes
}
