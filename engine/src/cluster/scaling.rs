//! How many nodes the load calls for, measured at work: counts what this node's shards commit, keeps the
//! load of shards in the registry, tells the cluster what this node can do, and asks
//! [`forecast`](super::forecast).
//!
//! A node keeps in memory only what it counted since it last wrote a shard's entry, and adds that to
//! the entry by compare-and-set. So a history moves with its shard without a hand-over, and two owners one
//! after the other lose nothing of each other. A crash loses what was counted since: [`SAVE`] at most.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use meterr_connectors::cluster::{Entry, Registry, RegistryError};
use meterr_operators::ids::ShardId;
use meterr_operators::time::Time;
use parking_lot::Mutex;
use tokio::time::timeout;

use super::driver::Cluster;
use super::forecast::{Aims, LoadHistory, Now, Recommendation, ServiceRate, ShardLoad, recommend};
use super::link::Outlook;
use super::records::{FORMAT, Key, Load, RecordError, Session, parse, write};
use super::{ClusterView, Held, Shards};
use crate::live::Committed;
use crate::metrics::ShardMetrics;
use crate::node::{NodeShared, now};

/// Between two looks.
pub const LOOK: Duration = Duration::from_secs(30);
/// Longest that an owner keeps to itself what it counted.
pub const SAVE: Duration = Duration::from_secs(600);
/// How long the registry is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

const LAG: &str = "lag_events";
const EVENTS: &str = "service_events";
const BUSY: &str = "service_busy_seconds";
const THREADS: &str = "threads";
const RATE: &str = "events_per_second";

/// What a node's shards committed.
#[derive(Default)]
pub struct Measured {
    unsaved: Mutex<BTreeMap<ShardId, Unsaved>>,
    work: Mutex<Work>,
}

struct Unsaved {
    load: ShardLoad,
    since: Instant,
}

#[derive(Clone, Copy, Default)]
struct Work {
    service: ServiceRate,
    events: f64,
    records: f64,
}

/// Records after which older ones count half.
const RECORDS_HALF: f64 = 1e6;

impl Measured {
    /// Counts a commit of a shard that this node owns.
    pub fn committed(&self, shard: ShardId, commit: &Committed) {
        let lines = commit.counts.lines;
        let mut unsaved = self.unsaved.lock();
        let fresh = || Unsaved { load: ShardLoad::default(), since: Instant::now() };
        let of = unsaved.entry(shard).or_insert_with(fresh);
        of.load.add(commit.usage, commit.log_time, lines);
        drop(unsaved);
        let mut work = self.work.lock();
        work.service.add(lines, commit.busy);
        work.events += lines as f64;
        work.records += commit.records as f64;
        if work.records > RECORDS_HALF {
            work.events /= 2.0;
            work.records /= 2.0;
        }
    }

    /// Events of a record of the usage log, on average; 1 while that is not known.
    fn events_per_record(&self) -> f64 {
        let work = *self.work.lock();
        if work.records > 0.0 { work.events / work.records } else { 1.0 }
    }

    /// What of a shard is to be written now.
    fn due(&self, shard: ShardId, owned: bool) -> Option<ShardLoad> {
        let unsaved = self.unsaved.lock();
        let of = unsaved.get(&shard)?;
        (!owned || of.since.elapsed() >= SAVE).then(|| of.load.clone())
    }

    /// Takes out what is to be written of a shard; what comes from then on is counted apart.
    fn take(&self, shard: ShardId) -> Option<ShardLoad> {
        self.unsaved.lock().remove(&shard).map(|of| of.load)
    }

    /// Gives back what could not be written.
    fn give_back(&self, shard: ShardId, load: &ShardLoad) {
        let mut unsaved = self.unsaved.lock();
        let fresh = || Unsaved { load: ShardLoad::default(), since: Instant::now() };
        unsaved.entry(shard).or_insert_with(fresh).load.merge(load);
    }

    fn add_to(&self, loads: &mut BTreeMap<ShardId, ShardLoad>) {
        for (shard, of) in &*self.unsaved.lock() {
            loads.entry(*shard).or_default().merge(&of.load);
        }
    }
}

/// What the registry holds about load.
#[derive(Default)]
struct Found {
    loads: BTreeMap<ShardId, ShardLoad>,
    /// Revisions of entries that may be written, and what stands there.
    entries: BTreeMap<ShardId, (u64, Bytes)>,
    /// Entries of newer versions: left alone.
    newer: Vec<ShardId>,
    /// What nodes say of themselves.
    figures: BTreeMap<String, BTreeMap<String, f64>>,
}

impl Found {
    /// Reads entries. Pure.
    fn read(entries: &[Entry], shards: u16) -> Found {
        let mut found = Found::default();
        for Entry { key, revision, value } in entries {
            match Key::parse(key) {
                Some(Key::Load(shard)) if shard.0 < shards => {
                    match parse::<Load>(key, value) {
                        Ok(load) => drop(found.loads.insert(shard, load.load)),
                        Err(RecordError::Newer { .. }) => {
                            found.newer.push(shard);
                            continue;
                        }
                        // History is no figure of anybody's spend: it begins anew.
                        Err(RecordError::Damaged { .. }) => {}
                    }
                    found.entries.insert(shard, (*revision, value.clone()));
                }
                Some(Key::Node(node)) => {
                    if let Ok(session) = parse::<Session>(key, value)
                        && !session.over()
                        && !session.replica
                    {
                        found.figures.insert(node, session.figures);
                    }
                }
                _ => {}
            }
        }
        found
    }

    /// What is foreseen, where `up` are the nodes that take shards. Pure.
    fn outlook(&self, log_time: Time, shards: u32, up: &[&str], aims: &Aims) -> Outlook {
        let figure = |figures: &BTreeMap<String, f64>, name: &str| {
            figures.get(name).copied().filter(|n| n.is_finite() && *n >= 0.0).unwrap_or(0.0)
        };
        let mut all = LoadHistory::default();
        for load in self.loads.values() {
            all.merge(load.history());
        }
        let rates = self.loads.iter().map(|(shard, load)| (*shard, load.history().rate(log_time)));
        let busiest = rates.max_by(|a, b| a.1.total_cmp(&b.1));
        let (mut service, mut lag) = (ServiceRate::default(), 0.0);
        let mut threads = None;
        let mut events_per_second = BTreeMap::new();
        for (node, figures) in &self.figures {
            let own = ServiceRate::of(figure(figures, EVENTS), figure(figures, BUSY));
            service.merge(&own);
            lag += figure(figures, LAG);
            let of_node = figure(figures, THREADS).clamp(1.0, 1_024.0);
            if let Some(rate) = own.events_per_second() {
                events_per_second.insert(node.clone(), rate * of_node);
            }
            if up.contains(&node.as_str()) && figures.contains_key(THREADS) {
                threads = Some(threads.map_or(of_node, |least: f64| least.min(of_node)));
            }
        }
        let forecast: Recommendation = recommend(
            &Now {
                log_time,
                load: &all,
                busiest,
                service,
                threads: threads.unwrap_or(1.0) as u32,
                lag_events: lag as u64,
                nodes: up.len() as u32,
                shards,
            },
            aims,
        );
        Outlook { events_per_second, forecast: Some(forecast) }
    }
}

/// Looks every [`LOOK`].
pub struct Scaling {
    /// The node.
    pub shared: Arc<NodeShared>,
    /// Its part in the cluster.
    pub cluster: Cluster,
    /// Its shards.
    pub shards: Arc<dyn Shards>,
    /// The registry.
    pub registry: Arc<dyn Registry>,
    /// What is found, for whoever asks.
    pub outlook: Arc<Mutex<Outlook>>,
    /// Writes whose outcome is not known: what was added, and the value it gave.
    pub unsure: BTreeMap<ShardId, (ShardLoad, Bytes)>,
}

impl Scaling {
    /// Looks once. When the registry is away, what was found before stays.
    pub async fn look(&mut self) {
        let late = || RegistryError::Unavailable(format!("no answer in {PATIENCE:?}"));
        let read = timeout(PATIENCE, self.registry.read()).await;
        let entries = match read.unwrap_or_else(|_| Err(late())) {
            Ok(entries) => entries,
            Err(error) => {
                tracing::debug!(%error, "loads were not read");
                return;
            }
        };
        let held = self.shards.held();
        let count = held.len() as u16;
        let mut found = Found::read(&entries, count);
        for (shard, (load, value)) in std::mem::take(&mut self.unsure) {
            let landed = found.entries.get(&shard).is_some_and(|(_, stands)| *stands == value);
            if !landed {
                self.shared.measured.give_back(shard, &load);
            }
        }
        let owned = |at: usize| matches!(held.get(at), Some(Held::Owned { .. }));
        for shard in (0..count).map(ShardId) {
            if self.shared.measured.due(shard, owned(usize::from(shard.0))).is_some() {
                self.save(shard, &mut found).await;
            }
        }
        self.shared.measured.add_to(&mut found.loads);
        let time = now();
        let rate = (0..count).map(ShardId).filter(|shard| owned(usize::from(shard.0)));
        let rate = rate.filter_map(|shard| found.loads.get(&shard));
        let rate: f64 = rate.map(|load| load.history().rate(time)).sum();
        let lag: u64 = (0..held.len()).filter(|at| owned(*at)).map(|at| self.lag(at)).sum();
        let measured = &self.shared.measured;
        let service = measured.work.lock().service;
        let figures = BTreeMap::from([
            (LAG.to_owned(), (lag as f64 * measured.events_per_record()).round()),
            (EVENTS.to_owned(), service.events()),
            (BUSY.to_owned(), service.busy_seconds()),
            (THREADS.to_owned(), self.shared.workers.read().len() as f64),
            (RATE.to_owned(), rate),
        ]);
        if found.figures.contains_key(self.cluster.node()) {
            found.figures.insert(self.cluster.node().to_owned(), figures.clone());
        }
        self.cluster.report(figures);
        let view: ClusterView = self.cluster.view().borrow().clone();
        let up: Vec<&str> =
            view.nodes.iter().filter(|n| n.state == "up").map(|n| n.node.as_str()).collect();
        let outlook = found.outlook(time, u32::from(count), &up, &Aims::default());
        if let Some(forecast) = &outlook.forecast {
            self.shared.metrics.node().forecast(forecast);
        }
        *self.outlook.lock() = outlook;
    }

    /// Records of a shard that no commit includes yet.
    fn lag(&self, at: usize) -> u64 {
        let seen = self.shared.progress[at].borrow().usage;
        self.shared.logs[at].usage.head().saturating_sub(seen)
    }

    /// Adds what was counted of a shard to its entry.
    async fn save(&mut self, shard: ShardId, found: &mut Found) {
        if found.newer.contains(&shard) {
            return;
        }
        let Some(part) = self.shared.measured.take(shard) else { return };
        let mut load = found.loads.get(&shard).cloned().unwrap_or_default();
        load.merge(&part);
        let value = write(&Load { format: FORMAT, load: load.clone() });
        let expected = found.entries.get(&shard).map_or(0, |(revision, _)| *revision);
        let writing = self.registry.write(Key::Load(shard).to_string(), value.clone(), expected);
        match timeout(PATIENCE, writing).await {
            Ok(Ok(_)) => {}
            // Another owner's came between: added to that one at the next look.
            Ok(Err(RegistryError::Conflict { .. })) => {
                self.shared.measured.give_back(shard, &part);
                return;
            }
            Ok(Err(RegistryError::Unavailable(_))) | Err(_) => {
                self.unsure.insert(shard, (part, value));
            }
        }
        found.loads.insert(shard, load);
    }
}

/// Lag and staleness of this node's shards, as of now: lag in records where it owns them and 0 elsewhere,
/// so that nodes add up; staleness where they stand by.
pub fn show_shards(shared: &NodeShared, held: &[Held], metrics: &[ShardMetrics]) {
    for (at, (held, metrics)) in held.iter().zip(metrics).enumerate() {
        let owned = matches!(held, Held::Owned { .. });
        let seen = shared.progress[at].borrow().usage;
        let lag = shared.logs[at].usage.head().saturating_sub(seen);
        metrics.lag(if owned { lag } else { 0 });
        let age = shared.current[at].lock().map(|current| current.elapsed());
        let stands_by = matches!(held, Held::StandingBy { .. });
        metrics.staleness(if stands_by { age } else { Some(Duration::ZERO) });
    }
}

#[cfg(test)]
#[path = "scaling_tests.rs"]
mod tests;
