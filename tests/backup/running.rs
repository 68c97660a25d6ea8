//! Backups of deployments at work.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use super::nats::{NatsOptions, NatsServer};
use super::support::Server;
use super::support::busy::{answers, assert_same, at_work, declare_view, event, lines, settled};
use super::{Backups, launch, on_nats};

/// Runs something while events stream in; says how many were acknowledged when it began and when it
/// ended.
fn while_events_stream_in<T>(server: &Server, from: usize, run: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let publisher = scope.spawn(|| {
            let mut n = from;
            while !stop.load(Ordering::Relaxed) {
                server.publish(&lines(&(n..n + 20).map(event).collect::<Vec<_>>()));
                n += 20;
            }
            n - from
        });
        let done = run();
        stop.store(true, Ordering::Relaxed);
        assert!(publisher.join().unwrap() > 0);
        done
    })
}

#[test]
fn files_at_work_are_backed_up_and_every_backup_restores() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let backups = Backups::at(&dir.path().join("backups"));
    let server = launch(&data).set("LOG__SEGMENT_BYTES", "1MiB").start();
    declare_view(&server);
    at_work(&server, 0);
    let from = ["--data-dir", data.to_str().unwrap()];
    let made: Vec<String> =
        while_events_stream_in(&server, 10_000, || (0..6).map(|_| backups.create(&from)).collect());
    settled(&server);
    let before = answers(&server);
    let last = backups.create(&from);
    let listed = backups.done(&["list"]);
    let names: Vec<&str> = listed["backups"]
        .as_array()
        .unwrap()
        .iter()
        .map(|b| b["backup"].as_str().unwrap())
        .collect();
    assert_eq!(names, made.iter().chain([&last]).map(String::as_str).collect::<Vec<_>>());
    let mut records = 0;
    for (n, name) in made.iter().enumerate() {
        let report = backups.verified(name);
        assert!(report["records"].as_u64().unwrap() >= records, "{report}");
        records = report["records"].as_u64().unwrap();
        backups.restored(name, None, &dir.path().join(format!("restored-{n}")));
    }
    // What was acknowledged before the last one is in it, with everything that decides figures.
    let restored = dir.path().join("restored");
    backups.restored(&last, None, &restored);
    server.kill();
    let server = launch(&restored).start();
    assert_same(&answers(&server), &before);
    // It goes on, knows the old ids, and is backed up into the same store: only what is new is written.
    server.publish(&lines(&(0..200).map(event).collect::<Vec<_>>()));
    at_work(&server, 5_000);
    settled(&server);
    let again = backups.create(&["--data-dir", restored.to_str().unwrap()]);
    server.stop();
    launch(&restored).verified();
    backups.verified(&again);
    backups.verified(&last);
}

#[test]
fn nats_at_work_is_backed_up_with_a_key_and_restored_to_another_account_and_to_files() {
    let dir = tempfile::tempdir().unwrap();
    let nats = NatsServer::start(NatsOptions::new().mapping(3));
    // The store is NATS, too, another server's.
    let kept = NatsServer::start(NatsOptions::new());
    let key = dir.path().join("key");
    std::fs::write(&key, "0123456789abcdef".repeat(4) + "\n").unwrap();
    let backups = Backups { key: Some(key.to_str().unwrap().to_owned()), url: kept.url() };
    let server = on_nats(&dir.path().join("node"), &nats).start();
    declare_view(&server);
    at_work(&server, 0);
    let url = nats.url();
    let from = ["--nats", &url];
    let made: Vec<String> =
        while_events_stream_in(&server, 10_000, || (0..4).map(|_| backups.create(&from)).collect());
    settled(&server);
    let before = answers(&server);
    let last = backups.create(&from);
    server.stop();
    for name in &made {
        backups.verified(name);
    }

    let other = NatsServer::start(NatsOptions::new().mapping(3));
    let to = other.url();
    let report = backups.done(&["restore", "--nats", &to]);
    assert_eq!((&report["same"], &report["backup"]), (&true.into(), &last.into()), "{report}");
    let server = on_nats(&dir.path().join("another"), &other).start();
    assert_same(&answers(&server), &before);
    at_work(&server, 5_000);
    settled(&server);
    let after = answers(&server);
    server.stop();
    on_nats(&dir.path().join("third"), &other).start().stop();

    // The old node's checkpoints are not taken for those of the restored deployment: a shard that has
    // nothing else stops, one that has newer ones of another node goes on with those.
    let old = on_nats(&dir.path().join("node"), &other).spawn().unwrap();
    let problems = old.until("every shard is live or stopped", || {
        let shards = old.get("/v1/shards").expect(200)["shards"].as_array()?.clone();
        let settled = |shard: &Value| shard["state"] == "live" || shard["state"] == "stopped";
        shards.iter().all(settled).then(|| {
            let problems = shards.iter().filter_map(|shard| shard["problem"].as_str());
            problems.map(str::to_owned).collect::<Vec<_>>()
        })
    });
    for problem in &problems {
        assert!(problem.contains("the checkpoint belongs to"), "{problem}");
    }
    if problems.is_empty() {
        assert_same(&answers(&old), &after);
    }
    old.kill();

    let files = dir.path().join("files");
    backups.restored(&made[1], None, &files);
    let server = launch(&files).start();
    settled(&server);
    server.stop();
    launch(&files).verified();
}
