//! The readers of a shard's logs: usage for every shard that is here, its owner's commits for one that
//! stands by. They hand records to the shard's worker, bounded by credits that come back when records
//! are taken in.

use std::sync::Arc;
use std::time::Duration;

use meterr_connectors::log::{Log, LogError, Message, Record};
use meterr_operators::ids::ShardId;
use meterr_operators::time::{HOUR, Time};
use tokio::sync::{Semaphore, mpsc};

use crate::lifecycle::State;
use crate::live::StopReason;
use crate::live::standing_by::FollowedCommit;
use crate::node::{NodeShared, now};
use crate::records::{READ_BYTES, own_parts, parse_commit};
use crate::worker::{Command, Event};

/// Reads under way or waiting per log.
const READS_MAX: usize = 2;

/// Time after which an output log that brings nothing is asked whether it has nothing.
const QUIET: Duration = Duration::from_secs(1);

/// Reads a shard's usage log on and hands records to its worker, bounded by credits that come back
/// when records are taken in. Writes a tick into an idle log once an hour of its time.
pub async fn read_usage(
    shared: Arc<NodeShared>,
    shard: ShardId,
    mut from: u64,
    events: mpsc::Sender<Event>,
) {
    let usage = shared.logs[usize::from(shard.0)].usage.clone();
    let credits = Arc::new(Semaphore::new(READS_MAX));
    loop {
        let Ok(credit) = credits.clone().acquire_owned().await else { return };
        let idle = tokio::time::timeout(Duration::from_secs(60), usage.wait_beyond(from - 1)).await;
        if idle.is_err() {
            let owned = shared.states[usize::from(shard.0)].lock().0 == State::Live;
            if owned {
                tick(&*usage, shard).await;
            }
            continue;
        }
        match usage.read(from, READ_BYTES).await {
            Ok(records) => {
                let Some(last) = records.last() else {
                    // Woken without a record: the log takes no more. Everything before the failure
                    // has been handed on, so the shard commits it and then stands still; whoever
                    // watches must be told.
                    if let Some(error) = usage.failure() {
                        drop(events.send(Event::Stopped(shard, error.into())).await);
                        return;
                    }
                    // It is being closed.
                    if usage.head() < from {
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                    continue;
                };
                from = last.position + 1;
                shared.tell(shard, Command::Usage(shard, records, credit)).await;
            }
            Err(LogError::Unavailable { what, .. }) => {
                tracing::warn!(%shard, what, "usage log not available; trying on");
            }
            Err(error) => {
                // A closed channel means that the node is gone.
                drop(events.send(Event::Stopped(shard, error.into())).await);
                return;
            }
        }
    }
}

async fn tick(usage: &dyn Log, shard: ShardId) {
    let due = usage.last_time().is_some_and(|Time(last)| now().0 - last >= HOUR);
    if due {
        let message = Message::new(format!("usage.{shard}.@tick"), Vec::new());
        // A failed append shows at the next one that matters.
        drop(usage.append(vec![message]).await);
    }
}

/// Reads the commits of a shard's owner on and hands them to its worker, each with its parts.
pub async fn read_commits(
    shared: Arc<NodeShared>,
    shard: ShardId,
    mut from: u64,
    events: mpsc::Sender<Event>,
) {
    let out = shared.logs[usize::from(shard.0)].out.clone();
    let credits = Arc::new(Semaphore::new(READS_MAX));
    let mut parts: Vec<Record> = Vec::new();
    loop {
        let Ok(credit) = credits.clone().acquire_owned().await else { return };
        if tokio::time::timeout(QUIET, out.wait_beyond(from - 1)).await.is_err() {
            // Nothing came; whether there is nothing is for the log's leader to say.
            if out.refresh().await.is_ok() && out.head() < from {
                shared.current(shard);
            }
            continue;
        }
        let records = match out.read(from, READ_BYTES).await {
            Ok(records) => records,
            Err(LogError::Unavailable { what, .. }) => {
                tracing::warn!(%shard, what, "output log not available; trying on");
                continue;
            }
            Err(error) => {
                drop(events.send(Event::Stopped(shard, error.into())).await);
                return;
            }
        };
        let Some(last) = records.last() else {
            if let Some(error) = out.failure() {
                drop(events.send(Event::Stopped(shard, error.into())).await);
                return;
            }
            if out.head() < from {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            continue;
        };
        from = last.position + 1;
        match committed(&mut parts, records) {
            Ok(commits) if commits.is_empty() => {}
            Ok(commits) => shared.tell(shard, Command::Commits(shard, commits, credit)).await,
            Err(reason) => {
                drop(events.send(Event::Stopped(shard, reason)).await);
                return;
            }
        }
    }
}

/// The commits in some records of an output log; `parts` are those read before, and those that wait
/// for their commit.
fn committed(
    parts: &mut Vec<Record>,
    records: Vec<Record>,
) -> Result<Vec<FollowedCommit>, StopReason> {
    let mut commits = Vec::new();
    for record in records {
        if !record.message.subject.ends_with(".commit") {
            parts.push(record);
            continue;
        }
        let commit = parse_commit(&record)?;
        let own = own_parts(parts, &commit, record.position)?;
        let own = own.iter().map(|part| part.message.payload.clone()).collect();
        parts.clear();
        commits.push(FollowedCommit { position: record.position, commit, parts: own });
    }
    Ok(commits)
}
