//! Nodes of one deployment in one process: worker threads and services over the same logs in memory,
//! and questions between them that a test can hold up or cut off.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use meterr_connectors::checkpoint_memory::MemoryCheckpointStore;
use meterr_connectors::cluster::{Answerer, PeerError, Peers};
use meterr_connectors::log::{Log, Message};
use meterr_connectors::memory::MemoryLog;
use meterr_engine::cluster::forecast::Recommendation;
use meterr_engine::cluster::link::{ClusterControl, ClusterLink, ControlError, Outlook};
use meterr_engine::cluster::{ClusterView, Held, NodeView, ShardView, Shards};
use meterr_engine::control_state::ControlState;
use meterr_engine::epoch::Limits;
use meterr_engine::lifecycle::State;
use meterr_engine::live::{Checkpointing, Logs, Progress, ShardSpec};
use meterr_engine::metrics::Metrics;
use meterr_engine::node::NodeShared;
use meterr_engine::records::READ_BYTES;
use meterr_engine::service::Service;
use meterr_engine::snapshot;
use meterr_engine::tails::Tails;
use meterr_engine::worker::{Command, Event, WorkerHandle};
use meterr_operators::event::HashKey;
use meterr_operators::ids::{ShardId, shard_of};
use meterr_operators::rollup::ViewSet;
use parking_lot::{Mutex, RwLock};
use tokio::sync::{Semaphore, mpsc, watch};

pub const SHARDS: u16 = 4;

/// Everything nodes share.
pub struct Deployment {
    pub logs: Vec<Logs>,
    pub memory: Vec<[MemoryLog; 2]>,
    pub view: watch::Sender<ClusterView>,
    pub wires: Arc<Wires>,
    tokens: AtomicU64,
}

/// Questions on their way.
#[derive(Default)]
pub struct Wires {
    nodes: Mutex<BTreeMap<String, Answerer>>,
    /// Nodes that do not answer.
    pub silent: Mutex<Vec<String>>,
    /// Questions asked, by node.
    pub asked: Mutex<Vec<String>>,
}

impl Peers for Wires {
    fn ask(
        &self,
        node: &str,
        question: Bytes,
        timeout: Duration,
    ) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        self.asked.lock().push(node.to_owned());
        let Some(answerer) = self.nodes.lock().get(node).cloned() else {
            return futures::future::ready(Err(PeerError::Absent(node.to_owned()))).boxed();
        };
        let silent = self.silent.lock().iter().any(|silent| silent == node);
        let node = node.to_owned();
        async move {
            let answer = async {
                if silent {
                    futures::future::pending::<()>().await;
                }
                answerer(question).await
            };
            let what = "an answer".to_owned();
            let silent = |_| PeerError::Silent { node, what };
            tokio::time::timeout(timeout, answer).await.map_err(silent)
        }
        .boxed()
    }

    fn serve(&self, node: &str, answerer: Answerer) -> BoxFuture<'static, Result<(), PeerError>> {
        self.nodes.lock().insert(node.to_owned(), answerer);
        futures::future::ready(Ok(())).boxed()
    }
}

impl Wires {
    /// The node is gone.
    pub fn cut(&self, node: &str) {
        self.nodes.lock().remove(node);
    }
}

/// What a node's shards are, as a test says.
pub struct Said(pub Mutex<Vec<Held>>);

impl Shards for Said {
    fn held(&self) -> Vec<Held> {
        self.0.lock().clone()
    }
    fn stand_by(&self, _: ShardId) {}
    fn own(&self, _: ShardId, _: u64) {}
    fn release(&self, _: ShardId) {}
    fn drop(&self, _: ShardId) {}
}

/// Writes wishes down.
#[derive(Default)]
pub struct Wishes(pub Mutex<Vec<String>>);

impl ClusterControl for Wishes {
    fn drain(&self, node: String, drain: bool) -> BoxFuture<'static, Result<(), ControlError>> {
        self.0.lock().push(format!("drain {node} {drain}"));
        futures::future::ready(Ok(())).boxed()
    }

    fn pin(
        &self,
        shard: ShardId,
        node: Option<String>,
    ) -> BoxFuture<'static, Result<(), ControlError>> {
        self.0.lock().push(format!("pin {shard} {node:?}"));
        futures::future::ready(Ok(())).boxed()
    }
}

impl Deployment {
    pub fn new(nodes: &[&str]) -> Deployment {
        let control: Arc<dyn Log> = Arc::new(MemoryLog::new("CONTROL"));
        let memory: Vec<[MemoryLog; 2]> = (0..SHARDS)
            .map(|n| ["USAGE", "OUT"].map(|kind| MemoryLog::new(&format!("{kind}_{n}"))))
            .collect();
        let logs = |[usage, out]: &[MemoryLog; 2]| Logs {
            usage: Arc::new(usage.clone()),
            control: control.clone(),
            out: Arc::new(out.clone()),
        };
        let node = |node: &&str| NodeView {
            node: (*node).to_owned(),
            state: "up".to_owned(),
            capacity: 1.0,
            http: String::new(),
            version: "0.1.0".to_owned(),
            heard_ms: 0,
            shards: Vec::new(),
        };
        let shard =
            |n| ShardView { shard: ShardId(n), owner: None, token: 0, wanted: None, pinned: None };
        let view = ClusterView {
            node: String::new(),
            nodes: nodes.iter().map(node).collect(),
            shards: (0..SHARDS).map(shard).collect(),
        };
        Deployment {
            logs: memory.iter().map(logs).collect(),
            memory,
            view: watch::Sender::new(view),
            wires: Arc::default(),
            tokens: AtomicU64::new(1),
        }
    }

    /// The registry says who owns a shard.
    pub fn owned_by(&self, shard: ShardId, owner: Option<&str>) {
        self.view.send_modify(|view| {
            view.shards[usize::from(shard.0)].owner = owner.map(str::to_owned);
        });
    }

    /// Appends one event of an org; returns its position.
    pub async fn publish(&self, org: &str, id: u64) -> (ShardId, u64) {
        let shard = shard_of(org, SHARDS);
        let now = meterr_engine::node::now();
        let line = format!(
            "{{\"id\":\"{id}\",\"time\":\"{now}\",\"org\":\"{org}\",\"user\":\"u\",\"cost\":\"1\"}}\n"
        );
        let message = Message::new(format!("usage.{shard}.{org}"), line);
        let appended = self.logs[usize::from(shard.0)].usage.append(vec![message]).await.unwrap();
        (shard, appended.last)
    }
}

/// One node.
pub struct Node {
    pub name: String,
    pub service: Service,
    pub shared: Arc<NodeShared>,
    pub held: Arc<Said>,
    pub wishes: Arc<Wishes>,
    /// What staleness the node claims, in milliseconds.
    pub staleness: Arc<Mutex<Option<u64>>>,
    progress: Vec<watch::Sender<Progress>>,
    worker: Option<WorkerHandle>,
    opened: watch::Receiver<Vec<bool>>,
    feeders: Mutex<BTreeMap<ShardId, tokio::task::JoinHandle<()>>>,
}

impl Drop for Node {
    fn drop(&mut self) {
        for (_, feeder) in self.feeders.get_mut().iter() {
            feeder.abort();
        }
        if let Some(worker) = self.worker.take() {
            worker.end();
        }
    }
}

impl Node {
    pub async fn start(deployment: &Deployment, name: &str, replica: bool) -> Node {
        let (events, mut happened) = mpsc::channel(1024);
        let runtime = tokio::runtime::Handle::current();
        let worker = WorkerHandle::start(0, events, runtime.clone()).unwrap();
        let (progress, seen): (Vec<_>, Vec<_>) =
            (0..SHARDS).map(|_| watch::channel(Progress::default())).unzip();
        let shared = Arc::new(NodeShared {
            logs: deployment.logs.clone(),
            workers: RwLock::new(vec![worker.sender()]),
            progress: seen,
            states: (0..SHARDS).map(|_| Mutex::new((State::Claim, None))).collect(),
            tokens: (0..SHARDS).map(|_| AtomicU64::new(0)).collect(),
            lost: (0..SHARDS).map(|_| AtomicU64::new(0)).collect(),
            behind: (0..SHARDS).map(|_| AtomicU64::new(0)).collect(),
            current: (0..SHARDS).map(|_| Mutex::new(None)).collect(),
            writing: (0..SHARDS).map(|_| AtomicBool::new(false)).collect(),
            stopping: AtomicBool::new(false),
            shards_changed: tokio::sync::Notify::new(),
            leased: true,
            control: RwLock::new(ControlState::default()),
            control_seen: watch::Sender::new(0),
            metrics: Metrics::new(false),
            min_position_timeout: Duration::from_secs(3),
            runtime: runtime.clone(),
            control_lock: tokio::sync::Mutex::new(()),
            draining: watch::Sender::new(false),
            cluster: OnceLock::new(),
            measured: Default::default(),
            tails: Tails::default(),
        });
        let (tell_opened, opened) = watch::channel(vec![false; usize::from(SHARDS)]);
        let states = shared.clone();
        let sender = worker.sender();
        runtime.spawn(async move {
            while let Some(event) = happened.recv().await {
                let set = |shard: ShardId, open: bool, state: State| {
                    states.states[usize::from(shard.0)].lock().0 = state;
                    tell_opened.send_modify(|opened| opened[usize::from(shard.0)] = open);
                };
                match event {
                    Event::Owned(shard, _) => set(shard, true, State::Live),
                    Event::Drained(shard) => set(shard, false, State::Released),
                    Event::Stopped(shard, why) => {
                        set(shard, false, State::Stopped(why.to_string()));
                    }
                    Event::Checkpoint(shard, Some(job)) => {
                        drop(sender.send(Command::Checkpointed(shard, job.opening, true)));
                    }
                    _ => {}
                }
            }
        });
        let held = Arc::new(Said(Mutex::new(vec![Held::Nothing; usize::from(SHARDS)])));
        let staleness: Arc<Mutex<Option<u64>>> = Arc::default();
        let claimed = staleness.clone();
        let wishes: Arc<Wishes> = Arc::default();
        let link = ClusterLink {
            me: name.to_owned(),
            replica,
            view: deployment.view.subscribe(),
            peers: deployment.wires.clone(),
            shards: held.clone(),
            staleness: Arc::new(move |_| claimed.lock().map(Duration::from_millis)),
            open_out: {
                let logs = deployment.logs.clone();
                Arc::new(move |shard| {
                    let out = logs[usize::from(shard.0)].out.clone();
                    futures::future::ready(Ok(out)).boxed()
                })
            },
            outlook: Arc::new(|| Outlook {
                events_per_second: [("n1".to_owned(), 1_000.0)].into(),
                forecast: Some(Recommendation {
                    recommended_nodes: 2,
                    reason: "much comes in".to_owned(),
                    predicted_events_per_second: Some(1_350.0),
                    service_rate_events_per_second: Some(1_000.0),
                }),
            }),
            control: wishes.clone(),
            patience: Duration::from_secs(3),
        };
        assert!(shared.cluster.set(link).is_ok());
        let service = Service::new(shared.clone());
        deployment.wires.serve(name, service.answerer()).await.unwrap();
        Node {
            name: name.to_owned(),
            service,
            shared,
            held,
            wishes,
            staleness,
            progress,
            worker: Some(worker),
            opened,
            feeders: Mutex::default(),
        }
    }

    pub fn hold(&self, shard: ShardId, held: Held) {
        self.held.0.lock()[usize::from(shard.0)] = held;
    }

    fn spec(&self, shard: ShardId, logs: &Logs) -> ShardSpec {
        ShardSpec {
            id: shard,
            shards: SHARDS,
            key: HashKey([7; 16]),
            logs: logs.clone(),
            checkpoints: Arc::new(MemoryCheckpointStore::new(snapshot::FORMAT)),
            views: ViewSet::DEFAULT,
            limits: Limits {
                events_max: 1000,
                age_max: Duration::from_millis(5),
                age_max_loaded: Duration::from_millis(5),
            },
            checkpointing: Checkpointing {
                interval: Duration::from_secs(3600),
                updates_max: usize::MAX,
                base_ratio: 0.5,
            },
            time_jump_max: i64::MAX,
            shared_checkpoints: true,
            progress: self.progress[usize::from(shard.0)].clone(),
            announcer: None,
        }
    }

    async fn open(&self, spec: ShardSpec) {
        let shard = spec.id;
        self.shared.tell(shard, Command::Open(Box::new(spec), Some(0))).await;
        let mut opened = self.opened.clone();
        opened.wait_for(|opened| opened[usize::from(shard.0)]).await.unwrap();
    }

    /// Takes a shard over and feeds it from its log.
    pub async fn own(&self, deployment: &Deployment, shard: ShardId) {
        let logs = &deployment.logs[usize::from(shard.0)];
        self.open(self.spec(shard, logs)).await;
        let token = deployment.tokens.fetch_add(1, Ordering::Relaxed);
        self.hold(shard, Held::Owned { token, live: true });
        deployment.owned_by(shard, Some(&self.name));
        let (usage, shared) = (logs.usage.clone(), self.shared.clone());
        let mut from = shared.progress[usize::from(shard.0)].borrow().usage + 1;
        let credits = Arc::new(Semaphore::new(2));
        let feeder = tokio::spawn(async move {
            loop {
                usage.wait_beyond(from - 1).await;
                let credit = credits.clone().acquire_owned().await.unwrap();
                let records = usage.read(from, READ_BYTES).await.unwrap();
                let Some(last) = records.last() else { continue };
                from = last.position + 1;
                shared.tell(shard, Command::Usage(shard, records, credit)).await;
            }
        });
        self.feeders.lock().insert(shard, feeder);
    }

    /// Finishes a shard and lets it go.
    pub async fn release(&self, shard: ShardId) {
        if let Some(feeder) = self.feeders.lock().remove(&shard) {
            feeder.abort();
        }
        self.hold(shard, Held::Nothing);
        self.shared.tell(shard, Command::Drain(shard)).await;
        let mut opened = self.opened.clone();
        opened.wait_for(|opened| !opened[usize::from(shard.0)]).await.unwrap();
    }

    /// Stands by with the state as it is now: opened over copies of the logs, it seals nothing that
    /// anybody else reads, and follows no further.
    pub async fn stand_by(&self, deployment: &Deployment, shard: ShardId) {
        let [usage, out] = &deployment.memory[usize::from(shard.0)];
        let copies = [usage, out].map(|log| {
            let copy = MemoryLog::new(&log.identity().stream);
            for record in log.records() {
                copy.append_at(vec![record.message], record.time).unwrap();
            }
            copy
        });
        let [usage, out] = copies;
        let control = deployment.logs[0].control.clone();
        let logs = Logs { usage: Arc::new(usage), control, out: Arc::new(out) };
        self.open(self.spec(shard, &logs)).await;
        self.hold(shard, Held::StandingBy { behind: 0 });
    }
}
