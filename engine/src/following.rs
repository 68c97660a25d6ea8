//! Following an org: everything first (or what was missed), then every commit's changes, in order,
//! without a gap and each once.
//!
//! While the shard is at work on this node, its changes come from it the moment they are committed.
//! Otherwise they come from its output log ([`tails`](crate::tails)), which goes on wherever the shard
//! goes. Followers of a shard that is handed over hear from it while it stands by, and go on from the
//! log when it leaves this node, without noticing.

use std::collections::VecDeque;
use std::sync::Weak;

use futures::stream::{BoxStream, StreamExt};
use meterr_connectors::api::{ApiError, ApiResult, StreamEvent, StreamId};
use meterr_operators::ids::ShardId;
use tokio::sync::mpsc;

use crate::asking::strange;
use crate::catch_up::Change;
use crate::cluster::Held;
use crate::cluster::link::ClusterLink;
use crate::lifecycle::State;
use crate::questions::{Answered, Refusal, ShardAnswer, ShardQuestion};
use crate::service::Service;
use crate::tails::Place;
use crate::wire::stream_body;

/// Changes a follower may be behind before it is let go.
const FOLLOWER_BACKLOG: usize = 256;

/// One follower.
struct Following {
    service: Service,
    shard: ShardId,
    org: String,
    /// What goes out before the queue.
    first: VecDeque<StreamEvent>,
    /// Epoch up to which everything went out or is in `first`.
    seen: u64,
    queue: mpsc::Receiver<StreamEvent>,
    source: Source,
}

/// Who fills a follower's queue.
enum Source {
    /// The shard on this node, for as long as this is alive.
    Here(Weak<()>),
    /// A tail, in which this is its place.
    Tail(#[expect(dead_code, reason = "held for its drop")] Place),
}

/// Where a follower's changes begin.
#[derive(Debug, Clone, Copy)]
enum From {
    /// With everything.
    Anew,
    /// With everything, since the id to resume from is none of this shard's.
    Reset,
    /// Behind an epoch.
    Epoch(u64),
}

impl Service {
    /// Follows an org.
    pub(crate) async fn follow_org(
        &self,
        org: String,
        after: Option<StreamId>,
    ) -> ApiResult<BoxStream<'static, StreamEvent>> {
        let shard = self.home(&org);
        let from = match after {
            None => From::Anew,
            Some(after) if after.shard == shard => From::Epoch(after.epoch),
            Some(_) => From::Reset,
        };
        let following = self.following(shard, org, from).await?;
        Ok(futures::stream::unfold(following, Following::next).boxed())
    }

    async fn following(&self, shard: ShardId, org: String, from: From) -> ApiResult<Following> {
        let link = self.shared.cluster.get();
        let at_work =
            |link: &ClusterLink| matches!(link.held(shard), Held::Owned { live: true, .. });
        if link.is_none() && self.shared.states[usize::from(shard.0)].lock().0 != State::Live {
            // It may be about to be opened.
            self.ask(shard, ShardQuestion::Progress, None).await?;
        }
        let mut at_work = link.is_none_or(at_work);
        if let (From::Epoch(after), true, true) = (from, at_work, link.is_some()) {
            // A node that was cut off may not know yet that its shard was taken over.
            let known = self.shared.progress[usize::from(shard.0)].borrow().epoch;
            let newest = || async { self.newest_epoch(shard).await.map_err(ApiError::Unavailable) };
            at_work = after <= known || newest().await? < after;
        }
        if at_work {
            match self.follow_here(shard, &org, from).await {
                Err(ApiError::Unavailable(_)) if link.is_some() => {}
                followed => return followed,
            }
        }
        self.follow_out(shard, org, from).await
    }

    /// Follows a shard of this node. Registered first, then the past is read, so nothing falls between.
    async fn follow_here(&self, shard: ShardId, org: &str, from: From) -> ApiResult<Following> {
        let (sender, queue) = mpsc::channel(FOLLOWER_BACKLOG);
        let name = org.to_owned();
        let refused = |refusal: Refusal| self.refused(shard, refusal);
        let asked = self.run_here(shard, move |live| {
            let life = live.follow(&name, sender);
            let epoch = live.progress().epoch;
            let known = matches!(from, From::Epoch(after) if after <= epoch);
            (life, epoch, (!known).then(|| live.snapshot(&name)))
        });
        let (life, epoch, snapshot) = asked.await.map_err(refused)?;
        let mut first = VecDeque::new();
        match (from, snapshot) {
            (From::Anew, Some(snapshot)) => first.push_back(snapshot),
            (_, Some(snapshot)) => first.extend([StreamEvent::Reset, snapshot]),
            (From::Epoch(after), None) => {
                match self.changes_since(shard, org, after, epoch).await {
                    Some(changes) => first.extend(events(shard, &changes)),
                    None => {
                        // Too much to read again: begin anew. The snapshot may be newer than changes
                        // already queued; those are passed over.
                        let name = org.to_owned();
                        let asked = self.run_here(shard, move |live| live.snapshot(&name));
                        let snapshot = asked.await.map_err(refused)?;
                        first.extend([StreamEvent::Reset, snapshot]);
                    }
                }
            }
            (From::Anew | From::Reset, None) => {}
        }
        let seen = first.iter().filter_map(epoch_of_event).max().unwrap_or(epoch);
        let (service, org) = (self.clone(), org.to_owned());
        Ok(Following { service, shard, org, first, seen, queue, source: Source::Here(life) })
    }

    /// Follows a shard's output log. Joined first, then the past is read, so nothing falls between.
    async fn follow_out(&self, shard: ShardId, org: String, from: From) -> ApiResult<Following> {
        let unreadable = |why: &dyn std::fmt::Display| {
            ApiError::Unavailable(format!(
                "the output log of shard {shard} cannot be followed: {why}"
            ))
        };
        let Some(link) = self.shared.cluster.get() else {
            return Err(self.refused(shard, Refusal::NotHere { why: self.not_live(shard) }));
        };
        let (sender, queue) = mpsc::channel(FOLLOWER_BACKLOG);
        let (tails, runtime) = (&self.shared.tails, &self.shared.runtime);
        let joined = tails.join(shard, &org, sender, (link.open_out)(shard), runtime).await;
        let (place, joined) = joined.map_err(|why| unreadable(&why))?;
        let mut first = VecDeque::new();
        let known = match from {
            From::Anew | From::Reset => None,
            From::Epoch(after) if after <= joined => {
                self.refresh_out(shard).await?;
                let changes = self.changes_since(shard, &org, after, joined).await;
                changes.map(|changes| {
                    first.extend(events(shard, &changes));
                    joined
                })
            }
            // Another node showed more than has come here yet, or the id is none of ours.
            From::Epoch(after) => {
                let newest = self.newest_epoch(shard).await.map_err(|why| unreadable(&why))?;
                (after <= newest).then_some(after)
            }
        };
        let seen = match known {
            Some(seen) => seen,
            None => {
                let question = ShardQuestion::Rows { org: org.clone() };
                let answered = self.ask(shard, question, None).await?;
                let Answered { answer, as_of, epoch, .. } = answered;
                let ShardAnswer::Rows(rows) = answer else { return Err(strange(shard)) };
                if !matches!(from, From::Anew) {
                    first.push_back(StreamEvent::Reset);
                }
                let body = stream_body(shard, epoch, &as_of.as_of, &rows);
                first.push_back(StreamEvent::Snapshot { shard, epoch, body });
                // What stands by may be behind what the tail has passed already.
                if epoch < joined {
                    self.refresh_out(shard).await?;
                }
                let missed = self.changes_since(shard, &org, epoch, joined).await;
                let missed = missed.ok_or_else(|| {
                    unreadable(&format!("the changes from epoch {epoch} to {joined} are not there"))
                })?;
                first.extend(events(shard, &missed));
                epoch.max(joined)
            }
        };
        let (service, source) = (self.clone(), Source::Tail(place));
        Ok(Following { service, shard, org, first, seen, queue, source })
    }
}

impl Following {
    /// The next event, and the follower behind it. A drain ends streams from the surface's side, which
    /// can say good-bye; the engine only lets go of one that is too slow.
    async fn next(mut self) -> Option<(StreamEvent, Following)> {
        loop {
            if let Some(event) = self.first.pop_front() {
                return Some((event, self));
            }
            match self.queue.recv().await {
                Some(event) => match epoch_of_event(&event) {
                    Some(epoch) if epoch <= self.seen => {}
                    epoch => {
                        self.seen = epoch.unwrap_or(self.seen);
                        return Some((event, self));
                    }
                },
                None => self = self.moved().await?,
            }
        }
    }

    /// Goes on when the queue has ended because the shard left this node.
    async fn moved(self) -> Option<Following> {
        let Following { service, shard, org, seen, source, .. } = self;
        let Source::Here(life) = source else { return None };
        // The shard is as it was: then it was the reader that was too slow.
        if life.upgrade().is_some() || *service.shared.draining.borrow() {
            return None;
        }
        let followed = service.following(shard, org, From::Epoch(seen)).await;
        followed
            .inspect_err(|error| tracing::debug!(%shard, %error, "a stream ends with its shard"))
            .ok()
    }
}

fn events(shard: ShardId, changes: &[Change]) -> Vec<StreamEvent> {
    let event = |Change { epoch, as_of, rows }: &Change| StreamEvent::Change {
        shard,
        epoch: *epoch,
        body: stream_body(shard, *epoch, as_of, rows),
    };
    changes.iter().map(event).collect()
}

fn epoch_of_event(event: &StreamEvent) -> Option<u64> {
    match event {
        StreamEvent::Snapshot { epoch, .. } | StreamEvent::Change { epoch, .. } => Some(*epoch),
        StreamEvent::Reset => None,
    }
}
