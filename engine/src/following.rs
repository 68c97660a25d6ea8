//! Following an org: everything first, then every commit's changes.

use futures::stream::{BoxStream, StreamExt};
use meterr_connectors::api::{ApiResult, StreamEvent, StreamId};
use tokio::sync::mpsc;

use crate::catch_up::Change;
use crate::service::Service;
use crate::wire::stream_body;

/// Changes a follower may be behind before it is let go.
const FOLLOWER_BACKLOG: usize = 256;

impl Service {
    /// Follows an org. Registered first, then the past is read, so nothing falls between.
    pub(crate) async fn follow_org(
        &self,
        org: String,
        after: Option<StreamId>,
    ) -> ApiResult<BoxStream<'static, StreamEvent>> {
        let shard = self.home(&org);
        let (sender, receiver) = mpsc::channel(FOLLOWER_BACKLOG);
        let name = org.clone();
        let resume = after.filter(|after| after.shard == shard);
        let asked = self.run_here(shard, move |live| {
            live.follow(&name, sender);
            let known = resume.is_some_and(|after| after.epoch <= live.progress().epoch);
            let snapshot = (!known).then(|| live.snapshot(&name));
            (snapshot, live.progress())
        });
        let asked = asked.await.map_err(|refusal| self.refused(shard, refusal));
        let (snapshot, progress) = asked?;
        let mut first: Vec<StreamEvent> = Vec::new();
        match (snapshot, resume) {
            (Some(snapshot), _) => {
                if after.is_some() {
                    first.push(StreamEvent::Reset);
                }
                first.push(snapshot);
            }
            (None, Some(resume)) => {
                match self.changes_since(shard, &org, resume.epoch, progress.epoch).await {
                    Some(changes) => first.extend(changes.iter().map(|change| {
                        let Change { epoch, as_of, rows } = change;
                        let body = stream_body(shard, *epoch, as_of, rows);
                        StreamEvent::Change { shard, epoch: *epoch, body }
                    })),
                    None => {
                        // Too much to read again: begin anew. The snapshot may be newer than changes
                        // already queued; those are dropped below.
                        let name = org.clone();
                        first.push(StreamEvent::Reset);
                        let asked = self.run_here(shard, move |live| live.snapshot(&name));
                        first.push(asked.await.map_err(|refusal| self.refused(shard, refusal))?);
                    }
                }
            }
            (None, None) => {}
        }
        let seen = first.iter().filter_map(epoch_of_event).max().unwrap_or(progress.epoch);
        let rest = futures::stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|event| (event, receiver))
        });
        let rest = rest.filter(move |event| {
            futures::future::ready(epoch_of_event(event).is_none_or(|epoch| epoch > seen))
        });
        // A drain ends streams from the surface's side, which can say good-bye; the engine only lets go
        // of a follower with its shard.
        Ok(futures::stream::iter(first).chain(rest).boxed())
    }
}

fn epoch_of_event(event: &StreamEvent) -> Option<u64> {
    match event {
        StreamEvent::Snapshot { epoch, .. } | StreamEvent::Change { epoch, .. } => Some(*epoch),
        StreamEvent::Reset => None,
    }
}
