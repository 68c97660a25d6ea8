//! Planned moves: from an owner that is alive to the node that placement wants.
//!
//! ```text
//! gaining node                                owner
//! stand by, follow its commits
//! little behind: ask for it ────────────────► finish what is under way, write nothing more
//!                                             released: lease to the gaining node (its session)
//! sees its lease: own ◄────────── nudge ───── let go, or stand by
//! ```
//!
//! The gaining node begins when the same nodes have been there for `settle`; pins and owners that drain
//! are obeyed at once. It gains few shards at a time. The owner agrees only if its own placement wants
//! the same, so two nodes with different views do not throw a shard to and fro.
//!
//! Whatever is not heard, the owner ends it: if the gaining node is gone, or the shard was not handed
//! over in two lease times, the owner writes the lease anew and goes on under the new token. The lease
//! to the gaining node and the lease anew are both compare-and-set from the same revision: one stands.

use std::time::Duration;

use bytes::Bytes;
use meterr_operators::ids::ShardId;
use serde::{Deserialize, Serialize};

use super::leases::Owner;
use super::{Action, Member, Told};
use crate::cluster::Held;
use crate::cluster::records::{FORMAT, Key, Lease, parse, write};
use crate::settings::node_name_valid;

/// Commits that a shard may be behind when it is asked for; they are taken in during the hand-over.
pub const BEHIND_MAX: u64 = 16;

/// A shard to be gained.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gain {
    next_ask: Duration,
}

/// A shard to be given.
#[derive(Debug, Clone)]
pub(super) struct Give {
    to: String,
    session: String,
    since: Duration,
}

/// A node asks the owner of a shard for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseRequest {
    /// Version of the format.
    pub format: u32,
    /// What is asked: `release`.
    pub ask: String,
    /// The shard.
    pub shard: ShardId,
    /// The node that asks.
    pub node: String,
    /// Its session.
    pub session: String,
    /// Revision of the owner's lease.
    pub lease: u64,
}

/// What the owner says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseAnswer {
    /// Version of the format.
    pub format: u32,
    /// Whether it hands the shard over.
    pub releasing: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
}

impl Member {
    /// Gains a shard that another node owns, if it should be here.
    pub(super) fn others(
        &mut self,
        now: Duration,
        shard: ShardId,
        held: &Held,
        owner: &str,
        actions: &mut Vec<Action>,
    ) {
        let ttl = self.settings.ttl;
        let wanted = self.placement.wanted(shard) == Some(self.me());
        let pinned = wanted && self.pins.get(&shard).is_some_and(|node| node == self.me());
        let urgent = pinned || !self.placement.has(owner);
        let stable = now.saturating_sub(self.stable_since) >= self.settings.settle;
        let (gains, _) = self.moves();
        let gain = &mut self.shards[usize::from(shard.0)].gain;
        if !wanted || matches!(held, Held::Stopped(_)) {
            *gain = None;
        } else if gain.is_none() && (urgent || stable) && gains < self.settings.moves_max {
            *gain = Some(Gain { next_ask: now });
        }
        let ready = matches!(held, Held::StandingBy { behind } if *behind <= BEHIND_MAX);
        if let Some(gain) = gain.as_mut().filter(|gain| ready && now >= gain.next_ask) {
            gain.next_ask = now + ttl / 2;
            let request = ReleaseRequest {
                format: FORMAT,
                ask: "release".to_owned(),
                shard,
                node: self.settings.node.clone(),
                session: self.own.id.clone(),
                lease: self.known.revision(&Key::Lease(shard)),
            };
            let question = write(&request);
            actions.push(Action::Ask { node: owner.to_owned(), shard, question });
        }
        // One that stopped here stays so until an operator looks, or it is wanted elsewhere.
        let stopped = wanted && matches!(held, Held::Stopped(_));
        let gains = self.shards[usize::from(shard.0)].gain.is_some();
        let stand_by = gains || stopped || self.stands_by(shard);
        self.want(now, shard, held, stand_by, actions);
    }

    /// Takes the answer to a question in; `None` when there was none. The lease decides, an answer only
    /// says when to look or to ask again.
    pub fn answered(&mut self, now: Duration, shard: ShardId, answer: Option<&[u8]>) {
        let ttl = self.settings.ttl;
        let answer = answer.and_then(|bytes| parse::<ReleaseAnswer>("answer", bytes).ok());
        let Some(local) = self.shards.get_mut(usize::from(shard.0)) else { return };
        if let Some(gain) = &mut local.gain {
            match answer {
                Some(answer) if answer.releasing => gain.next_ask = now + 2 * ttl,
                Some(_) => self.look = true,
                None => {}
            }
        }
    }

    /// Answers another node's request for a shard.
    pub fn asked(&mut self, now: Duration, question: &[u8]) -> Bytes {
        let why = self.agree(now, question).err();
        let releasing = why.is_none();
        let why = why.unwrap_or_default();
        write(&ReleaseAnswer { format: FORMAT, releasing, why })
    }

    fn agree(&mut self, now: Duration, question: &[u8]) -> Result<(), String> {
        let request: ReleaseRequest = parse("question", question).map_err(|e| e.to_string())?;
        let ReleaseRequest { ask, shard, node, session, lease, .. } = request;
        if ask != "release" || !node_name_valid(&node) || shard.0 >= self.settings.shards {
            return Err("not a request for one of our shards".to_owned());
        }
        if !self.own.active() || self.own.finishing() {
            return Err("this node is not at work".to_owned());
        }
        let Owner::Me { revision, .. } = self.owner(now, shard) else {
            return Err("this node does not own the shard".to_owned());
        };
        if revision != lease {
            return Err(format!("the shard's lease is at revision {revision}"));
        }
        if self.there(&node).is_none_or(|known| known.session != session) {
            self.look = true;
            return Err("that session is not known here yet".to_owned());
        }
        self.place(now);
        if self.placement.wanted(shard) != Some(&node) {
            self.look = true;
            return Err("the shard is to go elsewhere as this node sees it".to_owned());
        }
        let local = &mut self.shards[usize::from(shard.0)];
        match &local.give {
            Some(give) if give.to == node && give.session == session => Ok(()),
            Some(_) => Err("the shard is being given to another node".to_owned()),
            None if local.renew.is_some() => Err("the shard is being taken back".to_owned()),
            None => {
                local.give = Some(Give { to: node, session, since: now });
                Ok(())
            }
        }
    }

    /// Goes on with giving a shard away.
    pub(super) fn give(
        &mut self,
        now: Duration,
        shard: ShardId,
        held: &Held,
        revision: u64,
        actions: &mut Vec<Action>,
    ) {
        let local = &mut self.shards[usize::from(shard.0)];
        let Some(give) = local.give.clone() else { return };
        let late = now.saturating_sub(give.since) > 2 * self.settings.ttl;
        if late || self.there(&give.to).is_none_or(|there| there.session != give.session) {
            let local = &mut self.shards[usize::from(shard.0)];
            local.give = None;
            local.renew = Some(revision);
            return self.renew(now, shard, actions);
        }
        let told = self.shards[usize::from(shard.0)].told;
        let finished = match held {
            Held::Released | Held::Nothing | Held::Stopped(_) => true,
            // It was opened anew and is not to be owned: nothing of it is under way.
            Held::Opening | Held::StandingBy { .. } => {
                matches!(told, Some((Told::Release, _)))
            }
            _ => false,
        };
        match held {
            _ if finished => {
                let raise = self.known.leases.get(&shard).and_then(|seen| seen.ok());
                let lease = Lease {
                    format: FORMAT,
                    node: Some(give.to),
                    session: give.session,
                    raise: raise.map_or(0, |lease| lease.raise),
                };
                self.write(&Key::Lease(shard), write(&lease), true, actions);
            }
            Held::Releasing => {}
            _ => self.tell(now, shard, Told::Release, actions),
        }
    }
}
