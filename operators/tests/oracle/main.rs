//! The promise: at every boundary, every view of every shard equals the oracle's recomputation
//! from all accepted events, whatever came and however the shards are spread over threads.
//!
//! Histories are random, from seeds. A failure prints the seed and the smallest part of the
//! history that still fails, in the form that [`regressions`] holds.
//!
//! | module | |
//! |---|---|
//! | `show` | a shard's rows and the oracle's rows in one form |
//! | `run` | histories through shards and through the oracle |
//! | `laws` | replay, voids, order, prices there and back |
//! | `restore` | restored = uninterrupted |
//! | `ids` | the memory of ids against a model, with many ids |
//! | `regressions` | histories that once failed |
//! | `shrink`, `text` | small failing histories, and their written form |
//!
//! `METERR_ORACLE_SEEDS=500 cargo test -p meterr-operators --release --test oracle` runs every
//! property for seeds 0 to 499 instead of its few; `METERR_ORACLE_SEEDS=1000..2000` for those.
#![allow(clippy::unwrap_used)]

mod ids;
mod laws;
mod regressions;
mod restore;
mod run;
mod show;
mod shrink;
mod text;

use std::ops::Range;

use meterr_operators::control::ControlChange;
use meterr_operators::histories::{HistoryOptions, Step, history};
use meterr_operators::rng::Rng;

/// Seeds to try: the given ones, or those of the environment.
pub fn seeds(default: Range<u64>) -> Range<u64> {
    let Ok(text) = std::env::var("METERR_ORACLE_SEEDS") else { return default };
    let number = |text: &str| text.parse::<u64>().expect("METERR_ORACLE_SEEDS is 500 or 500..600");
    match text.split_once("..") {
        Some((from, to)) => number(from)..number(to),
        None => 0..number(&text),
    }
}

/// The history of a seed: 1 to 4 shards.
pub fn options(seed: u64) -> HistoryOptions {
    HistoryOptions {
        shards: 1 + (seed % 4) as u16,
        orgs: 3 + (seed % 6) as usize,
        ..HistoryOptions::default()
    }
}

/// Requires a law of every history, and shows the smallest one that breaks it. The law gets the
/// seed, the number of shards and the history.
pub fn require(
    seeds: Range<u64>,
    options: impl Fn(u64) -> HistoryOptions,
    law: impl Fn(u64, u16, &[Step]) -> Result<(), String>,
) {
    for seed in seeds {
        let options = options(seed);
        let steps = history(&mut Rng::new(seed), &options);
        let failure = |steps: &[Step]| shrink::failure(steps, |s| law(seed, options.shards, s));
        let Some(first) = failure(&steps) else { continue };
        let small = shrink::shrink(&steps, |steps| failure(steps).is_some());
        let why = failure(&small).unwrap_or_default();
        panic!(
            "seed {seed}, {} shards: {first}\n\nsmallest part that fails: {why}\n\n{}",
            options.shards,
            text::write(&small)
        );
    }
}

/// Compares every shard at every boundary with the oracle.
pub fn equals_oracle(steps: &[Step], shards: u16, threads: u16) -> Result<(), String> {
    let epochs = run::epochs(steps);
    let expected = run::oracle(&epochs, shards);
    let outcomes = run::run(&epochs, shards, threads)?;
    for (shard, outcomes) in &outcomes {
        for (at, outcome) in outcomes.iter().enumerate() {
            if let Some(difference) = outcome.shown.differences(&expected[at][shard]) {
                let last = epochs[..=at].iter().map(|e| e.messages.len()).sum::<usize>();
                return Err(format!("shard {shard}, after {last} messages: {difference}"));
            }
        }
    }
    Ok(())
}

#[test]
fn every_view_equals_the_oracle() {
    require(seeds(0..30), options, |_, shards, steps| equals_oracle(steps, shards, 1));
}

/// Epochs of a thousand and more events: rows, ids and updates fill several blocks and batches.
#[test]
fn large_epochs_equal_the_oracle_and_survive_restores() {
    let large = |seed| HistoryOptions { steps: 150, lines_max: 60, orgs: 8, ..options(seed) };
    require(seeds(150..152), large, |seed, shards, steps| {
        // Boundaries around a change of the horizon must stay.
        let horizon = |at: usize| {
            let step = steps.get(at);
            matches!(step, Some(Step::Control(ControlChange::Horizon(_))))
        };
        let kept =
            |at: usize| at.is_multiple_of(50) || horizon(at + 1) || horizon(at.wrapping_sub(1));
        let kept = |at: usize, step: &Step| !matches!(step, Step::Boundary) || kept(at);
        let few = steps.iter().enumerate().filter(|(at, step)| kept(*at, step));
        let few: Vec<Step> = few.map(|(_, step)| step.clone()).collect();
        equals_oracle(&few, shards, 2)?;
        let mut events = restore::Events::default();
        restore::restored_equals_uninterrupted(seed, shards, &few, false, &mut events)
    });
}

#[test]
fn shards_are_the_same_on_any_number_of_threads() {
    let four = |seed| HistoryOptions { shards: 4, orgs: 8, ..options(seed) };
    require(seeds(100..106), four, |_, shards, steps| {
        let epochs = run::epochs(steps);
        let one = run::run(&epochs, shards, 1)?;
        for threads in [2, 4] {
            let more = run::run(&epochs, shards, threads)?;
            for (shard, outcomes) in &one {
                for (is, expected) in more[shard].iter().zip(outcomes) {
                    if let Some(difference) = is.differences(expected) {
                        return Err(format!("{threads} threads, shard {shard}: {difference}"));
                    }
                }
            }
        }
        equals_oracle(steps, shards, 4)
    });
}
