//! SPEND-1 through the real binary: a million events and ten thousand duplicates lead to exactly the
//! three expected files; after a price is halved in retrospect, to exactly the repriced ones; and to the
//! same after `kill -9`. Over HTTP into the embedded log, and over NATS, with a server as it comes and
//! with one that syncs before it acknowledges.
//!
//! The workload is made by `benches/spend1/make`, which `tests/run` calls; without it this fails. The
//! files' figures come from the generator's own numbers. The repriced ones are recomputed here from
//! the lines, which also repeats the files from the lines as a check of this recomputation.

#![allow(clippy::unwrap_used)]

#[path = "../support/nats.rs"]
mod nats;
#[path = "../support/mod.rs"]
mod support;

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Instant;

use nats::{NatsOptions, NatsServer};
use serde::Deserialize;
use serde_json::json;
use support::{Launch, Server, agent, ask, money::pico};

/// Lines in a request.
const BATCH_LINES: usize = 10_000;
const REPRICED: &str = "gpt-4o-mini";
const REPRICED_FROM: &str = "2026-01-15T00:00:00Z";

/// Events, input, cached, output, pico-dollars.
type Sums = [i128; 5];
type Rows = HashMap<String, Sums>;

/// The three views, in the order of [`NAMES`].
type Views = [Rows; 3];
const NAMES: [&str; 3] = ["user_month", "org_month", "org_model_day"];

fn file(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/spend1");
    let path = dir.join(name);
    assert!(
        dir.join("complete").exists() && path.exists(),
        "{} is missing or incomplete; make it with: benches/spend1/make",
        path.display()
    );
    path
}

fn expected() -> Views {
    NAMES.map(|name| {
        let text = support::read(&file(&format!("{name}.csv")));
        let row = |line: &str| {
            let (key, figures) = line.split_once(',').unwrap();
            let sums: Vec<i128> = figures.split(',').map(|n| n.parse().unwrap()).collect();
            (key.to_owned(), Sums::try_from(sums).unwrap())
        };
        text.lines().skip(1).map(row).collect()
    })
}

#[derive(Deserialize)]
struct Event<'a> {
    id: &'a str,
    time: &'a str,
    org: &'a str,
    user: &'a str,
    provider: &'a str,
    model: &'a str,
    input_tokens: i64,
    cached_input_tokens: i64,
    output_tokens: i64,
}

#[derive(Deserialize)]
struct Price {
    provider: String,
    model: String,
    input: i128,
    cached: i128,
    output: i128,
}

/// The views by the lines and the prices beside the generator, before and after the repricing.
fn recomputed() -> [Views; 2] {
    let prices = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/spend1/spend1_prices.json");
    let prices: Vec<Price> = serde_json::from_str(&support::read(&prices)).unwrap();
    let mut before = Views::default();
    let mut after = Views::default();
    let mut seen = HashSet::new();
    for line in BufReader::new(std::fs::File::open(file("events.ndjson")).unwrap()).lines() {
        let line = line.unwrap();
        let e: Event<'_> = serde_json::from_str(&line).unwrap();
        if !seen.insert(e.id.to_owned()) {
            continue;
        }
        let price = prices.iter().find(|p| p.model == e.model && p.provider == e.provider).unwrap();
        let cost = price.input * i128::from(e.input_tokens - e.cached_input_tokens)
            + price.cached * i128::from(e.cached_input_tokens)
            + price.output * i128::from(e.output_tokens);
        // Times of the workload are all of one form, so that they sort as text.
        let halved = e.model == REPRICED && e.time >= REPRICED_FROM.trim_end_matches('Z');
        let new_cost = if halved { cost / 2 } else { cost };
        assert_eq!(new_cost * if halved { 2 } else { 1 }, cost, "half a pico-dollar is lost");
        let keys = [
            format!("{}|{}|{}", e.org, e.user, &e.time[..7]),
            format!("{}|{}", e.org, &e.time[..7]),
            format!("{}|{}|{}", e.org, e.model, &e.time[..10]),
        ];
        for (views, cost) in [(&mut before, cost), (&mut after, new_cost)] {
            for (view, key) in views.iter_mut().zip(&keys) {
                let sums = match view.get_mut(key) {
                    Some(sums) => sums,
                    None => view.entry(key.clone()).or_default(),
                };
                let counts = [1, e.input_tokens, e.cached_input_tokens, e.output_tokens];
                for (sum, count) in sums.iter_mut().zip(counts) {
                    *sum += i128::from(count);
                }
                sums[4] += cost;
            }
        }
    }
    [before, after]
}

/// Sends all lines in requests of several threads; returns the position that has them all.
fn publish(server: &Server) -> String {
    let lines = BufReader::new(std::fs::File::open(file("events.ndjson")).unwrap()).lines();
    let lines = std::sync::Mutex::new(lines);
    let mut at: HashMap<String, u64> = HashMap::new();
    let accepted = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    let (agent, url) = (agent(), format!("{}/v1/events", server.url));
                    let mut positions = Vec::new();
                    let mut accepted = 0;
                    loop {
                        let mut body = String::new();
                        for line in lines.lock().unwrap().by_ref().take(BATCH_LINES) {
                            body.push_str(&line.unwrap());
                            body.push('\n');
                        }
                        if body.is_empty() {
                            return (accepted, positions);
                        }
                        let media_type = "application/x-ndjson";
                        let answer =
                            ask(&agent, "POST", &url, media_type, body.as_bytes()).unwrap();
                        let answer = answer.expect(202);
                        assert_eq!(answer["rejected_total"], 0, "{answer}");
                        accepted += answer["accepted"].as_u64().unwrap();
                        positions.push(answer["position"].as_str().unwrap().to_owned());
                    }
                })
            })
            .collect();
        let mut accepted = 0;
        for thread in threads {
            let (more, positions) = thread.join().unwrap();
            accepted += more;
            for (shard, position) in positions.iter().flat_map(|p| p.split(',')).map(|part| {
                let (shard, position) = part.split_once(':').unwrap();
                (shard.to_owned(), position.parse::<u64>().unwrap())
            }) {
                let known = at.entry(shard).or_default();
                *known = position.max(*known);
            }
        }
        accepted
    });
    assert_eq!(accepted, 1_009_960);
    let at: Vec<String> = at.iter().map(|(shard, at)| format!("{shard}:{at}")).collect();
    at.join(",")
}

#[derive(Deserialize)]
struct Row {
    window_start: String,
    key: Option<String>,
    events: i64,
    input_tokens: i64,
    cached_input_tokens: i64,
    output_tokens: i64,
    cost: String,
    unpriced_events: i64,
}

#[derive(Deserialize)]
struct Page {
    rows: Vec<Row>,
    next_cursor: Option<String>,
}

/// The three views as the server shows them, org by org.
fn shown(server: &Server, orgs: &[String], position: &str) -> Views {
    let mut views = Views::default();
    for org in orgs {
        for (view, (window, by, length)) in
            views.iter_mut().zip([("month", "user", 7), ("month", "none", 7), ("day", "model", 10)])
        {
            let path = format!(
                "/v1/orgs/{org}/spend?window={window}&by={by}&limit=10000&min_position={position}"
            );
            let mut next = String::new();
            loop {
                let answer = server.get(&format!("{path}{next}"));
                assert_eq!(answer.status, 200, "{}", answer.text);
                let page: Page = serde_json::from_str(&answer.text).unwrap();
                for row in page.rows {
                    let key = match &row.key {
                        Some(key) => format!("{org}|{key}|{}", &row.window_start[..length]),
                        None => format!("{org}|{}", &row.window_start[..length]),
                    };
                    assert_eq!(row.unpriced_events, 0, "{key}");
                    let counts =
                        [row.events, row.input_tokens, row.cached_input_tokens, row.output_tokens];
                    let [events, input, cached, output] = counts.map(i128::from);
                    let sums = [events, input, cached, output, pico(&row.cost)];
                    assert_eq!(view.insert(key, sums), None, "a row came twice");
                }
                match page.next_cursor {
                    Some(cursor) => next = format!("&cursor={cursor}"),
                    None => break,
                }
            }
        }
    }
    views
}

fn same(what: &str, found: &Views, expected: &Views) {
    for ((name, found), expected) in NAMES.iter().zip(found).zip(expected) {
        let wrong = expected.iter().filter(|(key, sums)| found.get(*key) != Some(sums)).count();
        let first = expected.iter().find(|(key, sums)| found.get(*key) != Some(sums));
        let found_first = first.and_then(|(key, _)| found.get(key));
        assert_eq!(wrong, 0, "{what}: {name}: {first:?} is {found_first:?}");
        assert_eq!(found.len(), expected.len(), "{what}: {name}: rows nothing led to");
        println!("{what}: {name}: all {} rows are exact", expected.len());
    }
}

/// What must come out before and after the repricing.
fn right() -> &'static [Views; 2] {
    static RIGHT: OnceLock<[Views; 2]> = OnceLock::new();
    RIGHT.get_or_init(|| {
        let [before, after] = recomputed();
        same("recomputation", &before, &expected());
        [before, after]
    })
}

/// Publishes by `publish`, and looks at everything.
fn exact(launch: &Launch, publish: impl FnOnce(&Server) -> String) {
    let [before, after] = right();
    let mut orgs: Vec<String> =
        before[1].keys().map(|key| key.split('|').next().unwrap().to_owned()).collect();
    orgs.sort();
    orgs.dedup();

    let server = launch.start();
    let began = Instant::now();
    let position = publish(&server);
    println!("published in {:?}", began.elapsed());
    same("published", &shown(&server, &orgs, &position), before);

    let halved = json!({ "prices": [{
        "provider": "openai",
        "model": REPRICED,
        "effective_from": REPRICED_FROM,
        "input": "0.075",
        "cached_input": "0.0375",
        "output": "0.3",
    }] });
    let preview = server.json("POST", "/v1/prices/preview", &halved).expect(200);
    let change = |views: &Views| views[1].values().map(|sums| sums[4]).sum::<i128>();
    let difference = pico(preview["cost_before"].as_str().unwrap())
        - pico(preview["cost_after"].as_str().unwrap());
    assert_eq!(difference, change(before) - change(after), "{preview}");
    let answer = server.json("POST", "/v1/prices", &halved).expect(202);
    let control = answer["position"].as_str().unwrap();
    let position = format!("{position},{control}");
    same("repriced", &shown(&server, &orgs, &position), after);

    server.kill();
    let began = Instant::now();
    let server = launch.start();
    println!("ready {:?} after kill -9", began.elapsed());
    same("after kill -9", &shown(&server, &orgs, &position), after);
    server.stop();
    let report = launch.verified();
    assert_eq!(report["events"], 1_000_000, "{report}");
}

#[test]
fn spend_1_is_exact_before_and_after_a_repricing_and_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    exact(&Launch::on(dir.path()), publish);
}

fn exact_on_nats(options: NatsOptions) {
    let nats = NatsServer::start(options.mapping(16));
    let dir = tempfile::tempdir().unwrap();
    exact(&Launch::on(dir.path()).set("NATS__URL", &nats.url()), |_| {
        let events = file("events.ndjson");
        let args = ["publish", events.to_str().unwrap(), "--nats", &nats.url(), "--json"];
        let answer = support::run_json(&args);
        assert_eq!(answer["accepted"], 1_009_960, "{answer}");
        answer["position"].as_str().unwrap().to_owned()
    });
}

#[test]
fn spend_1_is_exact_on_a_nats_server_as_it_comes() {
    exact_on_nats(NatsOptions::new());
}

#[test]
fn spend_1_is_exact_on_a_nats_server_that_syncs_before_it_acknowledges() {
    exact_on_nats(NatsOptions::new().sync_always());
}
