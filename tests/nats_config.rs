//! `config/nats-server.conf` on a real server: the mapping finds the shard that meterr finds, what is
//! set is in force, and each role may do what it needs and nothing beside it.

#![allow(clippy::unwrap_used)]

#[path = "support/nats.rs"]
mod nats;
#[path = "support/protocol.rs"]
mod protocol;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;

use meterr_operators::ids::shard_of;
use meterr_operators::rng::Rng;
use nats::{NatsOptions, NatsServer};
use protocol::{Wire, dial};
use serde_json::{Value, json};

const FILE: &str = "config/nats-server.conf";
const ROLES: [&str; 4] = ["node", "acme-producer", "acme-subscriber", "gateway"];

/// A connection the server takes.
fn open(server: &NatsServer, user: Option<&str>) -> Wire {
    greet(server, user).taken()
}

/// What the server says to those it sends away.
fn refused(server: &NatsServer, user: Option<&str>) -> String {
    greet(server, user).line()
}

fn greet(server: &NatsServer, user: Option<&str>) -> Wire {
    let (stream, info) = dial(server.port()).unwrap();
    let password = password(user.unwrap_or_default());
    Wire::greet(Box::new(stream), info, user.map(|user| (user, password.as_str())))
}

fn password(user: &str) -> String {
    format!("the-password-of-{user}")
}

/// The file as it is.
fn as_it_is() -> NatsOptions {
    NatsOptions::new().config(&text())
}

fn text() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(FILE)).unwrap()
}

/// The file with its roles in force.
fn with_roles() -> NatsOptions {
    let mut text: Vec<String> = Vec::new();
    let mut within = false;
    for line in self::text().lines() {
        within = (within || line.starts_with("# --- roles")) && !line.starts_with("# --- to here");
        match line.strip_prefix("# ").or(line.strip_prefix('#')) {
            Some(bare) if within && !bare.starts_with("---") => text.push(bare.to_owned()),
            _ => text.push(line.to_owned()),
        }
    }
    let mut text = text.join("\n");
    for role in ROLES {
        let variable = format!("$METERR_{}_PASSWORD", role.to_uppercase().replace('-', "_"));
        assert!(text.contains(&variable), "{role} has no password in {FILE}");
        text = text.replace(&variable, &format!("\"{}\"", password(role)));
    }
    NatsOptions::new().config(&text).login("node", &password("node"))
}

fn random_org(rng: &mut Rng) -> String {
    let letters = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-";
    let length = if rng.percent(90) { 1 + rng.below(20) } else { 1 + rng.below(128) };
    (0..length).map(|_| *rng.pick(letters) as char).collect()
}

/// Publishes for many orgs and sees into which shards the server puts them.
fn agree(server: &NatsServer, user: Option<&str>, shards: u16, seed: u64) {
    let mut wire = open(server, user);
    wire.send("SUB usage.> 1\r\n");
    let mut rng = Rng::stream(seed, u64::from(shards));
    for _ in 0..40 {
        let orgs: Vec<String> = (0..100).map(|_| random_org(&mut rng)).collect();
        let commands: String =
            orgs.iter().map(|org| format!("PUB usage.{org} 0\r\n\r\n")).collect();
        wire.send(&commands);
        let (messages, errors) = wire.heard();
        let found: Vec<&str> = messages.iter().map(|(subject, _)| subject.as_str()).collect();
        let expected: Vec<String> =
            orgs.iter().map(|org| format!("usage.{}.{org}", shard_of(org, shards))).collect();
        assert_eq!(found, expected, "{errors:?}");
    }
}

#[test]
fn the_server_puts_orgs_into_the_shards_meterr_puts_them() {
    let server = NatsServer::start(as_it_is());
    agree(&server, None, 16, 1);
    for shards in [1, 2, 3, 64, 255, 256] {
        agree(&NatsServer::start(NatsOptions::new().mapping(shards)), None, shards, 2);
    }
    // What carries its shard already stays as it is.
    let mut wire = open(&server, None);
    wire.send("SUB usage.> 1\r\nPUB usage.3.acme 0\r\n\r\nPUB usage.3.@batch 0\r\n\r\n");
    let (messages, errors) = wire.heard();
    assert!(errors.is_empty(), "{errors:?}");
    let subjects: Vec<&str> = messages.iter().map(|(subject, _)| subject.as_str()).collect();
    assert_eq!(subjects, ["usage.3.acme", "usage.3.@batch"]);
}

#[test]
fn what_the_file_sets_is_in_force() {
    let server = NatsServer::start(as_it_is());
    let log = server.log();
    assert!(log.contains("100.00 GB") && log.contains("256.00 MB"), "{log}");
    let wire = open(&server, None);
    assert_eq!(wire.info["max_payload"], 1 << 20);
    assert_eq!(wire.info["server_name"], "meterr-1");
    assert_eq!(wire.info["jetstream"], true);

    // The server does not log it, but shows it to those who watch over it.
    let watched = |options: NatsOptions| NatsServer::start(options.text("http: \"127.0.0.1:-1\""));
    assert_eq!(synced(&watched(as_it_is())), Value::Bool(true));
    assert_eq!(synced(&watched(NatsOptions::new().sync_always())), Value::Bool(true));
    assert_eq!(synced(&watched(NatsOptions::new())), Value::Null);
}

/// Whether the server says that it syncs always.
fn synced(server: &NatsServer) -> Value {
    let log = server.log();
    let address = log.split("http monitor on ").nth(1).unwrap().lines().next().unwrap();
    let mut stream = TcpStream::connect(address.trim()).unwrap();
    stream.write_all(b"GET /jsz HTTP/1.0\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (_, body) = answer.split_once("\r\n\r\n").unwrap();
    let status: Value = serde_json::from_str(body).unwrap();
    status["config"]["sync_always"].clone()
}

fn make_stream(server: &NatsServer) {
    let stream = json!({
        "name": "USAGE_15", "subjects": ["usage.15.*"], "storage": "file", "retention": "limits",
        "discard": "new", "num_replicas": 1, "max_consumers": -1, "max_msgs": -1, "max_bytes": -1,
        "max_age": 0,
    });
    let made = server.request("$JS.API.STREAM.CREATE.USAGE_15", &stream.to_string()).unwrap();
    assert!(made["error"].is_null(), "{made}");
}

#[test]
fn the_mapping_holds_in_an_account_of_its_own() {
    let file = text();
    let mapping = file.lines().find(|line| line.trim().starts_with("\"usage.*\"")).unwrap().trim();
    assert_eq!(file.matches(mapping).count(), 2, "the account's mapping is another one");
    let options = NatsOptions::new().login("node", &password("node")).text(&format!(
        "accounts {{ METERR {{ jetstream: enabled, mappings {{ {mapping} }}\n\
         users: [ {{ user: node, password: \"{}\" }} ] }} }}",
        password("node")
    ));
    agree(&NatsServer::start(options), Some("node"), 16, 3);
}

/// Each role with subjects it may publish or subscribe to, and ones it may not.
#[test]
fn roles_may_do_what_they_need_and_nothing_else() {
    let server = NatsServer::start(with_roles());
    agree(&server, Some("node"), 16, 4);

    // Nobody without a password.
    assert_eq!(refused(&server, None), "-ERR 'Authorization Violation'");

    let all = [
        "usage.acme",
        "usage.15.acme",
        "usage.globex",
        "usage.3.globex",
        "usage.15.@batch",
        "usage.15.@backfill",
        "usage.15.@tick",
        "control",
        "out.15.part",
        "out.15.commit",
        "spend.acme",
        "spend.globex",
        "meterr.query.acme",
        "meterr.query.acme.spend",
        "meterr.query.globex",
        "meterr.admin.prices",
        "$JS.API.STREAM.DELETE.OUT_15",
        "$JS.API.STREAM.MSG.GET.USAGE_15",
        "$JS.API.CONSUMER.CREATE.OUT_15",
        "_INBOX.acme.1",
        "_INBOX.@gateway.1",
        "_INBOX.1",
    ];
    let may_publish: [(&str, &[&str]); 3] = [
        ("acme-producer", &["usage.acme", "usage.15.acme"]),
        ("acme-subscriber", &["meterr.query.acme", "meterr.query.acme.spend"]),
        ("gateway", &["usage.15.@batch"]),
    ];
    for (role, allowed) in may_publish {
        let mut wire = open(&server, Some(role));
        for subject in all {
            let expected = allowed.contains(&subject);
            assert_eq!(wire.may_publish(subject), expected, "{role} publishes {subject}");
        }
    }
    let may_subscribe: [(&str, &[&str]); 3] = [
        ("acme-producer", &["_INBOX.acme.1"]),
        ("acme-subscriber", &["spend.acme", "_INBOX.acme.1"]),
        ("gateway", &["_INBOX.@gateway.1"]),
    ];
    let all = all.into_iter().chain([">", "spend.*", "spend.>", "usage.>", "meterr.>", "_INBOX.>"]);
    for (role, allowed) in may_subscribe {
        let mut wire = open(&server, Some(role));
        for subject in all.clone() {
            let expected = allowed.contains(&subject);
            assert_eq!(wire.may_subscribe(subject), expected, "{role} subscribes to {subject}");
        }
    }
    let mut node = open(&server, Some("node"));
    for subject in all.clone() {
        assert!(node.may_subscribe(subject), "node subscribes to {subject}");
    }
}

#[test]
fn a_producer_s_role_gets_its_acknowledgement() {
    let server = NatsServer::start(with_roles());
    make_stream(&server);
    for (role, subject, inbox) in [
        ("acme-producer", "usage.acme", "_INBOX.acme.1"),
        ("acme-producer", "usage.15.acme", "_INBOX.acme.1"),
        ("gateway", "usage.15.@batch", "_INBOX.@gateway.1"),
    ] {
        let mut wire = open(&server, Some(role));
        wire.send(&format!("SUB {inbox} 1\r\nPUB {subject} {inbox} 2\r\n{{}}\r\n"));
        let acknowledged: Value = serde_json::from_str(&wire.message()).unwrap();
        assert_eq!(acknowledged["stream"], "USAGE_15", "{role} {subject}: {acknowledged}");
    }
}
