//! The nodes of the cluster under test, each with a data directory, a name and a network of its own.

use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;
use tempfile::TempDir;

use crate::SHARDS;
use crate::proxy::Network;
use crate::support::{Launch, PATIENCE, Server};

/// Time after which a silent node is taken to be dead.
pub const LEASE: Duration = Duration::from_secs(2);

/// One node.
pub struct Node {
    pub name: String,
    pub network: Network,
    dir: TempDir,
    pub server: Option<Server>,
    pub frozen: bool,
}

impl Node {
    /// A node that does not run yet.
    pub fn new(name: &str, servers: &[u16]) -> Node {
        let dir = tempfile::tempdir().unwrap();
        let network = Network::to(servers);
        Node { name: name.to_owned(), network, dir, server: None, frozen: false }
    }

    pub fn launch(&self) -> Launch {
        Launch::on(self.dir.path())
            .set("NATS__URL", &self.network.url())
            .set("NATS__REPLICAS", "3")
            .set("NATS__MAPPING", "require")
            .set("NODE__SHARDS", &SHARDS.to_string())
            .set("NODE__WORKERS", "2")
            .set("CLUSTER__NODE", &self.name)
            .set("CLUSTER__LEASE", &format!("{}s", LEASE.as_secs()))
            .set("CLUSTER__SETTLE", "1s")
            .set("CHECKPOINT__INTERVAL", "1s")
            .set("CHECKPOINT__EVENTS_MAX", "1000")
            .set("TELEMETRY__LOG", "warn,meterr_engine::cluster=info")
    }

    /// Starts it. A start that fails since the servers are away is tried again.
    pub fn start(&mut self) {
        let began = Instant::now();
        loop {
            match self.launch().spawn() {
                Ok(server) => {
                    self.server = Some(server);
                    return;
                }
                Err((status, log)) => {
                    let away = log.contains("cannot connect to NATS")
                        || log.contains("not available")
                        || log.contains("cannot be part of the cluster");
                    assert!(away && began.elapsed() < PATIENCE, "{}: {status}: {log}", self.name);
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// Whether it runs and is not frozen.
    pub fn works(&self) -> bool {
        self.server.is_some() && !self.frozen
    }

    pub fn kill(&mut self) {
        if let Some(server) = self.server.take() {
            sound(&self.name, &server.log());
            server.kill();
        }
        self.frozen = false;
    }

    /// Stops it in order.
    pub fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            sound(&self.name, &server.log());
            server.stop();
        }
    }

    pub fn freeze(&mut self) {
        self.server.as_ref().unwrap().signal("STOP");
        self.frozen = true;
    }

    pub fn thaw(&mut self) {
        if std::mem::take(&mut self.frozen) {
            self.server.as_ref().unwrap().signal("CONT");
        }
    }

    /// Forgets everything that is not in the logs.
    pub fn wipe(&mut self) {
        assert!(self.server.is_none());
        self.dir = tempfile::tempdir().unwrap();
    }

    /// Damages the files of its checkpoints in the middle.
    pub fn damage(&self) {
        assert!(self.server.is_none());
        damage(&self.dir.path().join("checkpoints"));
    }

    /// The shards it says that it owns, as far as it answers.
    pub fn shards(&self) -> Option<Vec<Value>> {
        let answer = self.server.as_ref()?.try_get("/v1/shards").ok()?;
        (answer.status == 200).then(|| answer.json()["shards"].as_array().unwrap().clone())
    }
}

fn damage(dir: &Path) {
    let Ok(entries) = std::fs::read_dir(dir) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            damage(&path);
        } else if let Ok(mut bytes) = std::fs::read(&path)
            && bytes.len() > 64
        {
            let middle = bytes.len() / 2;
            bytes[middle..middle + 16].fill(0xa5);
            std::fs::write(&path, bytes).unwrap();
        }
    }
}

/// A node must have nothing to complain of but what was done to it.
pub fn sound(name: &str, log: &str) {
    for line in log.lines() {
        // What was damaged on purpose.
        let damaged = line.contains("checkpoint store") || line.contains("moved aside");
        // The client library says so of a server that is gone.
        let gone = line.contains("async_nats::connector");
        assert!(!line.contains("panicked"), "{name}: {line}");
        assert!(!line.contains("ERROR") || damaged || gone, "{name}: {line}");
    }
}
