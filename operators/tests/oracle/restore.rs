//! Restored = uninterrupted: a shard that is stopped and rebuilt from its checkpoint, again and
//! again, does in every epoch exactly what one that never stopped does.

use meterr_operators::dataflow::UsageUpdate;
use meterr_operators::dedupe::DedupeState;
use meterr_operators::dictionary::Names;
use meterr_operators::histories::{Step, history};
use meterr_operators::ids::ShardId;
use meterr_operators::rng::Rng;
use meterr_operators::shard::ShardState;

use crate::run::{Epoch, Hosted, Outcome, epochs, timely_worker};
use crate::show::{differ, rows_differ, rows_of};
use crate::shrink::failure;
use crate::{options, require, seeds};

type Parts = (Names, Vec<UsageUpdate>, DedupeState, i64, u64, Vec<(u64, u32)>);

fn encode(state: ShardState) -> Vec<u8> {
    let ShardState { names, usage, ids, log_time, usage_position, dead } = state;
    let parts: Parts = (names, usage, ids, log_time, usage_position, dead);
    bincode::encode_to_vec(parts, bincode::config::standard()).unwrap()
}

fn decode(bytes: &[u8]) -> ShardState {
    let (parts, read): (Parts, usize) =
        bincode::decode_from_slice(bytes, bincode::config::standard()).unwrap();
    assert_eq!(read, bytes.len());
    let (names, usage, ids, log_time, usage_position, dead) = parts;
    ShardState { names, usage, ids, log_time, usage_position, dead }
}

/// What happened to a shard on its way.
#[derive(Debug, Default, Clone, Copy)]
pub struct Events {
    pub restores: usize,
    pub deltas_restored: usize,
    /// Restores that went without what the last delta held.
    pub spoiled: usize,
}

/// Whether a delta holds anything but positions.
fn holds_something(state: &ShardState) -> bool {
    !state.usage.is_empty() || !state.ids.entries.is_empty() || !state.ids.changed.is_empty()
}

fn step(
    hosted: &mut Hosted,
    worker: &mut timely::worker::Worker,
    number: usize,
    epoch: &Epoch,
) -> Result<Outcome, String> {
    hosted.control(worker, &epoch.control)?;
    let lines = hosted.messages(epoch)?;
    hosted.close_epoch(worker, number as u64, lines)
}

/// Runs one shard twice: without a stop, and with checkpoints and stops at random boundaries.
/// `spoil` leaves out what the last delta of a chain holds.
pub fn compare(
    epochs: &[Epoch],
    id: ShardId,
    shards: u16,
    rng: &mut Rng,
    spoil: bool,
    events: &mut Events,
) -> Result<(), String> {
    let mut worker = timely_worker();
    let mut steady = Hosted::open(&mut worker, id, shards);
    let mut must_be = Vec::new();
    for (at, epoch) in epochs.iter().enumerate() {
        must_be.push(step(&mut steady, &mut worker, at, epoch)?);
    }

    let mut hosted = Hosted::open(&mut worker, id, shards);
    let mut chain: Vec<Vec<u8>> = Vec::new();
    // Epochs contained in the chain.
    let mut saved = 0;
    let mut stops_left = 6;
    let mut at = 0;
    while at < epochs.len() {
        let outcome = step(&mut hosted, &mut worker, at, &epochs[at])?;
        if let Some(difference) = outcome.differences(&must_be[at]) {
            return Err(format!("shard {id}, epoch {at}, checkpoint of {saved}: {difference}"));
        }
        at += 1;
        match rng.below(10) {
            0..5 if !chain.is_empty() => {
                chain.push(encode(hosted.shard.take_delta()));
                saved = at;
            }
            0..3 | 5 => {
                chain = vec![encode(hosted.shard.take_base())];
                saved = at;
            }
            // A delta that is never written; a base must follow.
            6 if !chain.is_empty() => {
                drop(hosted.shard.take_delta());
                chain = vec![encode(hosted.shard.take_base())];
                saved = at;
            }
            _ => {}
        }
        if stops_left == 0 || !rng.percent(35) {
            continue;
        }
        stops_left -= 1;
        if rng.percent(50) {
            worker = timely_worker();
        }
        let mut fresh = Hosted::open(&mut worker, id, shards).shard;
        for (position, change) in epochs[..saved].iter().flat_map(|epoch| &epoch.control) {
            fresh.control(&mut worker, *position, change).map_err(|e| e.to_string())?;
        }
        if !chain.is_empty() {
            let mut states: Vec<ShardState> = chain.iter().map(|bytes| decode(bytes)).collect();
            events.restores += 1;
            events.deltas_restored += states.len() - 1;
            let last = states.last().unwrap().clone();
            if spoil && states.len() > 1 && holds_something(&last) {
                events.spoiled += 1;
                states.pop();
                // As a reader that is not looking would go on.
                let head = states.last_mut().unwrap();
                (head.log_time, head.usage_position) = (last.log_time, last.usage_position);
            }
            fresh.restore(&mut worker, states).map_err(|e| e.to_string())?;
        }
        at = saved;
        if let Some(at) = at.checked_sub(1) {
            hosted.replace(fresh, &must_be[at]);
            check_restored(&hosted, &must_be[at], &epochs[..=at])?;
        } else {
            hosted = Hosted::open(&mut worker, id, shards);
        }
    }
    let (is, must_be) = (hosted.shard.take_base(), steady.shard.take_base());
    differ("state in the end", &is, &must_be).map_or(Ok(()), Err)
}

fn check_restored(hosted: &Hosted, must_be: &Outcome, epochs: &[Epoch]) -> Result<(), String> {
    let shard = &hosted.shard;
    let own = epochs.iter().flat_map(|e| &e.messages).filter(|m| m.shard == shard.id());
    let letters: u32 = shard.dead_epochs().iter().map(|(_, n)| n).sum();
    let is = (shard.usage_position(), shard.log_time(), shard.dedupe().len(), letters as usize);
    let shown = &must_be.shown;
    let position = own.clone().map(|m| m.position).max().unwrap_or(0);
    let time = own.map(|m| m.time).max().unwrap_or_default();
    let (rows, changes) = rows_of(shard);
    differ(
        "restored position, log time, ids, letters",
        &is,
        &(position, time, shown.ids, shown.dead.len()),
    )
    .or_else(|| rows_differ(&rows, &shown.rows))
    .or_else(|| differ("changes after a restore", &changes.len(), &0))
    .map_or(Ok(()), |difference| Err(format!("restored: {difference}")))
}

/// Compares every shard of a history.
pub fn restored_equals_uninterrupted(
    seed: u64,
    shards: u16,
    steps: &[Step],
    spoil: bool,
    events: &mut Events,
) -> Result<(), String> {
    let epochs = epochs(steps);
    (0..shards).try_for_each(|shard| {
        let mut rng = Rng::stream(seed, shard.into());
        compare(&epochs, ShardId(shard), shards, &mut rng, spoil, events)
    })
}

#[test]
fn a_restored_shard_goes_on_as_if_never_stopped() {
    let seen = std::cell::Cell::new(Events::default());
    require(seeds(900..920), options, |seed, shards, steps| {
        let mut events = seen.get();
        let result = restored_equals_uninterrupted(seed, shards, steps, false, &mut events);
        seen.set(events);
        result
    });
    let seen = seen.get();
    assert!(seen.restores > 30 && seen.deltas_restored > 30, "hardly anything tried: {seen:?}");
}

/// The test above can fail: without what the last delta held it does, every time.
#[test]
fn a_checkpoint_without_its_last_delta_is_noticed() {
    let mut tried = 0;
    for seed in 900..912 {
        let options = options(seed);
        let steps = history(&mut Rng::new(seed), &options);
        let seen = std::cell::Cell::new(Events::default());
        let noticed = failure(&steps, |steps| {
            let mut events = Events::default();
            let result =
                restored_equals_uninterrupted(seed, options.shards, steps, true, &mut events);
            seen.set(events);
            result
        });
        if seen.get().spoiled > 0 {
            tried += 1;
            assert!(noticed.is_some(), "seed {seed}: {:?}", seen.get());
        }
    }
    assert!(tried > 5, "{tried}");
}
