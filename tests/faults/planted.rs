//! Rows that say something wrong, in form beyond reproach: `verify` must find them.

use std::path::Path;
use std::sync::Arc;

use futures::executor::block_on;
use meterr_connectors::embedded::{EmbeddedLog, EmbeddedOptions, RealFs};
use meterr_connectors::log::{Log, Message, system_clock};
use serde_json::{Value, json};

use crate::support::ran;
use crate::{Totals, batch, launch};

fn open(dir: &Path, stream: &str) -> Arc<EmbeddedLog> {
    let dir = dir.join("log").join(stream);
    let options = EmbeddedOptions::default();
    EmbeddedLog::open(&dir, stream, options, Arc::new(RealFs), system_clock()).unwrap().0
}

/// Commits one more epoch to an output log, as a shard would: same positions, hash and all.
fn plant(log: &EmbeddedLog, views: Value) {
    let last = block_on(log.last_commit()).unwrap().unwrap();
    let mut commit: Value = serde_json::from_slice(&last.message.payload).unwrap();
    let epoch = commit["epoch"].as_u64().unwrap() + 1;
    let token = commit["token"].as_u64().unwrap();
    let part = format!(
        "{{\"epoch\":{epoch},\"token\":{token},\"attempt\":1,\"part\":0,\"orgs\":[{{\"org\":\"acme\",\
         \"views\":{views}}}]}}"
    );
    commit["epoch"] = json!(epoch);
    commit["attempt"] = json!(1);
    commit["parts"] = json!(1);
    commit["hash"] = json!(blake3::hash(part.as_bytes()).to_hex().to_string());
    commit.as_object_mut().unwrap().remove("seal");
    // As the engine writes it: the epoch first.
    let fields: Vec<String> = [
        "epoch",
        "usage_position",
        "control_position",
        "log_time",
        "token",
        "attempt",
        "parts",
        "hash",
    ]
    .iter()
    .map(|name| format!("\"{name}\":{}", commit[name]))
    .collect();
    let commit = format!("{{{}}}", fields.join(","));
    let subject = last.message.subject.trim_end_matches("commit");
    let part = Message::new(format!("{subject}part"), part);
    let commit = Message::new(format!("{subject}commit"), commit);
    block_on(log.commit(vec![part], commit, last.position)).unwrap();
}

#[test]
fn a_wrong_row_in_the_output_log_is_named_by_verify() {
    let dir = tempfile::tempdir().unwrap();
    let launch = launch(dir.path());
    let server = launch.start();
    server.publish(&batch(0..400, &mut Totals::new()));
    let shards = server.get("/v1/shards").expect(200);
    server.stop();
    launch.verified();

    // The shard of acme is the one whose output log names it.
    let streams: Vec<String> =
        (0..shards["shards"].as_array().unwrap().len()).map(|n| format!("OUT_{n}")).collect();
    let stream = streams
        .iter()
        .find(|stream| {
            let log = open(dir.path(), stream);
            let records = block_on(log.read(1, 64 << 20)).unwrap();
            log.close().unwrap();
            records.iter().any(|record| {
                String::from_utf8_lossy(&record.message.payload).contains("\"org\":\"acme\"")
            })
        })
        .unwrap();
    let log = open(dir.path(), stream);
    plant(
        &log,
        json!({ "org_day": [["2026-02-01T00:00:00Z", null, 7, "0.5", 0, [1, 0, 0, 0, 2]]] }),
    );
    log.close().unwrap();

    let (code, out, err) = ran(&launch.run(&["verify", "--json"]));
    assert_eq!(code, 4, "{out}{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["differences_total"], 1, "{report}");
    let difference = &report["differences"][0];
    assert_eq!(difference["account"], "published");
    assert_eq!((&difference["org"], &difference["view"]), (&json!("acme"), &json!("org_day")));
    assert_eq!(difference["window_start"], "2026-02-01T00:00:00Z");
    assert_eq!(difference["found"]["events"], 7);
    assert_ne!(difference["expected"]["events"], 7);

    let (code, out, _) = ran(&launch.run(&["verify"]));
    assert_eq!(code, 4);
    assert!(out.contains("1 rows differ") && out.contains("org_day"), "{out}");
}

#[test]
fn a_row_that_nothing_led_to_is_named_by_verify() {
    let dir = tempfile::tempdir().unwrap();
    let launch = launch(dir.path());
    let server = launch.start();
    server.publish(&batch(0..400, &mut Totals::new()));
    server.stop();
    let row = json!({ "user_month": [["2026-02-01T00:00:00Z", "nobody", 1, "3", 0, [1]]] });
    // In whichever shard: an org that is none of its own is as wrong.
    let log = open(dir.path(), "OUT_0");
    plant(&log, row);
    log.close().unwrap();
    let (code, out, err) = ran(&launch.run(&["verify", "--json"]));
    assert_eq!(code, 4, "{out}{err}");
    let report: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(report["differences"][0]["key"], "nobody", "{report}");
    assert_eq!(report["differences"][0]["expected"], Value::Null, "{report}");
}
