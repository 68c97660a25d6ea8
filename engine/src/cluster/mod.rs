//! Many nodes on the same logs: who is there, who owns which shard, and how a shard goes from one node
//! to another.
//!
//! A node keeps a *session* in the registry (`node.<name>`, written anew every quarter of the lease time)
//! and owns shards by *leases* (`lease.<shard>`), each taken by compare-and-set; the revision of the
//! taking is the fencing token. Leases give liveness. Safety comes from the fenced commit of every
//! epoch: whoever sealed a shard last is the only one whose commits stand.
//!
//! A node that does not own a shard may *stand by*: it holds the shard's state, follows its commits and
//! answers questions from it. A planned move goes to a node that stands by, so the shard's output pauses
//! for the hand-over only. A replica stands by for every shard and owns none.

pub mod driver;
pub mod forecast;
pub mod joining;
pub mod link;
pub mod load;
pub mod member;
pub mod placement;
pub mod records;
pub mod scaling;
mod view;

use meterr_operators::ids::ShardId;
use serde::{Deserialize, Serialize};

/// What a shard is on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Held {
    /// Nothing of it is here.
    Nothing,
    /// Its state is being loaded, to stand by or to own.
    Opening,
    /// It stands by, this many commits behind what is known to be committed.
    StandingBy {
        /// Commits known and not yet taken in.
        behind: u64,
    },
    /// This node owns it under this token, or is about to seal it under it.
    Owned {
        /// The token.
        token: u64,
        /// Whether it is sealed and at work.
        live: bool,
    },
    /// It was owned and is finishing what is under way, to be handed over.
    Releasing,
    /// It finished and can be handed over. Stays so until told otherwise; it answers as one that
    /// stands by.
    Released,
    /// Another node took it over: a commit of this one was refused, or its log was found sealed under a
    /// token above this one's.
    Lost {
        /// The token that stands in the log, 0 if it is not known.
        token: u64,
    },
    /// It stopped for this reason and needs an operator.
    Stopped(String),
}

/// The shards of this node, as decisions about ownership see them. Calls return at once; what becomes
/// of them shows in [`Shards::held`]. Every call may be repeated.
pub trait Shards: Send + Sync + 'static {
    /// What each shard is here, by number.
    fn held(&self) -> Vec<Held>;

    /// Loads a shard and follows its commits.
    fn stand_by(&self, shard: ShardId);

    /// Takes a shard over under a token: loads it if it does not stand by, follows to the last commit,
    /// seals, and goes on from there.
    fn own(&self, shard: ShardId, token: u64);

    /// Commits what is under way, and then writes nothing more.
    fn release(&self, shard: ShardId);

    /// Lets go of a shard as it is, at once and whatever it is.
    fn drop(&self, shard: ShardId);
}

/// A node as others see it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NodeView {
    /// Its name.
    pub node: String,
    /// `up`, `draining`, `replica`, `silent` (not heard for a while), `gone` (taken to be dead) or
    /// `newer` (of a version whose entry this one cannot read).
    pub state: String,
    /// Capacity weight; 1 is usual.
    pub capacity: f64,
    /// Where its HTTP listens.
    pub http: String,
    /// Version of its binary.
    pub version: String,
    /// Milliseconds since it was last heard, by the clock of the node that was asked.
    pub heard_ms: u64,
    /// Shards it owns.
    pub shards: Vec<ShardId>,
}

/// A shard as the registry has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardView {
    /// The shard.
    pub shard: ShardId,
    /// Node that owns it, if any.
    pub owner: Option<String>,
    /// Fencing token of the owner: revision at which it took the lease.
    pub token: u64,
    /// Node that it should go to.
    pub wanted: Option<String>,
    /// Node an operator moved it to.
    pub pinned: Option<String>,
}

/// The cluster as one node sees it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ClusterView {
    /// Name of the node that was asked.
    pub node: String,
    /// All nodes, by name.
    pub nodes: Vec<NodeView>,
    /// All shards, by number.
    pub shards: Vec<ShardView>,
}

impl ClusterView {
    /// The node that owns a shard.
    pub fn owner(&self, shard: ShardId) -> Option<&str> {
        self.shards.get(usize::from(shard.0))?.owner.as_deref()
    }
}
