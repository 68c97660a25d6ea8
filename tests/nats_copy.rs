//! `meterr log copy` with the real binary: a deployment with corrections, prices, time zones, views and
//! dead letters moves from files to NATS, goes on there, and comes back; whoever asks sees no
//! difference.

#![allow(clippy::unwrap_used)]

#[path = "support/nats.rs"]
mod nats;
mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use futures::executor::block_on;
use meterr_connectors::copy::Place;
use meterr_connectors::embedded::{EmbeddedOptions, EmbeddedPlace, RealFs};
use nats::{NatsOptions, NatsServer};
use serde_json::{Value, json};
use support::busy::{answers, assert_same, at_work, declare_view, event, lines, settled};
use support::{Launch, METERR, ran, run};

fn launch(dir: &Path) -> Launch {
    Launch::on(dir).set("NODE__SHARDS", "3").set("NODE__WORKERS", "2")
}

fn on_nats(dir: &Path, nats: &NatsServer) -> Launch {
    launch(dir).argument("--nats").argument(&nats.url())
}

/// `meterr log copy`: exit code, what it printed, its messages.
fn copy(from: &str, to: &str) -> (i32, Value, String) {
    let (code, out, err) = ran(&run(&["log", "copy", "--from", from, "--to", to, "--json"]));
    (code, serde_json::from_str(&out).unwrap_or(Value::Null), err)
}

/// A copy that must succeed and be the same.
fn copied(from: &str, to: &str) -> Value {
    let (code, report, err) = copy(from, to);
    assert_eq!(code, 0, "{report}{err}");
    assert_eq!(report["same"], true, "{report}");
    assert_eq!(report["compared"]["records"], report["records"], "{report}");
    assert!(report["views"]["rows"].as_u64().unwrap() > 50, "{report}");
    report
}

fn embedded(dir: &Path) -> String {
    format!("embedded:{}", dir.display())
}

#[test]
fn a_deployment_moves_to_nats_and_back_and_nobody_sees_a_difference() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let server = launch(&first).start();
    declare_view(&server);
    at_work(&server, 0);
    let before = answers(&server);
    let letters = before.iter().find(|(path, _)| path.starts_with("/v1/dead-letters")).unwrap();
    assert!(letters.1["rows"].as_array().unwrap().len() >= 2, "{letters:?}");
    // In use: nothing is copied.
    let nats = NatsServer::start(NatsOptions::new().mapping(3));
    let (code, _, err) = copy(&embedded(&first), &nats.url());
    assert!(code == 1 && err.contains("in use by process"), "{code} {err}");
    server.stop();

    let report = copied(&embedded(&first), &nats.url());
    assert_eq!(report["copied"], report["records"]);
    assert_eq!(report["shards"], 3);
    // Once more: nothing to do.
    assert_eq!(copied(&embedded(&first), &nats.url())["copied"], 0);

    // With the checkpoints of the old directory, and without any.
    let server = on_nats(&first, &nats).start();
    assert_same(&answers(&server), &before);
    at_work(&server, 1_000);
    let after = answers(&server);
    server.stop();
    let server = on_nats(&dir.path().join("third"), &nats).start();
    assert_same(&answers(&server), &after);
    server.stop();

    // Old and new part ways: neither is copied over the other.
    let (code, _, err) = copy(&embedded(&first), &nats.url());
    assert!(code == 1 && err.contains("more than the source's"), "{code} {err}");

    let report = copied(&nats.url(), &embedded(&second));
    assert_eq!(report["copied"], report["records"]);
    let server = launch(&second).start();
    assert_same(&answers(&server), &after);
    // Ids from before both moves are still known.
    server.publish(&lines(&(0..200).map(event).collect::<Vec<_>>()));
    settled(&server);
    let rows = |answers: &[(String, Value)]| -> Vec<Value> {
        answers
            .iter()
            .filter(|(path, _)| path.contains("/spend"))
            .map(|(_, answer)| answer["rows"].clone())
            .collect()
    };
    assert_eq!(rows(&answers(&server)), rows(&after));
    server.stop();
    launch(&second).verified();
    // And onto the directory it came from, which has the beginning of it.
    let report = copied(&nats.url(), &embedded(&first));
    let (all, missing) = (&report["records"], &report["copied"]);
    assert!(missing.as_u64() > Some(0) && missing.as_u64() < all.as_u64(), "{report}");
    let server = launch(&first).start();
    assert_same(&answers(&server), &after);
}

#[test]
fn a_copy_that_broke_off_is_not_served_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let server = launch(&data).start();
    server
        .json("POST", "/v1/views", &json!({"name": "by_team", "by": ["tag:team"], "window": "all"}))
        .expect(202);
    for part in 0..20 {
        at_work(&server, part * 2_000);
    }
    let before = answers(&server);
    server.stop();

    // A server that is full in the middle.
    let mut nats = NatsServer::start(NatsOptions::new().file_store_max(400_000));
    let (code, _, err) = copy(&embedded(&data), &nats.url());
    assert_eq!(code, 1, "{err}");
    let (status, log) = on_nats(&dir.path().join("node"), &nats).spawn().err().unwrap();
    assert!(!status.success() && log.contains("the copy was not finished"), "{log}");
    nats.restart_with(NatsOptions::new());
    let report = copied(&embedded(&data), &nats.url());
    assert!(report["copied"].as_u64() < report["records"].as_u64(), "{report}");
    let server = on_nats(&dir.path().join("node"), &nats).start();
    assert_same(&answers(&server), &before);
    server.stop();

    // A disk that is full in the middle.
    let back = dir.path().join("back");
    let output = Command::new("bash")
        .args(["-c", "trap '' XFSZ; ulimit -f 100; exec \"$@\"", "meterr", METERR])
        .args(["log", "copy", "--from", &nats.url(), "--to", &embedded(&back)])
        .output()
        .unwrap();
    let (code, _, err) = ran(&output);
    assert!(code == 1 && err.contains("stopped after a failed write"), "{code} {err}");
    let (status, log) = launch(&back).spawn().err().unwrap();
    assert!(!status.success() && log.contains("that was not finished"), "{log}");
    // Nor is it copied from.
    let third = embedded(&dir.path().join("third"));
    let (code, _, err) = copy(&embedded(&back), &third);
    assert_eq!(code, 1, "{err}");
    let report = copied(&nats.url(), &embedded(&back));
    assert!(report["copied"].as_u64() < report["records"].as_u64(), "{report}");
    let server = launch(&back).start();
    assert_same(&answers(&server), &before);
}

#[test]
fn a_place_with_something_else_in_it_is_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
    for at in [&one, &other] {
        let server = launch(at).start();
        server.publish(&lines(&(0..50).map(event).collect::<Vec<_>>()));
        settled(&server);
        server.stop();
    }
    let (code, _, err) = copy(&embedded(&one), &embedded(&other));
    assert!(code == 1 && err.contains("holds another log"), "{code} {err}");
    launch(&other).verified();

    let nats = NatsServer::start(NatsOptions::new());
    on_nats(&dir.path().join("node"), &nats).start().stop();
    let (code, _, err) = copy(&embedded(&one), &nats.url());
    assert!(code == 1 && err.contains("holds another log"), "{code} {err}");

    let empty = NatsServer::start(NatsOptions::new());
    let (code, _, err) = copy(&empty.url(), &embedded(&dir.path().join("new")));
    assert!(code == 1 && err.contains("holds no deployment"), "{code} {err}");
    let (code, _, err) = copy(&embedded(&dir.path().join("none")), &nats.url());
    assert!(code == 1 && err.contains("there is no data directory"), "{code} {err}");
    let (code, _, err) = copy(&empty.url(), &empty.url());
    assert!(code == 2 && err.contains("the same place"), "{code} {err}");
    // In words for people.
    let (code, out, err) =
        ran(&run(&["log", "copy", "--from", &embedded(&one), "--to", &empty.url()]));
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("7 logs") && out.contains("on both sides"), "{out}");
    assert!(err.contains(&format!("meterr serve --nats {}", empty.url())), "{err}");
}

#[test]
fn a_copy_that_differs_is_told_by_record_and_by_row_and_not_served() {
    let dir = tempfile::tempdir().unwrap();
    let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
    let server = launch(&one).start();
    for n in 0..20 {
        server.publish(&lines(&[event(n)]));
    }
    settled(&server);
    server.stop();
    // Somebody's own copy, with one token more in one event.
    let place = |at: &Path| EmbeddedPlace::new(at, EmbeddedOptions::default(), Arc::new(RealFs));
    let (source, copy) = (place(&one), place(&other));
    let mut spoilt = false;
    for stream in source.streams().unwrap() {
        let log = source.find(&stream).unwrap().unwrap();
        let mut records = block_on(log.read(1, usize::MAX)).unwrap();
        let last = log.head();
        for record in records
            .iter_mut()
            .filter(|record| stream.starts_with("USAGE") && record.position < last)
        {
            let text = String::from_utf8(record.message.payload.to_vec()).unwrap();
            if !std::mem::replace(&mut spoilt, true) {
                record.message.payload =
                    text.replace("\"output_tokens\":1", "\"output_tokens\":2").into();
            }
        }
        block_on(copy.open(log.identity(), last).unwrap().import(records)).unwrap();
    }
    assert!(spoilt);
    copy.finish().unwrap();
    drop((source, copy));

    let (code, report, err) = self::copy(&embedded(&one), &embedded(&other));
    assert_eq!(code, 4, "{report}{err}");
    assert_eq!((&report["copied"], &report["same"]), (&json!(0), &json!(false)));
    assert_eq!(report["compared"]["differences_total"], 1, "{report}");
    let told = report["compared"]["differences"][0].as_str().unwrap();
    assert!(told.contains("the payload differs"), "{told}");
    // What is recomputed from the copy and what a node would hold; the output log has the old rows.
    let accounts: BTreeSet<&str> = report["views"]["differences"]
        .as_array()
        .unwrap()
        .iter()
        .map(|difference| difference["account"].as_str().unwrap())
        .collect();
    assert_eq!(accounts, BTreeSet::from(["copy: held", "copy: recomputed"]));
    let (status, log) = launch(&other).spawn().err().unwrap();
    assert!(!status.success() && log.contains("that was not finished"), "{log}");
}
