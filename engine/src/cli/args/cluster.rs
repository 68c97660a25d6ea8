//! Arguments of `meterr cluster`.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::ClientArgs;
use crate::quantity::parse_duration;

/// `cluster …`
#[derive(Debug, Clone, Subcommand)]
pub enum ClusterCommand {
    /// Show the nodes, and which shard is where
    Status(ClusterStatusArgs),
    /// Have a node give all its shards to the others, before it is stopped
    Drain(ClusterDrainArgs),
    /// Move a shard to a node, or let placement decide again
    Move(ClusterMoveArgs),
}

/// `cluster status`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Any node can be asked. LAG counts records of the usage log that no commit includes yet. A shard with \
a node under MOVES TO is on its way there: that node loads its state and follows it first, so that \
its output pauses for the hand-over only.

States of nodes:
  up        owns shards
  draining  gives its shards away and takes none
  replica   follows every shard and answers, but owns none
  silent    was not heard for a while; its shards stay with it until it is taken to be dead
  gone      taken to be dead; its shards go to the others
  newer     of a version whose entry the node that was asked cannot read

Exit code 1 when a shard is stopped, owned by nobody, or its owner does not answer.")]
pub struct ClusterStatusArgs {
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `cluster drain`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Its shards go to the other nodes one after the other, each with a pause of its output of less than a \
second; a drained node goes on answering questions. Stopping a node by SIGTERM drains it by itself; \
draining first shows when it is safe to. Ask any node.

Examples:
  meterr cluster drain n2 --wait           then stop n2, and nothing has to be taken over
  meterr cluster drain n2 --undo           it takes shards again")]
pub struct ClusterDrainArgs {
    /// The node
    pub node: String,
    /// End a drain: the node takes shards again
    #[arg(long)]
    pub undo: bool,
    /// Wait until it is done
    #[command(flatten)]
    pub wait: WaitArgs,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// `cluster move`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
The shard stays on the node it was moved to, also when nodes come and go, until --auto gives it back \
to placement, or the node is gone or drained. Ask any node.

Examples:
  meterr cluster move 3 n2 --wait          shard 3 goes to n2
  meterr cluster move 3 --auto             placement decides about shard 3 again")]
pub struct ClusterMoveArgs {
    /// The shard
    pub shard: u16,
    /// The node it goes to
    #[arg(required_unless_present = "auto", conflicts_with = "auto")]
    pub node: Option<String>,
    /// Let placement decide again
    #[arg(long)]
    pub auto: bool,
    /// Wait until it is done
    #[command(flatten)]
    pub wait: WaitArgs,
    /// Where the server is.
    #[command(flatten)]
    pub client: ClientArgs,
}

/// Whether to wait for a wish to come true.
#[derive(Debug, Clone, Args)]
pub struct WaitArgs {
    /// Wait until it is done, and say how it goes
    #[arg(long)]
    pub wait: bool,
    /// Longest wait; exit code 1 when it is not done by then
    #[arg(long, default_value = "10m", value_parser = parse_duration, requires = "wait")]
    pub wait_max: Duration,
}
