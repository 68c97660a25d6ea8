//! A deployment's logs on NATS: connections, streams, the mapping of subjects.
//!
//! Everything to do with the server runs on a runtime of its own, so that neither a query nor a worker
//! thread that waits for a log can hold up the connection.

use std::sync::Arc;

use meterr_connectors::api::Api;
use meterr_connectors::changes::Announcer;
use meterr_connectors::log::Log;
use meterr_connectors::nats::announce::SpendAnnouncer;
use meterr_connectors::nats::connection::{connect, shown};
use meterr_connectors::nats::log::{Connections, Counters, JetStreamLog};
use meterr_connectors::nats::mapping::{self, Mapping};
use meterr_connectors::nats::service::{ServiceHandle, ServiceSettings, serve_queries};
use meterr_connectors::nats::streams::Wanted;
use meterr_operators::ids::ShardId;
use tokio::runtime::Runtime;

use crate::node::NodeError;
use crate::settings::{self, MappingWanted};

/// Smallest `max_payload` of a server: what the largest part or request needs.
const PAYLOAD_MIN: usize = 1024 * 1024;

/// Connected to NATS.
pub struct Nats {
    settings: settings::Nats,
    connections: Connections,
    runtime: Runtime,
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
        let connected = async {
            let input = connect(&settings.connection, "meterr input").await?;
            let output = connect(&settings.connection, "meterr output").await?;
            Ok::<_, meterr_connectors::nats::connection::ConnectError>((input, output))
        };
        let (input, output) =
            runtime.block_on(connected).map_err(|error| NodeError::Refused(error.to_string()))?;
        let max = output.max_payload();
        if max < PAYLOAD_MIN {
            return Err(NodeError::Refused(format!(
                "the NATS server takes messages of {max} bytes at most; set max_payload to 1MB or more \
                 in its configuration"
            )));
        }
        let counters = Arc::new(Counters::default());
        let handle = runtime.handle().clone();
        let connections = Connections { input, output, runtime: handle, counters };
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
                 the same `meterr log copy` again, which goes on where it stopped",
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

    /// Answers questions on NATS until the handle is stopped, on a connection of its own, so that
    /// answers and commits do not wait for each other.
    ///
    /// # Errors
    /// When the server does not let us.
    pub async fn serve_queries(
        &self,
        api: Arc<dyn Api>,
        settings: ServiceSettings,
    ) -> Result<ServiceHandle, NodeError> {
        let connection = self.settings.connection.clone();
        let serving = self.runtime.spawn(async move {
            let client = connect(&connection, "meterr questions").await;
            let client = client.map_err(|error| error.to_string())?;
            let serving = serve_queries(client, api, settings).await;
            serving.map_err(|error| error.to_string())
        });
        let served = serving.await.map_err(|error| NodeError::Refused(error.to_string()))?;
        served.map_err(NodeError::Refused)
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
        self.runtime.shutdown_background();
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
