//! `meterr verify`: recomputes every view from the logs and compares.
//!
//! Three accounts of the same figures are held against each other, shard by shard:
//! 1. what was *published*: the rows of the output log, the last one of each key;
//! 2. what the engine *holds*: its state, rebuilt from checkpoint and log as at a start;
//! 3. what is *right*: a recomputation from the first usage record on that shares nothing with the
//!    dataflow but the decoders and the price book's entries. Duplicates, revisions and the horizon
//!    are decided by [`Reference`]; sums are plain maps of text.
//!
//! Needs the data directory to itself, as a node does.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use futures::executor::block_on;
use meterr_connectors::api::Figures;
use meterr_connectors::codec::decode_message;
use meterr_operators::control::{ControlChange, Dimension, ViewDeclared, WindowSize, zone};
use meterr_operators::event::{Event, Meter, context_class};
use meterr_operators::ids::ShardId;
use meterr_operators::money::Atto;
use meterr_operators::price_book::{PriceBook, RateKey, Timeline};
use meterr_operators::reference::Reference;
use meterr_operators::time::Slot;
use meterr_operators::usage::{Spend, SpendRest};
use serde::Serialize;

use crate::live::opening::rebuild;
use crate::live::{ShardSpec, StopReason};
use crate::records::{READ_BYTES, commits_behind, control_changes};
use crate::wire::{Part, Starts, built_in_rows, figures};
use crate::worker::timely_worker;

/// (org, view, key, window start) → figures.
type Rows = BTreeMap<(String, String, Option<String>, Option<String>), Figures>;

/// A figure that is not what it should be.
#[derive(Debug, Clone, Serialize)]
pub struct Difference {
    /// The shard.
    pub shard: ShardId,
    /// `published` or `held`; of a copy also `recomputed`, each with `copy: ` before it.
    pub account: &'static str,
    /// The org.
    pub org: String,
    /// The view.
    pub view: String,
    /// The member of the org.
    pub key: Option<String>,
    /// Start of the window.
    pub window_start: Option<String>,
    /// What it says; absent when the row is missing.
    pub found: Option<Figures>,
    /// What the recomputation says; absent when there should be no row.
    pub expected: Option<Figures>,
}

/// What was verified.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    /// Shards.
    pub shards: usize,
    /// Usage records read.
    pub messages: u64,
    /// Events that count.
    pub events: u64,
    /// Rows compared, in each of the two accounts.
    pub rows: u64,
    /// Rows that differ.
    pub differences_total: u64,
    /// The first of them.
    pub differences: Vec<Difference>,
}

/// Differences listed at most.
pub const DIFFERENCES_MAX: usize = 100;

/// Verifies one shard.
///
/// # Errors
/// When its logs or checkpoint cannot be read.
pub fn shard(spec: &ShardSpec, report: &mut Report) -> Result<(), StopReason> {
    let Accounts { published, held, right } = accounts(spec, report)?;
    report.shards += 1;
    report.rows += right.len() as u64;
    compare(spec.id, "published", &published, &right, report);
    compare(spec.id, "held", &held, &right, report);
    Ok(())
}

/// Verifies one shard and a copy of it: all three accounts of either must say the same.
///
/// # Errors
/// When logs of either cannot be read.
pub fn copied(source: &ShardSpec, copy: &ShardSpec, report: &mut Report) -> Result<(), StopReason> {
    let id = source.id;
    let Accounts { published, held, right } = accounts(source, report)?;
    report.shards += 1;
    report.rows += right.len() as u64;
    compare(id, "published", &published, &right, report);
    compare(id, "held", &held, &right, report);
    drop((published, held));
    // Counted once.
    let Accounts { published, held, right: again } = accounts(copy, &mut Report::default())?;
    compare(id, "copy: recomputed", &again, &right, report);
    compare(id, "copy: published", &published, &right, report);
    compare(id, "copy: held", &held, &right, report);
    Ok(())
}

/// What a shard's logs say in three ways.
struct Accounts {
    published: Rows,
    held: Rows,
    right: Rows,
}

fn accounts(spec: &ShardSpec, report: &mut Report) -> Result<Accounts, StopReason> {
    let commits = commits_behind(&*spec.logs.out, 0)?;
    let last = commits.last().map(|(_, commit)| commit.clone());
    let (usage_to, control_to) =
        last.as_ref().map_or((0, 0), |commit| (commit.usage_position, commit.control_position));
    let right = recompute(spec, &commits, usage_to, control_to, report)?;
    let published = published(spec, &commits)?;
    let held = held(spec)?;
    Ok(Accounts { published, held, right })
}

fn compare(shard: ShardId, account: &'static str, found: &Rows, right: &Rows, report: &mut Report) {
    let keys: BTreeSet<_> = found.keys().chain(right.keys()).collect();
    for key in keys {
        let (is, should) = (found.get(key), right.get(key));
        if is == should {
            continue;
        }
        report.differences_total += 1;
        if report.differences.len() < DIFFERENCES_MAX {
            let (org, view, member, window_start) = key.clone();
            report.differences.push(Difference {
                shard,
                account,
                org,
                view,
                key: member,
                window_start,
                found: is.copied(),
                expected: should.copied(),
            });
        }
    }
}

fn nothing(figures: &Figures) -> bool {
    *figures == Figures { cost: Some(Atto::ZERO), ..Figures::default() }
}

/// The last published row of each key.
fn published(spec: &ShardSpec, commits: &[(u64, crate::wire::Commit)]) -> Result<Rows, StopReason> {
    let mut rows = Rows::new();
    let last = commits.last().map_or(0, |(position, _)| *position);
    let mut parts: Vec<Vec<u8>> = Vec::new();
    let mut from = 1;
    while from <= last {
        let records = block_on(spec.logs.out.read(from, READ_BYTES))?;
        let Some(end) = records.last() else { break };
        from = end.position + 1;
        for record in records {
            if !record.message.subject.ends_with(".commit") {
                parts.push(record.message.payload.to_vec());
                continue;
            }
            let commit = crate::records::parse_commit(&record)?;
            let own = parts.split_off(parts.len().saturating_sub(commit.parts as usize));
            parts.clear();
            if commit.seal {
                continue;
            }
            let mut hasher = blake3::Hasher::new();
            for part in &own {
                hasher.update(part);
            }
            if hasher.finalize().to_hex().as_str() != commit.hash {
                return Err(StopReason::Format(format!(
                    "the parts of epoch {} are not those its commit record was made for",
                    commit.epoch
                )));
            }
            for part in own {
                let part = Part::read(&part).map_err(|e| {
                    StopReason::Format(format!("part of epoch {}: {e}", commit.epoch))
                })?;
                for org in part.orgs {
                    for (view, list) in org.views {
                        for row in list {
                            let key = (org.org.clone(), view.clone(), row.key, row.window_start);
                            if nothing(&row.figures) {
                                rows.remove(&key);
                            } else {
                                rows.insert(key, row.figures);
                            }
                        }
                    }
                }
            }
        }
    }
    Ok(rows)
}

/// The rows the engine would show after a start.
fn held(spec: &ShardSpec) -> Result<Rows, StopReason> {
    let mut worker = timely_worker();
    let rebuilt = rebuild(&mut worker, spec, |_, _, _| ())?;
    let orgs = rebuilt.shard.flow().shared().borrow().names.names().orgs.len() as u32;
    let mut rows = Rows::new();
    let mut starts = Starts::default();
    for org in 0..orgs {
        let of_org = built_in_rows(&rebuilt.shard, org, spec.views, &mut starts);
        for (view, list) in of_org.views {
            for row in list {
                rows.insert(
                    (of_org.org.clone(), view.clone(), row.key, row.window_start),
                    row.figures,
                );
            }
        }
    }
    {
        let shared = rebuilt.shard.flow().shared().borrow();
        for view in shared.rollup.declared.iter().flatten() {
            for (member, window, spend) in view.table.rows() {
                let (org, values) = &view.members[member as usize];
                let zone_at = shared.zone_of(*org);
                let zone = &shared.zones[zone_at as usize];
                let start = starts.of(view.window.into(), zone_at, zone, window).map(str::to_owned);
                let key = serde_json::to_string(values).unwrap_or_default();
                let org = shared.names.org_name(*org).to_owned();
                rows.insert((org, view.name.clone(), Some(key), start), figures(spend));
            }
        }
    }
    rebuilt.shard.close(&mut worker);
    Ok(rows)
}

/// Everything from the beginning, the slow way.
fn recompute(
    spec: &ShardSpec,
    commits: &[(u64, crate::wire::Commit)],
    usage_to: u64,
    control_to: u64,
    report: &mut Report,
) -> Result<Rows, StopReason> {
    let mut reference = Reference::new(spec.shards);
    let mut control =
        control_changes(&*spec.logs.control, 1, Some(control_to))?.into_iter().peekable();
    let mut book = PriceBook::new();
    let mut zones: HashMap<String, String> = HashMap::new();
    let mut views: BTreeMap<String, ViewDeclared> = BTreeMap::new();
    let mut waiting = std::collections::VecDeque::new();
    let mut next = 1;
    for (_, commit) in commits.iter().filter(|(_, commit)| !commit.seal) {
        while let Some((position, change)) =
            control.next_if(|(at, _)| *at <= commit.control_position)
        {
            match &change {
                // The oracle resolves prices event by event and entry by entry; here the book's own
                // resolution is used, which is tested against it.
                ControlChange::Prices(change) => {
                    book.apply(&change.prices, position).map_err(|_| {
                        StopReason::Format(format!("prices at {position} do not apply"))
                    })?;
                }
                ControlChange::TimeZone(change) => {
                    zones.insert(change.org.clone(), change.time_zone.clone());
                }
                ControlChange::View(view) => {
                    views.insert(view.name.clone(), view.clone());
                }
                ControlChange::ViewRemoved(view) => {
                    views.remove(&view.name);
                }
                other => reference.control(other),
            }
        }
        while next <= commit.usage_position.min(usage_to) {
            if waiting.is_empty() {
                waiting = block_on(spec.logs.usage.read(next, READ_BYTES))?.into();
            }
            let Some(record): Option<meterr_connectors::log::Record> = waiting.pop_front() else {
                return Err(StopReason::Format(format!("usage record {next} is missing")));
            };
            next = record.position + 1;
            report.messages += 1;
            let decoded = decode_message(&record.message);
            let lines: Vec<_> =
                decoded.lines().map(|(_, _, event)| event.map(Event::into_owned)).collect();
            reference.message(
                spec.id,
                record.position,
                record.time,
                &record.message.subject,
                &lines,
            );
        }
    }
    Ok(sums(&reference, &book, &zones, &views, report))
}

fn sums(
    reference: &Reference,
    book: &PriceBook,
    zones: &HashMap<String, String>,
    views: &BTreeMap<String, ViewDeclared>,
    report: &mut Report,
) -> Rows {
    let mut timelines: HashMap<(String, String, String, u8, u8), Timeline> = HashMap::new();
    let mut sums: BTreeMap<(String, String, Option<String>, Option<String>), Spend> =
        BTreeMap::new();
    let mut starts: HashMap<(String, u32), (String, String)> = HashMap::new();
    for event in reference.counted() {
        report.events += 1;
        let spend = spend_of(event, book, &mut timelines);
        let slot = event.time.slot();
        let zone_name = zones.get(&*event.org).map_or("UTC", String::as_str);
        let (day, month) = starts
            .entry((zone_name.to_owned(), slot.0))
            .or_insert_with(|| calendar(zone_name, slot))
            .clone();
        let hour = Slot(slot.0 / 4 * 4).start().to_string();
        let mut add = |view: &str, key: Option<&str>, start: Option<&str>| {
            let key = (
                event.org.to_string(),
                view.to_owned(),
                key.map(str::to_owned),
                start.map(str::to_owned),
            );
            sums.entry(key).or_default().add(&spend);
        };
        add("org_hour", None, Some(&hour));
        add("org_all", None, None);
        for (window, start) in [("day", &day), ("month", &month)] {
            add(&format!("org_{window}"), None, Some(start));
            add(&format!("user_{window}"), Some(&event.user), Some(start));
            add(&format!("model_{window}"), Some(&event.model), Some(start));
            add(&format!("feature_{window}"), Some(&event.feature), Some(start));
        }
        for view in views.values() {
            let values: Vec<&str> = view.by.iter().map(|d| value(d, event)).collect();
            let key = serde_json::to_string(&values).unwrap_or_default();
            let start = match view.window {
                WindowSize::Hour => Some(&hour),
                WindowSize::Day => Some(&day),
                WindowSize::Month => Some(&month),
                WindowSize::All => None,
            };
            add(&view.name, Some(&key), start.map(String::as_str));
        }
    }
    sums.into_iter()
        .filter(|(_, spend)| !spend.is_nothing())
        .map(|(key, spend)| (key, figures(&spend)))
        .collect()
}

/// The value of a dimension of a declared view.
fn value<'a>(dimension: &Dimension, event: &'a Event<'_>) -> &'a str {
    match dimension {
        Dimension::User => &event.user,
        Dimension::Provider => &event.provider,
        Dimension::Model => &event.model,
        Dimension::Feature => &event.feature,
        Dimension::Tag(name) => {
            event.tags.iter().find(|(tag, _)| tag == name).map_or("", |(_, value)| value)
        }
    }
}

/// Start of the day and of the month a slot lies in, by the calendar itself.
fn calendar(zone_name: &str, slot: Slot) -> (String, String) {
    let zone = zone(zone_name).expect("the control log holds only zones of the database");
    let at =
        jiff::Timestamp::from_microsecond(slot.start().0).expect("slots lie between 1970 and 2200");
    let day = at.to_zoned(zone.clone()).date();
    let start = |date: jiff::civil::Date| {
        let start = date.at(0, 0, 0, 0).to_zoned(zone.clone()).expect("a date of a slot");
        if zone_name == "UTC" {
            return start.timestamp().to_string();
        }
        let seconds = start.offset().seconds();
        let sign = if seconds < 0 { '-' } else { '+' };
        let minutes = seconds.abs() / 60;
        format!(
            "{}{sign}{:02}:{:02}",
            start.strftime("%Y-%m-%dT%H:%M:%S"),
            minutes / 60,
            minutes % 60
        )
    };
    (start(day), start(day.first_of_month()))
}

fn spend_of(
    event: &Event<'_>,
    book: &PriceBook,
    timelines: &mut HashMap<(String, String, String, u8, u8), Timeline>,
) -> Spend {
    let count = |meter: Meter| i64::from(event.meters[meter as usize]);
    let mut rest = SpendRest {
        meters: meterr_operators::usage::RARE_METERS.map(count),
        ..SpendRest::default()
    };
    let cost = match &event.explicit {
        Some([compute, storage, bandwidth, ai]) => {
            rest.other_costs = [*compute, *storage, *bandwidth];
            *compute + *storage + *bandwidth + *ai
        }
        None => {
            let context = context_class(event.input_tokens());
            let key = (
                event.org.to_string(),
                event.provider.to_string(),
                event.model.to_string(),
                event.tier as u8,
                context,
            );
            let timeline = timelines.entry(key).or_insert_with(|| {
                book.timeline(&RateKey {
                    org: &event.org,
                    provider: &event.provider,
                    model: &event.model,
                    tier: event.tier,
                    context,
                })
            });
            let slot = event.time.slot();
            let prices =
                timeline.iter().rev().find(|(from, _)| *from <= slot).and_then(|(_, p)| *p);
            let (cost, lacking) = prices.unwrap_or_default().cost(&event.meters);
            rest.unpriced = i64::from(lacking != 0);
            cost
        }
    };
    Spend {
        events: 1,
        input: count(Meter::Input),
        cache_read: count(Meter::CacheRead),
        output: count(Meter::Output),
        cost,
        rest: (rest != SpendRest::default()).then(|| Box::new(rest)),
    }
}
