//! State of all shards of the cluster: of this node's own, and as their owners tell.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use meterr_connectors::api::ShardStatus;
use meterr_operators::ids::ShardId;

use crate::cluster::Held;
use crate::questions::{NodeAnswer, NodeQuestion};
use crate::service::Service;

/// Time other nodes have to tell how their shards are.
const TELL_MAX: Duration = Duration::from_secs(1);

impl Service {
    /// State of the shards this node owns.
    pub(crate) fn own_status(&self) -> Vec<ShardStatus> {
        let mut status = self.shared.status();
        let Some(link) = self.shared.cluster.get() else { return status };
        let held = link.shards.held();
        status.retain(|status| {
            let held = held.get(usize::from(status.shard.0));
            matches!(held, Some(Held::Owned { .. } | Held::Releasing | Held::Stopped(_)))
        });
        for status in &mut status {
            status.owner = Some(link.me.clone());
        }
        status
    }

    /// State of every shard.
    pub(crate) async fn cluster_status(&self) -> Vec<ShardStatus> {
        let Some(link) = self.shared.cluster.get() else { return self.shared.status() };
        let view = link.view.borrow().clone();
        let owners: BTreeSet<&str> = view
            .shards
            .iter()
            .filter_map(|shard| shard.owner.as_deref())
            .filter(|owner| *owner != link.me)
            .collect();
        let told = owners.into_iter().map(|owner| async move {
            let told = self.ask_other(link, owner, &NodeQuestion::Status, TELL_MAX).await;
            (owner, told)
        });
        let mut of_owners: BTreeMap<ShardId, ShardStatus> = BTreeMap::new();
        let mut silent: BTreeMap<String, String> = BTreeMap::new();
        for (owner, told) in futures::future::join_all(told).await {
            match told {
                Ok(NodeAnswer::Status(status)) => {
                    let of = |shard: &ShardStatus| view.owner(shard.shard) == Some(owner);
                    of_owners.extend(status.into_iter().filter(of).map(|of| (of.shard, of)));
                }
                Ok(_) => drop(silent.insert(owner.to_owned(), "it tells nothing".to_owned())),
                Err(why) => drop(silent.insert(owner.to_owned(), why)),
            }
        }
        let (mut shards, held) = (self.shared.status(), link.shards.held());
        for own in &mut shards {
            let owner = view.owner(own.shard).map(str::to_owned);
            if owner.as_deref() == Some(link.me.as_str()) {
                own.owner = owner;
                continue;
            }
            let here = held.get(usize::from(own.shard.0)).and_then(here);
            let mut status = own.clone();
            match (&owner, of_owners.remove(&own.shard)) {
                (_, Some(told)) => {
                    status = told;
                    status.usage_head = status.usage_head.max(own.usage_head);
                }
                (Some(owner), None) => {
                    status.state = "away".to_owned();
                    status.problem = silent.get(owner).cloned();
                }
                (None, None) => status.state = "unowned".to_owned(),
            }
            *own = ShardStatus { owner, here, elsewhere: true, ..status };
        }
        shards
    }
}

/// What another node's shard is here.
fn here(held: &Held) -> Option<String> {
    match held {
        Held::Opening => Some("opening".to_owned()),
        Held::StandingBy { behind: 0 } => Some("standing by".to_owned()),
        Held::StandingBy { behind } => Some(format!("standing by, {behind} commits behind")),
        Held::Released => Some("released".to_owned()),
        Held::Stopped(why) => Some(format!("stopped: {why}")),
        Held::Nothing | Held::Owned { .. } | Held::Releasing | Held::Lost { .. } => None,
    }
}
