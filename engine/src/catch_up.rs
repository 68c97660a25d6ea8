//! What a reader of an org's live changes lacks: read from the shard's output log, which every node
//! can, or a snapshot of the shard where that is too much.

use bytes::Bytes;
use meterr_connectors::api::{ApiError, ApiResult, StreamId};
use meterr_connectors::changes::{LiveKind, OrgChanges};
use meterr_connectors::log::{Log, Record};
use meterr_operators::ids::{Positions, ShardId};

use crate::announce;
use crate::asking::strange;
use crate::questions::{Answered, ShardAnswer, ShardQuestion};
use crate::records::{READ_BYTES, followed, own_parts, parse_commit};
use crate::service::Service;
use crate::wire::Commit;

/// Bytes of output log read for a resuming follower; older ones get a snapshot.
const RESUME_BYTES_MAX: usize = 64 * 1024 * 1024;

impl Service {
    /// The messages of an answer to a reader of an org's live changes.
    pub(crate) async fn missed(
        &self,
        org: String,
        after: Option<StreamId>,
    ) -> ApiResult<Vec<Bytes>> {
        let shard = self.home(&org);
        let after = after.filter(|after| after.shard == shard).map(|after| after.epoch);
        let question = ShardQuestion::ChangedAt { org: org.clone() };
        let Answered { answer, as_of, epoch: mut to, mut commit } =
            self.ask(shard, question, None).await?;
        let ShardAnswer::ChangedAt(mut last) = answer else { return Err(strange(shard)) };
        let mut as_of = as_of.as_of;
        if let Some(after) = after.filter(|after| *after > to)
            && let Some(newest) = self.newest_commit(shard).await.map_err(ApiError::Unavailable)?
            && newest.1.epoch >= after
        {
            // Whoever answered is behind what the reader has seen already: a node that was cut off and
            // does not know yet that its shard was taken over. The log is not behind.
            (to, commit, last) = (newest.1.epoch, newest.0, None);
            as_of = self::as_of(shard, &newest.1);
        }
        if let Some(after) = after.filter(|after| *after <= to) {
            if last.is_some_and(|last| last <= after) {
                return Ok(vec![announce::current(shard, to, &as_of, &org)]);
            }
            self.readable(shard, commit).await?;
            if let Some(changes) = self.changes_since(shard, &org, after, to).await {
                let mut previous = after;
                let mut messages = Vec::new();
                for Change { epoch, as_of, rows } in &changes {
                    let before = Some(std::mem::replace(&mut previous, *epoch));
                    let kind = LiveKind::Change;
                    messages.extend(announce::rows(kind, shard, *epoch, before, as_of, rows));
                }
                if messages.is_empty() {
                    messages.push(announce::current(shard, to, &as_of, &org));
                }
                return Ok(announce::answer(messages));
            }
        }
        let question = ShardQuestion::Rows { org: org.clone() };
        let Answered { answer, as_of, epoch, .. } = self.ask(shard, question, None).await?;
        let ShardAnswer::Rows(rows) = answer else { return Err(strange(shard)) };
        let kind = LiveKind::Snapshot;
        Ok(announce::answer(announce::rows(kind, shard, epoch, None, &as_of.as_of, &rows)))
    }

    /// Changes of an org in the epochs after `from`, up to `to`; `None` when that is too much to read.
    pub(crate) async fn changes_since(
        &self,
        shard: ShardId,
        org: &str,
        from: u64,
        to: u64,
    ) -> Option<Vec<Change>> {
        if from >= to {
            return Some(Vec::new());
        }
        let out = self.shared.logs[usize::from(shard.0)].out.clone();
        let mut at = first_of_epoch(&*out, from + 1).await.ok()?;
        let mut found = Vec::new();
        let mut parts: Vec<Record> = Vec::new();
        let mut bytes = 0;
        loop {
            let records = out.read(at, READ_BYTES).await.ok()?;
            // The log ends before the epoch that was committed: it cannot be believed.
            let last = records.last()?;
            at = last.position + 1;
            for record in records {
                bytes += record.message.payload.len();
                if bytes > RESUME_BYTES_MAX {
                    return None;
                }
                if !record.message.subject.ends_with(".commit") {
                    parts.push(record);
                    continue;
                }
                let commit = Commit::read(&record.message.payload).ok()?;
                if commit.seal || commit.epoch <= from {
                    parts.clear();
                    continue;
                }
                if commit.epoch > to {
                    return Some(found);
                }
                let own = own_parts(&parts, &commit, record.position).ok()?;
                let as_of = as_of(shard, &commit);
                let changes = changes_in(own, |name| name == org).into_iter();
                let epoch = commit.epoch;
                found.extend(changes.map(|rows| Change { epoch, as_of: as_of.clone(), rows }));
                parts.clear();
                if commit.epoch == to {
                    return Some(found);
                }
            }
        }
    }

    /// Learns of the output log up to a commit that another node wrote.
    pub(crate) async fn readable(&self, shard: ShardId, commit: u64) -> ApiResult<()> {
        let out = &self.shared.logs[usize::from(shard.0)].out;
        if out.head() >= commit { Ok(()) } else { self.refresh_out(shard).await }
    }

    /// Learns of the end of a shard's output log, which another node writes.
    pub(crate) async fn refresh_out(&self, shard: ShardId) -> ApiResult<()> {
        let refreshed = self.shared.logs[usize::from(shard.0)].out.refresh().await;
        refreshed.map_err(|error| {
            ApiError::Unavailable(format!(
                "the output log of shard {shard} cannot be read: {error}"
            ))
        })
    }

    /// Epoch of the newest commit there is.
    pub(crate) async fn newest_epoch(&self, shard: ShardId) -> Result<u64, String> {
        Ok(self.newest_commit(shard).await?.map_or(0, |(_, commit)| commit.epoch))
    }

    /// The newest commit there is, with the position of its record.
    async fn newest_commit(&self, shard: ShardId) -> Result<Option<(u64, Commit)>, String> {
        let newest = self.shared.logs[usize::from(shard.0)].out.last_commit().await;
        match newest.map_err(|error| error.to_string())? {
            None => Ok(None),
            Some(record) => {
                let commit = parse_commit(&record).map_err(|error| error.to_string())?;
                Ok(Some((record.position, commit)))
            }
        }
    }
}

/// The changes of some orgs in the parts of a commit. An org may be spread over two parts, a view over
/// both.
pub(crate) fn changes_in(parts: &[Record], wanted: impl Fn(&str) -> bool) -> Vec<OrgChanges> {
    let mut merged: Vec<OrgChanges> = Vec::new();
    for part in parts {
        for org in followed(&part.message.payload, &wanted) {
            match merged.last_mut().filter(|last| last.org == org.org) {
                Some(last) => {
                    for (view, rows) in org.views {
                        last.views.entry(view).or_default().extend(rows);
                    }
                }
                None => merged.push(org),
            }
        }
    }
    merged
}

/// What a commit counts up to.
pub(crate) fn as_of(shard: ShardId, commit: &Commit) -> Positions {
    let mut as_of = Positions { control: Some(commit.control_position), ..Positions::default() };
    as_of.raise(shard, commit.usage_position);
    as_of
}

/// What one commit changed of an org.
pub(crate) struct Change {
    pub epoch: u64,
    pub as_of: Positions,
    pub rows: OrgChanges,
}

/// The epoch a record of an output log belongs to: every body begins with it.
pub(crate) fn epoch_of(record: &Record) -> Option<u64> {
    let rest = record.message.payload.strip_prefix(b"{\"epoch\":")?;
    let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
    std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()
}

/// First position of an epoch in an output log. Epochs never fall there, so halving finds it.
pub(crate) async fn first_of_epoch(out: &dyn Log, epoch: u64) -> Result<u64, String> {
    let (mut low, mut high) = (out.first(), out.head() + 1);
    while low < high {
        let middle = low + (high - low) / 2;
        let records = out.read(middle, 1).await.map_err(|error| error.to_string())?;
        let record = records.first().ok_or("a position below the head is missing")?;
        let of = epoch_of(record).ok_or("a record without an epoch")?;
        if of < epoch { low = middle + 1 } else { high = middle }
    }
    Ok(low)
}
