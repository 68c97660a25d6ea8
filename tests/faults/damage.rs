//! Files damaged at random: bytes flipped, blocks zeroed, ends cut off, files gone. Whatever the
//! place, `verify` and `serve` show right figures or say what is wrong.
//!
//! `METERR_DAMAGE_SEEDS` sets how many damages are tried (40 by default), `METERR_DAMAGE_SEED` where
//! the seeds begin.

use std::path::Path;

use meterr_operators::rng::Rng;
use serde_json::{Value, json};

use crate::support::{Launch, copy_dir, files_below, number_from_env, ran};
use crate::{ORGS, Totals, batch, launch, totals_of, until_settled};

/// A data directory with several segments, checkpoints with deltas, a price and a zone of its own.
fn grown(dir: &Path) -> Totals {
    let mut totals = Totals::new();
    let launch = launch(dir).set("CHECKPOINT__INTERVAL", "1s");
    for run in 0..3 {
        let server = launch.start();
        for n in 0..8 {
            let from = run * 4_000 + n * 500;
            server.publish(&batch(from..from + 500, &mut totals));
        }
        if run == 1 {
            // Changes figures if it is lost: the price of before would be another.
            let price = json!({ "prices": [{
                "provider": "openai", "model": "gpt-4o-mini",
                "input": "0.30", "cached_input": "0.15", "output": "1.20",
            }] });
            server.json("POST", "/v1/prices", &price).expect(202);
        }
        if run == 2 {
            server.kill();
            continue;
        }
        server.stop();
    }
    launch.start().stop();
    for total in totals.values_mut() {
        total.1 *= 2;
    }
    totals
}

/// Damages one file; returns what was done.
fn damage(dir: &Path, rng: &mut Rng) -> String {
    let files: Vec<_> = files_below(dir)
        .into_iter()
        .filter(|path| std::fs::metadata(path).unwrap().len() > 0)
        .filter(|path| !path.ends_with("meterr.lock"))
        .collect();
    let path = rng.pick(&files);
    let name = path.strip_prefix(dir).unwrap().display();
    let mut bytes = std::fs::read(path).unwrap();
    let at = rng.below(bytes.len() as u64) as usize;
    let what = match rng.below(10) {
        0 => {
            bytes.truncate(at);
            format!("{name} cut at {at}")
        }
        1 => {
            let end = bytes.len().min(at + 4_096);
            bytes[at..end].fill(0);
            format!("{name} zeroed at {at}..{end}")
        }
        2 => {
            std::fs::remove_file(path).unwrap();
            return format!("{name} removed");
        }
        _ => {
            let bit = rng.below(8);
            bytes[at] ^= 1 << bit;
            format!("{name} bit {bit} of byte {at} flipped")
        }
    };
    std::fs::write(path, bytes).unwrap();
    what
}

/// Runs `verify`; whether it says that all is right.
fn verify(launch: &Launch, what: &str) -> bool {
    let (code, out, err) = ran(&launch.run(&["verify", "--json"]));
    assert!(!err.contains("panicked"), "{what}: {err}");
    match code {
        0 => {
            let report: Value = serde_json::from_str(&out).unwrap();
            assert_eq!(report["differences_total"], 0, "{what}: {report}");
            true
        }
        1 => {
            assert!(err.contains("error: "), "{what}: {err}");
            false
        }
        // Rows differ, and it says so.
        4 => false,
        other => panic!("{what}: exit code {other}: {err}"),
    }
}

/// Starts the server; every org's figures are right or refused. Returns whether all are right.
fn serve(launch: &Launch, totals: &Totals, what: &str) -> bool {
    let server = match launch.spawn() {
        Ok(server) => server,
        Err((status, log)) => {
            assert_eq!(status.code(), Some(1), "{what}: {log}");
            assert!(log.contains("error: ") && !log.contains("panicked"), "{what}: {log}");
            return false;
        }
    };
    let stopped = server.until("shards that are live or stopped", || {
        let answer = server.get("/v1/shards").expect(200);
        let shards = answer["shards"].as_array().unwrap();
        let of = |state: &str| shards.iter().filter(|shard| shard["state"] == state).count();
        (of("live") + of("stopped") == shards.len()).then(|| of("stopped"))
    });
    until_settled(&server);
    let mut refused = 0;
    for org in ORGS {
        match totals_of(&server, org) {
            Some(found) => assert_eq!(found, totals[org], "{what}: {org}: {}", server.log()),
            None => refused += 1,
        }
    }
    let log = server.log();
    assert!(!log.contains("panicked"), "{what}: {log}");
    assert!(stopped == 0 || log.contains("shard stopped"), "{what}: {log}");
    assert_eq!(
        refused > 0,
        stopped > 0,
        "{what}: {stopped} shards stopped, {refused} orgs refused"
    );
    refused == 0
}

#[test]
fn damaged_files_never_lead_to_wrong_figures() {
    let seeds = number_from_env("METERR_DAMAGE_SEEDS", 40);
    let first = number_from_env("METERR_DAMAGE_SEED", 1);
    let sound = tempfile::tempdir().unwrap();
    let totals = grown(sound.path());
    assert!(verify(&launch(sound.path()), "undamaged"));
    let (mut right, mut refused) = (0, 0);
    for seed in first..first + seeds {
        let dir = tempfile::tempdir().unwrap();
        copy_dir(sound.path(), dir.path());
        let what = damage(dir.path(), &mut Rng::new(seed));
        let what = format!("METERR_DAMAGE_SEED={seed}: {what}");
        println!("{what}");
        let launch = launch(dir.path());
        verify(&launch, &what);
        match serve(&launch, &totals, &what) {
            true => right += 1,
            false => refused += 1,
        }
    }
    println!("{right} damages were of no consequence, {refused} were refused");
    assert!(right > 0 && (refused > 0 || seeds < 20), "{right} {refused}");
}
