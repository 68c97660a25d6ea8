//! The binary on streams that a newer one has written to: it touches nothing it cannot read, says what is
//! the matter, and works on where it can.

#![allow(clippy::unwrap_used)]

#[path = "support/nats.rs"]
mod nats;
#[path = "support/mod.rs"]
mod support;

use async_nats::jetstream;
use meterr_operators::ids::shard_of;
use nats::{NatsOptions, NatsServer};
use serde_json::{Value, json};
use support::{Launch, Server, ran};

const SHARDS: u16 = 2;
const NEWER: &str = "written by a newer meterr (format 2, this binary reads up to 1)";

fn line(org: &str, id: &str) -> String {
    format!(
        "{{\"id\":\"{id}\",\"time\":\"2026-01-02T03:04:05Z\",\"org\":\"{org}\",\"user\":\"u\",\
         \"provider\":\"openai\",\"model\":\"gpt-4o-mini\",\"input_tokens\":1000000}}\n"
    )
}

/// Two orgs of different shards.
fn orgs() -> [&'static str; 2] {
    let names = ["acme", "globex", "initech", "umbrella", "hooli"];
    [0, 1].map(|shard| *names.iter().find(|org| shard_of(org, SHARDS).0 == shard).unwrap())
}

/// Appends a record by hand.
async fn append(context: &jetstream::Context, subject: &str, record: &Value) {
    let sent = context.publish(subject.to_owned(), record.to_string().into()).await.unwrap();
    sent.await.unwrap();
}

async fn last_of(context: &jetstream::Context, stream: &str) -> u64 {
    let stream = context.get_stream(stream).await.unwrap();
    stream.get_info().await.unwrap().state.last_sequence
}

fn shard(engine: &Server, shard: usize) -> Value {
    engine.get("/v1/shards").expect(200)["shards"][shard].clone()
}

fn until_stopped(engine: &Server, number: usize) -> String {
    engine.until("the shard to stop", || {
        let shard = shard(engine, number);
        (shard["state"] == "stopped").then(|| shard["problem"].as_str().unwrap().to_owned())
    })
}

#[tokio::test]
async fn a_commit_record_of_a_newer_format_stops_its_shard_and_no_other() {
    let server = NatsServer::start(NatsOptions::new());
    let context = jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let dir = tempfile::tempdir().unwrap();
    let launch = Launch::on(&dir.path().join("data"))
        .set("NODE__SHARDS", &SHARDS.to_string())
        .set("NATS__URL", &server.url());
    let engine = launch.start();
    let lines: String = orgs().map(|org| line(org, "e1")).concat();
    let position = engine.publish(&lines);
    for org in orgs() {
        engine.get(&format!("/v1/orgs/{org}/spend?window=all&min_position={position}")).expect(200);
    }
    engine.stop();

    // What a later version may have made of it: nothing is as it was but the epoch.
    append(&context, "out.0.commit", &json!({ "epoch": 1_000, "format": 2, "upto": [1, 2] })).await;
    let written = last_of(&context, "OUT_0").await;
    let engine = launch.spawn().unwrap_or_else(|(status, log)| panic!("{status}: {log}"));
    let why = until_stopped(&engine, 0);
    assert_eq!(why, format!("commit record at {written} cannot be read: {NEWER}"));
    // The other one works.
    let position = engine.publish(&line(orgs()[1], "e2"));
    let at = format!("/v1/orgs/{}/spend?window=all&min_position={position}", orgs()[1]);
    assert_eq!(engine.get(&at).expect(200)["rows"][0]["events"], 2);
    assert_eq!(engine.get("/readyz").status, 503);
    engine.stop();
    assert_eq!(last_of(&context, "OUT_0").await, written, "something was written behind it");

    let (code, _, err) = ran(&launch.run(&["verify"]));
    assert_ne!(code, 0);
    assert!(err.contains(NEWER), "{err}");
}

#[tokio::test]
async fn a_control_record_of_a_newer_format_is_never_skipped() {
    let server = NatsServer::start(NatsOptions::new());
    let context = jetstream::new(async_nats::connect(server.url()).await.unwrap());
    let dir = tempfile::tempdir().unwrap();
    let launch = Launch::on(&dir.path().join("data"))
        .set("NODE__SHARDS", &SHARDS.to_string())
        .set("NATS__URL", &server.url());
    let engine = launch.start();
    let position = engine.publish(&line("acme", "e1"));
    engine.get(&format!("/v1/orgs/acme/spend?window=all&min_position={position}")).expect(200);

    // Under a running node.
    append(&context, "control", &json!({ "type": "prices", "format": 2, "all": "anew" })).await;
    let at = last_of(&context, "CONTROL").await;
    engine.until("the log to say so", || engine.log().contains(NEWER).then_some(()));
    // Nothing is committed past it.
    assert!(engine.log().contains(&format!("control record at {at}: {NEWER}")), "{}", engine.log());
    engine.stop();

    // And at a start.
    let (status, log) = launch.spawn().err().unwrap();
    assert!(!status.success());
    assert!(log.contains(&format!("control record at {at}: {NEWER}")), "{log}");
}
