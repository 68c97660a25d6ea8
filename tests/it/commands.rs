//! The commands that talk to a server, and those that look after a stopped one.

use std::io::{BufRead, BufReader};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::support::{meterr, ran, run, run_json};
use crate::{launch, line};

const TIME: &str = "2026-02-03T04:05:06Z";

#[test]
fn publish_says_by_its_exit_code_how_it_went() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(&dir.path().join("data")).start();
    let url = server.url.as_str();
    let file = dir.path().join("events.ndjson");
    let path = file.to_str().unwrap();
    std::fs::write(&file, line("e1", "acme", "u1", TIME)).unwrap();
    let answer = run_json(&["publish", path, "--json", "--url", url]);
    assert_eq!((&answer["accepted"], &answer["rejected_total"]), (&json!(1), &json!(0)));
    let position = answer["position"].as_str().unwrap();
    let shown = run_json(&[
        "query",
        "acme",
        "--window",
        "all",
        "--min-position",
        position,
        "--json",
        "--url",
        url,
    ]);
    assert_eq!(shown["rows"][0]["cost"], "0.15");

    std::fs::write(&file, format!("{}no json\n", line("e2", "acme", "u1", TIME))).unwrap();
    let rejected = dir.path().join("rejected");
    let (code, out, err) = ran(&run(&[
        "publish",
        path,
        "--rejected-to",
        rejected.to_str().unwrap(),
        "--json",
        "--url",
        url,
    ]));
    assert_eq!(code, 3, "{err}");
    let answer: Value = serde_json::from_str(&out).unwrap();
    assert_eq!((&answer["accepted"], &answer["rejected_total"]), (&json!(1), &json!(1)));
    assert_eq!(std::fs::read_to_string(rejected).unwrap(), "no json\n");

    let url = url.to_owned();
    server.stop();
    let (code, _, err) = ran(&run(&["publish", path, "--attempts", "1", "--url", &url]));
    assert_eq!(code, 5, "{err}");
    assert!(err.contains("cannot reach"), "{err}");
    let (code, ..) = ran(&run(&["publish", "no-such-file", "--url", &url]));
    assert_eq!(code, 1);
    let (code, ..) = ran(&run(&["publish"]));
    assert_eq!(code, 2);
}

#[test]
fn results_come_as_tables_and_as_json() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let url = server.url.as_str();
    let position = server.publish(&line("e1", "acme", "u1", TIME));
    server.get(&format!("/v1/orgs/acme/spend?min_position={position}")).expect(200);
    for (command, part) in [
        (vec!["query", "acme", "--window", "month", "--by", "user"], "u1"),
        (vec!["query", "acme", "--user", "u1", "--window", "hour"], "0.15"),
        (vec!["top", "--window", "all"], "acme"),
        (vec!["top", "--by", "model", "--window", "month", "--at", "2026-02-03"], "gpt-4o-mini"),
        (vec!["status"], "live"),
        (vec!["prices", "list"], "gpt-4o-mini"),
        (vec!["watch", "acme", "--events", "1"], "0.15"),
    ] {
        let mut args = command.clone();
        args.extend(["--url", url]);
        let (code, out, err) = ran(&run(&args));
        assert_eq!(code, 0, "{command:?}: {err}");
        assert!(out.contains(part), "{command:?}: {out}");
        args.push("--json");
        let value = run_json(&args);
        assert!(value.to_string().contains(part), "{command:?}: {value}");
    }
    let (code, out, _) = ran(&run(&["unpriced", "acme", "--url", url]));
    assert_eq!(code, 0, "{out}");
}

#[test]
fn watch_follows_and_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let server = launch(dir.path()).start();
    let port = server.url.rsplit(':').next().unwrap().to_owned();
    server.publish(&line("e1", "acme", "u1", TIME));
    let mut watch = meterr(&["watch", "acme", "--events", "3", "--json", "--url", &server.url])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    let mut next = || -> Value { serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap() };
    let first = next();
    assert_eq!(first["event"], "snapshot");
    let already = first["data"]["views"]["org_all"][0]["events"] == 1;
    if !already {
        // The snapshot was taken before the first commit.
        assert_eq!(next()["data"]["views"]["org_all"][0]["events"], 1);
    }
    server.publish(&line("e2", "acme", "u1", TIME));
    assert_eq!(next()["data"]["views"]["org_all"][0]["events"], 2);
    if already {
        server.kill();
        let server =
            launch(dir.path()).argument("--http").argument(&format!("127.0.0.1:{port}")).spawn();
        // The flag is given twice; the last one must count, or the port was taken by somebody else.
        if let Ok(server) = server {
            server.until_ready();
            server.publish(&line("e3", "acme", "u1", TIME));
            assert_eq!(next()["data"]["views"]["org_all"][0]["events"], 3);
        }
    }
    drop(watch.kill());
    watch.wait().unwrap();
}

#[test]
fn checkpoints_are_listed_verified_exported_and_imported() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let launch = launch(&data);
    let server = launch.start();
    let lines: String =
        (0..300).map(|n| line(&format!("e{n}"), "acme", &format!("u{n}"), TIME)).collect();
    let position = server.publish(&lines);
    let before =
        server.rows(&format!("/v1/orgs/acme/spend?window=day&by=user&min_position={position}"));
    server.stop();
    let shard = position.split_once(':').unwrap().0;
    let shard_number: u64 = shard.parse().unwrap();
    let json_of = |args: &[&str]| -> Value {
        let (code, out, err) = ran(&launch.run(args));
        assert_eq!(code, 0, "{args:?}: {out}{err}");
        serde_json::from_str(&out).unwrap()
    };
    let list = json_of(&["checkpoint", "list", "--json"]);
    let of_shard = |list: &Value| -> usize {
        let rows = list["checkpoints"].as_array().unwrap();
        rows.iter().filter(|row| row["shard"].as_u64() == Some(shard_number)).count()
    };
    assert!(of_shard(&list) > 0, "{list}");
    assert_eq!(json_of(&["checkpoint", "verify", "--json"])["sound"], true);
    let (code, out, _) = ran(&launch.run(&["checkpoint", "list"]));
    assert!(code == 0 && out.contains("base"), "{out}");

    let file = dir.path().join("shard.checkpoint");
    let file = file.to_str().unwrap();
    json_of(&["checkpoint", "export", "--shard", shard, file, "--json"]);
    // A file that exists is not overwritten.
    let (code, ..) = ran(&launch.run(&["checkpoint", "export", "--shard", shard, file]));
    assert_eq!(code, 1);
    // Into a directory that lost its checkpoints.
    std::fs::remove_dir_all(data.join("checkpoints")).unwrap();
    json_of(&["checkpoint", "import", "--shard", shard, file, "--json"]);
    assert!(of_shard(&json_of(&["checkpoint", "list", "--json"])) > 0);
    let server = launch.start();
    let after =
        server.rows(&format!("/v1/orgs/acme/spend?window=day&by=user&min_position={position}"));
    assert_eq!(after, before);
    server.stop();
    launch.verified();
    // A damaged file is refused.
    let mut bytes = std::fs::read(file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(file, bytes).unwrap();
    let (code, _, err) = ran(&launch.run(&["checkpoint", "import", "--shard", shard, file]));
    assert_eq!(code, 1, "{err}");
}

#[test]
fn lost_checkpoints_are_rebuilt_from_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let launch = launch(dir.path());
    let server = launch.start();
    let position = server.publish(&line("e1", "acme", "u1", TIME));
    server.stop();
    std::fs::remove_dir_all(dir.path().join("checkpoints")).unwrap();
    let server = launch.start();
    let rows = server.rows(&format!("/v1/orgs/acme/spend?window=all&min_position={position}"));
    assert_eq!(rows[0]["events"], 1);
}

#[test]
fn manual_completions_and_version_come_without_a_server() {
    let dir = tempfile::tempdir().unwrap();
    let (code, out, _) = ran(&run(&["completions", "bash"]));
    assert!(code == 0 && out.contains("meterr"), "{out}");
    let (code, _, err) = ran(&run(&["man", dir.path().to_str().unwrap()]));
    assert_eq!(code, 0, "{err}");
    assert!(dir.path().join("meterr.1").exists());
    let (code, out, _) = ran(&run(&["--version"]));
    assert_eq!((code, out.trim()), (0, concat!("meterr ", env!("CARGO_PKG_VERSION"))));
    let (code, out, _) = ran(&run(&["config", "print", "--json"]));
    assert_eq!(code, 0);
    assert_eq!(serde_json::from_str::<Value>(&out).unwrap()["node"]["shards"], 16);
}
