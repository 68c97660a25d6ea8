//! Live spend of an org as a stream of events: subscribes, asks, and goes on through restarts of
//! servers and engines. The rules are in [`follow`](super::follow); this does what they say.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use futures::StreamExt;
//! use meterr_connectors::nats::connection::NatsSettings;
//! use meterr_connectors::nats::subscriber::{LiveEvent, Subscriber};
//!
//! let url = "nats://127.0.0.1:4222".to_owned();
//! let settings = NatsSettings { url, ..NatsSettings::default() };
//! let mut events = Subscriber::connect(&settings).await?.follow("acme").await?;
//! while let Some(event) = events.next().await {
//!     match event {
//!         LiveEvent::Snapshot(all) => println!("{} views", all.views.len()),
//!         LiveEvent::Change(change) => println!("epoch {}", change.epoch),
//!         LiveEvent::Reset => println!("beginning anew"),
//!         LiveEvent::Interrupted(why) => println!("waiting: {why}"),
//!     }
//! }
//! # Ok(())
//! # }
//! ```

use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use async_nats::{Client, Message, SubscribeError};
use bytes::Bytes;
use futures::{Stream, StreamExt};
use meterr_operators::ids::org_valid;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout_at};

use super::connection::{ConnectError, NatsSettings, connect};
use super::follow::{self, Follower, Input, Output};
use super::subjects;
use crate::changes::LiveMessage;

/// Events kept for a reader that takes its time; then messages wait in the client, and at last the
/// server drops some, which are asked for again.
const BACKLOG: usize = 256;
/// Time between two messages of an answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Bytes of an answer at most.
const ANSWER_BYTES_MAX: usize = 1 << 30;
/// Time between looks at the connection.
const TICK: Duration = Duration::from_millis(250);
/// Wait after a question without an answer: at first, and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// What a reader hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LiveEvent {
    /// Every row of the org at an epoch; comes first.
    Snapshot(LiveMessage),
    /// The rows one commit changed, each once and in order.
    Change(LiveMessage),
    /// Too much was missed; a snapshot follows.
    Reset,
    /// There is nobody to ask at the moment. Changes go on coming if they can, nothing is lost.
    Interrupted(String),
}

/// Why an org cannot be followed.
#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// No org has such a name.
    #[error("{0:?} is no org: 1 to 128 of A-Z, a-z, 0-9, _ and -")]
    Org(String),
    /// The connection is closed.
    #[error("cannot subscribe: {0}")]
    Subscribe(#[from] SubscribeError),
}

/// A connection to follow orgs by.
#[derive(Debug, Clone)]
pub struct Subscriber {
    client: Client,
    quiet: Duration,
}

impl Subscriber {
    /// Connects.
    ///
    /// # Errors
    /// When no server answers or it cannot be used.
    pub async fn connect(settings: &NatsSettings) -> Result<Subscriber, ConnectError> {
        Ok(Subscriber::on(connect(settings, "meterr subscriber").await?))
    }

    /// On a connection that is there. It should come back by itself.
    pub fn on(client: Client) -> Subscriber {
        Subscriber { client, quiet: Duration::from_secs(10) }
    }

    /// Asks after this long without a message whether one was lost (10 s).
    pub fn quiet(mut self, quiet: Duration) -> Subscriber {
        self.quiet = quiet;
        self
    }

    /// Follows an org. The stream ends when the connection is closed for good, not by itself.
    ///
    /// # Errors
    /// When there can be no such org, or the connection is closed.
    pub async fn follow(&self, org: &str) -> Result<Following, FollowError> {
        if !org_valid(org) {
            return Err(FollowError::Org(meterr_operators::event::excerpt(org).to_string()));
        }
        let live = self.client.subscribe(subjects::spend(org)).await?;
        let (sender, receiver) = mpsc::channel(BACKLOG);
        let task = Task {
            client: self.client.clone(),
            org: org.to_owned(),
            quiet: self.quiet,
            sender,
            waits: BACK_OFF.0,
        };
        Ok(Following { receiver, task: tokio::spawn(task.run(live)) })
    }
}

/// Events of an org. Dropping it ends the subscription.
#[derive(Debug)]
pub struct Following {
    receiver: mpsc::Receiver<LiveEvent>,
    task: JoinHandle<()>,
}

impl Stream for Following {
    type Item = LiveEvent;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<LiveEvent>> {
        self.receiver.poll_recv(cx)
    }
}

impl Drop for Following {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a question brought.
enum Asked {
    Answer(u64, LiveMessage),
    Failed(u64, String),
}

struct Task {
    client: Client,
    org: String,
    quiet: Duration,
    sender: mpsc::Sender<LiveEvent>,
    waits: Duration,
}

impl Task {
    async fn run(mut self, mut live: async_nats::Subscriber) {
        let (mut follower, mut todo) = Follower::new(&self.org);
        let (answers, mut answered) = mpsc::channel::<Asked>(16);
        let connects = |client: &Client| client.statistics().connects.load(Ordering::Relaxed);
        let mut connected = connects(&self.client);
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        let mut ask_at: Option<Instant> = None;
        // The question under way; a new one ends it.
        let mut question: Option<JoinHandle<()>> = None;
        loop {
            for output in std::mem::take(&mut todo) {
                match output {
                    Output::Event(event) => {
                        if self.tell(event).await.is_err() {
                            return;
                        }
                    }
                    Output::AskLater => {
                        ask_at = Some(Instant::now() + self.waits);
                        self.waits = (self.waits * 2).min(BACK_OFF.1);
                    }
                    Output::Ask(number, after) => {
                        ask_at = None;
                        let payload = after.map_or_else(String::new, |after| {
                            format!("{{\"after\":\"{}-{}\"}}", after.shard, after.epoch)
                        });
                        let subject = subjects::query(&self.org);
                        let asking =
                            ask(self.client.clone(), subject, payload, number, answers.clone());
                        if let Some(before) = question.replace(tokio::spawn(asking)) {
                            before.abort();
                        }
                    }
                }
            }
            todo = tokio::select! {
                message = live.next() => {
                    // The connection was closed by its owner.
                    let Some(message) = message else { return };
                    heard = Instant::now();
                    match serde_json::from_slice(&message.payload) {
                        Ok(message) => follower.on(Input::Live(message)),
                        Err(error) => {
                            tracing::warn!(subject = %message.subject, %error, "strange live message");
                            Vec::new()
                        }
                    }
                }
                Some(asked) = answered.recv() => {
                    heard = Instant::now();
                    match asked {
                        Asked::Answer(number, message) => {
                            self.waits = BACK_OFF.0;
                            follower.on(Input::Answer(number, message))
                        }
                        Asked::Failed(number, why) => {
                            let out = follower.on(Input::Failed(number));
                            if !out.is_empty()
                                && self.sender.send(LiveEvent::Interrupted(why)).await.is_err()
                            {
                                return;
                            }
                            out
                        }
                    }
                }
                _ = tick.tick() => {
                    let now = connects(&self.client);
                    let returned = std::mem::replace(&mut connected, now) != now;
                    let due = ask_at.is_some_and(|at| Instant::now() >= at);
                    let quiet = ask_at.is_none() && heard.elapsed() >= self.quiet;
                    if returned || due || quiet {
                        heard = Instant::now();
                        follower.on(Input::Doubt)
                    } else {
                        Vec::new()
                    }
                }
                () = self.sender.closed() => return,
            };
        }
    }

    async fn tell(
        &self,
        event: follow::LiveEvent,
    ) -> Result<(), mpsc::error::SendError<LiveEvent>> {
        let event = match event {
            follow::LiveEvent::Snapshot(message) => LiveEvent::Snapshot(message),
            follow::LiveEvent::Change(message) => LiveEvent::Change(message),
            follow::LiveEvent::Reset => LiveEvent::Reset,
        };
        self.sender.send(event).await
    }
}

/// Asks a question and hands on its answer.
async fn ask(
    client: Client,
    subject: String,
    payload: String,
    number: u64,
    answers: mpsc::Sender<Asked>,
) {
    let failed = |why: String| Asked::Failed(number, why);
    let inbox = client.new_inbox();
    let asked = async {
        let replies = client.subscribe(inbox.clone()).await.map_err(|e| e.to_string())?;
        let sent = client.publish_with_reply(subject, inbox, Bytes::from(payload)).await;
        sent.map_err(|e| e.to_string()).map(|()| replies)
    };
    let mut replies = match asked.await {
        Ok(replies) => replies,
        // Whoever asked may have gone.
        Err(why) => return drop(answers.send(failed(why)).await),
    };
    let mut bytes = 0;
    loop {
        let reply = match timeout_at(Instant::now() + ANSWER, replies.next()).await {
            Ok(Some(reply)) => read(&reply),
            Ok(None) => Err("the connection was closed".to_owned()),
            Err(_) => Err(format!("no answer within {} s", ANSWER.as_secs())),
        };
        let last = match reply {
            Ok((message, length)) => {
                bytes += length;
                let more = message.more;
                if bytes > ANSWER_BYTES_MAX {
                    let why = format!("the answer is longer than {ANSWER_BYTES_MAX} bytes");
                    return drop(answers.send(failed(why)).await);
                }
                if answers.send(Asked::Answer(number, message)).await.is_err() {
                    return;
                }
                !more
            }
            Err(why) => return drop(answers.send(failed(why)).await),
        };
        if last {
            return;
        }
    }
}

/// Reads a message of an answer.
fn read(reply: &Message) -> Result<(LiveMessage, usize), String> {
    if reply.status == Some(async_nats::StatusCode::NO_RESPONDERS) {
        return Err("no engine is there to answer".to_owned());
    }
    let header =
        |name: &str| reply.headers.as_ref()?.get(name).map(|value| value.as_str().to_owned());
    if let Some(error) = header("Nats-Service-Error") {
        let code = header("Nats-Service-Error-Code").unwrap_or_default();
        return Err(format!("the engine answers {code}: {error}"));
    }
    let message = serde_json::from_slice(&reply.payload)
        .map_err(|error| format!("the answer cannot be read: {error}"))?;
    Ok((message, reply.payload.len()))
}
