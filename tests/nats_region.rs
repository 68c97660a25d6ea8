//! A second region: it follows by mirrors, a replica answers there, and it takes over, with the old
//! region's help or after its end.

#![allow(clippy::unwrap_used)]

#[path = "support/nats.rs"]
mod nats;
mod support;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use nats::{NatsOptions, NatsServer, Port};
use serde_json::Value;
use support::busy::{ORGS, answers, assert_same, at_work, declare_view, event, lines, settled};
use support::{Launch, Server, ran, run};

/// What must not cross from region to region: each has streams of these subjects once it is promoted, and
/// would take what is published in the other.
const OWN: &str = r#"["usage.>", "out.>", "control", "spend.>", "meterr.>"]"#;

/// Two servers, the second reaches the first by a leaf node.
fn regions() -> (NatsServer, NatsServer) {
    let port = Port::reserve();
    let config = |domain: &str, leaf: String| {
        let text = format!(
            "jetstream {{\n  store_dir: x\n  domain: {domain}\n}}\nleafnodes {{ {leaf} }}\n"
        );
        NatsServer::start(NatsOptions::new().config(&text))
    };
    let at = format!("127.0.0.1:{}", port.number);
    let old = config("old", format!("listen: \"{at}\""));
    let deny = format!("deny_imports: {OWN}, deny_exports: {OWN}");
    let new = config("new", format!("remotes: [ {{ url: \"nats://{at}\", {deny} }} ]"));
    (old, new)
}

fn on(dir: &Path, nats: &NatsServer) -> Launch {
    let launch = Launch::on(dir).set("NODE__SHARDS", "3").set("NODE__WORKERS", "2");
    launch.argument("--nats").argument(&nats.url())
}

fn json(args: &[&str]) -> Value {
    let (code, out, err) = ran(&run(args));
    assert_eq!(code, 0, "{args:?}: {out}{err}");
    serde_json::from_str(&out).unwrap()
}

fn mirrored(old: &NatsServer, new: &NatsServer) -> Value {
    let (from, to) = (old.url(), new.url());
    json(&["mirror", "--from", &from, "--api", "$JS.old.API", "--nats", &to, "--json"])
}

/// Waits until the mirrors have what their streams have now.
fn until_mirrored(old: &NatsServer, new: &NatsServer) {
    let last = |nats: &NatsServer, stream: &str| {
        let info = nats.request(&format!("$JS.API.STREAM.INFO.{stream}"), "")?;
        info["state"]["last_seq"].as_u64()
    };
    let of_shards = (0..3).flat_map(|shard| [format!("USAGE_{shard}"), format!("OUT_{shard}")]);
    for stream in of_shards.chain(["CONTROL".to_owned()]) {
        let there = last(old, &stream).unwrap();
        let began = Instant::now();
        while last(new, &stream).is_none_or(|mirrored| mirrored < there) {
            assert!(began.elapsed() < support::PATIENCE, "{stream} is not mirrored up to {there}");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

fn counted(server: &Server) -> u64 {
    let rows = ORGS.iter().flat_map(|org| server.rows(&format!("/v1/orgs/{org}/spend?window=all")));
    rows.map(|row| row["events"].as_u64().unwrap()).sum()
}

/// `meterr verify` of what is on a server.
fn verified(dir: &Path, nats: &NatsServer) {
    let args = ["verify", "--nats", &nats.url(), "--json"];
    let launch = Launch::on(dir).set("NODE__SHARDS", "3");
    let (code, out, err) = ran(&launch.run(&args));
    assert_eq!(code, 0, "{out}{err}");
}

#[test]
fn a_region_hands_over_without_loss_and_is_sealed() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = regions();
    let server = on(&dir.path().join("old"), &old).start();
    declare_view(&server);
    at_work(&server, 0);
    let made = mirrored(&old, &new);
    assert_eq!((&made["streams"], &made["made"]), (&7.into(), &7.into()));
    assert_eq!(mirrored(&old, &new)["made"], 0);
    // A node does not begin on mirrors.
    let (status, log) = on(&dir.path().join("early"), &new).spawn().err().unwrap();
    assert!(!status.success() && log.contains("meterr promote"), "{log}");
    at_work(&server, 5_000);
    let before = answers(&server);
    // A replica does, and answers what the old region answers.
    let replica = on(&dir.path().join("replica"), &new).argument("--replica").start();
    replica.until("the replica has followed", || {
        let positions = |server: &Server| {
            let shards = server.get("/v1/shards").expect(200)["shards"].clone();
            let of = |shard: &Value| shard["usage_position"].as_u64().unwrap();
            shards.as_array().unwrap().iter().map(of).collect::<Vec<_>>()
        };
        (positions(&replica) == positions(&server)).then_some(())
    });
    assert_eq!(counted(&replica), counted(&server));
    replica.stop();
    let (to, from) = (new.url(), old.url());
    let promoted = json(&["promote", "--nats", &to, "--old", &from, "--json"]);
    assert_eq!((&promoted["streams"], &promoted["complete"]), (&7.into(), &true.into()));
    // Whoever is left in the old region gets no acknowledgement.
    let left =
        server.send("POST", "/v1/events", "application/x-ndjson", lines(&[event(1)]).as_bytes());
    assert_ne!(left.status, 202, "{left:?}");
    server.kill();

    let server = on(&dir.path().join("new"), &new).start();
    assert_same(&answers(&server), &before);
    at_work(&server, 9_000);
    settled(&server);
    server.stop();
    verified(&dir.path().join("new"), &new);
    // Once more: nothing to do.
    assert_eq!(json(&["promote", "--nats", &to, "--json"])["streams"], 0);
}

#[test]
fn a_region_takes_over_when_the_other_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (mut old, new) = regions();
    let server = on(&dir.path().join("old"), &old).start();
    at_work(&server, 0);
    mirrored(&old, &new);
    let before = counted(&server);
    until_mirrored(&old, &new);
    let (stop, acknowledged) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut n = 10_000;
            while !stop.load(Ordering::Relaxed) {
                let body = lines(&(n..n + 20).map(event).collect::<Vec<_>>());
                let sent = support::ask(
                    &support::agent(),
                    "POST",
                    &format!("{}/v1/events", server.url),
                    "application/x-ndjson",
                    body.as_bytes(),
                );
                if !sent.is_ok_and(|answer| answer.status == 202) {
                    return;
                }
                acknowledged.fetch_add(20, Ordering::Relaxed);
                n += 20;
            }
        });
        server.until("events stream in", || {
            (acknowledged.load(Ordering::Relaxed) >= 2_000).then_some(())
        });
        old.kill();
        stop.store(true, Ordering::Relaxed);
    });
    let acknowledged = before + acknowledged.load(Ordering::Relaxed);
    server.kill();
    let began = Instant::now();
    let promoted = json(&["promote", "--nats", &new.url(), "--json"]);
    assert_eq!(promoted["streams"], 7);
    let server = on(&dir.path().join("new"), &new).start();
    settled(&server);
    let took = began.elapsed();
    let there = counted(&server);
    println!(
        "{} of {acknowledged} acknowledged events lost; answers again after {took:?}, promoted in {} ms",
        acknowledged.saturating_sub(there),
        promoted["took_ms"]
    );
    assert!(there >= before && there <= acknowledged + 20, "{there} of {acknowledged}");
    at_work(&server, 5_000);
    settled(&server);
    server.stop();
    verified(&dir.path().join("new"), &new);
}
