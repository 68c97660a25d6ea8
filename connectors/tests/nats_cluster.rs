//! A stream of three replicas whose leader is killed again and again: nothing acknowledged is lost or
//! stored twice, commits stand once, and no server's uncertainty is taken for a log that went back.
//! `METERR_CLUSTER_ROUNDS` kills more than two.

#![allow(clippy::unwrap_used)]

#[path = "../../tests/support/nats.rs"]
mod nats;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use meterr_connectors::log::{Log, LogError, Message};
use meterr_connectors::nats::connection::NatsSettings;
use meterr_connectors::nats::log::{Connections, JetStreamLog};
use meterr_connectors::nats::streams::Wanted;
use meterr_operators::ids::ShardId;
use nats::Cluster;

async fn connections(url: &str) -> Connections {
    let settings = NatsSettings { url: url.to_owned(), ..NatsSettings::default() };
    Connections::connect(&settings).await.unwrap()
}

async fn all(log: &JetStreamLog) -> Vec<String> {
    let mut found = Vec::new();
    loop {
        let records = log.read(found.len() as u64 + 1, 1 << 20).await.unwrap();
        if records.is_empty() {
            return found;
        }
        let text = |payload: &[u8]| String::from_utf8(payload.to_vec()).unwrap();
        found.extend(records.iter().map(|record| text(&record.message.payload)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn leaders_are_killed_and_the_log_goes_on() {
    let rounds = std::env::var("METERR_CLUSTER_ROUNDS").map_or(2, |text| text.parse().unwrap());
    let mut cluster = Cluster::start(3);
    let connections = connections(&cluster.url()).await;
    let usage = Wanted::usage(ShardId(0), 3, None);
    let usage = JetStreamLog::open(&connections, &usage, Some("a")).await.unwrap();
    let out = Wanted::out(ShardId(0), 3, None);
    let out = JetStreamLog::open(&connections, &out, Some("b")).await.unwrap();

    let over = Arc::new(AtomicBool::new(false));
    let appending = tokio::spawn({
        let (log, over) = (usage.clone(), over.clone());
        async move {
            let mut n = 0;
            while !over.load(Ordering::SeqCst) {
                let appended = log.append(vec![Message::new("usage.0.a", format!("{n}"))]).await;
                assert_eq!(appended.unwrap().last, n + 1, "message {n} is not where it belongs");
                n += 1;
            }
            n
        }
    });
    let committing = tokio::spawn({
        let (log, over) = (out.clone(), over.clone());
        async move {
            let (mut n, mut previous) = (0, 0);
            while !over.load(Ordering::SeqCst) {
                let parts = vec![Message::new("out.0.part", format!("part {n}"))];
                let commit = Message::new("out.0.commit", format!("commit {n}"));
                previous = log.commit(parts, commit, previous).await.unwrap().last;
                n += 1;
            }
            n
        }
    });
    let looking = tokio::spawn({
        let (usage, out, over) = (usage.clone(), out.clone(), over.clone());
        async move {
            let mut looks = 0;
            while !over.load(Ordering::SeqCst) {
                for log in [&usage, &out] {
                    match log.refresh().await {
                        Ok(()) | Err(LogError::Unavailable { .. }) => looks += 1,
                        Err(error) => panic!("{error}"),
                    }
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            looks
        }
    });

    for round in 0..rounds {
        let stream = if round % 2 == 0 { "USAGE_0" } else { "OUT_0" };
        let before = (usage.head(), out.head());
        let leader = cluster.leader(stream);
        cluster.server(leader).kill();
        // Both go on without it.
        while usage.head() < before.0 + 20 || out.head() < before.1 + 20 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        cluster.server(leader).restart();
        cluster.until_complete();
    }
    over.store(true, Ordering::SeqCst);
    let (appended, committed) = (appending.await.unwrap(), committing.await.unwrap());
    assert!(looking.await.unwrap() > 0);

    // A reader of its own, who knows nothing yet.
    let usage = Wanted::usage(ShardId(0), 3, None);
    let usage = JetStreamLog::open(&connections, &usage, None).await.unwrap();
    let expected: Vec<String> = (0..appended).map(|n| n.to_string()).collect();
    assert!(all(&usage).await == expected, "the usage log is not what was acknowledged");
    let out = Wanted::out(ShardId(0), 3, None);
    let out = JetStreamLog::open(&connections, &out, None).await.unwrap();
    let found = all(&out).await;
    let commits: Vec<usize> =
        (0..found.len()).filter(|at| found[*at].starts_with("commit")).collect();
    assert_eq!(commits.len(), committed);
    for (n, at) in commits.into_iter().enumerate() {
        assert_eq!(found[at], format!("commit {n}"));
        assert_eq!(found[at - 1], format!("part {n}"));
    }
}
