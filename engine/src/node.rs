//! A node: logs, checkpoint store, worker threads and shards of one data directory, run by actors.
//!
//! Start: take the directory's lock, open the logs (files in it, or streams of NATS), seed the control
//! log if it is empty, open the checkpoint store, start worker threads, then let every shard open itself,
//! or in a cluster those that leases name. Stop: readers first, then every shard finishes what came in and
//! takes a last checkpoint, then threads, store and logs.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use meterr_connectors::api::ShardStatus;
use meterr_connectors::checkpoint::{CheckpointError, CheckpointStore};
use meterr_connectors::embedded::{
    DataDirLock, EmbeddedLog, EmbeddedOptions, FileSystem, LockError, RealFs, RecoveryReport,
    unfinished_copy,
};
use meterr_connectors::layered_checkpoints::Layered;
use meterr_connectors::log::{Log, LogError, Message, system_clock};
use meterr_connectors::nats::streams::Wanted;
use meterr_connectors::nats::subjects;
use meterr_connectors::sled::{SledOptions, SledStore};
use meterr_operators::control::{
    ControlChange, HorizonChange, PricesChange, Seed, TimeZoneChange, ViewDeclared,
};
use meterr_operators::event::HashKey;
use meterr_operators::ids::ShardId;
use meterr_operators::price_book::PriceList;
use meterr_operators::rollup::ViewSet;
use meterr_operators::time::Time;
use meterr_operators::window::tzdb_version;
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

use crate::cluster::link::ClusterLink;
use crate::cluster::scaling::Measured;
use crate::control_state::ControlState;
use crate::live::{Logs, Progress, ShardSpec, StopReason};
use crate::metrics::Metrics;
use crate::nats::Nats;
use crate::records::control_changes;
use crate::settings::Settings;
use crate::snapshot;
use crate::tails::Tails;

/// Version of the decoders of usage messages.
pub const DECODER: u32 = 1;

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The data directory is taken.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// A log cannot be opened or written.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The checkpoint store cannot be opened.
    #[error(transparent)]
    Checkpoints(#[from] CheckpointError),
    /// The control log does not fit.
    #[error(transparent)]
    Control(#[from] StopReason),
    /// The system refuses something.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// The failure.
        #[source]
        source: std::io::Error,
    },
    /// Settings and data disagree, or something needs an operator's word.
    #[error("{0}")]
    Refused(String),
}

/// Time of day now.
pub fn now() -> Time {
    system_clock()()
}

/// The opened data directory.
pub struct Data {
    /// Logs by shard.
    pub logs: Vec<Logs>,
    /// What keeps them open.
    keeper: Keeper,
    /// Checkpoints.
    pub checkpoints: Arc<dyn CheckpointStore>,
    /// State of the control log.
    pub control: ControlState,
    _lock: DataDirLock,
}

/// What keeps the logs.
enum Keeper {
    /// Files of this process; to be closed.
    Embedded(Vec<Arc<EmbeddedLog>>),
    /// NATS.
    Nats(Box<Nats>),
}

/// Random bytes of the system.
pub(crate) fn random_bytes() -> Result<[u8; 16], NodeError> {
    use std::io::Read;
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .map_err(|source| NodeError::Io { what: "cannot read /dev/urandom".to_owned(), source })?;
    Ok(bytes)
}

/// Newest records of each log kept in memory. Enough for a shard that keeps up; one that does not
/// reads from the page cache. A deployment of 16 shards has 33 logs.
const TAIL_BYTES: usize = 1024 * 1024;

fn open_log(
    dir: &Path,
    stream: &str,
    settings: &Settings,
    fs: &Arc<dyn FileSystem>,
) -> Result<Arc<EmbeddedLog>, NodeError> {
    let options = EmbeddedOptions {
        segment_bytes: settings.log.segment_bytes,
        tail_bytes: TAIL_BYTES,
        ..EmbeddedOptions::default()
    };
    let (log, report) =
        EmbeddedLog::open(&dir.join(stream), stream, options, fs.clone(), system_clock())?;
    say(stream, &report);
    Ok(log)
}

fn say(stream: &str, report: &RecoveryReport) {
    if report.cut_bytes > 0 {
        let bytes = report.cut_bytes;
        tracing::warn!(stream, bytes, "cut a torn end off the log; nothing of it was acknowledged");
    }
    for damage in &report.damaged {
        let (place, from, to) = (&damage.place, damage.from, damage.resume.saturating_sub(1));
        tracing::error!(stream, place, from, to, "log is damaged; these records cannot be read");
    }
}

impl Data {
    /// Opens or creates a data directory.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn open(settings: &Settings, accept_time_jump: bool) -> Result<Data, NodeError> {
        Data::open_on(settings, accept_time_jump, Arc::new(RealFs))
    }

    /// The same on another file system (for the logs), to test failing disks.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn open_on(
        settings: &Settings,
        accept_time_jump: bool,
        fs: Arc<dyn FileSystem>,
    ) -> Result<Data, NodeError> {
        let dir = &settings.node.data_dir;
        let lock = DataDirLock::acquire(dir)?;
        match &settings.nats {
            Some(nats) => {
                let nats = Nats::connect(nats)?;
                let open = |wanted: &Wanted| {
                    // A replica only reads, so another region's mirrors will do.
                    let mirror = settings.cluster.replica.then(|| wanted.clone().or_mirror());
                    let log: Arc<dyn Log> = Arc::new(nats.open(mirror.as_ref().unwrap_or(wanted))?);
                    Ok(log)
                };
                let (control, usage, out) = nats.wanted();
                let (logs, state) = open_logs(settings, control, usage, out, open)?;
                nats.check_mapping(logs.len() as u16)?;
                let (server, streams) = (nats.shown(), 2 * logs.len() + 1);
                tracing::info!(server, streams, "logs are on NATS");
                Data::with(
                    settings,
                    accept_time_jump,
                    lock,
                    logs,
                    state,
                    Keeper::Nats(Box::new(nats)),
                )
            }
            None => {
                let listed = unfinished_copy(&*fs, dir).map_err(|source| {
                    let what = format!("cannot list {}", dir.display());
                    NodeError::Io { what, source }
                })?;
                if listed {
                    return Err(NodeError::Refused(format!(
                        "{dir:?} holds a copy of a deployment that was not finished; run the same \
                         `meterr log copy` or `meterr backup restore` again, which goes on where it \
                         stopped"
                    )));
                }
                let log_dir = dir.join("log");
                let mut embedded = Vec::new();
                let open = |stream: &String| {
                    let log = open_log(&log_dir, stream, settings, &fs)?;
                    embedded.push(log.clone());
                    let log: Arc<dyn Log> = log;
                    Ok(log)
                };
                let (logs, state) = open_logs(
                    settings,
                    subjects::CONTROL_STREAM.to_owned(),
                    subjects::usage_stream,
                    subjects::out_stream,
                    open,
                )?;
                let keeper = Keeper::Embedded(embedded);
                Data::with(settings, accept_time_jump, lock, logs, state, keeper)
            }
        }
    }

    fn with(
        settings: &Settings,
        accept_time_jump: bool,
        lock: DataDirLock,
        logs: Vec<Logs>,
        control: ControlState,
        keeper: Keeper,
    ) -> Result<Data, NodeError> {
        if !accept_time_jump {
            check_clock(settings, &logs)?;
        }
        let dir = &settings.node.data_dir;
        let options = SledOptions {
            cache_bytes: settings.checkpoint.cache_bytes,
            ..SledOptions::new(dir.join("checkpoints"), snapshot::FORMAT)
        };
        let (store, report) = SledStore::open(options)?;
        for notice in report.notices() {
            tracing::error!(notice, "checkpoint store; what is missing is rebuilt from the log");
        }
        let local = Arc::new(store);
        let checkpoints: Arc<dyn CheckpointStore> = match &keeper {
            Keeper::Embedded(_) => local,
            Keeper::Nats(nats) => Arc::new(Layered::new(local, Arc::new(nats.checkpoints()?))),
        };
        Ok(Data { logs, keeper, checkpoints, control, _lock: lock })
    }

    /// The connection to NATS, if the logs are there.
    pub fn nats(&self) -> Option<&Nats> {
        match &self.keeper {
            Keeper::Nats(nats) => Some(nats),
            Keeper::Embedded(_) => None,
        }
    }

    /// Key of the hashes.
    pub fn hash_key(&self) -> HashKey {
        self.control.seed.as_ref().expect("opening seeds the control log").hash_key
    }

    /// What each shard needs to be opened, and where its progress is seen.
    pub fn specs(
        &self,
        settings: &Settings,
        accept_time_jump: bool,
    ) -> Vec<(ShardSpec, watch::Receiver<Progress>)> {
        let shards = self.logs.len() as u16;
        let time_jump_max =
            if accept_time_jump { i64::MAX } else { settings.log.time_jump_max.as_micros() as i64 };
        let spec = |(shard, logs): (usize, &Logs)| {
            let (progress, seen) = watch::channel(Progress::default());
            let spec = ShardSpec {
                id: ShardId(shard as u16),
                shards,
                key: self.hash_key(),
                logs: logs.clone(),
                checkpoints: self.checkpoints.clone(),
                views: ViewSet::DEFAULT,
                limits: (&settings.epoch).into(),
                checkpointing: (&settings.checkpoint).into(),
                time_jump_max,
                progress,
                announcer: self.nats().map(Nats::announcer),
                shared_checkpoints: self.nats().is_some(),
            };
            (spec, seen)
        };
        self.logs.iter().enumerate().map(spec).collect()
    }

    /// Makes what was appended durable and closes the logs.
    ///
    /// # Errors
    /// When a log had failed.
    pub fn close(self) -> Result<(), NodeError> {
        match self.keeper {
            Keeper::Embedded(logs) => logs.iter().try_for_each(|log| log.close())?,
            Keeper::Nats(nats) => nats.close(),
        }
        Ok(())
    }
}

/// Opens the logs of a deployment, which begins if its control log is empty.
fn open_logs<W>(
    settings: &Settings,
    control: W,
    usage: impl Fn(ShardId) -> W,
    out: impl Fn(ShardId) -> W,
    mut open: impl FnMut(&W) -> Result<Arc<dyn Log>, NodeError>,
) -> Result<(Vec<Logs>, ControlState), NodeError> {
    let control = open(&control)?;
    seed(settings, &*control)?;
    let mut state = ControlState::default();
    for (position, change) in control_changes(&*control, 1, None)? {
        state.apply(position, &change).map_err(NodeError::Refused)?;
    }
    let shards = state.seed.as_ref().map_or(settings.node.shards, |seed| seed.shards);
    if shards != settings.node.shards {
        return Err(NodeError::Refused(format!(
            "node.shards is {}, but this deployment was made with {shards}, which never changes; set \
             node.shards = {shards}",
            settings.node.shards
        )));
    }
    check_versions(&state)?;
    let mut logs = Vec::new();
    for shard in (0..shards).map(ShardId) {
        let (usage, out) = (open(&usage(shard))?, open(&out(shard))?);
        logs.push(Logs { usage, control: control.clone(), out });
    }
    Ok((logs, state))
}

/// Log time follows this machine's clock. A clock that is wrong by days would make the shards forget
/// ids and refuse events, so a long gap needs somebody's word.
fn check_clock(settings: &Settings, logs: &[Logs]) -> Result<(), NodeError> {
    let last = logs.iter().filter_map(|logs| logs.usage.last_time()).max();
    let most = settings.log.time_jump_max.as_micros() as i64;
    match last {
        Some(last) if now().0 > last.0.saturating_add(most) => Err(NodeError::Refused(format!(
            "the log ends at {last} and this machine's clock says {}; if the clock is right, start \
             with --accept-time-jump",
            now()
        ))),
        _ => Ok(()),
    }
}

fn check_versions(state: &ControlState) -> Result<(), NodeError> {
    let Some(seed) = &state.seed else { return Ok(()) };
    if seed.decoder > DECODER {
        return Err(NodeError::Refused(format!(
            "this data directory uses decoder {}, this binary has {DECODER}; use a newer meterr",
            seed.decoder
        )));
    }
    if seed.tzdb != tzdb_version() {
        tracing::warn!(
            logged = seed.tzdb,
            compiled_in = tzdb_version(),
            "another time zone database than the data directory began with; days of zones whose rules \
             changed are cut anew"
        );
    }
    Ok(())
}

/// Begins an empty control log with what the settings say. Later the log is the truth.
fn seed(settings: &Settings, control: &dyn Log) -> Result<(), NodeError> {
    loop {
        futures::executor::block_on(control.refresh())?;
        let known = control_changes(control, 1, None)?;
        if known.iter().any(|(_, change)| matches!(change, ControlChange::Seed(_))) {
            return Ok(());
        }
        let head = known.last().map_or(0, |(position, _)| *position);
        let begun = control.append_at(beginning(settings)?, head);
        match futures::executor::block_on(begun) {
            Ok(_) => return Ok(()),
            // Another node began at the same moment.
            Err(LogError::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The first records of a control log.
fn beginning(settings: &Settings) -> Result<Vec<Message>, NodeError> {
    let mut changes = vec![
        ControlChange::Horizon(HorizonChange { seconds: settings.seed.horizon.as_secs() }),
        ControlChange::Prices(PricesChange { prices: seed_prices(settings)? }),
    ];
    for (org, time_zone) in &settings.seed.time_zones {
        let (org, time_zone) = (org.clone(), time_zone.clone());
        changes.push(ControlChange::TimeZone(TimeZoneChange { org, time_zone }));
    }
    for view in &settings.views.declare {
        changes.push(ControlChange::View(declared(view).map_err(NodeError::Refused)?));
    }
    changes.retain(|change| !matches!(change, ControlChange::Prices(p) if p.prices.is_empty()));
    // Last: a crash may keep a prefix of an append. Without the seed record it all is said again,
    // which changes nothing where it was said before.
    changes.push(ControlChange::Seed(Seed {
        shards: settings.node.shards,
        decoder: DECODER,
        tzdb: tzdb_version().to_owned(),
        hash_key: HashKey(random_bytes()?),
    }));
    let mut messages = Vec::new();
    for change in changes {
        let bytes = change.to_bytes();
        ControlChange::parse(&bytes).map_err(NodeError::Refused)?;
        messages.push(Message::new(subjects::CONTROL_SUBJECT, bytes));
    }
    Ok(messages)
}

/// A declaration as a control record.
///
/// # Errors
/// A sentence naming the wrong dimension.
pub fn declared(view: &meterr_connectors::api::ViewDeclaration) -> Result<ViewDeclared, String> {
    use meterr_connectors::api::Window;
    use meterr_operators::control::WindowSize;
    let by = view.by.iter().map(|d| d.parse()).collect::<Result<Vec<_>, _>>()?;
    let window = match view.window {
        Window::Hour => WindowSize::Hour,
        Window::Day => WindowSize::Day,
        Window::Month => WindowSize::Month,
        Window::All => WindowSize::All,
    };
    Ok(ViewDeclared { name: view.name.clone(), by, window })
}

/// The price book that comes with meterr.
pub const PRICE_BOOK: &str = include_str!("../../config/price_book.toml");

fn seed_prices(
    settings: &Settings,
) -> Result<Vec<meterr_operators::price_book::PriceEntry>, NodeError> {
    let text = match &settings.seed.prices {
        None => PRICE_BOOK.to_owned(),
        Some(path) => std::fs::read_to_string(path).map_err(|source| NodeError::Io {
            what: format!("cannot read the price book {path:?}"),
            source,
        })?,
    };
    parse_prices(&text).map_err(NodeError::Refused)
}

/// Reads a price book: JSON if it begins with a brace, TOML otherwise.
///
/// # Errors
/// A sentence saying what is wrong.
pub fn parse_prices(text: &str) -> Result<Vec<meterr_operators::price_book::PriceEntry>, String> {
    let list: PriceList = if text.trim_start().starts_with('{') {
        serde_json::from_str(text).map_err(|e| format!("price book: {e}"))?
    } else {
        toml::from_str(text).map_err(|e| format!("price book: {e}"))?
    };
    meterr_operators::price_book::check_entries(&list.prices).map_err(|errors| {
        let all: Vec<String> = errors.iter().map(ToString::to_string).collect();
        all.join("; ")
    })?;
    Ok(list.prices)
}

/// What actors and surfaces share.
pub struct NodeShared {
    /// Logs by shard.
    pub logs: Vec<Logs>,
    /// Worker threads; a thread that died is replaced in its place.
    pub workers: RwLock<Vec<crossbeam_channel::Sender<crate::worker::Command>>>,
    /// Progress by shard.
    pub progress: Vec<watch::Receiver<Progress>>,
    /// State by shard.
    pub states: Vec<Mutex<(crate::lifecycle::State, Option<String>)>>,
    /// Token under which each shard is owned or to be owned here; 0 where it is not.
    pub tokens: Vec<AtomicU64>,
    /// Token that each shard that was lost was found sealed under, 0 if that is not known.
    pub lost: Vec<AtomicU64>,
    /// Commits that each shard that stands by has still to take in.
    pub behind: Vec<AtomicU64>,
    /// When each shard that stands by was last known to have everything.
    pub current: Vec<Mutex<Option<Instant>>>,
    /// Whether each shard that can be handed over still has a last checkpoint to be written.
    pub writing: Vec<AtomicBool>,
    /// Whether the node is about to stop: it waits for last checkpoints then.
    pub stopping: AtomicBool,
    /// Rung when what a shard is here changes.
    pub shards_changed: tokio::sync::Notify,
    /// Whether shards are owned by leases.
    pub leased: bool,
    /// What the control log says.
    pub control: RwLock<ControlState>,
    /// Raised with each control record taken in.
    pub control_seen: watch::Sender<u64>,
    /// Metrics.
    pub metrics: Metrics,
    /// Longest wait for a position.
    pub min_position_timeout: Duration,
    /// Where appends, reads and waits run.
    pub runtime: tokio::runtime::Handle,
    /// Serialises control appends that are checked against the state.
    pub control_lock: tokio::sync::Mutex<()>,
    /// Raised when the node drains.
    pub draining: watch::Sender<bool>,
    /// The other nodes, once they are joined; never set where one node has all.
    pub cluster: OnceLock<ClusterLink>,
    /// What its shards committed.
    pub measured: Measured,
    /// Followers of shards that are on other nodes.
    pub tails: Tails,
}

impl NodeShared {
    /// Worker of a shard.
    pub fn worker_of(&self, shard: ShardId) -> usize {
        usize::from(shard.0) % self.workers.read().len()
    }

    /// Takes in how far behind a shard that stands by is.
    pub fn followed(&self, shard: ShardId, behind: u64) {
        let at = usize::from(shard.0);
        if self.behind[at].swap(behind, Ordering::Relaxed) != behind {
            self.shards_changed.notify_one();
        }
        if behind == 0 {
            self.current(shard);
        }
    }

    /// Takes in that no checkpoint of a shard is to be written any more.
    pub fn written(&self, shard: ShardId) {
        if self.writing[usize::from(shard.0)].swap(false, Ordering::Relaxed) {
            self.shards_changed.notify_one();
        }
    }

    /// Takes in that a shard that stands by has everything its owner committed.
    pub fn current(&self, shard: ShardId) {
        let at = usize::from(shard.0);
        if self.behind[at].load(Ordering::Relaxed) == 0 {
            *self.current[at].lock() = Some(Instant::now());
        }
    }

    /// Tells the worker of a shard something, waiting while its queue is full.
    pub async fn tell(&self, shard: ShardId, command: crate::worker::Command) {
        let index = self.worker_of(shard);
        self.tell_worker(index, command).await;
    }

    /// Tells a worker something, waiting while its queue is full. A dead worker hears nothing.
    pub async fn tell_worker(&self, index: usize, mut command: crate::worker::Command) {
        loop {
            let sender = self.workers.read()[index].clone();
            match sender.try_send(command) {
                Err(crossbeam_channel::TrySendError::Full(back)) => command = back,
                _ => return,
            }
            tokio::task::yield_now().await;
        }
    }

    /// State of every shard.
    pub fn status(&self) -> Vec<ShardStatus> {
        (0..self.logs.len())
            .map(|at| {
                let (state, problem) = self.states[at].lock().clone();
                let progress = *self.progress[at].borrow();
                ShardStatus {
                    shard: ShardId(at as u16),
                    state: state.name().to_owned(),
                    problem,
                    epoch: progress.epoch,
                    usage_position: progress.usage,
                    usage_head: self.logs[at].usage.head(),
                    control_position: progress.control,
                    owner: None,
                    here: None,
                    elsewhere: false,
                }
            })
            .collect()
    }
}
