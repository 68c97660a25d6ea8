//! What a node needs of the others to answer for shards that are elsewhere, and to show and steer the
//! cluster.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use meterr_connectors::cluster::Peers;
use meterr_connectors::log::Log;
use meterr_operators::ids::ShardId;
use tokio::sync::watch;

use super::forecast::Recommendation;
use super::{ClusterView, Held, Shards};

/// What is measured of the nodes, and foreseen.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Outlook {
    /// Events a second that nodes were measured to be able to take in, by name.
    pub events_per_second: BTreeMap<String, f64>,
    /// Nodes that the load which is expected asks for, and why.
    pub forecast: Option<Recommendation>,
}

/// Opens a shard's output log.
pub type OpenOut =
    Arc<dyn Fn(ShardId) -> BoxFuture<'static, Result<Arc<dyn Log>, String>> + Send + Sync>;

/// A node's link to the others.
pub struct ClusterLink {
    /// Name of this node.
    pub me: String,
    /// Whether this node is a replica: it owns nothing and answers from what it follows.
    pub replica: bool,
    /// The cluster as this node sees it.
    pub view: watch::Receiver<ClusterView>,
    /// Questions to other nodes.
    pub peers: Arc<dyn Peers>,
    /// What each shard is here.
    pub shards: Arc<dyn Shards>,
    /// How long ago the state of a shard that this node does not own was known to be current; `None`
    /// when it never was.
    pub staleness: Arc<dyn Fn(ShardId) -> Option<Duration> + Send + Sync>,
    /// Opens a shard's output log once more, to follow it: a log has one sequential reader at a time,
    /// and [`NodeShared::logs`](crate::node::NodeShared::logs) may have theirs.
    pub open_out: OpenOut,
    /// What is known of the nodes' rates and the load to come.
    pub outlook: Arc<dyn Fn() -> Outlook + Send + Sync>,
    /// Takes operators' wishes.
    pub control: Arc<dyn ClusterControl>,
    /// Longest time a question waits for a node that can answer it. Shorter than the surfaces wait, so
    /// that they can say what is going on.
    pub patience: Duration,
}

impl ClusterLink {
    /// What a shard is here.
    pub fn held(&self, shard: ShardId) -> Held {
        self.shards.held().into_iter().nth(usize::from(shard.0)).unwrap_or(Held::Nothing)
    }

    /// Name of a shard's owner.
    pub fn owner(&self, shard: ShardId) -> Option<String> {
        self.view.borrow().owner(shard).map(str::to_owned)
    }
}

/// Why a wish was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// There is no such node.
    #[error("{0}")]
    Unknown(String),
    /// It contradicts what is.
    #[error("{0}")]
    Conflict(String),
    /// The registry does not answer.
    #[error("{0}")]
    Unavailable(String),
}

/// Takes operators' wishes about nodes and shards. Calls resolve once the wish is recorded; what
/// becomes of it shows in [`ClusterView`].
pub trait ClusterControl: Send + Sync + 'static {
    /// Asks a node to give all its shards away and take none, or ends that.
    fn drain(&self, node: String, drain: bool) -> BoxFuture<'static, Result<(), ControlError>>;

    /// Moves a shard to a node and keeps it there, or lets placement decide again.
    fn pin(
        &self,
        shard: ShardId,
        node: Option<String>,
    ) -> BoxFuture<'static, Result<(), ControlError>>;
}
