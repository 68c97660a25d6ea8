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
use meterr_connectors::changes::LiveMessage;
use meterr_connectors::nats::connection::{NatsSettings, connect};
use meterr_connectors::nats::follow::Limits;
use meterr_connectors::nats::subscriber::{FollowError, Following, LiveEvent, Subscriber};
use meterr_connectors::org_state::OrgState;
use meterr_operators::rng::Rng;
use nats::{NatsOptions, NatsServer};
use serde_json::json;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Longest time an event may take before the test fails instead of hanging.
const PATIENCE: Duration = Duration::from_secs(60);

fn settings(server: &NatsServer) -> NatsSettings {
    NatsSettings { url: server.url(), ..NatsSettings::default() }
}

/// A commit every epoch; each adds an event.
struct Engine {
    client: Client,
    committed: AtomicU64,
    /// Commits it remembers.
    window: AtomicU64,
    questions: AtomicU64,
    answering: parking_lot::Mutex<Option<JoinHandle<()>>>,
}

impl Engine {
    /// One of `bad` questions is not answered as it should be; none when 0.
    async fn start(server: &NatsServer, committed: u64, bad: u64) -> Arc<Engine> {
        let engine = Arc::new(Engine {
            client: connect(&settings(server), "engine").await.unwrap(),
            committed: committed.into(),
            window: 500.into(),
            questions: 0.into(),
            answering: None.into(),
        });
        let questions = engine.client.subscribe("meterr.query.acme").await.unwrap();
        engine.settled().await;
        let answering = engine.clone().answer(questions, bad);
        *engine.answering.lock() = Some(tokio::spawn(answering));
        engine
    }

    /// Returns when the server has read everything that was sent.
    async fn settled(&self) {
        let inbox = self.client.new_inbox();
        let mut echo = self.client.subscribe(inbox.clone()).await.unwrap();
        self.client.publish(inbox, Bytes::new()).await.unwrap();
        echo.next().await.unwrap();
    }

    async fn answer(self: Arc<Engine>, mut questions: async_nats::Subscriber, bad: u64) {
        let mut rng = Rng::new(4);
        while let Some(question) = questions.next().await {
            self.questions.fetch_add(1, Ordering::SeqCst);
            let reply = question.reply.unwrap();
            let mut last = self.committed.load(Ordering::SeqCst);
            let send = |body| self.client.publish(reply.clone(), body);
            if bad > 0 && rng.below(bad) == 0 {
                match rng.below(5) {
                    0 => continue,
                    1 => {
                        let mut headers = HeaderMap::new();
                        headers.insert("Nats-Service-Error", "starting");
                        headers.insert("Nats-Service-Error-Code", "503");
                        let refused =
                            self.client.publish_with_headers(reply, headers, Bytes::new());
                        refused.await.unwrap();
                        continue;
                    }
                    2 => {
                        send("[not json".into()).await.unwrap();
                        continue;
                    }
                    // The end of the answer is lost.
                    3 => {
                        send(body("change", last, Some(last - 1), true)).await.unwrap();
                        continue;
                    }
                    // A node that is behind.
                    _ => last = last.saturating_sub(20),
                }
            }
            let after = serde_json::from_slice::<serde_json::Value>(&question.payload).ok();
            let after =
                after.and_then(|q| q["after"].as_str()?.strip_prefix("0-")?.parse::<u64>().ok());
            match after.filter(|after| *after <= last) {
                Some(after) if after == last => {
                    send(body("current", last, None, false)).await.unwrap();
                }
                Some(after) if last - after <= self.window.load(Ordering::SeqCst) => {
                    for epoch in after + 1..=last {
                        let more = epoch < last;
                        send(body("change", epoch, Some(epoch - 1), more)).await.unwrap();
                    }
                }
                _ => send(body("snapshot", last, None, false)).await.unwrap(),
            }
        }
    }

    /// Commits without a word.
    fn commit(&self) -> u64 {
        self.committed.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Publishes a commit, whole or in two pieces.
    async fn publish(&self, epoch: u64, pieces: bool) {
        let change = body("change", epoch, Some(epoch - 1), false);
        if !pieces {
            return self.client.publish("spend.acme", change).await.unwrap();
        }
        let mut change: serde_json::Value = serde_json::from_slice(&change).unwrap();
        change["pieces"] = 2.into();
        let rest = change["views"].as_object_mut().unwrap().remove("user_all").unwrap();
        self.client.publish("spend.acme", change.to_string().into()).await.unwrap();
        (change["piece"], change["views"]) = (1.into(), json!({ "user_all": rest }));
        self.client.publish("spend.acme", change.to_string().into()).await.unwrap();
    }

    fn stop(&self) {
        self.answering.lock().take().unwrap().abort();
    }
}

/// A change or snapshot: as many events as the epoch has, the last of them by a user of its own.
fn body(kind: &str, epoch: u64, previous: Option<u64>, more: bool) -> Bytes {
    let first = if kind == "snapshot" { 1 } else { epoch };
    let user = |n: u64| json!([null, n.to_string(), 1, "0", 0, []]);
    let users: Vec<_> = (first..=epoch).map(user).collect();
    let mut body = json!({
        "kind": kind, "shard": 0, "epoch": epoch, "as_of": format!("0:{epoch}"), "org": "acme",
        "piece": 0, "pieces": 1,
        "views": {"org_all": [[null, null, epoch, "0", 0, []]], "user_all": users},
    });
    if let Some(previous) = previous {
        body["previous"] = previous.into();
    }
    if more {
        body["more"] = true.into();
    }
    body.to_string().into()
}

/// The next event that is no interruption.
async fn next(events: &mut Following) -> LiveEvent {
    loop {
        match timeout(PATIENCE, events.next()).await.unwrap().unwrap() {
            LiveEvent::Interrupted(_) => {}
            event => return event,
        }
    }
}

fn change(event: LiveEvent) -> LiveMessage {
    match event {
        LiveEvent::Change(message) => message,
        event => panic!("{event:?}"),
    }
}

fn snapshot(event: LiveEvent) -> LiveMessage {
    match event {
        LiveEvent::Snapshot(message) => message,
        event => panic!("{event:?}"),
    }
}

/// Every user is there once, and the org has the events of all.
fn check(state: &OrgState, epoch: u64) {
    assert_eq!(state.at().unwrap().epoch, epoch);
    assert_eq!(state.figures("org_all", None, None).map_or(0, |f| f.events) as u64, epoch);
    assert_eq!(state.rows("user_all").count() as u64, epoch);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_commit_comes_out_once_through_losses_and_kills() {
    const COMMITS: u64 = 800;
    let mut server = NatsServer::start(NatsOptions::new());
    let engine = Engine::start(&server, 1, 3).await;
    let subscriber = Subscriber::connect(&settings(&server)).await.unwrap();
    let subscriber = subscriber.quiet(Duration::from_millis(100));
    let mut events = subscriber.patience(Duration::from_millis(200)).follow("acme").await.unwrap();
    let told = Arc::new(AtomicU64::new(0));
    let telling = told.clone();
    let reading = tokio::spawn(async move {
        let (mut known, mut changes, mut interrupted) = (None, 0_u64, 0);
        let mut state = OrgState::default();
        while known != Some(COMMITS) {
            match timeout(PATIENCE, events.next()).await.unwrap().unwrap() {
                LiveEvent::Snapshot(message) => {
                    assert!(known.is_none(), "a second snapshot");
                    known = Some(message.epoch);
                    state.apply(message);
                }
                LiveEvent::Change(message) => {
                    assert_eq!(Some(message.epoch), known.map(|known| known + 1));
                    known = Some(message.epoch);
                    state.apply(message);
                    changes += 1;
                }
                LiveEvent::Reset => panic!("no more was missed than the engine remembers"),
                LiveEvent::Interrupted(_) => {
                    interrupted += 1;
                    continue;
                }
            }
            check(&state, known.unwrap());
            telling.store(known.unwrap(), Ordering::SeqCst);
        }
        (changes, interrupted)
    });
    // Otherwise much of it may come by the first snapshot.
    while told.load(Ordering::SeqCst) == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut rng = Rng::new(3);
    while engine.committed.load(Ordering::SeqCst) < COMMITS {
        let epoch = engine.commit();
        // Every third one is lost; sometimes the last of all.
        if rng.percent(66) {
            engine.publish(epoch, rng.percent(30)).await;
        }
        if rng.percent(2) {
            engine.client.publish("spend.acme", "{\"kind\":\"change\"".into()).await.unwrap();
        }
        engine.client.flush().await.unwrap();
        while epoch > told.load(Ordering::SeqCst) + 400 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if epoch % 200 == 100 {
            let connects = || engine.client.statistics().connects.load(Ordering::Relaxed);
            let before = connects();
            server.kill();
            server.restart();
            while connects() == before {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        }
    }
    let (changes, interrupted) = reading.await.unwrap();
    assert_eq!(changes, COMMITS - 1);
    assert!(interrupted > 0, "the engine did not fail to answer");
    engine.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_engine_it_says_so_and_waits() {
    let server = NatsServer::start(NatsOptions::new());
    let subscriber = Subscriber::connect(&settings(&server)).await.unwrap();
    let mut events = subscriber.follow("acme").await.unwrap();
    let first = events.next().await.unwrap();
    assert_eq!(first, LiveEvent::Interrupted("no engine is there to answer".to_owned()));
    let engine = Engine::start(&server, 7, 0).await;
    // It is not said a second time, however often it asked.
    let event = timeout(PATIENCE, events.next()).await.unwrap().unwrap();
    assert_eq!(snapshot(event).epoch, 7);
    engine.stop();
    let strange = subscriber.follow("a.b").await.unwrap_err();
    assert!(matches!(strange, FollowError::Org(_)), "{strange}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_away_is_told_and_waited_for() {
    let mut server = NatsServer::start(NatsOptions::new());
    let engine = Engine::start(&server, 7, 0).await;
    let subscriber = Subscriber::connect(&settings(&server)).await.unwrap();
    let mut events = subscriber.follow("acme").await.unwrap();
    assert_eq!(snapshot(next(&mut events).await).epoch, 7);
    server.kill();
    let event = timeout(PATIENCE, events.next()).await.unwrap().unwrap();
    assert_eq!(event, LiveEvent::Interrupted("the connection to the server is lost".to_owned()));
    engine.commit();
    engine.commit();
    server.restart();
    for epoch in [8, 9] {
        assert_eq!(change(next(&mut events).await).epoch, epoch);
    }
    engine.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_takes_its_time_misses_nothing() {
    const COMMITS: u64 = 1_000;
    let server = NatsServer::start(NatsOptions::new());
    let engine = Engine::start(&server, 3, 0).await;
    engine.window.store(u64::MAX, Ordering::SeqCst);
    let client = connect(&settings(&server), "reader").await.unwrap();
    let received = || client.statistics().in_messages.load(Ordering::Relaxed);
    let subscriber = Subscriber::on(client.clone()).backlog_bytes(0);
    let mut events = subscriber.follow("acme").await.unwrap();
    assert_eq!(snapshot(next(&mut events).await).epoch, 3);
    let (before, asked) = (received(), engine.questions.load(Ordering::SeqCst));
    for _ in 0..COMMITS {
        engine.publish(engine.commit(), false).await;
    }
    engine.settled().await;
    while received() < before + COMMITS {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for epoch in 4..=COMMITS + 3 {
        assert_eq!(change(next(&mut events).await).epoch, epoch);
    }
    assert!(engine.questions.load(Ordering::SeqCst) > asked, "nothing was dropped");
    engine.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_much_missed_begins_anew_and_hostile_messages_do_no_harm() {
    let server = NatsServer::start(NatsOptions::new());
    let engine = Engine::start(&server, 10, 0).await;
    let limits = Limits { waiting_bytes: 1 << 20, ..Limits::default() };
    let subscriber = Subscriber::connect(&settings(&server)).await.unwrap().limits(limits);
    let mut events = subscriber.follow("acme").await.unwrap();
    assert_eq!(snapshot(next(&mut events).await).epoch, 10);
    engine.window.store(2, Ordering::SeqCst);
    for _ in 0..5 {
        engine.commit();
    }
    engine.publish(engine.commit(), false).await;
    assert_eq!(next(&mut events).await, LiveEvent::Reset);
    let mut state = OrgState::default();
    state.apply(snapshot(next(&mut events).await));
    check(&state, 16);

    let strange = |more: &str| {
        format!("{{\"kind\":\"change\",\"shard\":0,\"as_of\":\"\",\"org\":\"acme\",{more}}}")
    };
    let most = u64::MAX;
    let mut hostile = vec![
        String::new(),
        "[".repeat(100_000),
        strange("\"epoch\":-1"),
        strange("\"epoch\":17,\"piece\":4294967295,\"pieces\":4294967295"),
        strange("\"epoch\":17,\"piece\":0,\"pieces\":0"),
        strange(&format!("\"epoch\":{most},\"previous\":{most}")),
        strange(
            "\"epoch\":17,\"previous\":16,\"views\":{\"v\":[[null,null,1,null,0,[9223372036854775807,1]]]}",
        ),
        strange("\"epoch\":17,\"previous\":16,\"views\":{\"v\":[[null,null,1,\"1e20\",0,[]]]}"),
        strange("\"epoch\":17").replace("acme", "globex"),
        strange("\"epoch\":17").replace("change", "snapshot"),
        strange("\"epoch\":17").replace("\"shard\":0", "\"shard\":65535"),
    ];
    // A change without end.
    hostile.extend((0..2_000).map(|piece| {
        let rows = "[null,null,1,null,0,[]],".repeat(20);
        let views = format!("\"views\":{{\"v\":[{}]}}", rows.trim_end_matches(','));
        strange(&format!("\"epoch\":99,\"piece\":{piece},\"pieces\":4294967295,{views}"))
    }));
    for body in hostile {
        engine.client.publish("spend.acme", body.into()).await.unwrap();
    }
    let epoch = engine.commit();
    engine.publish(epoch, true).await;
    state.apply(change(next(&mut events).await));
    check(&state, epoch);
    engine.stop();
}
