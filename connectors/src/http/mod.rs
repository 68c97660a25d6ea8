//! The HTTP surface, on actix-web: translates requests into calls of [`Api`] and answers into JSON.
//!
//! Reading order: `routes.rs` (the one table of routes), `events.rs` (the hot path in), `spend.rs`,
//! `stream.rs` (server-sent events), then the small ones; beneath them `query.rs` (strict parameters),
//! `body.rs` (bounded bodies), `cursor.rs` (pages of one moment), `problem.rs` (every refusal) and
//! `guard.rs` (what every request passes).
//!
//! Invariants:
//! * A request is answered in full or refused by a problem document; no parameter is ignored.
//! * Nothing a client sends makes this process hold more than the limits in [`HttpSettings`] say. On
//!   top of those, the parser takes at most 96 headers, 128 KiB of head and 64 KiB of URI, and keeps
//!   at most 64 KiB a connection of what a slow client has not read yet.
//! * `202` means durable. Whatever else happens to a write, the answer says what is known, and sending
//!   it again is harmless.
//! * Nothing is kept on disk here; a crash loses cursors (410, begin again) and open streams (clients
//!   resume by id).
//!
//! Left out: keys and TLS. Until there are keys the server binds to the loopback interface only,
//! unless told by name to do otherwise.

mod body;
mod cursor;
mod dead_letters;
mod events;
mod guard;
mod openapi;
mod operations;
mod prices;
pub mod problem;
mod query;
mod routes;
mod settings;
mod spend;
mod stream;
#[cfg(test)]
mod tests;
mod views;

use std::any::Any;
use std::borrow::Cow;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use actix_web::middleware::{Compress, from_fn};
use actix_web::{App, HttpServer, web};
use futures::future::BoxFuture;
use meterr_operators::event::{Event, Reason, Rejection};
use meterr_operators::ids::Positions;
use serde::Serialize;
use tokio::sync::{Semaphore, watch};

pub use self::events::{Accepted, FailedLines, REJECTED_MAX, RejectedLine};
pub use self::openapi::DOCUMENT as OPENAPI;
use self::problem::{Kind, Problem};
use crate::api::{Api, ApiResult, ShardStatus};

/// Limits and times of the server.
#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// Address and port; port 0 takes a free one.
    pub address: SocketAddr,
    /// Whether an address that others can reach is meant. There are no keys yet.
    pub allow_non_loopback: bool,
    /// Threads that serve requests.
    pub workers: usize,
    /// Open connections at most.
    pub connections_max: usize,
    /// Bytes of a body at most, as sent and once decompressed.
    pub body_bytes_max: usize,
    /// Bytes that bodies of all requests hold together at most.
    pub bodies_bytes_max: usize,
    /// Events of one request at most.
    pub lines_max: usize,
    /// Bytes of one message of the log at most; also bounds a line.
    pub batch_bytes_max: usize,
    /// Time for a body to arrive, and again for the answer to be found.
    pub request_timeout: Duration,
    /// Time for the head of a request to arrive.
    pub head_timeout: Duration,
    /// Time a connection may take none of what is sent to it before it is closed (Linux only).
    pub write_timeout: Duration,
    /// Longest wait for `min_position`, and the one without `timeout_ms`.
    pub min_position_timeout: Duration,
    /// How long an idle connection is kept.
    pub keep_alive: Duration,
    /// How long requests may take to finish once the server stops.
    pub shutdown_timeout: Duration,
    /// Streams at most.
    pub sse_subscribers_max: usize,
    /// Time between signs of life on a quiet stream.
    pub heartbeat_interval: Duration,
    /// How long clients are asked to wait before they come back to a stream.
    pub sse_retry: Duration,
    /// How long the pages of an answer stay the same.
    pub cursor_lifetime: Duration,
    /// Rows kept for cursors at most; about 400 bytes each.
    pub cursor_rows_max: usize,
}

impl Default for HttpSettings {
    fn default() -> Self {
        HttpSettings {
            address: SocketAddr::from(([127, 0, 0, 1], 8080)),
            allow_non_loopback: false,
            workers: 2,
            connections_max: 4_096,
            body_bytes_max: 16 << 20,
            bodies_bytes_max: 256 << 20,
            lines_max: 200_000,
            // What a NATS server takes in one message by default, less room for subject and headers.
            batch_bytes_max: 1_000_000,
            request_timeout: Duration::from_secs(30),
            head_timeout: Duration::from_secs(5),
            write_timeout: Duration::from_secs(30),
            min_position_timeout: Duration::from_secs(30),
            keep_alive: Duration::from_secs(60),
            shutdown_timeout: Duration::from_secs(10),
            sse_subscribers_max: 1_000,
            heartbeat_interval: Duration::from_secs(15),
            sse_retry: Duration::from_secs(2),
            cursor_lifetime: Duration::from_secs(60),
            cursor_rows_max: 200_000,
        }
    }
}

/// Lines of a body, each with its number from 1, or why nothing of it can be taken.
pub type SplitResult<'a> = Result<Vec<(u32, Cow<'a, [u8]>)>, Rejection>;
/// Splits a body by its media type into lines.
pub type Split = for<'a> fn(Option<&str>, &'a [u8]) -> SplitResult<'a>;
/// Decodes and checks one line.
pub type Decode = for<'a> fn(&'a [u8]) -> Result<Event<'a>, Rejection>;

/// The codec, as far as this surface needs it. Its default refuses everything.
#[derive(Clone, Copy)]
pub struct Decoders {
    /// Splits bodies that are not NDJSON (those are walked in place).
    pub split: Split,
    /// Decodes a line.
    pub decode: Decode,
}

impl Default for Decoders {
    fn default() -> Self {
        fn refused() -> Rejection {
            Rejection::new(Reason::Malformed, "no decoder is set up")
        }
        Decoders { split: |_, _| Err(refused()), decode: |_| Err(refused()) }
    }
}

/// What handlers share.
struct State {
    api: Arc<dyn Api>,
    decoders: Decoders,
    settings: HttpSettings,
    loopback: bool,
    cursors: cursor::Cursors,
    budget: Arc<body::Budget>,
    subscribers: Arc<Semaphore>,
    /// Becomes true once, when the server begins to stop.
    stopping: Arc<watch::Sender<bool>>,
}

impl State {
    fn new(settings: HttpSettings, api: Arc<dyn Api>, decoders: Decoders) -> State {
        State {
            api,
            decoders,
            loopback: settings.address.ip().is_loopback(),
            cursors: cursor::Cursors::new(settings.cursor_lifetime, settings.cursor_rows_max),
            budget: body::Budget::new(settings.bodies_bytes_max),
            subscribers: Arc::new(Semaphore::new(settings.sse_subscribers_max)),
            stopping: Arc::new(watch::Sender::new(false)),
            settings,
        }
    }

    /// Number of shards, at least 1.
    fn shards(&self) -> u16 {
        self.api.shards().max(1)
    }

    fn stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// Waits for an answer that needs no position.
    async fn plain<T>(&self, asking: BoxFuture<'static, ApiResult<T>>) -> Result<T, Problem> {
        match tokio::time::timeout(self.settings.request_timeout, asking).await {
            Ok(answer) => Ok(answer?),
            Err(_) => Err(self.late()),
        }
    }

    /// Waits for an answer that includes `position`, if one is given, for at most `timeout`.
    async fn answer<T>(
        &self,
        mut asking: BoxFuture<'static, ApiResult<T>>,
        position: Option<&Positions>,
        timeout: Duration,
    ) -> Result<T, Problem> {
        let Some(position) = position else { return self.plain(asking).await };
        let mut stopping = self.stopping.subscribe();
        tokio::select! {
            biased;
            answer = &mut asking => return Ok(answer?),
            _ = stopping.wait_for(|stopping| *stopping) => {
                return Err(Problem::new(Kind::Unavailable, "the server is stopping"));
            }
            () = tokio::time::sleep(timeout) => {}
        }
        let current = self.current(position).await?;
        if covers(&current, position) {
            // The position is there; only the answer takes its time, which `timeout` does not limit.
            return self.plain(asking).await;
        }
        Err(Problem::new(
            Kind::Timeout,
            format!("position {position} was not reached within {timeout:?}"),
        )
        .member("current", current.to_string()))
    }

    /// Where the logs named in `asked` stand.
    async fn current(&self, asked: &Positions) -> Result<Positions, Problem> {
        let status = self.status().await?;
        let mut current = Positions::default();
        for shard in status.iter().filter(|shard| asked.of(shard.shard).is_some()) {
            current.raise(shard.shard, shard.usage_position);
        }
        // Control records reach each shard by itself; the one furthest behind counts.
        if asked.control.is_some() {
            let relevant =
                |shard: &&ShardStatus| asked.shards.is_empty() || asked.of(shard.shard).is_some();
            current.control = status.iter().filter(relevant).map(|s| s.control_position).min();
        }
        Ok(current)
    }

    async fn status(&self) -> Result<Vec<ShardStatus>, Problem> {
        tokio::time::timeout(self.settings.request_timeout, self.api.status())
            .await
            .map_err(|_| self.late())
    }

    fn late(&self) -> Problem {
        Problem::new(
            Kind::Timeout,
            format!("the answer was not found within {:?}", self.settings.request_timeout),
        )
    }
}

/// Whether `current` has reached every position of `asked`.
fn covers(current: &Positions, asked: &Positions) -> bool {
    asked.shards.iter().all(|(shard, position)| current.of(*shard) >= Some(*position))
        && current.control >= asked.control
}

/// Answer to a change: where its record stands. A read with it as `min_position` shows the change.
#[derive(Debug, Serialize)]
struct Position {
    position: Positions,
}

/// JSON on one line: outside of strings line ends are white space, inside they cannot stand.
fn one_line(json: &[u8]) -> Vec<u8> {
    json.iter().map(|byte| if matches!(byte, b'\n' | b'\r') { b' ' } else { *byte }).collect()
}

/// Stops a server. Clones stop the same one.
#[derive(Clone)]
pub struct ServerHandle {
    server: actix_web::dev::ServerHandle,
    stopping: Arc<watch::Sender<bool>>,
}

impl ServerHandle {
    /// Accepts no more, ends streams with `bye` and waits for positions with 503, lets other requests
    /// finish (for at most [`HttpSettings::shutdown_timeout`]), closes idle connections, and resolves
    /// when all of it is done. The server's future must be polled meanwhile.
    pub async fn stop(&self) {
        self.stopping.send_replace(true);
        self.server.stop(true).await;
    }
}

/// A bound server: its handle, the address it got, and the future that runs it until stopped.
pub type Serving = (ServerHandle, SocketAddr, BoxFuture<'static, io::Result<()>>);

/// Binds the server. Requests are answered once the future is polled, in an actix or tokio runtime;
/// signals are left to the caller.
///
/// # Errors
/// When the address is taken or not allowed, or lets others in without that being allowed by name.
pub fn serve(settings: HttpSettings, api: Arc<dyn Api>, decoders: Decoders) -> io::Result<Serving> {
    let address = settings.address;
    if !address.ip().is_loopback() && !settings.allow_non_loopback {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "http address \"{address}\" can be reached from other machines, and nobody is asked \
                 for a key yet; use a loopback address such as 127.0.0.1, or set \
                 http.allow_non_loopback = true where a guard of your own stands before it"
            ),
        ));
    }
    let workers = settings.workers.max(1);
    let connections_max = settings.connections_max.div_ceil(workers).max(1);
    let write_timeout = settings.write_timeout;
    let state = web::Data::new(State::new(settings, api, decoders));
    let stopping = state.stopping.clone();
    let shared = state.clone();
    let application = move || {
        App::new()
            .app_data(shared.clone())
            .configure(routes::register)
            .default_service(web::to(guard::not_found))
            .wrap(Compress::default())
            .wrap(from_fn(guard::guard))
    };
    let server = HttpServer::new(application)
        .workers(workers)
        .max_connections(connections_max)
        .keep_alive(state.settings.keep_alive)
        .client_request_timeout(state.settings.head_timeout)
        .shutdown_timeout(state.settings.shutdown_timeout.as_secs().max(1))
        .disable_signals()
        .on_connect(move |connection, _| write_bounded(connection, write_timeout))
        .bind(address)
        .map_err(|error| {
            io::Error::new(error.kind(), format!("http address {address}: {error}"))
        })?;
    let bound = server.addrs().first().copied().unwrap_or(address);
    tracing::info!(address = %bound, "http server listens");
    let server = server.run();
    let handle = ServerHandle { server: server.handle(), stopping };
    Ok((handle, bound, Box::pin(server)))
}

/// Bounds how long a peer may take nothing of what is sent to it. actix-web has no such limit, and a
/// body that is not taken is not polled, so only the kernel can notice.
#[cfg(target_os = "linux")]
fn write_bounded(connection: &dyn Any, timeout: Duration) {
    if let Some(stream) = connection.downcast_ref::<actix_web::rt::net::TcpStream>()
        && let Err(error) = socket2::SockRef::from(stream).set_tcp_user_timeout(Some(timeout))
    {
        tracing::debug!(%error, "write timeout not set");
    }
}

#[cfg(not(target_os = "linux"))]
fn write_bounded(_: &dyn Any, _: Duration) {}
