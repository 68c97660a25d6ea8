//! How many nodes the load calls for: pure, from counted load ([`LoadHistory`]), measured service rate
//! ([`ServiceRate`]) and lag.
//!
//! ```text
//! by load   predicted events/s at the upper quantile / (events/s a node can do × target utilisation)
//! by lag    (events/s now + lag / time to work it off) / events/s a node can do
//! ```
//!
//! The larger decides, rounded up. The prediction is that of the next hours, so nodes are there before
//! the load is; and it is kept until fewer nodes would be enough with some room, so that the number does
//! not swing with the noise.
//!
//! A shard works on one thread. When the busiest shard alone needs more than that, nodes are no
//! remedy, and the reason says so.

use std::collections::BTreeMap;
use std::time::Duration;

use meterr_operators::ids::ShardId;
use meterr_operators::time::Time;
use serde::{Deserialize, Serialize};

use super::ClusterView;
pub use super::load::{LoadHistory, Prediction, ShardLoad};

/// Busy time after which older measurements count half.
const BUSY_HALF: Duration = Duration::from_secs(600);
/// Busy time below which nothing is said.
const BUSY_MIN: Duration = Duration::from_millis(500);

/// Events a worker thread gets done in a second of work, measured over the last minutes of work.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct ServiceRate {
    events: f64,
    busy: f64,
}

impl ServiceRate {
    /// Counts events and the time a worker thread worked on them, commits included, waiting excluded.
    pub fn add(&mut self, events: u64, busy: Duration) {
        let keep = 0.5_f64.powf(busy.as_secs_f64() / BUSY_HALF.as_secs_f64());
        self.events = self.events * keep + events as f64;
        self.busy = self.busy * keep + busy.as_secs_f64();
    }

    /// What was measured elsewhere: events, and seconds of work.
    pub fn of(events: f64, busy_seconds: f64) -> ServiceRate {
        ServiceRate { events: events.max(0.0), busy: busy_seconds.max(0.0) }
    }

    /// Events it rests on.
    pub fn events(&self) -> f64 {
        self.events
    }

    /// Seconds of work it rests on.
    pub fn busy_seconds(&self) -> f64 {
        self.busy
    }

    /// Takes in what another thread or node measured.
    pub fn merge(&mut self, other: &ServiceRate) {
        self.events += other.events;
        self.busy += other.busy;
    }

    /// Events per busy second; nothing before half a second of work.
    pub fn events_per_second(&self) -> Option<f64> {
        let enough = self.busy >= BUSY_MIN.as_secs_f64() && self.events > 0.0;
        enough.then(|| self.events / self.busy).filter(|rate| rate.is_finite())
    }
}

/// What a recommendation aims at.
#[derive(Debug, Clone, PartialEq)]
pub struct Aims {
    /// Share of a node's worker threads that predicted load may fill, above 0 and up to 1.
    pub utilisation: f64,
    /// Lag is to be worked off within this.
    pub lag_within: Duration,
    /// Hours looked ahead: at least what it takes to add a node.
    pub ahead_hours: usize,
    /// Quantile of the prediction that must find room.
    pub quantile: f64,
    /// Fewer nodes only when the load fills them to this share of what they may be filled to.
    pub shrink_below: f64,
    /// Fewest nodes, for other reasons than load: with 2, one may die without a pause to restore.
    pub nodes_min: u32,
}

impl Default for Aims {
    fn default() -> Aims {
        Aims {
            utilisation: 0.7,
            lag_within: Duration::from_secs(15 * 60),
            ahead_hours: 4,
            quantile: 0.95,
            shrink_below: 0.85,
            nodes_min: 1,
        }
    }
}

/// The cluster as it is.
#[derive(Debug, Clone, Copy)]
pub struct Now<'a> {
    /// Log time.
    pub log_time: Time,
    /// Load of all shards together.
    pub load: &'a LoadHistory,
    /// Events/s of the shard that has most, as [`LoadHistory::rate`] gives it.
    pub busiest: Option<(ShardId, f64)>,
    /// Measured over all nodes.
    pub service: ServiceRate,
    /// Worker threads of a node; where nodes differ, of the smallest.
    pub threads: u32,
    /// Events no commit includes yet, over all shards.
    pub lag_events: u64,
    /// Nodes that own shards or could.
    pub nodes: u32,
    /// Shards of the deployment: more nodes have nothing to do.
    pub shards: u32,
}

/// What `cluster status` shows:
/// `{"recommended_nodes":3,"reason":"…","predicted_events_per_second":…,"service_rate_events_per_second":…}`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Recommendation {
    /// Nodes.
    pub recommended_nodes: u32,
    /// Why, as a sentence.
    pub reason: String,
    /// Events per second expected in the busiest of the next hours, at the upper quantile; null without
    /// an hour of history.
    pub predicted_events_per_second: Option<f64>,
    /// Events per second of work of one worker thread; null while nothing was measured.
    pub service_rate_events_per_second: Option<f64>,
}

/// How many nodes the load calls for.
pub fn recommend(now: &Now<'_>, aims: &Aims) -> Recommendation {
    let predicted = now.load.predict(now.log_time, aims.ahead_hours, aims.quantile);
    let rate = now.load.rate(now.log_time);
    let service = now.service.events_per_second();
    // What comes in now is known to come in.
    let upper = predicted.map(|predicted| predicted.upper.max(rate));
    let most = now.shards.max(1);
    let least = aims.nodes_min.clamp(1, most);
    let answer = |nodes: u32, reason: String| Recommendation {
        recommended_nodes: nodes,
        reason,
        predicted_events_per_second: upper,
        service_rate_events_per_second: service,
    };
    let (Some(upper), Some(service)) = (upper, service) else {
        let nodes = now.nodes.clamp(least, most);
        let what = if service.is_none() { "work measured" } else { "load counted" };
        return answer(nodes, format!("not enough {what} yet to say more than what is there"));
    };
    let utilisation = aims.utilisation.clamp(0.05, 1.0);
    let node = service * f64::from(now.threads.max(1));
    let by_load = upper / (node * utilisation);
    let lag_rate = now.lag_events as f64 / aims.lag_within.as_secs_f64().max(1.0);
    let by_lag = if now.lag_events == 0 { 0.0 } else { (rate + lag_rate) / node };
    let needed = |share: f64| bounded(by_load / share).max(bounded(by_lag));
    let mut nodes = needed(1.0);
    let kept = nodes < now.nodes && needed(aims.shrink_below.clamp(0.5, 1.0)) >= now.nodes;
    if kept {
        nodes = now.nodes;
    }
    let percent = utilisation * 100.0;
    let mut reason = if by_lag > by_load {
        format!(
            "{} events behind: {} nodes of {} events/s work them off within {} min while {} events/s \
             come in",
            now.lag_events,
            nodes,
            shown(node),
            aims.lag_within.as_secs().div_ceil(60),
            shown(rate)
        )
    } else {
        format!(
            "up to {} events/s expected within {} h; a node does {} events/s ({} threads) and is to be \
             filled to {percent:.0} %",
            shown(upper),
            aims.ahead_hours,
            shown(node),
            now.threads.max(1)
        )
    };
    if kept {
        reason.push_str("; one fewer would leave too little room");
    }
    if nodes < least {
        nodes = least;
        reason.push_str(&format!("; {least} are wanted in any case"));
    }
    if nodes > most {
        nodes = most;
        reason.push_str(&format!("; more nodes than the {most} shards have nothing to do"));
    }
    if let Some((shard, busiest)) = now.busiest
        && busiest > service
    {
        reason.push_str(&format!(
            "; shard {shard} alone takes in {} events/s, more than a thread can do, which no number of \
             nodes changes",
            shown(busiest)
        ));
    }
    answer(nodes, reason)
}

/// Rounded up to whole nodes; a hair above a whole number is that number.
fn bounded(nodes: f64) -> u32 {
    (nodes - 1e-9).ceil().clamp(0.0, 1e6) as u32
}

/// A rate for people.
fn shown(rate: f64) -> String {
    if rate >= 100.0 { format!("{rate:.0}") } else { format!("{rate:.1}") }
}

/// Lag of each node that owns shards, over these; `None` stands for shards nobody owns. `lag` has that
/// of each shard, by number.
pub fn lag_by_node(view: &ClusterView, lag: &[u64]) -> BTreeMap<Option<String>, u64> {
    let mut nodes = BTreeMap::new();
    for (shard, lag) in view.shards.iter().zip(lag) {
        let sum: &mut u64 = nodes.entry(shard.owner.clone()).or_default();
        *sum = sum.saturating_add(*lag);
    }
    nodes
}

#[cfg(test)]
#[path = "forecast_tests.rs"]
mod tests;
