//! What the tests of a whole shard share.

use std::sync::Arc;
use std::time::Duration;

use meterr_connectors::checkpoint::CheckpointStore;
use meterr_engine::epoch::Limits;
use meterr_engine::live::{Checkpointing, Logs, Progress, ShardSpec};
use meterr_operators::event::HashKey;
use meterr_operators::ids::ShardId;
use meterr_operators::rollup::ViewSet;
use tokio::sync::watch;

/// The only shard of a deployment. Epochs close at `events_max`, never by time, and checkpoints are
/// taken only when asked for, so that a run depends on its seed alone.
pub fn only_shard(
    logs: Logs,
    checkpoints: Arc<dyn CheckpointStore>,
    events_max: usize,
) -> ShardSpec {
    let never = Duration::from_secs(3600);
    ShardSpec {
        id: ShardId(0),
        shards: 1,
        key: HashKey([7; 16]),
        logs,
        checkpoints,
        views: ViewSet::DEFAULT,
        limits: Limits { events_max, age_max: never, age_max_loaded: never },
        checkpointing: Checkpointing { interval: never, updates_max: usize::MAX, base_ratio: 0.5 },
        time_jump_max: i64::MAX,
        progress: watch::channel(Progress::default()).0,
        announcer: None,
        shared_checkpoints: false,
    }
}
