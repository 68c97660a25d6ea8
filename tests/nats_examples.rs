//! The examples for NATS, each run as its header says: producers through a server that dies meanwhile
//! to a real engine, and subscribers against an engine of the test's making that leaves gaps, repeats
//! itself and cuts messages into pieces.
//!
//! `tests/examples-tools` gets what they need; without it these tests fail.

#![allow(clippy::unwrap_used)]

#[path = "support/nats.rs"]
mod nats;
#[path = "support/mod.rs"]
mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;

use async_nats::{Client, HeaderMap, Message, Subscriber};
use futures::StreamExt;
use nats::{NatsOptions, NatsServer};
use serde_json::{Value, json};
use support::{Launch, PATIENCE};

const SHARDS: u16 = 4;
const ORGS: [&str; 3] = ["acme", "globex", "initech"];
const LINES: usize = 3_000;

fn tools() -> PathBuf {
    let tools = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/tools/examples");
    assert!(
        tools.join("node").exists(),
        "run tests/examples-tools first: {tools:?} is not complete"
    );
    tools
}

fn python(program: &str) -> Command {
    let mut command = Command::new("python3");
    command.arg(format!("examples/python/{program}.py")).env("PYTHONPATH", tools().join("python"));
    command
}

fn typescript(program: &str) -> Command {
    let mut command = Command::new(tools().join("node"));
    command.arg(format!("examples/typescript/{program}.ts"));
    command
}

fn rust(program: &str) -> Command {
    // Built with the tests, unless only this one was asked for. Cargo alone would build it with other
    // features, and so everything below it too.
    let built = Path::new(env!("CARGO_BIN_EXE_meterr")).parent().unwrap().join("examples");
    if built.join(program).exists() {
        return Command::new(built.join(program));
    }
    let mut command = Command::new(env!("CARGO"));
    command.args(["run", "--quiet", "--example", program, "--"]);
    command
}

fn spawn(mut command: Command) -> Child {
    command.current_dir(env!("CARGO_MANIFEST_DIR")).stdin(Stdio::piped()).stdout(Stdio::piped());
    command.spawn().unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

fn line(n: usize) -> String {
    let org = ORGS[n % ORGS.len()];
    format!(
        "{{\"id\":\"e{n}\",\"time\":\"2026-01-02T03:04:05Z\",\"org\":\"{org}\",\"user\":\"u\",\
         \"provider\":\"openai\",\"model\":\"gpt-4o-mini\",\"input_tokens\":1000000}}\n"
    )
}

/// Feeds a producer, kills the server in the middle if it sends `while_reading`, and compares what is
/// printed with what the engine has counted.
fn a_producer(mut command: Command, mapped: bool, while_reading: bool) {
    let options = NatsOptions::new();
    let mut server = NatsServer::start(if mapped { options.mapping(SHARDS) } else { options });
    let dir = tempfile::tempdir().unwrap();
    let engine = Launch::on(&dir.path().join("data"))
        .set("NODE__SHARDS", &SHARDS.to_string())
        .set("NATS__URL", &server.url())
        .start();
    command.args(["--nats", &server.url()]);
    if !mapped {
        command.args(["--shards", &SHARDS.to_string()]);
    }
    let mut child = spawn(command);
    let mut input = child.stdin.take().unwrap();
    for n in 0..LINES / 2 {
        input.write_all(line(n).as_bytes()).unwrap();
    }
    input.flush().unwrap();
    if while_reading {
        // Full batches are sent while others are still to come.
        engine.until("something is stored", || {
            let stored = |shard| {
                let info = server.request(&format!("$JS.API.STREAM.INFO.USAGE_{shard}"), "")?;
                info["state"]["messages"].as_u64()
            };
            (0..SHARDS).filter_map(stored).sum::<u64>().gt(&0).then_some(())
        });
        server.kill();
    }
    for n in LINES / 2..LINES {
        input.write_all(line(n).as_bytes()).unwrap();
    }
    drop(input);
    if while_reading {
        server.restart();
    }
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed["events"], LINES, "{printed}");
    let position = printed["position"].as_str().unwrap();
    for org in ORGS {
        let path = format!("/v1/orgs/{org}/spend?window=all&min_position={position}");
        let spend = engine.get(&path).expect(200);
        assert_eq!(spend["rows"][0]["events"], LINES / ORGS.len(), "{org}: {spend}");
        assert_eq!(spend["rows"][0]["cost"], "150", "{org}");
    }
    assert_eq!(engine.get("/v1/dead-letters").expect(200)["rows"], json!([]));
}

#[test]
fn producer_in_python() {
    a_producer(python("producer"), true, true);
}

#[test]
fn producer_in_typescript() {
    a_producer(typescript("producer"), true, true);
}

#[test]
fn producer_in_rust() {
    a_producer(rust("producer"), true, false);
}

#[test]
fn producer_in_python_that_finds_the_shard_itself() {
    a_producer(python("producer"), false, true);
}

#[test]
fn producer_in_typescript_that_finds_the_shard_itself() {
    a_producer(typescript("producer"), false, true);
}

#[test]
fn the_hash_of_every_language_is_that_of_the_vectors() {
    let file = "config/wire/shards.json";
    let text = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).unwrap();
    let vectors: Value = serde_json::from_str(&text).unwrap();
    let expected = vectors["vectors"].as_array().unwrap().len();
    for mut command in [python("producer"), typescript("producer")] {
        command.args(["--check", file]);
        let output = spawn(command).wait_with_output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let printed: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(printed["vectors"], expected);
    }
}

/// Plays an engine with one org.
struct Fake {
    client: Client,
    questions: Subscriber,
}

impl Fake {
    async fn on(server: &NatsServer) -> Fake {
        let client = async_nats::connect(server.url()).await.unwrap();
        let questions = client.subscribe("meterr.query.acme").await.unwrap();
        client.flush().await.unwrap();
        Fake { client, questions }
    }

    /// The next question, which must ask for what comes after this.
    async fn question(&mut self, after: Option<&str>) -> Message {
        let next = tokio::time::timeout(PATIENCE, self.questions.next());
        let question = next.await.expect("a question in time").unwrap();
        let expected = after.map_or(String::new(), |after| json!({"after": after}).to_string());
        let got = String::from_utf8_lossy(&question.payload).replace(": ", ":");
        assert_eq!(got, expected);
        question
    }

    async fn answer(&self, question: &Message, body: Value) {
        let reply = question.reply.clone().unwrap();
        self.client.publish(reply, body.to_string().into()).await.unwrap();
    }

    async fn refuse(&self, question: &Message) {
        let mut headers = HeaderMap::new();
        headers.insert("Nats-Service-Error", "starting");
        headers.insert("Nats-Service-Error-Code", "503");
        let reply = question.reply.clone().unwrap();
        let body = r#"{"type":"/problems/starting","status":503}"#;
        self.client.publish_with_headers(reply, headers, body.into()).await.unwrap();
    }

    /// Answers all further questions: nothing was missed up to this epoch.
    async fn nothing_missed(&mut self, epoch: u64) -> tokio::task::JoinHandle<()> {
        let further = self.client.subscribe("meterr.query.acme").await.unwrap();
        let mut questions = std::mem::replace(&mut self.questions, further);
        let client = self.client.clone();
        tokio::spawn(async move {
            let body = json!({"kind": "current", "shard": 3, "epoch": epoch, "as_of": "3:9,c:1",
                              "org": "acme"});
            while let Some(question) = questions.next().await {
                let reply = question.reply.clone().unwrap();
                client.publish(reply, body.to_string().into()).await.unwrap();
            }
        })
    }

    async fn tell(&self, body: Value) {
        self.client.publish("spend.acme", body.to_string().into()).await.unwrap();
        self.client.flush().await.unwrap();
    }
}

/// A row of the org as a whole.
fn all(events: i64) -> Value {
    json!({"org_all": [[null, null, events, format!("{events}.5"), 0, [events]]]})
}

fn change(epoch: u64, previous: u64, views: Value) -> Value {
    json!({"kind": "change", "shard": 3, "epoch": epoch, "previous": previous, "as_of": "3:9,c:1",
           "org": "acme", "views": views})
}

/// One of several pieces, and what follows.
fn piece(mut message: Value, piece: u32, pieces: u32, more: bool) -> Value {
    message["piece"] = piece.into();
    message["pieces"] = pieces.into();
    if more {
        message["more"] = true.into();
    }
    message
}

fn more(mut message: Value) -> Value {
    message["more"] = true.into();
    message
}

/// Takes a subscriber through everything the protocol knows; what it prints must be each commit once.
async fn a_subscriber(mut command: Command) {
    let mut server = NatsServer::start(NatsOptions::new());
    let mut fake = Fake::on(&server).await;
    command.args(["--nats", &server.url(), "--org", "acme", "--until-events", "9"]);
    let mut child = Killed(spawn(command));
    let printed = Printed::by(&mut child.0);

    let question = fake.question(None).await;
    fake.refuse(&question).await;
    let question = fake.question(None).await;
    let snapshot = |views: Value| {
        json!({"kind": "snapshot", "shard": 3, "epoch": 10, "as_of": "3:9,c:1", "org": "acme",
               "views": views})
    };
    let users = json!({"user_day": [["2026-01-02T00:00:00Z", "u", 2, null, 2, [2]]]});
    fake.tell(change(10, 9, all(1))).await;
    fake.answer(&question, piece(snapshot(users), 0, 2, true)).await;
    fake.tell(change(12, 10, all(3))).await;
    fake.answer(&question, piece(snapshot(all(2)), 1, 2, false)).await;
    // Known already, and then one too far.
    fake.tell(change(12, 10, all(3))).await;
    fake.tell(change(15, 14, all(6))).await;
    printed.expect("snapshot", 10, 2);
    printed.expect("change", 12, 3);

    let question = fake.question(Some("3-12")).await;
    fake.answer(&question, piece(change(14, 12, json!({})), 0, 2, true)).await;
    fake.answer(&question, piece(change(14, 12, all(5)), 1, 2, true)).await;
    fake.answer(&question, change(15, 14, all(6))).await;
    printed.expect("change", 14, 5);
    printed.expect("change", 15, 6);

    // A piece without the one before it.
    fake.tell(piece(change(16, 15, all(7)), 1, 2, false)).await;
    let question = fake.question(Some("3-15")).await;
    fake.answer(&question, more(change(16, 15, all(7)))).await;
    fake.answer(
        &question,
        json!({"kind": "current", "shard": 3, "epoch": 16, "as_of": "3:9,c:1",
                                  "org": "acme"}),
    )
    .await;
    printed.expect("change", 16, 7);

    // What is told while the connection is away is lost, and asked for.
    server.restart();
    let question = fake.question(Some("3-16")).await;
    fake.answer(&question, change(18, 16, all(8))).await;
    printed.expect("change", 18, 8);
    // It may have more than one reason to ask.
    let further = fake.nothing_missed(18).await;
    fake.tell(piece(change(19, 18, json!({})), 0, 2, false)).await;
    fake.tell(piece(change(19, 18, all(9)), 1, 2, false)).await;
    printed.expect("change", 19, 9);
    assert!(child.0.wait().unwrap().success());
    further.abort();
    assert!(printed.end(), "nothing more is printed");
}

/// Lines as they are printed.
struct Printed(mpsc::Receiver<String>);

impl Printed {
    fn by(child: &mut Child) -> Printed {
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|l| sender.send(l)));
        Printed(receiver)
    }

    fn next(&self) -> Value {
        let line = self.0.recv_timeout(PATIENCE).expect("a line in time");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"))
    }

    fn expect(&self, kind: &str, epoch: u64, events: i64) {
        let found = self.next();
        let cost = format!("{events}.5");
        let expected = json!({"kind": kind, "epoch": epoch, "events": events, "cost": cost});
        assert_eq!(found, expected);
    }

    fn end(&self) -> bool {
        self.0.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Disconnected)
    }
}

/// A child that does not outlive its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriber_in_python() {
    a_subscriber(python("subscriber")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn subscriber_in_typescript() {
    a_subscriber(typescript("subscriber")).await;
}

/// A subscriber of a real engine sees what the engine counts, through a restart of the engine.
fn a_subscriber_of_an_engine(mut command: Command) {
    let server = NatsServer::start(NatsOptions::new());
    let dir = tempfile::tempdir().unwrap();
    let launch = Launch::on(&dir.path().join("data"))
        .set("NODE__SHARDS", &SHARDS.to_string())
        .set("NATS__URL", &server.url());
    let engine = launch.start();
    command.args(["--nats", &server.url(), "--org", "acme", "--until-events", "30"]);
    let mut child = Killed(spawn(command));
    let printed = Printed::by(&mut child.0);
    let first = printed.next();
    assert_eq!((&first["kind"], &first["events"]), (&"snapshot".into(), &0.into()), "{first}");
    let mut seen = 0;
    let mut epoch = 0;
    let mut follow = |until: i64| {
        while seen < until {
            let line = printed.next();
            let (now, at) = (line["events"].as_i64().unwrap(), line["epoch"].as_u64().unwrap());
            assert!(at > epoch && now > seen, "each commit once and in order: {line}");
            // A million tokens of gpt-4o-mini cost 0.15 USD.
            let cost = support::money::pico(line["cost"].as_str().unwrap());
            assert_eq!(cost, i128::from(now) * support::money::pico("0.15"), "{line}");
            (seen, epoch) = (now, at);
        }
        assert_eq!(seen, until);
    };
    for n in 0..10 {
        engine.publish(&line(ORGS.len() * n));
        follow(n as i64 + 1);
    }
    engine.kill();
    let engine = launch.start();
    for n in 10..30 {
        engine.publish(&line(ORGS.len() * n));
        follow(n as i64 + 1);
    }
    assert!(child.0.wait().unwrap().success());
}

#[test]
fn subscriber_in_python_of_an_engine() {
    a_subscriber_of_an_engine(python("subscriber"));
}

#[test]
fn subscriber_in_typescript_of_an_engine() {
    a_subscriber_of_an_engine(typescript("subscriber"));
}
