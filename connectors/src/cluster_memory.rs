//! A registry and questions between nodes in memory, for tests and simulation, with delays and
//! failures on demand. Everything is lost with the process.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::cluster::{Answerer, Entry, PeerError, Peers, Registry, RegistryError};

/// What goes wrong between one node and the rest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// Every call takes this much longer, half before it is done and half after.
    pub delay: Duration,
    /// The node reaches neither the registry nor other nodes, and is not reached.
    pub away: bool,
    /// So many writes from now on fail before they are done.
    pub refused: u32,
    /// So many writes after those are done, but said to have failed.
    pub lost: u32,
}

#[derive(Default)]
struct State {
    entries: BTreeMap<String, (u64, Bytes)>,
    revision: u64,
    faults: HashMap<String, Faults>,
    answerers: HashMap<String, Answerer>,
    listeners: Vec<(String, watch::Sender<u64>)>,
}

/// A registry and the nodes that share it; clones share them too.
#[derive(Clone, Default)]
pub struct MemoryCluster {
    state: Arc<Mutex<State>>,
}

/// The registry, or the peers, as one node reaches them.
#[derive(Clone)]
pub struct MemoryNode {
    node: String,
    state: Arc<Mutex<State>>,
    nudges: watch::Sender<u64>,
}

impl MemoryCluster {
    /// An empty registry.
    pub fn new() -> MemoryCluster {
        MemoryCluster::default()
    }

    /// Registry and peers as the node of this name reaches them. One that comes back under a name it
    /// had before has the faults of that name.
    pub fn node(&self, name: &str) -> MemoryNode {
        let nudges = watch::Sender::new(0);
        self.state.lock().listeners.push((name.to_owned(), nudges.clone()));
        MemoryNode { node: name.to_owned(), state: self.state.clone(), nudges }
    }

    /// Sets what goes wrong for a node from now on.
    pub fn set(&self, node: &str, faults: Faults) {
        self.state.lock().faults.insert(node.to_owned(), faults);
    }

    /// The node is gone: it answers no questions any more.
    pub fn gone(&self, node: &str) {
        self.state.lock().answerers.remove(node);
    }

    /// All entries, whatever goes wrong for whom.
    pub fn entries(&self) -> Vec<Entry> {
        self.state.lock().entries()
    }
}

impl State {
    fn entries(&self) -> Vec<Entry> {
        let entry = |(key, (revision, value)): (&String, &(u64, Bytes))| Entry {
            key: key.clone(),
            revision: *revision,
            value: value.clone(),
        };
        self.entries.iter().map(entry).collect()
    }

    fn of(&self, node: &str) -> Faults {
        self.faults.get(node).copied().unwrap_or_default()
    }

    fn change(
        &mut self,
        key: String,
        value: Option<Bytes>,
        expected: u64,
    ) -> Result<u64, RegistryError> {
        let stands = self.entries.get(&key).map_or(0, |(revision, _)| *revision);
        let same = self.entries.get(&key).zip(value.as_ref()).is_some_and(|(a, b)| a.1 == *b);
        if same && stands > expected {
            // From an earlier call whose acknowledgement was lost.
            return Ok(stands);
        }
        if stands != expected {
            return Err(RegistryError::Conflict { key, expected });
        }
        self.revision += 1;
        match value {
            Some(value) => drop(self.entries.insert(key, (self.revision, value))),
            None => drop(self.entries.remove(&key)),
        }
        Ok(self.revision)
    }
}

fn unavailable(what: &str) -> RegistryError {
    RegistryError::Unavailable(what.to_owned())
}

impl MemoryNode {
    /// Does something as this node, with the faults it has.
    async fn reach<T>(
        self,
        writes: bool,
        work: impl FnOnce(&mut State) -> Result<T, RegistryError>,
    ) -> Result<T, RegistryError> {
        let delay = self.state.lock().of(&self.node).delay / 2;
        if !delay.is_zero() {
            sleep(delay).await;
        }
        let (done, lost) = {
            let mut state = self.state.lock();
            let faults = state.faults.entry(self.node.clone()).or_default();
            if faults.away {
                return Err(unavailable("the node is away on demand"));
            }
            if writes && faults.refused > 0 {
                faults.refused -= 1;
                return Err(unavailable("refused on demand"));
            }
            let lost = writes && faults.lost > 0;
            faults.lost -= u32::from(lost);
            (work(&mut state), lost)
        };
        if !delay.is_zero() {
            sleep(delay).await;
        }
        if lost { Err(unavailable("acknowledgement lost on demand")) } else { done }
    }
}

impl Registry for MemoryNode {
    fn read(&self) -> BoxFuture<'static, Result<Vec<Entry>, RegistryError>> {
        Box::pin(self.clone().reach(false, |state| Ok(state.entries())))
    }

    fn write(
        &self,
        key: String,
        value: Bytes,
        expected: u64,
    ) -> BoxFuture<'static, Result<u64, RegistryError>> {
        Box::pin(self.clone().reach(true, move |state| state.change(key, Some(value), expected)))
    }

    fn remove(&self, key: String, expected: u64) -> BoxFuture<'static, Result<(), RegistryError>> {
        let gone = move |state: &mut State| state.change(key, None, expected).map(drop);
        Box::pin(self.clone().reach(true, gone))
    }

    fn nudge(&self) -> BoxFuture<'static, ()> {
        let node = self.clone();
        Box::pin(async move {
            let state = node.state.lock();
            if state.of(&node.node).away {
                return;
            }
            for (whose, nudges) in &state.listeners {
                if *whose != node.node && !state.of(whose).away {
                    nudges.send_modify(|count| *count += 1);
                }
            }
        })
    }

    fn nudged(&self) -> BoxFuture<'static, ()> {
        // From the call on, not from the first poll.
        let mut nudges = self.nudges.subscribe();
        let node = self.clone();
        Box::pin(async move {
            // The sender lives as long as `node`.
            let _ = nudges.changed().await;
            drop(node);
        })
    }
}

impl Peers for MemoryNode {
    fn ask(
        &self,
        node: &str,
        question: Bytes,
        patience: Duration,
    ) -> BoxFuture<'static, Result<Bytes, PeerError>> {
        let (me, node) = (self.clone(), node.to_owned());
        Box::pin(async move {
            let silent = |what: &str| PeerError::Silent { node: node.clone(), what: what.into() };
            let (answerer, away, delay) = {
                let state = me.state.lock();
                let (mine, its) = (state.of(&me.node), state.of(&node));
                let answerer = state.answerers.get(&node).cloned();
                (answerer, mine.away || its.away, mine.delay + its.delay)
            };
            let answer = async {
                if !delay.is_zero() {
                    sleep(delay).await;
                }
                if away {
                    std::future::pending::<()>().await;
                }
                match answerer {
                    Some(answerer) => Ok(answerer(question).await),
                    None => Err(PeerError::Absent(node.clone())),
                }
            };
            timeout(patience, answer).await.unwrap_or_else(|_| Err(silent("no answer in time")))
        })
    }

    fn serve(&self, node: &str, answerer: Answerer) -> BoxFuture<'static, Result<(), PeerError>> {
        self.state.lock().answerers.insert(node.to_owned(), answerer);
        Box::pin(futures::future::ready(Ok(())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(text: &str) -> Bytes {
        Bytes::from(text.to_owned())
    }

    #[tokio::test]
    async fn it_compares_and_sets() {
        let cluster = MemoryCluster::new();
        let (a, b) = (cluster.node("a"), cluster.node("b"));
        let first = a.write("k".into(), text("1"), 0).await.unwrap();
        let conflict = b.write("k".into(), text("2"), 0).await.unwrap_err();
        assert_eq!(conflict, RegistryError::Conflict { key: "k".into(), expected: 0 });
        let second = b.write("k".into(), text("2"), first).await.unwrap();
        assert!(second > first);
        assert!(a.remove("k".into(), first).await.is_err());
        a.remove("k".into(), second).await.unwrap();
        assert_eq!(b.read().await.unwrap(), []);
        let third = b.write("k".into(), text("3"), 0).await.unwrap();
        assert!(third > second);
        let entry = Entry { key: "k".into(), revision: third, value: text("3") };
        assert_eq!(a.read().await.unwrap(), [entry]);
    }

    #[tokio::test]
    async fn faults_on_demand() {
        let cluster = MemoryCluster::new();
        let (a, b) = (cluster.node("a"), cluster.node("b"));
        cluster.set("a", Faults { refused: 1, lost: 1, ..Faults::default() });
        assert!(a.write("k".into(), text("1"), 0).await.is_err());
        assert_eq!(cluster.entries(), []);
        assert!(a.write("k".into(), text("1"), 0).await.is_err());
        assert_eq!(cluster.entries().len(), 1);
        // Its own, which it repeats, and somebody else's.
        assert_eq!(a.write("k".into(), text("1"), 0).await, Ok(1));
        let conflict = b.write("k".into(), text("2"), 0).await.unwrap_err();
        assert!(matches!(conflict, RegistryError::Conflict { .. }));
        cluster.set("a", Faults { away: true, ..Faults::default() });
        assert!(a.read().await.is_err() && b.read().await.is_ok());
    }

    #[tokio::test]
    async fn nudges_reach_the_others_and_questions_one() {
        let cluster = MemoryCluster::new();
        let (a, b) = (cluster.node("a"), cluster.node("b"));
        let (of_a, of_b) = (a.nudged(), b.nudged());
        a.nudge().await;
        of_b.await;
        let soon = Duration::from_millis(20);
        assert!(timeout(soon, of_a).await.is_err(), "nobody hears his own nudge");
        assert!(timeout(soon, b.nudged()).await.is_err(), "that one was before");

        let whom = "b".to_owned();
        assert_eq!(a.ask("b", text("?"), soon).await, Err(PeerError::Absent(whom)));
        let echo: Answerer = Arc::new(|question| Box::pin(futures::future::ready(question)));
        b.serve("b", echo).await.unwrap();
        assert_eq!(a.ask("b", text("?"), soon).await, Ok(text("?")));
        cluster.set("b", Faults { away: true, ..Faults::default() });
        assert!(matches!(a.ask("b", text("?"), soon).await, Err(PeerError::Silent { .. })));
    }
}
