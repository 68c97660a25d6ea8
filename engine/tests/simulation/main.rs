//! Ownership, commit and recovery in a world of its own: the real decisions about membership, placement,
//! leases and moves, the real life of a shard, the real plan of recovery and the real reading of a refused
//! commit, against logs, a registry, clocks and a network that fail from a seed. No threads, no files, no
//! time but the world's, so a seed gives the same history every time.
//!
//! What goes wrong: processes are killed, stopped and started; clocks differ; messages are late, doubled,
//! lost and overtake each other; acknowledgements are lost; reads of the registry are old; registry and
//! logs are away, for everybody or for one; checkpoints lag, are lost or come from another node; worker
//! threads die; operators move and drain; nodes leave.
//!
//! What must hold of every commit as it is appended: see `log.rs`. At the end every shard has one owner
//! and everything acknowledged is committed, once. When only registry and logs are away nobody is taken
//! to be dead.
//!
//! METERR_SIMULATION_SEEDS=N runs N histories instead of the default; METERR_SIMULATION_SEED=N tells one
//! history step by step:
//! `METERR_SIMULATION_SEEDS=1000000 cargo test --release -p meterr-engine --test simulation`

#![allow(clippy::unwrap_used)]

mod log;
mod node;
mod registry;
mod world;

use std::time::Instant;

use world::{Bug, Faults, Figures, run};

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// Histories that are run by default.
fn seeds() -> u64 {
    number("METERR_SIMULATION_SEEDS").unwrap_or(if cfg!(debug_assertions) { 400 } else { 4_000 })
}

/// Runs histories on all cores; the lowest seed that failed, if one did.
fn run_all(seeds: u64, faults: Faults, bug: Bug) -> Result<Vec<Figures>, (u64, String)> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from) as u64;
    let one = |thread: u64| {
        let mut figures = Vec::new();
        for seed in (thread..seeds).step_by(threads as usize) {
            match run(seed, faults, bug, false) {
                Ok(of) => figures.push(of),
                Err(what) => return Err((seed, what)),
            }
        }
        Ok(figures)
    };
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|thread| scope.spawn(move || one(thread))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut all = Vec::new();
    let mut failed: Option<(u64, String)> = None;
    for outcome in outcomes {
        match outcome {
            Ok(figures) => all.extend(figures),
            Err(at) => failed = Some(failed.map_or(at.clone(), |other| other.min(at))),
        }
    }
    failed.map_or(Ok(all), Err)
}

fn told(what: &str, figures: &[Figures], begun: Instant) {
    let sum = |of: fn(&Figures) -> u64| figures.iter().map(of).sum::<u64>();
    let mut mended: Vec<_> = figures.iter().map(|f| (f.mended_after / 1_000, f.seed)).collect();
    mended.sort_unstable();
    println!(
        "{what}: {} histories in {:.1} s, with {} events, {} commits, {} seals, {} refused, {} leases \
         written, {} nodes buried, {} crashes; in order {} ms after the last fault (median; longest {}, seed {})",
        figures.len(),
        begun.elapsed().as_secs_f64(),
        sum(|f| f.events),
        sum(|f| f.commits),
        sum(|f| f.seals),
        sum(|f| f.refused),
        sum(|f| f.leases),
        sum(|f| f.buried),
        sum(|f| f.crashes),
        mended[mended.len() / 2].0,
        mended[mended.len() - 1].0,
        mended[mended.len() - 1].1,
    );
}

#[test]
fn every_history_counts_every_event_once() {
    if let Some(seed) = number("METERR_SIMULATION_SEED") {
        run(seed, Faults::All, Bug::None, true).unwrap();
        return;
    }
    let begun = Instant::now();
    let figures = run_all(seeds(), Faults::All, Bug::None);
    let figures = figures.unwrap_or_else(|(seed, what)| panic!("seed {seed}: {what}"));
    told("all faults", &figures, begun);
    let some = |of: fn(&Figures) -> u64| figures.iter().any(|figures| of(figures) > 0);
    assert!(some(|f| f.refused) && some(|f| f.buried) && some(|f| f.crashes));
}

#[test]
fn an_outage_of_the_registry_is_nobodys_death() {
    if let Some(seed) = number("METERR_SIMULATION_SEED") {
        run(seed, Faults::Outages, Bug::None, true).unwrap();
        return;
    }
    let begun = Instant::now();
    let figures = run_all(seeds() / 2, Faults::Outages, Bug::None);
    let figures = figures.unwrap_or_else(|(seed, what)| panic!("seed {seed}: {what}"));
    told("outages", &figures, begun);
    let buried: Vec<u64> = figures.iter().filter(|f| f.buried > 0).map(|f| f.seed).collect();
    assert!(buried.is_empty(), "nodes are buried in seeds {buried:?}");
}

/// Each planted bug is found within this many histories.
const FOUND_WITHIN: u64 = 300;

#[test]
fn an_unfenced_commit_is_found() {
    let (seed, what) = run_all(FOUND_WITHIN, Faults::All, Bug::UnfencedCommit).unwrap_err();
    println!("seed {seed}: {what}");
}

#[test]
fn output_that_is_published_again_after_a_restart_is_found() {
    let (seed, what) = run_all(FOUND_WITHIN, Faults::All, Bug::RepeatedOutput).unwrap_err();
    println!("seed {seed}: {what}");
    assert!(what.contains("published twice"), "{what}");
}

#[test]
fn an_acknowledgement_of_an_earlier_opening_is_found() {
    let found = run_all(10 * FOUND_WITHIN, Faults::All, Bug::ForeignAcknowledgement);
    let (seed, what) = found.unwrap_err();
    println!("seed {seed}: {what}");
}

#[test]
fn deaths_judged_without_own_beats_are_found() {
    let figures = run_all(FOUND_WITHIN, Faults::Outages, Bug::UnheardDeaths).unwrap();
    let stormed = figures.iter().filter(|figures| figures.buried > 0).count();
    println!("nodes are buried in {stormed} of {FOUND_WITHIN} histories");
    assert!(stormed > 0);
}
