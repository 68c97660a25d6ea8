//! Who changes prices and time zones, one change after the other, and notes what was acknowledged.

use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Duration;

use meterr_operators::rng::Rng;
use meterr_operators::time::{DAY, Time};
use serde_json::{Value, json};

use crate::model::{MODELS, Model, ORGS, START, ZONES, entry};
use crate::stage::Stage;
use crate::support::{agent, ask};

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
        let under_way = stage.changing.lock().unwrap();
        if rng.percent(60) {
            // "large" has no price at first, so its usage is unpriced until this comes by.
            let of = rng.below(MODELS.len() as u64) as usize;
            let from = Time(START.0 + rng.below(32 * 4) as i64 * (DAY / 4));
            let rates = [0; 3].map(|_| i128::from(rng.below(20_000_000)));
            let body = json!({ "prices": [entry(of, from, rates)] });
            stage.insist(|url| change(url, "POST", "/v1/prices", &body));
            model.lock().unwrap().prices.insert((of, from), rates);
        } else {
            let org = rng.below(ORGS.len() as u64) as usize;
            let zone = rng.below(ZONES.len() as u64) as usize;
            let body = json!({ "time_zone": ZONES[zone].0 });
            let path = format!("/v1/orgs/{}/time-zone", ORGS[org]);
            stage.insist(|url| change(url, "PUT", &path, &body));
            model.lock().unwrap().zones.insert(org, zone);
        }
        drop(under_way);
        changes += 1;
        std::thread::sleep(Duration::from_millis(rng.below(150)));
    }
    changes
}
