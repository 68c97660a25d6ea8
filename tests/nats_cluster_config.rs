//! `config/nats-cluster.conf` on three real servers: nobody comes in without TLS and a certificate, each
//! role may do what it needs and nothing beside it, and an engine with its producers and subscribers
//! works there.

#![allow(clippy::unwrap_used)]

#[path = "support/nats.rs"]
mod nats;
#[path = "support/protocol.rs"]
mod protocol;
#[path = "support/secure.rs"]
mod secure;
#[path = "support/mod.rs"]
mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use async_nats::ConnectOptions;
use async_nats::jetstream;
use meterr_operators::ids::shard_of;
use protocol::{Wire, dial};
use secure::{Authority, Identity, Secure, USERS, inbox, password, tls};
use serde_json::{Value, json};
use support::{Launch, meterr, ran};

const SHARDS: u16 = 2;

fn acme() -> String {
    format!("usage.{}.acme", shard_of("acme", SHARDS))
}

/// What becomes of a handshake with this authority and identity, and of what is said after it, up to
/// the server's first words.
fn heard(
    stream: TcpStream,
    ca: &Path,
    identity: Option<&Identity>,
    said: &str,
) -> Result<String, String> {
    let mut stream = tls(stream, ca, identity);
    let mut heard = [0; 4];
    stream
        .write_all(said.as_bytes())
        .and_then(|()| stream.read_exact(&mut heard))
        .map_err(|error| error.to_string())?;
    Ok(String::from_utf8_lossy(&heard).into_owned())
}

/// The same at a port for clients, as the user `node`.
fn as_client(port: u16, ca: &Path, identity: Option<&Identity>) -> Result<String, String> {
    let login = json!({ "verbose": false, "user": "node", "pass": password("node") });
    heard(dial(port).unwrap().0, ca, identity, &format!("CONNECT {login}\r\nPING\r\n"))
}

/// The same at a port for servers, where TLS comes before everything.
fn as_server(port: u16, ca: &Path, identity: Option<&Identity>) -> Result<String, String> {
    heard(connect(port), ca, identity, "")
}

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    stream
}

#[test]
fn nobody_comes_in_without_tls_and_a_certificate() {
    let servers = Secure::start(SHARDS);
    let dir = tempfile::tempdir().unwrap();
    let stranger = Authority::new(dir.path(), "stranger");
    let strange = stranger.sign("strange");
    let ca = servers.servers.file.as_path();
    let login = format!(
        "CONNECT {}\r\nPING\r\n",
        json!({ "verbose": false, "user": "node", "pass": password("node") })
    );
    for (clients, routes) in servers.clients.iter().zip(&servers.routes) {
        let (clients, routes) = (clients.number, routes.number);
        assert_eq!(as_client(clients, ca, Some(&servers.client)).unwrap(), "PONG");

        // In the clear: a greeting at most, which says that TLS is needed.
        let (stream, info) = dial(clients).unwrap();
        assert_eq!(info["tls_required"], true, "{info}");
        for mut stream in [stream, connect(routes)] {
            stream.write_all(login.as_bytes()).unwrap();
            let mut answer = Vec::new();
            // It is closed, or reset with what we said unread.
            if let Err(error) = stream.read_to_end(&mut answer) {
                assert_eq!(error.kind(), ErrorKind::ConnectionReset);
            }
            let answer = String::from_utf8_lossy(&answer);
            assert!(!answer.contains("PONG") && !answer.contains("INFO"), "{answer}");
        }

        // We see through a server that another authority signed, and the server through us.
        for (ca, identity, refusal) in [
            (stranger.file.as_path(), Some(&servers.client), "UnknownIssuer"),
            (ca, None, "CertificateRequired"),
            (ca, Some(&strange), "UnknownCA"),
            (ca, Some(&servers.route), "UnknownCA"),
        ] {
            let refused = as_client(clients, ca, identity).unwrap_err();
            assert!(refused.contains(refusal), "{refused}");
        }

        // A client's certificate makes nobody a server.
        let ca = servers.routes_ca.as_path();
        assert_eq!(as_server(routes, ca, Some(&servers.route)).unwrap(), "INFO");
        for (identity, refusal) in [
            (None, "CertificateRequired"),
            (Some(&servers.client), "UnknownCA"),
            (Some(&strange), "UnknownCA"),
        ] {
            let refused = as_server(routes, ca, identity).unwrap_err();
            assert!(refused.contains(refusal), "{refused}");
        }
    }

    // A certificate alone is no login.
    let refused = |login: Option<(&str, &str)>| {
        let (stream, info) = dial(servers.clients[0].number).unwrap();
        let stream = tls(stream, ca, Some(&servers.client));
        Wire::greet(Box::new(stream), info, login).line()
    };
    let violation = "-ERR 'Authorization Violation'";
    assert_eq!(refused(None), violation);
    for user in USERS {
        assert_eq!(refused(Some((user, "guessed"))), violation, "{user}");
        assert_eq!(refused(Some((user, ""))), violation, "{user}");
    }
}

/// Everything anybody might try.
fn subjects() -> Vec<String> {
    let mut all: Vec<String> = [
        "usage.acme",
        "usage.globex",
        "usage.0.globex",
        "usage.1.globex",
        "usage.0.@batch",
        "usage.0.@backfill",
        "usage.0.@tick",
        "control",
        "out.0.part",
        "out.0.commit",
        "spend.acme",
        "spend.globex",
        "meterr.query.acme",
        "meterr.query.acme.spend",
        "meterr.query.acme.spend.a-node",
        "meterr.query.globex",
        "meterr.query.globex.spend",
        "meterr.admin.prices",
        "meterr.admin.prices.set",
        "meterr.node.a-node",
        "meterr.cluster.changed",
        "$KV.METERR.lease.0",
        "$KV.OTHER.lease.0",
        "$O.METERR_BLOBS.M.name",
        "$O.OTHER.M.name",
        "$JS.API.INFO",
        "$JS.API.STREAM.NAMES",
        "$JS.API.STREAM.LIST",
        "$JS.API.STREAM.CREATE.OTHER",
        "$JS.API.STREAM.DELETE.OUT_0",
        "$JS.API.STREAM.PURGE.OUT_0",
        "$JS.API.STREAM.MSG.GET.USAGE_0",
        "$JS.API.STREAM.MSG.DELETE.USAGE_0",
        "$JS.API.STREAM.SNAPSHOT.USAGE_0",
        "$JS.API.DIRECT.GET.KV_METERR",
        "$JS.API.CONSUMER.CREATE.OUT_0",
        "$JS.API.CONSUMER.CREATE.OUT_0.name.out.0.part",
        "$JS.API.CONSUMER.MSG.NEXT.OUT_0.name",
        "$JS.API.CONSUMER.DELETE.OUT_0.name",
        "$JS.ACK.OUT_0.name.1.1.1.1.0",
        "$JS.FC.OUT_0.name.x",
        "$SRV.PING",
        "$SRV.PING.meterr",
        "$SYS.REQ.SERVER.PING",
        "$SYS.REQ.SERVER.PING.JSZ",
        "$SYS.REQ.SERVER.ANID.JSZ",
        "$SYS.REQ.SERVER.ANID.RELOAD",
        "$SYS.REQ.SERVER.ANID.KICK",
        "$SYS.REQ.ACCOUNT.METERR.CONNZ",
        "$SYS.REQ.CLAIMS.UPDATE",
        "$JS.API.ACCOUNT.PURGE.METERR",
        "elsewhere",
        "_INBOX_acme.1",
        "_INBOX.1",
    ]
    .map(str::to_owned)
    .to_vec();
    all.push(acme());
    all.extend(USERS.iter().filter(|user| **user != "node").map(|user| inbox(user) + ".1"));
    all
}

/// What each role may publish to, of all those, as words of which one must begin the subject; and what
/// it may subscribe to.
fn allowed(user: &str) -> (Vec<String>, Vec<String>) {
    let own = format!("{}.", inbox(user));
    let list = |all: &[&str]| all.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    match user {
        "node" => (
            list(&[
                "usage.",
                "control",
                "out.",
                "spend.",
                "meterr.",
                "$KV.METERR.",
                "$O.METERR_BLOBS.",
                "$JS.",
                "$SRV.",
                "_INBOX.",
            ]),
            list(&["usage.", "meterr.", "$SRV.", "_INBOX."]),
        ),
        "acme-producer" => (vec!["usage.acme".to_owned(), acme()], vec![own]),
        "acme-subscriber" => (list(&["meterr.query.acme"]), vec![own, "spend.acme".to_owned()]),
        "gateway" => (list(&["usage.0.@batch", "$JS.API.STREAM.NAMES"]), vec![own]),
        "administrator" => (
            list(&[
                "usage.0.@batch",
                "usage.0.@backfill",
                "$JS.API.STREAM.NAMES",
                "meterr.query.",
                "meterr.admin.",
            ]),
            vec![own, "spend.".to_owned()],
        ),
        "monitor" => (list(&["$SYS.REQ.SERVER.PING", "$SYS.REQ.SERVER.ANID.JSZ"]), vec![own]),
        _ => panic!("{user}"),
    }
}

#[test]
fn roles_may_do_what_they_need_and_nothing_else() {
    let servers = Secure::start(SHARDS);
    let all = subjects();
    let is = |prefixes: &[String], subject: &str| {
        prefixes.iter().any(|prefix| subject.starts_with(prefix.as_str()))
    };
    for user in USERS {
        let (publish, subscribe) = allowed(user);
        for prefix in publish.iter().chain(&subscribe) {
            assert!(all.iter().any(|subject| subject.starts_with(prefix)), "{prefix} is not tried");
        }
        let mut wire = servers.open(user);
        for subject in &all {
            let expected = is(&publish, subject);
            assert_eq!(wire.may_publish(subject), expected, "{user} publishes to {subject}");
            let expected = is(&subscribe, subject);
            assert_eq!(wire.may_subscribe(subject), expected, "{user} subscribes to {subject}");
        }
        // What would hear others as well.
        for wide in [">", "*", "*.*", "usage.*", "_INBOX.>", "_INBOX.*.1", "$SYS.>", "$KV.>"] {
            let expected = user == "node" && ["usage.*", "_INBOX.>", "_INBOX.*.1"].contains(&wide);
            assert_eq!(wire.may_subscribe(wide), expected, "{user} subscribes to {wide}");
        }
        for wide in ["spend.*", "spend.>", "meterr.query.>", "meterr.query.*"] {
            let expected = match user {
                "node" => wide.starts_with("meterr."),
                "administrator" => wide.starts_with("spend."),
                _ => false,
            };
            assert_eq!(wire.may_subscribe(wide), expected, "{user} subscribes to {wide}");
        }
    }
}

#[test]
fn each_role_gets_what_it_asks_for() {
    let servers = Secure::start(SHARDS);
    let mut node = servers.open("node");
    for shard in 0..SHARDS {
        let stream = json!({
            "name": format!("USAGE_{shard}"), "subjects": [format!("usage.{shard}.*")],
            "storage": "file", "retention": "limits", "discard": "new", "num_replicas": 3,
            "max_consumers": -1, "max_msgs": -1, "max_bytes": -1, "max_age": 0,
        });
        let subject = format!("$JS.API.STREAM.CREATE.USAGE_{shard}");
        let made = node.ask(&subject, &format!("_INBOX.made.{shard}"), &stream.to_string());
        let made: Value = serde_json::from_str(&made).unwrap();
        assert!(made["error"].is_null(), "{made}");
    }
    let home = format!("USAGE_{}", shard_of("acme", SHARDS));
    for (user, subject, stream) in [
        ("acme-producer", "usage.acme", home.as_str()),
        ("acme-producer", &acme(), &home),
        ("gateway", "usage.1.@batch", "USAGE_1"),
        ("administrator", "usage.0.@backfill", "USAGE_0"),
    ] {
        let answer = servers.open(user).ask(subject, &format!("{}.1", inbox(user)), "{}");
        let answer: Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer["stream"], stream, "{user} {subject}: {answer}");
    }

    // A question and its answer from server to server.
    let mut answering = servers.open_at(2, "node");
    answering.send("SUB meterr.query.* 3\r\n");
    assert_eq!(answering.heard().1, Vec::<String>::new());
    let answer_at = format!("{}.1", inbox("acme-subscriber"));
    let mut subscriber = servers.open_at(1, "acme-subscriber");
    let asking = std::thread::spawn({
        let answer_at = answer_at.clone();
        move || subscriber.ask("meterr.query.acme", &answer_at, "how much?")
    });
    // As often as it is asked: an answer may go nowhere as well.
    while !asking.is_finished() {
        let (questions, errors) = answering.heard();
        assert!(errors.is_empty(), "{errors:?}");
        for (_, question) in questions {
            assert_eq!(question, "how much?");
            answering.send(&format!("PUB {answer_at} 3\r\nyes\r\n"));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(asking.join().unwrap(), "yes");

    // The monitor hears from all three.
    let mut monitor = servers.open("monitor");
    let heard_at = format!("{}.1", inbox("monitor"));
    let mut names = std::collections::BTreeSet::new();
    monitor.send(&format!("SUB {heard_at} 1\r\n"));
    let (began, mut asked) = (Instant::now(), None::<Instant>);
    while names.len() < 3 {
        assert!(began.elapsed() < support::PATIENCE, "only {names:?}");
        // Until it is known everywhere who listens, some answers go nowhere.
        if asked.is_none_or(|asked| asked.elapsed() > Duration::from_secs(1)) {
            monitor.send(&format!("PUB $SYS.REQ.SERVER.PING.JSZ {heard_at} 0\r\n\r\n"));
            asked = Some(Instant::now());
        }
        let (answers, errors) = monitor.heard();
        assert!(errors.is_empty(), "{errors:?}");
        for (_, answer) in answers {
            let answer: Value = serde_json::from_str(&answer).unwrap();
            names.insert(answer["server"]["name"].as_str().unwrap().to_owned());
            assert_eq!(answer["data"]["config"]["sync_always"], true, "{answer}");
            assert_eq!(answer["data"]["config"]["max_storage"], 100_u64 << 30, "{answer}");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(names.into_iter().collect::<Vec<_>>(), ["nats-0", "nats-1", "nats-2"]);
}

/// A command of the binary against the servers as a user.
fn as_user(servers: &Secure, user: &str, args: &[&str]) -> Command {
    let mut command = meterr(args);
    command.args(["--nats", &servers.url(user)]);
    command.arg("--nats-ca").arg(&servers.servers.file);
    command.arg("--nats-certificate").arg(&servers.client.certificate);
    command.arg("--nats-key").arg(&servers.client.key);
    command.args(["--nats-inbox", &inbox(user)]);
    command
}

fn line(org: &str, id: &str) -> String {
    format!(
        "{{\"id\":\"{id}\",\"time\":\"2026-01-02T03:04:05Z\",\"org\":\"{org}\",\"user\":\"u\",\
         \"provider\":\"openai\",\"model\":\"gpt-4o-mini\",\"input_tokens\":1000000}}\n"
    )
}

/// Publishes one message as an org's program would.
async fn produce(servers: &Secure, subject: &str, payload: String) -> Result<(), String> {
    let identity = &servers.client;
    let client = ConnectOptions::new()
        .user_and_password("acme-producer".to_owned(), password("acme-producer"))
        .add_root_certificates(servers.servers.file.clone())
        .add_client_certificate(identity.certificate.clone(), identity.key.clone())
        .custom_inbox_prefix(inbox("acme-producer"))
        .connect(format!("tls://localhost:{}", servers.clients[2].number))
        .await
        .map_err(|error| error.to_string())?;
    let context = jetstream::new(client);
    let sent = context.publish(subject.to_owned(), payload.into()).await;
    sent.map_err(|error| error.to_string())?.await.map(drop).map_err(|error| error.to_string())
}

#[tokio::test]
async fn an_engine_with_its_producers_and_subscribers_works_there() {
    let servers = Secure::start(SHARDS);
    let dir = tempfile::tempdir().unwrap();
    let path = |path: &Path| path.to_str().unwrap().to_owned();
    let launch = Launch::on(&dir.path().join("data"))
        .set("NODE__SHARDS", &SHARDS.to_string())
        .set("NATS__URL", &servers.url("node"))
        .set("NATS__REPLICAS", "3")
        .set("NATS__MAPPING", "require")
        .set("NATS__CA", &path(&servers.servers.file));
    // Without its certificate it does not get in, and says why.
    let (status, log) = launch.spawn().err().unwrap();
    assert!(
        !status.success() && log.contains("cannot connect to NATS at tls://localhost"),
        "{log}"
    );
    assert!(!log.contains(&password("node")), "{log}");
    let engine = launch
        .set("NATS__CERTIFICATE", &path(&servers.client.certificate))
        .set("NATS__KEY", &path(&servers.client.key))
        .start();

    produce(&servers, "usage.acme", line("acme", "e1")).await.unwrap();
    // Nobody says why there is no acknowledgement; that there is none is what counts.
    produce(&servers, "usage.globex", line("globex", "e2")).await.unwrap_err();
    let file = dir.path().join("events.ndjson");
    std::fs::write(&file, [line("acme", "e3"), line("globex", "e4")].concat()).unwrap();
    let args = ["publish", file.to_str().unwrap(), "--json"];
    let (code, out, err) = ran(&as_user(&servers, "gateway", &args).output().unwrap());
    assert_eq!(code, 0, "{err}");
    let published: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(published["accepted"], 2, "{published}");

    let position = published["position"].as_str().unwrap();
    for (org, events) in [("acme", 2), ("globex", 1)] {
        let at = format!("/v1/orgs/{org}/spend?window=all&min_position={position}");
        let spend = engine.get(&at).expect(200);
        assert_eq!(spend["rows"][0]["events"], events, "{org}: {spend}");
    }

    let watch = |org| ["watch", org, "--json", "--events", "1"];
    let (code, out, err) =
        ran(&as_user(&servers, "acme-subscriber", &watch("acme")).output().unwrap());
    assert_eq!(code, 0, "{err}");
    let snapshot: Value = serde_json::from_str(out.trim()).unwrap();
    assert_eq!(snapshot["data"]["views"]["org_all"][0]["events"], 2, "{snapshot}");
    // Nor did the engine try what its role may not.
    let log = engine.stop();
    assert!(!log.to_lowercase().contains("permission"), "{log}");
}
