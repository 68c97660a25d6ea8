//! Starting, stopping, being killed, and starting again.

use std::time::Instant;

use crate::support::golden::check;
use crate::support::sse::Stream;
use crate::support::{meterr, ran, run, run_json};
use crate::{launch, line};

#[test]
fn the_demo_ends_in_the_golden_figures() {
    let found = run_json(&["demo", "--once", "--json"]);
    check("demo.json", &format!("{}\n", serde_json::to_string_pretty(&found).unwrap()));
}

#[test]
fn the_demo_shows_tables_to_people() {
    let (code, out, err) = ran(&run(&["demo", "--once"]));
    assert_eq!(code, 0, "{err}");
    for part in ["acme", "globex", "initech", "gpt-4o-mini", "19,366 events in"] {
        assert!(out.contains(part), "{part:?} is missing: {out}");
    }
}

#[test]
fn sigterm_drains_and_a_restart_has_everything() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let mut lines = String::new();
    for n in 0..5_000 {
        lines.push_str(&line(
            &format!("e{n}"),
            "acme",
            &format!("u{}", n % 7),
            "2026-02-03T04:05:06Z",
        ));
    }
    let position = server.publish(&lines);
    let question = "/v1/orgs/acme/spend?window=day&by=user&min_position=";
    let before = server.rows(&format!("{question}{position}"));
    let log = server.stop();
    assert!(log.contains("drained"), "{log}");

    let server = launch(dir.path()).start();
    // Nothing is read again behind a clean stop: its last checkpoint has everything.
    assert_eq!(server.rows(&format!("{question}{position}")), before);
    assert_eq!(before.len(), 7);
    server.stop();
    launch(dir.path()).verified();
}

#[test]
fn a_drain_ends_streams_and_refuses_new_work() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = launch(dir.path()).start();
    let position = server.publish(&line("e1", "acme", "u1", "2026-02-03T04:05:06Z"));
    server.get(&format!("/v1/orgs/acme/spend?min_position={position}")).expect(200);
    let mut stream = Stream::open(&server.url, "acme", None).unwrap();
    assert_eq!(stream.next().unwrap().name, "snapshot");
    let began = Instant::now();
    server.signal("TERM");
    assert_eq!(stream.next(), None);
    assert!(stream.bye, "the stream broke off without a word");
    assert_eq!(server.ended().code(), Some(0), "{}", server.log());
    assert!(began.elapsed().as_secs() < 20, "draining an idle server took {:?}", began.elapsed());
}

#[test]
fn sigint_drains_as_sigterm_does() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = launch(dir.path()).start();
    server.signal("INT");
    assert_eq!(server.ended().code(), Some(0), "{}", server.log());
}

#[test]
fn a_second_signal_leaves_at_once_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut server = launch(dir.path()).start();
    let position = server.publish(&line("e1", "acme", "u1", "2026-02-03T04:05:06Z"));
    // A request that is still sending its body holds up the drain.
    let address = server.url.strip_prefix("http://").unwrap().to_owned();
    let mut request = std::net::TcpStream::connect(address).unwrap();
    let head = "POST /v1/events HTTP/1.1\r\nhost: x\r\ncontent-type: application/x-ndjson\r\n\
                content-length: 1000000\r\n\r\n{";
    std::io::Write::write_all(&mut request, head.as_bytes()).unwrap();
    // An answer to another request shows that the head above, sent before, was read.
    server.get("/healthz");
    server.signal("TERM");
    server.until("the drain", || server.log().contains("a second signal").then_some(()));
    server.signal("TERM");
    assert_eq!(server.ended().code(), Some(130), "{}", server.log());

    let server = launch(dir.path()).start();
    let rows = server.rows(&format!("/v1/orgs/acme/spend?window=all&min_position={position}"));
    assert_eq!((rows[0]["events"].as_i64(), rows[0]["cost"].as_str()), (Some(1), Some("0.15")));
}

#[test]
fn a_restart_goes_on_from_checkpoint_and_log() {
    let dir = tempfile::tempdir().unwrap();
    let launch = launch(dir.path()).set("CHECKPOINT__EVENTS_MAX", "1000");
    let server = launch.start();
    let mut position = String::new();
    for batch in 0..10 {
        let lines: String = (0..500)
            .map(|n| {
                line(&format!("e{batch}-{n}"), "acme", &format!("u{n}"), "2026-02-03T04:05:06Z")
            })
            .collect();
        position = server.publish(&lines);
    }
    server.get(&format!("/v1/orgs/acme/spend?min_position={position}")).expect(200);
    server.until("a checkpoint", || {
        let text = server.get("/metrics").text;
        let count = |line: &str| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() > 0.0;
        text.lines()
            .any(|l| l.starts_with("meterr_checkpoint_seconds_count") && count(l))
            .then_some(())
    });
    // After the checkpoint, so that there is something to replay.
    let position = server.publish(&line("last", "acme", "u1", "2026-02-03T04:05:06Z"));
    server.get(&format!("/v1/orgs/acme/spend?min_position={position}")).expect(200);
    server.kill();
    let server = launch.start();
    let rows = server.rows("/v1/orgs/acme/spend?window=all");
    assert_eq!(rows[0]["events"], 5_001);
    // And it still knows the ids.
    let again = server.publish(&line("e0-0", "acme", "u0", "2026-02-03T04:05:06Z"));
    let rows = server.rows(&format!("/v1/orgs/acme/spend?window=all&min_position={again}"));
    assert_eq!(rows[0]["events"], 5_001);
    server.stop();
    let report = launch.verified();
    assert_eq!(report["events"], 5_001);
}

#[test]
fn a_data_directory_serves_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let Err((status, log)) = launch(dir.path()).spawn() else { panic!("two servers on one log") };
    assert_eq!(status.code(), Some(1));
    assert!(
        log.contains("is in use by process") && log.contains(&server.pid().to_string()),
        "{log}"
    );
    let (code, _, err) = ran(&launch(dir.path()).run(&["verify"]));
    assert_eq!(code, 1);
    assert!(err.contains("is in use by process"), "{err}");
}

#[test]
fn another_number_of_workers_shows_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let lines: String = (0..400)
        .map(|n| line(&format!("e{n}"), &format!("org{}", n % 9), "u1", "2026-02-03T04:05:06Z"))
        .collect();
    let position = server.publish(&lines);
    let question = format!("/v1/top?by=org&window=all&n=20&min_position={position}");
    let before = server.get(&question).expect(200)["rows"].clone();
    server.kill();
    for workers in ["1", "4"] {
        let server = launch(dir.path()).set("NODE__WORKERS", workers).start();
        assert_eq!(server.get(&question).expect(200)["rows"], before);
        server.stop();
    }
}

#[test]
fn wrong_settings_are_all_named_and_exit_with_two() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("meterr.toml");
    let serve = |text: &str| {
        std::fs::write(&file, text).unwrap();
        let mut command = meterr(&["serve", "--http", "127.0.0.1:0", "--config"]);
        ran(&command.arg(&file).arg("--data-dir").arg(dir.path().join("data")).output().unwrap())
    };
    let (code, _, err) =
        serve("[node]\nshards = 0\nshardz = 1\n[epoch]\nage_max = \"20 parsecs\"\n");
    assert_eq!(code, 2, "{err}");
    for part in ["node.shards", "shardz", "epoch.age_max"] {
        assert!(err.contains(part), "{part} is not named: {err}");
    }
    let (code, out, err) =
        ran(&meterr(&["config", "check", "--json", "--config"]).arg(&file).output().unwrap());
    assert_eq!(code, 2, "{err}");
    let problems: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert!(problems["problems"].as_array().unwrap().len() >= 2, "{problems}");
    // Its valid twin.
    std::fs::write(&file, "[node]\nshards = 2\n[epoch]\nage_max = \"20ms\"\n").unwrap();
    let check = meterr(&["config", "check", "--config"]).arg(&file).output().unwrap();
    assert_eq!(ran(&check).0, 0);
    let (code, _, err) = ran(&run(&["serve", "--no-such-flag"]));
    assert_eq!(code, 2, "{err}");
    let variable =
        meterr(&["config", "check"]).env("METERR__NODE__SHARDS", "many").output().unwrap();
    let (code, _, err) = ran(&variable);
    assert_eq!(code, 2);
    assert!(err.contains("METERR__NODE__SHARDS"), "{err}");
}

#[test]
fn the_number_of_shards_never_changes() {
    let dir = tempfile::tempdir().unwrap();
    launch(dir.path()).start().stop();
    let other = launch(dir.path()).set("NODE__SHARDS", "5");
    let Err((status, log)) = other.spawn() else { panic!("another number of shards was taken") };
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("was made with 4"), "{log}");
}
