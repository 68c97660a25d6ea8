//! Taking shards that nobody owns, and keeping one's own.
//!
//! **Owner.** A lease names a node and its session. It holds while that session is the node's and not
//! over. It is void when the session was buried or left or the node has a newer one. Where the node's
//! entry is older than the lease the entry may just be an old read, so that is believed only after
//! a lease time (a write that was under way when its session ended may leave such a lease behind).
//!
//! **Claims.** A shard without an owner is claimed by the node that placement wants, at once. If that
//! one does not within a lease time, the next in the shard's order may, and so on; so a node that cannot
//! blocks nothing. A node alone in a new registry is wanted everywhere and claims everything at once.
//!
//! **Tokens.** A lease is written when it changes hands and at no other time, so that the revision of
//! that write is the fencing token. A shard that was [lost](Held::Lost) although its lease is still
//! this node's was sealed by somebody without one: it is let go of, the lease is written again with
//! `raise` above the token found, and the shard is owned under the new token; at most once a lease time,
//! so that two who both believe they are right do not wear the log out.

use std::time::Duration;

use meterr_operators::ids::ShardId;

use super::{Action, Local, Member, Told};
use crate::cluster::Held;
use crate::cluster::records::{FORMAT, Key, Lease, write};

/// Who owns a shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Owner {
    Nobody,
    /// This node, under this token, by the lease at this revision.
    Me {
        revision: u64,
        token: u64,
    },
    Other(String),
    /// Not known, or written by a newer version: left alone.
    Unclear,
}

impl Member {
    /// Whether this node owns a shard in the session it has.
    pub(super) fn owns(&self, shard: ShardId) -> bool {
        self.known.leases.get(&shard).and_then(|seen| seen.ok()).is_some_and(|lease| {
            lease.node.as_deref() == Some(self.me()) && lease.session == self.own.id
        })
    }

    pub(super) fn owner(&mut self, now: Duration, shard: ShardId) -> Owner {
        let Some(seen) = self.known.leases.get(&shard) else { return Owner::Nobody };
        let revision = seen.revision;
        let Some(lease) = seen.ok() else {
            return if seen.newer() { Owner::Unclear } else { Owner::Nobody };
        };
        let Some(node) = lease.node.clone() else { return Owner::Nobody };
        if self.owns(shard) {
            return Owner::Me { revision, token: revision.saturating_add(lease.raise) };
        }
        match self.known.nodes.get(&node) {
            // Without an entry it is buried like one that is silent.
            None => Owner::Other(node),
            Some(entry) => match entry.ok() {
                None => Owner::Other(node),
                Some(session) if session.session == lease.session && !session.over() => {
                    Owner::Other(node)
                }
                Some(session) if session.session == lease.session => Owner::Nobody,
                Some(_) if entry.revision > revision => Owner::Nobody,
                Some(_) => {
                    let ttl = self.settings.ttl;
                    let local = &mut self.shards[usize::from(shard.0)];
                    let since = local.unsure.filter(|(at, _)| *at == revision);
                    let (_, since) = *local.unsure.insert(since.unwrap_or((revision, now)));
                    if now.saturating_sub(since) >= ttl { Owner::Nobody } else { Owner::Unclear }
                }
            },
        }
    }

    /// Decides about one shard.
    pub(super) fn shard(
        &mut self,
        now: Duration,
        shard: ShardId,
        held: &Held,
        actions: &mut Vec<Action>,
    ) {
        let owner = self.owner(now, shard);
        let local = &mut self.shards[usize::from(shard.0)];
        if owner != Owner::Nobody {
            local.vacant = None;
        }
        if !matches!(owner, Owner::Me { .. }) {
            local.give = None;
            local.renew = None;
        }
        if !matches!(owner, Owner::Other(_)) {
            local.gain = None;
        }
        match owner {
            Owner::Me { revision, token } => self.mine(now, shard, held, revision, token, actions),
            Owner::Nobody => self.vacant(now, shard, held, actions),
            Owner::Other(owner) => self.others(now, shard, held, &owner, actions),
            Owner::Unclear => {
                let stand_by = self.stands_by(shard);
                self.want(now, shard, held, stand_by, actions);
            }
        }
    }

    /// Whether this node is to stand by for a shard that it does not own, moves apart.
    pub(super) fn stands_by(&self, shard: ShardId) -> bool {
        if self.settings.replica {
            return true;
        }
        if self.own.finishing() || self.settings.standbys == 0 {
            return false;
        }
        let order = self.placement.order(shard);
        let mut next = order.iter().skip(1).take(self.settings.standbys);
        next.any(|node| *node == self.me())
    }

    /// Keeps a shard that is this node's.
    fn mine(
        &mut self,
        now: Duration,
        shard: ShardId,
        held: &Held,
        revision: u64,
        token: u64,
        actions: &mut Vec<Action>,
    ) {
        let ttl = self.settings.ttl;
        let local = &mut self.shards[usize::from(shard.0)];
        if let Held::Lost { token: found } = held {
            local.give = None;
            // It stays lost here until it is let go of.
            if local.renew.is_none() {
                local.renew = Some(revision);
                local.above = local.above.max(*found);
                local.rest = local.renewed.map(|last| last + ttl);
            }
            self.tell(now, shard, Told::Drop, actions);
            self.renew(now, shard, actions);
            return;
        }
        if self.own.finishing() {
            if matches!(held, Held::Owned { .. } | Held::Opening | Held::StandingBy { .. }) {
                self.tell(now, shard, Told::Release, actions);
            }
            return;
        }
        if self.shards[usize::from(shard.0)].give.is_some() {
            self.give(now, shard, held, revision, actions);
            return;
        }
        // Written anew since: the new token counts.
        let local = &mut self.shards[usize::from(shard.0)];
        if local.renew.is_some_and(|old| revision > old) {
            local.renew = None;
            local.told = None;
        }
        if local.renew.is_some() {
            return self.renew(now, shard, actions);
        }
        match held {
            Held::Owned { token: under, .. } if *under == token => {}
            Held::Stopped(_) if matches!(local.told, Some((Told::Own(told), _)) if told == token) =>
                {}
            _ => self.tell(now, shard, Told::Own(token), actions),
        }
    }

    /// Writes the lease anew, for a new token, if that is due.
    pub(super) fn renew(&mut self, now: Duration, shard: ShardId, actions: &mut Vec<Action>) {
        let key = Key::Lease(shard);
        let revision = self.known.revision(&key);
        let local = &mut self.shards[usize::from(shard.0)];
        if local.renew == Some(revision) && local.rest.is_none_or(|rest| now >= rest) {
            local.renewed = Some(now);
            self.claim(shard, actions);
        }
    }

    /// Writes a lease as this node's.
    fn claim(&mut self, shard: ShardId, actions: &mut Vec<Action>) {
        let raise = self.known.leases.get(&shard).and_then(|seen| seen.ok()).map(|l| l.raise);
        let lease = Lease {
            format: FORMAT,
            node: Some(self.settings.node.clone()),
            session: self.own.id.clone(),
            raise: raise.unwrap_or(0).max(self.raise_above(shard)),
        };
        self.write(&Key::Lease(shard), write(&lease), false, actions);
    }

    /// What a revision needs so that it is above what the shard's log has seen: any revision is above
    /// the one it replaces.
    fn raise_above(&self, shard: ShardId) -> u64 {
        let above = self.shards[usize::from(shard.0)].above;
        if above > self.known.revision(&Key::Lease(shard)) { above } else { 0 }
    }

    /// Claims a shard that nobody owns, when it is this node's turn.
    fn vacant(&mut self, now: Duration, shard: ShardId, held: &Held, actions: &mut Vec<Action>) {
        let revision = self.known.revision(&Key::Lease(shard));
        let Local { vacant, .. } = &mut self.shards[usize::from(shard.0)];
        let since = vacant.filter(|(at, _)| *at == revision);
        let (_, since) = *vacant.insert(since.unwrap_or((revision, now)));
        // Its lease went missing while it works: nobody is a better owner.
        let works = matches!(held, Held::Owned { live: true, .. });
        let order = self.placement.order(shard);
        let turn = order.iter().position(|node| *node == self.me());
        let stopped = matches!(held, Held::Stopped(_));
        if let Some(turn) = turn.filter(|_| !stopped) {
            let wait = self.settings.ttl * u32::try_from(turn).unwrap_or(u32::MAX);
            if works || now.saturating_sub(since) >= wait {
                self.claim(shard, actions);
            }
        }
        let claiming = self.in_flight.contains_key(&Key::Lease(shard).to_string());
        let near = turn == Some(0);
        if !(works && turn.is_some()) {
            // It is loaded while the claim is under way.
            let stand_by = claiming || near || stopped || self.stands_by(shard);
            self.want(now, shard, held, stand_by, actions);
        }
    }
}
