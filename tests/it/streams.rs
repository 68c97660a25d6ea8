//! Live streams: snapshot, changes, resuming, and beginning anew.

use crate::support::sse::{Stream, Table, apply};
use crate::{launch, line};

const TIME: &str = "2026-02-03T04:05:06Z";

#[test]
fn a_stream_begins_with_a_snapshot_and_goes_on_with_changes() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let position = server.publish(&line("e1", "acme", "u1", TIME));
    server.get(&format!("/v1/orgs/acme/spend?min_position={position}")).expect(200);
    let mut stream = Stream::open(&server.url, "acme", None).unwrap();
    let snapshot = stream.next().unwrap();
    assert_eq!(snapshot.name, "snapshot");
    let mut table = Table::new();
    apply(&mut table, &snapshot);
    let of = |view: &str, key: Option<&str>| {
        (view.to_owned(), Some("2026-02-03T00:00:00Z".to_owned()), key.map(str::to_owned))
    };
    assert_eq!(table[&of("org_day", None)]["cost"], "0.15");

    // Another org's commit is none of this stream's.
    server.publish(&line("e2", "globex", "u1", TIME));
    server.publish(&line("e3", "acme", "u2", TIME));
    let change = stream.next().unwrap();
    assert_eq!(change.name, "change");
    assert!(change.epoch() > snapshot.epoch());
    apply(&mut table, &change);
    assert_eq!(table[&of("org_day", None)]["cost"], "0.3");
    assert_eq!(table[&of("user_day", Some("u2"))]["events"], 1);
}

#[test]
fn a_stream_resumes_where_it_broke_off_also_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let mut stream = Stream::open(&server.url, "acme", None).unwrap();
    assert_eq!(stream.next().unwrap().name, "snapshot");
    let position = server.publish(&line("e0", "acme", "u0", TIME));
    server.get(&format!("/v1/orgs/acme/spend?min_position={position}")).expect(200);
    let last = stream.next().unwrap();
    drop(stream);
    // Three commits that nobody saw, two servers.
    for n in 1..3 {
        let position = server.publish(&line(&format!("e{n}"), "acme", "u1", TIME));
        server.get(&format!("/v1/orgs/acme/spend?min_position={position}")).expect(200);
    }
    server.kill();
    let server = launch(dir.path()).start();
    server.publish(&line("e3", "acme", "u1", TIME));
    let mut stream = Stream::open(&server.url, "acme", last.id.as_deref()).unwrap();
    let mut epoch = last.epoch();
    for events in 2..=4 {
        let change = stream.next().unwrap();
        assert_eq!(change.name, "change");
        assert!(change.epoch() > epoch, "{} after {epoch}", change.epoch());
        epoch = change.epoch();
        let total = &change.data["views"]["org_all"][0];
        assert_eq!(total["events"], events, "{}", change.data);
    }
}

#[test]
fn an_unknown_id_gets_a_reset_and_a_snapshot() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let position = server.publish(&line("e1", "acme", "u1", TIME));
    server.get(&format!("/v1/orgs/acme/spend?min_position={position}")).expect(200);
    let mut known = Stream::open(&server.url, "acme", None).unwrap();
    let id = known.next().unwrap().id.unwrap();
    let shard = id.split_once('-').unwrap().0;
    for unknown in ["nonsense".to_owned(), format!("{shard}-999999"), "9999-1".to_owned()] {
        let mut stream = Stream::open(&server.url, "acme", Some(&unknown)).unwrap();
        assert_eq!(stream.next().unwrap().name, "reset", "{unknown}");
        let snapshot = stream.next().unwrap();
        assert_eq!(snapshot.name, "snapshot", "{unknown}");
        assert_eq!(snapshot.data["views"]["org_all"][0]["events"], 1);
    }
}

#[test]
fn a_change_of_the_time_zone_takes_the_old_windows_back() {
    let dir = tempfile::tempdir().unwrap();
    let launch = launch(dir.path());
    let server = launch.start();
    server.publish(&line("e1", "acme", "u1", TIME));
    let position = server.publish(&line("e2", "acme", "u1", "2026-02-03T23:30:00Z"));
    server.get(&format!("/v1/orgs/acme/spend?min_position={position}")).expect(200);
    let mut stream = Stream::open(&server.url, "acme", None).unwrap();
    let mut table = Table::new();
    apply(&mut table, &stream.next().unwrap());
    let body = serde_json::json!({ "time_zone": "Asia/Tokyo" });
    server.json("PUT", "/v1/orgs/acme/time-zone", &body).expect(202);
    apply(&mut table, &stream.next().unwrap());
    let mut fresh = Table::new();
    apply(&mut fresh, &Stream::open(&server.url, "acme", None).unwrap().next().unwrap());
    let days: Vec<_> =
        fresh.keys().filter(|k| k.0 == "org_day").map(|k| k.1.clone().unwrap()).collect();
    assert_eq!(days, ["2026-02-03T00:00:00+09:00", "2026-02-04T00:00:00+09:00"]);
    assert_eq!(table, fresh, "the changes do not add up to the state");
    server.stop();
    launch.verified();
}
