//! Disks that fail or lie: a full disk, damaged files, a row that says something wrong. The binary
//! may refuse, stop and complain; it may never show a wrong figure, lose what it acknowledged, or
//! panic.

#![allow(clippy::unwrap_used)]

mod damage;
mod full_disk;
mod planted;
#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;

use support::money::pico;
use support::{Launch, Server};

/// Orgs in different shards of two.
pub const ORGS: [&str; 4] = ["acme", "globex", "initech", "umbrella"];

/// Events and pico-dollars by org.
pub type Totals = BTreeMap<String, (i64, i128)>;

/// A server with few shards that takes checkpoints as often as it may.
pub fn launch(dir: &std::path::Path) -> Launch {
    Launch::on(dir)
        .set("NODE__SHARDS", "2")
        .set("NODE__WORKERS", "1")
        .set("CHECKPOINT__EVENTS_MAX", "1000")
        .set("LOG__SEGMENT_BYTES", "1MiB")
}

/// The `n`th event: its line, org and cost by the price book that comes with meterr.
pub fn event(n: u64) -> (String, &'static str, i128) {
    let org = ORGS[(n % 4) as usize];
    let (input, output) = (100 + n as i128 % 1_000, 10 + n as i128 % 77);
    let line = format!(
        "{{\"id\":\"e{n}\",\"time\":\"2026-02-{:02}T10:00:00Z\",\"org\":\"{org}\",\"user\":\"u{}\",\
         \"provider\":\"openai\",\"model\":\"gpt-4o-mini\",\"feature\":\"chat\",\
         \"input_tokens\":{input},\"output_tokens\":{output}}}\n",
        1 + n % 28,
        n % 300,
    );
    (line, org, input * 150_000 + output * 600_000)
}

/// Lines of a range of events, added to the totals.
pub fn batch(range: std::ops::Range<u64>, totals: &mut Totals) -> String {
    let mut lines = String::new();
    for n in range {
        let (line, org, cost) = event(n);
        lines.push_str(&line);
        let total = totals.entry(org.to_owned()).or_default();
        total.0 += 1;
        total.1 += cost;
    }
    lines
}

/// Waits until live shards have committed what is in their logs; until then two questions may have
/// two answers.
pub fn until_settled(server: &Server) {
    server.until("all of the log committed", || {
        let answer = server.get("/v1/shards").expect(200);
        let shards = answer["shards"].as_array().unwrap();
        shards
            .iter()
            .filter(|shard| shard["state"] == "live")
            .all(|shard| shard["usage_head"] == shard["usage_position"])
            .then_some(())
    });
}

/// Totals of an org by four questions, which must agree; `None` when the server says 503.
pub fn totals_of(server: &Server, org: &str) -> Option<(i64, i128)> {
    let mut found = Vec::new();
    for question in ["all&by=none", "day&by=user", "month&by=model", "hour&by=none"] {
        let path = format!("/v1/orgs/{org}/spend?limit=10000&window={question}");
        let answer = server.get(&path);
        if answer.status == 503 {
            return None;
        }
        let rows = answer.expect(200)["rows"].as_array().unwrap().clone();
        let events = rows.iter().map(|row| row["events"].as_i64().unwrap()).sum();
        let cost = rows.iter().map(|row| pico(row["cost"].as_str().unwrap())).sum();
        found.push((events, cost));
    }
    assert!(found.windows(2).all(|two| two[0] == two[1]), "{org}: {found:?}");
    Some(found[0])
}
