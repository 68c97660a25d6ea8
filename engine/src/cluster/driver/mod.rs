//! Runs a [`Member`] against the registry, the other nodes and this node's shards. Holds no rules.
//!
//! One task does everything in turn: it reads the registry every eighth of the lease time, when another
//! node nudged and when the member asks to look; it lets the member decide after everything that
//! happened; it executes what was decided. Reads, writes and questions are under way beside it, each with
//! a time limit, after which its outcome counts as not known.
//!
//! Requests of operators are writes of their own ([`Cluster::pin`], [`Cluster::drain`]); the member hears
//! of them like of any other entry, only at once.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use meterr_connectors::cluster::{Entry, PeerError, Peers, Registry, RegistryError};
use meterr_operators::ids::ShardId;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use tokio::time::{Instant, sleep_until, timeout};

use crate::cluster::member::{Action, Member, Settings};
use crate::cluster::records::{Drain, FORMAT, Key, Pin, RecordError, Session, parse, write};
use crate::cluster::{ClusterView, NodeView, Shards};

#[cfg(test)]
mod tests;

/// Requests that wait for the task.
const REQUESTS_MAX: usize = 64;
/// How often a write of an operator is tried when others write the same entry.
const ATTEMPTS_MAX: u32 = 5;

/// What the driver works with.
#[derive(Clone)]
pub struct Surroundings {
    /// The registry.
    pub registry: Arc<dyn Registry>,
    /// The other nodes.
    pub peers: Arc<dyn Peers>,
    /// This node's shards.
    pub shards: Arc<dyn Shards>,
}

/// How a node's membership ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It left in order.
    Left,
    /// It cannot be part of the cluster, for this reason.
    Refused(String),
}

/// Why a request was not done.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ClusterError {
    /// It names something that is not there.
    #[error("{0}")]
    Unknown(String),
    /// The registry failed; for a write it is not known whether it happened.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A newer version wrote the entry.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// This node is no part of the cluster any more.
    #[error("this node is no part of the cluster any more")]
    Ended,
}

enum Request {
    Release(Bytes, oneshot::Sender<Bytes>),
    Noted { key: String, revision: u64, value: Bytes },
    Report(BTreeMap<String, f64>),
    Leave,
}

enum Event {
    Read { begun: Duration, entries: Result<Vec<Entry>, RegistryError> },
    Wrote { key: String, outcome: Result<u64, RegistryError> },
    Answered { shard: ShardId, answer: Result<Bytes, PeerError> },
    Nudged,
    Nothing,
}

/// This node's part in the cluster, as the rest of the node sees it. When the last clone is dropped the
/// task ends without leaving.
#[derive(Clone)]
pub struct Cluster {
    node: String,
    shards: u16,
    registry: Arc<dyn Registry>,
    requests: mpsc::Sender<Request>,
    changed: Arc<Notify>,
    view: watch::Receiver<ClusterView>,
    ended: watch::Receiver<Option<End>>,
}

/// Makes this node part of the cluster, on the current tokio runtime. `seed` must be random: sessions are
/// drawn from it.
pub fn start(settings: Settings, seed: u64, with: Surroundings) -> Cluster {
    let (requests, incoming) = mpsc::channel(REQUESTS_MAX);
    let (ended, end) = watch::channel(None);
    let changed = Arc::new(Notify::new());
    let member = Member::new(settings.clone(), seed);
    let view = watch::Sender::new(member.view(Duration::ZERO));
    let cluster = Cluster {
        node: settings.node,
        shards: settings.shards,
        registry: with.registry.clone(),
        requests,
        changed: changed.clone(),
        view: view.subscribe(),
        ended: end,
    };
    let (ttl, origin) = (settings.ttl, Instant::now());
    let running = FuturesUnordered::new();
    let told = BTreeSet::new();
    let driver = Driver {
        member,
        with,
        ttl,
        origin,
        running,
        reading: false,
        next_read: origin,
        view,
        told,
    };
    tokio::spawn(async move {
        let how = driver.run(incoming, changed).await;
        ended.send_replace(how);
    });
    cluster
}

impl Cluster {
    /// The cluster as this node sees it. Tells of every change but that of how long ago a node was heard.
    pub fn view(&self) -> watch::Receiver<ClusterView> {
        self.view.clone()
    }

    /// To be called when one of this node's shards became something else.
    pub fn shards_changed(&self) {
        self.changed.notify_one();
    }

    /// Answers another node's request for a shard (`{"ask":"release",…}`). What is none is answered with
    /// a refusal.
    pub async fn handle_release(&self, question: Bytes) -> Bytes {
        let (reply, answer) = oneshot::channel();
        // Without an answer the node that asks goes on waiting, and asks again.
        if self.requests.send(Request::Release(question, reply)).await.is_err() {
            return Bytes::new();
        }
        answer.await.unwrap_or_default()
    }

    /// Sets what this node says of its load, by name, at its next beat.
    pub fn report(&self, figures: BTreeMap<String, f64>) {
        // When there is no room there is a newer report soon.
        drop(self.requests.try_send(Request::Report(figures)));
    }

    /// Resolves when the membership ended; `None` when the task did without an end.
    pub async fn ended(&self) -> Option<End> {
        let mut ended = self.ended.clone();
        let end = ended.wait_for(Option::is_some).await.ok();
        end.and_then(|end| end.clone())
    }

    /// Hands all shards over and leaves. Resolves when that is done; after [`Settings::leave_max`] what
    /// nobody took is let go of. When the registry is away it may take for ever: bound it.
    pub async fn leave(&self) -> Option<End> {
        drop(self.requests.send(Request::Leave).await);
        self.ended().await
    }

    /// Moves a shard to a node, and keeps it there while that node is there; `None` lets placement
    /// decide again.
    ///
    /// # Errors
    /// When there is no such shard or node, or the registry does not take it.
    pub async fn pin(&self, shard: ShardId, node: Option<&str>) -> Result<(), ClusterError> {
        if shard.0 >= self.shards {
            let last = self.shards.saturating_sub(1);
            let what = format!("there is no shard {shard}; they are 0 to {last}");
            return Err(ClusterError::Unknown(what));
        }
        let value = write(&Pin { format: FORMAT, node: node.map(str::to_owned) });
        self.request(Key::Pin(shard), value, node).await
    }

    /// Drains a node: its shards go to others and none to it, until this is taken back.
    ///
    /// # Errors
    /// When there is no such node, or the registry does not take it.
    pub async fn drain(&self, node: &str, on: bool) -> Result<(), ClusterError> {
        let value = write(&Drain { format: FORMAT, drained: on });
        self.request(Key::Drain(node.to_owned()), value, on.then_some(node)).await
    }

    /// Writes an entry, whatever it was; `node` must be there.
    async fn request(
        &self,
        key: Key,
        value: Bytes,
        node: Option<&str>,
    ) -> Result<(), ClusterError> {
        let name = key.to_string();
        let mut attempt = 0;
        loop {
            let entries = self.registry.read().await?;
            let find = |key: &str| entries.iter().find(|entry| entry.key == key);
            if let Some(node) = node {
                check_node(node, &entries)?;
            }
            let expected = match find(&name) {
                Some(entry) => {
                    let newer = parse::<Pin>(&name, &entry.value).err();
                    if let Some(error @ RecordError::Newer { .. }) = newer {
                        return Err(error.into());
                    }
                    entry.revision
                }
                None => 0,
            };
            let done = self.registry.write(name.clone(), value.clone(), expected).await;
            match done {
                Ok(revision) => {
                    let noted = Request::Noted { key: name, revision, value };
                    return self.requests.send(noted).await.map_err(|_| ClusterError::Ended);
                }
                Err(RegistryError::Conflict { .. }) if attempt < ATTEMPTS_MAX => attempt += 1,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// This node's name.
    pub fn node(&self) -> &str {
        &self.node
    }
}

fn check_node(node: &str, entries: &[Entry]) -> Result<(), ClusterError> {
    let mut there = BTreeSet::new();
    for entry in entries {
        if let Some(Key::Node(name)) = Key::parse(&entry.key) {
            match parse::<Session>(&entry.key, &entry.value) {
                Ok(session) if session.over() => {}
                // A node of a newer version is a node.
                Ok(_) | Err(RecordError::Newer { .. }) => drop(there.insert(name)),
                Err(RecordError::Damaged { .. }) => {}
            }
        }
    }
    if there.contains(node) {
        return Ok(());
    }
    let names: Vec<&str> = there.iter().map(String::as_str).collect();
    Err(ClusterError::Unknown(format!("there is no node {node:?}; there are {}", names.join(", "))))
}

/// How long a read or a write may take. Short, so that one that met a short outage is over long before the
/// node is silent for too long.
fn attempt(ttl: Duration) -> Duration {
    ttl / 4
}

struct Driver {
    member: Member,
    with: Surroundings,
    ttl: Duration,
    origin: Instant,
    running: FuturesUnordered<BoxFuture<'static, Event>>,
    reading: bool,
    next_read: Instant,
    view: watch::Sender<ClusterView>,
    /// Problems that were told.
    told: BTreeSet<String>,
}

impl Driver {
    async fn run(
        mut self,
        mut requests: mpsc::Receiver<Request>,
        changed: Arc<Notify>,
    ) -> Option<End> {
        self.await_nudge();
        loop {
            self.act();
            if let Some(end) = self.end() {
                // What was still to be said; a nudge that waits for others never ends.
                let nudge = self.with.registry.nudge();
                drop(timeout(self.ttl, nudge).await);
                return Some(end);
            }
            if !self.reading && (Instant::now() >= self.next_read) {
                self.read();
            }
            let read_due = self.next_read;
            tokio::select! {
                event = self.running.next() => {
                    if let Some(event) = event {
                        self.take(event);
                    }
                }
                request = requests.recv() => match request {
                    Some(request) => self.request(request),
                    None => return None,
                },
                () = changed.notified() => {}
                () = sleep_until(read_due), if !self.reading => {}
            }
        }
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn end(&self) -> Option<End> {
        if self.member.left() {
            return Some(End::Left);
        }
        self.member.refused().map(End::Refused)
    }

    fn act(&mut self) {
        let held = self.with.shards.held();
        for action in self.member.act(self.now(), &held) {
            self.execute(action);
        }
        if self.member.look() {
            // Soon, and not without a pause: a registry that is away is not asked faster for that.
            self.next_read = self.next_read.min(Instant::now() + self.ttl / 64);
        }
        for problem in self.member.problems() {
            let problem = problem.to_string();
            if !self.told.contains(&problem) {
                tracing::warn!(%problem, "an entry of the registry is left alone");
                self.told.insert(problem);
            }
        }
        let view = self.member.view(self.now());
        self.view.send_if_modified(|last| {
            let heard = |view: &NodeView| NodeView { heard_ms: 0, ..view.clone() };
            let same = last.shards == view.shards
                && last.nodes.iter().map(heard).eq(view.nodes.iter().map(heard));
            *last = view;
            !same
        });
    }

    fn execute(&mut self, action: Action) {
        let Surroundings { registry, peers, shards } = &self.with;
        let limit = attempt(self.ttl);
        match action {
            Action::Write { key, value, expected } => {
                let write = registry.write(key.clone(), value, expected);
                self.running.push(Box::pin(async move {
                    let late = RegistryError::Unavailable(format!("no answer in {limit:?}"));
                    let outcome = timeout(limit, write).await.unwrap_or(Err(late));
                    Event::Wrote { key, outcome }
                }));
            }
            Action::Nudge => {
                let nudge = registry.nudge();
                self.running.push(Box::pin(async move {
                    drop(timeout(limit, nudge).await);
                    Event::Nothing
                }));
            }
            Action::Ask { node, shard, question } => {
                let limit = self.ttl / 2;
                let ask = peers.ask(&node, question, limit);
                self.running.push(Box::pin(async move {
                    let what = format!("an answer in {limit:?}");
                    let late = PeerError::Silent { node, what };
                    let answer = timeout(limit, ask).await.unwrap_or(Err(late));
                    Event::Answered { shard, answer }
                }));
            }
            Action::StandBy(shard) => {
                tracing::debug!(%shard, "shard is to stand by");
                shards.stand_by(shard);
            }
            Action::Own(shard, token) => {
                tracing::info!(%shard, token, "shard is to be owned");
                shards.own(shard, token);
            }
            Action::Release(shard) => {
                tracing::info!(%shard, "shard is to be released");
                shards.release(shard);
            }
            Action::Drop(shard) => {
                tracing::info!(%shard, "shard is to be let go of");
                Shards::drop(&**shards, shard);
            }
        }
    }

    fn read(&mut self) {
        self.reading = true;
        let (begun, limit) = (self.now(), attempt(self.ttl));
        let read = self.with.registry.read();
        self.running.push(Box::pin(async move {
            let late = RegistryError::Unavailable(format!("no answer in {limit:?}"));
            let entries = timeout(limit, read).await.unwrap_or(Err(late));
            Event::Read { begun, entries }
        }));
    }

    fn await_nudge(&mut self) {
        let nudged = self.with.registry.nudged();
        self.running.push(Box::pin(async move {
            nudged.await;
            Event::Nudged
        }));
    }

    fn take(&mut self, event: Event) {
        let now = self.now();
        match event {
            Event::Read { begun, entries } => {
                self.reading = false;
                self.next_read = Instant::now() + self.ttl / 8;
                match entries {
                    Ok(entries) => self.member.read(begun, now, &entries),
                    Err(error) => tracing::debug!(%error, "the registry was not read"),
                }
            }
            Event::Wrote { key, outcome } => {
                if let Err(error) = &outcome {
                    tracing::debug!(%error, key, "not written");
                }
                self.member.wrote(now, &key, outcome);
            }
            Event::Answered { shard, answer } => {
                if let Err(error) = &answer {
                    tracing::debug!(%error, %shard, "no answer");
                }
                self.member.answered(now, shard, answer.ok().as_deref());
            }
            Event::Nudged => {
                self.await_nudge();
                self.next_read = Instant::now();
            }
            Event::Nothing => {}
        }
    }

    fn request(&mut self, request: Request) {
        let now = self.now();
        match request {
            Request::Release(question, reply) => {
                drop(reply.send(self.member.asked(now, &question)));
            }
            Request::Noted { key, revision, value } => {
                self.member.noted(&key, revision, &value);
            }
            Request::Report(figures) => self.member.report(figures),
            Request::Leave => self.member.leave(now),
        }
    }
}
