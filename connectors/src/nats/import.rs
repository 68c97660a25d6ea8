//! JetStream as a place to copy logs from and to.
//!
//! A stream is created with the identity of the log it is copied from, and its metadata says up to
//! which position it is a copy. A copied record carries its log time in a header and is published to
//! stand exactly at its position (`Nats-Expected-Last-Sequence`), many of them on the way at once: what
//! is lost or comes after a record of somebody else is refused by the server, and nothing can be stored
//! twice. After a failure the stream is asked where it ends, and copying goes on from there.
//!
//! All streams are created before the first record is copied. Until the copy is whole at least one of
//! them ends before the position its metadata names, which is how a node sees that it must not begin.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use async_nats::jetstream;
use async_nats::jetstream::message::PublishMessage;
use futures::TryStreamExt;
use futures::future::BoxFuture;
use meterr_operators::ids::ShardId;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::log::{BackOff, Connections, JetStreamLog, PATIENCE, Shared, unavailable};
use super::record::{of_transport, to_headers};
use super::streams::{COPIED_TO_KEY, TIME_HEADER, Wanted, copied_to};
use super::write::told;
use crate::copy::{CHUNK_BYTES, Import, Place, belongs, difference};
use crate::log::{Log, LogError, LogIdentity, LogResult, Message, Record};

/// Records on the way at once.
const WINDOW: usize = 512;
/// Room for the headers that a copy adds.
const ADDED_BYTES: usize = 256;

/// A JetStream account that logs are copied from or into.
pub struct JetStreamPlace {
    connections: Connections,
    replicas: usize,
    bytes_max: Option<i64>,
    opened: Mutex<BTreeMap<String, JetStreamLog>>,
}

impl JetStreamPlace {
    /// Looks at nothing yet. Streams are created with so many replicas and, where given, with a limit
    /// of so many bytes each.
    pub fn new(connections: Connections, replicas: usize, bytes_max: Option<i64>) -> Self {
        JetStreamPlace { connections, replicas, bytes_max, opened: Mutex::default() }
    }

    fn wanted(&self, stream: &str) -> LogResult<Wanted> {
        wanted(stream, self.replicas, self.bytes_max)
    }
}

/// What a stream of a deployment must be like, by its name.
///
/// # Errors
/// When no deployment has a stream of that name.
pub fn wanted(stream: &str, replicas: usize, bytes_max: Option<i64>) -> LogResult<Wanted> {
    let shard = |prefix| stream.strip_prefix(prefix).and_then(|n: &str| n.parse().ok());
    if !belongs(stream) {
        let what = "no deployment has a stream of that name".to_owned();
        return Err(LogError::Format { stream: stream.to_owned(), what });
    }
    Ok(match (shard("USAGE_"), shard("OUT_")) {
        (Some(shard), _) => Wanted::usage(ShardId(shard), replicas, bytes_max),
        (_, Some(shard)) => Wanted::out(ShardId(shard), replicas, bytes_max),
        _ => Wanted::control(replicas, bytes_max),
    })
}

/// The streams of a deployment that an account has.
///
/// # Errors
/// [`LogError::Unavailable`] when the server does not tell.
pub async fn streams(connections: &Connections) -> LogResult<Vec<String>> {
    let until = Instant::now() + PATIENCE;
    let mut wait = BackOff::new();
    loop {
        let names = connections.output().stream_names();
        match names.try_filter(|name| std::future::ready(belongs(name))).try_collect().await {
            Ok(names) => return Ok(names),
            Err(error) if Instant::now() >= until => {
                return Err(unavailable("CONTROL", "cannot list the streams", &error));
            }
            Err(_) => wait.wait().await,
        }
    }
}

/// Whether a subject is one of a stream's; both are what they seem, without wildcards in the subject.
fn subject_fits(pattern: &str, subject: &str) -> bool {
    let plain = |token: &str| {
        !token.is_empty() && !token.contains(|c: char| matches!(c, '*' | '>') || c <= ' ')
    };
    let mut tokens = subject.split('.');
    let fits = pattern.split('.').all(|wanted| {
        tokens.next().is_some_and(|token| plain(token) && (wanted == "*" || wanted == token))
    });
    fits && tokens.next().is_none()
}

/// Why JetStream could not keep a message as it is.
fn unfit(message: &Message, subjects: &str, payload_max: usize) -> Option<String> {
    if !subject_fits(subjects, &message.subject) {
        return Some(format!("its subject {:?} is none of {subjects:?}", message.subject));
    }
    for (name, value) in &message.headers {
        if of_transport(name) {
            return Some(format!("its header {name:?} would mean something to NATS"));
        }
        let plain = |c: char| c.is_ascii_graphic() && c != ':';
        if name.is_empty() || !name.chars().all(plain) {
            return Some(format!("NATS cannot carry a header named {name:?}"));
        }
        if value.contains(['\r', '\n']) || value.trim() != value {
            return Some(format!("NATS cannot carry the value of its header {name:?} unchanged"));
        }
    }
    let headers: usize = message.headers.iter().map(|(n, v)| n.len() + v.len() + 4).sum();
    let bytes = headers + message.payload.len() + ADDED_BYTES;
    (bytes > payload_max).then(|| {
        format!(
            "{bytes} bytes, above the server's max_payload of {payload_max}; set max_payload: {} in the \
             server's configuration and reload it",
            bytes.next_multiple_of(1024 * 1024)
        )
    })
}

impl Place for JetStreamPlace {
    fn streams(&self) -> LogResult<Vec<String>> {
        self.connections.runtime.block_on(streams(&self.connections))
    }

    fn find(&self, stream: &str) -> LogResult<Option<Arc<dyn Log>>> {
        let wanted = self.wanted(stream)?;
        if !self.streams()?.iter().any(|name| name == stream) {
            return Ok(None);
        }
        let open = JetStreamLog::open(&self.connections, &wanted, None);
        let log = self.connections.runtime.block_on(open)?;
        self.opened.lock().insert(stream.to_owned(), log.clone());
        Ok(Some(Arc::new(log)))
    }

    fn unfinished(&self) -> LogResult<bool> {
        Ok(self.opened.lock().values().any(JetStreamLog::unfinished))
    }

    fn refuses(&self, stream: &str, message: &Message) -> Option<String> {
        match self.wanted(stream) {
            Ok(wanted) => unfit(message, &wanted.subject, self.connections.output.max_payload()),
            Err(error) => Some(error.to_string()),
        }
    }

    fn obstacle(&self, stream: &str) -> Option<String> {
        let opened = self.opened.lock();
        let log = opened.get(stream)?;
        let (copied, head) = (log.copied_to(), log.head());
        (head > copied).then(|| {
            format!(
                "its records {} to {head} were published to it, so no more can be copied behind them",
                copied + 1
            )
        })
    }

    fn begin(&self) -> LogResult<()> {
        // The streams' metadata say it.
        Ok(())
    }

    fn open(&self, identity: &LogIdentity, to: u64) -> LogResult<Arc<dyn Import>> {
        let wanted = self.wanted(&identity.stream)?;
        let connections = self.connections.clone();
        let uuid = identity.uuid.clone();
        let log = self.connections.runtime.block_on(async move {
            prepare(&connections, &wanted, &uuid, to).await?;
            JetStreamLog::open(&connections, &wanted, None).await
        })?;
        if log.identity() != identity {
            let what = "another log took its name meanwhile".to_owned();
            return Err(LogError::Changed { stream: identity.stream.clone(), what });
        }
        self.opened.lock().insert(identity.stream.clone(), log.clone());
        Ok(Arc::new(log))
    }

    fn finish(&self) -> LogResult<()> {
        Ok(())
    }
}

/// Creates the stream of a copy, or raises the position up to which it is one.
async fn prepare(connections: &Connections, wanted: &Wanted, uuid: &str, to: u64) -> LogResult<()> {
    let context = connections.output();
    let until = Instant::now() + PATIENCE;
    let mut wait = BackOff::new();
    loop {
        let error = match attempt(&context, wanted, uuid, to).await {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        if Instant::now() >= until {
            return Err(unavailable(&wanted.stream, "cannot create it", &error));
        }
        wait.wait().await;
    }
}

async fn attempt(
    context: &jetstream::Context,
    wanted: &Wanted,
    uuid: &str,
    to: u64,
) -> Result<(), String> {
    match context.get_stream(&wanted.stream).await {
        Ok(stream) => {
            let mut config = stream.cached_info().config.clone();
            if copied_to(&config) >= to {
                return Ok(());
            }
            config.metadata.insert(COPIED_TO_KEY.to_owned(), to.to_string());
            context.update_stream(config).await.map(drop).map_err(|error| told(&error))
        }
        Err(error) => match error.kind() {
            jetstream::context::GetStreamErrorKind::JetStream(cause)
                if cause.error_code() == jetstream::ErrorCode::STREAM_NOT_FOUND =>
            {
                let created = context.create_stream(wanted.config(uuid, Some(to))).await;
                created.map(drop).map_err(|error| told(&error))
            }
            _ => Err(told(&error)),
        },
    }
}

impl JetStreamLog {
    /// Whether the stream is a copy that lacks records. A node must not begin on it.
    pub fn unfinished(&self) -> bool {
        self.head() < self.copied_to()
    }
}

impl Import for JetStreamLog {
    fn import(&self, records: Vec<Record>) -> BoxFuture<'static, LogResult<()>> {
        let shared = self.shared.clone();
        self.run(async move { shared.import(records).await })
    }
}

impl Shared {
    async fn import(&self, records: Vec<Record>) -> LogResult<()> {
        let (Some(first), Some(last)) = (records.first(), records.last()) else { return Ok(()) };
        let (first, last) = (first.position, last.position);
        let mut head = self.state.lock().head;
        if head + 1 != first {
            let what = format!("records from position {first} on do not follow its end at {head}");
            return Err(LogError::Format { stream: self.identity.stream.clone(), what });
        }
        let mut until = Instant::now() + PATIENCE;
        let mut wait = BackOff::new();
        loop {
            let rest = records.get((head + 1 - first) as usize..).unwrap_or_default();
            let error = match self.send(rest).await {
                Ok(()) => {
                    self.raise(last, records.iter().map(|record| record.time).max());
                    return Ok(());
                }
                Err(error) => error,
            };
            // What stands is only seen in the stream. A record of somebody else lets those behind its
            // place pass, so each is looked at.
            let now = self.info().await?.state.last_sequence;
            self.raise(now, None);
            while head < now {
                let stand = self.read(head + 1, CHUNK_BYTES).await?;
                for record in &stand {
                    let own = records.get((record.position - first) as usize);
                    if own.is_none_or(|own| difference(own, record).is_some()) {
                        return Err(self.foreign(record.position));
                    }
                    head = record.position;
                }
                until = Instant::now() + PATIENCE;
                wait = BackOff::new();
            }
            if Instant::now() >= until {
                return Err(unavailable(self.stream_name(), "no acknowledgement", &error));
            }
            wait.wait().await;
        }
    }

    fn foreign(&self, position: u64) -> LogError {
        let what = format!(
            "the record at {position} is not of this copy: somebody publishes to the stream; stop \
             producers and nodes, remove the streams and begin anew"
        );
        LogError::Changed { stream: self.identity.stream.clone(), what }
    }

    /// Publishes records to stand at their positions, each only behind the one before.
    async fn send(&self, records: &[Record]) -> Result<(), String> {
        let mut acks = VecDeque::with_capacity(WINDOW);
        for record in records {
            if acks.len() == WINDOW
                && let Some(ack) = acks.pop_front()
            {
                acknowledged(ack).await?;
            }
            let mut headers = to_headers(&record.message);
            headers.append(TIME_HEADER, record.time.0.to_string().as_str());
            let publish = PublishMessage::build()
                .payload(record.message.payload.clone())
                .headers(headers)
                .expected_stream(self.stream_name())
                .expected_last_sequence(record.position - 1);
            let sent = self.context.send_publish(record.message.subject.clone(), publish).await;
            acks.push_back(sent.map_err(|error| told(&error))?);
        }
        for ack in acks {
            acknowledged(ack).await?;
        }
        Ok(())
    }
}

async fn acknowledged(ack: jetstream::context::PublishAckFuture) -> Result<(), String> {
    ack.await.map(drop).map_err(|error| told(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subjects_of_a_stream() {
        for (pattern, subject) in
            [("usage.3.*", "usage.3.acme"), ("usage.3.*", "usage.3.@batch"), ("control", "control")]
        {
            assert!(subject_fits(pattern, subject), "{pattern} {subject}");
        }
        for subject in
            ["usage.3", "usage.4.a", "usage.3.a.b", "usage.3.", "usage.3.*", "usage.3.a b"]
        {
            assert!(!subject_fits("usage.3.*", subject), "{subject}");
        }
    }

    #[test]
    fn what_jetstream_would_change_or_refuse_is_named() {
        let with = |name: &str, value: &str| {
            let mut message = Message::new("usage.3.acme", "x");
            message.headers.push((name.to_owned(), value.to_owned()));
            unfit(&message, "usage.3.*", 1024)
        };
        assert_eq!(with("ce-id", "ü 1"), None);
        assert_eq!(with("ce-id", ""), None);
        for (name, value, why) in [
            ("Nats-Msg-Id", "1", "mean something"),
            ("meterr-time", "1", "mean something"),
            ("a:b", "1", "named \"a:b\""),
            ("", "1", "named \"\""),
            ("a", "1\n2", "unchanged"),
            ("a", " 1", "unchanged"),
        ] {
            assert!(with(name, value).is_some_and(|found| found.contains(why)), "{name}");
        }
        let message = Message::new("usage.3.acme", vec![0; 1024 - ADDED_BYTES]);
        assert_eq!(unfit(&message, "usage.3.*", 1024), None);
        let why = unfit(&message, "usage.3.*", 1023).unwrap();
        assert!(why.contains("max_payload: 1048576 in"), "{why}");
        assert!(unfit(&Message::new("out.3.part", ""), "usage.3.*", 1024).is_some());
    }

    #[test]
    fn streams_by_their_names() {
        let subject = |stream| wanted(stream, 1, None).map(|wanted| wanted.subject).ok();
        assert_eq!(subject("USAGE_3").as_deref(), Some("usage.3.*"));
        assert_eq!(subject("OUT_12").as_deref(), Some("out.12.*"));
        assert_eq!(subject("CONTROL").as_deref(), Some("control"));
        assert_eq!(subject("OTHER"), None);
    }
}
