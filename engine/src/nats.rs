//! A deployment's logs on NATS: connections, streams, the mapping of subjects.
//!
//! Everything to do with the server runs on a runtime of its own, so that neither a query nor a worker
//! thread that waits for a log can hold up the connection.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use meterr_connectors::api::Api;
use meterr_connectors::blob_checkpoints::BlobCheckpoints;
use meterr_connectors::changes::Announcer;
use meterr_connectors::log::Log;
use meterr_connectors::nats::announce::SpendAnnouncer;
use meterr_connectors::nats::blobs::NatsBlobs;
use meterr_connectors::nats::connection::{Line, NatsSettings, shown};
use meterr_connectors::nats::log::{Connections, JetStreamLog};
use meterr_connectors::nats::mapping::{self, Mapping};
use meterr_connectors::nats::peers::NatsPeers;
use meterr_connectors::nats::registry::NatsRegistry;
use meterr_connectors::nats::service::{ServiceSettings, serve_queries};
use meterr_connectors::nats::streams::Wanted;
use meterr_operators::ids::ShardId;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::cluster::link::OpenOut;
use crate::node::NodeError;
use crate::settings::{self, MappingWanted};
use crate::snapshot;

/// Smallest `max_payload` of a server: what the largest part or request needs.
const PAYLOAD_MIN: usize = 1024 * 1024;

/// Time between looks at the connection that questions come by.
const LOOK: Duration = Duration::from_secs(1);

/// Connected to NATS.
pub struct Nats {
    settings: settings::Nats,
    connections: Connections,
    runtime: Background,
}

/// A runtime that nobody waits for when it is dropped, which may happen on another runtime.
pub(crate) struct Background(Option<Runtime>);

impl Background {
    /// Of a runtime.
    pub(crate) fn new(runtime: Runtime) -> Background {
        Background(Some(runtime))
    }
}

impl Deref for Background {
    type Target = Runtime;

    fn deref(&self) -> &Runtime {
        self.0.as_ref().expect("it is taken only when dropped")
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Nats {
    /// Connects.
    ///
    /// # Errors
    /// When no server answers or it cannot be used.
    pub fn connect(settings: &settings::Nats) -> Result<Nats, NodeError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("meterr-nats")
            .enable_all()
            .build()
            .map_err(|source| NodeError::Io {
                what: "cannot start a runtime".to_owned(),
                source,
            })?;
        let connections = runtime
            .block_on(Connections::connect(&settings.connection))
            .map_err(|error| NodeError::Refused(error.to_string()))?;
        let max = connections.output.max_payload();
        if max < PAYLOAD_MIN {
            return Err(NodeError::Refused(format!(
                "the NATS server takes messages of {max} bytes at most; set max_payload to 1MB or more \
                 in its configuration"
            )));
        }
        let runtime = Background::new(runtime);
        Ok(Nats { settings: settings.clone(), connections, runtime })
    }

    /// What the streams must be like: control, usage, output.
    pub fn wanted(
        &self,
    ) -> (Wanted, impl Fn(ShardId) -> Wanted + use<>, impl Fn(ShardId) -> Wanted + use<>) {
        let (replicas, bytes_max) = (self.settings.replicas, self.settings.stream_bytes_max);
        (
            Wanted::control(replicas, bytes_max),
            move |shard| Wanted::usage(shard, replicas, bytes_max),
            move |shard| Wanted::out(shard, replicas, bytes_max),
        )
    }

    /// Opens a stream, which is created if it is not there.
    ///
    /// # Errors
    /// When it cannot be used.
    pub fn open(&self, wanted: &Wanted) -> Result<JetStreamLog, NodeError> {
        let identity = identity()?;
        let open = JetStreamLog::open(&self.connections, wanted, Some(&identity));
        let log = self.runtime.block_on(open)?;
        if log.unfinished() {
            return Err(NodeError::Refused(format!(
                "stream {} has {} of the {} records it is to be copied: the copy was not finished; run \
                 the same `meterr log copy` or `meterr backup restore` again, which goes on where it \
                 stopped",
                wanted.stream,
                log.head(),
                log.copied_to()
            )));
        }
        Ok(log)
    }

    /// Looks whether the server maps `usage.<org>` to the right shard.
    ///
    /// # Errors
    /// When it maps to others, or when the mapping is required and missing.
    pub fn check_mapping(&self, shards: u16) -> Result<(), NodeError> {
        if self.settings.mapping == MappingWanted::Off {
            return Ok(());
        }
        let nonce = identity()?;
        let probe = mapping::probe(&self.connections.output, shards, &nonce[..8]);
        let found = self.runtime.block_on(probe).map_err(|error| {
            NodeError::Refused(format!("the mapping of usage subjects cannot be tried: {error}"))
        })?;
        let fix = mapping::fix(shards);
        match found {
            Mapping::Right => Ok(()),
            Mapping::Missing if self.settings.mapping == MappingWanted::Warn => {
                tracing::warn!(
                    "the NATS server does not map usage.<org> to its shard, so producers must publish \
                     usage.<shard>.<org> themselves; to have it mapped, add to the account in the \
                     server's configuration: {fix}"
                );
                Ok(())
            }
            Mapping::Missing => Err(NodeError::Refused(format!(
                "the NATS server does not map usage.<org> to its shard; add to the account in the \
                 server's configuration: {fix} (or set nats.mapping = \"warn\" if producers publish \
                 usage.<shard>.<org> themselves)"
            ))),
            Mapping::Wrong { name, expected, found } => Err(NodeError::Refused(format!(
                "the NATS server maps usage.{name} to shard {found}, but with {shards} shards it belongs \
                 to {expected}: events would be refused; in the server's configuration the mapping must \
                 be: {fix}"
            ))),
        }
    }

    /// Where live changes go.
    pub fn announcer(&self) -> Arc<dyn Announcer> {
        Arc::new(SpendAnnouncer::new(self.connections.output.clone()))
    }

    /// Answers questions on NATS until stopped, on a connection of its own, so that answers and commits
    /// do not wait for each other.
    ///
    /// # Errors
    /// When the server does not let us.
    pub async fn serve_queries(
        &self,
        api: Arc<dyn Api>,
        settings: ServiceSettings,
    ) -> Result<Questions, NodeError> {
        let (ready, begun) = oneshot::channel();
        let (stop, stopped) = oneshot::channel();
        let connection = self.settings.connection.clone();
        let answering = self.runtime.spawn(answer(connection, api, settings, ready, stopped));
        match begun.await {
            Ok(Ok(())) => Ok(Questions { stop, answering }),
            Ok(Err(why)) => Err(NodeError::Refused(why)),
            Err(_) => Err(NodeError::Refused("questions cannot be answered on NATS".to_owned())),
        }
    }

    /// The registry of the nodes, and the way to ask them.
    ///
    /// # Errors
    /// When the server does not let us, or the registry's bucket cannot be used.
    pub async fn cluster(&self) -> Result<(NatsRegistry, NatsPeers), NodeError> {
        let (settings, replicas) = (self.settings.connection.clone(), self.settings.replicas);
        let connected = self.runtime.spawn(async move {
            let registry = NatsRegistry::connect(&settings, replicas).await;
            let registry = registry.map_err(|error| error.to_string())?;
            let peers = NatsPeers::connect(&settings).await.map_err(|error| error.to_string())?;
            Ok((registry, peers))
        });
        let connected = connected.await.unwrap_or_else(|died| Err(died.to_string()));
        connected.map_err(|why: String| {
            NodeError::Refused(format!("this node cannot be part of the cluster: {why}"))
        })
    }

    /// Checkpoints that all nodes share, in an object store of the servers.
    ///
    /// # Errors
    /// When the server does not let us, or its bucket cannot be used.
    pub fn checkpoints(&self) -> Result<BlobCheckpoints, NodeError> {
        let connect = NatsBlobs::connect(&self.settings.connection, self.settings.replicas);
        let blobs = self.runtime.block_on(connect).map_err(|error| {
            NodeError::Refused(format!("checkpoints cannot be shared with other nodes: {error}"))
        })?;
        let runtime = self.runtime().clone();
        Ok(BlobCheckpoints::new(Arc::new(blobs), runtime, snapshot::FORMAT))
    }

    /// Opens output logs once more, each with a reader of its own.
    pub fn out_opener(&self) -> OpenOut {
        let (connections, runtime) = (self.connections.clone(), self.runtime().clone());
        let (_, _, out) = self.wanted();
        Arc::new(move |shard| {
            let (connections, wanted) = (connections.clone(), out(shard));
            let opening = runtime.spawn(async move {
                let log = JetStreamLog::open(&connections, &wanted, None).await;
                log.map(|log| Arc::new(log) as Arc<dyn Log>).map_err(|error| error.to_string())
            });
            async move { opening.await.unwrap_or_else(|died| Err(died.to_string())) }.boxed()
        })
    }

    /// Where everything to do with the server runs.
    pub fn runtime(&self) -> &Handle {
        self.runtime.handle()
    }

    /// The connections.
    pub fn connections(&self) -> &Connections {
        &self.connections
    }

    /// The servers, for messages.
    pub fn shown(&self) -> String {
        shown(&self.settings.connection.url)
    }

    /// Lets go of the server. What waits for it is given up.
    pub fn close(self) {
        drop(self);
    }
}

/// Questions being answered.
pub struct Questions {
    stop: oneshot::Sender<()>,
    answering: JoinHandle<()>,
}

impl Questions {
    /// Takes no more, and answers what has come.
    pub async fn stop(self) {
        // If it ended by itself there is nothing left to answer.
        if self.stop.send(()).is_ok() {
            drop(self.answering.await);
        }
    }
}

/// Answers until told to stop. Whoever may ask can send headers that end the client; then the service
/// is begun anew on another one.
async fn answer(
    connection: NatsSettings,
    api: Arc<dyn Api>,
    settings: ServiceSettings,
    ready: oneshot::Sender<Result<(), String>>,
    mut stopped: oneshot::Receiver<()>,
) {
    let begun = async {
        let line = Line::connect(&connection, "meterr questions").await;
        let line = line.map_err(|error| error.to_string())?;
        let service = serve_queries(line.client(), api.clone(), settings.clone()).await;
        Ok((line, service.map_err(|error| error.to_string())?))
    };
    let (line, service) = match begun.await {
        Ok(begun) => begun,
        // Whoever waits for it may have gone.
        Err(why) => return drop(ready.send(Err(why))),
    };
    let _ = ready.send(Ok(()));
    let mut service = Some(service);
    let mut look = tokio::time::interval(LOOK);
    loop {
        tokio::select! {
            _ = &mut stopped => {
                if let Some(service) = service {
                    service.stop().await;
                }
                return;
            }
            _ = look.tick() => {}
        }
        if line.revive().await {
            service = None;
        }
        if service.is_none() {
            match serve_queries(line.client(), api.clone(), settings.clone()).await {
                Ok(anew) => service = Some(anew),
                Err(error) => tracing::warn!(%error, "questions are not answered; trying on"),
            }
        }
    }
}

/// A random name for ever, as hexadecimal digits.
fn identity() -> Result<String, NodeError> {
    use std::fmt::Write;
    let bytes = crate::node::random_bytes()?;
    Ok(bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to memory cannot fail");
        text
    }))
}
