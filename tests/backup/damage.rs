//! Stores that are damaged, incomplete, locked or busy, and targets that are not empty.

use std::path::{Path, PathBuf};

use super::support::busy::{answers, assert_same, at_work, declare_view, settled};
use super::support::{files_below, ran, run};
use super::{Backups, launch};

/// A backed up deployment that is stopped.
fn deployment(dir: &Path) -> (PathBuf, Backups) {
    let data = dir.join("data");
    let backups = Backups::at(&dir.join("backups"));
    let server = launch(&data).start();
    declare_view(&server);
    at_work(&server, 0);
    settled(&server);
    server.stop();
    (data, backups)
}

#[test]
fn damage_of_every_kind_is_told_and_nothing_of_it_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let (data, backups) = deployment(dir.path());
    let from = ["--data-dir", data.to_str().unwrap()];
    let made = backups.create(&from);
    let store = dir.path().join("backups");
    let segments = files_below(&store.join("segment"));
    assert!(segments.len() >= 5);
    for (n, segment) in segments.iter().enumerate() {
        let sound = std::fs::read(segment).unwrap();
        match n % 3 {
            0 => std::fs::remove_file(segment).unwrap(),
            1 => std::fs::write(segment, &sound[..sound.len() / 2]).unwrap(),
            _ => {
                let mut bytes = sound.clone();
                let middle = bytes.len() / 2;
                bytes[middle] ^= 0x10;
                std::fs::write(segment, bytes).unwrap();
            }
        }
        let (code, report, _) = backups.ran(&["verify"]);
        assert_eq!((code, &report["sound"]), (4, &false.into()), "{report}");
        let problems = report["problems"].as_array().unwrap();
        let name = segment.file_name().unwrap().to_str().unwrap();
        assert!(problems.len() == 1 && problems[0].as_str().unwrap().contains(name), "{report}");
        // In words for people.
        let (code, out, _) = ran(&run(&["backup", "verify", "--store", &backups.url]));
        assert!(code == 4 && out.contains(name), "{code} {out}");
        let to = dir.path().join(format!("to-{n}"));
        let (code, _, err) = backups.ran(&["restore", "--data-dir", to.to_str().unwrap()]);
        assert!(code == 1 && err.contains(name), "{code} {err}");
        std::fs::write(segment, &sound).unwrap();
        // Whatever it had begun is finished by the same command.
        backups.restored(&made, None, &to);
    }
    let manifest = files_below(&store.join("backup")).pop().unwrap();
    let sound = std::fs::read(&manifest).unwrap();
    std::fs::write(&manifest, &sound[..sound.len() - 9]).unwrap();
    let (code, listed, _) = backups.ran(&["list"]);
    assert!(code == 4 && listed["backups"][0]["problem"].as_str().unwrap().contains("damaged"));
    let (code, out, _) = ran(&run(&["backup", "verify", "--store", &backups.url]));
    assert!(code == 4 && out.contains("damaged"), "{code} {out}");
    // A new one writes only its manifest.
    std::fs::remove_file(&manifest).unwrap();
    let made = backups.done(&[&["create"], &from[..]].concat());
    assert_eq!(made["segments_written"], 0, "{made}");
}

#[test]
fn a_restore_that_broke_off_is_not_served_and_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let (data, backups) = deployment(dir.path());
    let made = backups.create(&["--data-dir", data.to_str().unwrap()]);
    let to = dir.path().join("to");
    // A disk that is full in the middle.
    let output = std::process::Command::new("bash")
        .args(["-c", "trap '' XFSZ; ulimit -f 60; exec \"$@\"", "meterr", super::support::METERR])
        .args(["backup", "restore", "--store", &backups.url, "--data-dir", to.to_str().unwrap()])
        .output()
        .unwrap();
    let (code, _, err) = ran(&output);
    assert!(code == 1 && err.contains("stopped after a failed write"), "{code} {err}");
    let (status, log) = launch(&to).spawn().err().unwrap();
    assert!(!status.success() && log.contains("meterr backup restore"), "{log}");
    let (code, _, err) = backups.ran(&["create", "--data-dir", to.to_str().unwrap()]);
    assert!(code == 1 && err.contains("was not finished"), "{code} {err}");
    // Another moment is another restore.
    let (code, _, err) =
        backups.ran(&["restore", "--data-dir", to.to_str().unwrap(), "--until", "0:1"]);
    assert!(code == 1 && err.contains("holds another log"), "{code} {err}");
    let report = backups.restored(&made, None, &to);
    assert!(report["copied"].as_u64() < report["records"].as_u64(), "{report}");
    let before = launch(&data).start();
    let server = launch(&to).start();
    assert_same(&answers(&server), &answers(&before));
}

#[test]
fn a_place_with_something_in_it_is_left_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let (data, backups) = deployment(dir.path());
    backups.create(&["--data-dir", data.to_str().unwrap()]);
    let (code, _, err) = backups.ran(&["restore", "--data-dir", data.to_str().unwrap()]);
    assert!(code == 1 && err.contains("is not empty"), "{code} {err}");
    std::fs::remove_dir_all(data.join("checkpoints")).unwrap();
    let (code, _, err) = backups.ran(&["restore", "--data-dir", data.to_str().unwrap()]);
    assert!(code == 1 && err.contains("holds another log"), "{code} {err}");
    launch(&data).verified();
    let server = launch(&data).start();
    let (code, _, err) = backups.ran(&["restore", "--data-dir", data.to_str().unwrap()]);
    assert!(code == 1 && err.contains("is not empty"), "{code} {err}");
    server.stop();

    let none = dir.path().join("none");
    let (code, _, err) = backups.ran(&["create", "--data-dir", none.to_str().unwrap()]);
    assert!(code == 1 && err.contains("there is no data directory"), "{code} {err}");
    assert!(!none.exists());
    let (code, _, err) = backups.ran(&["restore", "2020", "--data-dir", none.to_str().unwrap()]);
    assert!(code == 1 && err.contains("has no backup \"2020\""), "{code} {err}");
    let (code, _, err) = ran(&run(&["backup", "list"]));
    assert!(code == 1 && err.contains("no backup store is named"), "{code} {err}");
}

#[test]
fn only_the_key_opens_what_was_encrypted() {
    let dir = tempfile::tempdir().unwrap();
    let (data, mut backups) = deployment(dir.path());
    let key = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        Some(path.to_str().unwrap().to_owned())
    };
    backups.key = key("right", &"1f".repeat(32));
    let made = backups.create(&["--data-dir", data.to_str().unwrap()]);
    for path in files_below(&dir.path().join("backups")) {
        let bytes = std::fs::read(&path).unwrap();
        for text in [&b"acme"[..], b"USAGE", b"gpt-4o"] {
            assert!(!bytes.windows(text.len()).any(|at| at == text), "{}", path.display());
        }
    }
    let to = dir.path().join("to");
    let wrong = [
        (None, "is encrypted; give its key"),
        (key("wrong", &"2f".repeat(32)), "encrypted with another key"),
        (key("short", "1f1f"), "does not hold a key"),
        (Some("/no/such/key".to_owned()), "cannot read the key"),
    ];
    let right = backups.key.clone();
    for (key, said) in wrong {
        backups.key = key;
        let (code, _, err) = backups.ran(&["restore", "--data-dir", to.to_str().unwrap()]);
        assert!(code == 1 && err.contains(said) && !err.contains("1f1f"), "{code} {err}");
        assert!(!to.exists());
    }
    backups.key = right;
    backups.restored(&made, None, &to);
}

#[test]
fn old_backups_go_and_the_newest_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (data, backups) = deployment(dir.path());
    let from = ["--data-dir", data.to_str().unwrap()];
    let mut made = Vec::new();
    for n in 1..4 {
        let server = launch(&data).start();
        at_work(&server, n * 2_000);
        made.push(backups.create(&from));
        server.stop();
    }
    let pruned = backups.done(&["prune", "--keep", "1h"]);
    assert_eq!(pruned["backups"].as_array().unwrap().len(), 0, "{pruned}");
    let pruned = backups.done(&["prune", "--keep", "0s"]);
    assert_eq!(pruned["backups"].as_array().unwrap().len(), 2, "{pruned}");
    assert!(pruned["segments"].as_u64().unwrap() > 0, "{pruned}");
    backups.verified(&made[2]);
    let (code, _, err) = backups.ran(&["verify", &made[0]]);
    assert!(code == 1 && err.contains("has no backup"), "{code} {err}");
}
