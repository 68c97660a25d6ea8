//! The subscriber on a real server that is killed, with an engine of a few lines that loses most of
//! what it should publish and is away now and then: every commit comes out once and in order.

#![allow(clippy::unwrap_used)]

#[path = "../../tests/support/nats.rs"]
mod nats;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::{Client, HeaderMap};
use bytes::Bytes;
use futures::StreamExt;
use meterr_connectors::nats::connection::{NatsSettings, connect};
use meterr_connectors::nats::subscriber::{FollowError, LiveEvent, Subscriber};
use meterr_operators::rng::Rng;
use nats::{NatsOptions, NatsServer};
use parking_lot::Mutex;

const COMMITS: u64 = 800;

async fn client(server: &NatsServer) -> Client {
    let settings = NatsSettings { url: server.url(), ..NatsSettings::default() };
    connect(&settings, "test").await.unwrap()
}

/// A change or snapshot: as many events as the epoch has.
fn body(kind: &str, epoch: u64, previous: Option<u64>, more: bool) -> Bytes {
    let mut body = serde_json::json!({
        "kind": kind, "shard": 0, "epoch": epoch, "as_of": format!("0:{epoch}"), "org": "acme",
        "piece": 0, "pieces": 1,
        "views": {"org_all": [[null, null, epoch, "0", 0, []]]},
    });
    if let Some(previous) = previous {
        body["previous"] = previous.into();
    }
    if more {
        body["more"] = true.into();
    }
    body.to_string().into()
}

/// Answers as an engine does that remembers the last 500 commits; one in five questions badly.
async fn answer(client: Client, committed: Arc<Mutex<u64>>) {
    let mut rng = Rng::new(4);
    let mut questions = client.subscribe("meterr.query.acme").await.unwrap();
    while let Some(question) = questions.next().await {
        let reply = question.reply.unwrap();
        let last = *committed.lock();
        match rng.below(15) {
            0 => continue,
            1 => {
                let mut headers = HeaderMap::new();
                headers.insert("Nats-Service-Error", "starting");
                headers.insert("Nats-Service-Error-Code", "503");
                client.publish_with_headers(reply, headers, Bytes::new()).await.unwrap();
                continue;
            }
            2 => {
                client.publish(reply, "[not json".into()).await.unwrap();
                continue;
            }
            _ => {}
        }
        let after = serde_json::from_slice::<serde_json::Value>(&question.payload).ok();
        let after =
            after.and_then(|q| q["after"].as_str()?.strip_prefix("0-")?.parse::<u64>().ok());
        match after {
            Some(after) if after == last => {
                client.publish(reply, body("current", last, None, false)).await.unwrap();
            }
            Some(after) if last - after <= 500 => {
                for epoch in after + 1..=last {
                    let change = body("change", epoch, Some(epoch - 1), epoch < last);
                    client.publish(reply.clone(), change).await.unwrap();
                }
            }
            _ => client.publish(reply, body("snapshot", last, None, false)).await.unwrap(),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_commit_comes_out_once_through_losses_and_kills() {
    let mut server = NatsServer::start(NatsOptions::new());
    let engine = client(&server).await;
    let committed = Arc::new(Mutex::new(0));
    let answering = tokio::spawn(answer(engine.clone(), committed.clone()));
    let subscriber = Subscriber::on(client(&server).await).quiet(Duration::from_millis(100));
    let mut events = subscriber.follow("acme").await.unwrap();
    let told = Arc::new(AtomicU64::new(0));
    let telling = told.clone();
    let reading = tokio::spawn(async move {
        let (mut known, mut changes, mut interrupted) = (None, 0, 0);
        while known != Some(COMMITS) {
            match events.next().await.unwrap() {
                LiveEvent::Snapshot(message) => {
                    assert!(known.is_none(), "a second snapshot");
                    known = Some(message.epoch);
                }
                LiveEvent::Change(message) => {
                    assert_eq!(Some(message.epoch), known.map(|known| known + 1));
                    assert_eq!(message.views["org_all"][0].figures.events as u64, message.epoch);
                    known = Some(message.epoch);
                    changes += 1;
                }
                LiveEvent::Reset => panic!("no more was missed than the engine remembers"),
                LiveEvent::Interrupted(_) => interrupted += 1,
            }
            telling.store(known.unwrap_or(0), Ordering::SeqCst);
        }
        (changes, interrupted)
    });
    let mut rng = Rng::new(3);
    for epoch in 1..=COMMITS {
        *committed.lock() = epoch;
        // Every third one is lost; sometimes the last of all.
        if rng.percent(66) {
            let change = body("change", epoch, Some(epoch - 1), false);
            engine.publish("spend.acme", change).await.unwrap();
        }
        engine.flush().await.unwrap();
        while epoch > told.load(Ordering::SeqCst) + 400 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if epoch % 200 == 100 {
            let before = engine.statistics().connects.load(Ordering::Relaxed);
            server.kill();
            server.restart();
            while engine.statistics().connects.load(Ordering::Relaxed) == before {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
    }
    let (changes, interrupted) = reading.await.unwrap();
    assert!(changes > 600, "{changes} of {COMMITS} came as changes");
    assert!(interrupted > 0, "the engine did not fail to answer");
    answering.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_engine_it_says_so_and_waits() {
    let server = NatsServer::start(NatsOptions::new());
    let subscriber = Subscriber::on(client(&server).await);
    let mut events = subscriber.follow("acme").await.unwrap();
    let first = events.next().await.unwrap();
    assert_eq!(first, LiveEvent::Interrupted("no engine is there to answer".to_owned()));
    let engine = client(&server).await;
    let answering = tokio::spawn(answer(engine, Arc::new(Mutex::new(7))));
    loop {
        match events.next().await.unwrap() {
            LiveEvent::Interrupted(_) => {}
            LiveEvent::Snapshot(message) => break assert_eq!(message.epoch, 7),
            event => panic!("{event:?}"),
        }
    }
    answering.abort();
    let strange = subscriber.follow("a.b").await.unwrap_err();
    assert!(matches!(strange, FollowError::Org(_)), "{strange}");
}
