//! Laws that need no oracle: two histories that must lead to the same views.

use std::cell::Cell;
use std::collections::BTreeMap;

use meterr_operators::control::{ControlChange, HorizonChange, PricesChange};
use meterr_operators::event::{Event, EventFields, Reason};
use meterr_operators::histories::{HistoryOptions, Line, Step, UsageMessage, history, native_json};
use meterr_operators::ids::{ShardId, shard_of};
use meterr_operators::price_book::{PriceBook, PriceEntry};
use meterr_operators::reference::Reference;
use meterr_operators::rng::Rng;
use meterr_operators::time::{MINUTE, SLOT, Time};

use crate::run::{Epoch, Outcomes, epochs, run_on_one};
use crate::show::{differ, rows_differ};
use crate::{options, require, seeds};

fn run(epochs: &[Epoch], shards: u16) -> Result<Outcomes, String> {
    let ids: Vec<ShardId> = (0..shards).map(ShardId).collect();
    run_on_one(epochs, &ids, shards)
}

/// Requires the rows at the end of epoch `at.0` of one run to equal those at `at.1` of another.
fn same_rows(is: &Outcomes, must_be: &Outcomes, at: (usize, usize)) -> Result<(), String> {
    for (shard, outcomes) in is {
        let (is, must_be) = (&outcomes[at.0].shown, &must_be[shard][at.1].shown);
        if let Some(difference) = rows_differ(&is.rows, &must_be.rows) {
            return Err(format!("shard {shard}, epochs {at:?}: {difference}"));
        }
    }
    Ok(())
}

fn line(fields: EventFields<'static>) -> Line {
    Line { text: native_json(&fields), event: Event::new(fields) }
}

/// A message of ours; positions are given by [`number`].
fn message(shard: ShardId, time: Time, subject: &str, lines: Vec<Line>) -> UsageMessage {
    let subject = format!("usage.{shard}.{subject}");
    UsageMessage { shard, position: 0, time, subject, lines }
}

/// Numbers messages and control changes in their order.
fn number(epochs: &mut [Epoch]) {
    let (mut positions, mut control) = (BTreeMap::new(), 0);
    for epoch in epochs {
        for change in &mut epoch.control {
            control += 1;
            change.0 = control;
        }
        for message in &mut epoch.messages {
            let position = positions.entry(message.shard).or_insert(0);
            *position += 1;
            message.position = *position;
        }
    }
}

/// Log time of every shard after each message given to it.
#[derive(Default)]
struct Clocks(BTreeMap<ShardId, Time>);

impl Clocks {
    fn see(&mut self, message: &UsageMessage) {
        let now = self.0.entry(message.shard).or_default();
        *now = (*now).max(message.time);
    }
}

#[test]
fn how_a_reader_groups_its_work_is_irrelevant() {
    require(seeds(200..210), options, |seed, shards, steps| {
        let whole = epochs(steps);
        let mut rng = Rng::new(seed);
        let (mut fine, mut ends) = (Vec::new(), Vec::new());
        for epoch in &whole {
            let mut piece = Epoch::default();
            for change in &epoch.control {
                piece.control.push(change.clone());
                if rng.percent(50) {
                    fine.push(std::mem::take(&mut piece));
                }
            }
            for message in &epoch.messages {
                piece.messages.push(message.clone());
                if rng.percent(50) {
                    fine.push(std::mem::take(&mut piece));
                }
            }
            fine.push(piece);
            ends.push(fine.len() - 1);
        }
        let (is, must_be) = (run(&fine, shards)?, run(&whole, shards)?);
        for (shard, outcomes) in &must_be {
            for (at, end) in ends.iter().enumerate() {
                let difference = is[shard][*end].shown.differences(&outcomes[at].shown);
                difference.map_or(Ok(()), |d| Err(format!("shard {shard}, epoch {at}: {d}")))?;
            }
        }
        Ok(())
    });
}

#[test]
fn every_message_sent_twice_changes_nothing() {
    require(seeds(300..310), options, |_, shards, steps| {
        let once = epochs(steps);
        let mut twice = once.clone();
        for epoch in &mut twice {
            epoch.messages = epoch.messages.iter().flat_map(|m| [m.clone(), m.clone()]).collect();
        }
        number(&mut twice);
        let (is, must_be) = (run(&twice, shards)?, run(&once, shards)?);
        for at in 0..once.len() {
            same_rows(&is, &must_be, (at, at))?;
            for (shard, outcomes) in &must_be {
                let changes = rows_differ(&is[shard][at].changes, &outcomes[at].changes);
                let ids = (&is[shard][at].shown.ids, &outcomes[at].shown.ids);
                let difference = changes.or_else(|| differ("ids", ids.0, ids.1));
                difference.map_or(Ok(()), |d| Err(format!("shard {shard}, epoch {at}: {d}")))?;
            }
        }
        Ok(())
    });
}

/// What came before is sent again at every boundary: ids still known make it a duplicate, ids
/// forgotten make it too late. Without backfill, whose promise is weaker, and without what had
/// been too far ahead and no longer is.
#[test]
fn replaying_everything_at_every_boundary_changes_nothing() {
    let small = |seed| HistoryOptions { steps: 50, ..options(seed) };
    require(seeds(400..408), small, |_, shards, steps| {
        let once = epochs(steps);
        let must_be = run(&once, shards)?;
        let mut replayed = Vec::new();
        let (mut clocks, mut sent) = (Clocks::default(), Vec::new());
        for (at, epoch) in once.iter().enumerate() {
            replayed.push(epoch.clone());
            for message in &epoch.messages {
                clocks.see(message);
                let dead = &must_be[&message.shard][at].dead;
                let ahead = |n: u32| dead.contains(&(message.position, n, Reason::TooFarAhead));
                let lines = (1..).zip(&message.lines).filter(|(n, _)| !ahead(*n));
                let lines = lines.map(|(_, line)| line.clone()).collect();
                if !message.subject.ends_with("@backfill") {
                    sent.push(UsageMessage { lines, ..message.clone() });
                }
            }
            let again = sent.iter().map(|m| UsageMessage { time: clocks.0[&m.shard], ..m.clone() });
            replayed.push(Epoch { messages: again.collect(), ..Epoch::default() });
        }
        number(&mut replayed);
        let is = run(&replayed, shards)?;
        for at in 0..once.len() {
            same_rows(&is, &must_be, (2 * at, at))?;
            same_rows(&is, &must_be, (2 * at + 1, at))?;
            for (shard, outcomes) in &is {
                let changes = &outcomes[2 * at + 1].changes;
                let difference = differ("changes", changes, &BTreeMap::new());
                difference.map_or(Ok(()), |d| Err(format!("shard {shard}, epoch {at}: {d}")))?;
            }
        }
        Ok(())
    });
}

/// The history with a horizon so long that nothing is forgotten, and nothing is too late. In others
/// one id more can make a bucket that would have been empty, and so an old event too late.
fn never_forgetting(steps: &[Step]) -> Vec<Step> {
    let keep = ControlChange::Horizon(HorizonChange { seconds: 3_650 * 86_400 });
    let horizon = |step: &Step| matches!(step, Step::Control(ControlChange::Horizon(_)));
    let rest = steps.iter().filter(|step| !horizon(step)).cloned();
    [Step::Control(keep), Step::Boundary].into_iter().chain(rest).collect()
}

/// Events under new ids are slipped in and taken back, in the same message, the next one or the
/// next epoch, the void before or after the event, with a reinstatement in between.
#[test]
fn event_and_void_are_nothing() {
    require(seeds(500..510), options, |seed, shards, steps| {
        let without = epochs(&never_forgetting(steps));
        let mut rng = Rng::new(seed);
        let contents: Vec<EventFields<'static>> = (without.iter().flat_map(|e| &e.messages))
            .flat_map(|m| m.lines.iter().map(move |line| (m.shard, line)))
            .filter_map(|(shard, line)| line.event.clone().ok().map(|event| (shard, event)))
            .filter(|(shard, event)| shard_of(&event.org, shards) == *shard && !event.void)
            .map(|(_, event)| (*event).clone())
            .collect();
        if contents.is_empty() {
            return Ok(());
        }
        let mut with = without.clone();
        let mut clocks = Clocks::default();
        // Whether a pair is half sent at the end of an epoch.
        let mut open = vec![false; with.len()];
        for at in 0..with.len() {
            let last = at + 1 == with.len();
            let messages = std::mem::take(&mut with[at].messages);
            for message_ in messages {
                clocks.see(&message_);
                let shard = message_.shard;
                with[at].messages.push(message_);
                let fitting = contents.iter().filter(|c| shard_of(&c.org, shards) == shard);
                let fitting: Vec<_> = fitting.collect();
                if fitting.is_empty() || !rng.percent(30) {
                    continue;
                }
                let now = clocks.0[&shard];
                let time = Time(now.0 + rng.between(-900, 60) * MINUTE);
                let event = EventFields {
                    id: format!("pair-{at}-{}", with[at].messages.len()).into(),
                    time,
                    revision: 0,
                    original_time: None,
                    ..(*rng.pick(&fitting)).clone()
                };
                let version = |revision: u32| {
                    let original_time = (revision > 0).then_some(time);
                    line(EventFields {
                        revision,
                        original_time,
                        void: revision % 2 == 1,
                        ..event.clone()
                    })
                };
                let mut versions = match rng.below(3) {
                    0 => vec![version(0), version(1)],
                    1 => vec![version(1), version(0)],
                    _ => vec![version(0), version(1), version(2), version(3)],
                };
                let first = versions.drain(..1 + rng.below(versions.len() as u64) as usize);
                let first = message(shard, now, "@batch", first.collect());
                with[at].messages.push(first);
                let rest = message(shard, now, &event.org, versions);
                if !last && !rest.lines.is_empty() && rng.percent(50) {
                    with[at + 1].messages.insert(0, rest);
                    open[at] = true;
                } else {
                    with[at].messages.push(rest);
                }
            }
        }
        number(&mut with);
        let (is, must_be) = (run(&with, shards)?, run(&without, shards)?);
        (0..with.len()).filter(|at| !open[*at]).try_for_each(|at| {
            let letters = |outcomes: &Outcomes| {
                outcomes.values().map(|o| o[at].shown.dead.len()).collect::<Vec<_>>()
            };
            differ("number of dead letters", &letters(&is), &letters(&must_be))
                .map_or(Ok(()), Err)?;
            same_rows(&is, &must_be, (at, at))
        })
    });
}

#[test]
fn everything_voided_leaves_nothing_and_comes_back_reinstated() {
    require(seeds(600..608), options, |_, shards, steps| {
        let steps = never_forgetting(steps);
        let mut all = epochs(&steps);
        let mut reference = Reference::new(shards);
        let mut clocks = Clocks::default();
        for epoch in &all {
            epoch.control.iter().for_each(|(_, change)| reference.control(change));
            for m in &epoch.messages {
                clocks.see(m);
                reference.message(m.shard, m.position, m.time, &m.subject, &m.decoded());
            }
        }
        let versions = |more: u32| {
            let version = |event: &Event<'static>| {
                let shard = shard_of(&event.org, shards);
                let fields = EventFields {
                    revision: event.revision + more,
                    void: more == 1,
                    original_time: Some(event.original_time.unwrap_or(event.time)),
                    ..(**event).clone()
                };
                message(shard, clocks.0[&shard], "@batch", vec![line(fields)])
            };
            Epoch { messages: reference.counted().map(version).collect(), ..Epoch::default() }
        };
        let end = all.len() - 1;
        all.extend([versions(1), versions(2)]);
        number(&mut all);
        let outcomes = run(&all, shards)?;
        for (shard, outcomes) in &outcomes {
            let left = &outcomes[end + 1].shown.rows;
            let difference = rows_differ(left, &BTreeMap::new());
            difference.map_or(Ok(()), |d| Err(format!("shard {shard}, voided: {d}")))?;
        }
        same_rows(&outcomes, &outcomes, (end + 2, end))
    });
}

/// All lines of an epoch in one message (backfill apart), those the oracle refuses left out.
fn gathered(steps: &[Step], shards: u16) -> Vec<Epoch> {
    let mut reference = Reference::new(shards);
    let mut clocks = Clocks::default();
    let mut all = epochs(steps);
    for epoch in &mut all {
        epoch.control.iter().for_each(|(_, change)| reference.control(change));
        epoch.messages.iter().for_each(|message| clocks.see(message));
        let messages = std::mem::take(&mut epoch.messages);
        for shard in (0..shards).map(ShardId) {
            for backfill in [false, true] {
                let from = messages
                    .iter()
                    .filter(|m| m.shard == shard && m.subject.ends_with("@backfill") == backfill);
                let lines: Vec<Line> = from.flat_map(|m| m.lines.clone()).collect();
                let subject = if backfill { "@backfill" } else { "@batch" };
                let Some(now) = clocks.0.get(&shard) else { continue };
                let mut whole = message(shard, *now, subject, lines);
                let known = reference.dead_letters(shard).len();
                reference.message(shard, 1, *now, &whole.subject, &whole.decoded());
                let dead = &reference.dead_letters(shard)[known..];
                let lines = (1..).zip(std::mem::take(&mut whole.lines));
                let good = lines.filter(|(n, _)| dead.iter().all(|(_, line, _)| line != n));
                whole.lines = good.map(|(_, line)| line).collect();
                epoch.messages.push(whole);
            }
        }
    }
    number(&mut all);
    all
}

#[test]
fn the_order_within_an_epoch_is_irrelevant() {
    require(seeds(700..710), options, |seed, shards, steps| {
        let ordered = gathered(steps, shards);
        let mut rng = Rng::new(seed);
        let mut shuffled = ordered.clone();
        for epoch in &mut shuffled {
            shuffle(&mut epoch.messages, &mut rng);
            epoch.messages.iter_mut().for_each(|m| shuffle(&mut m.lines, &mut rng));
        }
        number(&mut shuffled);
        let (is, must_be) = (run(&shuffled, shards)?, run(&ordered, shards)?);
        (0..ordered.len()).try_for_each(|at| same_rows(&is, &must_be, (at, at)))
    });
}

fn shuffle<T>(list: &mut [T], rng: &mut Rng) {
    for at in (1..list.len()).rev() {
        list.swap(at, rng.below(at as u64 + 1) as usize);
    }
}

/// What must be sent to undo an entry: what its key had from there on.
fn undo(book: &PriceBook, entry: &PriceEntry) -> PriceEntry {
    let key = |e: &PriceEntry| {
        (e.provider.clone(), e.model.clone(), e.org.clone(), e.tier, e.min_input_tokens)
    };
    let from = |e: &PriceEntry| e.effective_from.unwrap_or(Time::MIN);
    let before = book.entries(None).into_iter();
    let before = before.filter(|e| key(e) == key(entry) && from(e) <= from(entry)).max_by_key(from);
    let withdrawal = PriceEntry {
        provider: entry.provider.clone(),
        model: entry.model.clone(),
        org: entry.org.clone(),
        tier: entry.tier,
        min_input_tokens: entry.min_input_tokens,
        ..PriceEntry::default()
    };
    let before = before.unwrap_or(withdrawal);
    PriceEntry { effective_from: entry.effective_from, ..before }
}

#[test]
fn prices_changed_and_changed_back_are_nothing() {
    let differed = Cell::new(0);
    let tried = seeds(800..815);
    require(tried.clone(), options, |seed, shards, steps| {
        let mut rng = Rng::new(seed);
        let mut all = epochs(steps);
        all.truncate(1 + rng.below(all.len() as u64) as usize);
        let mut book = PriceBook::new();
        for (position, change) in all.iter().flat_map(|epoch| &epoch.control) {
            if let ControlChange::Prices(change) = change {
                book.apply(&change.prices, *position).unwrap();
            }
        }
        // Prices out of other histories, moved to where this one has usage.
        let others = history(&mut Rng::new(!seed), &options(seed));
        let change = others.into_iter().find_map(|step| match step {
            Step::Control(ControlChange::Prices(change)) => Some(change.prices),
            _ => None,
        });
        let times: Vec<Time> = (all.iter().flat_map(|e| &e.messages).flat_map(|m| &m.lines))
            .filter_map(|line| line.event.as_ref().ok().map(|event| event.time))
            .collect();
        let (Some(mut prices), false) = (change, times.is_empty()) else { return Ok(()) };
        for entry in &mut prices {
            let slot = rng.pick(&times).slot().start().0 + rng.between(-1, 1) * SLOT;
            entry.effective_from = rng.percent(60).then_some(Time(slot));
        }
        let back = prices.iter().map(|entry| undo(&book, entry)).collect();
        let end = all.len() - 1;
        for prices in [prices, back] {
            let change = ControlChange::Prices(PricesChange { prices });
            all.push(Epoch { control: vec![(0, change)], messages: Vec::new() });
        }
        number(&mut all);
        let outcomes = run(&all, shards)?;
        if same_rows(&outcomes, &outcomes, (end + 1, end)).is_err() {
            differed.set(differed.get() + 1);
        }
        same_rows(&outcomes, &outcomes, (end + 2, end))
    });
    assert!(differed.get() * 2 > tried.count(), "prices changed in {} runs only", differed.get());
}
