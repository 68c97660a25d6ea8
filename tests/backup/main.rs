//! `meterr backup` with the real binary: while events stream in, into files and NATS, to earlier
//! moments, with damage and with keys. What is restored is recomputed from its logs (`meterr verify`)
//! and answers every question as the deployment did at that moment.

#![allow(clippy::unwrap_used)]

mod damage;
mod moments;
#[path = "../support/nats.rs"]
mod nats;
mod running;
mod schedule;
#[path = "../support/mod.rs"]
mod support;

use std::path::Path;

use serde_json::Value;
use support::{Launch, ran, run};

/// How to start a server of three shards.
fn launch(dir: &Path) -> Launch {
    Launch::on(dir).set("NODE__SHARDS", "3").set("NODE__WORKERS", "2")
}

fn on_nats(dir: &Path, nats: &nats::NatsServer) -> Launch {
    launch(dir).argument("--nats").argument(&nats.url())
}

/// A store of backups, and a place to name.
struct Backups {
    url: String,
    key: Option<String>,
}

impl Backups {
    fn at(dir: &Path) -> Backups {
        Backups { url: format!("file://{}", dir.display()), key: None }
    }

    /// Runs a command: exit code, JSON, messages.
    fn ran(&self, command: &[&str]) -> (i32, Value, String) {
        let mut args = vec!["backup"];
        args.extend(command);
        args.extend(["--store", &self.url, "--json"]);
        if let Some(key) = &self.key {
            args.extend(["--key-file", key]);
        }
        let (code, out, err) = ran(&run(&args));
        (code, serde_json::from_str(&out).unwrap_or(Value::Null), err)
    }

    /// One that must succeed.
    fn done(&self, command: &[&str]) -> Value {
        let (code, value, err) = self.ran(command);
        assert_eq!(code, 0, "{command:?}: {value} {err}");
        value
    }

    /// Makes a backup; its name.
    fn create(&self, from: &[&str]) -> String {
        let made = self.done(&[&["create"], from].concat());
        made["backup"].as_str().unwrap().to_owned()
    }

    /// Reads it all and recomputes its views.
    fn verified(&self, backup: &str) -> Value {
        let report = self.done(&["verify", backup, "--deep"]);
        assert_eq!(report["sound"], true, "{report}");
        assert_eq!(report["views"]["differences_total"], 0, "{report}");
        report
    }

    /// Restores into a directory, which must verify.
    fn restored(&self, backup: &str, until: Option<&str>, to: &Path) -> Value {
        let mut command = vec!["restore", backup, "--data-dir", to.to_str().unwrap()];
        if let Some(until) = until {
            command.extend(["--until", until]);
        }
        let report = self.done(&command);
        assert_eq!(report["same"], true, "{report}");
        launch(to).verified();
        report
    }
}
