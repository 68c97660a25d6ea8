//! What is measured, as Prometheus metrics named `meterr_…` with their unit.
//!
//! Never labelled by org or user, so the number of series depends on the number of shards only.
//! Histograms carry no label at all: 256 shards times their buckets would be too many series.
//!
//! Handles are made once and kept by whoever measures; recording is an atomic operation or two. The
//! recorder is a value rather than the process-wide one, so that several nodes can live in one
//! process. A disabled [`Metrics`] hands out handles that do nothing.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use ::metrics::{
    Counter, Gauge, Histogram, NoopRecorder, Recorder, Unit, counter, describe_counter,
    describe_gauge, describe_histogram, gauge, histogram, with_local_recorder,
};
use meterr_connectors::nats::log::Figures;
use meterr_operators::event::{ALL_REASONS, Reason};
use meterr_operators::ids::ShardId;
use metrics_exporter_prometheus::{
    BuildError, Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use crate::cluster::forecast::Recommendation;
use crate::shutdown::Shutdown;

/// Events counted, by shard.
pub const EVENTS_TOTAL: &str = "meterr_events_total";
/// Lines that became dead letters, by reason.
pub const REJECTED_TOTAL: &str = "meterr_rejected_total";
/// Copies of events that were ignored.
pub const DUPLICATES_TOTAL: &str = "meterr_duplicates_total";
/// Log time of a message to the commit that shows it.
pub const EVENT_TO_VIEW_SECONDS: &str = "meterr_event_to_view_seconds";
/// Records of the usage log that no commit includes yet, by shard; 0 where it is not owned.
pub const LAG_RECORDS: &str = "meterr_lag_records";
/// Age of what a shard that stands by here shows, by shard; 0 where it does not.
pub const STALENESS_SECONDS: &str = "meterr_staleness_seconds";
/// Events of a committed epoch.
pub const EPOCH_EVENTS: &str = "meterr_epoch_events";
/// First event of an epoch to its commit.
pub const EPOCH_SECONDS: &str = "meterr_epoch_seconds";
/// Appending a commit to the output log, fsync included.
pub const COMMIT_SECONDS: &str = "meterr_commit_seconds";
/// Writing a checkpoint.
pub const CHECKPOINT_SECONDS: &str = "meterr_checkpoint_seconds";
/// Size of a checkpoint.
pub const CHECKPOINT_BYTES: &str = "meterr_checkpoint_bytes";
/// Rows of a shard's state.
pub const STATE_ROWS: &str = "meterr_state_rows";
/// Estimated memory of a shard's state.
pub const STATE_BYTES: &str = "meterr_state_bytes";
/// Share of the replay after a start that is done, 0 to 1; 1 once live.
pub const REPLAY_RATIO: &str = "meterr_replay_ratio";
/// 1 while a shard is stopped and someone must act.
pub const SHARD_STOPPED: &str = "meterr_shard_stopped";
/// Live streams open.
pub const SSE_SUBSCRIBERS: &str = "meterr_sse_subscribers";
/// Live streams ended because the reader was too slow.
pub const SSE_TOO_SLOW_TOTAL: &str = "meterr_sse_too_slow_total";
/// 1 while connected to NATS.
pub const NATS_CONNECTED: &str = "meterr_nats_connected";
/// Connections to NATS made after the first.
pub const NATS_RECONNECTS_TOTAL: &str = "meterr_nats_reconnects_total";
/// Appends and commits sent again since their acknowledgement did not come.
pub const NATS_RETRIES_TOTAL: &str = "meterr_nats_retries_total";
/// Commits found to stand although their acknowledgement did not come.
pub const NATS_COMMITS_LANDED_TOTAL: &str = "meterr_nats_commits_landed_total";
/// Commits refused since another node had committed.
pub const NATS_COMMITS_REFUSED_TOTAL: &str = "meterr_nats_commits_refused_total";
/// Reads answered by a replica that was behind.
pub const NATS_STALE_READS_TOTAL: &str = "meterr_nats_stale_reads_total";
/// Consumers made anew after an error, silence or a reconnection.
pub const NATS_CONSUMERS_RENEWED_TOTAL: &str = "meterr_nats_consumers_renewed_total";
/// Nodes that the load calls for.
pub const RECOMMENDED_NODES: &str = "meterr_recommended_nodes";
/// Events per second expected in the next hours, at the upper quantile.
pub const PREDICTED_EVENTS_PER_SECOND: &str = "meterr_predicted_events_per_second";
/// Events a worker thread gets done in a second of work.
pub const SERVICE_RATE_EVENTS_PER_SECOND: &str = "meterr_service_rate_events_per_second";
/// Resident memory of the process.
pub const RESIDENT_MEMORY_BYTES: &str = "meterr_process_resident_memory_bytes";
/// 1, labelled with the version.
pub const BUILD_INFO: &str = "meterr_build_info";

/// Between two runs of [`Metrics::keep_up`]. Histograms collect raw values until then.
pub const UPKEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Upper bounds of latencies in seconds: half a millisecond to a minute.
const LATENCY_BUCKETS: [f64; 16] = [
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0,
];
/// Upper bounds of an epoch's events.
const EPOCH_EVENTS_BUCKETS: [f64; 10] =
    [1.0, 10.0, 30.0, 100.0, 300.0, 1_000.0, 3_000.0, 10_000.0, 30_000.0, 100_000.0];
/// Upper bounds of a checkpoint's bytes: 1 KiB to 16 GiB.
const CHECKPOINT_BYTES_BUCKETS: [f64; 9] = [
    1024.0,
    16_384.0,
    262_144.0,
    1_048_576.0,
    16_777_216.0,
    67_108_864.0,
    268_435_456.0,
    1_073_741_824.0,
    17_179_869_184.0,
];

/// The metrics of one node. Cloning shares them.
#[derive(Clone)]
pub struct Metrics {
    recorder: Option<Arc<PrometheusRecorder>>,
    handle: Option<PrometheusHandle>,
    node: NodeMetrics,
    /// Reads what the connection to NATS counts, if there is one.
    nats: Arc<OnceLock<NatsWatch>>,
    /// Measures what is measured when it is shown.
    before: Arc<OnceLock<Box<dyn Fn() + Send + Sync>>>,
}

/// What a node measures once.
#[derive(Clone)]
pub struct NodeMetrics {
    resident_memory: Gauge,
    sse_subscribers: Gauge,
    sse_too_slow: Counter,
    recommended_nodes: Gauge,
    predicted: Gauge,
    service_rate: Gauge,
}

/// What one shard measures. Cheap enough for its hot loop.
#[derive(Clone)]
pub struct ShardMetrics {
    events: Counter,
    duplicates: Counter,
    rejected: [Counter; ALL_REASONS.len()],
    event_to_view: Histogram,
    lag: Gauge,
    staleness: Gauge,
    epoch_events: Histogram,
    epoch_seconds: Histogram,
    commit_seconds: Histogram,
    checkpoint_seconds: Histogram,
    checkpoint_bytes: Histogram,
    state_rows: Gauge,
    state_bytes: Gauge,
    replay: Gauge,
    stopped: Gauge,
}

impl Metrics {
    /// Metrics that are measured, or that cost nothing.
    pub fn new(enabled: bool) -> Metrics {
        if !enabled {
            let node = with_local_recorder(&NoopRecorder, NodeMetrics::new);
            return Metrics {
                recorder: None,
                handle: None,
                node,
                nats: Arc::default(),
                before: Arc::default(),
            };
        }
        let recorder = builder().expect("buckets are constants and not empty").build_recorder();
        let handle = recorder.handle();
        let node = with_local_recorder(&recorder, || {
            describe();
            gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
            NodeMetrics::new()
        });
        let (recorder, nats) = (Some(Arc::new(recorder)), Arc::default());
        Metrics { recorder, handle: Some(handle), node, nats, before: Arc::default() }
    }

    /// Shows from now on what a connection to NATS counts.
    pub fn watch_nats(&self, read: impl Fn() -> Figures + Send + Sync + 'static) {
        let metrics = with_local_recorder(self.recorder(), NatsMetrics::new);
        // A node has one connection.
        let _ = self.nats.set(NatsWatch { metrics, read: Box::new(read) });
    }

    /// Measures something whenever metrics are shown. Only the first one given is kept.
    pub fn before_shown(&self, measure: impl Fn() + Send + Sync + 'static) {
        let _ = self.before.set(Box::new(measure));
    }

    /// Handles of a shard. Asking twice gives the same series.
    pub fn shard(&self, shard: ShardId) -> ShardMetrics {
        with_local_recorder(self.recorder(), || ShardMetrics::new(shard))
    }

    /// Makes handles that are shown here.
    pub fn made<T>(&self, make: impl FnOnce() -> T) -> T {
        with_local_recorder(self.recorder(), make)
    }

    /// What the node measures once.
    pub fn node(&self) -> &NodeMetrics {
        &self.node
    }

    /// The Prometheus text; empty when disabled.
    pub fn render(&self) -> String {
        let Some(handle) = &self.handle else { return String::new() };
        if let Some(bytes) = resident_memory() {
            self.node.resident_memory.set(bytes as f64);
        }
        if let Some(measure) = self.before.get() {
            measure();
        }
        if let Some(watch) = self.nats.get() {
            watch.metrics.show(&(watch.read)());
        }
        handle.render()
    }

    /// Sorts what histograms collected into buckets. Without it they grow until the next
    /// [`Metrics::render`].
    pub fn upkeep(&self) {
        if let Some(handle) = &self.handle {
            handle.run_upkeep();
        }
    }

    /// Calls [`Metrics::upkeep`] every [`UPKEEP_INTERVAL`] until shut down.
    pub async fn keep_up(self, mut shutdown: Shutdown) {
        let mut interval = tokio::time::interval(UPKEEP_INTERVAL);
        loop {
            tokio::select! {
                () = shutdown.wait() => return,
                _ = interval.tick() => self.upkeep(),
            }
        }
    }

    fn recorder(&self) -> &dyn Recorder {
        match &self.recorder {
            Some(recorder) => recorder.as_ref(),
            None => &NoopRecorder,
        }
    }
}

struct NatsWatch {
    metrics: NatsMetrics,
    read: Box<dyn Fn() -> Figures + Send + Sync>,
}

struct NatsMetrics {
    connected: Gauge,
    counters: [Counter; 6],
}

impl NatsMetrics {
    fn new() -> NatsMetrics {
        describe_gauge!(NATS_CONNECTED, "1 while connected to NATS");
        let counted = [
            (NATS_RECONNECTS_TOTAL, "connections to NATS made after the first"),
            (NATS_RETRIES_TOTAL, "appends and commits sent again"),
            (NATS_COMMITS_LANDED_TOTAL, "commits found to stand without an acknowledgement"),
            (NATS_COMMITS_REFUSED_TOTAL, "commits refused since another node had committed"),
            (NATS_STALE_READS_TOTAL, "reads answered by a replica that was behind"),
            (NATS_CONSUMERS_RENEWED_TOTAL, "consumers made anew"),
        ];
        let counters = counted.map(|(name, what)| {
            describe_counter!(name, Unit::Count, what);
            counter!(name)
        });
        NatsMetrics { connected: gauge!(NATS_CONNECTED), counters }
    }

    fn show(&self, figures: &Figures) {
        self.connected.set(f64::from(u8::from(figures.connected)));
        let Figures { reconnects, retries, landed, refused, stale_reads, consumers, .. } = *figures;
        let values = [reconnects, retries, landed, refused, stale_reads, consumers];
        for (counter, value) in self.counters.iter().zip(values) {
            counter.absolute(value);
        }
    }
}

impl NodeMetrics {
    fn new() -> NodeMetrics {
        NodeMetrics {
            resident_memory: gauge!(RESIDENT_MEMORY_BYTES),
            sse_subscribers: gauge!(SSE_SUBSCRIBERS),
            sse_too_slow: counter!(SSE_TOO_SLOW_TOTAL),
            recommended_nodes: gauge!(RECOMMENDED_NODES),
            predicted: gauge!(PREDICTED_EVENTS_PER_SECOND),
            service_rate: gauge!(SERVICE_RATE_EVENTS_PER_SECOND),
        }
    }

    /// Live streams open now.
    pub fn sse_subscribers(&self, open: usize) {
        self.sse_subscribers.set(open as f64);
    }

    /// How many nodes the load calls for. What is not known yet is 0.
    pub fn forecast(&self, found: &Recommendation) {
        self.recommended_nodes.set(f64::from(found.recommended_nodes));
        self.predicted.set(found.predicted_events_per_second.unwrap_or(0.0));
        self.service_rate.set(found.service_rate_events_per_second.unwrap_or(0.0));
    }

    /// A live stream was ended because its reader was too slow.
    pub fn sse_too_slow(&self) {
        self.sse_too_slow.increment(1);
    }
}

impl ShardMetrics {
    fn new(shard: ShardId) -> ShardMetrics {
        let shard = shard.to_string();
        let label = || shard.clone();
        ShardMetrics {
            events: counter!(EVENTS_TOTAL, "shard" => label()),
            duplicates: counter!(DUPLICATES_TOTAL),
            rejected: ALL_REASONS.map(|reason| counter!(REJECTED_TOTAL, "reason" => reason.name())),
            event_to_view: histogram!(EVENT_TO_VIEW_SECONDS),
            lag: gauge!(LAG_RECORDS, "shard" => label()),
            staleness: gauge!(STALENESS_SECONDS, "shard" => label()),
            epoch_events: histogram!(EPOCH_EVENTS),
            epoch_seconds: histogram!(EPOCH_SECONDS),
            commit_seconds: histogram!(COMMIT_SECONDS),
            checkpoint_seconds: histogram!(CHECKPOINT_SECONDS),
            checkpoint_bytes: histogram!(CHECKPOINT_BYTES),
            state_rows: gauge!(STATE_ROWS, "shard" => label()),
            state_bytes: gauge!(STATE_BYTES, "shard" => label()),
            replay: gauge!(REPLAY_RATIO, "shard" => label()),
            stopped: gauge!(SHARD_STOPPED, "shard" => label()),
        }
    }

    /// Events taken into the views.
    pub fn events(&self, n: u64) {
        self.events.increment(n);
    }

    /// Copies ignored.
    pub fn duplicates(&self, n: u64) {
        self.duplicates.increment(n);
    }

    /// Lines that became dead letters.
    pub fn rejected(&self, reason: Reason, n: u64) {
        // The discriminant is the place in ALL_REASONS; a test holds them together.
        self.rejected[reason as usize].increment(n);
    }

    /// A message was committed this long after the log took it. Once a message, not once an event:
    /// all events of a message share its log time, and the recorder keeps every value till upkeep.
    pub fn event_to_view(&self, latency: Duration) {
        self.event_to_view.record(latency);
    }

    /// Records of the log that no commit includes yet.
    pub fn lag(&self, records: u64) {
        self.lag.set(records as f64);
    }

    /// What is shown of the shard is this old; infinitely where it never was known to be current.
    pub fn staleness(&self, age: Option<Duration>) {
        self.staleness.set(age.map_or(f64::INFINITY, |age| age.as_secs_f64()));
    }

    /// An epoch of `events` events was committed, `age` after its first event came and with an
    /// append of its commit (fsync included) that took `commit`.
    pub fn epoch(&self, events: u64, age: Duration, commit: Duration) {
        self.epoch_events.record(events as f64);
        self.epoch_seconds.record(age);
        self.commit_seconds.record(commit);
    }

    /// A checkpoint was written.
    pub fn checkpoint(&self, took: Duration, bytes: u64) {
        self.checkpoint_seconds.record(took);
        self.checkpoint_bytes.record(bytes as f64);
    }

    /// Size of the state.
    pub fn state(&self, rows: u64, bytes: u64) {
        self.state_rows.set(rows as f64);
        self.state_bytes.set(bytes as f64);
    }

    /// A replay is at `position` on its way from `from` to `to`.
    pub fn replay(&self, from: u64, position: u64, to: u64) {
        let whole = to.saturating_sub(from);
        let done = position.saturating_sub(from).min(whole);
        self.replay.set(if whole == 0 { 1.0 } else { done as f64 / whole as f64 });
    }

    /// The shard is stopped, or runs.
    pub fn stopped(&self, stopped: bool) {
        self.stopped.set(f64::from(u8::from(stopped)));
    }
}

fn builder() -> Result<PrometheusBuilder, BuildError> {
    let of = |name: &str| Matcher::Full(name.to_owned());
    let mut builder = PrometheusBuilder::new();
    for name in [EVENT_TO_VIEW_SECONDS, EPOCH_SECONDS, COMMIT_SECONDS, CHECKPOINT_SECONDS] {
        builder = builder.set_buckets_for_metric(of(name), &LATENCY_BUCKETS)?;
    }
    builder
        .set_buckets_for_metric(of(EPOCH_EVENTS), &EPOCH_EVENTS_BUCKETS)?
        .set_buckets_for_metric(of(CHECKPOINT_BYTES), &CHECKPOINT_BYTES_BUCKETS)
}

fn describe() {
    describe_counter!(EVENTS_TOTAL, Unit::Count, "events taken into the views");
    describe_counter!(REJECTED_TOTAL, Unit::Count, "lines that became dead letters");
    describe_counter!(DUPLICATES_TOTAL, Unit::Count, "copies of events that were ignored");
    describe_histogram!(
        EVENT_TO_VIEW_SECONDS,
        Unit::Seconds,
        "log time of a message to the commit that shows it"
    );
    describe_gauge!(
        STALENESS_SECONDS,
        Unit::Seconds,
        "age of what a shard that stands by shows, 0 where it is owned"
    );
    describe_gauge!(LAG_RECORDS, Unit::Count, "log records that no commit includes yet");
    describe_histogram!(EPOCH_EVENTS, Unit::Count, "events of a committed epoch");
    describe_histogram!(EPOCH_SECONDS, Unit::Seconds, "first event of an epoch to its commit");
    describe_histogram!(COMMIT_SECONDS, Unit::Seconds, "append of a commit, fsync included");
    describe_histogram!(CHECKPOINT_SECONDS, Unit::Seconds, "writing a checkpoint");
    describe_histogram!(CHECKPOINT_BYTES, Unit::Bytes, "size of a checkpoint");
    describe_gauge!(STATE_ROWS, Unit::Count, "rows of a shard's state");
    describe_gauge!(STATE_BYTES, Unit::Bytes, "estimated memory of a shard's state");
    describe_gauge!(REPLAY_RATIO, "share of the replay that is done, 1 once live");
    describe_gauge!(SHARD_STOPPED, "1 while a shard is stopped and someone must act");
    describe_gauge!(SSE_SUBSCRIBERS, Unit::Count, "live streams open");
    describe_counter!(SSE_TOO_SLOW_TOTAL, Unit::Count, "live streams ended as too slow");
    describe_gauge!(RECOMMENDED_NODES, Unit::Count, "nodes that the load calls for, 0 if unknown");
    describe_gauge!(
        PREDICTED_EVENTS_PER_SECOND,
        "events per second expected in the next hours at the upper quantile, 0 if unknown"
    );
    describe_gauge!(
        SERVICE_RATE_EVENTS_PER_SECOND,
        "events a worker thread gets done in a second of work, 0 if unknown"
    );
    describe_gauge!(RESIDENT_MEMORY_BYTES, Unit::Bytes, "resident memory of the process");
    describe_gauge!(BUILD_INFO, "1, labelled with the version");
}

/// Resident memory as Linux tells it; nothing elsewhere.
fn resident_memory() -> Option<u64> {
    resident_of(&std::fs::read_to_string("/proc/self/status").ok()?)
}

/// Reads `VmRSS:     1234 kB`; the kernel's kB are KiB.
fn resident_of(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_named_with_units_and_never_by_org_or_user() {
        let metrics = Metrics::new(true);
        let shard = metrics.shard(ShardId(3));
        shard.events(7);
        metrics.shard(ShardId(3)).events(1);
        shard.duplicates(2);
        shard.rejected(Reason::TooLate, 4);
        shard.lag(5);
        shard.event_to_view(Duration::from_millis(12));
        shard.event_to_view(Duration::from_secs(100));
        shard.epoch(100, Duration::from_millis(20), Duration::from_millis(1));
        shard.checkpoint(Duration::from_secs(1), 2000);
        shard.state(10, 1000);
        shard.replay(100, 150, 200);
        metrics.node().sse_subscribers(2);
        metrics.node().forecast(&Recommendation {
            recommended_nodes: 3,
            reason: String::new(),
            predicted_events_per_second: Some(1.5),
            service_rate_events_per_second: None,
        });
        let text = metrics.render();
        for line in [
            "meterr_events_total{shard=\"3\"} 8",
            "meterr_duplicates_total 2",
            "meterr_rejected_total{reason=\"too_late\"} 4",
            "meterr_rejected_total{reason=\"malformed\"} 0",
            "meterr_lag_records{shard=\"3\"} 5",
            "meterr_event_to_view_seconds_bucket{le=\"0.01\"} 0",
            "meterr_event_to_view_seconds_bucket{le=\"0.02\"} 1",
            "meterr_event_to_view_seconds_bucket{le=\"+Inf\"} 2",
            "meterr_event_to_view_seconds_count 2",
            "meterr_epoch_events_bucket{le=\"100\"} 1",
            "meterr_checkpoint_bytes_bucket{le=\"1024\"} 0",
            "meterr_checkpoint_bytes_bucket{le=\"16384\"} 1",
            "meterr_state_rows{shard=\"3\"} 10",
            "meterr_replay_ratio{shard=\"3\"} 0.5",
            "meterr_sse_subscribers 2",
            "meterr_recommended_nodes 3",
            "meterr_predicted_events_per_second 1.5",
            "meterr_service_rate_events_per_second 0",
            "# TYPE meterr_event_to_view_seconds histogram",
            "# HELP meterr_lag_records log records that no commit includes yet",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line:?} in\n{text}");
        }
        assert!(text.contains("meterr_build_info{version="));
        for line in text.lines() {
            let name = line.trim_start_matches("# HELP ").trim_start_matches("# TYPE ");
            assert!(line.is_empty() || name.starts_with("meterr_"), "{line}");
            assert!(!line.contains("org=") && !line.contains("user="), "{line}");
        }
    }

    #[test]
    fn two_nodes_in_one_process_do_not_mix() {
        let (one, other) = (Metrics::new(true), Metrics::new(true));
        one.shard(ShardId(0)).events(5);
        other.shard(ShardId(0)).events(7);
        assert!(one.render().contains("meterr_events_total{shard=\"0\"} 5"));
        assert!(other.render().contains("meterr_events_total{shard=\"0\"} 7"));
    }

    #[test]
    fn disabled_metrics_do_nothing() {
        let metrics = Metrics::new(false);
        let shard = metrics.shard(ShardId(0));
        shard.events(1);
        shard.event_to_view(Duration::from_secs(1));
        metrics.upkeep();
        assert_eq!(metrics.render(), "");
    }

    #[test]
    fn reasons_stand_where_their_discriminant_says() {
        for (at, reason) in ALL_REASONS.into_iter().enumerate() {
            assert_eq!(reason as usize, at, "{}", reason.name());
        }
    }

    #[test]
    fn replay_ends_at_one() {
        let metrics = Metrics::new(true);
        let ratio = |from, position, to| {
            metrics.shard(ShardId(1)).replay(from, position, to);
            let text = metrics.render();
            let line = text.lines().find(|line| line.starts_with("meterr_replay_ratio{")).unwrap();
            line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()
        };
        assert_eq!((ratio(5, 5, 5), ratio(0, 0, 4), ratio(0, 9, 4)), (1.0, 0.0, 1.0));
    }

    #[test]
    fn resident_memory_is_read_from_the_kernels_text() {
        assert_eq!(resident_of("VmPeak:\t 9 kB\nVmRSS:\t  1234 kB\n"), Some(1234 * 1024));
        assert_eq!(resident_of("VmRSS:\t x kB\n"), None);
        assert_eq!(resident_of(""), None);
    }
}
