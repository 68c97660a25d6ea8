//! The HTTP surface, on actix-web: carries requests to the [`requests`](crate::requests) that all
//! surfaces share, and answers back.
//!
//! Reading order: `routes.rs` (the one table of routes), `events.rs` (the hot path in), `spend.rs`,
//! `stream.rs` (server-sent events), then the small ones; beneath them `query.rs` (parameters of
//! URLs), `body.rs` (bounded bodies), `problem.rs` (every refusal) and `guard.rs` (what every request
//! passes).
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
mod cluster;
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
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use actix_web::middleware::{Compress, from_fn};
use actix_web::{App, HttpResponse, HttpServer, web};
use futures::future::BoxFuture;
use tokio::sync::{Semaphore, watch};

pub use self::events::{Accepted, FailedLines, REJECTED_MAX, RejectedLine};
pub use self::openapi::DOCUMENT as OPENAPI;
use self::problem::Problem;
use crate::api::Api;
use crate::requests::{Answer, Desk, Limits};
pub use crate::requests::{Decode, Decoders, Split, SplitResult};

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

/// What handlers share.
struct State {
    desk: Desk,
    settings: HttpSettings,
    loopback: bool,
    budget: Arc<body::Budget>,
    subscribers: Arc<Semaphore>,
}

impl State {
    fn new(settings: HttpSettings, api: Arc<dyn Api>, decoders: Decoders) -> State {
        let limits = Limits {
            request_timeout: settings.request_timeout,
            min_position_timeout: settings.min_position_timeout,
            cursor_lifetime: settings.cursor_lifetime,
            cursor_rows_max: settings.cursor_rows_max,
            line_bytes_max: settings.batch_bytes_max,
        };
        State {
            desk: Desk::new(api, decoders, limits, ""),
            loopback: settings.address.ip().is_loopback(),
            budget: body::Budget::new(settings.bodies_bytes_max),
            subscribers: Arc::new(Semaphore::new(settings.sse_subscribers_max)),
            settings,
        }
    }
}

/// A good answer.
fn ok(answer: Answer) -> Result<HttpResponse, Problem> {
    Ok(HttpResponse::Ok().content_type("application/json").body(answer?))
}

/// The answer to a change that was logged.
fn accepted(answer: Answer) -> Result<HttpResponse, Problem> {
    Ok(HttpResponse::Accepted().content_type("application/json").body(answer?))
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
    let stopping = state.desk.stopping.clone();
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
