//! Names of streams and subjects. Everything on NATS that belongs to a deployment is named here.
//!
//! ```text
//! USAGE_<k>  usage.<k>.*     what producers sent         usage.<org> is mapped to usage.<k>.<org>
//! CONTROL    control         what else decides figures
//! OUT_<k>    out.<k>.*       parts and commit records, written by nodes only
//!            spend.<org>     changes of an org after each commit, core NATS
//!            meterr.query.…  questions about one org      meterr.admin.…  everything else
//! KV_METERR  $KV.METERR.>    who is there and who owns which shard, written by nodes only
//! OBJ_METERR_BLOBS  $O.METERR_BLOBS.>   checkpoints that nodes share, written by nodes only
//!            meterr.node.<name>, meterr.cluster.changed   between nodes, core NATS
//! ```

use meterr_operators::ids::ShardId;

/// Stream of the control log.
pub const CONTROL_STREAM: &str = "CONTROL";
/// Its only subject.
pub const CONTROL_SUBJECT: &str = "control";
/// What every producer subject begins with.
pub const USAGE: &str = "usage";

/// Stream of a shard's usage log.
pub fn usage_stream(shard: ShardId) -> String {
    format!("USAGE_{shard}")
}

/// Stream of a shard's output log.
pub fn out_stream(shard: ShardId) -> String {
    format!("OUT_{shard}")
}

/// Subject of usage in a shard; `whose` is an org, `@batch`, `@backfill` or `@tick`.
pub fn usage(shard: ShardId, whose: &str) -> String {
    format!("usage.{shard}.{whose}")
}

/// All subjects of a shard's usage log.
pub fn usage_all(shard: ShardId) -> String {
    format!("usage.{shard}.*")
}

/// Subject of a shard's commit records.
pub fn commit(shard: ShardId) -> String {
    format!("out.{shard}.commit")
}

/// All subjects of a shard's output log.
pub fn out_all(shard: ShardId) -> String {
    format!("out.{shard}.*")
}

/// Live changes of an org.
pub fn spend(org: &str) -> String {
    format!("spend.{org}")
}

/// Snapshot of an org, or what it missed.
pub fn query(org: &str) -> String {
    format!("meterr.query.{org}")
}

/// Bucket of the registry.
pub const REGISTRY_BUCKET: &str = "METERR";
/// Stream of the registry.
pub const REGISTRY_STREAM: &str = "KV_METERR";
/// What the subject of every entry of the registry begins with.
pub const REGISTRY: &str = "$KV.METERR.";
/// Says to nodes that the registry changed.
pub const CLUSTER_CHANGED: &str = "meterr.cluster.changed";

/// Questions to a node by other nodes.
pub fn node(name: &str) -> String {
    format!("meterr.node.{name}")
}

/// Addresses besides the questions of [`ENDPOINTS`](super::endpoints::ENDPOINTS), `{…}` standing for
/// one token: what producers publish to, what a deployment keeps, what subscribers hear.
pub const ADDRESSES: [&str; 9] = [
    "usage.{org}",
    "usage.{shard}.{org}",
    "usage.{shard}.@batch",
    "usage.{shard}.@backfill",
    "usage.{shard}.@tick",
    "control",
    "out.{shard}.part",
    "out.{shard}.commit",
    "spend.{org}",
];

/// What to subscribe to for an address.
pub fn pattern(address: &str) -> String {
    let tokens = address.split('.').map(|token| if token.starts_with('{') { "*" } else { token });
    tokens.collect::<Vec<_>>().join(".")
}
