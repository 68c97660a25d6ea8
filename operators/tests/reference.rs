//! The oracle against numbers computed by hand.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use meterr_operators::control::{ControlChange, Dimension, WindowSize};
use meterr_operators::event::{Event, EventFields, Meter, Meters, Reason, Rejection, Tier};
use meterr_operators::ids::{ShardId, shard_of};
use meterr_operators::money::Atto;
use meterr_operators::reference::{Reference, Row};
use meterr_operators::time::Time;

const SHARD: ShardId = ShardId(0);

fn time(text: &str) -> Time {
    Time::parse(text).unwrap()
}

fn usd(text: &str) -> Atto {
    Atto::parse(text).unwrap().0
}

fn meters(counts: &[(Meter, u32)]) -> Meters {
    let mut meters = Meters::default();
    for (meter, count) in counts {
        meters[*meter as usize] = *count;
    }
    meters
}

/// An event of acme with one output token of gpt-4o-mini.
fn event(id: &'static str, at: &str) -> EventFields<'static> {
    EventFields {
        id: id.into(),
        time: time(at),
        org: "acme".into(),
        user: "u-1".into(),
        provider: "openai".into(),
        model: "gpt-4o-mini".into(),
        meters: meters(&[(Meter::Output, 1)]),
        ..EventFields::default()
    }
}

fn void(id: &'static str, at: &str, revision: u32) -> EventFields<'static> {
    EventFields { void: true, revision, ..event(id, at) }
}

/// One shard, fed message by message.
struct World {
    reference: Reference,
    position: u64,
}

impl World {
    fn new() -> World {
        World { reference: Reference::new(1), position: 0 }
    }

    fn send(&mut self, at: &str, subject: &str, events: &[EventFields<'static>]) {
        self.position += 1;
        let lines: Vec<_> = events.iter().cloned().map(Event::new).collect();
        assert!(lines.iter().all(Result::is_ok), "{lines:?}");
        self.reference.message(SHARD, self.position, time(at), subject, &lines);
    }

    fn acme(&mut self, at: &str, events: &[EventFields<'static>]) {
        self.send(at, "usage.0.acme", events);
    }

    fn control(&mut self, change: &str) {
        self.reference.control(&ControlChange::parse(change.as_bytes()).unwrap());
    }

    fn prices(&mut self, entries: &str) {
        self.control(&format!(r#"{{"type":"prices","prices":[{entries}]}}"#));
    }

    fn total(&self) -> Row {
        let rows = self.reference.spend("acme", None, WindowSize::All, &[]);
        assert!(rows.len() <= 1, "{rows:?}");
        rows.into_values().next().unwrap_or_default()
    }

    /// Cost of all of acme's usage.
    fn cost(&self) -> Option<Atto> {
        self.total().cost()
    }

    fn windows(&self, window: WindowSize) -> Vec<(String, i64)> {
        let rows = self.reference.spend("acme", None, window, &[]);
        rows.into_iter().map(|((window, _), row)| (window, row.events)).collect()
    }

    fn letters(&self) -> &[(u64, u32, Reason)] {
        self.reference.dead_letters(SHARD)
    }
}

const MINI: &str = r#"{"provider":"openai","model":"gpt-4o-mini","input":"0.15","cached_input":"0.075","output":"0.60"}"#;

#[test]
fn the_cost_of_one_event() {
    let mut world = World::new();
    world.prices(MINI);
    let counts = [(Meter::Input, 254), (Meter::CacheRead, 120), (Meter::Output, 44)];
    let usage = EventFields { meters: meters(&counts), ..event("a", "2026-01-02T03:04:05Z") };
    world.acme("2026-01-02T03:04:06Z", &[usage]);
    // 254 × 0.15 + 120 × 0.075 + 44 × 0.60 = 38.1 + 9 + 26.4 = 73.5 USD per million.
    assert_eq!(world.cost(), Some(usd("0.0000735")));
    let row = world.total();
    assert_eq!((row.events, row.unpriced_events), (1, 0));
    assert_eq!(row.meters, [254, 120, 0, 0, 44, 0, 0, 0, 0, 0]);
}

#[test]
fn meters_without_a_price_of_their_own_cost_as_what_they_are_a_kind_of() {
    let kinds = [
        (Meter::Input, "3"),
        (Meter::CacheRead, "3"),
        (Meter::CacheWrite, "3"),
        (Meter::CacheWrite1h, "3"),
        (Meter::Output, "15"),
        (Meter::Reasoning, "15"),
        (Meter::AudioInput, "3"),
        (Meter::AudioOutput, "15"),
    ];
    for (meter, per_million) in kinds {
        let mut world = World::new();
        world.prices(r#"{"provider":"openai","model":"gpt-4o-mini","input":"3","output":"15"}"#);
        let usage = EventFields {
            meters: meters(&[(meter, 1_000_000)]),
            ..event("a", "2026-01-02T03:00:00Z")
        };
        world.acme("2026-01-02T03:00:00Z", std::slice::from_ref(&usage));
        assert_eq!(world.cost(), Some(usd(per_million)), "{meter:?}");
    }
    // One-hour cache writes fall back to ordinary cache writes before input.
    let mut world = World::new();
    world.prices(r#"{"provider":"openai","model":"gpt-4o-mini","input":"3","cache_write":"4"}"#);
    let usage = EventFields {
        meters: meters(&[(Meter::CacheWrite1h, 1_000_000)]),
        ..event("a", "2026-01-02T03:00:00Z")
    };
    world.acme("2026-01-02T03:00:00Z", &[usage]);
    assert_eq!(world.cost(), Some(usd("4")));
}

#[test]
fn duplicates_count_once_and_conflicts_are_dead_letters() {
    let mut world = World::new();
    let first = event("a", "2026-01-02T03:00:00Z");
    let other = EventFields { user: "u-2".into(), ..first.clone() };
    let elsewhere = EventFields { org: "globex".into(), ..other.clone() };
    world.acme("2026-01-02T03:00:00Z", &[first.clone(), first.clone()]);
    world.send("2026-01-02T03:00:01Z", "usage.0.@batch", &[first, other, elsewhere]);
    assert_eq!(world.windows(WindowSize::All), [(String::new(), 1)]);
    assert_eq!(world.letters(), [(2, 2, Reason::ConflictingDuplicate)]);
    assert_eq!(world.reference.orgs(), ["acme", "globex"]);
}

#[test]
fn the_highest_revision_wins_in_whatever_order() {
    let at = "2026-01-02T03:00:00Z";
    let version = |revision, count| EventFields {
        revision,
        meters: meters(&[(Meter::Output, count)]),
        ..event("a", at)
    };
    let versions = [version(0, 10), version(2, 20), version(7, 70)];
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mut world = World::new();
        for (second, index) in order.iter().enumerate() {
            world.acme(
                &format!("2026-01-02T03:00:0{second}Z"),
                &[versions[*index as usize].clone()],
            );
        }
        let row = world.total();
        assert_eq!((row.events, row.meters[Meter::Output as usize]), (1, 70), "{order:?}");
        assert!(world.letters().is_empty());
    }
}

#[test]
fn a_revision_moves_usage_to_another_user_and_day() {
    let mut world = World::new();
    world.acme("2026-01-02T03:00:00Z", &[event("a", "2026-01-02T03:00:00Z")]);
    let moved = EventFields {
        revision: 1,
        user: "u-2".into(),
        original_time: Some(time("2026-01-02T03:00:00Z")),
        ..event("a", "2026-01-01T23:00:00Z")
    };
    world.acme("2026-01-02T04:00:00Z", &[moved]);
    let rows = world.reference.spend("acme", None, WindowSize::Day, &[Dimension::User]);
    let keys: Vec<_> = rows.into_keys().collect();
    assert_eq!(keys, [("2026-01-01".to_owned(), vec!["u-2".to_owned()])]);
    assert!(world.reference.spend("acme", Some("u-1"), WindowSize::Day, &[]).is_empty());
}

#[test]
fn voids_take_back_before_and_after_and_a_higher_revision_reinstates() {
    let at = "2026-01-02T03:00:00Z";
    let mut world = World::new();
    world.acme(at, &[event("a", at), void("a", at, 1)]);
    world.acme(at, &[void("b", at, 3), event("b", at), void("b", at, 3)]);
    assert!(world.windows(WindowSize::All).is_empty());
    assert!(world.letters().is_empty());
    world.acme(at, &[EventFields { revision: 4, ..event("b", at) }, void("b", at, 2)]);
    assert_eq!(world.total().events, 1);
    // A void of the same revision with another time is other content.
    world.acme(at, &[void("a", "2026-01-02T02:00:00Z", 1)]);
    assert_eq!(world.letters(), [(4, 1, Reason::ConflictingDuplicate)]);
}

#[test]
fn an_hour_ahead_is_taken_and_a_microsecond_more_is_not() {
    let mut world = World::new();
    let late_original = EventFields {
        revision: 1,
        original_time: Some(time("2026-01-02T04:00:00.000001Z")),
        ..event("c", "2026-01-02T03:00:00Z")
    };
    let exact = event("a", "2026-01-02T04:00:00Z");
    let beyond = event("b", "2026-01-02T04:00:00.000001Z");
    world.acme("2026-01-02T03:00:00Z", &[exact, beyond, late_original]);
    assert_eq!(world.letters(), [(1, 2, Reason::TooFarAhead), (1, 3, Reason::TooFarAhead)]);
    // Log time is the running maximum: a record with an earlier time does not set it back.
    world.acme("2026-01-02T02:00:00Z", &[event("d", "2026-01-02T04:00:00Z")]);
    assert_eq!(world.total().events, 2);
}

#[test]
fn ids_are_forgotten_a_horizon_after_their_bucket_and_copies_refused_from_then_on() {
    let mut world = World::new();
    world.control(r#"{"type":"horizon","seconds":3600}"#);
    let first = event("a", "2026-01-02T10:20:00Z");
    world.acme("2026-01-02T10:20:00Z", std::slice::from_ref(&first));
    // The bucket of 10 h ends at 11 h and expires at 12 h.
    world.acme("2026-01-02T11:59:59.999999Z", std::slice::from_ref(&first));
    assert_eq!((world.reference.ids_remembered(SHARD), world.letters().len()), (1, 0));
    let limit = event("b", "2026-01-02T12:00:00Z");
    let just_above = event("c", "2026-01-02T12:00:00.000001Z");
    world.acme("2026-01-02T12:00:00Z", &[first.clone(), limit, just_above]);
    assert_eq!(world.letters(), [(3, 1, Reason::TooLate), (3, 2, Reason::TooLate)]);
    assert_eq!(world.reference.ids_remembered(SHARD), 1);
    // What was accepted stays counted.
    assert_eq!(world.total().events, 2);

    // A revision goes by its original time.
    let moved = |original_time| EventFields {
        revision: 1,
        original_time: Some(time(original_time)),
        ..event("d", "2026-01-02T13:00:00Z")
    };
    world.acme("2026-01-02T12:01:00Z", &[moved("2026-01-02T12:00:00Z")]);
    assert_eq!(world.letters()[2..], [(4, 1, Reason::TooLate)]);
    // A backfill is taken, and its weaker promise shows: the copy counts again.
    world.send("2026-01-02T12:02:00Z", "usage.0.@backfill", &[first.clone(), first]);
    assert_eq!(world.total().events, 3);
    assert_eq!(world.letters().len(), 3);
}

#[test]
fn the_bucket_is_that_of_the_first_arrival() {
    let mut world = World::new();
    world.control(r#"{"type":"horizon","seconds":3600}"#);
    world.acme("2026-01-02T10:20:00Z", &[event("a", "2026-01-02T10:20:00Z")]);
    let newer = EventFields { revision: 1, ..event("a", "2026-01-02T10:20:00Z") };
    world.acme("2026-01-02T11:30:00Z", &[newer]);
    world.acme("2026-01-02T12:00:00Z", &[]);
    assert_eq!(world.reference.ids_remembered(SHARD), 0);
}

#[test]
fn a_longer_horizon_brings_nothing_back() {
    let mut world = World::new();
    world.control(r#"{"type":"horizon","seconds":3600}"#);
    world.acme("2026-01-02T10:20:00Z", &[event("a", "2026-01-02T10:20:00Z")]);
    world.acme("2026-01-02T12:00:00Z", &[]);
    world.control(r#"{"type":"horizon","seconds":864000}"#);
    world.acme("2026-01-02T12:00:01Z", &[event("a", "2026-01-02T10:20:00Z")]);
    assert_eq!(world.letters(), [(3, 1, Reason::TooLate)]);
}

#[test]
fn a_young_deployment_takes_history_of_any_age() {
    let mut world = World::new();
    world.acme("2026-01-02T00:00:00Z", &[event("a", "1999-12-31T00:00:00Z")]);
    // 34 days on nothing has expired yet; an hour after 35 days, it has.
    world.acme("2026-02-05T00:00:00Z", &[event("b", "1999-12-31T00:00:00Z")]);
    world.acme("2026-02-06T01:00:00Z", &[event("c", "1999-12-31T00:00:00Z")]);
    assert_eq!(world.letters(), [(3, 1, Reason::TooLate)]);
    assert_eq!(world.windows(WindowSize::Month), [("1999-12".to_owned(), 2)]);
}

#[test]
fn events_belong_to_their_subject_and_shard() {
    let shards = 16;
    let acme = shard_of("acme", shards);
    assert_ne!(acme, shard_of("globex", shards));
    let mut reference = Reference::new(shards);
    let own = Event::new(event("a", "2026-01-02T03:00:00Z"));
    let other =
        Event::new(EventFields { org: "globex".into(), ..event("a", "2026-01-02T03:00:00Z") });
    let bad = Err(Rejection::new(Reason::Malformed, "not a JSON object"));
    let lines = [bad, other, own];
    let subject = format!("usage.{acme}.acme");
    reference.message(acme, 1, time("2026-01-02T03:00:00Z"), &subject, &lines);
    let letters = [(1, 1, Reason::Malformed), (1, 2, Reason::WrongShard)];
    assert_eq!(reference.dead_letters(acme), letters);
    assert_eq!(reference.events_counted(), 1);

    let mut world = World::new();
    let other = EventFields { org: "globex".into(), ..event("a", "2026-01-02T03:00:00Z") };
    world.acme("2026-01-02T03:00:00Z", std::slice::from_ref(&other));
    world.send("2026-01-02T03:00:00Z", "usage.0.@batch", &[other]);
    assert_eq!(world.letters(), [(1, 1, Reason::OrgMismatch)]);
}

#[test]
fn unknown_prices_are_shown_as_such_and_fill_in_by_themselves() {
    let mut world = World::new();
    let at = "2026-01-02T03:00:00Z";
    let image = EventFields {
        meters: meters(&[(Meter::Output, 1_000_000), (Meter::Images, 2)]),
        ..event("b", "2026-01-02T04:20:00Z")
    };
    world.acme("2026-01-02T04:20:00Z", &[event("a", at), image]);
    assert_eq!((world.cost(), world.total().unpriced_events), (None, 2));
    let unpriced = world.reference.unpriced("acme");
    let row = &unpriced[&("openai".to_owned(), "gpt-4o-mini".to_owned(), "standard", 0)];
    assert_eq!((row.events, row.first, row.last), (2, time(at), time("2026-01-02T04:15:00Z")));
    assert_eq!(row.lacking, [Meter::Output as usize, Meter::Images as usize]);

    world.prices(MINI);
    // 1,000,001 × 0.60 per million; the images still lack a price.
    assert_eq!((world.cost(), world.total().unpriced_events), (Some(usd("0.6000006")), 1));
    world.prices(r#"{"provider":"openai","model":"gpt-4o-mini","output":"0.60","image":"0.04"}"#);
    assert_eq!((world.cost(), world.total().unpriced_events), (Some(usd("0.6800006")), 0));
    assert!(world.reference.unpriced("acme").is_empty());
    // A withdrawal takes it away again.
    world.prices(r#"{"provider":"openai","model":"gpt-4o-mini"}"#);
    assert_eq!((world.cost(), world.total().unpriced_events), (None, 2));
}

#[test]
fn free_is_not_unknown() {
    let mut world = World::new();
    world.prices(r#"{"provider":"openai","model":"gpt-4o-mini","output":"0"}"#);
    world.acme("2026-01-02T03:00:00Z", &[event("a", "2026-01-02T03:00:00Z")]);
    assert_eq!((world.cost(), world.total().unpriced_events), (Some(Atto::ZERO), 0));
}

#[test]
fn a_reported_cost_is_taken_as_it_is() {
    let mut world = World::new();
    world.prices(MINI);
    let reported = EventFields {
        explicit: Some([usd("0.1"), Atto::ZERO, usd("0.02"), usd("0.003")]),
        ..event("a", "2026-01-02T03:00:00Z")
    };
    let unknown = EventFields {
        id: "b".into(),
        provider: "".into(),
        model: "".into(),
        explicit: Some([Atto::ZERO; 4]),
        ..reported.clone()
    };
    world.acme("2026-01-02T03:00:00Z", &[reported, unknown]);
    let row = world.total();
    assert_eq!(row.explicit, [usd("0.1"), Atto::ZERO, usd("0.02"), usd("0.003")]);
    assert_eq!((row.book_cost, row.unpriced_events), (Atto::ZERO, 0));
    assert_eq!(row.cost(), Some(usd("0.123")));
}

#[test]
fn prices_hold_from_the_beginning_of_their_slot_until_the_next_of_the_same_key() {
    let entry = |from: &str, output: u32| {
        format!(r#"{{"provider":"openai","model":"gpt-4o-mini",{from}"output":"{output}00000"}}"#)
    };
    let mut world = World::new();
    world.prices(&entry(r#""effective_from":"2026-01-15T00:00:00Z","#, 2));
    let times = ["2026-01-14T23:59:59.999999Z", "2026-01-15T00:00:00Z", "2026-02-01T00:00:00Z"];
    let events = [event("a", times[0]), event("b", times[1]), event("c", times[2])];
    world.acme("2026-02-01T00:00:00Z", &events);
    let costs = |world: &World| {
        let rows = world.reference.spend("acme", None, WindowSize::Day, &[]);
        rows.into_values().map(|row| row.cost()).collect::<Vec<_>>()
    };
    let dimes = |n: i64| Some(usd("0.1") * n);
    assert_eq!(costs(&world), [None, dimes(2), dimes(2)]);
    // Retroactively: before it, from the beginning; after it, from February on.
    world.prices(&entry("", 1));
    world.prices(&entry(r#""effective_from":"2026-02-01T00:00:00Z","#, 3));
    assert_eq!(costs(&world), [dimes(1), dimes(2), dimes(3)]);
    // The last knowledge of the same beginning wins.
    world.prices(&entry(r#""effective_from":"2026-01-15T00:00:00Z","#, 4));
    assert_eq!(costs(&world), [dimes(1), dimes(4), dimes(3)]);
}

#[test]
fn the_entry_of_org_then_tier_then_largest_bound_decides() {
    let cost_with = |entries: &[(&str, u32)], input: u32, tier: Tier| {
        let mut world = World::new();
        for (extra, price) in entries {
            world.prices(&format!(
                r#"{{"provider":"openai","model":"gpt-4o-mini",{extra}"input":"{price}"}}"#
            ));
        }
        let usage = EventFields {
            meters: meters(&[(Meter::Input, input)]),
            tier,
            ..event("a", "2026-01-02T03:00:00Z")
        };
        world.acme("2026-01-02T03:00:00Z", &[usage]);
        // Back to the price per million tokens.
        world.cost().map(|cost| cost.get() * 1_000_000 / i128::from(input) / Atto::usd(1).get())
    };
    let (standard, batch) = (Tier::Standard, Tier::Batch);
    let long = (r#""min_input_tokens":200000,"#, 2);
    let batch_entry = (r#""tier":"batch","#, 3);
    let batch_longest = (r#""tier":"batch","min_input_tokens":272000,"#, 4);
    let own = (r#""org":"acme","#, 5);
    let own_priority = (r#""org":"acme","tier":"priority","#, 6);
    let own_later = (r#""org":"acme","effective_from":"2026-01-02T03:15:00Z","#, 7);
    let others = (r#""org":"globex","#, 8);
    let own_long = (r#""org":"acme","min_input_tokens":200000,"#, 9);
    let all = ("", 1);
    assert_eq!(cost_with(&[all, long], 200_000, standard), Some(1));
    assert_eq!(cost_with(&[all, long], 200_001, standard), Some(2));
    assert_eq!(cost_with(&[long], 200_000, standard), None);
    assert_eq!(cost_with(&[all, long], 200_001, batch), Some(2));
    assert_eq!(cost_with(&[all, long, batch_entry], 200_001, batch), Some(3));
    assert_eq!(cost_with(&[all, long, batch_longest], 200_001, batch), Some(2));
    assert_eq!(cost_with(&[all, long, batch_longest], 272_001, batch), Some(4));
    assert_eq!(cost_with(&[all, long, batch_entry, own], 200_001, batch), Some(5));
    assert_eq!(cost_with(&[all, own_priority], 1_000, batch), Some(1));
    assert_eq!(cost_with(&[all, own_later, others], 1_000, standard), Some(1));
    assert_eq!(cost_with(&[own, own_long, all], 200_001, standard), Some(9));
}

#[test]
fn a_withdrawal_gives_way_to_what_would_decide_without_it() {
    let mut world = World::new();
    let entry = |rest: &str| format!(r#"{{"provider":"openai","model":"gpt-4o-mini"{rest}}}"#);
    world.prices(&entry(r#","output":"100000""#));
    world.prices(&entry(r#","output":"200000","org":"acme""#));
    let times = ["2026-01-02T03:14:59Z", "2026-01-02T03:15:00Z"];
    world.acme("2026-01-02T03:15:00Z", &[event("a", times[0]), event("b", times[1])]);
    assert_eq!(world.cost(), Some(usd("0.4")));
    world.prices(&entry(r#","org":"acme","effective_from":"2026-01-02T03:15:00Z""#));
    assert_eq!(world.cost(), Some(usd("0.3")));
    world.prices(&entry(r#","org":"acme""#));
    assert_eq!(world.cost(), Some(usd("0.2")));
}

#[test]
fn days_and_months_go_by_the_orgs_zone_and_hours_by_utc() {
    let mut world = World::new();
    let times = ["2026-01-31T18:29:59.999999Z", "2026-01-31T18:30:00Z", "2026-01-31T23:59:00Z"];
    let events = [event("a", times[0]), event("b", times[1]), event("c", times[2])];
    world.acme("2026-02-01T00:00:00Z", &events);
    let row = |window: &str, events| (window.to_owned(), events);
    assert_eq!(world.windows(WindowSize::Day), [row("2026-01-31", 3)]);
    let hours = [row("2026-01-31T18:00:00Z", 2), row("2026-01-31T23:00:00Z", 1)];
    assert_eq!(world.windows(WindowSize::Hour), hours);
    world.control(r#"{"type":"time_zone","org":"acme","time_zone":"Asia/Kolkata"}"#);
    assert_eq!(world.windows(WindowSize::Day), [row("2026-01-31", 1), row("2026-02-01", 2)]);
    assert_eq!(world.windows(WindowSize::Month), [row("2026-01", 1), row("2026-02", 2)]);
    assert_eq!(world.windows(WindowSize::Hour), hours);
    assert_eq!(world.windows(WindowSize::All), [row("", 3)]);
    world.control(r#"{"type":"time_zone","org":"acme","time_zone":"UTC"}"#);
    assert_eq!(world.windows(WindowSize::Month), [row("2026-01", 3)]);
}

#[test]
fn days_across_changes_of_the_offset() {
    for (zone, at, day) in [
        // New York goes from -05:00 to -04:00 on 8 March 2026, back on 1 November.
        ("America/New_York", "2026-03-08T04:59:59Z", "2026-03-07"),
        ("America/New_York", "2026-03-08T05:00:00Z", "2026-03-08"),
        ("America/New_York", "2026-03-09T03:59:59Z", "2026-03-08"),
        ("America/New_York", "2026-03-09T04:00:00Z", "2026-03-09"),
        ("America/New_York", "2026-11-02T04:59:59Z", "2026-11-01"),
        // Lord Howe goes from +11:00 to +10:30 on 5 April 2026.
        ("Australia/Lord_Howe", "2026-04-04T13:00:00Z", "2026-04-05"),
        ("Australia/Lord_Howe", "2026-04-05T13:29:59Z", "2026-04-05"),
        ("Australia/Lord_Howe", "2026-04-05T13:30:00Z", "2026-04-06"),
        // Apia left out 30 December 2011.
        ("Pacific/Apia", "2011-12-30T09:59:59Z", "2011-12-29"),
        ("Pacific/Apia", "2011-12-30T10:00:00Z", "2011-12-31"),
        // The window is that of the beginning of the slot; Liberia was 44:30 behind until 1972.
        ("Africa/Monrovia", "1971-06-01T00:44:29Z", "1971-05-31"),
        ("Africa/Monrovia", "1971-06-01T00:44:31Z", "1971-05-31"),
        ("Africa/Monrovia", "1971-06-01T00:45:00Z", "1971-06-01"),
    ] {
        let mut world = World::new();
        let change = format!(r#"{{"type":"time_zone","org":"acme","time_zone":"{zone}"}}"#);
        world.control(&change);
        world.acme("2026-12-01T00:00:00Z", &[event("a", at)]);
        assert_eq!(world.windows(WindowSize::Day), [(day.to_owned(), 1)], "{zone} {at}");
    }
}

#[test]
fn declared_views_cover_the_past_and_go_when_removed() {
    let mut world = World::new();
    let tagged = |id, team: &'static str| EventFields {
        tags: vec![("team".into(), team.into())],
        ..event(id, "2026-01-02T03:00:00Z")
    };
    let untagged = event("c", "2026-01-02T03:00:00Z");
    world.acme("2026-01-02T03:00:00Z", &[tagged("a", "ml"), tagged("b", "ml"), untagged]);
    assert!(world.reference.view("v").is_none());
    world.control(r#"{"type":"view","name":"v","by":["tag:team","user"],"window":"month"}"#);
    let view = world.reference.view("v").unwrap();
    let events: BTreeMap<_, _> = view["acme"]
        .iter()
        .map(|((window, key), row)| ((window, key.join("/")), row.events))
        .collect();
    let january = "2026-01".to_owned();
    let expected = [((&january, "/u-1".to_owned()), 1), ((&january, "ml/u-1".to_owned()), 2)];
    assert_eq!(events, BTreeMap::from(expected));
    world.control(r#"{"type":"view_removed","name":"v"}"#);
    assert!(world.reference.view("v").is_none());
}
