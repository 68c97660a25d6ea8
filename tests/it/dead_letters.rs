//! Events that were not counted: told at once where that needs no state, listed, shown, mended.

use serde_json::{Value, json};

use crate::support::{ran, run, run_json};
use crate::{launch, line};

const TIME: &str = "2026-02-03T04:05:06Z";

#[test]
fn one_bad_line_spoils_only_itself() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let body = format!(
        "{}not json\n{{\"id\":\"x\",\"org\":\"acme\",\"user\":\"u\"}}\n{}",
        line("e1", "acme", "u1", TIME),
        line("e2", "acme", "u1", TIME)
    );
    let answer =
        server.send("POST", "/v1/events", "application/x-ndjson", body.as_bytes()).expect(202);
    assert_eq!((&answer["accepted"], &answer["rejected_total"]), (&json!(2), &json!(2)));
    let rejected: Vec<_> = answer["rejected"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| (r["line"].as_u64().unwrap(), r["reason"].as_str().unwrap()))
        .collect();
    assert_eq!(rejected, [(2, "malformed"), (3, "missing_field")]);
}

/// A server with one conflicting duplicate, and the id of its dead letter.
fn with_conflict(dir: &std::path::Path) -> (crate::support::Server, String) {
    let server = launch(dir).start();
    server.publish(&line("e1", "acme", "u1", TIME));
    let position = server.publish(&line("e1", "acme", "u2", TIME));
    server.get(&format!("/v1/orgs/acme/spend?min_position={position}")).expect(200);
    let list = server.get("/v1/dead-letters").expect(200);
    let rows = list["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 1, "{list}");
    assert_eq!(rows[0]["reason"], "conflicting_duplicate");
    let id = rows[0]["id"].as_str().unwrap().to_owned();
    (server, id)
}

#[test]
fn a_dead_letter_is_listed_shown_and_replayed_mended() {
    let dir = tempfile::tempdir().unwrap();
    let (server, id) = with_conflict(dir.path());
    let letter = server.get(&format!("/v1/dead-letters/{id}")).expect(200);
    assert_eq!(letter["raw"].as_str().unwrap().trim(), line("e1", "acme", "u2", TIME).trim());
    assert_eq!(letter["replayed"], Value::Null);
    let mended = line("e2", "acme", "u2", TIME);
    let path = format!("/v1/dead-letters/{id}/replay");
    let answer = server.send("POST", &path, "application/json", mended.as_bytes()).expect(202);
    let position = answer["position"].as_str().unwrap();
    let rows =
        server.rows(&format!("/v1/orgs/acme/spend?window=all&by=user&min_position={position}"));
    assert_eq!(rows.iter().map(|r| r["key"].clone()).collect::<Vec<_>>(), ["u1", "u2"]);
    // It is marked, also after a crash.
    server.kill();
    let server = launch(dir.path()).start();
    let letter = server.get(&format!("/v1/dead-letters/{id}")).expect(200);
    assert!(letter["replayed"].as_str().is_some(), "{letter}");
    for (missing, status) in [("0-99999-0", 404), ("gibberish", 400)] {
        assert_eq!(server.get(&format!("/v1/dead-letters/{missing}")).status, status);
    }
}

#[test]
fn dead_letters_by_command() {
    let dir = tempfile::tempdir().unwrap();
    let (server, id) = with_conflict(dir.path());
    let url = server.url.as_str();
    let list = run_json(&[
        "dead-letters",
        "list",
        "--reason",
        "conflicting_duplicate",
        "--json",
        "--url",
        url,
    ]);
    assert_eq!(list["rows"][0]["id"], json!(id));
    let other = run_json(&["dead-letters", "list", "--reason", "too_late", "--json", "--url", url]);
    assert_eq!(other["rows"], json!([]));
    let (code, out, _) = ran(&run(&["dead-letters", "show", &id, "--url", url]));
    assert_eq!(code, 0);
    assert!(out.contains("conflicting_duplicate") && out.contains("\"u2\""), "{out}");
    let mended = dir.path().join("mended");
    std::fs::write(&mended, line("e3", "acme", "u3", TIME)).unwrap();
    let mended = mended.to_str().unwrap();
    let (code, out, err) =
        ran(&run(&["dead-letters", "replay", &id, "--mended", mended, "--url", url]));
    assert_eq!(code, 0, "{out}{err}");
    server.until("the mended event", || {
        (server.rows("/v1/orgs/acme/spend?window=all")[0]["events"] == 2).then_some(())
    });
    let (code, _, err) = ran(&run(&["dead-letters", "show", "0-99999-0", "--url", url]));
    assert_eq!(code, 1, "{err}");
}
