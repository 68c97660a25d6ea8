//! A shard that dies anywhere and is opened again writes what one that never died writes, byte for
//! byte in the rows of its output log, and neither loses nor repeats an epoch.
//!
//! Drives [`LiveShard`] itself over logs and checkpoints in memory with random histories: it is
//! dropped before an epoch is cut, after the append of a commit that nobody heard of, and between
//! commits; checkpoints are taken at random, fail at random and are damaged at random.
//!
//! METERR_RESTORE_SEEDS=N runs N histories instead of the default.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use futures::executor::block_on;
use meterr_connectors::checkpoint::CheckpointStore;
use meterr_connectors::checkpoint_memory::MemoryCheckpointStore;
use meterr_connectors::log::{Log, Message};
use meterr_connectors::memory::MemoryLog;
use meterr_engine::live::{LiveShard, Logs, ShardSpec};
use meterr_engine::records::control_changes;
use meterr_engine::snapshot;
use meterr_engine::wire::Commit;
use meterr_engine::worker::timely_worker;
use meterr_operators::histories::{HistoryOptions, Step, history};
use meterr_operators::ids::ShardId;
use meterr_operators::rng::Rng;
use timely::worker::Worker;
use tokio::sync::Semaphore;

struct World {
    usage: MemoryLog,
    control: MemoryLog,
    out: MemoryLog,
    store: Arc<MemoryCheckpointStore>,
    worker: Worker,
    live: Option<LiveShard>,
}

impl World {
    fn new() -> World {
        World {
            usage: MemoryLog::new("USAGE_0"),
            control: MemoryLog::new("CONTROL"),
            out: MemoryLog::new("OUT_0"),
            store: Arc::new(MemoryCheckpointStore::new(snapshot::FORMAT)),
            worker: timely_worker(),
            live: None,
        }
    }

    fn spec(&self) -> ShardSpec {
        let logs = Logs {
            usage: Arc::new(self.usage.clone()),
            control: Arc::new(self.control.clone()),
            out: Arc::new(self.out.clone()),
        };
        support::only_shard(logs, self.store.clone(), 1_000_000)
    }

    fn live(&mut self) -> &mut LiveShard {
        if self.live.is_none() {
            let spec = self.spec();
            self.live = Some(LiveShard::open(&mut self.worker, spec, |_, _, _| ()).unwrap());
        }
        self.live.as_mut().unwrap()
    }

    /// Drops the shard with all it knows, as a killed process would.
    fn die(&mut self) {
        self.live = None;
        self.worker = timely_worker();
    }

    /// Hands over what the logs have beyond the shard, as its readers would.
    fn feed(&mut self) {
        let progress = self.live().progress();
        let control = control_changes(&self.control, progress.control + 1, None).unwrap();
        let usage = block_on(self.usage.read(progress.usage + 1, usize::MAX)).unwrap();
        let credit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        self.live().give_control(&control);
        self.live().give_usage(usage, credit);
    }

    /// Commits everything that waits. `heard` says whether the shard hears of the append.
    fn commit(&mut self, heard: bool) {
        self.feed();
        let live = self.live.as_mut().unwrap();
        let Some(append) = live.pump(&mut self.worker).unwrap() else { return };
        let result = block_on(append);
        if heard {
            live.committed(result).unwrap();
        } else {
            self.die();
        }
    }

    fn checkpoint(&mut self) {
        let Some(job) = self.live().checkpoint(true).unwrap() else { return };
        let written = self.store.write(&job.manifest, &job.chunks).is_ok();
        self.live().checkpointed(written);
    }

    /// What the output log says: each epoch's commit and rows, without who wrote them.
    fn written(&self) -> Vec<(Commit, Vec<String>)> {
        let mut epochs = Vec::new();
        let mut parts: Vec<String> = Vec::new();
        for record in self.out.records() {
            let text = String::from_utf8(record.message.payload.to_vec()).unwrap();
            if record.message.subject.ends_with(".part") {
                parts.push(text);
                continue;
            }
            let mut commit: Commit = serde_json::from_str(&text).unwrap();
            let own = parts.split_off(parts.len() - commit.parts as usize);
            parts.clear();
            if commit.seal {
                continue;
            }
            let token = format!("\"token\":{},", commit.token);
            let own = own.into_iter().map(|part| part.replacen(&token, "", 1)).collect();
            // The hash covers the token in the parts.
            (commit.token, commit.hash) = (0, String::new());
            epochs.push((commit, own));
        }
        epochs
    }
}

fn run(steps: &[Step], mut rng: Option<Rng>) -> World {
    let mut world = World::new();
    world.live();
    for step in steps {
        match step {
            Step::Message(message) => {
                let record = Message::new(message.subject.clone(), message.payload());
                world.usage.append_at(vec![record], message.time).unwrap();
            }
            Step::Control(change) => {
                let record = Message::new("control", change.to_bytes());
                block_on(world.control.append(vec![record])).unwrap();
            }
            Step::Boundary => match &mut rng {
                None => world.commit(true),
                Some(rng) => {
                    if rng.percent(15) {
                        world.die();
                    }
                    let heard = !rng.percent(15);
                    let checkpoint = rng.percent(40);
                    let fails = rng.percent(20);
                    let damage = rng.percent(10);
                    world.commit(heard);
                    if checkpoint {
                        world.store.fail_writes(u32::from(fails));
                        world.checkpoint();
                        world.store.fail_writes(0);
                    }
                    if damage && let Some(newest) = world.store.list(ShardId(0)).unwrap().last() {
                        world.store.damage(ShardId(0), newest.generation, newest.index);
                    }
                }
            },
        }
    }
    world.commit(true);
    world
}

#[test]
fn a_shard_that_dies_anywhere_writes_what_one_that_never_died_writes() {
    let seeds = std::env::var("METERR_RESTORE_SEEDS").map_or(40, |n| n.parse().unwrap());
    let mut restarts = 0;
    for seed in 0..seeds {
        let options = HistoryOptions { shards: 1, orgs: 4, steps: 60, lines_max: 6 };
        let steps = history(&mut Rng::new(seed), &options);
        let never = run(&steps, None);
        let often = run(&steps, Some(Rng::new(seed ^ 0x5eed)));
        let (never, often_written) = (never.written(), often.written());
        assert_eq!(never.len(), often_written.len(), "seed {seed}: number of epochs");
        for (a, b) in never.iter().zip(&often_written) {
            assert_eq!(a, b, "seed {seed}: epoch {}", a.0.epoch);
        }
        let epochs: Vec<u64> = often_written.iter().map(|(commit, _)| commit.epoch).collect();
        assert!(epochs.windows(2).all(|pair| pair[1] == pair[0] + 1), "seed {seed}: {epochs:?}");
        restarts += often.out.records().len()
            - often_written.iter().map(|(_, p)| p.len() + 1).sum::<usize>();
    }
    // Each opening writes one sealing record: the histories did die, many times.
    assert!(restarts as u64 > 3 * seeds, "{restarts} openings in {seeds} histories");
}

#[test]
fn a_second_owner_fences_the_first() {
    let mut world = World::new();
    let steps =
        history(&mut Rng::new(1), &HistoryOptions { shards: 1, ..HistoryOptions::default() });
    world.live();
    for step in &steps {
        if let Step::Message(message) = step {
            let record = Message::new(message.subject.clone(), message.payload());
            world.usage.append_at(vec![record], message.time).unwrap();
        }
    }
    world.feed();
    // Another owner takes over before the first one commits.
    let mut other_worker = timely_worker();
    let other = LiveShard::open(&mut other_worker, world.spec(), |_, _, _| ()).unwrap();
    let before = world.out.head();
    let live = world.live.as_mut().unwrap();
    let append = live.pump(&mut world.worker).unwrap().unwrap();
    let result = block_on(append);
    assert!(
        live.committed(result)
            .is_err_and(|e| e.to_string().contains("another node has taken this shard over"))
    );
    assert_eq!(world.out.head(), before, "nothing of the first owner's epoch was written");
    other.close(&mut other_worker);
}
