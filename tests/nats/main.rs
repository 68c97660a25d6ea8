//! The real binary on a real NATS server: every form of message a producer may send, what it refuses,
//! streams that went back, settings that would lose records, and a server that is away.

#![allow(clippy::unwrap_used)]

#[path = "../support/nats.rs"]
mod nats;
#[path = "../support/mod.rs"]
mod support;

use std::io::Write;

use async_nats::HeaderMap;
use async_nats::jetstream::Context;
use bytes::Bytes;
use meterr_operators::ids::shard_of;
use nats::{NatsOptions, NatsServer};
use serde_json::{Value, json};
use support::{Launch, Server, copy_dir};
use tokio::runtime::Runtime;

const SHARDS: u16 = 4;

/// A server with an engine on it, and a producer.
struct Stage {
    nats: NatsServer,
    launch: Launch,
    _dir: tempfile::TempDir,
    runtime: Runtime,
}

impl Stage {
    fn new(options: NatsOptions) -> Stage {
        let nats = NatsServer::start(options);
        let dir = tempfile::tempdir().unwrap();
        let launch = Launch::on(dir.path())
            .set("NATS__URL", &nats.url())
            .set("NODE__SHARDS", &SHARDS.to_string())
            .set("CHECKPOINT__INTERVAL", "1s");
        Stage { nats, launch, _dir: dir, runtime: Runtime::new().unwrap() }
    }

    /// Publishes as a program of anybody's does; returns the position.
    fn publish(
        &self,
        subject: &str,
        headers: &[(&str, &str)],
        payload: impl Into<Bytes>,
    ) -> String {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, *value);
        }
        let payload = payload.into();
        let ack = self.runtime.block_on(async {
            let client = async_nats::connect(self.nats.url()).await.unwrap();
            let context: Context = async_nats::jetstream::new(client);
            let sent = context.publish_with_headers(subject.to_owned(), map, payload);
            sent.await.unwrap().await.unwrap()
        });
        format!("{}:{}", ack.stream.strip_prefix("USAGE_").unwrap(), ack.sequence)
    }
}

fn event(id: &str, org: &str, input_tokens: u64) -> String {
    let event = json!({"id": id, "time": "2026-01-02T03:04:05Z", "org": org, "user": "ada",
        "provider": "openai", "model": "gpt-4o", "input_tokens": input_tokens, "output_tokens": 1});
    event.to_string()
}

/// Events of an org in all, once a position is counted.
fn events(server: &Server, org: &str, position: &str) -> u64 {
    let rows = server.rows(&format!("/v1/orgs/{org}/spend?window=all&min_position={position}"));
    rows.first().map_or(0, |row| row["events"].as_u64().unwrap())
}

fn reasons(server: &Server) -> Vec<String> {
    let letters = server.get("/v1/dead-letters?limit=100").expect(200);
    let letters = letters["rows"].as_array().unwrap().clone();
    let mut reasons: Vec<String> =
        letters.iter().map(|letter| letter["reason"].as_str().unwrap().to_owned()).collect();
    reasons.sort();
    reasons
}

#[test]
fn every_form_of_message_counts_and_what_does_not_belong_is_a_dead_letter() {
    let stage = Stage::new(NatsOptions::new().mapping(SHARDS));
    let server = stage.launch.start();
    let shard = shard_of("acme", SHARDS);
    let elsewhere = (shard.0 + 1) % SHARDS;
    // By the mapping, and by a producer that hashes.
    let at = stage.publish("usage.acme", &[], event("1", "acme", 10));
    assert_eq!(events(&server, "acme", &at), 1);
    let lines = format!("{}\n{}\n", event("2", "acme", 10), event("3", "acme", 10));
    stage.publish(&format!("usage.{shard}.acme"), &[], lines);
    // A gateway's batch of two orgs of the shard.
    let other = (0..).map(|n| format!("org-{n}")).find(|o| shard_of(o, SHARDS) == shard).unwrap();
    let lines = format!("{}\n{}", event("4", "acme", 10), event("1", &other, 10));
    stage.publish(&format!("usage.{shard}.@batch"), &[], lines);
    // Compressed, either way.
    let zipped = |text: String| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    };
    stage.publish("usage.acme", &[("content-encoding", "gzip")], zipped(event("5", "acme", 10)));
    let packed = zstd::encode_all(event("6", "acme", 10).as_bytes(), 1).unwrap();
    stage.publish("usage.acme", &[("Content-Encoding", "zstd")], packed);
    // A CloudEvent in binary mode: its attributes are headers.
    let data = json!({"org": "acme", "user": "ada", "provider": "openai", "model": "gpt-4o",
        "input_tokens": 10, "output_tokens": 1});
    let headers = [
        ("ce-specversion", "1.0"),
        ("ce-type", "meterr.usage"),
        ("ce-source", "/gateway"),
        ("ce-id", "7"),
        ("ce-time", "2026-01-02T03:04:05Z"),
        ("content-type", "application/json"),
    ];
    stage.publish("usage.acme", &headers, data.to_string());
    // An administrator's old usage.
    let old = event("8", "acme", 10).replace("2026-01-02", "2020-01-02");
    let at = stage.publish(&format!("usage.{shard}.@backfill"), &[], old);
    assert_eq!(events(&server, "acme", &at), 8);
    assert_eq!(events(&server, &other, &at), 1);
    assert_eq!(reasons(&server), Vec::<String>::new());
    // Sent again with other message ids: known.
    let at = stage.publish("usage.acme", &[("Nats-Msg-Id", "x")], event("1", "acme", 10));
    assert_eq!(events(&server, "acme", &at), 8);
    // What does not belong: another org than its subject's, another shard, no event at all.
    stage.publish("usage.acme", &[], event("9", &other, 10));
    let wrong = stage.publish(&format!("usage.{elsewhere}.acme"), &[], event("9", "acme", 10));
    stage.publish("usage.acme", &[("content-encoding", "gzip")], "not gzip");
    let at = stage.publish("usage.acme", &[], "{\"id\":");
    assert_eq!(events(&server, "acme", &format!("{at},{wrong}")), 8);
    let all = server.get(&format!("/v1/top?by=org&window=all&min_position={wrong}")).expect(200);
    assert_eq!(all["rows"].as_array().unwrap().len(), 2, "{all}");
    assert_eq!(reasons(&server), ["malformed", "malformed", "org_mismatch", "wrong_shard"]);
    server.stop();
    let report = stage.launch.verified();
    assert_eq!(report["events"], 9, "{report}");
}

/// State of the org's shard.
fn state(server: &Server, org: &str) -> (String, String) {
    let shards = server.get("/v1/shards").expect(200);
    let shard = &shards["shards"][usize::from(shard_of(org, SHARDS).0)];
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    (text(&shard["state"]), text(&shard["problem"]))
}

/// A server whose files are put back to an earlier moment; `running`: under an engine at work.
fn rolled_back(running: bool) {
    let mut stage = Stage::new(NatsOptions::new().mapping(SHARDS).sync_always());
    let server = stage.launch.start();
    let at = stage.publish("usage.acme", &[], event("1", "acme", 10));
    assert_eq!(events(&server, "acme", &at), 1);
    let kept = tempfile::tempdir().unwrap();
    stage.nats.stop();
    copy_dir(&stage.nats.store_dir(), kept.path());
    stage.nats.restart();
    let at = stage.publish("usage.acme", &[], event("2", "acme", 10));
    assert_eq!(events(&server, "acme", &at), 2);
    let server = if running {
        Some(server)
    } else {
        server.stop();
        None
    };
    stage.nats.kill();
    std::fs::remove_dir_all(stage.nats.store_dir()).unwrap();
    copy_dir(kept.path(), &stage.nats.store_dir());
    stage.nats.restart();
    let server = server.unwrap_or_else(|| {
        stage.launch.spawn().unwrap_or_else(|(status, log)| panic!("{status}: {log}"))
    });
    // Somebody publishes at the position that was there before.
    stage.publish("usage.acme", &[], event("3", "acme", 10));
    let problem = server.until("the shard stops", || {
        let (state, problem) = state(&server, "acme");
        (state == "stopped").then_some(problem)
    });
    let said = ["restored underneath", "older", "not the one", "already published"];
    assert!(said.iter().any(|words| problem.contains(words)), "{problem}");
    assert_eq!(server.get("/readyz").status, 503);
    let metrics = server.get("/metrics").text;
    let shard = shard_of("acme", SHARDS);
    let stopped = format!("meterr_shard_stopped{{shard=\"{shard}\"}} 1");
    assert!(metrics.contains(&stopped), "{metrics}");
}

#[test]
fn a_stream_that_went_back_under_a_running_engine_stops_its_shard() {
    rolled_back(true);
}

#[test]
fn a_stream_that_went_back_while_the_engine_was_down_stops_its_shard() {
    rolled_back(false);
}

#[test]
fn a_mapping_by_another_number_of_shards_is_refused_and_a_missing_one_is_said() {
    let stage = Stage::new(NatsOptions::new().mapping(SHARDS * 2));
    let (_, log) = stage.launch.spawn().err().expect("a wrong mapping is no start");
    let fix = r#""usage.*": "usage.{{partition(4,1)}}.{{wildcard(1)}}""#;
    assert!(log.contains(fix), "{log}");
    let stage = Stage::new(NatsOptions::new());
    let log = stage.launch.start().stop();
    assert!(log.contains("does not map usage.<org>") && log.contains(fix), "{log}");
    let (_, log) = stage.launch.clone().set("NATS__MAPPING", "require").spawn().err().unwrap();
    assert!(log.contains("does not map usage.<org>") && log.contains(fix), "{log}");
}

#[test]
fn settings_that_would_lose_records_are_named_with_the_command_that_mends_them() {
    let stage = Stage::new(NatsOptions::new().mapping(SHARDS));
    stage.launch.start().stop();
    stage.runtime.block_on(async {
        let client = async_nats::connect(stage.nats.url()).await.unwrap();
        let context = async_nats::jetstream::new(client);
        let mut config = context.get_stream("USAGE_1").await.unwrap().cached_info().config.clone();
        config.max_age = std::time::Duration::from_secs(3_600);
        context.update_stream(config).await.unwrap();
    });
    let (status, log) = stage.launch.spawn().err().expect("messages would expire");
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("nats stream edit USAGE_1 --max-age=-1"), "{log}");
    let (_, log) = stage.launch.clone().set("NATS__REPLICAS", "3").spawn().err().unwrap();
    assert!(log.contains("--replicas=3"), "{log}");
}

#[test]
fn a_server_that_is_away_is_waited_for_and_seen_in_metrics() {
    let mut stage = Stage::new(NatsOptions::new().mapping(SHARDS));
    let (status, log) = Launch::on(stage._dir.path())
        .set("NATS__URL", "nats://u:secret@127.0.0.1:9")
        .spawn()
        .err()
        .unwrap();
    assert_eq!(status.code(), Some(1));
    assert!(log.contains("cannot connect to NATS") && !log.contains("secret"), "{log}");
    let server = stage.launch.start();
    let at = stage.publish("usage.acme", &[], event("1", "acme", 10));
    assert_eq!(events(&server, "acme", &at), 1);
    stage.nats.kill();
    let metric = |name: &str| {
        let text = server.get("/metrics").text;
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("no {name}")).parse::<f64>().unwrap()
    };
    server.until("not connected", || (metric("meterr_nats_connected") == 0.0).then_some(()));
    // What is committed is there to be read all the same.
    assert_eq!(events(&server, "acme", &at), 1);
    stage.nats.restart();
    let at = stage.publish("usage.acme", &[], event("2", "acme", 10));
    assert_eq!(events(&server, "acme", &at), 2);
    assert!(metric("meterr_nats_reconnects_total") > 0.0);
    assert_eq!(metric("meterr_nats_connected"), 1.0);
    server.stop();
    stage.launch.verified();
}
