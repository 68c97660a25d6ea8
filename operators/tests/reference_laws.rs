//! Laws the oracle keeps on random histories, and proof that the histories reach the rare cases.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use meterr_operators::control::{ControlChange, Dimension, WindowSize};
use meterr_operators::event::{ALL_REASONS, Event, EventFields, Reason, context_class};
use meterr_operators::histories::{HistoryOptions, MODELS, Step, history};
use meterr_operators::ids::{ShardId, shard_of};
use meterr_operators::money::Atto;
use meterr_operators::price_book::{PriceBook, RateKey};
use meterr_operators::reference::{Reference, Row, Rows};
use meterr_operators::rng::Rng;
use meterr_operators::time::Time;

const SEEDS: std::ops::Range<u64> = 0..24;
const WINDOWS: [WindowSize; 4] =
    [WindowSize::Hour, WindowSize::Day, WindowSize::Month, WindowSize::All];

fn options(seed: u64) -> HistoryOptions {
    HistoryOptions { shards: 1 + (seed % 3) as u16, ..HistoryOptions::default() }
}

fn steps(seed: u64) -> Vec<Step> {
    history(&mut Rng::new(seed), &options(seed))
}

fn feed(reference: &mut Reference, step: &Step) {
    match step {
        Step::Message(m) => {
            reference.message(m.shard, m.position, m.time, &m.subject, &m.decoded());
        }
        Step::Control(change) => reference.control(change),
        Step::Boundary => {}
    }
}

fn end_of(seed: u64) -> Reference {
    let mut reference = Reference::new(options(seed).shards);
    steps(seed).iter().for_each(|step| feed(&mut reference, step));
    reference
}

/// Everything the oracle shows.
fn all_views(reference: &Reference) -> BTreeMap<(String, WindowSize, usize), Rows> {
    let by = [vec![], vec![Dimension::User], vec![Dimension::Model, Dimension::Feature]];
    let mut views = BTreeMap::new();
    for org in reference.orgs() {
        for window in WINDOWS {
            for (at, by) in by.iter().enumerate() {
                let rows = reference.spend(&org, None, window, by);
                views.insert((org.clone(), window, at), rows);
            }
        }
    }
    views
}

fn by_window(rows: Rows) -> BTreeMap<String, Row> {
    let mut sums: BTreeMap<String, Row> = BTreeMap::new();
    for ((window, _), row) in rows {
        *sums.entry(window).or_default() += row;
    }
    sums
}

fn total(rows: Rows) -> Row {
    rows.into_values().fold(Row::default(), |mut sum, row| {
        sum += row;
        sum
    })
}

#[test]
fn sum_over_users_is_org_is_sum_over_models_is_sum_over_features() {
    for seed in SEEDS {
        let mut reference = Reference::new(options(seed).shards);
        let steps = steps(seed);
        let mut left = steps.iter().filter(|step| matches!(step, Step::Boundary)).count();
        for step in steps {
            feed(&mut reference, &step);
            if !matches!(step, Step::Boundary) {
                continue;
            }
            // The last one and every fifth before it: the oracle is slow.
            left -= 1;
            if left % 5 != 0 {
                continue;
            }
            for org in reference.orgs() {
                for window in WINDOWS {
                    let spend = |by: &[Dimension]| reference.spend(&org, None, window, by);
                    let whole = by_window(spend(&[]));
                    for dimension in [
                        Dimension::User,
                        Dimension::Model,
                        Dimension::Provider,
                        Dimension::Feature,
                        Dimension::Tag("team".to_owned()),
                    ] {
                        let parts = by_window(spend(std::slice::from_ref(&dimension)));
                        assert_eq!(parts, whole, "seed {seed}, {org} by {dimension}");
                    }
                    let all = total(reference.spend(&org, None, WindowSize::All, &[]));
                    assert_eq!(total(spend(&[])), all, "seed {seed}, {org} {window:?}");
                }
            }
        }
    }
}

#[test]
fn one_user_is_the_users_row() {
    for seed in SEEDS {
        let reference = end_of(seed);
        for org in reference.orgs() {
            let by_user = reference.spend(&org, None, WindowSize::Month, &[Dimension::User]);
            for ((window, user), row) in by_user {
                let own = reference.spend(&org, Some(&user[0]), WindowSize::Month, &[]);
                assert_eq!(own[&(window, vec![])], row, "seed {seed}");
            }
        }
    }
}

#[test]
fn sending_every_message_twice_changes_nothing() {
    for seed in SEEDS {
        let mut twice = Reference::new(options(seed).shards);
        for step in steps(seed) {
            feed(&mut twice, &step);
            if matches!(step, Step::Message(_)) {
                feed(&mut twice, &step);
            }
        }
        assert_eq!(all_views(&twice), all_views(&end_of(seed)), "seed {seed}");
    }
}

/// Contents of a history under ids that meet once each.
fn contents(seed: u64) -> Vec<EventFields<'static>> {
    let reference = end_of(seed);
    let mut contents: Vec<EventFields<'static>> =
        reference.counted().map(|event| (**event).clone()).collect();
    for (n, fields) in contents.iter_mut().enumerate() {
        fields.id = format!("once-{n}").into();
    }
    contents
}

/// Sends events in this order to a deployment of one shard that knows the prices of a history.
fn send(seed: u64, events: &[EventFields<'static>]) -> Reference {
    let mut reference = Reference::new(1);
    for step in steps(seed) {
        if let Step::Control(ControlChange::Prices(_)) = step {
            feed(&mut reference, &step);
        }
    }
    let now = Time::parse("2100-01-01T00:00:00Z").unwrap();
    let lines: Vec<_> = events.iter().cloned().map(Event::new).collect();
    reference.message(ShardId(0), 1, now, "usage.0.@batch", &lines);
    assert_eq!(reference.dead_letters(ShardId(0)), []);
    reference
}

#[test]
fn event_and_void_are_nothing_in_either_order() {
    for seed in SEEDS {
        let events = contents(seed);
        assert!(!events.is_empty());
        let voids = events.iter().map(|event| EventFields {
            revision: event.revision + 1,
            void: true,
            ..event.clone()
        });
        let after: Vec<_> = events.iter().cloned().chain(voids.clone()).collect();
        let before: Vec<_> = voids.chain(events.iter().cloned()).collect();
        assert_eq!(send(seed, &events).events_counted(), events.len());
        assert!(all_views(&send(seed, &after)).is_empty());
        assert!(all_views(&send(seed, &before)).is_empty());
    }
}

#[test]
fn the_order_of_arrival_is_irrelevant() {
    for seed in SEEDS {
        let mut rng = Rng::new(seed);
        let mut versions = contents(seed);
        for revision in 1..3 {
            for n in 0..versions.len() / 3 {
                let content = rng.pick(&versions).clone();
                let time = content.original_time.unwrap_or(content.time);
                let id = format!("once-{n}").into();
                let known = versions.iter().any(|v| v.id == id && v.org == content.org);
                let known = known && !versions.iter().any(|v| v.id == id && v.revision == revision);
                if known {
                    let original_time = Some(time);
                    versions.push(EventFields { id, revision, original_time, ..content });
                }
            }
        }
        let expected = all_views(&send(seed, &versions));
        for _ in 0..3 {
            for at in (1..versions.len()).rev() {
                versions.swap(at, rng.below(at as u64 + 1) as usize);
            }
            assert_eq!(all_views(&send(seed, &versions)), expected, "seed {seed}");
        }
    }
}

#[test]
fn the_price_book_prices_as_the_oracle_does() {
    for seed in SEEDS {
        let mut reference = Reference::new(options(seed).shards);
        let mut book = PriceBook::new();
        for (position, step) in (1..).zip(steps(seed)) {
            feed(&mut reference, &step);
            if let Step::Control(ControlChange::Prices(change)) = &step {
                book.apply(&change.prices, position).unwrap();
            }
        }
        let mut sums: BTreeMap<String, (Atto, i64)> = BTreeMap::new();
        for event in reference.counted().filter(|event| !event.reported()) {
            let key = RateKey {
                org: &event.org,
                provider: &event.provider,
                model: &event.model,
                tier: event.tier,
                context: context_class(event.input_tokens()),
            };
            let timeline = book.timeline(&key);
            let slot = event.time.slot();
            let (_, prices) = *timeline.iter().rev().find(|(from, _)| *from <= slot).unwrap();
            let (cost, lacking) = prices.unwrap_or_default().cost(&event.meters);
            let sum = sums.entry(event.org.to_string()).or_default();
            sum.0 += cost;
            sum.1 += i64::from(lacking != 0);
        }
        for org in reference.orgs() {
            let row = total(reference.spend(&org, None, WindowSize::All, &[]));
            let by_book = sums.get(&org).copied().unwrap_or_default();
            assert_eq!((row.book_cost, row.unpriced_events), by_book, "seed {seed}, {org}");
        }
    }
}

#[test]
fn histories_are_the_same_for_the_same_seed_and_reach_the_rare_cases() {
    assert_eq!(format!("{:?}", steps(7)), format!("{:?}", steps(7)));
    let mut seen: BTreeSet<&str> = BTreeSet::new();
    let mut reasons: BTreeSet<Reason> = BTreeSet::new();
    for seed in SEEDS {
        let shards = options(seed).shards;
        let mut reference = Reference::new(shards);
        for step in steps(seed) {
            feed(&mut reference, &step);
            let Step::Message(message) = step else { continue };
            let shard = message.shard;
            if reference.log_time(shard) != Some(message.time) {
                seen.insert("a clock that falls");
            }
            let arrived = reference.counted().any(|event| shard_of(&event.org, shards) == shard);
            if arrived && reference.ids_remembered(shard) == 0 {
                seen.insert("everything forgotten");
            }
        }
        for shard in 0..shards {
            let letters = reference.dead_letters(ShardId(shard));
            reasons.extend(letters.iter().map(|(_, _, reason)| *reason));
        }
        let mut ids: BTreeMap<(&str, &str), usize> = BTreeMap::new();
        for event in reference.counted() {
            *ids.entry((&event.org, &event.id)).or_default() += 1;
            if event.revision > 0 && event.original_time.is_some() {
                seen.insert("usage that moved in time");
            }
        }
        if ids.values().any(|n| *n > 1) {
            seen.insert("a backfill that counts again");
        }
        for org in reference.orgs() {
            let row = total(reference.spend(&org, None, WindowSize::All, &[]));
            let one_priced = row.unpriced_events > 0 && row.book_cost > Atto::ZERO;
            if one_priced {
                seen.insert("priced and unpriced usage");
            }
            if row.explicit.iter().all(|cost| *cost > Atto::ZERO) {
                seen.insert("costs of every category");
            }
            let models = reference.spend(&org, None, WindowSize::All, &[Dimension::Model]);
            let never = MODELS.last().unwrap().1;
            let row = models.get(&(String::new(), vec![never.to_owned()]));
            if row.is_some_and(|row| row.cost().is_none()) {
                seen.insert("a row without a price");
            }
        }
        if !reference.views().is_empty() {
            seen.insert("a declared view");
        }
    }
    let expected_reasons: BTreeSet<Reason> =
        ALL_REASONS.into_iter().filter(|reason| *reason != Reason::TooLarge).collect();
    assert_eq!(reasons, expected_reasons);
    let expected = [
        "a backfill that counts again",
        "a clock that falls",
        "a declared view",
        "a row without a price",
        "costs of every category",
        "everything forgotten",
        "priced and unpriced usage",
        "usage that moved in time",
    ];
    assert_eq!(seen, BTreeSet::from(expected));
}
