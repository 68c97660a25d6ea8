//! Followers of orgs whose shards are on other nodes: changes are read from the shard's output log,
//! which does not move when the shard does.
//!
//! One tail a shard is shared by all its followers. It begins with the first, at the last commit there
//! is, and ends with the last. A follower hears every commit behind the epoch it joined at, in order
//! and once; one whose queue is full is let go. Parts count when their commit is there.
//!
//! A log has one sequential reader at a time, so a tail opens the output log anew
//! ([`ClusterLink::open_out`](crate::cluster::link::ClusterLink::open_out)) rather than disturb whoever
//! follows it already.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use meterr_connectors::api::StreamEvent;
use meterr_connectors::log::{Log, LogError, Record};
use meterr_operators::ids::{Positions, ShardId};
use parking_lot::Mutex;
use tokio::sync::{Notify, mpsc};

use crate::catch_up::{as_of, changes_in};
use crate::live::StopReason;
use crate::records::{READ_BYTES, own_parts, parse_commit};
use crate::wire::stream_body;

/// Time before a log that was not available is read again.
const AGAIN: Duration = Duration::from_secs(1);

/// The tails of a node.
#[derive(Default)]
pub struct Tails {
    slots: Mutex<HashMap<ShardId, Arc<Slot>>>,
}

/// Where the tail of a shard is, while there is one. Held while one begins.
type Slot = tokio::sync::Mutex<Option<Arc<Tail>>>;

/// Follows one output log.
struct Tail {
    shard: ShardId,
    state: Mutex<State>,
    /// Told when the last follower has gone.
    over: Notify,
}

struct State {
    /// Epoch of the last commit passed on.
    epoch: u64,
    followers: HashMap<String, Vec<Follower>>,
    count: u64,
    ended: bool,
}

struct Follower {
    id: u64,
    queue: mpsc::Sender<StreamEvent>,
}

/// A follower's place in a tail; dropping it gives it up.
pub(crate) struct Place {
    tail: Arc<Tail>,
    org: String,
    id: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.tail.state.lock();
        if let Some(followers) = state.followers.get_mut(&self.org) {
            followers.retain(|follower| follower.id != self.id);
            if followers.is_empty() {
                state.followers.remove(&self.org);
            }
        }
        self.tail.end_if_alone(&mut state);
    }
}

impl Tails {
    /// Joins the followers of an org: its changes in the epochs behind the returned one go to `queue`.
    /// `open` opens the output log, if this begins a tail, which `runtime` then runs.
    ///
    /// # Errors
    /// A sentence, when the log cannot be opened or read.
    pub(crate) async fn join(
        &self,
        shard: ShardId,
        org: &str,
        queue: mpsc::Sender<StreamEvent>,
        open: impl Future<Output = Result<Arc<dyn Log>, String>>,
        runtime: &tokio::runtime::Handle,
    ) -> Result<(Place, u64), String> {
        let slot = self.slots.lock().entry(shard).or_default().clone();
        let mut slot = slot.lock().await;
        if let Some(tail) = &*slot
            && let Some(joined) = tail.join(org, &queue)
        {
            return Ok(joined);
        }
        let out = open.await?;
        let failed = |error: LogError| error.to_string();
        out.refresh().await.map_err(failed)?;
        let (epoch, position) = match out.last_commit().await.map_err(failed)? {
            None => (0, 0),
            Some(record) => {
                let commit = parse_commit(&record).map_err(|error| error.to_string())?;
                (commit.epoch, record.position)
            }
        };
        let (followers, count, ended) = (HashMap::new(), 0, false);
        let state = Mutex::new(State { epoch, followers, count, ended });
        let tail = Arc::new(Tail { shard, state, over: Notify::new() });
        let joined = tail.join(org, &queue).ok_or("the tail ended as it began")?;
        runtime.spawn(tail.clone().run(out, position + 1));
        *slot = Some(tail);
        Ok(joined)
    }

    /// Number of output logs followed.
    pub fn open(&self) -> usize {
        let slots: Vec<Arc<Slot>> = self.slots.lock().values().cloned().collect();
        let open = |slot: &Arc<Slot>| {
            let slot = slot.try_lock().ok();
            slot.is_none_or(|slot| slot.as_ref().is_some_and(|tail| !tail.state.lock().ended))
        };
        slots.iter().filter(|slot| open(slot)).count()
    }
}

impl Tail {
    /// Adds a follower, unless the tail has ended. With it comes the epoch behind which it hears all.
    fn join(
        self: &Arc<Self>,
        org: &str,
        queue: &mpsc::Sender<StreamEvent>,
    ) -> Option<(Place, u64)> {
        let mut state = self.state.lock();
        if state.ended {
            return None;
        }
        state.count += 1;
        let id = state.count;
        let follower = Follower { id, queue: queue.clone() };
        state.followers.entry(org.to_owned()).or_default().push(follower);
        Some((Place { tail: self.clone(), org: org.to_owned(), id }, state.epoch))
    }

    fn end_if_alone(&self, state: &mut State) {
        if state.followers.is_empty() {
            state.ended = true;
            self.over.notify_one();
        }
    }

    async fn run(self: Arc<Self>, out: Arc<dyn Log>, mut from: u64) {
        let mut parts: Vec<Record> = Vec::new();
        loop {
            tokio::select! {
                biased;
                () = self.over.notified() => return,
                () = out.wait_beyond(from - 1) => {}
            }
            let trouble = match out.read(from, READ_BYTES).await {
                Ok(records) if records.is_empty() => out.failure(),
                Ok(records) => {
                    from += records.len() as u64;
                    match self.take(records, &mut parts) {
                        Ok(()) => continue,
                        Err(error) => return self.fail(&error),
                    }
                }
                Err(error) => Some(error),
            };
            match trouble {
                // Woken for nothing, or the server is away: looked at again in a while.
                None | Some(LogError::Unavailable { .. }) => {
                    tokio::select! {
                        () = self.over.notified() => return,
                        () = tokio::time::sleep(AGAIN) => {}
                    }
                }
                Some(error) => return self.fail(&error),
            }
        }
    }

    /// Ends every follower's stream; they come back by their last id.
    fn fail(&self, error: &dyn std::fmt::Display) {
        let mut state = self.state.lock();
        state.ended = true;
        if !state.followers.is_empty() {
            tracing::error!(shard = %self.shard, %error, "output log cannot be followed");
        }
        state.followers.clear();
    }

    /// Passes records on, as far as they are committed.
    fn take(&self, records: Vec<Record>, parts: &mut Vec<Record>) -> Result<(), StopReason> {
        for record in records {
            if !record.message.subject.ends_with(".commit") {
                parts.push(record);
                continue;
            }
            let commit = parse_commit(&record)?;
            let own = own_parts(parts, &commit, record.position)?;
            let mut state = self.state.lock();
            if !commit.seal && commit.epoch > state.epoch {
                state.epoch = commit.epoch;
                let as_of = as_of(self.shard, &commit);
                self.publish(&mut state, own, &as_of);
            }
            drop(state);
            parts.clear();
        }
        Ok(())
    }

    fn publish(&self, state: &mut State, parts: &[Record], as_of: &Positions) {
        let (shard, epoch) = (self.shard, state.epoch);
        for changes in changes_in(parts, |org| state.followers.contains_key(org)) {
            let Some(followers) = state.followers.get_mut(&changes.org) else { continue };
            let body = stream_body(shard, epoch, as_of, &changes);
            followers.retain(|follower| {
                // A full queue means a reader too slow to follow: it is let go, and resumes.
                let change = StreamEvent::Change { shard, epoch, body: body.clone() };
                follower.queue.try_send(change).is_ok()
            });
        }
        state.followers.retain(|_, followers| !followers.is_empty());
        self.end_if_alone(state);
    }
}
