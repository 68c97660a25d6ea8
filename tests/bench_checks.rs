//! Each bench's check on a small workload, so that benches measure what they say and keep working.
#![allow(clippy::unwrap_used)]

#[path = "../benches/support/mod.rs"]
mod support;

use std::path::Path;

use meterr_operators::rollup::ViewSet;
use support::floor::{Done, Floor};
use support::ingest::{Sending, check, load, reprice};
use support::latency::measure;
use support::operators::{Operators, THREE};
use support::server::Server;
use support::spend1::{halved, lines, repetition, small, steps};

/// Day of the price change since 1970.
const REPRICED_DAY: u32 = 20_468;

fn floor(text: &[u8], halved_from: Option<u32>, step: usize) -> (Floor, Done) {
    let (mut floor, mut done) = (Floor::new(halved_from), Done::default());
    for step in steps(text, step) {
        floor.step(step, &mut done).unwrap();
    }
    (floor, done)
}

#[test]
fn rollup_shows_what_the_program_by_hand_shows() {
    let text = small(3_000);
    let (by_hand, wanted) = floor(&text, None, 100);
    assert!(wanted.changed > 3_000);
    for set in [ViewSet::of(&THREE), ViewSet::DEFAULT] {
        let (mut ours, mut done) = (Operators::new(set).unwrap(), Done::default());
        for step in steps(&text, 100) {
            ours.step(step, &mut done).unwrap();
        }
        ours.views().check(&by_hand.views()).unwrap();
        ours.check_sums().unwrap();
        if set != ViewSet::DEFAULT {
            assert_eq!(done, wanted, "the same rows change to the same values in every step");
        }
        ours.set_prices(vec![halved()]).unwrap();
        let (after, _) = floor(&text, Some(REPRICED_DAY), 100);
        assert!(ours.views() != by_hand.views());
        ours.views().check(&after.views()).unwrap();
    }
}

#[test]
fn a_wrong_row_fails_the_check() {
    let text = small(500);
    let (by_hand, _) = floor(&text, None, 100);
    let mut wrong = by_hand.views();
    wrong.org_month.values_mut().next().unwrap().cost += 1;
    assert!(by_hand.views().check(&wrong).is_err());
    let mut missing = by_hand.views();
    let key = missing.user_month.keys().next().unwrap().clone();
    missing.user_month.remove(&key);
    assert!(by_hand.views().check(&missing).is_err());
    assert!(missing.check(&by_hand.views()).is_err());
}

#[test]
fn a_repetition_is_other_events_of_other_days() {
    let text = small(300);
    let (mut both, mut done) = (Floor::new(None), Done::default());
    both.step(&text, &mut done).unwrap();
    let events = |floor: &Floor| floor.views().org_month.values().map(|f| f.events).sum::<i64>();
    let once = events(&both);
    let again = repetition(&text, 1).unwrap();
    assert_eq!(lines(&again), lines(&text));
    both.step(&again, &mut done).unwrap();
    assert_eq!(events(&both), 2 * once);
    assert!(both.views().org_month.keys().any(|key| key.ends_with("2026-04")));
}

#[test]
fn the_binary_takes_events_and_prices_and_shows_each_change() {
    let text = small(3_000);
    let (by_hand, _) = floor(&text, None, 100);
    let (after, _) = floor(&text, Some(REPRICED_DAY), 100);
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let binary = Path::new(env!("CARGO_BIN_EXE_meterr"));
    let server = Server::start(binary, directory.path()).unwrap();
    let how = Sending { connections: 2, bytes: 50_000 };
    let loaded = load(&server, directory.path(), &text, how).unwrap();
    assert_eq!(loaded.lines, lines(&text));
    assert!(loaded.disk as usize > text.len());
    check(&server, &by_hand.views().org_month).unwrap();
    reprice(&server).unwrap();
    check(&server, &after.views().org_month).unwrap();
    assert!(check(&server, &by_hand.views().org_month).is_err());
    let latencies = measure(&server, directory.path(), 5).unwrap();
    assert_eq!((latencies.view.len(), latencies.acknowledged.len()), (5, 5));
    server.kill().unwrap();
    let server = Server::start(binary, directory.path()).unwrap();
    let mut orgs = after.views().org_month;
    orgs.retain(|key, _| !key.starts_with("acme"));
    check(&server, &orgs).unwrap();
    server.stop().unwrap();
}
