//! The cluster as operators see it, and their wishes: checked here against what this node sees, so that
//! a mistake gets a clear answer, then recorded by [`ClusterControl`](crate::cluster::link::ClusterControl).

use meterr_connectors::api::{
    ApiError, ApiResult, Cluster, ClusterNode, ClusterShard, Drain, Move, ShardStatus,
};

use crate::cluster::link::{ClusterLink, ControlError};
use crate::cluster::{ClusterView, NodeView};
use crate::service::Service;

/// Name of a node that is alone.
const ALONE: &str = "local";

impl Service {
    /// The nodes, and which shard is where.
    pub(crate) async fn show_cluster(&self) -> Cluster {
        let status = self.cluster_status().await;
        let Some(link) = self.shared.cluster.get() else { return alone(&status) };
        let view = link.view.borrow().clone();
        let outlook = (link.outlook)();
        let shards: Vec<ClusterShard> = status
            .iter()
            .zip(&view.shards)
            .map(|(status, of)| ClusterShard {
                owner: of.owner.clone(),
                wanted: of.wanted.clone().filter(|wanted| of.owner.as_ref() != Some(wanted)),
                pinned: of.pinned.clone(),
                ..shard(status)
            })
            .collect();
        let nodes = view.nodes.iter().map(|node| {
            let own = |shard: &&ClusterShard| shard.owner.as_deref() == Some(&*node.node);
            ClusterNode {
                node: node.node.clone(),
                state: node.state.clone(),
                capacity: node.capacity,
                http: node.http.clone(),
                version: node.version.clone(),
                heard_ms: node.heard_ms,
                shards: node.shards.clone(),
                lag: shards.iter().filter(own).map(|shard| shard.lag).sum(),
                events_per_second: outlook.events_per_second.get(&node.node).copied(),
            }
        });
        let nodes = nodes.collect();
        let mut cluster = Cluster { node: link.me.clone(), nodes, shards, ..Cluster::default() };
        if let Some(forecast) = outlook.forecast {
            cluster.recommended_nodes = Some(forecast.recommended_nodes);
            cluster.reason = Some(forecast.reason);
            cluster.predicted_events_per_second = forecast.predicted_events_per_second;
            cluster.service_rate_events_per_second = forecast.service_rate_events_per_second;
        }
        cluster
    }

    /// Drains a node, or ends that.
    pub(crate) async fn drain_node(&self, wish: Drain) -> ApiResult<()> {
        let link = self.link()?;
        may_drain(&link.view.borrow(), &wish)?;
        link.control.drain(wish.node, wish.drain).await.map_err(refused)
    }

    /// Moves a shard.
    pub(crate) async fn move_to(&self, wish: Move) -> ApiResult<()> {
        let link = self.link()?;
        may_move(&link.view.borrow(), &wish)?;
        link.control.pin(wish.shard, wish.node).await.map_err(refused)
    }

    fn link(&self) -> ApiResult<&ClusterLink> {
        self.shared.cluster.get().ok_or_else(|| {
            ApiError::Conflict(
                "this deployment has one node, which owns every shard; nodes that share their logs on \
                 NATS form a cluster"
                    .to_owned(),
            )
        })
    }
}

/// Whether a node may be drained. Pure.
fn may_drain(view: &ClusterView, wish: &Drain) -> ApiResult<()> {
    let node = known(view, &wish.node)?;
    if !wish.drain {
        return Ok(());
    }
    let conflict = |why: &str| Err(ApiError::Conflict(format!("node {:?} {why}", wish.node)));
    match node.state.as_str() {
        "replica" => return conflict("is a replica: it owns no shard that it could give away"),
        "gone" => return conflict("is gone; others take its shards over without a drain"),
        _ => {}
    }
    let others = view.nodes.iter().any(|other| other.node != wish.node && other.state == "up");
    match others {
        true => Ok(()),
        false => conflict("is the only node that is up: nobody could take its shards"),
    }
}

/// Whether a shard may be moved. Pure.
fn may_move(view: &ClusterView, wish: &Move) -> ApiResult<()> {
    if usize::from(wish.shard.0) >= view.shards.len() {
        return Err(ApiError::NotFound(format!("there is no shard {}", wish.shard)));
    }
    let Some(name) = &wish.node else { return Ok(()) };
    let why = match known(view, name)?.state.as_str() {
        "up" => return Ok(()),
        "draining" => "is draining: it takes no shard",
        "replica" => "is a replica: it owns no shard",
        "silent" => "was not heard for a while",
        "newer" => "has a version whose entry this node cannot read; ask a node of that version",
        _ => "is gone",
    };
    Err(ApiError::Conflict(format!("node {name:?} {why}")))
}

fn known<'a>(view: &'a ClusterView, name: &str) -> ApiResult<&'a NodeView> {
    view.nodes.iter().find(|node| node.node == name).ok_or_else(|| {
        let all: Vec<&str> = view.nodes.iter().map(|node| node.node.as_str()).collect();
        ApiError::NotFound(format!("there is no node {name:?}; there are {}", all.join(", ")))
    })
}

fn refused(error: ControlError) -> ApiError {
    match error {
        ControlError::Unknown(why) => ApiError::NotFound(why),
        ControlError::Conflict(why) => ApiError::Conflict(why),
        ControlError::Unavailable(why) => ApiError::Unavailable(why),
    }
}

/// A node that is alone.
fn alone(status: &[ShardStatus]) -> Cluster {
    let owner = Some(ALONE.to_owned());
    let shards: Vec<ClusterShard> = status
        .iter()
        .map(|status| ClusterShard { owner: owner.clone(), ..shard(status) })
        .collect();
    let node = ClusterNode {
        node: ALONE.to_owned(),
        state: "up".to_owned(),
        capacity: 1.0,
        http: String::new(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        heard_ms: 0,
        shards: shards.iter().map(|shard| shard.shard).collect(),
        lag: shards.iter().map(|shard| shard.lag).sum(),
        events_per_second: None,
    };
    Cluster { node: ALONE.to_owned(), nodes: vec![node], shards, ..Cluster::default() }
}

fn shard(status: &ShardStatus) -> ClusterShard {
    ClusterShard {
        shard: status.shard,
        owner: status.owner.clone(),
        state: status.state.clone(),
        problem: status.problem.clone(),
        epoch: status.epoch,
        lag: status.usage_head.saturating_sub(status.usage_position),
        wanted: None,
        pinned: None,
    }
}

#[cfg(test)]
mod tests {
    use meterr_operators::ids::ShardId;

    use super::*;
    use crate::cluster::ShardView;

    fn view(nodes: &[(&str, &str)]) -> ClusterView {
        let node = |(name, state): &(&str, &str)| NodeView {
            node: (*name).to_owned(),
            state: (*state).to_owned(),
            capacity: 1.0,
            http: String::new(),
            version: String::new(),
            heard_ms: 0,
            shards: Vec::new(),
        };
        let shard = ShardView {
            shard: ShardId(0),
            owner: Some("n1".to_owned()),
            token: 1,
            wanted: None,
            pinned: None,
        };
        ClusterView {
            node: "n1".to_owned(),
            nodes: nodes.iter().map(node).collect(),
            shards: vec![shard],
        }
    }

    const NODES: [(&str, &str); 7] = [
        ("n1", "up"),
        ("n2", "up"),
        ("n3", "draining"),
        ("n4", "gone"),
        ("n5", "silent"),
        ("r1", "replica"),
        ("n6", "newer"),
    ];

    #[test]
    fn a_drain_needs_a_node_that_owns_and_one_that_takes() {
        let ask = |view: &ClusterView, node: &str, drain| {
            may_drain(view, &Drain { node: node.to_owned(), drain }).map_err(|e| e.to_string())
        };
        let all = view(&NODES);
        for node in ["n1", "n3", "n5"] {
            assert_eq!(ask(&all, node, true), Ok(()));
        }
        for node in ["n1", "n3", "n4", "r1"] {
            assert_eq!(ask(&all, node, false), Ok(()), "ending a drain changes nothing or helps");
        }
        for (node, part) in [("n9", "there are n1, n2"), ("r1", "replica"), ("n4", "gone")] {
            let error = ask(&all, node, true).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
        let error = ask(&view(&[("n1", "up"), ("n3", "draining")]), "n1", true).unwrap_err();
        assert!(error.contains("only node"), "{error}");
    }

    #[test]
    fn a_shard_moves_to_a_node_that_is_up() {
        let ask = |shard, node: Option<&str>| {
            let wish = Move { shard: ShardId(shard), node: node.map(str::to_owned) };
            may_move(&view(&NODES), &wish).map_err(|error| error.to_string())
        };
        assert_eq!(ask(0, Some("n2")), Ok(()));
        assert_eq!(ask(0, None), Ok(()));
        for (shard, node, part) in [
            (1, Some("n2"), "no shard 1"),
            (0, Some("n3"), "draining"),
            (0, Some("n4"), "gone"),
            (0, Some("n5"), "not heard"),
            (0, Some("r1"), "replica"),
            (0, Some("n6"), "version"),
            (0, Some("n9"), "no node \"n9\""),
        ] {
            let error = ask(shard, node).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
