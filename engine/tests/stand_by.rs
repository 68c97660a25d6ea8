//! A shard that stands by holds, at every commit of its owner, what the owner holds; and it can be
//! taken over at any moment, by whoever stands by, without an epoch lost, repeated or different.
//!
//! Drives two [`LiveShard`]s over the same logs with random histories: one owns and commits, the other
//! follows, more or less far behind. At random the roles change: handed over in order, or taken from
//! an owner that is frozen with a commit of its own prepared, which must be refused.
//!
//! METERR_STAND_BY_SEEDS=N runs N histories instead of the default.

#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;
use std::time::Duration;

use futures::executor::block_on;
use futures::future::{BoxFuture, ready};
use meterr_connectors::checkpoint_memory::MemoryCheckpointStore;
use meterr_connectors::log::{Appended, Log, LogError, LogIdentity, LogResult, Message, Record};
use meterr_connectors::memory::MemoryLog;
use meterr_engine::live::opening::rebuild;
use meterr_engine::live::standing_by::FollowedCommit;
use meterr_engine::live::{LiveShard, Logs, Progress, StopReason};
use meterr_engine::records::{control_changes, each_commit};
use meterr_engine::snapshot;
use meterr_engine::wire::Commit;
use meterr_engine::worker::timely_worker;
use meterr_operators::histories::{HistoryOptions, Step, history};
use meterr_operators::rng::Rng;
use meterr_operators::time::Time;
use timely::worker::Worker;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

fn credit() -> OwnedSemaphorePermit {
    Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap()
}

#[derive(Clone)]
struct Streams {
    usage: MemoryLog,
    control: MemoryLog,
    out: MemoryLog,
}

/// One node's copy of the shard.
struct Node {
    streams: Streams,
    worker: Worker,
    live: LiveShard,
}

impl Node {
    /// Stands by at the last commit; checkpoints are the node's own.
    fn new(streams: &Streams) -> Node {
        Node::on(streams, Arc::new(streams.out.clone()))
    }

    /// The same, with another view of the output log.
    fn on(streams: &Streams, out: Arc<dyn Log>) -> Node {
        let usage = Arc::new(streams.usage.clone());
        let control = Arc::new(streams.control.clone());
        let logs = Logs { usage, control, out };
        let store = Arc::new(MemoryCheckpointStore::new(snapshot::FORMAT));
        let spec = support::only_shard(logs, store, 1_000_000);
        let mut worker = timely_worker();
        let rebuilt = rebuild(&mut worker, &spec, |_, _, _| ()).unwrap();
        let live = LiveShard::stand_by(spec, rebuilt).unwrap();
        Node { streams: streams.clone(), worker, live }
    }

    fn hear_inputs(&mut self) {
        let Progress { usage, control, .. } = self.live.progress();
        let changes = control_changes(&self.streams.control, control + 1, None).unwrap();
        let records = block_on(self.streams.usage.read(usage + 1, usize::MAX)).unwrap();
        self.live.give_control(&changes);
        self.live.give_usage(records, credit());
    }

    /// Follows up to `most` commits of the owner.
    fn follow(&mut self, most: usize) {
        self.hear_inputs();
        let mut commits = Vec::new();
        let at = self.live.progress().commit;
        each_commit(&self.streams.out, at, |position, commit, parts| {
            let parts = parts.iter().map(|part| part.message.payload.clone()).collect();
            commits.push(FollowedCommit { position, commit, parts });
            Ok(())
        })
        .unwrap();
        commits.truncate(most);
        self.live.give_commits(commits, credit());
        while self.live.follow_commits(&mut self.worker, Duration::from_secs(1)).unwrap() {}
        assert_eq!(self.live.behind(), 0);
    }

    /// Takes the shard over, following what is in between.
    fn own(&mut self, token: u64) {
        loop {
            assert!(self.live.sealable());
            let outcome = block_on(self.live.seal(token).unwrap());
            if self.live.sealed(outcome).unwrap() {
                return;
            }
            assert!(!self.live.sealable(), "what came between is to be followed first");
            self.follow(usize::MAX);
        }
    }

    fn commit(&mut self) -> Option<Result<(), StopReason>> {
        let append = self.live.pump(&mut self.worker).unwrap()?;
        let outcome = block_on(append);
        Some(self.live.committed(outcome).map(drop))
    }

    /// Everything the views hold, by org.
    fn rows(&mut self) -> Vec<String> {
        let orgs: Vec<String> = {
            let shared = self.live.shard().flow().shared().borrow();
            (0..shared.names.names().orgs.len() as u32)
                .map(|org| shared.names.org_name(org).to_owned())
                .collect()
        };
        let mut rows = Vec::new();
        for org in orgs {
            for (view, list) in self.live.rows(&org).views {
                rows.extend(list.iter().map(|row| format!("{org} {view} {row:?}")));
            }
            rows.push(format!("{org} {:?}", self.live.epoch_of(&org)));
        }
        rows.sort();
        rows
    }
}

/// Returns how often the shard changed hands, and how many commits were refused.
fn run(seed: u64) -> (u64, u64) {
    let options = HistoryOptions { shards: 1, orgs: 4, steps: 60, lines_max: 6 };
    let steps = history(&mut Rng::new(seed), &options);
    let mut rng = Rng::new(seed ^ 0xb7);
    let streams = Streams {
        usage: MemoryLog::new("USAGE_0"),
        control: MemoryLog::new("CONTROL"),
        out: MemoryLog::new("OUT_0"),
    };
    let (mut owner, mut other) = (Node::new(&streams), Node::new(&streams));
    owner.own(1);
    let mut token = 1;
    let (mut changes, mut refused) = (0, 0);
    for step in &steps {
        match step {
            Step::Message(message) => {
                let record = Message::new(message.subject.clone(), message.payload());
                streams.usage.append_at(vec![record], message.time).unwrap();
            }
            Step::Control(change) => {
                let record = Message::new("control", change.to_bytes());
                block_on(streams.control.append(vec![record])).unwrap();
            }
            Step::Boundary => {
                owner.hear_inputs();
                let (changing, frozen) = (rng.percent(25), rng.percent(50));
                // A frozen owner is stopped before it has committed what it heard.
                if !(changing && frozen)
                    && let Some(committed) = owner.commit()
                {
                    committed.unwrap();
                }
                if rng.percent(60) {
                    let most = rng.below(3) as usize + 1;
                    other.follow(if rng.percent(30) { most } else { usize::MAX });
                }
                if other.live.progress() == owner.live.progress() {
                    assert_eq!(other.rows(), owner.rows(), "seed {seed}");
                }
                if changing {
                    token += 10;
                    changes += 1;
                    if !frozen {
                        owner.live.step_back();
                    }
                    other.own(token);
                    if frozen {
                        let late = owner.commit();
                        if let Some(late) = late {
                            let taken = matches!(late, Err(StopReason::TakenOver { .. }));
                            assert!(taken, "seed {seed}: a frozen owner committed");
                            refused += 1;
                        }
                        // It forgets what it holds and comes back.
                        owner = Node::new(&streams);
                    }
                    std::mem::swap(&mut owner, &mut other);
                } else if rng.percent(10) {
                    other = Node::new(&streams);
                }
            }
        }
    }
    other.follow(usize::MAX);
    assert_eq!(other.live.progress(), owner.live.progress(), "seed {seed}");
    assert_eq!(other.rows(), owner.rows(), "seed {seed}");
    // One node that was there from the beginning to the end would have written the same epochs.
    let mut alone = Node::new(&streams);
    assert_eq!(alone.rows(), owner.rows(), "seed {seed}");
    let mut epochs = Vec::new();
    let mut tokens = Vec::new();
    each_commit(&streams.out, 0, |_, commit: Commit, _| {
        tokens.push(commit.token);
        if !commit.seal {
            epochs.push(commit.epoch);
        }
        Ok(())
    })
    .unwrap();
    assert!(epochs.windows(2).all(|pair| pair[1] == pair[0] + 1), "seed {seed}: {epochs:?}");
    assert!(tokens.is_sorted(), "seed {seed}: {tokens:?}");
    (changes, refused)
}

/// An output log whose last commit is asked for before its owner goes on.
struct Earlier {
    log: MemoryLog,
    last: Option<Record>,
}

impl Log for Earlier {
    fn identity(&self) -> &LogIdentity {
        self.log.identity()
    }

    fn head(&self) -> u64 {
        self.log.head()
    }

    fn first(&self) -> u64 {
        self.log.first()
    }

    fn last_time(&self) -> Option<Time> {
        self.log.last_time()
    }

    fn append(&self, messages: Vec<Message>) -> BoxFuture<'static, LogResult<Appended>> {
        self.log.append(messages)
    }

    fn commit(
        &self,
        parts: Vec<Message>,
        commit: Message,
        previous: u64,
    ) -> BoxFuture<'static, LogResult<Appended>> {
        self.log.commit(parts, commit, previous)
    }

    fn last_commit(&self) -> BoxFuture<'static, LogResult<Option<Record>>> {
        Box::pin(ready(Ok(self.last.clone())))
    }

    fn read(&self, from: u64, bytes_max: usize) -> BoxFuture<'static, LogResult<Vec<Record>>> {
        self.log.read(from, bytes_max)
    }

    fn wait_beyond(&self, position: u64) -> BoxFuture<'static, ()> {
        self.log.wait_beyond(position)
    }

    fn failure(&self) -> Option<LogError> {
        self.log.failure()
    }
}

#[test]
fn a_log_that_goes_on_while_it_is_loaded_is_followed_from_where_loading_began() {
    let streams = Streams {
        usage: MemoryLog::new("USAGE_0"),
        control: MemoryLog::new("CONTROL"),
        out: MemoryLog::new("OUT_0"),
    };
    let mut owner = Node::new(&streams);
    owner.own(1);
    let mut first = None;
    for n in 0..4 {
        let line = format!(
            "{{\"id\":\"{n}\",\"time\":\"2026-01-02T03:04:05Z\",\"org\":\"acme\",\"user\":\"u\",\
             \"cost\":\"1\"}}\n"
        );
        let message = Message::new("usage.0.acme", line);
        streams
            .usage
            .append_at(vec![message], Time::parse("2026-01-02T03:05:00Z").unwrap())
            .unwrap();
        owner.hear_inputs();
        owner.commit().unwrap().unwrap();
        if n == 1 {
            first = block_on(streams.out.last_commit()).unwrap();
        }
    }
    let earlier = Earlier { log: streams.out.clone(), last: first };
    let mut other = Node::on(&streams, Arc::new(earlier));
    assert_eq!(other.live.progress().usage, 2);
    assert_eq!(other.live.shard().usage_position(), 2);
    other.follow(usize::MAX);
    assert_eq!(other.live.progress(), owner.live.progress());
    assert_eq!(other.rows(), owner.rows());
}

#[test]
fn whoever_stands_by_holds_what_the_owner_holds_and_can_take_over() {
    let seeds = std::env::var("METERR_STAND_BY_SEEDS").map_or(40, |n| n.parse().unwrap());
    let (mut changes, mut refused) = (0, 0);
    for seed in 0..seeds {
        let (changed, late) = run(seed);
        changes += changed;
        refused += late;
    }
    assert!(changes > 2 * seeds, "{changes} changes of hands in {seeds} histories");
    assert!(refused > seeds / 8, "{refused} refused commits in {seeds} histories");
}
