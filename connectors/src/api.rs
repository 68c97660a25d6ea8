//! The questions readers and producers ask and the answers they get, whatever carries them: HTTP or
//! requests on NATS. The engine implements [`Api`]; the surfaces translate.

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use meterr_operators::event::Reason;
use meterr_operators::ids::{Positions, ShardId};
use meterr_operators::money::Atto;
use meterr_operators::price_book::PriceEntry;
use meterr_operators::time::Time;
use serde::{Deserialize, Serialize};

/// Size of the windows of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Window {
    /// Hours of UTC.
    Hour,
    /// Days in the org's time zone.
    Day,
    /// Months in the org's time zone.
    Month,
    /// All time as one window.
    All,
}

/// What the rows of a spend answer are keyed by.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GroupBy {
    /// One row a window.
    None,
    /// By user.
    User,
    /// By model, whichever provider.
    Model,
    /// By provider.
    Provider,
    /// By feature.
    Feature,
    /// By the value of a tag; events without the tag have the empty value.
    Tag(String),
}

/// `GET /v1/orgs/{org}/spend` and `…/users/{user}/spend`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpendQuery {
    /// The org.
    pub org: String,
    /// Only this user's spend.
    pub user: Option<String>,
    /// Window size.
    pub window: Window,
    /// Only windows that begin at or after this instant.
    pub from: Option<Time>,
    /// Only windows that begin before this instant.
    pub to: Option<Time>,
    /// Grouping.
    pub by: GroupBy,
    /// Wait until these positions are included.
    pub min_position: Option<Positions>,
}

/// Explicit and computed cost by category; computed cost counts as `ai`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CostSplit {
    /// Compute.
    pub compute: Atto,
    /// Storage.
    pub storage: Atto,
    /// Bandwidth.
    pub bandwidth: Atto,
    /// Tokens and everything else of AI.
    pub ai: Atto,
}

/// Figures of a row, all absolute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// Events counted.
    pub events: i64,
    /// Input tokens, cached and cache-write ones included.
    pub input_tokens: i64,
    /// Input tokens read from a cache.
    pub cached_input_tokens: i64,
    /// Input tokens written to the short cache.
    pub cache_write_tokens: i64,
    /// Input tokens written to the one-hour cache.
    pub cache_write_1h_tokens: i64,
    /// Output tokens, reasoning included.
    pub output_tokens: i64,
    /// Reasoning tokens.
    pub reasoning_tokens: i64,
    /// Audio tokens of the input.
    pub audio_input_tokens: i64,
    /// Audio tokens of the output.
    pub audio_output_tokens: i64,
    /// Images.
    pub images: i64,
    /// Searches.
    pub searches: i64,
    /// Cost in USD of the priced part; null when nothing in the row is priced.
    pub cost: Option<Atto>,
    /// The cost by category.
    pub costs: CostSplit,
    /// Events with a meter that no price is known for.
    pub unpriced_events: i64,
}

/// A row of spend.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpendRow {
    /// Start of the window, RFC 3339, in the org's time zone (hours in UTC); null for `all`.
    pub window_start: Option<String>,
    /// The key grouped by; null when not grouped.
    pub key: Option<String>,
    /// The figures.
    #[serde(flatten)]
    pub figures: Figures,
}

/// Up to where an answer counts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AsOf {
    /// Positions included.
    pub as_of: Positions,
    /// Committed epoch per shard asked.
    pub epochs: Vec<(ShardId, u64)>,
    /// Milliseconds since the state answered from was known to be current, the largest of the shards
    /// asked. Absent when owners answered: theirs is current by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub staleness_ms: Option<u64>,
}

impl AsOf {
    /// Joins what another shard's answer counts up to.
    pub fn join(&mut self, other: AsOf) {
        for (shard, position) in other.as_of.shards {
            self.as_of.raise(shard, position);
        }
        self.as_of.control = match (self.as_of.control, other.as_of.control) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        self.epochs.extend(other.epochs);
        self.staleness_ms = self.staleness_ms.max(other.staleness_ms);
    }
}

/// Rows, ascending by window start, then key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SpendAnswer {
    /// All rows; surfaces cut them into pages.
    pub rows: Vec<SpendRow>,
    /// Up to where they count.
    pub as_of: AsOf,
}

/// What the rows of a top list are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TopBy {
    /// Orgs.
    Org,
    /// Users, named with their org.
    User,
    /// Models over all orgs.
    Model,
    /// Features over all orgs.
    Feature,
}

/// `GET /v1/top`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopQuery {
    /// Rows.
    pub by: TopBy,
    /// Window size: `day`, `month` or `all` (`hour` for orgs only).
    pub window: Window,
    /// An instant in the window meant; the current log time when absent.
    pub at: Option<Time>,
    /// Rows wanted.
    pub n: usize,
    /// Only this org's (users, models, features).
    pub org: Option<String>,
    /// Wait until these positions are included.
    pub min_position: Option<Positions>,
}

/// A row of a top list, largest cost first, then by name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopRow {
    /// The org, when rows are orgs or users.
    pub org: Option<String>,
    /// Name of the org, user, model or feature.
    pub key: String,
    /// The figures.
    #[serde(flatten)]
    pub figures: Figures,
}

/// Usage no price is known for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnpricedRow {
    /// Provider.
    pub provider: String,
    /// Model.
    pub model: String,
    /// Service tier.
    pub tier: String,
    /// Lower bound of the context class, in input tokens.
    pub min_input_tokens: u64,
    /// Names of the meters that lack a price (`input`, `output`, `image`, `search`).
    pub lacking: Vec<String>,
    /// First 15-minute slot with such usage.
    pub first: Time,
    /// Last 15-minute slot with such usage.
    pub last: Time,
    /// Events concerned.
    pub events: i64,
}

/// An event that was not counted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadLetter {
    /// `<shard>-<epoch>-<n>`.
    pub id: String,
    /// Subject it came by.
    pub subject: String,
    /// Position in the shard's log.
    pub position: u64,
    /// Line in the message, from 1.
    pub line: u32,
    /// Reason code.
    pub reason: Reason,
    /// What was wrong, and what to do.
    pub detail: String,
    /// The bytes, as text where they are UTF-8, up to 64 KiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw: Option<String>,
    /// The bytes in base64 where they are not UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub raw_base64: Option<String>,
    /// Whether the line was longer than what is kept.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub truncated: bool,
    /// When it was replayed, if it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replayed: Option<Time>,
}

/// `GET /v1/dead-letters`, newest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DeadLetterQuery {
    /// Only of this reason.
    pub reason: Option<Reason>,
    /// Only of this shard.
    pub shard: Option<ShardId>,
    /// Only older than this one (for the next page).
    pub before: Option<String>,
    /// Rows wanted at most.
    pub limit: usize,
}

/// Lines for one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardBatch {
    /// The shard.
    pub shard: ShardId,
    /// `usage.<shard>.@batch`, or `…@backfill`.
    pub subject: String,
    /// The lines as NDJSON, each ended by a newline.
    pub payload: Bytes,
    /// Line of the request (from 1) each line came from.
    pub lines: Vec<u32>,
}

/// What became of one [`ShardBatch`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardOutcome {
    /// The shard.
    pub shard: ShardId,
    /// Position of the durable message, or why it is not durable.
    pub result: Result<u64, String>,
}

/// What changing prices does, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PriceEffect {
    /// Entries that are new or differ from what is in force.
    pub entries_changed: usize,
    /// Orgs whose cost changes.
    pub orgs: usize,
    /// Events whose cost changes.
    pub events: i64,
    /// Cost before, of the usage concerned.
    pub cost_before: Atto,
    /// Cost after.
    pub cost_after: Atto,
    /// Largest changes by org, at most 100.
    pub by_org: Vec<OrgEffect>,
    /// Up to where usage was counted.
    pub as_of: Positions,
}

/// Change of one org's cost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrgEffect {
    /// The org.
    pub org: String,
    /// Events concerned.
    pub events: i64,
    /// Cost before.
    pub cost_before: Atto,
    /// Cost after.
    pub cost_after: Atto,
}

/// A declared view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ViewDeclaration {
    /// Its name: 1–64 of `[a-z0-9_]`.
    pub name: String,
    /// Dimensions, one to four of `user`, `model`, `provider`, `feature`, `tag:NAME`. Always by org.
    pub by: Vec<String>,
    /// Window size.
    pub window: Window,
}

/// One change of a live stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StreamEvent {
    /// The whole state of the org (rows as a `change` would carry), valid at `epoch`.
    Snapshot {
        /// Shard.
        shard: ShardId,
        /// Committed epoch.
        epoch: u64,
        /// JSON body.
        body: Bytes,
    },
    /// What one commit changed for the org.
    Change {
        /// Shard.
        shard: ShardId,
        /// Committed epoch.
        epoch: u64,
        /// JSON body.
        body: Bytes,
    },
    /// The id to resume from is too old or unknown; a snapshot follows.
    Reset,
}

/// Where a stream resumes: `<shard>-<epoch>`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamId {
    /// Shard.
    pub shard: ShardId,
    /// Last epoch seen.
    pub epoch: u64,
}

/// State of one shard, for operators.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardStatus {
    /// The shard.
    pub shard: ShardId,
    /// `claim`, `seal`, `restore`, `replay`, `live`, `drain`, `released`, `stopped`; of several nodes
    /// also `unowned` (no node has it) and `away` (its owner does not answer).
    pub state: String,
    /// Why it is stopped.
    pub problem: Option<String>,
    /// Last committed epoch.
    pub epoch: u64,
    /// Last usage position committed.
    pub usage_position: u64,
    /// Last usage position durable in the log.
    pub usage_head: u64,
    /// Last control position committed.
    pub control_position: u64,
    /// Node that owns it, where there are several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<String>,
    /// What another node's shard is on the node that was asked, if anything: `opening`, or
    /// `standing by` and how many commits behind.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub here: Option<String>,
    /// Whether it is another node's, or nobody's.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub elsewhere: bool,
}

/// A node of the cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClusterNode {
    /// Its name.
    pub node: String,
    /// `up`, `draining`, `replica`, `silent` (not heard for a while), `gone` (taken to be dead) or
    /// `newer` (of a version whose entry the node that was asked cannot read).
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
    /// Records of the usage logs of its shards that no commit includes yet.
    pub lag: u64,
    /// Events a second it was measured to be able to take in, where that is known.
    pub events_per_second: Option<f64>,
}

/// A shard of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterShard {
    /// The shard.
    pub shard: ShardId,
    /// Node that owns it.
    pub owner: Option<String>,
    /// As in [`ShardStatus::state`].
    pub state: String,
    /// Why it is stopped or away.
    pub problem: Option<String>,
    /// Last committed epoch.
    pub epoch: u64,
    /// Records of its usage log that no commit includes yet.
    pub lag: u64,
    /// Node it should go to, if that is another.
    pub wanted: Option<String>,
    /// Node an operator moved it to.
    pub pinned: Option<String>,
}

/// The cluster as one node sees it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Cluster {
    /// Name of the node that was asked.
    pub node: String,
    /// All nodes, by name.
    pub nodes: Vec<ClusterNode>,
    /// All shards, by number.
    pub shards: Vec<ClusterShard>,
    /// Nodes that the load which is expected asks for, where that is known.
    pub recommended_nodes: Option<u32>,
    /// Why that many, as a sentence.
    #[serde(default)]
    pub reason: Option<String>,
    /// Events per second expected in the busiest of the next hours, at the upper quantile.
    #[serde(default)]
    pub predicted_events_per_second: Option<f64>,
    /// Events per second of work that a worker thread was measured to get done.
    #[serde(default)]
    pub service_rate_events_per_second: Option<f64>,
}

/// A wish that a node gives all its shards away and takes none, or the end of one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drain {
    /// The node.
    pub node: String,
    /// Whether it drains.
    pub drain: bool,
}

/// A wish that a shard goes to a node and stays there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Move {
    /// The shard.
    pub shard: ShardId,
    /// The node; null lets placement decide again.
    // A null must be said.
    #[serde(deserialize_with = "Option::deserialize")]
    pub node: Option<String>,
}

/// Why a request was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiError {
    /// The request is wrong.
    #[error("{0}")]
    Invalid(String),
    /// No such thing.
    #[error("{0}")]
    NotFound(String),
    /// It contradicts what is.
    #[error("{0}")]
    Conflict(String),
    /// `min_position` was not reached in time.
    #[error("position not reached in time; the current position is {current}")]
    Timeout {
        /// Where the shards asked stand.
        current: Positions,
    },
    /// Not now: starting, draining, overloaded, or a shard is stopped.
    #[error("{0}")]
    Unavailable(String),
    /// A fault of ours.
    #[error("{0}")]
    Internal(String),
}

/// Result of a request.
pub type ApiResult<T> = Result<T, ApiError>;

/// What the engine offers to every surface.
pub trait Api: Send + Sync + 'static {
    /// Number of shards.
    fn shards(&self) -> u16;

    /// Appends batches; resolves when every one is durable or has failed.
    fn publish(&self, batches: Vec<ShardBatch>) -> BoxFuture<'static, Vec<ShardOutcome>>;

    /// Spend of an org or user.
    fn spend(&self, query: SpendQuery) -> BoxFuture<'static, ApiResult<SpendAnswer>>;

    /// Largest spenders.
    fn top(&self, query: TopQuery) -> BoxFuture<'static, ApiResult<(Vec<TopRow>, AsOf)>>;

    /// Usage of an org that lacks a price.
    fn unpriced(
        &self,
        org: String,
        min_position: Option<Positions>,
    ) -> BoxFuture<'static, ApiResult<(Vec<UnpricedRow>, AsOf)>>;

    /// Dead letters, newest first, without their raw bytes.
    fn dead_letters(
        &self,
        query: DeadLetterQuery,
    ) -> BoxFuture<'static, ApiResult<Vec<DeadLetter>>>;

    /// One dead letter with its raw bytes.
    fn dead_letter(&self, id: String) -> BoxFuture<'static, ApiResult<DeadLetter>>;

    /// Publishes a dead letter's event again, or the mended line in its place; returns the position.
    fn replay_dead_letter(
        &self,
        id: String,
        mended: Option<Bytes>,
    ) -> BoxFuture<'static, ApiResult<Positions>>;

    /// The price book in force, optionally of one model.
    fn prices(
        &self,
        model: Option<String>,
    ) -> BoxFuture<'static, ApiResult<(Vec<PriceEntry>, Positions)>>;

    /// Changes prices; the position is that of the control record.
    fn set_prices(&self, entries: Vec<PriceEntry>) -> BoxFuture<'static, ApiResult<Positions>>;

    /// What changing prices would do, without doing it.
    fn preview_prices(
        &self,
        entries: Vec<PriceEntry>,
    ) -> BoxFuture<'static, ApiResult<PriceEffect>>;

    /// The org's IANA time zone.
    fn time_zone(&self, org: String) -> BoxFuture<'static, ApiResult<String>>;

    /// Changes an org's IANA time zone.
    fn set_time_zone(
        &self,
        org: String,
        time_zone: String,
    ) -> BoxFuture<'static, ApiResult<Positions>>;

    /// Declared views.
    fn views(&self) -> BoxFuture<'static, ApiResult<Vec<ViewDeclaration>>>;

    /// Declares a view, which is then kept live.
    fn declare_view(&self, view: ViewDeclaration) -> BoxFuture<'static, ApiResult<Positions>>;

    /// Removes a declared view.
    fn remove_view(&self, name: String) -> BoxFuture<'static, ApiResult<Positions>>;

    /// Rows of a declared view for one org: `key` is the JSON array of its dimensions' values.
    fn view_rows(
        &self,
        name: String,
        query: SpendQuery,
    ) -> BoxFuture<'static, ApiResult<SpendAnswer>>;

    /// Follows an org: a snapshot (or the changes since `after`), then every commit's changes. Ends
    /// when the engine drains or the subscriber is too slow.
    fn follow(
        &self,
        org: String,
        after: Option<StreamId>,
    ) -> BoxFuture<'static, ApiResult<BoxStream<'static, StreamEvent>>>;

    /// What a reader of an org's live changes lacks: everything, or what came after `after`, as the
    /// messages of an answer (see [`LiveMessage`](crate::changes::LiveMessage)).
    fn catch_up(
        &self,
        org: String,
        after: Option<StreamId>,
    ) -> BoxFuture<'static, ApiResult<Vec<Bytes>>>;

    /// State of every shard.
    fn status(&self) -> BoxFuture<'static, Vec<ShardStatus>>;

    /// The nodes, and which shard is where.
    fn cluster(&self) -> BoxFuture<'static, ApiResult<Cluster>>;

    /// Asks a node to give all its shards away and take none, or ends that. Resolves once that is
    /// recorded.
    fn drain(&self, drain: Drain) -> BoxFuture<'static, ApiResult<()>>;

    /// Moves a shard to a node and keeps it there, or lets placement decide again. Resolves once that
    /// is recorded.
    fn move_shard(&self, to: Move) -> BoxFuture<'static, ApiResult<()>>;

    /// The Prometheus text.
    fn metrics(&self) -> String;
}
