//! A deployment where everything happened that is hard to get right, and every answer about it.

#![allow(dead_code)] // each test program uses a part of it

use serde_json::{Value, json};

use super::Server;

pub const ORGS: [&str; 5] = ["acme", "globex", "initech", "umbrella", "hooli"];

pub fn event(n: usize) -> Value {
    let models = ["gpt-4o", "gpt-4o-mini", "no-such-model"];
    let features = ["chat", "agent"];
    json!({
        "id": format!("e{n}"), "time": format!("2026-02-{:02}T{:02}:30:00Z", 1 + n % 28, n % 24),
        "org": ORGS[n % 5], "user": format!("u{}", n % 7), "provider": "openai",
        "model": models[n % 3], "feature": features[n % 2],
        "input_tokens": 1_000 + n, "cached_input_tokens": n % 500, "output_tokens": 10 + n % 90,
        "tags": { "team": format!("t{}", n % 3) },
    })
}

pub fn lines<'a>(events: impl IntoIterator<Item = &'a Value>) -> String {
    events.into_iter().map(|event| format!("{event}\n")).collect()
}

/// Declares the view that [`answers`] asks for.
pub fn declare_view(server: &Server) {
    let view = json!({"name": "by_team", "by": ["tag:team"], "window": "day"});
    server.json("POST", "/v1/views", &view).expect(202);
}

/// Waits until everything published so far is counted.
pub fn settled(server: &Server) {
    server.until("everything is committed", || {
        let answer = server.get("/v1/shards").expect(200);
        let shards = answer["shards"].as_array().unwrap();
        shards.iter().all(|shard| shard["usage_head"] == shard["usage_position"]).then_some(())
    });
}

/// A deployment where everything happened that is hard to get right.
pub fn at_work(server: &Server, from: usize) {
    let all: Vec<Value> = (from..from + 200).map(event).collect();
    server.publish(&lines(&all));
    // Copies, corrections, one before its first version, and voids.
    server.publish(&lines(all.iter().step_by(9)));
    let changed = |n: usize, change: Value| {
        let mut event = event(n);
        event.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        event
    };
    let corrected: Vec<Value> = (from..from + 200)
        .step_by(11)
        .map(|n| {
            changed(n, json!({"revision": 1, "output_tokens": 5_000 + n, "user": "corrected"}))
        })
        .collect();
    server.publish(&lines(&corrected));
    server.publish(&lines(&[changed(from + 900, json!({"revision": 2, "output_tokens": 1}))]));
    server.publish(&lines(&[event(from + 900)]));
    let voided: Vec<Value> = (from + 5..from + 200)
        .step_by(50)
        .map(|n| changed(n, json!({"revision": 3, "void": true})))
        .collect();
    server.publish(&lines(&voided));
    // Dead letters: other content under the same id and revision, and a time to come.
    server.publish(&lines(&[changed(from + 1, json!({"output_tokens": 77}))]));
    server.publish(&lines(&[changed(from + 901, json!({"time": "2099-01-01T00:00:00Z"}))]));
    // What else decides figures.
    let zone = json!({"time_zone": "Asia/Kathmandu"});
    server.json("PUT", "/v1/orgs/globex/time-zone", &zone).expect(202);
    let price = json!({"prices": [{
        "provider": "openai", "model": "gpt-4o", "effective_from": "2026-02-10T00:00:00Z",
        "input": format!("1.{from}"), "output": "5",
    }]});
    let position = server.json("POST", "/v1/prices", &price).expect(202)["position"].clone();
    for org in ORGS {
        let position = position.as_str().unwrap();
        server.get(&format!("/v1/orgs/{org}/spend?min_position={position}")).expect(200);
    }
}

/// Every answer there is about the deployment, without what belongs to a process.
pub fn answers(server: &Server) -> Vec<(String, Value)> {
    settled(server);
    let mut paths: Vec<String> = Vec::new();
    for org in ORGS {
        for window in ["hour", "day", "month", "all"] {
            for by in ["none", "user", "model", "provider", "feature", "tag:team"] {
                paths.push(format!("/v1/orgs/{org}/spend?limit=10000&window={window}&by={by}"));
            }
        }
        paths.push(format!("/v1/orgs/{org}/users/u3/spend?window=day"));
        paths.push(format!("/v1/orgs/{org}/unpriced"));
        paths.push(format!("/v1/orgs/{org}/time-zone"));
        paths.push(format!("/v1/views/by_team/orgs/{org}"));
    }
    for by in ["org", "user", "model", "feature"] {
        paths.push(format!("/v1/top?by={by}&window=month&at=2026-02-10T00:00:00Z&n=1000"));
    }
    for path in ["/v1/dead-letters?limit=1000", "/v1/prices", "/v1/views"] {
        paths.push(path.to_owned());
    }
    let ask = |path: String| {
        let mut answer = server.get(&path).expect(200);
        let rows = answer.as_object_mut().unwrap();
        // A cursor is of the process that gave it.
        rows.remove("next_cursor");
        (path, answer)
    };
    paths.into_iter().map(ask).collect()
}

pub fn assert_same(found: &[(String, Value)], expected: &[(String, Value)]) {
    assert_eq!(found.len(), expected.len());
    for ((path, found), (_, expected)) in found.iter().zip(expected) {
        assert_eq!(found, expected, "{path}");
    }
}
