//! A disk that takes no more: the write is not acknowledged, the shard stops and says which log
//! failed, and after a restart with room everything acknowledged is there, once.
//!
//! The disk is a limit on the size of files (`ulimit -f`), which needs no rights of its own; to a
//! log it is the same, a write that fails half-way.

use crate::support::Launch;
use crate::{ORGS, Totals, batch, launch, totals_of, until_settled};

const BATCH: u64 = 500;

/// Publishes until the server takes no more; returns the first event that was not acknowledged.
fn fill(launch: &Launch, from: u64, totals: &mut Totals) -> u64 {
    let server = launch.start();
    let mut next = from;
    let refused = loop {
        assert!(next < from + 2_000 * BATCH, "the disk is never full");
        let mut new = totals.clone();
        let lines = batch(next..next + BATCH, &mut new);
        let answer = server.send("POST", "/v1/events", "application/x-ndjson", lines.as_bytes());
        if answer.status != 202 {
            break answer;
        }
        next += BATCH;
        *totals = new;
        if server.get("/readyz").status != 200 {
            break server.get("/readyz");
        }
    };
    assert_eq!((refused.status, refused.media_type.as_str()), (503, "application/problem+json"));
    // Not ready, and the reason names the log.
    let problem = server.until("a stopped shard", || {
        let answer = server.get("/readyz");
        let shards = answer.json()["shards"].as_array().unwrap().clone();
        let stopped = shards.iter().find(|shard| shard["state"] == "stopped")?;
        Some(stopped["problem"].as_str().unwrap().to_owned())
    });
    assert!(problem.contains("USAGE_") || problem.contains("OUT_"), "{problem}");
    until_settled(&server);
    // Whoever asks gets the committed figures or 503, never figures of what was not acknowledged.
    for org in ORGS {
        if let Some((events, _)) = totals_of(&server, org) {
            let most = totals[org].0 + BATCH as i64 / 4;
            assert!(events <= most, "{org}: {events} of {most}");
        }
    }
    let log = server.log();
    assert!(!log.contains("panicked"), "{log}");
    let mut server = server;
    server.signal("TERM");
    let status = server.ended();
    assert!(matches!(status.code(), Some(0 | 1)), "{status}: {}", server.log());
    assert!(!server.log().contains("panicked"), "{}", server.log());
    next
}

#[test]
fn a_full_disk_ends_in_a_clear_stop_and_a_clean_restart() {
    let dir = tempfile::tempdir().unwrap();
    let launch = launch(dir.path())
        .set("LOG__SEGMENT_BYTES", "256MiB")
        // So that the checkpoints stay below the limit, which is to meet the logs.
        .set("CHECKPOINT__EVENTS_MAX", "1000000")
        .set("CHECKPOINT__INTERVAL", "1d");
    let mut totals = Totals::new();
    let mut next = 0;
    for kib in [2_000, 3_000] {
        next = fill(&launch.clone().files_at_most_kib(kib), next, &mut totals);
        // Somebody makes room. What was not acknowledged is sent again, as any client would.
        let server = launch.start();
        let position = server.publish(&batch(next..next + BATCH, &mut totals));
        next += BATCH;
        for org in ORGS {
            server.get(&format!("/v1/orgs/{org}/spend?min_position={position}")).expect(200);
            assert_eq!(totals_of(&server, org), Some(totals[org]), "{org}");
        }
        server.stop();
        let report = launch.verified();
        assert_eq!(report["events"], next, "{report}");
    }
}
