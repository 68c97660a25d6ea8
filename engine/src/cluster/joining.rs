//! Makes a node part of the cluster on its NATS servers: registry and peers, the task that keeps its
//! leases, and the link by which its service finds the other nodes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use meterr_connectors::cluster::{Answerer, PeerError, Peers, Registry};
use meterr_operators::ids::ShardId;
use tokio::task::JoinHandle;

use crate::actors::Wishes;
use crate::cluster::Shards;
use crate::cluster::driver::{self, Cluster, ClusterError, End, Surroundings};
use crate::cluster::link::{ClusterControl, ClusterLink, ControlError, Outlook};
use crate::cluster::member::{self, ReleaseRequest};
use crate::cluster::scaling::{LOOK, Scaling, show_shards};
use crate::nats::Nats;
use crate::node::{NodeError, NodeShared, random_bytes};
use crate::ownership::{NodeShards, node_name};
use crate::service::Service;
use crate::settings::Settings;

/// A node's part in the cluster, for whoever starts and stops it.
pub struct Joined {
    registry: Arc<dyn Registry>,
    node: String,
    cluster: Cluster,
    ringing: JoinHandle<()>,
    scaling: Arc<tokio::sync::Mutex<Scaling>>,
    looking: JoinHandle<()>,
    patience: Duration,
}

/// Time a question is given less than the surfaces wait for its answer, so that they can say why there
/// is none.
const MARGIN: Duration = Duration::from_secs(2);

/// Time beyond `drain_max` in which a leaving node must have left.
const LEAVE_MARGIN: Duration = Duration::from_secs(15);

/// Longest a node that leaves tries to write down what it counted.
const LAST_LOOK: Duration = Duration::from_secs(5);

/// Joins.
///
/// # Errors
/// When the registry cannot be used, or the node has no usable name.
pub async fn join(
    settings: &Settings,
    nats: &Nats,
    shared: &Arc<NodeShared>,
    service: &Service,
    wishes: Wishes,
    http: String,
) -> Result<Joined, NodeError> {
    let name = node_name(settings)?;
    let of = &settings.cluster;
    let (registry, peers) = nats.cluster().await?;
    let peers: Arc<dyn Peers> = Arc::new(peers);
    let shards = Arc::new(NodeShards::new(shared.clone(), wishes));
    let registry: Arc<dyn Registry> = Arc::new(registry);
    let with =
        Surroundings { registry: registry.clone(), peers: peers.clone(), shards: shards.clone() };
    let member = member::Settings {
        capacity: of.capacity,
        replica: of.replica,
        http,
        ttl: of.lease,
        settle: of.settle,
        standbys: of.standbys,
        leave_max: of.drain_max,
        ..member::Settings::new(name.clone(), shared.logs.len() as u16)
    };
    let [a, b, c, d, e, f, g, h, ..] = random_bytes()?;
    let cluster = {
        let _runtime = nats.runtime().enter();
        driver::start(member, u64::from_le_bytes([a, b, c, d, e, f, g, h]), with)
    };
    let staleness = {
        let shared = shared.clone();
        move |shard: ShardId| {
            let current = *shared.current.get(usize::from(shard.0))?.lock();
            current.map(|at| at.elapsed())
        }
    };
    let outlook = Arc::new(parking_lot::Mutex::new(Outlook::default()));
    let wait = settings.http.min_position_timeout.max(settings.http.request_timeout);
    let link = ClusterLink {
        me: name.clone(),
        replica: of.replica,
        view: cluster.view(),
        peers: peers.clone(),
        shards: shards.clone(),
        staleness: Arc::new(staleness),
        open_out: nats.out_opener(),
        outlook: {
            let outlook = outlook.clone();
            Arc::new(move || outlook.lock().clone())
        },
        control: Arc::new(Control(cluster.clone())),
        patience: wait.saturating_sub(MARGIN).max(MARGIN / 2),
    };
    // A node joins once.
    let _ = shared.cluster.set(link);
    let answerer = answerer(service.answerer(), cluster.clone());
    peers.serve(&name, answerer).await.map_err(|error: PeerError| {
        NodeError::Refused(format!("questions of other nodes cannot be heard: {error}"))
    })?;
    let ringing = {
        let (shared, cluster) = (shared.clone(), cluster.clone());
        nats.runtime().spawn(async move {
            loop {
                shared.shards_changed.notified().await;
                cluster.shards_changed();
            }
        })
    };
    {
        // Not kept alive by its own metrics.
        let (metrics, count) = (shared.metrics.clone(), shared.logs.len() as u16);
        let (shared, shards) = (Arc::downgrade(shared), Arc::downgrade(&shards));
        let of_shards: Vec<_> = (0..count).map(|n| metrics.shard(ShardId(n))).collect();
        metrics.before_shown(move || {
            if let (Some(shared), Some(shards)) = (shared.upgrade(), shards.upgrade()) {
                show_shards(&shared, &shards.held(), &of_shards);
            }
        });
    }
    let scaling = Arc::new(tokio::sync::Mutex::new(Scaling {
        shared: shared.clone(),
        cluster: cluster.clone(),
        shards,
        registry: registry.clone(),
        outlook,
        unsure: BTreeMap::new(),
    }));
    let looking = {
        let scaling = scaling.clone();
        nats.runtime().spawn(async move {
            let mut interval = tokio::time::interval(LOOK);
            interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            loop {
                interval.tick().await;
                scaling.lock().await.look().await;
            }
        })
    };
    tracing::info!(node = name, replica = of.replica, "part of the cluster");
    let patience = of.drain_max + LEAVE_MARGIN;
    Ok(Joined { registry, node: name, cluster, ringing, scaling, looking, patience })
}

/// Sends requests for shards to whoever keeps the leases, and all else to the service.
fn answerer(service: Answerer, cluster: Cluster) -> Answerer {
    Arc::new(move |question: Bytes| {
        if serde_json::from_slice::<ReleaseRequest>(&question).is_ok() {
            let cluster = cluster.clone();
            return async move { cluster.handle_release(question).await }.boxed();
        }
        service(question)
    })
}

impl Joined {
    /// The registry, and this node's name in it.
    pub fn registry(&self) -> (Arc<dyn Registry>, String) {
        (self.registry.clone(), self.node.clone())
    }

    /// Resolves when the node cannot be part of the cluster any more, with the reason.
    pub async fn ended(&self) -> String {
        match self.cluster.ended().await {
            Some(End::Refused(why)) => why,
            Some(End::Left) => "this node was marked as gone in the registry".to_owned(),
            None => "this node's leases are not kept any more".to_owned(),
        }
    }

    /// Hands all shards over and leaves, for as long as the settings allow.
    pub async fn leave(self) {
        if tokio::time::timeout(self.patience, self.cluster.leave()).await.is_err() {
            tracing::warn!(
                "could not leave the cluster in order; others take over when the lease ends"
            );
        }
        // What was counted and not written yet.
        let last = async { self.scaling.lock().await.look().await };
        drop(tokio::time::timeout(LAST_LOOK, last).await);
        self.looking.abort();
        self.ringing.abort();
    }
}

struct Control(Cluster);

impl ClusterControl for Control {
    fn drain(&self, node: String, drain: bool) -> BoxFuture<'static, Result<(), ControlError>> {
        let cluster = self.0.clone();
        async move { cluster.drain(&node, drain).await.map_err(refused) }.boxed()
    }

    fn pin(
        &self,
        shard: ShardId,
        node: Option<String>,
    ) -> BoxFuture<'static, Result<(), ControlError>> {
        let cluster = self.0.clone();
        async move { cluster.pin(shard, node.as_deref()).await.map_err(refused) }.boxed()
    }
}

fn refused(error: ClusterError) -> ControlError {
    let text = error.to_string();
    match error {
        ClusterError::Unknown(_) => ControlError::Unknown(text),
        ClusterError::Record(_) => ControlError::Conflict(text),
        ClusterError::Registry(_) | ClusterError::Ended => ControlError::Unavailable(text),
    }
}
