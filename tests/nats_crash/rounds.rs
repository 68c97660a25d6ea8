//! What is done to engines and server, round by round.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use meterr_operators::rng::Rng;
use serde_json::Value;
use tempfile::TempDir;

use crate::SHARDS;
use crate::nats::NatsServer;
use crate::publisher::Sent;
use crate::stage::Stage;
use crate::support::{Launch, PATIENCE, Server, ran};

/// What can happen in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Deed {
    /// The engine is killed.
    Engine,
    /// The engine is killed while it starts.
    EngineEarly,
    /// The server is killed; the engine waits for it.
    Server,
    /// Both are killed, in either order.
    Both,
    /// The server is frozen for a moment.
    ServerFreezes,
    /// The engine is frozen until another has taken over; the server may be killed before it thaws.
    TakeOver,
    /// The server is killed while the engine starts.
    ServerEarly,
    /// The engine is stopped in order.
    EngineStops,
}

/// The rounds.
pub struct Rounds {
    /// How many.
    pub number: u64,
    nats: NatsServer,
    rng: Rng,
    stage: Arc<Stage>,
    sent: Arc<Mutex<Sent>>,
    dirs: [TempDir; 2],
    /// The engine that runs, and in which directory.
    engine: Option<(Server, usize)>,
    done: BTreeMap<Deed, u64>,
    /// Commits of frozen owners that were refused: shards that stopped for it.
    refused: u64,
}

impl Rounds {
    pub fn new(
        nats: NatsServer,
        rng: Rng,
        stage: Arc<Stage>,
        sent: Arc<Mutex<Sent>>,
        number: u64,
    ) -> Rounds {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let done = BTreeMap::new();
        Rounds { number, nats, rng, stage, sent, dirs, engine: None, done, refused: 0 }
    }

    fn launch(&self, dir: usize) -> Launch {
        Launch::on(self.dirs[dir].path())
            .set("NATS__URL", &self.nats.url())
            .set("NATS__MAPPING", "require")
            .set("NODE__SHARDS", &SHARDS.to_string())
            .set("NODE__WORKERS", "2")
            .set("CLUSTER__LEASE", "1s")
            .set("CHECKPOINT__INTERVAL", "1s")
            .set("CHECKPOINT__EVENTS_MAX", "1000")
            .set("TELEMETRY__LOG", "warn")
    }

    fn spawn(&self, dir: usize) -> Server {
        self.launch(dir).spawn().unwrap_or_else(|(status, log)| panic!("{status}: {log}"))
    }

    /// Starts an engine in one of the directories, if none runs.
    pub fn begin(&mut self) {
        if self.engine.is_some() {
            return;
        }
        let dir = self.rng.below(2) as usize;
        let server = self.spawn(dir);
        server.until_ready();
        self.stage.set_url(Some(&server.url));
        self.engine = Some((server, dir));
    }

    /// All rounds.
    pub fn run(&mut self) {
        for round in 0..self.number {
            let deed = match self.rng.below(100) {
                0..25 => Deed::Engine,
                25..35 => Deed::EngineEarly,
                35..55 => Deed::Server,
                55..70 => Deed::Both,
                70..78 => Deed::ServerFreezes,
                78..90 => Deed::TakeOver,
                90..95 => Deed::ServerEarly,
                _ => Deed::EngineStops,
            };
            *self.done.entry(deed).or_default() += 1;
            let began = Instant::now();
            self.round(deed);
            // One line a round: thousands are run by hand, and a failure is looked for among them.
            println!("round {round}: {deed:?} in {} ms", began.elapsed().as_millis());
        }
    }

    fn round(&mut self, deed: Deed) {
        self.allow(2_000);
        match deed {
            Deed::EngineEarly => {
                self.kill_engine();
                let dir = self.rng.below(2) as usize;
                let server = self.spawn(dir);
                // In the middle of restoring and replaying.
                self.pause(0, 60);
                sound(&server.log());
                server.kill();
            }
            Deed::ServerEarly => {
                self.kill_engine();
                self.server_dies_early();
                self.begin();
                self.until_counted();
            }
            Deed::Engine => {
                self.begin();
                self.pause(50, 400);
                self.kill_engine();
            }
            Deed::EngineStops => {
                self.begin();
                self.pause(50, 400);
                let (server, _) = self.engine.take().unwrap();
                self.stage.set_url(None);
                sound(&server.log());
                server.stop();
            }
            Deed::Server => {
                self.begin();
                self.pause(50, 300);
                self.nats.kill();
                self.pause(0, 150);
                self.nats.restart();
                self.until_counted();
            }
            Deed::ServerFreezes => {
                self.begin();
                self.pause(50, 300);
                self.nats.pause();
                self.pause(0, 300);
                self.nats.resume();
                self.until_counted();
            }
            Deed::Both => {
                self.begin();
                self.pause(50, 400);
                if self.rng.percent(50) {
                    self.kill_engine();
                    self.pause(0, 5);
                    self.nats.kill();
                } else {
                    self.nats.kill();
                    self.pause(0, 5);
                    self.kill_engine();
                }
                self.pause(0, 50);
                self.nats.restart();
            }
            Deed::TakeOver => {
                self.begin();
                self.pause(50, 300);
                self.take_over();
            }
        }
    }

    /// Starts an engine and kills the server meanwhile. The engine waits, or says that it cannot
    /// connect.
    fn server_dies_early(&mut self) {
        let dir = self.rng.below(2) as usize;
        let launch = self.launch(dir);
        let starting = std::thread::spawn(move || launch.spawn());
        self.pause(0, 120);
        self.nats.kill();
        self.pause(0, 100);
        self.nats.restart();
        match starting.join().unwrap() {
            Ok(server) => {
                server.until_ready();
                self.stage.set_url(Some(&server.url));
                self.engine = Some((server, dir));
            }
            Err((status, log)) => {
                let right = status.code().is_some() && log.contains("cannot connect to NATS");
                assert!(right, "{status}: {log}");
            }
        }
    }

    /// Freezes the engine, lets another take over when the lease is over, thaws it, and sees it let go.
    fn take_over(&mut self) {
        let server_dies = self.rng.percent(30);
        let (frozen, dir) = self.engine.take().unwrap();
        let stage = self.stage.clone();
        let changing = stage.changing.lock().unwrap();
        frozen.signal("STOP");
        self.stage.set_url(None);
        let next = self.spawn(1 - dir);
        next.until("the new engine owns all shards", || {
            let shards = next.try_get("/v1/shards").ok()?;
            let shards = shards.expect(200)["shards"].as_array()?.clone();
            let own = |shard: &Value| shard["elsewhere"] != true && shard["state"] == "live";
            (!shards.is_empty() && shards.iter().all(own)).then_some(())
        });
        self.stage.set_url(Some(&next.url));
        drop(changing);
        self.engine = Some((next, 1 - dir));
        self.pause(0, 200);
        if server_dies {
            // What the frozen engine had in hand is sent over a new connection, late.
            self.nats.kill();
            self.pause(0, 50);
            self.nats.restart();
        }
        frozen.signal("CONT");
        let sent = self.sent.clone();
        self.refused += frozen.until("the old engine has let go of all shards", || {
            // Each shard needs something to commit, to be refused.
            let mut sent = sent.lock().unwrap();
            sent.allowed = sent.lines + 500;
            drop(sent);
            let shards = frozen.try_get("/v1/shards").ok()?;
            let shards = shards.expect(200)["shards"].as_array()?.clone();
            let lost = |shard: &Value| shard["elsewhere"] == true;
            shards.iter().all(lost).then_some(shards.len() as u64)
        });
        frozen.kill();
        self.until_counted();
    }

    fn kill_engine(&mut self) {
        if let Some((server, _)) = self.engine.take() {
            self.stage.set_url(None);
            sound(&server.log());
            server.kill();
        }
    }

    fn pause(&mut self, low_ms: u64, high_ms: u64) {
        std::thread::sleep(Duration::from_micros(
            1_000 * low_ms + self.rng.below(1_000 * (high_ms - low_ms)),
        ));
    }

    /// Lets publishers send so many lines more, whatever was left of before. Returns how many are
    /// acknowledged.
    fn allow(&self, lines: u64) -> u64 {
        let mut sent = self.sent.lock().unwrap();
        sent.allowed = sent.lines + lines;
        sent.lines
    }

    /// Waits until something is acknowledged and counted that was not there before.
    fn until_counted(&mut self) {
        let stage = self.stage.clone();
        let _changing = stage.changing.lock().unwrap();
        let before = self.allow(200);
        let began = Instant::now();
        while self.sent.lock().unwrap().lines == before {
            assert!(began.elapsed() < PATIENCE, "nothing is acknowledged: {}", self.nats.log());
            std::thread::sleep(Duration::from_millis(2));
        }
        let position = self.sent.lock().unwrap().position();
        let (server, _) = self.engine.as_ref().unwrap();
        let path = format!("/v1/top?by=org&window=all&n=1&min_position={position}");
        loop {
            let answer = server.get(&path);
            if answer.status == 200 {
                break;
            }
            // 504: not counted yet.
            let (shards, log) = (server.get("/v1/shards").text, server.log());
            let going = answer.status == 504 && began.elapsed() < PATIENCE;
            assert!(going, "{position} is not counted: {answer:?}: {shards}: {log}");
        }
        sound(&server.log());
    }

    /// The engine for the rest of the test.
    pub fn end(&mut self) -> Server {
        self.begin();
        self.engine.take().unwrap().0
    }

    /// What was done.
    pub fn told(&self) -> String {
        format!("{:?}, {} shards of old owners let go of", self.done, self.refused)
    }

    /// Verifies the logs against the outputs; both must be right. Returns the report.
    pub fn verified(&self) -> Value {
        let (code, out, err) = ran(&self.launch(0).run(&["verify", "--json"]));
        assert_eq!(code, 0, "{out}{err}");
        let report: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(report["differences_total"], 0, "{report}");
        report
    }
}

/// An engine must have nothing to complain of but that the server was away.
fn sound(log: &str) {
    for line in log.lines() {
        assert!(!line.contains("ERROR") && !line.contains("panicked"), "{line}");
    }
}
