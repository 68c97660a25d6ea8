//! A JetStream stream as log, on a real server: what is read is what was appended, whatever headers a
//! producer forges; commits stand once, right behind their parts; following goes on through restarts
//! of the server without a record missing or twice; a stream that is not what it was stops the log.

#![allow(clippy::unwrap_used)]

#[path = "../../tests/support/nats.rs"]
mod nats;

use std::path::Path;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::stream::Config;
use meterr_connectors::log::{Log, LogError, Message, Record};
use meterr_connectors::nats::connection::{NatsSettings, connect};
use meterr_connectors::nats::log::{Connections, JetStreamLog};
use meterr_connectors::nats::mapping::{Mapping, probe};
use meterr_connectors::nats::streams::Wanted;
use meterr_operators::ids::ShardId;
use meterr_operators::time::{HOUR, Time};
use nats::{NatsOptions, NatsServer};

const MANY: usize = 1 << 20;

async fn connections(server: &NatsServer) -> Connections {
    let settings = NatsSettings { url: server.url(), ..NatsSettings::default() };
    Connections::connect(&settings).await.unwrap()
}

async fn usage(connections: &Connections) -> JetStreamLog {
    let wanted = Wanted::usage(ShardId(3), 1, None);
    JetStreamLog::open(connections, &wanted, Some("usage")).await.unwrap()
}

async fn out(connections: &Connections) -> JetStreamLog {
    let wanted = Wanted::out(ShardId(3), 1, None);
    JetStreamLog::open(connections, &wanted, Some("out")).await.unwrap()
}

fn message(text: impl Into<String>) -> Message {
    Message::new("usage.3.acme", text.into())
}

fn part(text: &str) -> Message {
    Message::new("out.3.part", text.to_owned())
}

fn commit(text: &str) -> Message {
    Message::new("out.3.commit", text.to_owned())
}

fn texts(records: &[Record]) -> Vec<&str> {
    records.iter().map(|record| std::str::from_utf8(&record.message.payload).unwrap()).collect()
}

/// Follows a log as its reader does, until `n` records came.
async fn follow(log: &JetStreamLog, from: u64, n: usize) -> Vec<Record> {
    let mut found: Vec<Record> = Vec::new();
    while found.len() < n {
        let next = from + found.len() as u64;
        log.wait_beyond(next - 1).await;
        assert!(log.failure().is_none(), "{:?}", log.failure());
        found.extend(log.read(next, MANY).await.unwrap());
    }
    found
}

async fn until_failed(log: &JetStreamLog, from: u64) -> String {
    while log.failure().is_none() {
        log.wait_beyond(from).await;
        if log.failure().is_none() {
            panic!("read {:?} instead of failing", log.read(from + 1, MANY).await);
        }
    }
    log.failure().unwrap().to_string()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_appended_is_read_by_every_way() {
    let server = NatsServer::start(NatsOptions::new());
    let log = usage(&connections(&server).await).await;
    assert_eq!((log.head(), log.first(), log.last_time()), (0, 1, None));
    assert_eq!(log.read(1, MANY).await.unwrap(), []);
    assert_eq!(log.read(1, 1).await.unwrap(), []);
    let mut sent = vec![message("a"), message(""), message("c".repeat(70_000))];
    sent[1].headers = vec![("ce-id".into(), "1".into()), ("content-type".into(), "x".into())];
    let appended = log.append(sent.clone()).await.unwrap();
    assert_eq!((appended.first, appended.last, log.head()), (1, 3, 3));
    let direct = log.read(1, MANY).await.unwrap();
    let messages: Vec<Message> = direct.iter().map(|record| record.message.clone()).collect();
    assert_eq!(messages, sent);
    assert_eq!(follow(&log, 1, 3).await, direct);
    for record in &direct {
        assert_eq!(log.read(record.position, 1).await.unwrap(), std::slice::from_ref(record));
    }
    assert_eq!(log.read(4, 1).await.unwrap(), []);
    let now = meterr_connectors::log::system_clock()();
    assert!(direct.iter().all(|record| (now.0 - record.time.0).abs() < HOUR));
    // Another handle finds the same.
    let again = usage(&connections(&server).await).await;
    assert_eq!((again.head(), again.identity()), (3, log.identity()));
    assert_eq!(again.last_time(), direct.last().map(|record| record.time));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_producer_cannot_forge_place_time_or_subject() {
    let server = NatsServer::start(NatsOptions::new());
    let connections = connections(&server).await;
    let log = usage(&connections).await;
    let mut headers = HeaderMap::new();
    for (name, value) in [
        ("Nats-Sequence", "77"),
        ("Nats-Subject", "usage.3.other"),
        ("Nats-Time-Stamp", "2001-01-01T00:00:00Z"),
        ("Nats-Stream", "USAGE_9"),
        ("Nats-Num-Pending", "9"),
        ("Meterr-Time", "1"),
        ("nats-x", "1"),
    ] {
        headers.append(name, value);
    }
    let context = async_nats::jetstream::new(connections.output.clone());
    for n in 0..2 {
        let publish =
            context.publish_with_headers("usage.3.acme", headers.clone(), format!("{n}").into());
        publish.await.unwrap().await.unwrap();
    }
    log.refresh().await.unwrap();
    let followed = follow(&log, 1, 2).await;
    assert_eq!(log.read(1, MANY).await.unwrap(), followed);
    assert_eq!(log.read(2, 1).await.unwrap(), followed[1..]);
    for (n, record) in followed.iter().enumerate() {
        assert_eq!(record.position, n as u64 + 1);
        assert_eq!(
            record.message,
            message(format!("{n}")),
            "no header of the transport is content"
        );
        assert!(record.time > Time(1_500_000_000_000_000), "{:?}", record.time);
    }
}

/// Publishes a message with headers as they stand, which no client would.
fn publish_raw(server: &NatsServer, headers: &[u8], payload: &str) {
    use std::io::{BufRead, BufReader, Write};
    let mut socket = std::net::TcpStream::connect(("127.0.0.1", server.port())).unwrap();
    let head = [b"NATS/1.0", headers, b"\r\n\r\n"].concat();
    let total = head.len() + payload.len();
    let line = format!("HPUB usage.3.acme {} {total}\r\n", head.len());
    socket.write_all(b"CONNECT {\"headers\":true,\"verbose\":false}\r\n").unwrap();
    socket
        .write_all(&[line.as_bytes(), &head, payload.as_bytes(), b"\r\nPING\r\n"].concat())
        .unwrap();
    // The server has taken it in once it answers.
    let mut lines = BufReader::new(socket).lines();
    while lines.next().unwrap().unwrap() != "PONG" {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_that_break_a_client_hold_nothing_up() {
    const HOSTILE: [&[u8]; 14] = [
        b"\r\na: 1\r2",
        b"\r\na: \xff\xfe",
        b"\r\nno colon",
        b"\r\na b: 1",
        b"\r\n: 1",
        b" 100 Idle Heartbeat",
        b" 204 EOB",
        b" 404 No Messages",
        b" 408 Request Timeout",
        b" 409 Consumer Deleted",
        b" 503",
        b" 99999",
        b"\r\na: 1\r\n 2\r\n\t3",
        b"\r\n\xff: 1",
    ];
    let server = NatsServer::start(NatsOptions::new());
    let connections = connections(&server).await;
    let log = usage(&connections).await;
    let reader = tokio::spawn({
        let log = log.clone();
        async move { follow(&log, 1, 3 * HOSTILE.len()).await }
    });
    let mut expected = Vec::new();
    for (n, headers) in HOSTILE.iter().enumerate() {
        log.append(vec![message(format!("before {n}"))]).await.unwrap();
        publish_raw(&server, headers, &format!("hostile {n}"));
        log.append(vec![message(format!("after {n}"))]).await.unwrap();
        expected.extend([format!("before {n}"), format!("hostile {n}"), format!("after {n}")]);
    }
    let followed = reader.await.unwrap();
    assert_eq!(texts(&followed), expected);
    // All at once, by other ways.
    log.refresh().await.unwrap();
    let mut read = Vec::new();
    while read.len() < expected.len() {
        read.extend(log.read(read.len() as u64 + 1, MANY).await.unwrap());
    }
    assert_eq!(read, followed);
    for record in &followed {
        assert_eq!(log.read(record.position, 1).await.unwrap(), std::slice::from_ref(record));
    }
    let again = usage(&connections).await;
    assert_eq!(follow(&again, 1, expected.len()).await, followed);
    assert!(log.failure().is_none());
}

/// Whoever reads beside the follower may get what was fetched for it; it must not wait for ever for that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_misses_nothing_that_another_reader_took() {
    let server = NatsServer::start(NatsOptions::new());
    let log = usage(&connections(&server).await).await;
    for n in 0..200 {
        let waiter = log.clone();
        let waiting = tokio::spawn(async move {
            let reached = tokio::time::timeout(Duration::from_secs(30), waiter.wait_beyond(n));
            reached.await.is_ok()
        });
        log.append(vec![message(n.to_string())]).await.unwrap();
        while !waiting.is_finished() {
            log.read(n + 1, MANY).await.unwrap();
            tokio::task::yield_now().await;
        }
        assert!(waiting.await.unwrap(), "waited in vain for record {}", n + 1);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_stands_once_and_right_behind_its_parts() {
    let server = NatsServer::start(NatsOptions::new());
    let connections = connections(&server).await;
    let log = out(&connections).await;
    assert_eq!(log.last_commit().await.unwrap(), None);
    let first = log.commit(vec![part("p1"), part("p2")], commit("c1"), 0).await.unwrap();
    assert_eq!((first.first, first.last), (1, 3));
    // A writer that was frozen while it sent its parts: they stand where ours belong.
    let context = async_nats::jetstream::new(connections.output.clone());
    context.publish("out.3.part", "stray".into()).await.unwrap().await.unwrap();
    let second = log.commit(vec![part("p3"), part("p4")], commit("c2"), first.last).await.unwrap();
    let records = log.read(second.first, MANY).await.unwrap();
    assert_eq!(texts(&records), ["p3", "p4", "c2"]);
    // Its commit comes too late.
    let other = out(&connections).await;
    let late = other.commit(vec![part("x")], commit("late"), first.last).await.unwrap_err();
    assert!(
        matches!(late, LogError::Conflict { expected, actual, .. }
            if expected == first.last && actual == second.last),
        "{late}"
    );
    assert_eq!(log.last_commit().await.unwrap().unwrap().position, second.last);
    // The same commit again, as after an acknowledgement that was lost: it is found to stand.
    let again = other.commit(vec![part("p3"), part("p4")], commit("c2"), first.last).await.unwrap();
    assert_eq!(again.last, second.last);
    assert_eq!(connections.figures().landed, 1);
    assert_eq!(connections.figures().refused, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_append_behind_a_known_end_loses_against_another() {
    let server = NatsServer::start(NatsOptions::new());
    let connections = connections(&server).await;
    let (a, b) = (usage(&connections).await, usage(&connections).await);
    a.append_at(vec![message("1"), message("2")], 0).await.unwrap();
    let late = b.append_at(vec![message("x")], 0).await.unwrap_err();
    assert!(matches!(late, LogError::Conflict { expected: 0, actual: 2, .. }), "{late}");
    b.append_at(vec![message("3")], 2).await.unwrap();
    assert_eq!(texts(&a.read(1, MANY).await.unwrap()), ["1", "2", "3"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn following_and_appending_go_on_through_kills_of_the_server() {
    const N: usize = 3_000;
    let mut server = NatsServer::start(NatsOptions::new().sync_always());
    let connections = connections(&server).await;
    let (log, reader) = (usage(&connections).await, usage(&connections).await);
    let commits = out(&connections).await;
    let appending = tokio::spawn(async move {
        for n in 0..N {
            log.append(vec![message(format!("{n}"))]).await.unwrap();
        }
    });
    let committing = tokio::spawn(async move {
        let mut previous = 0;
        for n in 0..N / 10 {
            let parts = vec![part(&format!("part {n}"))];
            previous = commits.commit(parts, commit(&format!("{n}")), previous).await.unwrap().last;
        }
        commits
    });
    let reading = tokio::spawn(async move { follow(&reader, 1, N).await });
    for _ in 0..5 {
        let before = connections.figures().reconnects;
        server.kill();
        server.restart();
        while connections.figures().reconnects < before + 2 || !connections.figures().connected {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    appending.await.unwrap();
    let found = reading.await.unwrap();
    let expected: Vec<String> = (0..N).map(|n| n.to_string()).collect();
    assert_eq!(texts(&found), expected);
    assert!(found.iter().enumerate().all(|(n, record)| record.position == n as u64 + 1));
    let commits = committing.await.unwrap();
    commits.refresh().await.unwrap();
    let mut believed = Vec::new();
    let mut parts = Vec::new();
    let mut from = 1;
    while from <= commits.head() {
        for record in commits.read(from, MANY).await.unwrap() {
            from = record.position + 1;
            let text = String::from_utf8(record.message.payload.to_vec()).unwrap();
            if record.message.subject.ends_with(".commit") {
                assert_eq!(parts.last(), Some(&format!("part {text}")));
                believed.push(text);
                parts.clear();
            } else {
                parts.push(text);
            }
        }
    }
    assert_eq!(believed, expected[..N / 10]);
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).unwrap();
        }
    }
}

/// A server whose files are put back to what they were after two records, under a log that has seen
/// four; `more` records are then appended by somebody else.
async fn rolled_back(more: usize) -> String {
    let mut server = NatsServer::start(NatsOptions::new().sync_always());
    let connections = connections(&server).await;
    let log = usage(&connections).await;
    log.append(vec![message("1"), message("2")]).await.unwrap();
    server.stop();
    let kept = tempfile::tempdir().unwrap();
    copy(&server.store_dir(), kept.path());
    server.restart();
    log.append(vec![message("3"), message("4")]).await.unwrap();
    follow(&log, 1, 4).await;
    server.kill();
    std::fs::remove_dir_all(server.store_dir()).unwrap();
    copy(kept.path(), &server.store_dir());
    server.restart();
    let settings = NatsSettings { url: server.url(), ..NatsSettings::default() };
    let other = async_nats::jetstream::new(connect(&settings, "other").await.unwrap());
    for n in 0..more {
        other.publish("usage.3.acme", format!("other {n}").into()).await.unwrap().await.unwrap();
    }
    until_failed(&log, 4).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_state_of_the_stream_stops_the_log() {
    let why = rolled_back(0).await;
    assert!(why.contains("ends at 2, but had records up to 4"), "{why}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_older_state_that_grew_again_stops_the_log() {
    // Others were faster than us: the stream is as long as it was, with other records.
    let why = rolled_back(5).await;
    assert!(
        why.contains("the record at 4 is not the one read before") || why.contains("ends at"),
        "{why}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_stream_in_its_place_stops_the_log() {
    let server = NatsServer::start(NatsOptions::new());
    let connections = connections(&server).await;
    let log = usage(&connections).await;
    log.append(vec![message("1")]).await.unwrap();
    follow(&log, 1, 1).await;
    let context = async_nats::jetstream::new(connections.output.clone());
    context.delete_stream("USAGE_3").await.unwrap();
    let wanted = Wanted::usage(ShardId(3), 1, None);
    let other = JetStreamLog::open(&connections, &wanted, Some("other")).await.unwrap();
    other.append(vec![message("x"), message("y")]).await.unwrap();
    let why = until_failed(&log, 1).await;
    assert!(why.contains("another stream stands in its place"), "{why}");
    assert!(log.read(1, MANY).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_server_is_waited_for() {
    let mut server = NatsServer::start(NatsOptions::new().file_store_max(200_000));
    let connections = connections(&server).await;
    let log = out(&connections).await;
    let large = "x".repeat(60_000);
    let mut previous = 0;
    let mut n = 0;
    let refused = loop {
        let log = log.clone();
        let (parts, record) = (vec![part(&large)], commit(&format!("{n}")));
        let committing = tokio::spawn(async move { log.commit(parts, record, previous).await });
        let retries = connections.figures().retries;
        let refused = async {
            while connections.figures().retries == retries {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let mut committing = committing;
        tokio::select! {
            done = &mut committing => previous = done.unwrap().unwrap().last,
            () = refused => break committing,
        }
        n += 1;
    };
    assert!(n > 0);
    server.restart_with(NatsOptions::new().file_store_max(50_000_000));
    let appended = refused.await.unwrap().unwrap();
    let records = log.read(appended.first, MANY).await.unwrap();
    assert_eq!(texts(&records), [large.as_str(), &n.to_string()]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_could_lose_records_is_refused_with_its_remedy() {
    let server = NatsServer::start(NatsOptions::new());
    let connections = connections(&server).await;
    let context = async_nats::jetstream::new(connections.output.clone());
    let wanted = Wanted::usage(ShardId(3), 1, None);
    let config = Config { max_age: Duration::from_secs(600), ..wanted.config("usage", None) };
    context.create_stream(config).await.unwrap();
    let error = JetStreamLog::open(&connections, &wanted, Some("usage")).await.err().unwrap();
    let text = error.to_string();
    assert!(text.contains("nats stream edit USAGE_3 --max-age=-1"), "{text}");
    let missing = Wanted::out(ShardId(3), 1, None);
    let error = JetStreamLog::open(&connections, &missing, None).await.err().unwrap();
    assert!(error.to_string().contains("there is no such stream"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_mapping_is_tried_without_leaving_a_trace() {
    let mapped = NatsServer::start(NatsOptions::new().mapping(16));
    let connections_of_mapped = connections(&mapped).await;
    let mut logs = Vec::new();
    for shard in 0..16 {
        let wanted = Wanted::usage(ShardId(shard), 1, None);
        logs.push(JetStreamLog::open(&connections_of_mapped, &wanted, Some("x")).await.unwrap());
    }
    let client = &connections_of_mapped.output;
    assert_eq!(probe(client, 16, "a").await.unwrap(), Mapping::Right);
    assert!(matches!(probe(client, 8, "b").await.unwrap(), Mapping::Wrong { .. }));
    assert!(matches!(probe(client, 64, "c").await.unwrap(), Mapping::Wrong { .. }));
    for log in logs {
        log.refresh().await.unwrap();
        assert_eq!(log.head(), 0);
    }
    let plain = NatsServer::start(NatsOptions::new());
    let connections = connections(&plain).await;
    assert_eq!(probe(&connections.output, 16, "a").await.unwrap(), Mapping::Missing);
}
