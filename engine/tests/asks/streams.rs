//! Followers of shards that are elsewhere, or that move: every commit that touched their org, in
//! order, without a gap and once.

use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use meterr_connectors::api::{Api, StreamEvent, StreamId};
use meterr_connectors::cluster::Peers;
use meterr_engine::records::{each_commit, orgs_of};
use meterr_operators::ids::{ShardId, shard_of};
use meterr_operators::rng::Rng;

use crate::forwarding::{at, spend};
use crate::nodes::{Deployment, Node, SHARDS};

type Stream = BoxStream<'static, StreamEvent>;

/// The epochs whose commits touched an org.
fn touching(deployment: &Deployment, shard: ShardId, org: &str) -> Vec<u64> {
    let mut epochs = Vec::new();
    each_commit(&*deployment.logs[usize::from(shard.0)].out, 0, |_, commit, parts| {
        let touches = |part: &meterr_connectors::log::Record| {
            orgs_of(&part.message.payload).iter().any(|of| of == org)
        };
        if parts.iter().any(touches) {
            epochs.push(commit.epoch);
        }
        Ok(())
    })
    .unwrap();
    epochs
}

/// What one follower saw: where it began, and every change behind it.
#[derive(Debug, Default)]
struct Seen {
    began: u64,
    changes: Vec<u64>,
    resets: usize,
}

impl Seen {
    fn take(&mut self, event: &StreamEvent) {
        match event {
            StreamEvent::Reset => self.resets += 1,
            StreamEvent::Snapshot { epoch, .. } => {
                (self.began, self.changes) = (*epoch, Vec::new());
            }
            StreamEvent::Change { epoch, .. } => self.changes.push(*epoch),
        }
    }

    fn last(&self) -> u64 {
        self.changes.last().copied().unwrap_or(self.began)
    }

    /// Reads on until nothing comes for a while after the last commit was seen.
    async fn read_to(&mut self, stream: &mut Stream, epoch: u64) {
        while self.last() < epoch {
            let next = tokio::time::timeout(Duration::from_secs(20), stream.next()).await;
            let event = next.unwrap_or_else(|_| panic!("{self:?} waits for {epoch}"));
            self.take(&event.expect("the stream goes on"));
        }
    }

    fn check(&self, touching: &[u64]) {
        let behind: Vec<u64> = touching.iter().copied().filter(|e| *e > self.began).collect();
        assert_eq!(self.changes, behind, "began at {}", self.began);
    }
}

async fn committed(node: &Node, org: &str, shard: ShardId, position: u64) {
    node.service.spend(spend(org, Some(at(shard, position)))).await.unwrap();
}

async fn follow(node: &Node, org: &str, after: Option<StreamId>) -> Stream {
    node.service.follow(org.to_owned(), after).await.unwrap()
}

fn body(event: &StreamEvent) -> serde_json::Value {
    match event {
        StreamEvent::Snapshot { body, .. } | StreamEvent::Change { body, .. } => {
            serde_json::from_slice(body).unwrap()
        }
        StreamEvent::Reset => serde_json::Value::Null,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_elsewhere_sees_what_one_at_the_owner_sees() {
    let deployment = Deployment::new(&["n1", "n2"]);
    let n1 = Node::start(&deployment, "n1", false).await;
    let n2 = Node::start(&deployment, "n2", false).await;
    let (org, shard) = ("acme", shard_of("acme", SHARDS));
    assert_ne!(shard, shard_of("another", SHARDS));
    n2.own(&deployment, shard).await;
    let (_, first) = deployment.publish(org, 0).await;
    committed(&n1, org, shard, first).await;
    n2.own(&deployment, shard_of("another", SHARDS)).await;
    let (mut there, mut here) = (follow(&n1, org, None).await, follow(&n2, org, None).await);
    let mut another = follow(&n1, "another", None).await;
    for id in 1..=10 {
        let (_, last) = deployment.publish(org, id).await;
        committed(&n1, org, shard, last).await;
    }
    for n in 0..=10 {
        let (there, here) = (there.next().await.unwrap(), here.next().await.unwrap());
        assert_eq!(matches!(there, StreamEvent::Snapshot { .. }), n == 0);
        assert_eq!(body(&there), body(&here));
    }
    assert_eq!(n1.shared.tails.open(), 2);
    assert!(matches!(another.next().await, Some(StreamEvent::Snapshot { .. })));
    drop((there, another));
    assert_eq!(n1.shared.tails.open(), 0, "a tail ends with its last follower");

    // Coming back by an id: what was missed, then on.
    let epochs = touching(&deployment, shard, org);
    let mut seen = Seen { began: epochs[3], ..Seen::default() };
    let mut back = follow(&n1, org, Some(StreamId { shard, epoch: epochs[3] })).await;
    let (_, last) = deployment.publish(org, 11).await;
    committed(&n1, org, shard, last).await;
    let epochs = touching(&deployment, shard, org);
    seen.read_to(&mut back, *epochs.last().unwrap()).await;
    seen.check(&epochs);
    assert_eq!(seen.resets, 0);

    // Ids that are none of this shard's.
    for after in [
        StreamId { shard, epoch: epochs.last().unwrap() + 99 },
        StreamId { shard: ShardId(shard.0 + 1), epoch: 1 },
    ] {
        let mut anew = follow(&n1, org, Some(after)).await;
        assert_eq!(anew.next().await, Some(StreamEvent::Reset), "{after:?}");
        assert!(matches!(anew.next().await, Some(StreamEvent::Snapshot { .. })));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_too_slow_is_let_go() {
    let deployment = Deployment::new(&["n1", "n2"]);
    let n1 = Node::start(&deployment, "n1", false).await;
    let n2 = Node::start(&deployment, "n2", false).await;
    let (org, shard) = ("acme", shard_of("acme", SHARDS));
    n2.own(&deployment, shard).await;
    let (mut slow, mut quick) = (follow(&n1, org, None).await, follow(&n1, org, None).await);
    let mut seen = Seen::default();
    for id in 0..300 {
        let (_, last) = deployment.publish(org, id).await;
        committed(&n2, org, shard, last).await;
        let newest = *touching(&deployment, shard, org).last().unwrap();
        seen.read_to(&mut quick, newest).await;
    }
    seen.check(&touching(&deployment, shard, org));
    let mut of_slow = Seen::default();
    while let Some(event) = slow.next().await {
        of_slow.take(&event);
    }
    let epochs = touching(&deployment, shard, org);
    assert_eq!(of_slow.changes, epochs[..of_slow.changes.len()], "in order, without a gap");
    assert!((256..300).contains(&of_slow.changes.len()), "{}", of_slow.changes.len());
    // It comes back by its last id, and has everything.
    let after = Some(StreamId { shard, epoch: of_slow.last() });
    let mut back = follow(&n1, org, after).await;
    of_slow.read_to(&mut back, *epochs.last().unwrap()).await;
    of_slow.check(&epochs);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_what_stands_by_is_brought_up_to_date() {
    let deployment = Deployment::new(&["n1", "n2"]);
    let n1 = Node::start(&deployment, "n1", false).await;
    let n2 = Node::start(&deployment, "n2", false).await;
    let (org, shard) = ("acme", shard_of("acme", SHARDS));
    n2.own(&deployment, shard).await;
    let (_, first) = deployment.publish(org, 0).await;
    committed(&n1, org, shard, first).await;
    n1.stand_by(&deployment, shard).await;
    for id in 1..=3 {
        let (_, last) = deployment.publish(org, id).await;
        committed(&n2, org, shard, last).await;
    }
    deployment.wires.cut("n2");
    let mut stream = follow(&n1, org, None).await;
    let epochs = touching(&deployment, shard, org);
    let mut seen = Seen::default();
    seen.read_to(&mut stream, *epochs.last().unwrap()).await;
    assert_eq!(seen.began, epochs[0]);
    seen.check(&epochs);
    deployment.wires.serve("n2", n2.service.answerer()).await.unwrap();
    let (_, last) = deployment.publish(org, 4).await;
    committed(&n1, org, shard, last).await;
    let epochs = touching(&deployment, shard, org);
    seen.read_to(&mut stream, *epochs.last().unwrap()).await;
    seen.check(&epochs);
}

/// Followers on both nodes, a shard that goes to and fro, commits all the while.
#[tokio::test(flavor = "multi_thread")]
async fn streams_go_on_wherever_the_shard_goes() {
    for seed in 1..=4 {
        let mut rng = Rng::new(seed);
        let deployment = Deployment::new(&["n1", "n2"]);
        let nodes = [
            Node::start(&deployment, "n1", false).await,
            Node::start(&deployment, "n2", false).await,
        ];
        let (org, shard) = ("acme", shard_of("acme", SHARDS));
        let mut owner = 0;
        nodes[owner].own(&deployment, shard).await;
        let mut followers: Vec<(Seen, Stream)> = Vec::new();
        let mut published = 0;
        for step in 0..60 {
            match rng.bits() % 6 {
                0 if step > 0 => {
                    nodes[owner].release(shard).await;
                    deployment.owned_by(shard, None);
                    owner = 1 - owner;
                    nodes[owner].own(&deployment, shard).await;
                }
                1 if followers.len() < 6 => {
                    let node = &nodes[(rng.bits() % 2) as usize];
                    followers.push((Seen::default(), follow(node, org, None).await));
                }
                2 if !followers.is_empty() => {
                    // Drops off and comes back by its last id, maybe to the other node.
                    let which = (rng.bits() as usize) % followers.len();
                    let (mut seen, mut stream) = followers.swap_remove(which);
                    if seen.began == 0 && seen.changes.is_empty() {
                        seen.take(&stream.next().await.unwrap());
                    }
                    let node = &nodes[(rng.bits() % 2) as usize];
                    let after = Some(StreamId { shard, epoch: seen.last() });
                    followers.push((seen, follow(node, org, after).await));
                }
                _ => {
                    let (_, last) = deployment.publish(org, published).await;
                    published += 1;
                    if rng.percent(50) {
                        committed(&nodes[(rng.bits() % 2) as usize], org, shard, last).await;
                    }
                }
            }
        }
        let (_, last) = deployment.publish(org, published).await;
        committed(&nodes[0], org, shard, last).await;
        let epochs = touching(&deployment, shard, org);
        assert!(!epochs.is_empty());
        for (mut seen, mut stream) in followers {
            seen.read_to(&mut stream, *epochs.last().unwrap()).await;
            seen.check(&epochs);
            assert_eq!(seen.resets, 0, "seed {seed}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_missed_is_told_by_any_node() {
    let deployment = Deployment::new(&["n1", "n2"]);
    let n1 = Node::start(&deployment, "n1", false).await;
    let n2 = Node::start(&deployment, "n2", false).await;
    let (org, shard) = ("acme", shard_of("acme", SHARDS));
    n2.own(&deployment, shard).await;
    for id in 0..3 {
        let (_, last) = deployment.publish(org, id).await;
        committed(&n1, org, shard, last).await;
    }
    let epochs = touching(&deployment, shard, org);
    for after in [None, Some(epochs[0]), Some(epochs[2]), Some(epochs[2] + 50)] {
        let after = after.map(|epoch| StreamId { shard, epoch });
        let here = n2.service.catch_up(org.to_owned(), after).await.unwrap();
        let there = n1.service.catch_up(org.to_owned(), after).await.unwrap();
        assert_eq!(here, there);
        assert!(!here.is_empty());
    }
}
