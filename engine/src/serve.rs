//! Runs a node until it is asked to stop: data, actors, control reader, HTTP.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use meterr_connectors::codec::{decode_line, split_request};
use meterr_connectors::http::{self, Decoders, HttpSettings};
use meterr_connectors::log::LogError;
use meterr_connectors::nats::service::ServiceSettings;
use meterr_connectors::requests::Limits;
use meterr_operators::ids::ShardId;
use parking_lot::{Mutex, RwLock};
use tokio::sync::watch;

use crate::actors::{DrainNode, EndWorkers, NodeActor, Wish};
use crate::backup::job::Job;
use crate::cluster::joining::{Joined, join};
use crate::lifecycle::{State, Wanted};
use crate::live::{ShardSpec, StopReason};
use crate::metrics::Metrics;
use crate::node::{Data, NodeError, NodeShared};
use crate::records::control_changes;
use crate::service::Service;
use crate::settings::Settings;
use crate::shutdown::{self, Trigger};
use crate::tails::Tails;
use crate::worker::Command;

/// Longest time a drain may take before the node ends without it; the log has everything.
pub const DRAIN_MAX: Duration = Duration::from_secs(60);

/// A node at work, as its starter sees it.
#[derive(Clone)]
pub struct Running {
    /// Where HTTP listens.
    pub address: SocketAddr,
    /// The engine's answers.
    pub service: Service,
    /// Stops the node.
    pub stop: Trigger,
    /// State of the shards.
    pub shared: Arc<NodeShared>,
}

/// Runs a node in the calling thread until a signal or [`Running::stop`]. `ready` is called once HTTP
/// listens; shards may still be opening.
///
/// # Errors
/// Why it could not start, or what failed while stopping.
pub fn serve(
    settings: &Settings,
    accept_time_jump: bool,
    ready: impl FnOnce(Running) + 'static,
) -> Result<(), NodeError> {
    let io = |what: &str| {
        let what = what.to_owned();
        move |source| NodeError::Io { what, source }
    };
    let data = Data::open(settings, accept_time_jump)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("meterr-io")
        .enable_all()
        .build()
        .map_err(io("cannot start the runtime"))?;
    let handle = runtime.handle().clone();
    let result =
        actix::System::new().block_on(run(settings, data, accept_time_jump, handle, ready));
    // Reads and waits still under way have nobody to answer.
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn run(
    settings: &Settings,
    mut data: Data,
    accept_time_jump: bool,
    runtime: tokio::runtime::Handle,
    ready: impl FnOnce(Running),
) -> Result<(), NodeError> {
    let io = |what: &str| {
        let what = what.to_owned();
        move |source| NodeError::Io { what, source }
    };
    let (specs, progress): (Vec<ShardSpec>, Vec<_>) =
        data.specs(settings, accept_time_jump).into_iter().unzip();
    let metrics = Metrics::new(settings.metrics.enabled);
    let control = std::mem::take(&mut data.control);
    if let Some(nats) = data.nats() {
        let connections = nats.connections().clone();
        metrics.watch_nats(move || connections.figures());
    }
    let (trigger, mut stopping) = shutdown::channel();
    let shared = Arc::new(NodeShared {
        logs: data.logs.clone(),
        workers: RwLock::new(Vec::new()),
        progress,
        states: specs.iter().map(|_| Mutex::new((State::Claim, None))).collect(),
        tokens: specs.iter().map(|_| AtomicU64::new(0)).collect(),
        lost: specs.iter().map(|_| AtomicU64::new(0)).collect(),
        behind: specs.iter().map(|_| AtomicU64::new(0)).collect(),
        writing: specs.iter().map(|_| AtomicBool::new(false)).collect(),
        stopping: AtomicBool::new(false),
        current: specs.iter().map(|_| Mutex::new(None)).collect(),
        shards_changed: tokio::sync::Notify::new(),
        leased: data.nats().is_some(),
        control_seen: watch::Sender::new(control.position),
        control: RwLock::new(control),
        metrics: metrics.clone(),
        min_position_timeout: settings.http.min_position_timeout,
        runtime: runtime.clone(),
        control_lock: tokio::sync::Mutex::new(()),
        draining: watch::Sender::new(false),
        cluster: OnceLock::new(),
        measured: Default::default(),
        tails: Tails::default(),
    });
    let shards = specs.len();
    let (node, wishes, mut released) = NodeActor::start_all(
        shared.clone(),
        specs,
        data.checkpoints.clone(),
        settings.checkpoint.keep,
        settings.node.workers,
    )
    .map_err(io("cannot start a worker thread"))?;
    let reader = runtime.spawn(read_control(shared.clone()));
    runtime.spawn(metrics.clone().keep_up(stopping.clone()));
    let signals = runtime.spawn(shutdown::on_signals(trigger.clone()));
    let service = Service::new(shared.clone());
    let decoders = Decoders { split: split_request, decode: decode_line };
    let (server, address, serving) =
        http::serve(http_settings(settings), Arc::new(service.clone()), decoders)
            .map_err(io(&format!("cannot listen on {}", settings.http.address)))?;
    let serving = actix::spawn(serving);
    let joined = match data.nats() {
        Some(nats) => {
            let http = format!("http://{address}");
            Some(join(settings, nats, &shared, &service, wishes, http).await?)
        }
        None => {
            for shard in 0..shards {
                // The node is alone with its logs: everything is its own, under whatever token comes
                // next. An actor that is gone says so by its end.
                let _ = wishes.send(Wish(ShardId(shard as u16), Wanted::Own(0))).await;
            }
            None
        }
    };
    let cluster = joined.as_ref().map(Joined::registry);
    let backups = Job::start(settings, data.logs.clone(), cluster, &metrics, runtime.clone())
        .map_err(|error| NodeError::Refused(format!("backups cannot be made: {error:#}")))?;
    let questions = match data.nats() {
        Some(nats) => {
            let settings = service_settings(settings, decoders);
            Some(nats.serve_queries(Arc::new(service.clone()), settings).await?)
        }
        None => None,
    };
    ready(Running { address, service, stop: trigger, shared: shared.clone() });
    let refused = match joined {
        None => {
            stopping.wait().await;
            None
        }
        Some(joined) => {
            let refused = tokio::select! {
                () = stopping.wait() => None,
                why = joined.ended() => Some(why),
            };
            // While others take the shards over, everything is answered as before.
            shared.stopping.store(true, Ordering::Relaxed);
            joined.leave().await;
            refused
        }
    };
    shared.draining.send_replace(true);
    if let Some(questions) = questions {
        questions.stop().await;
    }
    // Requests under way are finished: what they appended is acknowledged or not, never unknown.
    server.stop().await;
    drop(serving.await);
    let drained = async {
        // An actor that is gone has nothing left to drain.
        let _ = node.send(DrainNode).await;
        drop(released.wait_for(|released| *released >= shards).await);
    };
    if tokio::time::timeout(DRAIN_MAX, drained).await.is_err() {
        tracing::warn!(
            seconds = DRAIN_MAX.as_secs(),
            "draining took too long; ending without it, the log has everything"
        );
    }
    if let Some(backups) = backups {
        // It reads logs, which are closed below.
        drop(tokio::task::spawn_blocking(|| backups.stop()).await);
    }
    reader.abort();
    signals.abort();
    let _ = node.send(EndWorkers).await;
    data.close()?;
    if let Some(why) = refused {
        return Err(NodeError::Refused(why));
    }
    tracing::info!("drained");
    Ok(())
}

fn http_settings(settings: &Settings) -> HttpSettings {
    let http = &settings.http;
    HttpSettings {
        address: http.address,
        allow_non_loopback: !http.address.ip().is_loopback(),
        body_bytes_max: http.body_bytes_max,
        lines_max: http.lines_max,
        request_timeout: http.request_timeout,
        min_position_timeout: http.min_position_timeout,
        sse_subscribers_max: http.sse_subscribers_max,
        ..HttpSettings::default()
    }
}

fn service_settings(settings: &Settings, decoders: Decoders) -> ServiceSettings {
    let http = &settings.http;
    let limits = Limits {
        request_timeout: http.request_timeout,
        min_position_timeout: http.min_position_timeout,
        ..Limits::default()
    };
    ServiceSettings { limits, decoders, ..ServiceSettings::default() }
}

/// Follows the control log: for the surfaces' own state, and for every worker.
async fn read_control(shared: Arc<NodeShared>) {
    let log = shared.logs[0].control.clone();
    let mut from = shared.control.read().position + 1;
    loop {
        log.wait_beyond(from - 1).await;
        match control_changes(&*log, from, None) {
            Ok(changes) if changes.is_empty() => {
                // Woken because the log was closed or takes no more.
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Ok(changes) => {
                let last = changes.last().map_or(from - 1, |(position, _)| *position);
                {
                    let mut state = shared.control.write();
                    for (position, change) in &changes {
                        if let Err(reason) = state.apply(*position, change) {
                            tracing::error!(position, reason, "control record does not apply");
                        }
                    }
                }
                from = last + 1;
                let changes = Arc::new(changes);
                let workers = shared.workers.read().len();
                for worker in 0..workers {
                    shared.tell_worker(worker, Command::Control(changes.clone())).await;
                }
                shared.control_seen.send_replace(last);
            }
            Err(StopReason::Log(LogError::Unavailable { what, .. })) => {
                tracing::warn!(what, "control log not available; trying on");
            }
            Err(error) => {
                tracing::error!(%error, "control log cannot be read; prices and settings stay as they are");
                return;
            }
        }
    }
}
