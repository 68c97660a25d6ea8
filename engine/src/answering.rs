//! What this node answers to other nodes, from its own shards only: it passes no question on.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt;
use meterr_connectors::cluster::Answerer;
use tokio::time::Instant;

use crate::asking::answers;
use crate::cluster::Held;
use crate::questions::{NodeAnswer, NodeQuestion, Refusal, decode, encode};
use crate::service::Service;

/// Longest wait for positions on behalf of another node.
const WAIT_MAX: Duration = Duration::from_secs(600);

impl Service {
    /// What answers other nodes, for [`Peers::serve`](meterr_connectors::cluster::Peers::serve).
    pub fn answerer(&self) -> Answerer {
        let service = self.clone();
        Arc::new(move |question| {
            let service = service.clone();
            async move { service.answered(&question).await }.boxed()
        })
    }

    async fn answered(&self, question: &Bytes) -> Bytes {
        let answer = match decode(question) {
            Ok(question) => self.answer_node(question).await,
            Err(why) => NodeAnswer::Refused(Refusal::Unreadable { why }),
        };
        encode(&answer).unwrap_or_else(|why| {
            let refused = NodeAnswer::Refused(Refusal::Unreadable {
                why: format!("the answer is not sent: {why}"),
            });
            // A sentence is always JSON and short.
            encode(&refused).unwrap_or_default()
        })
    }

    async fn answer_node(&self, question: NodeQuestion) -> NodeAnswer {
        match question {
            NodeQuestion::Status => NodeAnswer::Status(self.own_status()),
            NodeQuestion::Shard { shard, wanted, wait_ms, question } => {
                let refused = |why| NodeAnswer::Refused(Refusal::NotHere { why });
                if usize::from(shard.0) >= self.shared.logs.len() {
                    return refused(format!("there is no shard {shard}"));
                }
                let link = self.shared.cluster.get();
                if let Some(link) = link {
                    let held = link.held(shard);
                    let opening = matches!(held, Held::Owned { live: false, .. });
                    if !answers(&held) && !opening {
                        return refused(format!("shard {shard} is {held:?} here"));
                    }
                }
                let wait = Duration::from_millis(wait_ms).min(WAIT_MAX);
                let reached_by = Instant::now() + wait;
                match self.ask_here(shard, &question, wanted, reached_by, link).await {
                    Ok(answered) => NodeAnswer::Shard(answered),
                    Err(refusal) => NodeAnswer::Refused(refusal),
                }
            }
        }
    }
}
