//! The cluster as one node sees it, for status and for finding a shard's owner.

use std::time::Duration;

use meterr_operators::ids::ShardId;

use crate::cluster::member::Member;
use crate::cluster::records::Session;
use crate::cluster::{ClusterView, NodeView, ShardView};

/// State of a node that is there.
fn state(session: &Session, drained: bool, silent: bool) -> &'static str {
    if session.over() {
        "gone"
    } else if silent {
        "silent"
    } else if session.draining || drained {
        "draining"
    } else if session.replica {
        "replica"
    } else {
        "up"
    }
}

impl Member {
    /// What is known of the cluster. Nodes that left in order are not in it.
    pub fn view(&self, now: Duration) -> ClusterView {
        let shards: Vec<ShardView> =
            (0..self.settings().shards).map(|number| self.shard_view(ShardId(number))).collect();
        let mut nodes = Vec::new();
        for (node, session) in self.sessions() {
            let heard = self.heard(node, now);
            let owned = |view: &&ShardView| view.owner.as_deref() == Some(node);
            let mut view = NodeView {
                node: node.to_owned(),
                state: "newer".to_owned(),
                capacity: 0.0,
                http: String::new(),
                version: String::new(),
                heard_ms: u64::try_from(heard.as_millis()).unwrap_or(u64::MAX),
                shards: shards.iter().filter(owned).map(|view| view.shard).collect(),
            };
            if let Some(session) = session {
                if session.left {
                    continue;
                }
                let silent = heard >= self.settings().ttl;
                view.state = state(session, self.drained(node), silent).to_owned();
                view.capacity = session.capacity;
                view.http = session.http.clone();
                view.version = session.version.clone();
            }
            nodes.push(view);
        }
        ClusterView { node: self.settings().node.clone(), nodes, shards }
    }
}
