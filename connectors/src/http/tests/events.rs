//! Publishing.

use std::collections::HashMap;
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

use meterr_operators::ids::{ShardId, shard_of};
use proptest::prelude::*;

use super::super::{Accepted, HttpSettings, REJECTED_MAX};
use super::fake::SHARDS;
use super::*;

fn line(id: usize, org: &str) -> String {
    format!("{{\"id\":\"{id}\",\"org\":\"{org}\"}}")
}

/// An org of each shard.
fn orgs() -> Vec<String> {
    (0..SHARDS)
        .map(|shard| {
            let mut names = (0..).map(|n| format!("org{n}"));
            names.find(|org| shard_of(org, SHARDS) == ShardId(shard)).unwrap()
        })
        .collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    zstd::encode_all(bytes, 3).unwrap()
}

fn encoded(server: &Running, coding: &str, body: &[u8]) -> Reply {
    let headers = [("content-type", "application/x-ndjson"), ("content-encoding", coding)];
    server.send("POST", "/v1/events", &headers, body)
}

#[test]
fn lines_reach_their_shard_in_order_and_the_position_comes_back() {
    let server = run(small());
    let orgs = orgs();
    let (a, b) = (line(1, &orgs[1]), line(2, &orgs[3]));
    let c = line(3, &orgs[1]);
    // Blank lines, carriage returns and a missing last newline are no events and no errors.
    let body = format!("{a}\r\n\n{b}\n  \n{c}");
    let answer: Accepted = serde_json::from_value(server.ndjson(body.as_bytes()).ok(202)).unwrap();
    assert_eq!((answer.accepted, answer.rejected_total), (3, 0));
    assert_eq!(answer.position.to_string(), "1:101,3:103");
    let published = server.fake.published.lock();
    assert_eq!(published.len(), 2);
    assert_eq!(published[0].subject, "usage.1.@batch");
    assert_eq!(published[0].payload, format!("{a}\n{c}\n"));
    assert_eq!(published[0].lines, [1, 5]);
    assert_eq!(published[1].subject, "usage.3.@batch");
    assert_eq!(published[1].payload, format!("{b}\n"));
    assert_eq!(published[1].lines, [3]);
}

#[test]
fn backfill_is_another_subject() {
    let server = run(small());
    let body = line(1, &orgs()[2]);
    let reply = server.post("/v1/events?backfill=true", "application/x-ndjson", body.as_bytes());
    reply.ok(202);
    assert_eq!(server.fake.published.lock()[0].subject, "usage.2.@backfill");
    let reply = server.post("/v1/events?backfill=yes", "application/x-ndjson", body.as_bytes());
    let problem = reply.problem(400, "parameter");
    assert_eq!(problem["parameter"], "backfill");
    assert_eq!(problem["value"], "yes");
    assert_eq!(problem["allowed"], "one of true, false");
}

#[test]
fn one_bad_line_spoils_only_itself() {
    let server = run(small());
    let body = format!("{}\nrubbish\n{{\"id\":\"2\",\"org\":\"a.b\"}}\n", line(1, "acme"));
    let answer = server.ndjson(body.as_bytes()).ok(202);
    assert_eq!(answer["accepted"], 1);
    assert_eq!(answer["rejected_total"], 2);
    assert_eq!(answer["rejected"][0]["line"], 2);
    assert_eq!(answer["rejected"][0]["reason"], "malformed");
    assert_eq!(answer["rejected"][1]["line"], 3);
    assert_eq!(answer["rejected"][1]["reason"], "bad_value");
    assert!(answer["rejected"][1]["detail"].as_str().unwrap().contains("\"a.b\""));
}

#[test]
fn nothing_is_written_when_every_line_is_refused() {
    let server = run(small());
    let answer = server.ndjson(b"rubbish\n").ok(202);
    assert_eq!((&answer["accepted"], &answer["position"]), (&0.into(), &"".into()));
    assert!(server.fake.published.lock().is_empty());
}

#[test]
fn refused_lines_are_listed_up_to_a_bound_and_counted_beyond() {
    let server = run(small());
    let body = "rubbish\n".repeat(REJECTED_MAX + 7);
    let answer = server.ndjson(body.as_bytes()).ok(202);
    assert_eq!(answer["rejected_total"], REJECTED_MAX + 7);
    assert_eq!(answer["rejected"].as_array().unwrap().len(), REJECTED_MAX);
}

#[test]
fn an_array_becomes_one_line_an_event() {
    let server = run(small());
    let body = b"[{\n  \"id\": \"1\",\r\n  \"org\": \"acme\"},\n rubbish]";
    server.post("/v1/events", "application/json", body).problem(400, "body");
    let body = b"[{\n  \"id\": \"1\",\r\n  \"org\": \"acme\"},\n 7]";
    let reply = server.post("/v1/events", "Application/JSON; charset=utf-8", body);
    let answer = reply.ok(202);
    assert_eq!(answer["accepted"], 1);
    assert_eq!(answer["rejected"][0]["line"], 2);
    let payload = server.fake.published.lock()[0].payload.clone();
    assert_eq!(payload, "{   \"id\": \"1\",    \"org\": \"acme\"}\n");
}

#[test]
fn compressed_bodies_are_read() {
    let server = run(small());
    let body = (0..3_000).map(|n| line(n, "acme") + "\n").collect::<String>();
    let halves = body.split_at(body.len() / 2);
    let members = [gzip(halves.0.as_bytes()), gzip(halves.1.as_bytes())].concat();
    let frames = [zstd(halves.0.as_bytes()), zstd(halves.1.as_bytes())].concat();
    for (coding, bytes) in [
        ("gzip", gzip(body.as_bytes())),
        ("X-Gzip", gzip(body.as_bytes())),
        ("gzip", members),
        ("zstd", zstd(body.as_bytes())),
        ("zstd", frames),
        ("identity", body.clone().into_bytes()),
    ] {
        assert_eq!(encoded(&server, coding, &bytes).ok(202)["accepted"], 3_000, "{coding}");
    }
}

#[test]
fn damaged_compression_is_a_bad_body() {
    let server = run(small());
    let body = line(1, "acme").repeat(50);
    for (coding, good) in [("gzip", gzip(body.as_bytes())), ("zstd", zstd(body.as_bytes()))] {
        let truncated = &good[..good.len() - 5];
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 0x55;
        let trailing = [good.as_slice(), b"rubbish"].concat();
        for bytes in [truncated, &trailing, body.as_bytes()] {
            let problem = encoded(&server, coding, bytes).problem(400, "body");
            assert!(problem["detail"].as_str().unwrap().contains(coding), "{problem}");
        }
        // zstd frames have no checksum by default: a flipped bit may decompress to other bytes.
        assert!([202, 400].contains(&encoded(&server, coding, &flipped).status));
    }
    assert!(server.fake.published.lock().is_empty());
    let reply = encoded(&server, "br", body.as_bytes());
    reply.problem(415, "media-type");
    assert_eq!(reply.header("accept-encoding"), Some("gzip, zstd"));
    encoded(&server, "gzip, gzip", body.as_bytes()).problem(415, "media-type");
}

#[test]
fn a_bomb_is_stopped_at_the_limit() {
    let server = run(HttpSettings { body_bytes_max: 1 << 20, ..small() });
    let zeros = vec![b'\n'; 256 << 20];
    for (coding, bomb) in [("gzip", gzip(&zeros[..64 << 20])), ("zstd", zstd(&zeros))] {
        assert!(bomb.len() < 1 << 20);
        let problem = encoded(&server, coding, &bomb).problem(413, "too-large");
        assert_eq!(problem["limit"], 1 << 20);
        assert!(problem["detail"].as_str().unwrap().contains("decompressed"));
    }
}

#[test]
fn a_zstd_frame_may_not_ask_for_a_huge_window() {
    let server = run(small());
    // Magic, descriptor (no single segment, no checksum), window of 2^31, an empty last block.
    let frame = [0x28, 0xB5, 0x2F, 0xFD, 0x00, 21 << 3, 0x01, 0x00, 0x00];
    let problem = encoded(&server, "zstd", &frame).problem(400, "body");
    assert!(problem["detail"].as_str().unwrap().contains("zstd"));
}

#[test]
fn too_many_lines_are_refused_whole() {
    let server = run(HttpSettings { lines_max: 3, ..small() });
    let body = line(1, "acme") + "\n\n";
    assert_eq!(server.ndjson(body.repeat(3).as_bytes()).ok(202)["accepted"], 3);
    server.fake.published.lock().clear();
    let problem = server.ndjson(body.repeat(4).as_bytes()).problem(413, "too-large");
    assert_eq!(problem["limit"], 3);
    assert!(server.fake.published.lock().is_empty());
}

#[test]
fn batches_are_cut_to_messages_of_the_log() {
    let server = run(HttpSettings { batch_bytes_max: 64, ..small() });
    let events: Vec<String> = (0..5).map(|n| line(n, "acme")).collect();
    let long = line(9, &"x".repeat(64));
    let body = format!("{}\n{long}\n", events.join("\n"));
    let answer = server.ndjson(body.as_bytes()).ok(202);
    assert_eq!((&answer["accepted"], &answer["rejected"][0]["line"]), (&5.into(), &6.into()));
    assert_eq!(answer["rejected"][0]["reason"], "too_large");
    let published = server.fake.published.lock();
    let lines: Vec<&[u32]> = published.iter().map(|batch| batch.lines.as_slice()).collect();
    assert_eq!(lines, [&[1, 2][..], &[3, 4], &[5]]);
    assert!(published.iter().all(|batch| batch.payload.len() <= 64));
}

#[test]
fn a_partly_failed_write_says_which_lines() {
    let server = run(small());
    let orgs = orgs();
    server.fake.failing.lock().insert(ShardId(1));
    let body = [&orgs[0], &orgs[1], &orgs[2], &orgs[1]];
    let body: String =
        body.iter().enumerate().map(|(n, org)| line(n, org) + "\n").collect::<String>() + "x\n";
    let reply = server.ndjson(body.as_bytes());
    let problem = reply.problem(503, "not-written");
    assert_eq!(reply.header("retry-after"), Some("1"));
    assert_eq!(problem["accepted"], 2);
    assert_eq!(problem["position"], "0:100,2:102");
    assert_eq!(problem["rejected"][0]["line"], 5);
    let failed = serde_json::json!([{"shard": 1, "detail": "disk full", "lines": [2, 4]}]);
    assert_eq!(problem["failed"], failed);
}

#[test]
fn a_write_that_does_not_end_is_no_success() {
    let server = run(HttpSettings { request_timeout: Duration::from_millis(50), ..small() });
    server.fake.hanging.lock().insert(shard_of("acme", SHARDS));
    let problem = server.ndjson(line(1, "acme").as_bytes()).problem(504, "timeout");
    assert!(problem["detail"].as_str().unwrap().contains("may or may not"));
}

#[test]
fn what_is_no_event_body_is_refused() {
    let server = run(small());
    server.ndjson(b"").problem(400, "body");
    server.ndjson(b"\n \r\n").problem(400, "body");
    let problem = server.post("/v1/events", "image/png", b"x").problem(415, "media-type");
    assert!(problem["allowed"].as_array().unwrap().contains(&"application/x-ndjson".into()));
    server.post("/v1/events?backfil=true", "application/json", b"x").problem(400, "parameter");
}

#[test]
fn without_a_media_type_the_splitter_decides() {
    let server = run(small());
    let body = line(1, "acme");
    assert_eq!(server.send("POST", "/v1/events", &[], body.as_bytes()).ok(202)["accepted"], 1);
}

/// Every line is either published where it belongs, as it was, or refused; whatever the bytes.
#[test]
fn any_bytes_are_accounted_for() {
    let server = run(small());
    let count = AtomicUsize::new(0);
    let part = prop_oneof![
        "\\PC{0,12}".prop_map(String::into_bytes),
        prop::collection::vec(any::<u8>(), 0..12),
        (0..1_000usize, 0..6usize).prop_map(|(id, org)| line(id, &format!("o{org}")).into_bytes()),
    ];
    let parts = prop::collection::vec(part, 0..20);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) };
    proptest!(config, |(parts in parts)| {
        count.fetch_add(1, Ordering::Relaxed);
        server.fake.published.lock().clear();
        let body = parts.join(&b'\n');
        let reply = server.ndjson(&body);
        let lines: HashMap<u32, &[u8]> = (1u32..)
            .zip(body.split(|byte| *byte == b'\n'))
            .map(|(n, line)| (n, line.trim_ascii()))
            .filter(|(_, line)| !line.is_empty())
            .collect();
        if lines.is_empty() {
            reply.problem(400, "body");
            return Ok(());
        }
        let answer: Accepted = serde_json::from_value(reply.ok(202)).unwrap();
        let mut seen: Vec<u32> = answer.rejected.iter().map(|rejected| rejected.line).collect();
        for batch in server.fake.published.lock().iter() {
            let written = batch.payload.strip_suffix(b"\n").unwrap().split(|b| *b == b'\n');
            for (n, line) in batch.lines.iter().zip(written) {
                prop_assert_eq!(lines[n], line);
                let event = (decoders().decode)(line).unwrap();
                prop_assert_eq!(shard_of(&event.org, SHARDS), batch.shard);
                seen.push(*n);
            }
        }
        seen.sort_unstable();
        let mut all: Vec<u32> = lines.keys().copied().collect();
        all.sort_unstable();
        prop_assert_eq!(seen, all);
    });
    assert_eq!(count.load(Ordering::Relaxed), 64);
}
