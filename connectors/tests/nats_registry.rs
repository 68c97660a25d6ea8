//! Registry and peers on real servers: of many writers one wins each revision, a lost acknowledgement
//! is neither a lost nor a second write, leaders die and it goes on; answers larger than a message
//! arrive whole, and hostile pieces do no harm.

#![allow(clippy::unwrap_used)]

#[path = "../../tests/support/nats.rs"]
mod nats;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use async_nats::HeaderMap;
use bytes::Bytes;
use futures::StreamExt;
use futures::future::join_all;
use meterr_connectors::cluster::{Answerer, Entry, PeerError, Peers, Registry, RegistryError};
use meterr_connectors::log::LogError;
use meterr_connectors::nats::connection::{NatsSettings, connect};
use meterr_connectors::nats::peers::NatsPeers;
use meterr_connectors::nats::registry::{NatsRegistry, OpenError};
use nats::{Cluster, NatsOptions, NatsServer};
use tokio::time::timeout;

/// Longest time anything may take before the test fails instead of hanging.
const PATIENCE: Duration = Duration::from_secs(60);

fn settings(url: &str) -> NatsSettings {
    NatsSettings { url: url.to_owned(), ..NatsSettings::default() }
}

async fn registry(url: &str, replicas: usize) -> NatsRegistry {
    NatsRegistry::connect(&settings(url), replicas).await.unwrap()
}

async fn registries(n: usize, url: &str, replicas: usize) -> Vec<NatsRegistry> {
    join_all((0..n).map(|_| registry(url, replicas))).await
}

fn text(text: impl Into<String>) -> Bytes {
    Bytes::from(text.into())
}

fn conflict<T: std::fmt::Debug>(result: Result<T, RegistryError>) {
    assert!(matches!(result, Err(RegistryError::Conflict { .. })), "{result:?}");
}

async fn get(registry: &NatsRegistry, key: &str) -> Option<Entry> {
    loop {
        match registry.read().await {
            Ok(entries) => return entries.into_iter().find(|entry| entry.key == key),
            Err(RegistryError::Unavailable(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Reads until it sees this revision: direct reads may be behind for a moment.
async fn until_read(registry: &NatsRegistry, key: &str, revision: u64) -> Entry {
    let seen = async {
        loop {
            match get(registry, key).await {
                Some(entry) if entry.revision == revision => return entry,
                _ => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    };
    timeout(PATIENCE, seen).await.unwrap()
}

/// Tries until the outcome is known.
async fn insist(
    registry: &NatsRegistry,
    key: &str,
    value: &str,
    expected: u64,
) -> Result<u64, RegistryError> {
    let began = Instant::now();
    loop {
        match registry.write(key.to_owned(), text(value), expected).await {
            Err(RegistryError::Unavailable(_)) if began.elapsed() < PATIENCE => {}
            outcome => return outcome,
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_written_removed_and_written_again() {
    let server = NatsServer::start(NatsOptions::new());
    let a = registry(&server.url(), 1).await;
    let b = registry(&server.url(), 1).await;
    assert_eq!(a.read().await.unwrap(), []);
    let write = |at: &NatsRegistry, value: &str, expected| {
        at.write("lease.3".into(), text(value), expected)
    };
    let first = write(&a, "a", 0).await.unwrap();
    conflict(write(&b, "b", 0).await);
    let second = write(&b, "b", first).await.unwrap();
    assert!(second > first);
    conflict(write(&a, "a", first).await);
    let other = a.write("node.a".into(), text("x"), 0).await.unwrap();
    let entry = |key: &str, revision, value: &str| Entry {
        key: key.to_owned(),
        revision,
        value: text(value),
    };
    conflict(write(&a, "a", other).await);
    let both = [entry("lease.3", second, "b"), entry("node.a", other, "x")];
    assert_eq!(a.read().await.unwrap(), both);

    conflict(a.remove("lease.3".into(), first).await);
    a.remove("lease.3".into(), second).await.unwrap();
    assert_eq!(b.read().await.unwrap(), both[1..]);
    conflict(b.remove("lease.3".into(), second).await);
    conflict(write(&b, "b", second).await);
    // Removed once and again: what stands there counts as no key.
    let third = write(&b, "b", 0).await.unwrap();
    assert!(third > other);
    conflict(write(&a, "a", 0).await);
    b.remove("lease.3".into(), third).await.unwrap();
    assert!(write(&a, "a", 0).await.unwrap() > third);

    // What cannot be an entry is not tried.
    for key in ["", "a..b", "lease.*", "a b"] {
        assert!(a.write(key.into(), text("x"), 0).await.is_err());
    }
    assert!(a.write("k".into(), Bytes::from(vec![0; 1 << 20]), 0).await.is_err());
    // Empty values are values.
    assert!(a.write("pin.1".into(), Bytes::new(), 0).await.is_ok());
    assert_eq!(get(&b, "pin.1").await.unwrap().value, Bytes::new());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_would_lose_entries_is_refused() {
    let server = NatsServer::start(NatsOptions::new());
    drop(registry(&server.url(), 1).await);
    // Again what is there, and not with fewer replicas than wanted.
    drop(registry(&server.url(), 1).await);
    let Err(error) = NatsRegistry::connect(&settings(&server.url()), 3).await else {
        panic!("one replica is not three")
    };
    assert!(matches!(error, OpenError::Stream(LogError::Format { .. })), "{error}");
    assert!(error.to_string().contains("--replicas=3"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_keys_are_read_at_once_and_more_than_a_batch_one_by_one() {
    let server = NatsServer::start(NatsOptions::new());
    let registry = registry(&server.url(), 1).await;
    let client = connect(&settings(&server.url()), "test").await.unwrap();
    // Of somebody else: no keys of ours.
    client.publish("$KV.METERR.a/b", "x".into()).await.unwrap();
    let mut wanted = BTreeMap::new();
    // The server gives at most 1,024 subjects at once.
    for upto in [1_000, 1_200] {
        let from = wanted.len();
        let writes = (from..upto).map(|n| registry.write(format!("node.n{n}"), text("v"), 0));
        let revisions = join_all(writes).await;
        wanted.extend((from..upto).zip(revisions).map(|(n, r)| (format!("node.n{n}"), r.unwrap())));
        let entries = registry.read().await.unwrap();
        let found: BTreeMap<_, _> = entries.into_iter().map(|e| (e.key, e.revision)).collect();
        assert_eq!(found, wanted);
    }
}

/// Many writers, each of which adds a word of its own to what it read, until so many were taken.
async fn contend(registries: &[NatsRegistry], each: usize) {
    let writers: Vec<_> = registries
        .iter()
        .enumerate()
        .map(|(n, registry)| {
            let registry = registry.clone();
            tokio::spawn(async move {
                let (mut won, mut unknown) = (Vec::new(), Vec::new());
                for tries in 0.. {
                    if won.len() == each {
                        break;
                    }
                    let entry = get(&registry, "lease.0").await;
                    let (expected, before) = entry.map_or((0, String::new()), |entry| {
                        (entry.revision, String::from_utf8(entry.value.to_vec()).unwrap())
                    });
                    let word = format!("{n}:{tries}");
                    let value = text(format!("{before}{word} "));
                    let mut certain = true;
                    let began = Instant::now();
                    loop {
                        let write = registry.write("lease.0".into(), value.clone(), expected);
                        match write.await {
                            Ok(revision) => won.push((revision, expected, word)),
                            Err(RegistryError::Unavailable(why)) => {
                                assert!(began.elapsed() < PATIENCE, "{why}");
                                certain = false;
                                continue;
                            }
                            // It may have been taken, and followed by others.
                            Err(RegistryError::Conflict { .. }) if !certain => unknown.push(word),
                            Err(RegistryError::Conflict { .. }) => {}
                        }
                        break;
                    }
                }
                (won, unknown)
            })
        })
        .collect();
    let (mut won, mut unknown) = (Vec::new(), Vec::new());
    for writer in writers {
        let of_one = writer.await.unwrap();
        won.extend(of_one.0);
        unknown.extend(of_one.1);
    }
    won.sort_unstable();
    // No revision was given twice, nor followed on twice.
    let distinct = |of: &dyn Fn(&(u64, u64, String)) -> u64| {
        won.iter().map(of).collect::<std::collections::BTreeSet<_>>().len()
    };
    assert_eq!(distinct(&|won| won.0), won.len(), "{won:?}");
    assert_eq!(distinct(&|won| won.1), won.len(), "{won:?}");
    // What was taken follows word on word; nothing else is there.
    let last = won.last().unwrap().0;
    let value = loop {
        let entry = get(&registries[0], "lease.0").await.unwrap();
        if entry.revision >= last {
            break String::from_utf8(entry.value.to_vec()).unwrap();
        }
    };
    let found: Vec<&str> = value.split_whitespace().collect();
    let known = found.iter().filter(|word| !unknown.iter().any(|unknown| unknown == *word));
    let wanted: Vec<&str> = won.iter().map(|(.., word)| word.as_str()).collect();
    assert_eq!(known.copied().collect::<Vec<_>>(), wanted, "unknown {unknown:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_many_writers_one_wins_each_revision() {
    let server = NatsServer::start(NatsOptions::new());
    let registries = registries(6, &server.url(), 1).await;
    contend(&registries, 15).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lost_acknowledgements_are_neither_lost_nor_second_writes() {
    let rounds = std::env::var("METERR_REGISTRY_ROUNDS").map_or(6, |text| text.parse().unwrap());
    // What is acknowledged must outlive the process.
    let mut server = NatsServer::start(NatsOptions::new().sync_always());
    let registry = registry(&server.url(), 1).await;
    let over = Arc::new(AtomicBool::new(false));
    let done = Arc::new(AtomicUsize::new(0));
    let writing = tokio::spawn({
        let (registry, over, done) = (registry.clone(), over.clone(), done.clone());
        async move {
            let mut revisions: Vec<u64> = Vec::new();
            let mut unknown = 0;
            while !over.load(Ordering::SeqCst) {
                let expected = revisions.last().copied().unwrap_or(0);
                let value = format!("value {}", revisions.len());
                let revision = match registry.write("k".into(), text(&value), expected).await {
                    Ok(revision) => revision,
                    Err(RegistryError::Unavailable(_)) => {
                        unknown += 1;
                        // It stands, or may be tried again.
                        insist(&registry, "k", &value, expected).await.unwrap()
                    }
                    Err(error) => panic!("{value} at {expected}: {error}"),
                };
                revisions.push(revision);
                done.fetch_add(1, Ordering::SeqCst);
            }
            (revisions, unknown)
        }
    });
    for round in 0..rounds {
        let before = done.load(Ordering::SeqCst);
        if round % 3 == 2 {
            server.pause();
            tokio::time::sleep(Duration::from_millis(900)).await;
            server.resume();
        } else {
            server.kill();
            server.restart();
        }
        while done.load(Ordering::SeqCst) < before + 20 {
            assert!(!writing.is_finished(), "{:?}", writing.await);
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    over.store(true, Ordering::SeqCst);
    let (revisions, unknown) = writing.await.unwrap();
    // Nobody else wrote: every value took exactly one sequence.
    let dense: Vec<u64> = (1..=revisions.len() as u64).collect();
    assert_eq!(revisions, dense, "{unknown} unknown");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_leader_is_killed_and_the_registry_goes_on() {
    let mut cluster = Cluster::start(3);
    let registries = registries(3, &cluster.url(), 3).await;
    let over = Arc::new(AtomicBool::new(false));
    // Each keeps a session, as nodes do, while all contend for a lease.
    let sessions: Vec<_> = registries
        .iter()
        .enumerate()
        .map(|(n, registry)| {
            let (registry, over) = (registry.clone(), over.clone());
            tokio::spawn(async move {
                let (mut revision, mut beats) = (0, 0);
                let (mut unknown, mut slowest) = (None::<Instant>, Duration::ZERO);
                while !over.load(Ordering::SeqCst) {
                    let key = format!("node.n{n}");
                    let value = text(format!("beat {beats}"));
                    match registry.write(key.clone(), value.clone(), revision).await {
                        Ok(written) => {
                            assert!(written > revision);
                            revision = written;
                            beats += 1;
                            slowest =
                                slowest.max(unknown.take().map_or(Duration::ZERO, |t| t.elapsed()));
                        }
                        Err(RegistryError::Unavailable(_)) => {
                            unknown.get_or_insert_with(Instant::now);
                        }
                        Err(error) => panic!("nobody else writes {key}: {error}"),
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                (beats, slowest)
            })
        })
        .collect();
    let contending = tokio::spawn(async move {
        contend(&registries, 30).await;
        registries
    });
    let leader = cluster.leader("KV_METERR");
    cluster.server(leader).kill();
    cluster.leader("KV_METERR");
    cluster.server(leader).restart();
    cluster.until_complete();
    let registries = timeout(PATIENCE, contending).await.unwrap().unwrap();
    // Another one, and contention on what is left.
    let leader = cluster.leader("KV_METERR");
    cluster.server(leader).pause();
    let entry = get(&registries[0], "lease.0").await.unwrap();
    let next = insist(&registries[1], "lease.0", "next", entry.revision).await.unwrap();
    cluster.server(leader).resume();
    over.store(true, Ordering::SeqCst);
    for session in sessions {
        let (beats, slowest) = timeout(PATIENCE, session).await.unwrap().unwrap();
        assert!(beats > 20, "{beats} beats");
        println!("{beats} beats, longest pause {slowest:?}");
    }
    conflict(registries[2].write("lease.0".into(), text("late"), entry.revision).await);
    until_read(&registries[2], "lease.0", next).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nudges_are_heard_by_others_also_after_a_restart() {
    let mut server = NatsServer::start(NatsOptions::new());
    let a = registry(&server.url(), 1).await;
    let b = registry(&server.url(), 1).await;
    let soon = Duration::from_millis(100);
    let (of_a, of_b) = (a.nudged(), b.nudged());
    a.nudge().await;
    timeout(PATIENCE, of_b).await.unwrap();
    assert!(timeout(soon, of_a).await.is_err(), "nobody hears his own nudge");
    assert!(timeout(soon, b.nudged()).await.is_err(), "that one was before");

    let connects = b.connection().0;
    server.kill();
    server.restart();
    let of_b = b.nudged();
    let nudging = async {
        loop {
            a.nudge().await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        () = nudging => unreachable!(),
        heard = timeout(PATIENCE, of_b) => heard.unwrap(),
    }
    assert!(b.connection().0 > connects);
}

fn pattern(len: usize) -> Bytes {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    Bytes::from(bytes)
}

/// Answers `<n>` with so many bytes, and `hang` never.
fn answerer(asked: Arc<AtomicUsize>) -> Answerer {
    Arc::new(move |question| {
        asked.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            match std::str::from_utf8(&question).unwrap().parse() {
                Ok(len) => pattern(len),
                Err(_) => std::future::pending().await,
            }
        })
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_of_any_size_come_whole() {
    let mut server = NatsServer::start(NatsOptions::new());
    let asker = NatsPeers::connect(&settings(&server.url())).await.unwrap();
    let peer = NatsPeers::connect(&settings(&server.url())).await.unwrap();
    let asked = Arc::new(AtomicUsize::new(0));
    let absent = asker.ask("b", text("1"), PATIENCE).await;
    assert_eq!(absent, Err(PeerError::Absent("b".to_owned())));
    assert_eq!(asker.ask("b.*", text("1"), PATIENCE).await, Err(PeerError::Absent("b.*".into())));
    peer.serve("b", answerer(asked.clone())).await.unwrap();
    assert!(peer.serve("b.c", answerer(asked.clone())).await.is_err());
    for len in [0, 1, 512 << 10, (512 << 10) + 1, 5 << 20, 64 << 20] {
        let answer = asker.ask("b", text(len.to_string()), PATIENCE).await.unwrap();
        assert!(answer == pattern(len), "{len} bytes came as {}", answer.len());
    }
    let answers = join_all((0..300).map(|n| asker.ask("b", text(n.to_string()), PATIENCE))).await;
    assert!(answers.into_iter().enumerate().all(|(n, answer)| answer.unwrap() == pattern(n)));
    let large = asker.ask("b", text(((64 << 20) + 1).to_string()), PATIENCE).await;
    assert!(matches!(large, Err(PeerError::Silent { .. })), "{large:?}");
    let soon = Duration::from_millis(100);
    let silent = asker.ask("b", text("hang"), soon).await;
    assert!(matches!(silent, Err(PeerError::Silent { .. })), "{silent:?}");

    // Both come back.
    server.kill();
    let away = asker.ask("b", text("1"), soon).await;
    assert!(matches!(away, Err(PeerError::Silent { .. })), "{away:?}");
    server.restart();
    let again = async {
        while asker.ask("b", text("9"), soon).await != Ok(pattern(9)) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, again).await.unwrap();
    drop(peer);
    let gone = async {
        while !matches!(asker.ask("b", text("9"), soon).await, Err(PeerError::Absent(_))) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, gone).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_so_many_questions_are_answered_at_once() {
    let server = NatsServer::start(NatsOptions::new());
    let asker = NatsPeers::connect(&settings(&server.url())).await.unwrap();
    let peer = NatsPeers::connect(&settings(&server.url())).await.unwrap();
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let gated: Answerer = Arc::new({
        let (gate, now, most) = (gate.clone(), now.clone(), most.clone());
        move |question| {
            let (gate, now, most) = (gate.clone(), now.clone(), most.clone());
            Box::pin(async move {
                most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                gate.acquire().await.unwrap().forget();
                now.fetch_sub(1, Ordering::SeqCst);
                question
            })
        }
    });
    peer.serve("b", gated).await.unwrap();
    let asking = tokio::spawn(join_all((0..400).map({
        let asker = asker.clone();
        move |n: u32| asker.ask("b", text(n.to_string()), PATIENCE)
    })));
    while now.load(Ordering::SeqCst) < 256 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    gate.add_permits(400);
    let answers = asking.await.unwrap();
    assert!(answers.into_iter().enumerate().all(|(n, a)| a.unwrap() == text(n.to_string())));
    assert_eq!(most.load(Ordering::SeqCst), 256);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_pieces_and_questions_do_no_harm() {
    let server = NatsServer::start(NatsOptions::new());
    let asker = NatsPeers::connect(&settings(&server.url())).await.unwrap();
    let client = connect(&settings(&server.url()), "hostile").await.unwrap();
    let mut questions = client.subscribe("meterr.node.evil").await.unwrap();
    client.flush().await.unwrap();
    // What an answer consists of, piece by piece; none is one.
    let answers: [&[(&str, usize)]; 8] = [
        &[("", 3)],
        &[("2/2", 3)],
        &[("1/2", 3), ("1/2", 3)],
        &[("1/3", 3), ("3/3", 3)],
        &[("1/4294967295", 3)],
        &[("1/2", (512 << 10) + 1)],
        &[("0/0", 3)],
        &[("1/2", 3)],
    ];
    let mut heard = client.subscribe("out.0.commit").await.unwrap();
    for (n, answer) in answers.iter().enumerate() {
        // Only the last is waited for: its end never comes.
        let last = n + 1 == answers.len();
        let patience = if last { Duration::from_millis(200) } else { PATIENCE };
        let asking = tokio::spawn({
            let asker = asker.clone();
            async move { asker.ask("evil", text("?"), patience).await }
        });
        let reply = questions.next().await.unwrap().reply.unwrap();
        for (header, len) in *answer {
            let mut headers = HeaderMap::new();
            if !header.is_empty() {
                headers.insert("Meterr-Piece", *header);
            }
            // And a sign to go on that is wanted elsewhere.
            let payload = Bytes::from(vec![1; *len]);
            client
                .publish_with_reply_and_headers(reply.clone(), "out.0.commit", headers, payload)
                .await
                .unwrap();
        }
        let outcome = asking.await.unwrap();
        assert!(matches!(outcome, Err(PeerError::Silent { .. })), "{header:?}", header = answer);
    }

    // Questions without a place for answers, or with one in a log, are not answered.
    let asked = Arc::new(AtomicUsize::new(0));
    let peer = NatsPeers::connect(&settings(&server.url())).await.unwrap();
    peer.serve("b", answerer(asked.clone())).await.unwrap();
    client.publish("meterr.node.b", "1".into()).await.unwrap();
    client.publish_with_reply("meterr.node.b", "out.0.commit", "1".into()).await.unwrap();
    // One that panics spoils nothing.
    client.publish_with_reply("meterr.node.b", "_X", vec![0xff].into()).await.unwrap();
    client.flush().await.unwrap();
    let answer = asker.ask("b", text("7"), PATIENCE).await.unwrap();
    assert_eq!(answer, pattern(7));
    assert!(timeout(Duration::from_millis(100), heard.next()).await.is_err());
}
