//! Each bench's check on a small workload, so that benches measure what they say and keep working.
#![allow(clippy::unwrap_used)]

#[path = "../benches/support/mod.rs"]
mod support;

use std::path::Path;

use meterr_operators::rollup::ViewSet;
use support::floor::{Done, Floor};
use support::http::Client;
use support::ingest::{Sending, check, check_views, load, reprice};
use support::latency::measure;
use support::nats::{Batch, Stage, Sync, batches, org_of};
use support::operators::{Operators, THREE};
use support::server::Server;
use support::spend1::{
    REPRICED_DAY, REPRICED_FROM, day_text, first_lines, halved, lines, repetition, small, steps,
};
use support::{nats_latency, nats_queries};

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
fn the_price_changes_on_the_day_named() {
    assert_eq!(REPRICED_FROM, format!("{}T00:00:00Z", day_text(REPRICED_DAY)));
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

fn stage(sync: Sync) -> Stage {
    let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
    Stage::new(Path::new(env!("CARGO_BIN_EXE_meterr")), parent, sync).unwrap()
}

#[test]
fn the_first_lines_are_whole() {
    let text = b"a\nb\nc";
    let first = |n| first_lines(text, n);
    assert_eq!(
        [first(0), first(1), first(2), first(3), first(9)],
        [&b""[..], b"a\n", b"a\nb\n", text, text]
    );
}

#[test]
fn messages_hold_every_line_once_in_its_shard_and_in_order() {
    let text = small(1_000);
    let messages = batches(&text, 4, 30).unwrap();
    let by_shard = |shard: u16| -> Vec<u8> {
        let of = messages.iter().filter(|message| message.shard.0 == shard);
        of.flat_map(|message| message.lines.to_vec()).collect()
    };
    for shard in 0..4 {
        let wanted: Vec<u8> = text
            .split_inclusive(|byte| *byte == b'\n')
            .filter(|line| meterr_operators::ids::shard_of(org_of(line).unwrap(), 4).0 == shard)
            .flatten()
            .copied()
            .collect();
        assert!(!wanted.is_empty());
        assert_eq!(by_shard(shard), wanted);
    }
    let counted = |message: &Batch| message.events == lines(&message.lines) && message.events <= 30;
    assert!(messages.iter().all(counted));
}

#[test]
fn what_waits_on_nats_and_what_comes_beside_is_counted_and_answered() {
    let text = small(4_000);
    let before = first_lines(&text, 2_000);
    let after = first_lines(&text[before.len()..], 1_000);
    let rest = &text[before.len() + after.len()..];
    let stage = stage(Sync::Default);
    let messages = |text| batches(text, support::nats::SHARDS, 50).unwrap();
    let there = stage.publish(&messages(before), 8).unwrap();
    let server = stage.serve().unwrap();
    server.wait_for(&mut Client::connect(server.address).unwrap(), &there).unwrap();
    let (by_hand, _) = floor(before, None, 100);
    check_views(&server, &by_hand.views()).unwrap();

    let (by_hand, _) = floor(&text[..before.len() + after.len()], None, 100);
    let orgs: Vec<String> = (0..20).map(|org| format!("org_{org:04}")).collect();
    assert!(nats_queries::check(&stage, &orgs, &by_hand.views().org_month).is_err());
    let question = r#"{"window":"month"}"#;
    let asked =
        nats_queries::offered(&stage, &orgs, question, 500.0, &messages(after), 5_000.0).unwrap();
    assert_eq!((asked.answer.len(), asked.late.len(), asked.refused), (100, 100, 0));
    assert!(asked.answer.iter().all(|ms| ms.is_finite()));
    server.wait_for(&mut Client::connect(server.address).unwrap(), &asked.positions).unwrap();
    nats_queries::check(&stage, &orgs, &by_hand.views().org_month).unwrap();

    let (by_hand, _) = floor(&text, None, 100);
    let there = stage.publish(&messages(rest), 8).unwrap();
    server.wait_for(&mut Client::connect(server.address).unwrap(), &there).unwrap();
    check_views(&server, &by_hand.views()).unwrap();
    server.stop().unwrap();
}

#[test]
fn every_event_of_a_followed_org_is_seen_on_nats() {
    let text = small(3_000);
    let messages = batches(&text, support::nats::SHARDS, 50).unwrap();
    let stage = stage(Sync::Always);
    let server = stage.serve().unwrap();
    let latencies = nats_latency::idle(&stage, 5).unwrap();
    assert_eq!((latencies.view.len(), latencies.acknowledged.len()), (5, 5));
    let offered = nats_latency::offered(&stage, &messages, 10_000.0, 2).unwrap();
    let (by_hand, _) = floor(&text, None, 100);
    let mut events = std::collections::BTreeMap::new();
    for (key, figures) in by_hand.views().org_month {
        let org = key.split('|').next().unwrap().to_owned();
        *events.entry(org).or_insert(0) += figures.events;
    }
    let followed: i64 = events.values().step_by(2).sum();
    assert_eq!(offered.view.len() as i64, followed);
    assert_eq!(offered.late.len(), messages.len());
    assert!(offered.changes > 10);
    server.stop().unwrap();
}
