//! What is done to nodes, servers and the network between them, round by round.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use meterr_operators::rng::Rng;
use serde_json::Value;

use crate::nats::Cluster;
use crate::nodes::{LEASE, Node, sound};
use crate::publisher::Sent;
use crate::stage::Stage;
use crate::support::{PATIENCE, Server, ran};

/// Nodes that may run at once.
const NODES_MAX: usize = 4;
/// Servers.
pub const SERVERS: usize = 3;

/// What can happen in a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Deed {
    /// A node is killed; another one, or the same, comes back with its directory, without it, or with a
    /// damaged one.
    NodeDies,
    /// Two nodes are killed at once.
    TwoNodesDie,
    /// A node is frozen for less than the lease.
    NodePauses,
    /// A node is frozen until others own its shards, and thaws.
    NodeFreezes,
    /// A node is cut off from the servers until others own its shards, and comes back.
    NodeCutOff,
    /// What a node says and hears is slow.
    NodeSlow,
    /// A node is stopped in order and started again.
    NodeStops,
    /// A node more comes, or one goes.
    NodeJoins,
    /// An operator moves a shard.
    Move,
    /// An operator drains a node, and takes that back.
    Drain,
    /// A server is killed and comes back.
    ServerDies,
    /// A server is frozen for a moment.
    ServerPauses,
    /// All servers are killed at once and come back.
    ServersDie,
    /// A server and a node are killed at once.
    BothDie,
}

/// The rounds.
pub struct Rounds {
    pub number: u64,
    servers: Cluster,
    ports: Vec<u16>,
    rng: Rng,
    stage: Arc<Stage>,
    sent: Arc<Mutex<Sent>>,
    nodes: Vec<Node>,
    named: usize,
    done: BTreeMap<Deed, u64>,
    /// Times from a death to the moment at which everything was counted again.
    pub recoveries: Vec<Duration>,
}

impl Rounds {
    pub fn new(
        mut servers: Cluster,
        rng: Rng,
        stage: Arc<Stage>,
        sent: Arc<Mutex<Sent>>,
        number: u64,
    ) -> Rounds {
        let ports = (0..SERVERS).map(|n| servers.server(n).port()).collect();
        Rounds {
            number,
            servers,
            ports,
            rng,
            stage,
            sent,
            nodes: Vec::new(),
            named: 0,
            done: BTreeMap::new(),
            recoveries: Vec::new(),
        }
    }

    /// Starts three nodes; returns when every shard is owned.
    pub fn begin(&mut self) {
        for _ in 0..3 {
            self.join();
        }
        self.nodes[0].server.as_ref().unwrap().until_ready();
        self.tell();
    }

    fn join(&mut self) {
        self.named += 1;
        let mut node = Node::new(&format!("node-{}", self.named), &self.ports);
        node.start();
        self.nodes.push(node);
    }

    /// A node that works.
    fn any(&mut self) -> usize {
        let working: Vec<usize> =
            (0..self.nodes.len()).filter(|n| self.nodes[*n].works()).collect();
        *self.rng.pick(&working)
    }

    /// Tells the administrator where a node is.
    fn tell(&mut self) {
        let node = self.any();
        self.stage.set_url(Some(&self.nodes[node].server.as_ref().unwrap().url));
    }

    /// All rounds.
    pub fn run(&mut self) {
        for round in 0..self.number {
            let deed = match self.rng.below(100) {
                0..14 => Deed::NodeDies,
                14..19 => Deed::TwoNodesDie,
                19..26 => Deed::NodePauses,
                26..38 => Deed::NodeFreezes,
                38..48 => Deed::NodeCutOff,
                48..53 => Deed::NodeSlow,
                53..61 => Deed::NodeStops,
                61..67 => Deed::NodeJoins,
                67..75 => Deed::Move,
                75..80 => Deed::Drain,
                80..88 => Deed::ServerDies,
                88..93 => Deed::ServerPauses,
                93..96 => Deed::ServersDie,
                _ => Deed::BothDie,
            };
            *self.done.entry(deed).or_default() += 1;
            let began = Instant::now();
            self.round(deed);
            // One line a round: thousands are run by hand, and a failure is looked for among them.
            println!("round {round}: {deed:?} in {} ms", began.elapsed().as_millis());
        }
    }

    fn round(&mut self, deed: Deed) {
        self.allow(1_000);
        self.pause(20, 300);
        let stage = self.stage.clone();
        match deed {
            Deed::NodeDies | Deed::TwoNodesDie | Deed::BothDie => {
                // What was asked of a node that dies may still happen: nothing may be asked meanwhile.
                let changing = stage.changing.lock().unwrap();
                let victims = if deed == Deed::TwoNodesDie { 2 } else { 1 };
                let mut dead = Vec::new();
                let died = Instant::now();
                for _ in 0..victims.min(self.working() - 1) {
                    let node = self.any();
                    self.nodes[node].kill();
                    dead.push(node);
                }
                if deed == Deed::BothDie {
                    let server = self.rng.below(SERVERS as u64) as usize;
                    self.servers.server(server).kill();
                    self.pause(0, 2_000);
                    self.servers.server(server).restart();
                }
                self.tell();
                drop(changing);
                if self.rng.percent(50) {
                    self.until_counted();
                    if deed == Deed::NodeDies {
                        self.recoveries.push(died.elapsed());
                    }
                }
                for node in dead {
                    match self.rng.below(4) {
                        0 => self.nodes[node].wipe(),
                        1 => self.nodes[node].damage(),
                        _ => {}
                    }
                    self.nodes[node].start();
                }
            }
            Deed::NodePauses => {
                let node = self.any();
                self.nodes[node].freeze();
                self.pause(50, 1_500);
                self.nodes[node].thaw();
            }
            Deed::NodeFreezes => {
                let changing = stage.changing.lock().unwrap();
                let node = self.any();
                self.nodes[node].freeze();
                self.tell();
                self.until_taken(node);
                self.pause(0, 300);
                drop(changing);
                self.nodes[node].thaw();
            }
            Deed::NodeCutOff => {
                let changing = stage.changing.lock().unwrap();
                let node = self.any();
                self.nodes[node].network.cut(true);
                self.nodes[node].frozen = true;
                self.tell();
                self.until_taken(node);
                self.pause(0, 1_000);
                drop(changing);
                self.nodes[node].frozen = false;
                self.nodes[node].network.cut(false);
            }
            Deed::NodeSlow => {
                let node = self.any();
                self.nodes[node].network.delay(Duration::from_millis(self.rng.below(40)));
                self.pause(300, 2_000);
                self.nodes[node].network.delay(Duration::ZERO);
            }
            Deed::NodeStops => {
                let changing = stage.changing.lock().unwrap();
                let node = self.any();
                self.nodes[node].stop();
                self.tell_of_the_others();
                drop(changing);
                self.nodes[node].start();
            }
            Deed::NodeJoins => {
                let changing = stage.changing.lock().unwrap();
                if self.nodes.len() < NODES_MAX {
                    self.join();
                } else {
                    let node = self.any();
                    self.nodes.remove(node).stop();
                    self.tell();
                }
                drop(changing);
            }
            Deed::Move => {
                let (shard, to) = (self.rng.below(u64::from(crate::SHARDS)), self.any());
                let body = serde_json::json!({ "node": self.nodes[to].name });
                self.operate(&format!("/v1/cluster/shards/{shard}/move"), &body);
                if self.rng.percent(70) {
                    self.until_counted();
                    let body = serde_json::json!({ "node": null });
                    self.operate(&format!("/v1/cluster/shards/{shard}/move"), &body);
                }
            }
            Deed::Drain => {
                let node = self.any();
                let path = format!("/v1/cluster/nodes/{}/drain", self.nodes[node].name);
                self.operate(&path, &serde_json::json!({ "drain": true }));
                if self.working() > 1 {
                    self.until_taken(node);
                }
                self.operate(&path, &serde_json::json!({ "drain": false }));
            }
            Deed::ServerDies => {
                let server = self.rng.below(SERVERS as u64) as usize;
                self.servers.server(server).kill();
                self.pause(0, 3_000);
                self.servers.server(server).restart();
            }
            Deed::ServerPauses => {
                let server = self.rng.below(SERVERS as u64) as usize;
                self.servers.server(server).pause();
                self.pause(0, 3_000);
                self.servers.server(server).resume();
            }
            Deed::ServersDie => {
                for server in 0..SERVERS {
                    self.servers.server(server).kill();
                }
                self.pause(0, 500);
                for server in 0..SERVERS {
                    self.servers.server(server).begin();
                }
                self.servers.until_complete();
            }
        }
        self.until_counted();
    }

    fn working(&self) -> usize {
        self.nodes.iter().filter(|node| node.works()).count()
    }

    fn tell_of_the_others(&mut self) {
        if self.working() == 0 {
            self.stage.set_url(None);
        } else {
            self.tell();
        }
    }

    /// What an operator asks for, until it is taken. A node that is gone meanwhile is no fault.
    fn operate(&mut self, path: &str, body: &Value) {
        let began = Instant::now();
        loop {
            let node = self.any();
            let server = self.nodes[node].server.as_ref().unwrap();
            let answer = server.try_post(path, &body.to_string());
            match answer {
                Ok(answer) if (200..300).contains(&answer.status) => return,
                Ok(answer) if [404, 409].contains(&answer.status) => return,
                answer => assert!(began.elapsed() < PATIENCE, "{path}: {answer:?}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits until others say that a node owns nothing.
    fn until_taken(&mut self, node: usize) {
        let name = self.nodes[node].name.clone();
        let began = Instant::now();
        loop {
            self.allow(200);
            let other = self.any();
            let asked = (other != node || self.working() == 1).then(|| self.nodes[other].shards());
            if let Some(shards) = asked.flatten()
                && shards.iter().all(|shard| shard["owner"].as_str().is_some_and(|at| at != name))
            {
                return;
            }
            let log = || self.nodes[other].server.as_ref().unwrap().log();
            assert!(began.elapsed() < PATIENCE, "{name} still owns shards: {}", log());
            std::thread::sleep(Duration::from_millis(20));
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

    /// Waits until something is acknowledged and counted that was not there before, as any node says.
    fn until_counted(&mut self) {
        let before = self.allow(200);
        let began = Instant::now();
        while self.sent.lock().unwrap().lines == before {
            assert!(began.elapsed() < PATIENCE, "nothing is acknowledged");
            std::thread::sleep(Duration::from_millis(2));
        }
        let position = self.sent.lock().unwrap().position();
        let acknowledged = began.elapsed();
        if acknowledged > Duration::from_secs(5) {
            println!("  acknowledged after {} ms", acknowledged.as_millis());
        }
        let path = format!("/v1/top?by=org&window=all&n=1&min_position={position}");
        loop {
            let node = self.any();
            let server = self.nodes[node].server.as_ref().unwrap();
            let answer = server.try_get(&path);
            if answer.as_ref().is_ok_and(|answer| answer.status == 200) {
                break;
            }
            if began.elapsed() > Duration::from_secs(5) {
                let after = began.elapsed().as_millis();
                println!("  after {after} ms {} says {answer:?}", self.nodes[node].name);
            }
            let going = match &answer {
                // Not counted yet, or on the move.
                Ok(answer) => [503, 504].contains(&answer.status),
                Err(_) => true,
            };
            let shards = self.nodes[node].shards();
            assert!(
                going && began.elapsed() < PATIENCE,
                "{position} is not counted, says {}: {answer:?}: {shards:?}: {}",
                self.nodes[node].name,
                self.nodes[node].server.as_ref().unwrap().log()
            );
        }
        for node in self.nodes.iter().filter(|node| node.works()) {
            sound(&node.name, &node.server.as_ref().unwrap().log());
        }
    }

    /// All nodes, running and ready, for the rest of the test.
    pub fn end(&self) -> Vec<&Server> {
        let servers = self.nodes.iter().map(|node| node.server.as_ref().unwrap());
        servers.inspect(|server| server.until_ready()).collect()
    }

    /// What was done.
    pub fn told(&self) -> String {
        let mut recoveries = self.recoveries.clone();
        recoveries.sort();
        let of = |share: usize| {
            recoveries.get(recoveries.len() * share / 100).map_or(0, Duration::as_millis)
        };
        format!(
            "{:?}; from a node's death to all counted: median {} ms, longest {} ms of {} (lease {} ms)",
            self.done,
            of(50),
            recoveries.last().map_or(0, Duration::as_millis),
            recoveries.len(),
            LEASE.as_millis()
        )
    }

    /// Stops all nodes and verifies the logs against the outputs; both must be right.
    pub fn verified(&mut self) -> Value {
        for node in &mut self.nodes {
            node.stop();
        }
        let (code, out, err) = ran(&self.nodes[0].launch().run(&["verify", "--json"]));
        assert_eq!(code, 0, "{out}{err}");
        let report: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(report["differences_total"], 0, "{report}");
        report
    }
}
