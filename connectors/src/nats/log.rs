//! A JetStream stream as [`Log`].
//!
//! Positions are stream sequences. Reading in order while waiting for more goes through an ordered
//! consumer (`tail.rs`), everything else through direct reads in batches, which need no
//! consumer. Direct reads may be answered by a replica that is behind: what is known to exist and does
//! not come is asked of the stream's leader.
//!
//! A server that is away, has no leader, is full or slow is waited for: a commit is tried until it is
//! known to stand or to have lost against another writer; other appends and reads give up after
//! [`PATIENCE`] with [`LogError::Unavailable`]. An acknowledgement that did not come says nothing, so
//! appends are repeated under the same message id, and commits are read back before they are repeated.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::Client;
use async_nats::jetstream;
use async_nats::jetstream::stream::{Config, Info, Stream};
use futures::future::BoxFuture;
use meterr_operators::time::Time;
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::{Instant, sleep};

use super::connection::{ConnectError, Line, NatsSettings, connect};
use super::renewal;
use super::streams::{IDENTITY_KEY, Wanted, copied_to};
use super::tail::Tail;
use crate::log::{Appended, Log, LogError, LogIdentity, LogResult, Message, Record, system_clock};

/// Longest an append or a read tries before it says that the server is not available. Below the time
/// an HTTP request may take.
pub const PATIENCE: Duration = Duration::from_secs(25);
/// Time a single request to the server may take.
pub(super) const ANSWER: Duration = Duration::from_secs(2);
/// What happened on the way to the server, for metrics. All only grow.
#[derive(Debug, Default)]
pub struct Counters {
    /// Appends and parts sent again.
    pub retries: AtomicU64,
    /// Commits whose acknowledgement did not come and that were found to stand.
    pub landed: AtomicU64,
    /// Commits refused since another writer had committed.
    pub conflicts: AtomicU64,
    /// Reads answered by a replica that was behind.
    pub stale_reads: AtomicU64,
    /// Consumers made anew.
    pub consumers: AtomicU64,
}

impl Counters {
    pub(super) fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// What a connection to NATS counted so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct Figures {
    /// Whether it stands.
    pub connected: bool,
    /// Connections made after the first.
    pub reconnects: u64,
    /// Appends and commits sent again.
    pub retries: u64,
    /// Commits found to stand without an acknowledgement.
    pub landed: u64,
    /// Commits refused since another node had committed.
    pub refused: u64,
    /// Reads answered by a replica that was behind.
    pub stale_reads: u64,
    /// Consumers made anew.
    pub consumers: u64,
}

/// Connections and runtime that the logs of a node share.
#[derive(Clone)]
pub struct Connections {
    /// For what is read in large amounts. What producers wrote comes by it.
    pub input: Arc<Line>,
    /// For appends and commits, so that they do not stand behind a megabyte of input. Only answers of the
    /// server come by it, in JSON: nothing that a producer wrote as it is.
    pub output: Client,
    /// Where requests run.
    pub runtime: Handle,
    /// What happened.
    pub counters: Arc<Counters>,
}

impl Connections {
    /// Connects twice; requests run on the runtime of the caller.
    ///
    /// # Errors
    /// When no server answers or it cannot be used.
    pub async fn connect(settings: &NatsSettings) -> Result<Connections, ConnectError> {
        let input = Arc::new(Line::connect(settings, "meterr input").await?);
        let output = connect(settings, "meterr output").await?;
        renewal::watch(settings, input.clone(), output.clone());
        Ok(Connections {
            input,
            output,
            runtime: Handle::current(),
            counters: Arc::new(Counters::default()),
        })
    }

    /// What was counted so far.
    pub fn figures(&self) -> Figures {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let output = &self.output;
        let reconnects = self.input.connects().saturating_sub(1)
            + output.statistics().connects.load(Ordering::Relaxed).saturating_sub(1);
        Figures {
            connected: self.input.connected()
                && output.connection_state() == async_nats::connection::State::Connected,
            reconnects,
            retries: count(&self.counters.retries),
            landed: count(&self.counters.landed),
            refused: count(&self.counters.conflicts),
            stale_reads: count(&self.counters.stale_reads),
            consumers: count(&self.counters.consumers),
        }
    }

    pub(super) fn input(&self) -> jetstream::Context {
        context(self.input.client())
    }

    pub(super) fn output(&self) -> jetstream::Context {
        context(self.output.clone())
    }
}

pub(super) fn context(client: Client) -> jetstream::Context {
    let builder = jetstream::context::ContextBuilder::new().timeout(ANSWER).ack_timeout(ANSWER);
    builder.max_ack_inflight(4_096).backpressure_on_inflight(true).build(client)
}

/// A stream as log; clones share it.
#[derive(Clone)]
pub struct JetStreamLog {
    pub(super) shared: Arc<Shared>,
}

pub(super) struct Shared {
    pub identity: LogIdentity,
    pub connections: Connections,
    pub context: jetstream::Context,
    pub copied_to: u64,
    pub state: Mutex<State>,
    /// Raised whenever something changes that a waiter may wait for.
    pub changed: watch::Sender<()>,
    pub tail: Tail,
    /// Makes message ids of this process unlike those of any other.
    pub nonce: String,
    pub next_id: AtomicU64,
}

#[derive(Default)]
pub(super) struct State {
    pub head: u64,
    pub first: u64,
    pub last_time: Option<Time>,
    /// Why nothing more can be believed of this stream.
    pub failure: Option<String>,
}

pub(super) fn unavailable(stream: &str, what: &str, why: &dyn std::fmt::Display) -> LogError {
    LogError::Unavailable { stream: stream.to_owned(), what: format!("{what}: {why}") }
}

/// Waits between attempts: 20 ms, doubling to 1 s.
pub(super) struct BackOff(Duration);

impl BackOff {
    pub fn new() -> BackOff {
        BackOff(Duration::from_millis(20))
    }

    pub async fn wait(&mut self) {
        sleep(self.0).await;
        self.0 = (self.0 * 2).min(Duration::from_secs(1));
    }
}

impl JetStreamLog {
    /// Opens a stream, which is created if it is not there and `create` is given as its identity.
    ///
    /// # Errors
    /// [`LogError::Format`] when it is set in a way that could lose records, with what to do;
    /// [`LogError::Unavailable`] when the server does not answer in time.
    pub async fn open(
        connections: &Connections,
        wanted: &Wanted,
        create: Option<&str>,
    ) -> LogResult<JetStreamLog> {
        let context = connections.output();
        let create = create.map(|identity| wanted.config(identity, None));
        let wrong = |config: &Config| wanted.wrong(config);
        let info = open_stream(&context, &wanted.stream, create.as_ref(), wrong).await?;
        let identity = LogIdentity { stream: wanted.stream.clone(), uuid: identity_of(&info) };
        let shared = Arc::new(Shared {
            identity,
            connections: connections.clone(),
            context,
            copied_to: copied_to(&info.config),
            state: Mutex::new(State::of(&info, copied_to(&info.config))),
            changed: watch::Sender::new(()),
            tail: Tail::default(),
            nonce: nonce(),
            next_id: AtomicU64::new(0),
        });
        let head = shared.state.lock().head;
        if (1..=shared.copied_to).contains(&head)
            && let Some(last) = shared.read_single(head).await?
        {
            shared.raise(head, Some(last.time));
        }
        Ok(JetStreamLog { shared })
    }

    /// Position up to which records were copied from another log.
    pub fn copied_to(&self) -> u64 {
        self.shared.copied_to
    }

    /// Runs on the runtime, so that callers may wait with any executor, and a caller that goes away
    /// does not cut a write short.
    pub(super) fn run<T: Send + 'static>(
        &self,
        work: impl Future<Output = LogResult<T>> + Send + 'static,
    ) -> BoxFuture<'static, LogResult<T>> {
        let stream = self.shared.identity.stream.clone();
        let task = self.shared.connections.runtime.spawn(work);
        Box::pin(async move {
            task.await.unwrap_or_else(|error| Err(unavailable(&stream, "gave up", &error)))
        })
    }
}

enum Opening {
    Refused(String),
    Away(String),
}

/// Opens a stream, which is created as `create` says if it is not there. `wrong` names what of its
/// settings would not do.
pub(super) async fn open_stream(
    context: &jetstream::Context,
    stream: &str,
    create: Option<&Config>,
    wrong: impl Fn(&Config) -> Vec<String>,
) -> LogResult<Info> {
    let refused = |what| Err(LogError::Format { stream: stream.to_owned(), what });
    let until = Instant::now() + PATIENCE;
    let mut wait = BackOff::new();
    let info = loop {
        match find_or_create(context, stream, create).await {
            Ok(info) => break info,
            Err(Opening::Refused(what)) => return refused(what),
            Err(Opening::Away(why)) if Instant::now() >= until => {
                return Err(unavailable(stream, "cannot open it", &why));
            }
            Err(Opening::Away(why)) => {
                tracing::warn!(stream, why, "waiting for JetStream");
                wait.wait().await;
            }
        }
    };
    match wrong(&info.config) {
        wrong if wrong.is_empty() => Ok(info),
        wrong => refused(format!(
            "the stream is set in a way that meterr cannot use: {}",
            wrong.join("; ")
        )),
    }
}

async fn find_or_create(
    context: &jetstream::Context,
    stream: &str,
    create: Option<&Config>,
) -> Result<Info, Opening> {
    use jetstream::ErrorCode;
    use jetstream::context::{CreateStreamErrorKind as Create, GetStreamErrorKind as Get};
    let away = |error: &dyn std::fmt::Display| Opening::Away(error.to_string());
    match context.get_stream(stream).await {
        Ok(stream) if led(stream.cached_info()) => return Ok(stream.cached_info().clone()),
        Ok(_) => return Err(away(&"it has no leader")),
        Err(error) => match error.kind() {
            Get::JetStream(cause) if cause.error_code() == ErrorCode::STREAM_NOT_FOUND => {}
            Get::JetStream(cause)
                if cause.error_code() == ErrorCode::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT
                    || cause.error_code() == ErrorCode::JETSTREAM_NOT_ENABLED =>
            {
                return Err(Opening::Refused(
                    "JetStream is not enabled for this account; add \"jetstream: enabled\" to it in \
                     the server's configuration"
                        .to_owned(),
                ));
            }
            _ => return Err(away(&error)),
        },
    }
    let Some(config) = create else {
        return Err(Opening::Refused("there is no such stream".to_owned()));
    };
    match context.create_stream(config.clone()).await {
        Ok(created) if !led(created.cached_info()) => Err(away(&"it has no leader")),
        Ok(created) => {
            tracing::debug!(stream, "stream created");
            Ok(created.cached_info().clone())
        }
        Err(error) => match error.kind() {
            Create::TimedOut | Create::ResponseParse => Err(away(&error)),
            // Another node was faster, or another stream has the subject.
            Create::JetStream(cause) if cause.error_code() == ErrorCode::STREAM_NAME_EXIST => {
                Err(away(&error))
            }
            Create::JetStream(cause) if cause.code() >= 500 => Err(away(&error)),
            _ => Err(Opening::Refused(format!("it cannot be created: {error}"))),
        },
    }
}

/// Whether a stream's state is to be believed: without a leader a cluster answers all the same, and
/// says that the stream is empty.
fn led(info: &Info) -> bool {
    info.cluster.as_ref().is_none_or(|cluster| cluster.leader.is_some())
}

/// What names a stream: its metadata, or the moment of its creation where somebody else made it.
fn identity_of(info: &Info) -> String {
    let by_us = info.config.metadata.get(IDENTITY_KEY).filter(|identity| !identity.is_empty());
    by_us.cloned().unwrap_or_else(|| format!("created-{}", info.created.unix_timestamp_nanos()))
}

/// Random enough to be unlike that of any other process.
pub(super) fn nonce() -> String {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&std::process::id().to_le_bytes());
    hasher.update(&system_clock()().0.to_le_bytes());
    // Seeded from the system's randomness.
    let random =
        std::hash::BuildHasher::hash_one(&std::collections::hash_map::RandomState::new(), 0);
    hasher.update(&random.to_le_bytes());
    hasher.finalize().to_hex()[..16].to_owned()
}

impl State {
    fn of(info: &Info, copied_to: u64) -> State {
        let mut state = State::default();
        state.take(info, copied_to);
        state
    }

    fn take(&mut self, info: &Info, copied_to: u64) {
        let found = &info.state;
        self.head = self.head.max(found.last_sequence);
        self.first = self.first.max(found.first_sequence).max(1);
        let nanos = found.last_timestamp.unix_timestamp_nanos();
        let time = i64::try_from(nanos.div_euclid(1_000)).map(Time).ok();
        // An empty stream says year 1, and a copied record has its time in a header.
        self.last_time = time.filter(|_| found.last_sequence > copied_to).max(self.last_time);
    }

    /// Takes in that a record is durable.
    pub fn raise(&mut self, position: u64, time: Option<Time>) {
        self.head = self.head.max(position);
        self.last_time = self.last_time.max(time);
    }
}

impl Shared {
    pub fn stream_name(&self) -> &str {
        &self.identity.stream
    }

    /// A handle of the stream that asks nothing by itself.
    pub async fn stream(&self) -> Result<Stream<()>, LogError> {
        let stream = self.context.get_stream_no_info(&self.identity.stream).await;
        stream.map_err(|error| unavailable(self.stream_name(), "cannot name it", &error))
    }

    /// Raises what is known and wakes who waits.
    pub fn raise(&self, position: u64, time: Option<Time>) {
        self.state.lock().raise(position, time);
        self.changed.send_replace(());
    }

    /// Nothing more of this stream can be believed.
    pub fn fail(&self, why: String) {
        tracing::error!(stream = self.stream_name(), why, "log stopped");
        self.state.lock().failure.get_or_insert(why);
        self.changed.send_replace(());
    }

    pub fn failure(&self) -> Option<LogError> {
        let cause = self.state.lock().failure.clone()?;
        Some(LogError::Changed { stream: self.stream_name().to_owned(), what: cause })
    }

    /// The stream's state by its leader; checks that it is the stream that was opened and has not
    /// become shorter.
    pub async fn info(&self) -> LogResult<Info> {
        let until = Instant::now() + PATIENCE;
        let mut wait = BackOff::new();
        loop {
            let stream = self.stream().await?;
            let answer = match stream.get_info().await {
                Ok(info) if led(&info) => Ok(info),
                Ok(_) => Err("it has no leader".to_owned()),
                Err(error) => Err(error.to_string()),
            };
            match answer {
                Ok(info) => {
                    if identity_of(&info) != self.identity.uuid {
                        self.fail("another stream stands in its place".to_owned());
                    }
                    if let Some(error) = self.failure() {
                        return Err(error);
                    }
                    return Ok(info);
                }
                Err(error) if Instant::now() >= until => {
                    return Err(unavailable(self.stream_name(), "cannot read its state", &error));
                }
                Err(_) => wait.wait().await,
            }
        }
    }

    /// Brings the head up to date.
    pub async fn refresh(&self) -> LogResult<()> {
        // Before it is asked: while the answer is under way, others raise it beyond the answer.
        let known = self.state.lock().head;
        let info = self.info().await?;
        let found = info.state.last_sequence;
        if found < known {
            self.fail(format!(
                "it ends at {found}, but had records up to {known}: an older state of the stream was \
                 restored underneath"
            ));
            return Err(self.failure().unwrap_or_else(|| self.gone(found + 1, known + 1)));
        }
        self.state.lock().take(&info, self.copied_to);
        self.changed.send_replace(());
        Ok(())
    }

    pub fn gone(&self, from: u64, resume: u64) -> LogError {
        let (stream, place) = (self.identity.stream.clone(), "JetStream".to_owned());
        LogError::Damaged { stream, place, from, resume }
    }
}

impl Log for JetStreamLog {
    fn identity(&self) -> &LogIdentity {
        &self.shared.identity
    }

    fn head(&self) -> u64 {
        self.shared.state.lock().head
    }

    fn first(&self) -> u64 {
        self.shared.state.lock().first
    }

    fn last_time(&self) -> Option<Time> {
        self.shared.state.lock().last_time
    }

    fn refresh(&self) -> BoxFuture<'static, LogResult<()>> {
        let shared = self.shared.clone();
        self.run(async move { shared.refresh().await })
    }

    fn append(&self, messages: Vec<Message>) -> BoxFuture<'static, LogResult<Appended>> {
        let shared = self.shared.clone();
        self.run(async move { shared.append(messages).await })
    }

    fn append_at(
        &self,
        messages: Vec<Message>,
        head: u64,
    ) -> BoxFuture<'static, LogResult<Appended>> {
        let shared = self.shared.clone();
        self.run(async move { shared.append_at(messages, head).await })
    }

    fn commit(
        &self,
        parts: Vec<Message>,
        commit: Message,
        previous: u64,
    ) -> BoxFuture<'static, LogResult<Appended>> {
        let shared = self.shared.clone();
        self.run(async move { shared.commit(parts, commit, previous).await })
    }

    fn last_commit(&self) -> BoxFuture<'static, LogResult<Option<Record>>> {
        let shared = self.shared.clone();
        let subject = format!(
            "out.{}.commit",
            self.shared.stream_name().rsplit('_').next().unwrap_or_default()
        );
        self.run(async move { shared.last_commit(&subject).await })
    }

    fn read(&self, from: u64, bytes_max: usize) -> BoxFuture<'static, LogResult<Vec<Record>>> {
        if let Some(records) = self.shared.tail.take(from, bytes_max) {
            // Whoever waits may have waited for just these.
            self.shared.changed.send_replace(());
            return Box::pin(futures::future::ready(Ok(records)));
        }
        let shared = self.shared.clone();
        self.run(async move { shared.read(from, bytes_max).await })
    }

    fn wait_beyond(&self, position: u64) -> BoxFuture<'static, ()> {
        self.shared.follow_from(position + 1);
        let shared = self.shared.clone();
        Box::pin(async move {
            let mut changed = shared.changed.subscribe();
            loop {
                // Another reader may have taken what was fetched for this one: it is fetched again.
                shared.follow_from(position + 1);
                let known = shared.tail.has(position + 1) || shared.state.lock().failure.is_some();
                // An error means that the log is gone.
                if known || changed.changed().await.is_err() {
                    return;
                }
            }
        })
    }

    fn failure(&self) -> Option<LogError> {
        self.shared.failure()
    }
}
