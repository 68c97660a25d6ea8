//! `meterr watch --nats` through the real binary: the same events as over HTTP, each once, through
//! restarts of engine and server, and a clean end by Ctrl-C.

#![allow(clippy::unwrap_used)]

#[path = "support/nats.rs"]
mod nats;
#[path = "support/mod.rs"]
mod support;

use std::io::{BufRead, BufReader, Lines};
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdout, Stdio};

use nats::{NatsOptions, NatsServer};
use serde_json::Value;
use support::{Launch, Server, meterr, ran, run, signal};

fn line(n: usize) -> String {
    format!(
        "{{\"id\":\"e{n}\",\"time\":\"2026-01-02T03:04:05Z\",\"org\":\"acme\",\"user\":\"u{n}\",\
         \"provider\":\"openai\",\"model\":\"gpt-4o-mini\",\"input_tokens\":1000000}}\n"
    )
}

fn launch(dir: &Path, nats: &NatsServer) -> Launch {
    Launch::on(dir).set("NODE__SHARDS", "2").set("NATS__URL", &nats.url())
}

/// Publishes an event and waits until it is counted.
fn spend(engine: &Server, n: usize) {
    let position = engine.publish(&line(n));
    engine.get(&format!("/v1/orgs/acme/spend?min_position={position}")).expect(200);
}

/// `meterr watch --json` at work.
struct Watch {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    told: Lines<BufReader<ChildStderr>>,
}

impl Watch {
    fn start(server: &[&str]) -> Watch {
        let mut command = meterr(&["watch", "acme", "--json"]);
        command.args(server).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let told = BufReader::new(child.stderr.take().unwrap()).lines();
        Watch { child, lines, told }
    }

    fn next(&mut self) -> Value {
        let Some(line) = self.lines.next() else {
            panic!("it ended: {:?}", self.told.by_ref().collect::<Vec<_>>())
        };
        serde_json::from_str(&line.unwrap()).unwrap()
    }

    /// Waits until it says this on stderr.
    fn until_told(&mut self, what: &str) {
        while !self.told.next().unwrap().unwrap().contains(what) {}
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn events(event: &Value) -> i64 {
    event["data"]["views"]["org_all"][0]["events"].as_i64().unwrap()
}

#[test]
fn events_are_those_of_http_and_come_once_through_restarts() {
    let mut server = NatsServer::start(NatsOptions::new());
    let dir = tempfile::tempdir().unwrap();
    let engine = launch(dir.path(), &server).start();
    spend(&engine, 1);
    let mut over_nats = Watch::start(&["--nats", &server.url()]);
    let mut over_http = Watch::start(&["--url", &engine.url]);
    for expected in ["snapshot", "change"] {
        let (one, other) = (over_nats.next(), over_http.next());
        assert_eq!(one["event"], expected, "{one}");
        assert_eq!(one, other);
        if expected == "snapshot" {
            spend(&engine, 2);
        }
    }
    drop(over_http);

    // What is committed while the watcher hears nothing comes once it does.
    engine.kill();
    let engine = launch(dir.path(), &server).start();
    spend(&engine, 3);
    assert_eq!(events(&over_nats.next()), 3);
    server.kill();
    over_nats.until_told("interrupted, coming back: the connection to the server is lost");
    server.restart();
    engine.until("an event to be accepted", || {
        let answer = engine.send("POST", "/v1/events", "application/x-ndjson", line(4).as_bytes());
        (answer.status == 202).then_some(())
    });
    let event = over_nats.next();
    assert_eq!((event["event"].as_str(), events(&event)), (Some("change"), 4));

    signal(over_nats.child.id(), "INT").unwrap();
    assert!(over_nats.lines.next().is_none(), "something after the end");
    assert_eq!(over_nats.child.wait().unwrap().code(), Some(130));
}

#[test]
fn a_number_of_events_and_a_server_that_is_not_there() {
    let server = NatsServer::start(NatsOptions::new());
    let dir = tempfile::tempdir().unwrap();
    let engine = launch(dir.path(), &server).start();
    spend(&engine, 1);
    let (code, out, err) = ran(&run(&["watch", "acme", "--events", "1", "--nats", &server.url()]));
    assert_eq!(code, 0, "{err}");
    assert!(out.starts_with("snapshot as of ") && out.contains("0.15 usd"), "{out}");
    // The discard port: nobody listens there.
    let (code, _, err) = ran(&run(&["watch", "acme", "--nats", "nats://127.0.0.1:9"]));
    assert_eq!(code, 5, "{err}");
    assert!(err.contains("cannot connect to NATS at nats://127.0.0.1:9"), "{err}");
}
