//! Restoring earlier moments, exactly.

use meterr_connectors::log::system_clock;
use serde_json::{Value, json};

use super::support::Server;
use super::support::busy::{
    ORGS, answers, assert_same, at_work, declare_view, event, lines, settled,
};
use super::{Backups, launch};

/// A moment: when it was, where the logs were, and what was answered.
struct Moment {
    time: String,
    position: String,
    answers: Vec<(String, Value)>,
}

/// Where all logs are.
fn position(server: &Server) -> String {
    let status = server.get("/v1/shards").expect(200);
    let shards = status["shards"].as_array().unwrap();
    let usage = shards.iter().map(|shard| format!("{}:{}", shard["shard"], shard["usage_head"]));
    let control = shards.iter().map(|shard| shard["control_position"].as_u64().unwrap()).max();
    usage.chain([format!("c:{}", control.unwrap())]).collect::<Vec<_>>().join(",")
}

fn moment(server: &Server) -> Moment {
    let answers = answers(server);
    let (time, position) = (system_clock()().to_string(), position(server));
    // The next record has a later time.
    let now = system_clock()();
    server.until("the clock goes on", || (system_clock()() > now).then_some(()));
    Moment { time, position, answers }
}

#[test]
fn any_moment_is_restored_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let backups = Backups::at(&dir.path().join("backups"));
    let server = launch(&data).start();
    declare_view(&server);
    settled(&server);
    let mut moments = Vec::new();
    for n in 0..2 {
        at_work(&server, n * 2_000);
        moments.push(moment(&server));
        // One that changes no price, and a mistake of an administrator.
        server.publish(&lines(&(n * 50..n * 50 + 60).map(event).collect::<Vec<_>>()));
        settled(&server);
        moments.push(moment(&server));
        let wrong = json!({"prices": [{
            "provider": "openai", "model": "gpt-4o", "effective_from": "2026-02-01T00:00:00Z",
            "input": "0.5", "output": format!("0.{}", n + 1),
        }]});
        let told = server.json("POST", "/v1/prices", &wrong).expect(202)["position"].clone();
        for org in ORGS {
            let told = told.as_str().unwrap();
            server.get(&format!("/v1/orgs/{org}/spend?min_position={told}")).expect(200);
        }
    }
    let made = backups.create(&["--data-dir", data.to_str().unwrap()]);
    server.stop();
    for (n, moment) in moments.iter().enumerate() {
        for (kind, until) in [("time", &moment.time), ("position", &moment.position)] {
            let to = dir.path().join(format!("{kind}-{n}"));
            let report = backups.restored(&made, Some(until), &to);
            assert_eq!(report["positions"], moment.position.as_str(), "{kind} {n}: {report}");
            let server = launch(&to).start();
            assert_same(&answers(&server), &moment.answers);
            server.stop();
            launch(&to).verified();
        }
    }
}

#[test]
fn positions_within_epochs_are_exact_and_moments_that_are_not_there_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let backups = Backups::at(&dir.path().join("backups"));
    // Epochs of many messages.
    let server = launch(&data).set("EPOCH__AGE_MAX", "200ms").set("EPOCH__AGE_MAX_LOADED", "200ms");
    let server = server.start();
    let position = |n: usize| server.publish(&lines(&[event(n)]));
    let positions: Vec<String> = (0..60).map(position).collect();
    settled(&server);
    let made = backups.create(&["--data-dir", data.to_str().unwrap()]);
    server.stop();
    for n in [0, 1, 17, 40, 59] {
        // Everything up to this one, in its shard; nothing of it is lost or added.
        let to = dir.path().join(format!("to-{n}"));
        let report = backups.restored(&made, Some(&positions[n]), &to);
        let (shard, at) = positions[n].split_once(':').unwrap();
        let named = format!("{shard}:{at}");
        let ends = report["positions"].as_str().unwrap();
        assert!(ends.split(',').any(|end| end == named), "{ends}");
        let server = launch(&to).start();
        settled(&server);
        let org = event(n)["org"].as_str().unwrap().to_owned();
        let of_shard = |m: &usize| positions[*m].split_once(':').unwrap().0 == shard;
        let expected =
            (0..=n).filter(of_shard).filter(|m| event(*m)["org"] == org.as_str()).count();
        let rows = server.rows(&format!("/v1/orgs/{org}/spend?window=all"));
        assert_eq!(rows[0]["events"], expected, "{rows:?}");
        server.stop();
        launch(&to).verified();
    }
    let refused = |until: &str| {
        let to = dir.path().join("none");
        let command = ["restore", "--data-dir", to.to_str().unwrap(), "--until", until];
        let (code, _, err) = backups.ran(&command);
        assert!(!to.exists(), "{until}");
        (code, err)
    };
    for (until, code, said) in [
        ("2020-01-01T00:00:00Z", 1, "there was no deployment yet"),
        ("2999-01-01T00:00:00Z", 1, "choose a later backup"),
        ("7:1", 1, "there is no shard 7"),
        ("0:100000", 1, "not 100000"),
        ("c:0", 1, "there was no deployment yet"),
        ("never", 2, "must be a time"),
    ] {
        let (found, err) = refused(until);
        assert!(found == code && err.contains(said), "{until}: {found} {err}");
    }
}
