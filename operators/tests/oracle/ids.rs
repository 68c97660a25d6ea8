//! The memory of ids against a model, with so many ids that blocks fill, are given back and begin
//! in the middle after a restore. Histories are too small for that.

use std::collections::BTreeMap;

use meterr_operators::dedupe::{BUCKET, Dedupe, DedupeState, Place, Verdict};
use meterr_operators::rng::Rng;
use meterr_operators::time::{HOUR, MINUTE, Time};

use crate::seeds;

/// What the rules say, without any cleverness.
#[derive(Default)]
struct Model {
    horizon: i64,
    /// Revision, content, place and bucket by fingerprint.
    known: BTreeMap<u128, (u32, u64, Place, i64)>,
    /// Ids of a bucket, by its start.
    buckets: BTreeMap<i64, Vec<u128>>,
    expired_end: Option<i64>,
}

impl Model {
    fn advance(&mut self, now: i64) {
        while let Some(bucket) = self.buckets.first_entry() {
            let end = *bucket.key() + BUCKET;
            if now < end + self.horizon {
                break;
            }
            for id in bucket.remove() {
                self.known.remove(&id);
            }
            self.expired_end = Some(self.expired_end.map_or(end, |e| e.max(end)));
        }
    }

    fn admit(&mut self, id: u128, revision: u32, content: u64, place: Place, now: i64) -> Verdict {
        let bucket = now.div_euclid(BUCKET) * BUCKET;
        let Some(known) = self.known.get_mut(&id) else {
            self.known.insert(id, (revision, content, place, bucket));
            self.buckets.entry(bucket).or_default().push(id);
            return Verdict::Fresh;
        };
        match revision.cmp(&known.0) {
            std::cmp::Ordering::Less => Verdict::Superseded,
            std::cmp::Ordering::Equal if known.1 == content => Verdict::Duplicate,
            std::cmp::Ordering::Equal => Verdict::Conflict,
            std::cmp::Ordering::Greater => {
                let old = known.2;
                (known.0, known.1, known.2) = (revision, content, place);
                Verdict::Replaces(old)
            }
        }
    }
}

fn fingerprint(n: u64) -> u128 {
    let mut rng = Rng::new(n);
    u128::from(rng.bits()) << 64 | u128::from(rng.bits())
}

fn copied(state: &DedupeState) -> DedupeState {
    let config = bincode::config::standard();
    let bytes = bincode::encode_to_vec(state, config).unwrap();
    bincode::decode_from_slice(&bytes, config).unwrap().0
}

fn run(seed: u64) {
    let mut rng = Rng::new(seed);
    let mut ids = Dedupe::default();
    let mut model = Model::default();
    let mut now = rng.between(0, 100 * HOUR);
    let mut chain: Vec<DedupeState> = Vec::new();
    // How many ids were ever made; copies are mostly of recent ones.
    let mut made = 0_u64;
    let mut position = 0;
    let set_horizon = |rng: &mut Rng, ids: &mut Dedupe, model: &mut Model| {
        model.horizon = *rng.pick(&[HOUR, 2 * HOUR + 1, 5 * HOUR, 24 * HOUR]);
        ids.set_horizon(model.horizon);
    };
    set_horizon(&mut rng, &mut ids, &mut model);
    for step in 0..60 {
        now += match rng.below(6) {
            0 => rng.between(0, 10 * HOUR),
            1 => model.horizon + BUCKET - now.rem_euclid(BUCKET) - rng.between(0, 1),
            2 => 0,
            _ => rng.between(0, 90 * MINUTE),
        };
        ids.advance(Time(now));
        model.advance(now);
        let most = *rng.pick(&[0, 1, 300, 2_500]);
        for _ in 0..rng.below(most + 1) {
            let id = if rng.percent(60) || made == 0 {
                made += 1;
                made
            } else if rng.percent(90) {
                made - rng.below(made.min(3_000))
            } else {
                1 + rng.below(made)
            };
            position += 1;
            let place = Place { position, line: 1 + rng.below(100) as u32 };
            let revision = if rng.percent(70) { 0 } else { rng.below(4) as u32 };
            let content = rng.below(20) / 19;
            let is = ids.admit(fingerprint(id), revision, content, place);
            let must_be = model.admit(fingerprint(id), revision, content, place, now);
            assert_eq!(is, must_be, "seed {seed}, step {step}, id {id}, revision {revision}");
        }
        let is = (ids.len(), ids.expired_through().map(|t| t.0));
        let must_be = (model.known.len() as u64, model.expired_end);
        assert_eq!(is, must_be, "seed {seed}, step {step}");
        if let Some(end) = model.expired_end {
            assert!(ids.too_late(Time(end + HOUR)) && !ids.too_late(Time(end + HOUR + 1)));
        }
        if rng.percent(5) {
            set_horizon(&mut rng, &mut ids, &mut model);
        }
        match rng.below(4) {
            0 | 1 if !chain.is_empty() => chain.push(copied(&ids.take_delta())),
            0 => chain = vec![copied(&ids.take_base())],
            // Stopped right after a checkpoint, and rebuilt from it.
            2 if !chain.is_empty() => {
                chain.push(copied(&ids.take_delta()));
                ids = Dedupe::default();
                chain.iter().for_each(|state| ids.restore(state).unwrap());
                assert_eq!(ids.len(), model.known.len() as u64, "seed {seed}, step {step}");
            }
            _ => {}
        }
    }
}

#[test]
fn the_memory_of_ids_decides_as_its_model() {
    seeds(0..16).for_each(run);
}
