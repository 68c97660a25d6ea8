//! Histories that once failed, and some that were written to.

use meterr_operators::histories::Step;
use meterr_operators::ids::ShardId;
use meterr_operators::rng::Rng;

use crate::restore::{Events, restored_equals_uninterrupted};
use crate::run::{Hosted, epochs, run_here, timely_worker};
use crate::{equals_oracle, text};

/// Requires a history of one shard to equal the oracle, restored at whichever boundary.
fn holds(history: &str) {
    let steps = text::read(history);
    assert_eq!(equals_oracle(&steps, 1, 1), Ok(()));
    for seed in 0..8 {
        let mut events = Events::default();
        let result = restored_equals_uninterrupted(seed, 1, &steps, false, &mut events);
        assert_eq!(result, Ok(()), "seed {seed}");
    }
}

/// Rows shown in the end: view, window, events and cost.
fn rows(history: &str, view: &str) -> Vec<(String, i64, Option<String>)> {
    let outcomes = run_here(&text::read(history), 1).unwrap();
    let rows = &outcomes[&ShardId(0)].last().unwrap().shown.rows;
    let rows = rows.iter().filter(|((name, ..), _)| name == view);
    rows.map(|((_, _, window, _), figures)| {
        (window.clone(), figures.events, figures.cost.map(|cost| cost.to_string()))
    })
    .collect()
}

const PRICES: &str =
    r#"control {"type":"prices","prices":[{"provider":"p","model":"m","input":"2","output":"8"}]}"#;

fn event(id: &str, time: &str, more: &str) -> String {
    format!(
        r#"  {{"id":"{id}","time":"{time}","org":"acme","user":"u","provider":"p","model":"m","input_tokens":1000000{more}}}"#
    )
}

/// The hash of a row's place overflowed for every member but the first, in the first test ever run.
#[test]
fn rows_of_many_members_are_found() {
    let mut history = String::from("usage.0.acme 1 2026-01-02T03:00:00Z\n");
    for n in 0..50 {
        history += &event(&format!("e{n}"), "2026-01-02T03:00:00Z", "")
            .replace("\"u\"", &format!("\"u{n}\""));
        history += "\n";
    }
    holds(&history);
    assert_eq!(rows(&history, "user_day").len(), 50);
}

/// The memory of ids counted a bucket without ids as forgotten, and refused older events.
#[test]
fn a_bucket_without_ids_makes_nothing_too_late() {
    let history = format!(
        "control {{\"type\":\"horizon\",\"seconds\":3600}}
boundary
usage.0.@tick 1 2026-01-01T00:00:00Z
usage.0.@tick 2 2026-01-01T20:00:00Z
usage.0.acme 3 2026-01-02T00:00:00Z
{}
boundary",
        event("old", "2025-06-01T00:00:00Z", "")
    );
    holds(&history);
    assert_eq!(rows(&history, "org_all")[0].1, 1);
}

/// A shard restored without any usage left forgot the zones of its orgs when one was set.
#[test]
fn zones_of_orgs_without_usage_survive_a_restore() {
    let history = format!(
        r#"control {{"type":"time_zone","org":"acme","time_zone":"Asia/Kolkata"}}
usage.0.acme 1 2026-01-01T20:00:00Z
{}
  {{"id":"a","time":"2026-01-01T20:00:00Z","org":"acme","revision":1,"void":true}}
boundary
control {{"type":"time_zone","org":"globex","time_zone":"America/New_York"}}
usage.0.acme 2 2026-01-01T20:00:00Z
{}
boundary"#,
        event("a", "2026-01-01T20:00:00Z", ""),
        event("b", "2026-01-01T20:00:00Z", "")
    );
    holds(&history);
    assert_eq!(rows(&history, "org_day")[0].0, "2026-01-02");

    let epochs = epochs(&text::read(&history));
    let mut worker = timely_worker();
    let mut first = Hosted::open(&mut worker, ShardId(0), 1);
    first.control(&mut worker, &epochs[0].control).unwrap();
    let lines = first.messages(&epochs[0]).unwrap();
    let at = first.close_epoch(&mut worker, 1, lines).unwrap();
    let base = first.shard.take_base();
    let mut restored = Hosted::open(&mut worker, ShardId(0), 1).shard;
    restored.control(&mut worker, 1, &epochs[0].control[0].1).unwrap();
    restored.restore(&mut worker, vec![base]).unwrap();
    first.replace(restored, &at);
    first.control(&mut worker, &epochs[1].control).unwrap();
    let lines = first.messages(&epochs[1]).unwrap();
    let rows = first.close_epoch(&mut worker, 2, lines).unwrap().shown.rows;
    assert!(rows.keys().any(|(view, _, window, _)| view == "org_day" && window == "2026-01-02"));
}

/// What came by the subject of ticks was dropped without a trace.
#[test]
fn usage_by_the_subject_of_ticks_is_not_dropped() {
    let usage = event("a", "2026-01-01T00:00:00Z", "");
    let history = format!("usage.0.@tick 1 2026-01-01T00:00:00Z\n{usage}\n  not json\nboundary");
    holds(&history);
    assert_eq!(rows(&history, "org_all")[0].1, 1);
}

/// West of Greenwich the first hours of 1970 are of a day that has no number.
#[test]
fn the_first_day_holds_what_lies_before_it() {
    let history = format!(
        "control {{\"type\":\"time_zone\",\"org\":\"acme\",\"time_zone\":\"America/New_York\"}}
usage.0.acme 1 2026-01-01T00:00:00Z\n{}\nboundary",
        event("a", "1970-01-01T00:00:00Z", "")
    );
    holds(&history);
    assert_eq!(rows(&history, "org_day")[0].0, "1970-01-01");
}

#[test]
fn a_revision_may_come_before_its_original_in_one_message() {
    let history = format!(
        "{PRICES}\nusage.0.acme 1 2026-01-01T00:00:00Z\n{}\n{}\n{}\nboundary\n\
         usage.0.acme 2 2026-01-01T00:00:00Z\n{}\nboundary",
        event("a", "2026-01-01T00:00:00Z", r#","revision":2,"output_tokens":1000000"#),
        event("a", "2026-01-01T00:00:00Z", ""),
        event("a", "2026-01-01T00:00:00Z", r#","revision":1"#),
        event("a", "2026-01-01T00:00:00Z", r#","revision":3"#),
    );
    holds(&history);
    assert_eq!(rows(&history, "org_all"), [(String::new(), 1, Some("2".to_owned()))]);
}

#[test]
fn a_version_may_be_replaced_in_the_epoch_and_the_message_it_came_in() {
    let at = "2026-01-01T00:00:00Z";
    let history = format!(
        "{PRICES}\nusage.0.acme 1 {at}\n{}\n{}\nusage.0.acme 2 {at}\n{}\nboundary",
        event("a", at, ""),
        event("a", at, r#","revision":1,"user":"w""#).replacen(r#""user":"u","#, "", 1),
        event("a", at, r#","revision":2,"feature":"f""#),
    );
    holds(&history);
    assert_eq!(rows(&history, "user_day"), [("2026-01-01".to_owned(), 1, Some("2".to_owned()))]);
}

#[test]
fn a_void_can_be_reinstated_and_a_row_come_back() {
    let at = "2026-01-01T00:00:00Z";
    let void = |revision: u32| {
        format!(r#"  {{"id":"a","time":"{at}","org":"acme","revision":{revision},"void":true}}"#)
    };
    let history = format!(
        "{PRICES}\nusage.0.acme 1 {at}\n{}\nboundary\nusage.0.acme 2 {at}\n{}\nboundary\n\
         usage.0.acme 3 {at}\n{}\nboundary\nusage.0.acme 4 {at}\n{}\n{}\nboundary",
        event("a", at, ""),
        void(1),
        event("a", at, r#","revision":2"#),
        void(3),
        event("a", at, r#","revision":4"#),
    );
    holds(&history);
    assert_eq!(rows(&history, "org_hour")[0].1, 1);
}

#[test]
fn views_can_be_removed_and_declared_again() {
    let at = "2026-01-01T00:00:00Z";
    let history = format!(
        r#"control {{"type":"view","name":"v","by":["user"],"window":"day"}}
usage.0.acme 1 {at}
{}
boundary
control {{"type":"view_removed","name":"v"}}
control {{"type":"view","name":"v","by":["feature","tag:team"],"window":"hour"}}
control {{"type":"view_removed","name":"never"}}
boundary
control {{"type":"view","name":"v","by":["model"],"window":"month"}}
control {{"type":"time_zone","org":"acme","time_zone":"America/New_York"}}
{PRICES}
usage.0.acme 2 {at}
{}
boundary"#,
        event("a", at, ""),
        event("b", at, ""),
    );
    holds(&history);
    assert_eq!(rows(&history, "declared v"), [("2025-12".to_owned(), 2, Some("4".to_owned()))]);
}

#[test]
fn prices_hold_for_what_is_first_seen_later_and_for_overridden_orgs() {
    let history = format!(
        r#"{PRICES}
control {{"type":"prices","prices":[{{"provider":"p","model":"m","input":"1","org":"acme","effective_from":"2026-01-01T00:15:00Z"}}]}}
usage.0.@batch 1 2026-01-01T01:00:00Z
{}
{}
{}
boundary
control {{"type":"prices","prices":[{{"provider":"p","model":"m","input":"5","org":"acme","effective_from":"2026-01-01T00:15:00Z"}}]}}
boundary
control {{"type":"prices","prices":[{{"provider":"p","model":"m","org":"acme","effective_from":"2026-01-01T00:30:00Z"}}]}}
boundary"#,
        event("a", "2026-01-01T00:14:59.999999Z", ""),
        event("b", "2026-01-01T00:15:00Z", ""),
        event("c", "2026-01-01T00:30:00Z", ""),
    );
    holds(&history);
    // By the book, by the override, and by the book again where the override is withdrawn.
    assert_eq!(rows(&history, "org_all")[0].2.as_deref(), Some("9"));
}

#[test]
fn horizons_may_shrink_and_grow() {
    let history = format!(
        r#"usage.0.acme 1 2026-01-01T00:00:00Z
{a}
boundary
control {{"type":"horizon","seconds":3600}}
boundary
usage.0.acme 2 2026-01-01T01:59:59.999999Z
{a}
usage.0.acme 3 2026-01-01T02:00:00Z
{a}
{b}
boundary
control {{"type":"horizon","seconds":86400}}
boundary
usage.0.acme 4 2026-01-01T12:00:00Z
{a}
{b}
boundary"#,
        a = event("a", "2026-01-01T00:00:00Z", ""),
        b = event("b", "2026-01-01T02:00:00.000001Z", ""),
    );
    holds(&history);
    assert_eq!(rows(&history, "org_all")[0].1, 2);
}

/// A delta may be taken when all that the chain before it holds is forgotten.
#[test]
fn a_delta_may_begin_behind_everything_before_it() {
    let history = format!(
        r#"control {{"type":"horizon","seconds":3600}}
boundary
usage.0.acme 1 2026-01-01T00:00:00Z
{}
boundary
usage.0.acme 2 2026-01-01T01:30:00Z
{}
usage.0.acme 3 2026-01-01T20:00:00Z
{}
boundary
usage.0.acme 4 2026-01-01T20:00:00Z
{}
boundary"#,
        event("a", "2026-01-01T00:00:00Z", ""),
        event("b", "2026-01-01T01:30:00Z", ""),
        event("c", "2026-01-01T20:00:00Z", ""),
        event("c", "2026-01-01T20:00:00Z", r#","revision":1"#),
    );
    holds(&history);
}

#[test]
fn histories_read_as_they_are_written() {
    for seed in 0..20 {
        let steps =
            meterr_operators::histories::history(&mut Rng::new(seed), &crate::options(seed));
        let written = text::write(&steps);
        let read = text::read(&written);
        assert_eq!(text::write(&read), written);
        let events = |steps: &[Step]| -> Vec<_> {
            let messages = steps.iter().filter_map(|step| match step {
                Step::Message(message) => Some(message.decoded()),
                _ => None,
            });
            let events =
                messages.flatten().map(|event| event.map_err(|rejection| rejection.reason));
            events.collect()
        };
        assert_eq!(events(&read), events(&steps), "seed {seed}");
    }
}

#[test]
fn a_failing_history_is_made_small() {
    let steps = meterr_operators::histories::history(&mut Rng::new(3), &crate::options(3));
    let corrections = |steps: &[Step]| {
        let lines = steps.iter().filter_map(|step| match step {
            Step::Message(message) => Some(message.decoded()),
            _ => None,
        });
        lines.flatten().filter(|event| event.as_ref().is_ok_and(|event| event.revision > 1)).count()
    };
    assert!(corrections(&steps) > 2);
    let small = crate::shrink::shrink(&steps, |steps| corrections(steps) > 1);
    let lines: usize = text::write(&small).lines().filter(|line| line.starts_with(' ')).count();
    assert_eq!((corrections(&small), lines), (2, 2), "{}", text::write(&small));
    assert!(small.len() <= 2);
}
