//! Live spend of an org as a stream of events: subscribes, asks, and goes on through restarts of
//! servers and engines. The rules are in [`super::follow`]; this does what they say.
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

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use async_nats::connection::State;
use async_nats::{Client, Event, SubscribeError};
use futures::stream::{BoxStream, Fuse, FusedStream};
use futures::{Stream, StreamExt};
use meterr_operators::ids::org_valid;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::asking::{AWAY, Answer, Query, ask};
use super::connection::{ConnectError, NatsSettings, connect_and_hear};
use super::follow::{self, Follower, Input, Limits, Output, weight};
use super::subjects;
use crate::changes::LiveMessage;

/// Events handed over at a time; more of them wait in the backlog.
const HANDED: usize = 4;
/// Time between looks at the connection.
const TICK: Duration = Duration::from_millis(250);
/// Wait after a question of no use: at first, and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Least time between two questions, whatever comes in.
const PACE: Duration = Duration::from_millis(50);

/// What a reader hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LiveEvent {
    /// Every row of the org at an epoch; comes first.
    Snapshot(LiveMessage),
    /// The rows one commit changed, each once and in order.
    Change(LiveMessage),
    /// Too much was missed; a snapshot follows.
    Reset,
    /// There is no server, or nobody to ask, or no answer that is of use. Changes go on coming if
    /// they can, nothing is lost. Said once until it is over or there is another reason.
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
    /// How often the client had to drop messages.
    drops: Arc<AtomicU64>,
    quiet: Duration,
    patience: Duration,
    backlog_bytes: usize,
    limits: Limits,
}

impl Subscriber {
    /// Connects.
    ///
    /// # Errors
    /// When no server answers or it cannot be used.
    pub async fn connect(settings: &NatsSettings) -> Result<Subscriber, ConnectError> {
        let drops = Arc::new(AtomicU64::new(0));
        let count = drops.clone();
        let client = connect_and_hear(settings, "meterr subscriber", move |event| {
            if matches!(event, Event::SlowConsumer(_)) {
                count.fetch_add(1, Ordering::Relaxed);
            }
        });
        Ok(Subscriber { drops, ..Subscriber::on(client.await?) })
    }

    /// On a connection that is there. It should come back by itself. When its client drops messages,
    /// that shows by the next change, or after a while of quiet.
    pub fn on(client: Client) -> Subscriber {
        Subscriber {
            client,
            drops: Arc::new(AtomicU64::new(0)),
            quiet: Duration::from_secs(10),
            patience: Duration::from_secs(5),
            backlog_bytes: 64 << 20,
            limits: Limits::default(),
        }
    }

    /// Asks after this long without a message whether one was lost: 10 s unless set.
    pub fn quiet(mut self, quiet: Duration) -> Subscriber {
        self.quiet = quiet;
        self
    }

    /// Waits so long for an answer, and for each of its messages after another: 5 s unless set.
    pub fn patience(mut self, patience: Duration) -> Subscriber {
        self.patience = patience;
        self
    }

    /// Keeps about so many bytes of events for a reader that takes its time: 64 MiB unless set.
    /// Beyond them changes are dropped, and asked for once the reader has taken what is there.
    pub fn backlog_bytes(mut self, bytes: usize) -> Subscriber {
        self.backlog_bytes = bytes;
        self
    }

    /// What else may be kept in memory.
    pub fn limits(mut self, limits: Limits) -> Subscriber {
        self.limits = limits;
        self
    }

    /// Follows an org. Must be called in a tokio runtime, which then does the work. The stream ends
    /// when the connection is closed for good, not by itself.
    ///
    /// # Errors
    /// When there can be no such org, or the connection is closed.
    pub async fn follow(&self, org: &str) -> Result<Following, FollowError> {
        if !org_valid(org) {
            return Err(FollowError::Org(meterr_operators::event::excerpt(org)));
        }
        let live = self.client.subscribe(subjects::spend(org)).await?;
        let (sender, receiver) = mpsc::channel(HANDED);
        let task = Task::new(self, org);
        Ok(Following { receiver, task: tokio::spawn(task.run(live, sender)) })
    }

    /// How often the connection was made, and messages were dropped.
    fn trouble(&self) -> (u64, u64) {
        let connects = self.client.statistics().connects.load(Ordering::Relaxed);
        (connects, self.drops.load(Ordering::Relaxed))
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

/// Events not taken yet. The task goes on reading meanwhile: what it left in the client would be
/// dropped there one day, by number and not by size.
#[derive(Default)]
struct Backlog {
    events: VecDeque<(LiveEvent, usize)>,
    bytes: usize,
}

impl Backlog {
    fn push(&mut self, event: LiveEvent) {
        let bytes = match &event {
            LiveEvent::Snapshot(message) | LiveEvent::Change(message) => weight(message),
            LiveEvent::Reset => 0,
            LiveEvent::Interrupted(why) => why.len(),
        };
        self.bytes += bytes;
        self.events.push_back((event, bytes));
    }

    fn pop(&mut self) -> Option<LiveEvent> {
        let (event, bytes) = self.events.pop_front()?;
        self.bytes -= bytes;
        Some(event)
    }
}

/// One org followed.
struct Task {
    subscriber: Subscriber,
    org: String,
    follower: Follower,
    backlog: Backlog,
    /// Something was not taken in, since the backlog was full.
    missed: bool,
    /// The question under way.
    answers: Fuse<BoxStream<'static, Answer>>,
    /// No question before.
    pace: Instant,
    /// When to ask after a question of no use.
    ask_at: Option<Instant>,
    wait: Duration,
    /// Why the reader was told that it has to wait.
    interrupted: Option<String>,
}

impl Task {
    fn new(subscriber: &Subscriber, org: &str) -> Task {
        let (follower, todo) = Follower::new(org, subscriber.limits);
        let nothing = futures::stream::empty().boxed().fuse();
        let mut task = Task {
            subscriber: subscriber.clone(),
            org: org.to_owned(),
            follower,
            backlog: Backlog::default(),
            missed: false,
            answers: nothing,
            pace: Instant::now(),
            ask_at: None,
            wait: BACK_OFF.0,
            interrupted: None,
        };
        task.act(todo);
        task
    }

    async fn run(mut self, mut live: async_nats::Subscriber, sender: mpsc::Sender<LiveEvent>) {
        let mut trouble = self.subscriber.trouble();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        loop {
            tokio::select! {
                place = sender.reserve(), if !self.backlog.events.is_empty() => {
                    // The reader has gone.
                    let Ok(place) = place else { return };
                    if let Some(event) = self.backlog.pop() {
                        place.send(event);
                    }
                    if self.backlog.events.is_empty() && std::mem::take(&mut self.missed) {
                        self.take(Input::Doubt);
                    }
                }
                message = live.next() => {
                    // The connection was closed by its owner.
                    let Some(message) = message else { return };
                    heard = Instant::now();
                    self.live(&message);
                }
                Some(answer) = self.answers.next(), if !self.answers.is_terminated() => {
                    heard = Instant::now();
                    self.answer(answer);
                }
                _ = tick.tick() => {
                    if self.subscriber.client.connection_state() == State::Disconnected {
                        self.interrupted(AWAY.to_owned());
                        continue;
                    }
                    let now = self.subscriber.trouble();
                    let lost = std::mem::replace(&mut trouble, now) != now;
                    let due = self.ask_at.is_some_and(|at| Instant::now() >= at);
                    let quiet = self.ask_at.is_none() && heard.elapsed() >= self.subscriber.quiet;
                    if lost || due || quiet {
                        heard = Instant::now();
                        self.take(Input::Doubt);
                    }
                }
                () = sender.closed() => return,
            }
        }
    }

    /// Takes in a message of `spend.<org>`.
    fn live(&mut self, message: &async_nats::Message) {
        if self.backlog.bytes > self.subscriber.backlog_bytes {
            self.missed = true;
            return;
        }
        match LiveMessage::read(&message.payload) {
            Ok(message) => {
                // Somebody is there who commits.
                let soon = Instant::now() + BACK_OFF.0;
                self.ask_at = self.ask_at.map(|at| at.min(soon));
                self.take(Input::Live(message));
            }
            Err(error) => {
                tracing::debug!(subject = %message.subject, %error, "live message cannot be read");
                self.take(Input::Doubt);
            }
        }
    }

    /// Takes in what came of a question.
    fn answer(&mut self, answer: Answer) {
        match answer {
            Answer::Message(number, message) => self.take(Input::Answer(number, message)),
            Answer::Failed(number, why) => {
                self.interrupted(why);
                self.take(Input::Failed(number));
            }
        }
        if !self.follower.asking() && self.ask_at.is_none() {
            (self.wait, self.interrupted) = (BACK_OFF.0, None);
        }
    }

    fn take(&mut self, input: Input) {
        // An answer would only make the backlog longer.
        if matches!(input, Input::Doubt) && self.backlog.bytes > self.subscriber.backlog_bytes {
            self.missed = true;
            return;
        }
        let todo = self.follower.on(input);
        self.act(todo);
    }

    fn act(&mut self, todo: Vec<Output>) {
        for output in todo {
            match output {
                Output::Event(event) => self.backlog.push(match event {
                    follow::LiveEvent::Snapshot(message) => LiveEvent::Snapshot(message),
                    follow::LiveEvent::Change(message) => LiveEvent::Change(message),
                    follow::LiveEvent::Reset => LiveEvent::Reset,
                }),
                Output::AskLater(why) => {
                    if why != follow::Useless::Failed {
                        self.interrupted(why.to_string());
                    }
                    self.ask_at = Some(Instant::now() + self.wait);
                    self.wait = (self.wait * 2).min(BACK_OFF.1);
                }
                Output::Ask(number, after) => {
                    self.ask_at = None;
                    let at = self.pace.max(Instant::now());
                    self.pace = at + PACE;
                    let query = Query {
                        client: self.subscriber.client.clone(),
                        subject: subjects::query(&self.org),
                        number,
                        after,
                        at,
                        patience: self.subscriber.patience,
                    };
                    self.answers = ask(query).fuse();
                }
            }
        }
    }

    /// Tells the reader that it has to wait, unless it knows that already.
    fn interrupted(&mut self, why: String) {
        if self.interrupted.as_ref() != Some(&why) {
            self.backlog.push(LiveEvent::Interrupted(why.clone()));
            self.interrupted = Some(why);
        }
    }
}
