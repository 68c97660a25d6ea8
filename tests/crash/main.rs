//! The promise under `kill -9`: every acknowledged event is in the views, once, and a subscriber who
//! resumes sees each commit of its org once and in order.
//!
//! Publishers send batches of new events, duplicates, revisions, voids, late events and conflicting
//! duplicates, and an administrator changes prices and time zones, while the real binary is killed at
//! random moments, also in the middle of starting. Whatever got no answer is sent again. Checkpoints
//! are taken as often as settings allow. In the end every view is compared with `model.rs`, which
//! knows only what was sent, what subscribers saw with the output log, and `meterr verify` must agree.
//!
//! `METERR_CRASH_ROUNDS` sets the rounds (50 by default; thousands are fine), `METERR_CRASH_SEED`
//! repeats what publishers sent and when the server was killed, as far as the machine repeats itself.

#![allow(clippy::unwrap_used)]

mod administrator;
mod model;
mod publisher;
mod stage;
mod subscriber;
#[path = "../support/mod.rs"]
mod support;
mod trouble;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use meterr_operators::rng::Rng;
use support::{Launch, Server, number_from_env};

use model::{Model, ORGS};
use stage::Stage;

#[test]
fn every_acknowledged_event_counts_once_through_kill_9() {
    let rounds = number_from_env("METERR_CRASH_ROUNDS", 50);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let seed = number_from_env("METERR_CRASH_SEED", now.as_millis() as u64);
    println!("METERR_CRASH_SEED={seed} METERR_CRASH_ROUNDS={rounds}");
    let dir = tempfile::tempdir().unwrap();
    let launch = Launch::on(dir.path())
        .set("NODE__SHARDS", "4")
        .set("NODE__WORKERS", "2")
        .set("CHECKPOINT__INTERVAL", "1s")
        .set("CHECKPOINT__EVENTS_MAX", "1000")
        .set("LOG__SEGMENT_BYTES", "1MiB")
        .set("TELEMETRY__LOG", "warn");
    let stage = Arc::new(Stage::default());
    let model = Arc::new(Mutex::new(Model::default()));

    let publishers: Vec<_> = (0..3)
        .map(|n| {
            let (stage, model) = (stage.clone(), model.clone());
            std::thread::spawn(move || publisher::publish(n, seed, &stage, &model))
        })
        .collect();
    let administrator = {
        let (stage, model) = (stage.clone(), model.clone());
        std::thread::spawn(move || administrator::administer(seed, &stage, &model))
    };
    let subscribers: Vec<_> = ORGS
        .iter()
        .map(|org| {
            let stage = stage.clone();
            std::thread::spawn(move || subscriber::follow(org, &stage))
        })
        .collect();

    let mut rng = Rng::stream(seed, 1_000);
    let mut killed_early = 0;
    for round in 0..rounds {
        let server =
            launch.spawn().unwrap_or_else(|(status, log)| panic!("round {round}: {status}: {log}"));
        if rng.percent(20) {
            // In the middle of restoring and replaying.
            std::thread::sleep(Duration::from_micros(rng.below(60_000)));
            killed_early += 1;
        } else {
            stage.set_url(Some(&server.url));
            server.until_ready();
            std::thread::sleep(Duration::from_micros(50_000 + rng.below(500_000)));
        }
        sound(&server.log(), round);
        server.kill();
        stage.set_url(None);
    }

    let server = launch.start();
    stage.set_url(Some(&server.url));
    stage.closing.store(true, Ordering::SeqCst);
    let mut lines = 0;
    for publisher in publishers {
        lines += publisher.join().unwrap();
    }
    let changes = administrator.join().unwrap();
    let model = Arc::into_inner(model).unwrap().into_inner().unwrap();
    println!("{lines} lines, {changes} changes of prices and zones, {killed_early} early kills");
    assert!(lines > 20 * rounds && changes > 0, "too little happened: {lines} lines");
    model.check(&server, &everywhere(&server));
    // Everything once more: nothing may change.
    let lines: Vec<_> = model.events.iter().map(|((_, id), version)| version.line(id)).collect();
    for batch in lines.chunks(500) {
        let text: String = batch.concat();
        publisher::post(&server.url, &text).unwrap();
    }
    model.check(&server, &everywhere(&server));

    stage.over.store(true, Ordering::SeqCst);
    let states: Vec<_> = ORGS.iter().map(|org| subscriber::snapshot(&server.url, org)).collect();
    server.stop();
    for (subscriber, state) in subscribers.into_iter().zip(states) {
        subscriber.join().unwrap().check(dir.path(), &state);
    }
    let report = launch.verified();
    assert_eq!(report["events"], model.events_counted(), "{report}");
}

/// The heads of all logs: what every acknowledged record is included in.
fn everywhere(server: &Server) -> String {
    let shards = server.get("/v1/shards").expect(200);
    let control =
        server.get("/v1/prices?model=none").expect(200)["as_of"].as_str().unwrap().to_owned();
    let mut at: Vec<String> = shards["shards"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|shard| shard["usage_head"] != 0)
        .map(|shard| format!("{}:{}", shard["shard"], shard["usage_head"]))
        .collect();
    at.push(control);
    at.join(",")
}

/// A server that was started on what a crash left must have nothing to complain of but torn ends.
fn sound(log: &str, round: u64) {
    for line in log.lines() {
        let torn = line.contains("cut a torn end off the log");
        assert!(
            torn || !line.contains("ERROR") && !line.contains("panicked"),
            "round {round}: {line}"
        );
    }
}
