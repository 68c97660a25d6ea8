//! `meterr publish --nats` through the real binary: to a real engine, and to servers that are killed,
//! frozen, full, empty or away.

#![allow(clippy::unwrap_used)]

#[path = "support/nats.rs"]
mod nats;
#[path = "support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::time::{Duration, Instant};

use async_nats::jetstream::{self, stream};
use futures::StreamExt;
use meterr_operators::ids::shard_of;
use nats::{NatsOptions, NatsServer};
use serde_json::Value;
use support::{Launch, PATIENCE, meterr, ran};

const SHARDS: u16 = 4;
const ORGS: [&str; 5] = ["acme", "globex", "initech", "umbrella", "hooli"];

fn line(n: usize) -> String {
    let org = ORGS[n % ORGS.len()];
    format!(
        "{{\"id\":\"e{n}\",\"time\":\"2026-01-02T03:04:05Z\",\"org\":\"{org}\",\"user\":\"u\",\
         \"provider\":\"openai\",\"model\":\"gpt-4o-mini\",\"input_tokens\":1000000}}\n"
    )
}

fn file(dir: &Path, lines: impl Iterator<Item = String>) -> PathBuf {
    let path = dir.join("events.ndjson");
    std::fs::write(&path, lines.collect::<String>()).unwrap();
    path
}

/// The streams of a deployment without an engine.
async fn streams(url: &str) -> jetstream::Context {
    let context = jetstream::new(async_nats::connect(url).await.unwrap());
    for shard in 0..SHARDS {
        let config = stream::Config {
            name: format!("USAGE_{shard}"),
            subjects: vec![format!("usage.{shard}.*")],
            duplicate_window: Duration::from_secs(120),
            ..stream::Config::default()
        };
        context.create_stream(config).await.unwrap();
    }
    context
}

/// How often each line is stored, and under which subject ends; checks that it is in its shard.
async fn stored(context: &jetstream::Context) -> (BTreeMap<String, u32>, BTreeMap<String, u32>) {
    let (mut lines, mut subjects) = (BTreeMap::new(), BTreeMap::new());
    for shard in 0..SHARDS {
        let stream = context.get_stream(format!("USAGE_{shard}")).await.unwrap();
        let messages = stream.get_info().await.unwrap().state.messages;
        let consumer = stream.create_consumer(jetstream::consumer::pull::OrderedConfig::default());
        let mut reading = consumer.await.unwrap().messages().await.unwrap();
        for _ in 0..messages {
            let message = reading.next().await.unwrap().unwrap();
            *subjects.entry(message.subject.to_string()).or_insert(0) += 1;
            for line in std::str::from_utf8(&message.payload).unwrap().lines() {
                let event: Value = serde_json::from_str(line).unwrap();
                assert_eq!(shard_of(event["org"].as_str().unwrap(), SHARDS).0, shard, "{line}");
                *lines.entry(format!("{line}\n")).or_insert(0) += 1;
            }
        }
    }
    (lines, subjects)
}

fn publish(server: &NatsServer, path: &Path, more: &[&str]) -> Output {
    publishing(&server.url(), path.to_str().unwrap(), more).wait_with_output().unwrap()
}

fn publishing(url: &str, path: &str, more: &[&str]) -> Child {
    let mut command = meterr(&["publish", path, "--nats", url]);
    command.args(more).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
}

/// Waits until so many messages are stored.
async fn until_stored(context: &jetstream::Context, messages: u64) {
    let began = Instant::now();
    loop {
        let mut found = 0;
        for shard in 0..SHARDS {
            if let Ok(stream) = context.get_stream(format!("USAGE_{shard}")).await {
                found += stream.cached_info().state.messages;
            }
        }
        if found >= messages {
            return;
        }
        assert!(began.elapsed() < PATIENCE, "{found} of {messages}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[test]
fn a_file_reaches_the_views_and_wrong_lines_are_told_at_once() {
    let server = NatsServer::start(NatsOptions::new());
    let dir = tempfile::tempdir().unwrap();
    let engine = Launch::on(&dir.path().join("data"))
        .set("NODE__SHARDS", &SHARDS.to_string())
        .set("NATS__URL", &server.url())
        .start();
    let wrong = |n: usize| if n == 30 { "{\"id\":\"x\"}\n".to_owned() } else { line(n) };
    let path = file(dir.path(), (0..1_000).map(wrong));
    let kept = dir.path().join("kept");
    let output = publish(&server, &path, &["--json", "--rejected-to", kept.to_str().unwrap()]);
    let books = json(&output);
    assert_eq!(output.status.code(), Some(3), "{output:?}");
    assert_eq!((&books["accepted"], &books["rejected_total"]), (&999.into(), &1.into()));
    assert_eq!(books["unsent"], 0);
    assert_eq!(books["rejected"][0]["line"], 31);
    assert_eq!(books["rejected"][0]["reason"], "missing_field");
    assert_eq!(std::fs::read_to_string(&kept).unwrap(), wrong(30));
    let position = books["position"].as_str().unwrap();
    for (n, org) in ORGS.iter().enumerate() {
        let path = format!("/v1/orgs/{org}/spend?window=all&min_position={position}");
        let spend = engine.get(&path).expect(200);
        let expected = (0..1_000).filter(|i| i % 5 == n && *i != 30).count();
        assert_eq!(spend["rows"][0]["events"], expected, "{org}: {spend}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_go_to_their_shards_about_a_hundred_a_message() {
    let server = NatsServer::start(NatsOptions::new());
    let context = streams(&server.url()).await;
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), (0..2_000).map(line));
    let (code, out, err) = ran(&publish(&server, &path, &["--backfill"]));
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.starts_with("2,000 accepted, 0 rejected, "), "{out}");
    let (lines, subjects) = stored(&context).await;
    assert_eq!(lines.len(), 2_000);
    assert!(lines.values().all(|times| *times == 1));
    assert!(subjects.keys().all(|subject| subject.ends_with(".@backfill")), "{subjects:?}");
    let messages: u32 = subjects.values().sum();
    assert!((20..=24).contains(&messages), "{messages} messages");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_in_the_middle_loses_and_doubles_nothing() {
    const LINES: usize = 40_000;
    let mut server = NatsServer::start(NatsOptions::new());
    let context = streams(&server.url()).await;
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), (0..LINES).map(line));
    // Few at a time, so that it takes long enough to be met in the middle.
    let child = publishing(
        &server.url(),
        path.to_str().unwrap(),
        &["--batch-lines", "2", "--in-flight", "8", "--json"],
    );
    for round in 1..=3 {
        until_stored(&context, round * LINES as u64 / 10).await;
        server.kill();
        server.restart();
    }
    let output = tokio::task::spawn_blocking(|| child.wait_with_output().unwrap()).await.unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(json(&output)["retries"].as_u64().unwrap() > 0, "met in the middle: {output:?}");
    assert_eq!(json(&output)["accepted"], LINES);
    let (lines, _) = stored(&context).await;
    assert_eq!(lines.len(), LINES);
    assert!(lines.values().all(|times| *times == 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_line_of_a_pipe_is_sent_before_the_pipe_ends() {
    let server = NatsServer::start(NatsOptions::new());
    let context = streams(&server.url()).await;
    let mut child = publishing(&server.url(), "-", &["--json"]);
    let mut input = child.stdin.take().unwrap();
    for n in 0..3 {
        input.write_all(line(n).as_bytes()).unwrap();
        until_stored(&context, n as u64 + 1).await;
    }
    drop(input);
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), &json(&output)["accepted"]), (Some(0), &3.into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interruption_finishes_what_is_under_way_and_says_what_was_not_sent() {
    let server = NatsServer::start(NatsOptions::new());
    let context = streams(&server.url()).await;
    let mut child = publishing(&server.url(), "-", &["--json", "--batch-lines", "1"]);
    let mut input = child.stdin.take().unwrap();
    input.write_all((0..50).map(line).collect::<String>().as_bytes()).unwrap();
    until_stored(&context, 50).await;
    support::signal(child.id(), "INT").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{output:?}");
    let books = json(&output);
    assert_eq!((&books["accepted"], &books["unsent"]), (&50.into(), &0.into()));
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.starts_with("interrupted at line 50: 0 lines before it"), "{told}");
    drop(input);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_interruption_while_the_server_is_away_says_how_many_lines_were_not_sent() {
    let mut server = NatsServer::start(NatsOptions::new());
    let context = streams(&server.url()).await;
    let mut child = publishing(&server.url(), "-", &["--json"]);
    let mut input = child.stdin.take().unwrap();
    input.write_all(line(0).as_bytes()).unwrap();
    until_stored(&context, 1).await;
    server.kill();
    input.write_all((1..6).map(line).collect::<String>().as_bytes()).unwrap();
    let mut told = BufReader::new(child.stderr.take().unwrap()).lines();
    let trouble = told.next().unwrap().unwrap();
    assert!(trouble.starts_with("trying again: ") && trouble.contains("connection"), "{trouble}");
    support::signal(child.id(), "INT").unwrap();
    let said: Vec<String> = told.map(Result::unwrap).collect();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{said:?}");
    let books = json(&output);
    assert_eq!(books["accepted"].as_u64().unwrap() + books["unsent"].as_u64().unwrap(), 6);
    assert!(books["unsent"].as_u64().unwrap() >= 5, "{books}");
    let last = said.last().unwrap();
    assert!(last.contains("interrupted at line 6: "), "{last}");
    drop(input);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_server_ends_it_when_time_is_up() {
    let server = NatsServer::start(NatsOptions::new().file_store_max(100_000));
    let context = streams(&server.url()).await;
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), (0..5_000).map(line));
    let output = publish(&server, &path, &["--timeout", "2s", "--json", "--in-flight", "4"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(told.contains("trying again: the server refused it: "), "{told}");
    assert!(told.contains("error: not every line was sent; it is safe"), "{told}");
    let books = json(&output);
    let (lines, _) = stored(&context).await;
    assert_eq!(books["accepted"], lines.len(), "what is accepted is stored, and nothing else is");
    assert!(books["unsent"].as_u64().unwrap() > 0, "{books}");
}

#[test]
fn what_is_wrong_with_the_server_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), (0..3).map(line));
    let path = path.to_str().unwrap();
    let of = |url: &str| ran(&publishing(url, path, &[]).wait_with_output().unwrap());
    let server = NatsServer::start(NatsOptions::new());
    let (code, _, err) = of(&server.url());
    assert_eq!(code, 1);
    assert!(
        err.contains("no USAGE streams on this server: start `meterr serve --nats URL`"),
        "{err}"
    );
    let port = server.port();
    drop(server);
    let (code, _, err) = of(&format!("nats://u:secret@127.0.0.1:{port}"));
    assert_eq!(code, 5, "{err}");
    assert!(err.contains("cannot connect to NATS") && !err.contains("secret"), "{err}");
    assert_eq!(of("nats://u:secret@").0, 2);
}

#[test]
fn a_user_who_may_not_publish_is_told_at_once() {
    let users = "authorization { users = [ { user: admin, password: a }
      { user: reader, password: r, permissions: { publish: [\"$JS.API.>\"] } } ] }";
    let server = NatsServer::start(NatsOptions::new().text(users).login("admin", "a"));
    let url = |user: &str| format!("nats://{user}@127.0.0.1:{}", server.port());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let options =
            async_nats::ConnectOptions::with_user_and_password("admin".into(), "a".into());
        let context = jetstream::new(options.connect(server.url()).await.unwrap());
        let config = stream::Config {
            name: "USAGE_0".to_owned(),
            subjects: vec!["usage.0.*".to_owned()],
            ..stream::Config::default()
        };
        context.create_stream(config).await.unwrap();
    });
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), (0..3).map(line));
    let began = Instant::now();
    let child = publishing(&url("reader:r"), path.to_str().unwrap(), &[]);
    let (code, _, err) = ran(&child.wait_with_output().unwrap());
    assert_eq!(code, 1, "{err}");
    assert!(
        err.contains("not permitted: this user may not publish to \"usage.0.@batch\""),
        "{err}"
    );
    assert!(began.elapsed() < Duration::from_secs(30), "not only when time is up");
}
