//! The questions over a real server, with an engine that answers what a test put into it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_nats::{Client, HeaderMap, Message};
use bytes::Bytes;
use futures::StreamExt;
use meterr_operators::event::{Event, EventFields, Reason, Rejection};
use meterr_operators::ids::{ShardId, shard_of};
use meterr_operators::time::Time;
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::server::{NatsOptions, NatsServer};
use crate::fake::{self, Fake, SHARDS};
use crate::nats::connection::{NatsSettings, connect};
use crate::nats::service::{ServiceHandle, ServiceSettings, serve_queries};
use crate::requests::{Decoders, Limits};

/// Time after which a test fails instead of hanging.
const PATIENCE: Duration = Duration::from_secs(30);

/// A server, one asker, and any number of nodes.
pub(super) struct World {
    runtime: Runtime,
    server: NatsServer,
    asker: Client,
}

pub(super) struct Node {
    pub fake: Arc<Fake>,
    pub handle: ServiceHandle,
}

/// A small decoder: objects with `id` and `org`.
fn decoders() -> Decoders {
    fn decode(line: &[u8]) -> Result<Event<'_>, Rejection> {
        #[derive(serde::Deserialize)]
        struct Line {
            id: String,
            org: String,
        }
        let line: Line = serde_json::from_slice(line)
            .map_err(|error| Rejection::new(Reason::Malformed, error.to_string()))?;
        Event::new(EventFields {
            id: line.id.into(),
            org: line.org.into(),
            user: "u".into(),
            provider: "p".into(),
            model: "m".into(),
            time: Time(1),
            ..EventFields::default()
        })
    }
    Decoders { decode, ..Decoders::default() }
}

pub(super) fn settings() -> ServiceSettings {
    ServiceSettings { decoders: decoders(), ..ServiceSettings::default() }
}

impl World {
    pub fn new() -> World {
        World::with(NatsOptions::new())
    }

    fn with(options: NatsOptions) -> World {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let server = NatsServer::start(options);
        let asker = runtime.block_on(client(&server));
        World { runtime, server, asker }
    }

    pub fn node(&self) -> Node {
        self.node_with(settings(), Fake::default())
    }

    pub fn node_with(&self, settings: ServiceSettings, fake: Fake) -> Node {
        let fake = Arc::new(fake);
        let api = fake.clone();
        let handle = self.runtime.block_on(async {
            serve_queries(client(&self.server).await, api, settings).await.unwrap()
        });
        Node { fake, handle }
    }

    pub fn ask(&self, subject: &str, body: impl Into<Bytes>) -> Reply {
        self.runtime.block_on(ask(&self.asker, subject, body.into()))
    }

    /// Begins a request whose reply nobody waits for yet.
    fn begin(&self, subject: &str, body: &str) -> tokio::task::JoinHandle<Reply> {
        let (asker, subject) = (self.asker.clone(), subject.to_owned());
        let body = Bytes::from(body.to_owned());
        self.runtime.spawn(async move { ask(&asker, &subject, body).await })
    }

    fn end(&self, begun: tokio::task::JoinHandle<Reply>) -> Reply {
        self.runtime.block_on(begun).unwrap()
    }

    /// Waits until a condition holds.
    fn until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let began = Instant::now();
        while !holds() {
            assert!(began.elapsed() < PATIENCE, "{what}: not after {PATIENCE:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

async fn client(server: &NatsServer) -> Client {
    let settings = NatsSettings { url: server.url(), ..NatsSettings::default() };
    connect(&settings, "test").await.unwrap()
}

async fn ask(asker: &Client, subject: &str, body: Bytes) -> Reply {
    let request = async_nats::Request::new().payload(body).timeout(Some(PATIENCE));
    Reply(
        asker
            .send_request(subject.to_owned(), request)
            .await
            .unwrap_or_else(|e| panic!("{subject}: {e}")),
    )
}

#[derive(Debug)]
pub(super) struct Reply(Message);

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.0.headers.as_ref()?.get(name).map(|value| value.as_str())
    }

    pub fn payload(&self) -> &[u8] {
        &self.0.payload
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.0.payload).unwrap()
    }

    #[track_caller]
    pub fn ok(&self) -> Value {
        assert_eq!(self.header("Nats-Service-Error"), None, "{:?}", self.0.payload);
        self.json()
    }

    #[track_caller]
    pub fn problem(&self, status: u16, kind: &str) -> Value {
        let problem = self.json();
        assert_eq!(self.header("Nats-Service-Error-Code"), Some(status.to_string().as_str()));
        assert_eq!(problem["type"], format!("/problems/{kind}"), "{problem}");
        assert_eq!(problem["status"], status);
        let sentence = self.header("Nats-Service-Error").unwrap();
        assert!(problem["detail"].as_str().unwrap().starts_with(sentence) && !sentence.is_empty());
        problem
    }
}

#[test]
fn an_answer_of_several_messages_comes_in_order() {
    let world = World::new();
    let node = world.node();
    let sent: Vec<Bytes> = (0..200).map(|n| Bytes::from(format!("{{\"piece\":{n}}}"))).collect();
    *node.fake.missed.lock() = sent.clone();
    let received = world.runtime.block_on(async {
        let inbox = world.asker.new_inbox();
        let mut replies = world.asker.subscribe(inbox.clone()).await.unwrap();
        let asking = world.asker.publish_with_reply("meterr.query.acme", inbox, "".into());
        asking.await.unwrap();
        let mut received = Vec::new();
        while received.len() < sent.len() {
            let next = tokio::time::timeout(PATIENCE, replies.next()).await;
            received.push(next.expect("in time").expect("connected").payload);
        }
        received
    });
    assert_eq!(received, sent);
    *node.fake.missed.lock() = Vec::new();
    world.ask("meterr.query.acme", "").problem(500, "internal");
}

#[test]
fn an_answer_larger_than_a_message_asks_for_less() {
    let world = World::with(NatsOptions::new().text("max_payload: 4096"));
    let node = world.node();
    *node.fake.rows.lock() = fake::rows(100);
    let problem = world.ask("meterr.query.acme.spend", "").problem(422, "answer-too-large");
    assert_eq!(problem["limit"], 4096);
    assert!(problem["detail"].as_str().unwrap().contains("with limit"), "{problem}");
    let page = world.ask("meterr.query.acme.spend", r#"{"limit":5}"#).ok();
    assert_eq!(page["rows"].as_array().unwrap().len(), 5);
}

#[test]
fn a_question_beyond_the_limit_is_refused() {
    let world = World::new();
    let _node =
        world.node_with(ServiceSettings { question_bytes_max: 100, ..settings() }, Fake::default());
    let padded = |bytes: usize| format!("{:<bytes$}", "{}");
    let problem = world.ask("meterr.query.acme.spend", padded(101)).problem(413, "too-large");
    assert_eq!(problem["limit"], 100);
    world.ask("meterr.query.acme.spend", padded(100)).ok();
    // Bodies may be longer.
    let prices = format!("{:<200}", r#"{"prices":[{"provider":"p","model":"m","input":"1"}]}"#);
    world.ask("meterr.admin.prices.set", prices).ok();
}

/// An org of a shard.
fn org_of(shard: u16) -> String {
    (0..).map(|n| format!("o{n}")).find(|org| shard_of(org, SHARDS) == ShardId(shard)).unwrap()
}

#[test]
fn a_shard_that_hangs_holds_up_nobody_else() {
    let world = World::new();
    let node = world.node_with(
        ServiceSettings { questions_max: 3, waiting_max: 2, admin_max: 1, ..settings() },
        Fake::default(),
    );
    let (hangs, lives) = (org_of(0), org_of(1));
    *node.fake.stuck.lock() = Some(format!("org: {hangs:?}"));
    let subject = format!("meterr.query.{hangs}.spend");
    let begun: Vec<_> = (0..3).map(|_| world.begin(&subject, "")).collect();
    world.until("three are asked", || node.fake.asked.lock().len() == 3);
    let problem = world.ask(&subject, "").problem(503, "unavailable");
    assert!(problem["detail"].as_str().unwrap().contains("all 3 places"), "{problem}");
    // Another question about the same shard has no place either; one about another has.
    world.ask(&format!("meterr.query.{hangs}"), "").problem(503, "unavailable");
    world.ask(&format!("meterr.query.{lives}.spend"), "").ok();
    world.ask("meterr.admin.top", "").ok();

    // Who waits for a position leaves the places of the others.
    let begin = |body| world.begin(&format!("meterr.query.{lives}.spend"), body);
    let before = node.fake.asked.lock().len();
    let waiting = [(); 2].map(|()| begin(r#"{"min_position":"1:9"}"#));
    world.until("two wait", || node.fake.asked.lock().len() == before + 2);
    let problem = world.end(begin(r#"{"min_position":"1:9"}"#)).problem(503, "unavailable");
    assert!(problem["detail"].as_str().unwrap().contains("all 2 places"), "{problem}");
    for _ in 0..5 {
        world.ask(&format!("meterr.query.{lives}.spend"), "").ok();
    }
    node.fake.reached.send_replace(9);
    for waiting in waiting {
        world.end(waiting).ok();
    }
    let overloads: u64 = node.handle.counted().map(|(_, counted)| counted.overloads).sum();
    assert_eq!(overloads, 3);
    begun.iter().for_each(|begun| begun.abort());
}

#[test]
fn waits_end() {
    let world = World::new();
    let limits = Limits {
        request_timeout: Duration::from_millis(50),
        min_position_timeout: Duration::from_millis(50),
        ..Limits::default()
    };
    let node = world.node_with(ServiceSettings { limits, ..settings() }, Fake::default());
    let asked = r#"{"min_position":"3:9,c:2","timeout_ms":0}"#;
    let problem = world.ask("meterr.query.acme.spend", asked).problem(504, "timeout");
    assert_eq!(problem["current"], "3:7,c:7");
    *node.fake.stuck.lock() = Some("views".to_owned());
    world.ask("meterr.admin.views", "").problem(504, "timeout");
    // The place is free again.
    *node.fake.stuck.lock() = None;
    world.ask("meterr.admin.views", "").ok();
}

#[test]
fn answers_go_to_inboxes_only() {
    let world = World::new();
    let node = world.node();
    world.runtime.block_on(async {
        let mut heard = world.asker.subscribe("spend.*").await.unwrap();
        let mut own = world.asker.subscribe("_own").await.unwrap();
        for reply in ["spend.other", "usage.0.other", "$JS.API.STREAM.DELETE.OUT_0", "_own"] {
            let asking = world.asker.publish_with_reply("meterr.query.acme", reply, "".into());
            asking.await.unwrap();
        }
        // Without a reply subject nothing is asked, let alone changed.
        world.asker.publish("meterr.admin.views.remove", r#"{"name":"v"}"#.into()).await.unwrap();
        let answer = tokio::time::timeout(PATIENCE, own.next()).await.expect("in time");
        assert!(answer.is_some());
        world.asker.flush().await.unwrap();
        let quiet = tokio::time::timeout(Duration::from_millis(50), heard.next()).await;
        assert!(quiet.is_err(), "{quiet:?}");
    });
    world.ask("meterr.admin.views.remove", r#"{"name":"w"}"#).ok();
    assert_eq!(*node.fake.asked.lock(), ["catch_up acme None", "remove w"]);
    let ignored = |of: &str| node.handle.counted().find(|(name, _)| *name == of).unwrap().1.ignored;
    assert_eq!((ignored("live"), ignored("views-remove")), (3, 1));
}

#[test]
fn nodes_share_the_questions_and_tell_about_themselves() {
    let world = World::new();
    let nodes = [world.node(), world.node()];
    for _ in 0..60 {
        world.ask("meterr.query.acme.spend", "").ok();
    }
    let answered = nodes.each_ref().map(|node| node.fake.asked.lock().len());
    assert_eq!(answered[0] + answered[1], 60);
    assert!(answered.iter().all(|answered| *answered > 5), "{answered:?}");

    world.ask("meterr.query.acme.spend", "{").problem(400, "body");
    let said: Vec<Value> = nodes
        .each_ref()
        .map(|node| world.ask(&format!("$SRV.STATS.meterr.{}", node.handle.node()), "").json())
        .into();
    let of_spend = |stats: &Value| {
        let endpoints = stats["endpoints"].as_array().unwrap();
        endpoints.iter().find(|endpoint| endpoint["name"] == "spend").unwrap().clone()
    };
    let [a, b] = [of_spend(&said[0]), of_spend(&said[1])];
    let sum = |field: &str| {
        let of = |stats: &Value| stats.pointer(field).unwrap().as_u64().unwrap();
        of(&a) + of(&b)
    };
    assert_eq!(sum("/num_requests"), 61);
    assert_eq!((sum("/data/answers"), sum("/data/problems")), (60, 1));
    assert_eq!(a["queue_group"], b["queue_group"]);

    let info = world.ask("$SRV.INFO.meterr", "").json();
    assert_eq!(
        (&info["name"], &info["version"]),
        (&json!("meterr"), &json!(env!("CARGO_PKG_VERSION")))
    );
    assert_eq!(
        info["endpoints"].as_array().unwrap().len(),
        crate::nats::endpoints::ENDPOINTS.len()
    );
    assert_eq!(world.ask("$SRV.PING", "").json()["name"], "meterr");
}

#[test]
fn pages_come_from_the_node_that_keeps_them() {
    let world = World::new();
    let mut nodes: Vec<Node> = (0..3).map(|_| world.node()).collect();
    for node in &nodes {
        *node.fake.rows.lock() = fake::rows(50);
    }
    let mut page = world.ask("meterr.query.acme.spend", r#"{"limit":2}"#).ok();
    let first = page["next_cursor"].as_str().unwrap().to_owned();
    let mut keys = Vec::new();
    loop {
        let rows = page["rows"].as_array().unwrap().iter();
        keys.extend(rows.map(|row| row["key"].as_str().unwrap().to_owned()));
        let Some(cursor) = page["next_cursor"].as_str() else { break };
        let body = json!({"limit": 2, "cursor": cursor}).to_string();
        page = world.ask("meterr.query.acme.spend", body).ok();
    }
    let expected: Vec<String> = (0..50).map(|n| format!("u-{n}")).collect();
    assert_eq!(keys, expected);
    let asked: usize = nodes.iter().map(|node| node.fake.asked.lock().len()).sum();
    assert_eq!(asked, 1, "later pages are cut from the answer kept");

    // Another org cannot use the cursor, wherever it asks.
    let body = json!({"cursor": first}).to_string();
    for _ in 0..10 {
        world.ask("meterr.query.other.spend", body.clone()).problem(400, "parameter");
    }
    for forged in ["x.1.n0de", "0.0.a.b", "..", "00000000000000000000000000000000.1.>"] {
        let body = json!({"cursor": forged}).to_string();
        let reply = world.ask("meterr.query.acme.spend", body).json();
        assert!(
            ["/problems/parameter", "/problems/cursor-expired"]
                .contains(&reply["type"].as_str().unwrap())
        );
    }
    let keeper = first.rsplit('.').next().unwrap();
    let at = nodes.iter().position(|node| node.handle.node() == keeper).unwrap();
    world.runtime.block_on(nodes.remove(at).handle.stop());
    world.ask("meterr.query.acme.spend", body).problem(410, "cursor-expired");
}

#[test]
fn a_stop_answers_what_is_there_and_refuses_what_waits() {
    let world = World::new();
    let Node { fake, handle } = world.node();
    let waiting = world.begin("meterr.query.acme.spend", r#"{"min_position":"3:9"}"#);
    world.until("it waits", || fake.asked.lock().len() == 1);
    let held = org_of(2);
    *fake.held.lock() = Some(format!("unpriced {held}"));
    let under_way = world.begin(&format!("meterr.query.{held}.unpriced"), "");
    world.until("it is asked", || fake.asked.lock().len() == 2);
    let stopping = world.runtime.spawn(handle.stop());
    world.end(waiting).problem(503, "unavailable");
    assert!(!stopping.is_finished());
    fake.release.send_replace(true);
    world.end(under_way).ok();
    world.runtime.block_on(stopping).unwrap();
    let refused = |subject: &'static str| {
        let asking = world.asker.request(subject, "".into());
        world.runtime.block_on(asking).err().map(|error| error.kind())
    };
    let nobody = Some(async_nats::client::RequestErrorKind::NoResponders);
    assert_eq!(refused("meterr.query.acme.spend"), nobody);
    assert_eq!(refused("meterr.admin.views"), nobody);
    world.until("its description is gone", || refused("$SRV.PING.meterr") == nobody);
}

#[test]
fn a_stop_has_an_end() {
    let world = World::new();
    let limits = ServiceSettings { drain_timeout: Duration::from_millis(50), ..settings() };
    let Node { fake, handle } = world.node_with(limits, Fake::default());
    *fake.stuck.lock() = Some("views".to_owned());
    let begun = world.begin("meterr.admin.views", "");
    world.until("it is asked", || fake.asked.lock().len() == 1);
    world.runtime.block_on(handle.stop());
    // The engine is held by nobody else any more: the task that asked it is gone.
    world.until("the engine is let go", || Arc::strong_count(&fake) == 1);
    begun.abort();
}

#[test]
fn a_dropped_service_is_gone() {
    let world = World::new();
    let Node { fake, handle } = world.node();
    drop(handle);
    world.until("the engine is let go", || Arc::strong_count(&fake) == 1);
}

#[test]
fn questions_are_answered_again_after_the_server_was_away() {
    let mut world = World::new();
    let _node = world.node();
    world.ask("meterr.query.acme.spend", "").ok();
    world.server.kill();
    world.server.restart();
    world.runtime.block_on(async {
        let began = Instant::now();
        loop {
            let asking = world.asker.request("meterr.query.acme.spend", "".into());
            match tokio::time::timeout(Duration::from_secs(1), asking).await {
                Ok(Ok(reply)) => break assert_eq!(reply.headers, None::<HeaderMap>),
                // Nobody has come back yet, or the request was lost.
                _ => assert!(began.elapsed() < PATIENCE),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
}
