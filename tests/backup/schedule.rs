//! Backups that a server makes by itself.

use super::nats::{NatsOptions, NatsServer};
use super::support::busy::{answers, assert_same, at_work, declare_view, settled};
use super::support::{Launch, Server};
use super::{Backups, launch, on_nats};

fn scheduled(launch: Launch, backups: &Backups) -> Launch {
    launch
        .set("BACKUP__STORE", &backups.url)
        .set("BACKUP__KEEP", "1h")
        .set("BACKUP__INTERVAL", "1h")
}

/// The value of a metric.
fn metric(server: &Server, name: &str) -> Option<f64> {
    let text = server.get("/metrics").text;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
    line.parse().ok()
}

fn names(backups: &Backups) -> Vec<String> {
    let listed = backups.done(&["list"]);
    let name = |backup: &serde_json::Value| backup["backup"].as_str().unwrap().to_owned();
    listed["backups"].as_array().unwrap().iter().map(name).collect()
}

#[test]
fn a_server_makes_the_first_backup_at_once_and_the_next_when_it_is_due() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let backups = Backups::at(&dir.path().join("backups"));
    let server = launch(&data).start();
    declare_view(&server);
    at_work(&server, 0);
    let before = answers(&server);
    server.stop();
    let server = scheduled(launch(&data), &backups).start();
    let made = |server: &Server| metric(server, "meterr_backup_made_total").filter(|n| *n == 1.0);
    server.until("a backup is made", || made(&server));
    assert!(metric(&server, "meterr_backup_newest_timestamp_seconds").unwrap() > 1.7e9);
    assert!(metric(&server, "meterr_backup_written_bytes_total").unwrap() > 1e3);
    assert_eq!(metric(&server, "meterr_backup_failures_total"), Some(0.0));
    let first = names(&backups);
    assert_eq!(first.len(), 1);
    assert!(server.stop().contains("backup made"));

    // Not due again after a restart; the metric shows that there is one.
    let server = scheduled(launch(&data), &backups).start();
    server.until("the newest backup is known", || {
        metric(&server, "meterr_backup_newest_timestamp_seconds").filter(|at| *at > 1.7e9)
    });
    assert_eq!(metric(&server, "meterr_backup_made_total"), Some(0.0));
    assert_eq!(names(&backups), first);
    server.stop();

    backups.verified(&first[0]);
    let to = dir.path().join("to");
    backups.restored(&first[0], None, &to);
    // The restored deployment is another one, so a backup of its own is due.
    let server = scheduled(launch(&to), &backups).start();
    assert_same(&answers(&server), &before);
    server.until("a backup is made", || made(&server));
    assert_eq!(names(&backups).len(), 2);
}

#[test]
fn a_node_on_nats_makes_backups_and_a_wrong_key_stops_the_start() {
    let dir = tempfile::tempdir().unwrap();
    let nats = NatsServer::start(NatsOptions::new().mapping(3));
    let backups = Backups::at(&dir.path().join("backups"));
    let node = dir.path().join("node");
    let server = scheduled(on_nats(&node, &nats), &backups).start();
    at_work(&server, 0);
    settled(&server);
    server.until("a backup is made", || {
        metric(&server, "meterr_backup_made_total").filter(|n| *n == 1.0)
    });
    server.stop();
    for name in names(&backups) {
        backups.verified(&name);
    }
    let key = scheduled(on_nats(&node, &nats), &backups).set("BACKUP__KEY_FILE", "/no/such/key");
    let (status, log) = key.spawn().err().unwrap();
    assert!(!status.success() && log.contains("cannot read the key"), "{log}");
}
