//! A shard that is not (yet, or any more) owned by this node: it follows the commits of its owner and
//! answers questions from what they say, and it can be taken over.
//!
//! What a commit record counts up to is taken in from the usage and control logs, exactly as the owner
//! did, so the state is the owner's at that commit. The rows in the parts are only passed on to
//! followers. Taking over needs no loading then: the last commits are taken in, and a sealing record
//! behind them makes every later commit of the old owner fail.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use meterr_connectors::log::{LogError, Message};
use meterr_operators::ids::Positions;
use meterr_operators::rollup::View;
use timely::worker::Worker;
use tokio::sync::OwnedSemaphorePermit;

use super::opening::take;
use super::{CheckpointJob, LiveShard, Progress, StopReason};
use crate::records::orgs_of;
use crate::recovery::Alarm;
use crate::wire::Commit;

/// A commit of a shard's owner, with its parts, which are those it names.
pub struct FollowedCommit {
    /// Position of its record.
    pub position: u64,
    /// The record.
    pub commit: Commit,
    /// Bodies of its parts.
    pub parts: Vec<Bytes>,
}

/// What a shard is on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// It follows its owner.
    StandingBy,
    /// A sealing record is under way.
    Sealing {
        /// The token in it.
        token: u64,
    },
    /// It commits.
    Owner,
}

/// Commits still to be taken in.
#[derive(Default)]
pub(super) struct Behind {
    commits: VecDeque<(FollowedCommit, Arc<OwnedSemaphorePermit>)>,
    /// Whether the first one's control changes are taken in.
    begun: bool,
    /// Position of the last one given.
    given: u64,
    /// Position of a commit that others are known to have made: not to be sealed before.
    known: u64,
}

impl Behind {
    /// Nothing is behind a commit record at this position.
    pub(super) fn from(position: u64) -> Behind {
        Behind { given: position, ..Behind::default() }
    }
}

impl LiveShard {
    /// Takes commits of the owner to be followed. Those that do not come behind the last one given are
    /// passed over: they come from a reader that was replaced.
    pub fn give_commits(&mut self, commits: Vec<FollowedCommit>, credit: OwnedSemaphorePermit) {
        let credit = Arc::new(credit);
        for commit in commits {
            if commit.position > self.behind.given {
                self.behind.given = commit.position;
                self.behind.commits.push_back((commit, credit.clone()));
            }
        }
    }

    /// Whether the shard is owned and sealed.
    pub fn owned(&self) -> bool {
        self.role == Role::Owner
    }

    /// Commits given and not yet taken in.
    pub fn behind(&self) -> usize {
        self.behind.commits.len()
    }

    /// Stops being the owner, between commits: from here on it follows.
    pub fn step_back(&mut self) {
        debug_assert!(self.pending.is_none());
        self.role = Role::StandingBy;
        self.behind = Behind::from(self.progress.commit);
    }

    /// The last checkpoint of an owner that stepped back just now, before it follows anything.
    ///
    /// # Errors
    /// As [`LiveShard::checkpoint`].
    pub fn last_checkpoint(&mut self) -> Result<Option<CheckpointJob>, StopReason> {
        self.take_checkpoint(true)
    }

    /// Whether [`LiveShard::seal`] may be called: nothing known is left to follow.
    pub fn sealable(&self) -> bool {
        self.pending.is_none()
            && !matches!(self.role, Role::Sealing { .. })
            && self.behind.commits.is_empty()
            && self.progress.commit >= self.behind.known
    }

    /// Begins to take the shard over: a commit record that repeats the last epoch under a higher token.
    /// `token` is the lease's (0 without leases); the record's is above that of the last commit in any
    /// case. Returns the append to be awaited, whose outcome goes to [`LiveShard::sealed`].
    ///
    /// # Errors
    /// When the last commit has a token above the lease's: whoever made it is the rightful owner, and this
    /// node was slow to hear of it.
    pub fn seal(
        &mut self,
        token: u64,
    ) -> Result<BoxFuture<'static, Result<u64, LogError>>, StopReason> {
        if token > 0 && self.token > token {
            return Err(StopReason::Outranked { token, found: self.token });
        }
        let token = token.max(self.token + 1);
        self.role = Role::Sealing { token };
        let sealing = Commit {
            epoch: self.progress.epoch,
            usage_position: self.progress.usage,
            control_position: self.progress.control,
            log_time: self.shard.log_time(),
            token,
            attempt: 0,
            parts: 0,
            hash: blake3::hash(b"").to_hex().to_string(),
            seal: true,
        };
        let payload = serde_json::to_vec(&sealing).expect("texts and numbers are always JSON");
        let record = Message::new(format!("out.{}.commit", self.spec.id), payload);
        let append = self.spec.logs.out.commit(Vec::new(), record, self.progress.commit);
        Ok(Box::pin(async move { append.await.map(|appended| appended.last) }))
    }

    /// Takes the outcome of [`LiveShard::seal`]: whether the shard is owned now. If not, another commit
    /// came between, which must be followed first.
    ///
    /// # Errors
    /// When the record could not be written for another reason.
    pub fn sealed(&mut self, outcome: Result<u64, LogError>) -> Result<bool, StopReason> {
        let Role::Sealing { token } = self.role else { return Ok(self.owned()) };
        match outcome.map_err(StopReason::of_commit) {
            Ok(position) => {
                self.role = Role::Owner;
                self.token = token;
                self.behind = Behind::default();
                self.progress.commit = position;
                self.spec.progress.send_replace(self.progress);
                // Checkpoints of another owner may lie between: a chain has one writer.
                self.checkpoint.base_due |= self.spec.shared_checkpoints;
                Ok(true)
            }
            Err(StopReason::TakenOver { actual, .. }) => {
                self.role = Role::StandingBy;
                self.behind.known = actual;
                Ok(false)
            }
            Err(reason) => Err(reason),
        }
    }

    /// Takes in commits of the owner for about as long as told. Returns whether anything changed.
    ///
    /// # Errors
    /// When the shard must stop.
    pub fn follow_commits(
        &mut self,
        worker: &mut Worker,
        long: Duration,
    ) -> Result<bool, StopReason> {
        let until = Instant::now() + long;
        let mut changed = false;
        while self.role == Role::StandingBy && Instant::now() < until {
            if !self.take_commit(worker)? {
                break;
            }
            changed = true;
        }
        Ok(changed)
    }

    /// Takes in the next commit, as far as the logs' records are here; whether it is whole.
    fn take_commit(&mut self, worker: &mut Worker) -> Result<bool, StopReason> {
        let Some((next, _)) = self.behind.commits.front() else { return Ok(false) };
        let (position, commit) = (next.position, next.commit.clone());
        if commit.token < self.token {
            // The server refuses such a commit; if one stands, the log is not what it should be.
            return Err(StopReason::Format(format!(
                "the commit at {position} of the output log has token {}, behind one of {}",
                commit.token, self.token
            )));
        }
        if !commit.seal {
            if commit.epoch != self.progress.epoch + 1 {
                let (checkpoint, commit) = (self.progress.epoch, commit.epoch);
                return Err(Alarm::NoCommit { checkpoint, commit }.into());
            }
            if !self.behind.begun {
                if self.control_read < commit.control_position {
                    return Ok(false);
                }
                let due = |control: &(u64, _)| control.0 <= commit.control_position;
                while self.control.front().is_some_and(due)
                    && let Some((at, change)) = self.control.pop_front()
                {
                    self.shard.control(worker, at, &change)?;
                }
                self.behind.begun = true;
            }
            while self.shard.usage_position() < commit.usage_position {
                let Some((record, credit)) = self.usage.pop_front() else { return Ok(false) };
                take(&mut self.shard, &record, &*self.spec.logs.usage)?;
                self.last_usage = Some(record.message);
                drop(credit);
            }
            self.shard.close_epoch(worker, commit.epoch);
            self.shard.take_withdrawn();
        }
        let Some((taken, _)) = self.behind.commits.pop_front() else { return Ok(false) };
        self.behind.begun = false;
        let controlled = commit.control_position > self.progress.control;
        self.progress = Progress {
            epoch: commit.epoch,
            usage: commit.usage_position,
            control: commit.control_position,
            commit: position,
        };
        self.token = commit.token;
        if !commit.seal {
            self.raise_epochs(&taken.parts, controlled);
            self.shard.flow().shared().borrow_mut().rollup.clear_changes();
            let mut as_of =
                Positions { control: Some(commit.control_position), ..Positions::default() };
            as_of.raise(self.spec.id, commit.usage_position);
            let changes = self.followed_changes(&taken.parts, commit.epoch, &as_of);
            self.tell_followers(changes);
        }
        self.spec.progress.send_replace(self.progress);
        Ok(true)
    }

    /// Notes which orgs an epoch changed.
    fn raise_epochs(&mut self, parts: &[Bytes], controlled: bool) {
        let epoch = self.progress.epoch;
        let shared = self.shard.flow().shared().borrow();
        let all = self.spec.views.has(View::OrgAll) && !controlled;
        if all {
            // Without a control change whatever changes a row of an org changes its total as well.
            for (org, _, _) in shared.rollup.table(View::OrgAll).changes() {
                self.epochs.raise(org, epoch);
            }
        } else {
            for org in parts.iter().flat_map(|part| orgs_of(part)) {
                if let Some(number) = shared.names.org(&org) {
                    self.epochs.raise(number, epoch);
                }
            }
        }
    }
}
