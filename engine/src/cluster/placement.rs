//! Which node a shard should be on. Pure, and the same on every node and machine: whole numbers only,
//! and no dependence on the order in which nodes are named.
//!
//! Weighted rendezvous hashing: every pair of shard and node has a score, `weight / -log2(hash)`, and a
//! shard goes to the node with the highest one; so each node gets its share by weight, and a node that
//! comes or goes touches only what it gets or had. Plain rendezvous leaves loads as uneven as dice (16
//! shards on 3 nodes: 9, 4, 3). So a node takes at most [`cap`] shards: pairs are accepted in the order
//! of their scores as long as there is room, which is the one stable matching of shards and nodes, and
//! displaces little when a node comes or goes.
//!
//! A pin is obeyed while its node is there, even above the cap; what else the node gets shrinks.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use meterr_operators::ids::ShardId;
use meterr_operators::rng::Rng;

/// A node that may own shards. Those that may not (replicas, draining, gone) are left out by the caller.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Candidate {
    /// Its name.
    pub node: String,
    /// Its capacity in thousandths, at least 1.
    pub weight: u32,
}

/// Capacity as a weight: thousandths, within 1 and a million. What is no number counts as 1,000.
pub fn weight(capacity: f64) -> u32 {
    if capacity.is_nan() {
        return 1_000;
    }
    (capacity * 1_000.0).round().clamp(1.0, 1_000_000.0) as u32
}

/// Most shards a node takes: a quarter above its share by weight, rounded up.
pub fn cap(shards: u16, weight: u32, weights: u64) -> u16 {
    let share = 5 * u64::from(shards) * u64::from(weight);
    share.div_ceil(4 * weights.max(1)).min(u64::from(shards)) as u16
}

/// Where shards should be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Placement {
    nodes: Vec<Candidate>,
    seeds: Vec<u64>,
    wanted: Vec<Option<usize>>,
}

impl Placement {
    /// Places shards `0..shards` on nodes. Without nodes nothing is placed. Pins to nodes that are not
    /// among them count for nothing.
    pub fn new(shards: u16, nodes: &[Candidate], pins: &BTreeMap<ShardId, String>) -> Placement {
        let mut nodes = nodes.to_vec();
        nodes.sort();
        nodes.dedup_by(|a, b| a.node == b.node);
        let seeds: Vec<u64> = nodes.iter().map(|node| seed(&node.node)).collect();
        let weights: u64 = nodes.iter().map(|node| u64::from(node.weight)).sum();
        let mut room: Vec<u16> =
            nodes.iter().map(|node| cap(shards, node.weight, weights)).collect();
        let mut wanted = vec![None; usize::from(shards)];
        for (shard, name) in pins {
            let node = nodes.iter().position(|node| node.node == *name);
            if let (Some(node), Some(place)) = (node, wanted.get_mut(usize::from(shard.0))) {
                *place = Some(node);
                room[node] = room[node].saturating_sub(1);
            }
        }
        let mut pairs = Vec::with_capacity(wanted.len() * nodes.len());
        for shard in (0..shards).filter(|shard| wanted[usize::from(*shard)].is_none()) {
            for node in 0..nodes.len() {
                let score = score(seeds[node], ShardId(shard), nodes[node].weight);
                pairs.push((Reverse(score), node, shard));
            }
        }
        pairs.sort_unstable();
        for (_, node, shard) in pairs {
            let place = &mut wanted[usize::from(shard)];
            if place.is_none() && room[node] > 0 {
                *place = Some(node);
                room[node] -= 1;
            }
        }
        Placement { nodes, seeds, wanted }
    }

    /// The node a shard should be on.
    pub fn wanted(&self, shard: ShardId) -> Option<&str> {
        let node = (*self.wanted.get(usize::from(shard.0))?)?;
        Some(&self.nodes[node].node)
    }

    /// All nodes in the order in which a shard would go to them, the wanted one first.
    pub fn order(&self, shard: ShardId) -> Vec<&str> {
        let wanted = self.wanted.get(usize::from(shard.0)).copied().flatten();
        let mut order: Vec<usize> = (0..self.nodes.len()).collect();
        order.sort_by_key(|&node| {
            let score = score(self.seeds[node], shard, self.nodes[node].weight);
            (Some(node) != wanted, Reverse(score), node)
        });
        order.into_iter().map(|node| self.nodes[node].node.as_str()).collect()
    }

    /// The nodes shards are placed on, by name.
    pub fn nodes(&self) -> &[Candidate] {
        &self.nodes
    }

    /// Whether shards are placed on a node.
    pub fn has(&self, node: &str) -> bool {
        self.nodes.binary_search_by(|candidate| candidate.node.as_str().cmp(node)).is_ok()
    }
}

fn seed(node: &str) -> u64 {
    let hash = blake3::hash(node.as_bytes());
    let first: [u8; 8] = hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes");
    u64::from_le_bytes(first)
}

fn score(seed: u64, shard: ShardId, weight: u32) -> u128 {
    let hash = Rng::stream(seed, u64::from(shard.0)).bits();
    (u128::from(weight) << 64) / u128::from(minus_log2(hash))
}

/// `-log2(hash / 2⁶⁴)` in 2⁻³² parts, from 1 up. Bit by bit: squaring a number doubles its logarithm.
/// In whole numbers because a logarithm in floating point may differ in its last bit from machine to
/// machine, and two nodes that disagree about a shard would take it from each other for ever.
fn minus_log2(hash: u64) -> u64 {
    let hash = hash.max(1);
    let zeros = hash.leading_zeros();
    let mut mantissa = hash << zeros;
    let mut fraction = 0;
    for _ in 0..32 {
        let square = (u128::from(mantissa) * u128::from(mantissa)) >> 63;
        let doubled = square >> 64 != 0;
        fraction = fraction << 1 | u64::from(doubled);
        mantissa = (if doubled { square >> 1 } else { square }) as u64;
    }
    ((u64::from(zeros) + 1) << 32) - fraction
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(n: usize, salt: u32) -> Vec<Candidate> {
        (0..n).map(|i| Candidate { node: format!("node-{salt}-{i}"), weight: 1_000 }).collect()
    }

    fn loads(placement: &Placement) -> Vec<u16> {
        let mut loads = vec![0; placement.nodes.len()];
        placement.wanted.iter().flatten().for_each(|node| loads[*node] += 1);
        loads
    }

    fn moved(a: &Placement, b: &Placement) -> usize {
        (0..a.wanted.len() as u16)
            .filter(|s| a.wanted(ShardId(*s)) != b.wanted(ShardId(*s)))
            .count()
    }

    #[test]
    fn the_logarithm_is_one() {
        for hash in [1, 2, 3, 1 << 20, 0x1234_5678_9abc_def0, 1 << 63, u64::MAX] {
            let exact = 64.0 - (hash as f64).log2();
            let ours = minus_log2(hash) as f64 / (1u64 << 32) as f64;
            assert!((ours - exact).abs() < 1e-8, "{hash}: {ours} {exact}");
        }
    }

    #[test]
    fn capacity_becomes_a_weight() {
        let weights = [1.0, 0.25, 0.0, -3.0, 1e12, f64::NAN].map(weight);
        assert_eq!(weights, [1_000, 250, 1, 1, 1_000_000, 1_000]);
    }

    #[test]
    fn sixteen_shards_on_three_nodes_are_at_most_seven_each() {
        for salt in 0..500 {
            let loads = loads(&Placement::new(16, &names(3, salt), &BTreeMap::new()));
            assert!(loads.iter().all(|load| (2..=7).contains(load)), "{loads:?}");
        }
    }

    /// What a node more or less moves, beside the fair share of that node: on average at most a fifth
    /// more, and never more than twice its cap.
    #[test]
    fn a_node_that_comes_or_goes_moves_its_share() {
        for (shards, n) in [(16, 2), (16, 3), (16, 5), (64, 4), (256, 3), (256, 10)] {
            let (mut sum, rounds) = (0, 200);
            for salt in 0..rounds {
                let all = names(n + 1, salt);
                let with = Placement::new(shards, &all, &BTreeMap::new());
                let gone = salt as usize % (n + 1);
                let mut rest = all.clone();
                rest.remove(gone);
                let moves = moved(&with, &Placement::new(shards, &rest, &BTreeMap::new()));
                let most = 2 * usize::from(cap(shards, 1, n as u64 + 1));
                assert!(moves <= most, "{shards} shards, {n} nodes and one: {moves} moved");
                sum += moves;
            }
            let mean = sum as f64 / f64::from(rounds);
            let share = f64::from(shards) / (n as f64 + 1.0);
            assert!(mean <= 1.2 * share, "{shards} shards, {n} nodes and one: {mean} on average");
        }
    }

    #[test]
    fn loads_go_by_weight() {
        let (mut heavy, mut all) = (0, 0);
        for salt in 0..200 {
            let mut nodes = names(4, salt);
            nodes[2].weight = 3_000;
            let placement = Placement::new(64, &nodes, &BTreeMap::new());
            heavy += u32::from(loads(&placement)[2]);
            all += 64;
        }
        let share = f64::from(heavy) / f64::from(all);
        assert!((0.46..0.54).contains(&share), "a node of half the weight has {share}");
    }

    proptest! {
        #[test]
        fn every_shard_is_placed_in_any_order_and_within_caps(
            shards in 1u16..=256,
            weights in prop::collection::vec(1u32..5_000, 1..12),
            turn in 0usize..12,
            pinned in prop::collection::btree_map(0u16..256, 0usize..14, 0..20),
        ) {
            let mut nodes: Vec<Candidate> = weights.iter().enumerate()
                .map(|(i, weight)| Candidate { node: format!("n{i}"), weight: *weight })
                .collect();
            let pins: BTreeMap<ShardId, String> =
                pinned.iter().map(|(shard, node)| (ShardId(*shard), format!("n{node}"))).collect();
            let placement = Placement::new(shards, &nodes, &pins);
            let turn = turn % nodes.len();
            nodes.rotate_left(turn);
            prop_assert_eq!(&placement, &Placement::new(shards, &nodes, &pins));
            let total: u64 = weights.iter().map(|weight| u64::from(*weight)).sum();
            let mut loads = BTreeMap::new();
            for shard in (0..shards).map(ShardId) {
                let wanted = placement.wanted(shard);
                prop_assert!(wanted.is_some());
                prop_assert_eq!(placement.order(shard)[0], wanted.unwrap());
                prop_assert_eq!(placement.order(shard).len(), nodes.len());
                if let Some(pin) = pins.get(&shard).filter(|pin| placement.has(pin)) {
                    prop_assert_eq!(wanted, Some(pin.as_str()));
                } else {
                    *loads.entry(wanted.unwrap().to_owned()).or_insert(0) += 1;
                }
            }
            for node in &nodes {
                let load = loads.get(&node.node).copied().unwrap_or(0);
                prop_assert!(load <= cap(shards, node.weight, total));
            }
        }
    }
}
