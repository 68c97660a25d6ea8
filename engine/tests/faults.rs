//! Failing disks and lost power under a whole shard: full disk, failing fsync, power loss that drops
//! or tears what was not synced. Every fault ends in a clear stop; after the next start everything
//! that was acknowledged is in the views once, and `verify` finds every row right.
//!
//! Runs the embedded log on a file system in memory whose faults are drawn from a seed.
//! METERR_FAULT_SEEDS=N runs N histories instead of the default.

#![allow(clippy::unwrap_used)]

mod support;

use std::path::Path;
use std::sync::Arc;

use futures::executor::block_on;
use meterr_connectors::checkpoint::CheckpointStore;
use meterr_connectors::checkpoint_memory::MemoryCheckpointStore;
use meterr_connectors::embedded::{EmbeddedLog, EmbeddedOptions, FaultFs};
use meterr_connectors::log::{Log, LogError, Message};
use meterr_engine::live::{LiveShard, Logs, ShardSpec, StopReason};
use meterr_engine::records::control_changes;
use meterr_engine::worker::timely_worker;
use meterr_engine::{snapshot, verify};
use meterr_operators::histories::{HistoryOptions, Step, history};
use meterr_operators::rng::Rng;
use meterr_operators::time::Time;
use timely::worker::Worker;
use tokio::sync::Semaphore;

struct Node {
    logs: [Arc<EmbeddedLog>; 3],
    worker: Worker,
    live: LiveShard,
}

struct World {
    fs: FaultFs,
    clock: Arc<std::sync::atomic::AtomicI64>,
    store: Arc<MemoryCheckpointStore>,
    node: Option<Node>,
    /// Faults that stopped the node, by what they said.
    stops: Vec<String>,
}

impl World {
    fn new() -> World {
        World {
            fs: FaultFs::new(),
            clock: Arc::default(),
            store: Arc::new(MemoryCheckpointStore::new(snapshot::FORMAT)),
            node: None,
            stops: Vec::new(),
        }
    }

    fn open_logs(&self) -> Result<[Arc<EmbeddedLog>; 3], LogError> {
        let open = |stream: &str| {
            let clock = self.clock.clone();
            // Small segments, so that faults fall on their ends too.
            let options = EmbeddedOptions {
                segment_bytes: 4096,
                tail_bytes: 2048,
                ..EmbeddedOptions::default()
            };
            let now = move || Time(clock.load(std::sync::atomic::Ordering::Relaxed));
            let dir = Path::new("/data").join(stream);
            let fs = Arc::new(self.fs.clone());
            EmbeddedLog::open(&dir, stream, options, fs, Arc::new(now)).map(|(log, _)| log)
        };
        Ok([open("USAGE_0")?, open("CONTROL")?, open("OUT_0")?])
    }

    fn spec(&self, logs: &[Arc<EmbeddedLog>; 3]) -> ShardSpec {
        let [usage, control, out] = logs.clone();
        support::only_shard(Logs { usage, control, out }, self.store.clone(), 20)
    }

    fn node(&mut self) -> &mut Node {
        while self.node.is_none() {
            match self.start() {
                Ok(node) => self.node = Some(node),
                Err(reason) => {
                    self.stops.push(reason.to_string());
                    self.mend(0);
                }
            }
        }
        self.node.as_mut().unwrap()
    }

    fn start(&self) -> Result<Node, StopReason> {
        let logs = self.open_logs()?;
        let mut worker = timely_worker();
        let live = LiveShard::open(&mut worker, self.spec(&logs), |_, _, _| ())?;
        Ok(Node { logs, worker, live })
    }

    /// The node is gone; with a seed the power too.
    fn mend(&mut self, power: u64) {
        if let Some(node) = self.node.take() {
            drop(node.live);
            for log in &node.logs {
                // What a log says of its failure was heard before.
                drop(log.close());
            }
        }
        if power > 0 {
            self.fs.crash(power);
        }
        self.fs.heal();
    }

    fn stop(&mut self, reason: &dyn std::fmt::Display, rng: &mut Rng) {
        self.stops.push(reason.to_string());
        let power = if rng.percent(50) { rng.bits() | 1 } else { 0 };
        self.mend(power);
    }

    /// Appends until it is acknowledged, as a producer does.
    fn publish(&mut self, which: usize, message: Message, rng: &mut Rng) -> u64 {
        loop {
            let log = self.node().logs[which].clone();
            match block_on(log.append(vec![message.clone()])) {
                Ok(appended) => return appended.last,
                Err(error) => self.stop(&error, rng),
            }
        }
    }

    fn commit_all(&mut self, rng: &mut Rng) {
        loop {
            let node = self.node();
            let progress = node.live.progress();
            let changes = control_changes(&*node.logs[1], progress.control + 1, None).unwrap();
            let usage = block_on(node.logs[0].read(progress.usage + 1, usize::MAX)).unwrap();
            if changes.is_empty() && usage.is_empty() {
                return;
            }
            let credit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
            node.live.give_control(&changes);
            node.live.give_usage(usage, credit);
            let result = match node.live.pump(&mut node.worker) {
                Ok(None) => return,
                Ok(Some(append)) => {
                    let appended = block_on(append);
                    node.live.committed(appended).map(drop)
                }
                Err(reason) => Err(reason),
            };
            if let Err(reason) = result {
                self.stop(&reason, rng);
            } else if rng.percent(30) {
                self.checkpoint();
            }
        }
    }

    fn checkpoint(&mut self) {
        let store = self.store.clone();
        let live = &mut self.node().live;
        if let Some(job) = live.checkpoint(true).unwrap() {
            live.checkpointed(store.write(&job.manifest, &job.chunks).is_ok());
        }
    }
}

#[test]
fn nothing_acknowledged_is_lost_by_failing_disks_and_lost_power() {
    let seeds = std::env::var("METERR_FAULT_SEEDS").map_or(30, |n| n.parse().unwrap());
    let mut stops = 0;
    for seed in 0..seeds {
        let options = HistoryOptions { shards: 1, orgs: 3, steps: 50, lines_max: 5 };
        let steps = history(&mut Rng::new(seed), &options);
        let mut rng = Rng::new(seed ^ 0xfa17);
        let mut world = World::new();
        let mut acknowledged = Vec::new();
        for step in &steps {
            // Counted in writes and syncs from here, so they fall on appends of all three logs.
            if rng.percent(12) {
                world.fs.fail_write(rng.below(4), rng.below(200) as usize);
            }
            if rng.percent(12) {
                world.fs.fail_sync(rng.below(4));
            }
            match step {
                Step::Message(message) => {
                    world.clock.store(message.time.0, std::sync::atomic::Ordering::Relaxed);
                    let record = Message::new(message.subject.clone(), message.payload());
                    let at = world.publish(0, record.clone(), &mut rng);
                    acknowledged.push((at, record));
                }
                Step::Control(change) => {
                    world.publish(1, Message::new("control", change.to_bytes()), &mut rng);
                }
                Step::Boundary => world.commit_all(&mut rng),
            }
            if rng.percent(5) {
                world.stop(&"power lost", &mut rng);
            }
        }
        world.fs.heal();
        world.commit_all(&mut rng);
        let node = world.node();
        for (at, message) in &acknowledged {
            let records = block_on(node.logs[0].read(*at, 1)).unwrap();
            assert_eq!(records[0].message, *message, "seed {seed}: acknowledged at {at}");
        }
        let logs = node.logs.clone();
        let mut report = verify::Report::default();
        verify::shard(&world.spec(&logs), &mut report).unwrap();
        assert_eq!(report.differences_total, 0, "seed {seed}: {:#?}", report.differences);
        assert!(report.events > 0 || acknowledged.is_empty(), "seed {seed}");
        stops += world.stops.len();
        let clear = |stop: &String| {
            ["stopped after a failed write", "power lost", "cannot", "log "]
                .iter()
                .any(|w| stop.contains(w))
        };
        assert!(world.stops.iter().all(clear), "seed {seed}: {:?}", world.stops);
    }
    assert!(stops as u64 > 2 * seeds, "only {stops} stops in {seeds} histories");
}
