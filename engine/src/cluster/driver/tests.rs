//! Nodes on a registry in memory, in real time with a short lease time; waits are for conditions.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use meterr_connectors::cluster::{Answerer, Entry, PeerError, Peers, Registry, RegistryError};
use meterr_operators::ids::ShardId;
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::time::timeout;

use super::{Cluster, ClusterError, End, Surroundings, start};
use crate::cluster::member::{ReleaseAnswer, Settings};
use crate::cluster::records::parse;
use crate::cluster::{ClusterView, Held, Shards};

const SHARDS: u16 = 16;

/// Revision and value by key, and the last revision.
type Entries = (u64, BTreeMap<String, (u64, Bytes)>);

struct MemoryRegistry {
    entries: Mutex<Entries>,
    nudges: watch::Sender<u64>,
}

impl Default for MemoryRegistry {
    fn default() -> Self {
        MemoryRegistry { entries: Mutex::default(), nudges: watch::Sender::new(0) }
    }
}

fn ready<T: Send + 'static>(value: T) -> BoxFuture<'static, T> {
    Box::pin(futures::future::ready(value))
}

/// The registry as one node reaches it.
struct Access {
    registry: Arc<MemoryRegistry>,
    away: Mutex<bool>,
}

impl Access {
    fn cas<T>(
        &self,
        key: String,
        expected: u64,
        change: impl FnOnce(&mut Entries, String) -> T,
    ) -> Result<T, RegistryError> {
        if *self.away.lock() {
            return Err(RegistryError::Unavailable("away".into()));
        }
        let mut entries = self.registry.entries.lock();
        if entries.1.get(&key).map_or(0, |(revision, _)| *revision) != expected {
            return Err(RegistryError::Conflict { key, expected });
        }
        Ok(change(&mut entries, key))
    }
}

impl Registry for Access {
    fn read(&self) -> BoxFuture<'static, Result<Vec<Entry>, RegistryError>> {
        if *self.away.lock() {
            return ready(Err(RegistryError::Unavailable("away".into())));
        }
        let entries = self.registry.entries.lock();
        let entry = |(key, (revision, value)): (&String, &(u64, Bytes))| Entry {
            key: key.clone(),
            revision: *revision,
            value: value.clone(),
        };
        ready(Ok(entries.1.iter().map(entry).collect()))
    }

    fn write(
        &self,
        key: String,
        value: Bytes,
        expected: u64,
    ) -> BoxFuture<'static, Result<u64, RegistryError>> {
        ready(self.cas(key, expected, |(revision, entries), key| {
            *revision += 1;
            entries.insert(key, (*revision, value));
            *revision
        }))
    }

    fn remove(&self, key: String, expected: u64) -> BoxFuture<'static, Result<(), RegistryError>> {
        ready(self.cas(key, expected, |(revision, entries), key| {
            *revision += 1;
            entries.remove(&key);
        }))
    }

    fn nudge(&self) -> BoxFuture<'static, ()> {
        self.registry.nudges.send_modify(|count| *count += 1);
        ready(())
    }

    fn nudged(&self) -> BoxFuture<'static, ()> {
        let mut nudges = self.registry.nudges.subscribe();
        Box::pin(async move { drop(nudges.changed().await) })
    }
}

#[derive(Default)]
struct MemoryPeers(Mutex<BTreeMap<String, Answerer>>);

impl Peers for MemoryPeers {
    fn ask(
        &self,
        node: &str,
        question: Bytes,
        _: Duration,
    ) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        match self.0.lock().get(node).cloned() {
            Some(answerer) => Box::pin(async move { Ok(answerer(question).await) }),
            None => ready(Err(PeerError::Absent(node.to_owned()))),
        }
    }

    fn serve(&self, node: &str, answerer: Answerer) -> BoxFuture<'static, Result<(), PeerError>> {
        self.0.lock().insert(node.to_owned(), answerer);
        ready(Ok(()))
    }
}

/// Shards that do at once what they are told, and ring.
struct ObedientShards {
    held: Mutex<Vec<Held>>,
    changed: Notify,
}

impl ObedientShards {
    fn set(&self, shard: ShardId, held: Held) {
        self.held.lock()[usize::from(shard.0)] = held;
        self.changed.notify_one();
    }
}

impl Shards for ObedientShards {
    fn held(&self) -> Vec<Held> {
        self.held.lock().clone()
    }

    fn stand_by(&self, shard: ShardId) {
        self.set(shard, Held::StandingBy { behind: 0 });
    }

    fn own(&self, shard: ShardId, token: u64) {
        self.set(shard, Held::Owned { token, live: true });
    }

    fn release(&self, shard: ShardId) {
        self.set(shard, Held::Released);
    }

    fn drop(&self, shard: ShardId) {
        self.set(shard, Held::Nothing);
    }
}

#[derive(Default)]
struct World {
    registry: Arc<MemoryRegistry>,
    peers: Arc<MemoryPeers>,
}

struct Node {
    cluster: Cluster,
    shards: Arc<ObedientShards>,
    access: Arc<Access>,
    ringing: tokio::task::JoinHandle<()>,
}

impl World {
    async fn node(&self, name: &str, seed: u64) -> Node {
        let settings = Settings {
            ttl: Duration::from_millis(400),
            settle: Duration::from_millis(300),
            ..Settings::new(name, SHARDS)
        };
        let held = Mutex::new(vec![Held::Nothing; usize::from(SHARDS)]);
        let shards = Arc::new(ObedientShards { held, changed: Notify::new() });
        let access = Arc::new(Access { registry: self.registry.clone(), away: Mutex::new(false) });
        let with = Surroundings {
            registry: access.clone(),
            peers: self.peers.clone(),
            shards: shards.clone(),
        };
        let cluster = start(settings, seed, with);
        let answering = cluster.clone();
        let answerer: Answerer = Arc::new(move |question| {
            let cluster = answering.clone();
            Box::pin(async move { cluster.handle_release(question).await })
        });
        self.peers.serve(name, answerer).await.unwrap();
        let (ringing, bell) = (cluster.clone(), shards.clone());
        let ringing = tokio::spawn(async move {
            loop {
                bell.changed.notified().await;
                ringing.shards_changed();
            }
        });
        Node { cluster, shards, access, ringing }
    }

    /// Takes a node away as a crash does.
    fn kill(&self, node: Node) {
        self.peers.0.lock().remove(node.cluster.node());
        node.ringing.abort();
    }
}

impl Node {
    async fn sees(&self, what: &str, so: impl FnMut(&ClusterView) -> bool) -> ClusterView {
        let mut view = self.cluster.view();
        let seen = timeout(Duration::from_secs(20), view.wait_for(so)).await;
        let Ok(seen) = seen else { panic!("{what}: {:#?}", self.cluster.view().borrow()) };
        seen.unwrap().clone()
    }
}

fn loads(view: &ClusterView) -> Vec<usize> {
    view.nodes.iter().map(|node| node.shards.len()).collect()
}

fn all_owned(view: &ClusterView) -> bool {
    view.shards.len() == usize::from(SHARDS) && view.shards.iter().all(|s| s.owner.is_some())
}

fn balanced(view: &ClusterView, nodes: usize) -> bool {
    let as_wanted = view.shards.iter().all(|shard| shard.owner == shard.wanted);
    all_owned(view) && view.nodes.len() == nodes && as_wanted
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_share_pin_drain_and_leave() {
    let world = World::default();
    let a = world.node("a", 1).await;
    a.sees("alone it owns everything", |view| loads(view) == [16]).await;
    let (b, c) = (world.node("b", 2).await, world.node("c", 3).await);
    let view = a.sees("three share", |view| balanced(view, 3)).await;
    assert!(loads(&view).iter().all(|load| (2..=7).contains(load)), "{:?}", loads(&view));

    let shard = view.shards.iter().find(|shard| shard.owner.as_deref() != Some("b")).unwrap().shard;
    c.cluster.pin(shard, Some("b")).await.unwrap();
    a.sees("a pin moves a shard", |view| view.owner(shard) == Some("b")).await;
    let unknown = c.cluster.pin(shard, Some("x")).await.unwrap_err().to_string();
    assert_eq!(unknown, r#"there is no node "x"; there are a, b, c"#);
    let unknown = c.cluster.pin(ShardId(16), None).await.unwrap_err().to_string();
    assert_eq!(unknown, "there is no shard 16; they are 0 to 15");
    c.cluster.pin(shard, None).await.unwrap();
    a.sees("it goes back", |view| balanced(view, 3) && view.shards[0].pinned.is_none()).await;

    a.cluster.drain("b", true).await.unwrap();
    let view = c.sees("a drained node is empty", |view| {
        all_owned(view) && view.nodes.iter().any(|n| n.node == "b" && n.shards.is_empty())
    });
    assert_eq!(view.await.nodes[1].state, "draining");
    b.cluster.drain("b", false).await.unwrap();
    c.sees("and filled again", |view| balanced(view, 3)).await;

    assert_eq!(b.cluster.leave().await, Some(End::Left));
    assert!(b.shards.held().iter().all(|held| *held == Held::Nothing));
    a.sees("who left is gone, its shards are not", |view| balanced(view, 2)).await;
    assert_eq!(b.cluster.pin(ShardId(1), None).await, Err(ClusterError::Ended));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_vanishes_is_followed_by_the_others() {
    let world = World::default();
    let (a, b) = (world.node("a", 1).await, world.node("b", 2).await);
    a.sees("two share", |view| balanced(view, 2)).await;
    // Cut off, it is taken to be dead; reachable again, it begins anew.
    *b.access.away.lock() = true;
    a.sees("a takes over", |view| view.nodes.iter().any(|n| n.node == "a" && n.shards.len() == 16))
        .await;
    *b.access.away.lock() = false;
    a.sees("two share again", |view| balanced(view, 2)).await;
    world.kill(b);
    a.sees("a takes over again", |view| {
        view.nodes.iter().any(|n| n.node == "a" && n.shards.len() == 16)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_is_given_once() {
    let world = World::default();
    let first = world.node("a", 1).await;
    first.sees("it is there", |view| loads(view) == [16]).await;
    let second = world.node("a", 2).await;
    let Some(End::Refused(why)) = second.cluster.ended().await else { panic!("it runs") };
    assert!(why.contains("a node named \"a\" is already running"), "{why}");
    assert!(first.shards.held().iter().all(|held| matches!(held, Held::Owned { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_request_is_refused() {
    let world = World::default();
    let a = world.node("a", 1).await;
    for question in
        [&b""[..], b"\xff\xfe", b"{\"format\":1}", b"{\"format\":7,\"ask\":\"release\"}"]
    {
        let answer = a.cluster.handle_release(Bytes::copy_from_slice(question)).await;
        let answer: ReleaseAnswer = parse("answer", &answer).unwrap();
        assert!(!answer.releasing && !answer.why.is_empty());
    }
}
