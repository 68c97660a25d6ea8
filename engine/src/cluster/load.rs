//! How much usage came in, hour by hour of log time, and how much will.
//!
//! A shard's owner counts each commit ([`ShardLoad::add`]). Counts of whole hours are kept for
//! [`WEEKS`] weeks, not averages: so histories of many shards add up to exactly what one history of all
//! of them would be, and spread and growth are read from them when asked. A history takes
//! 11 KiB at most.
//!
//! Load follows the week: a prediction for an hour is what came in the same hour of weeks before, recent
//! weeks counting more, each scaled by how the last day compares with the same day of that week. The
//! scaling carries growth and steps (a new customer on Tuesday shows on Wednesday). With less than a
//! week of history days stand in for weeks, with less than a day the last hours. How far off such
//! predictions were in the past week gives the upper quantile: nothing is assumed of the noise.
//!
//! Weeks go by UTC, so the two changes of local time a year shift the pattern by an hour for a while; the
//! quantile covers it.

use std::collections::VecDeque;

use meterr_operators::time::{HOUR, Time};
use serde::{Deserialize, Serialize};

/// Weeks remembered.
pub const WEEKS: usize = 8;
/// Hours of a week.
const WEEK: usize = 168;
/// Hours of a day.
const DAY: usize = 24;
/// Hours remembered, the one under way included.
const HOURS_MAX: usize = WEEKS * WEEK + 1;
/// What a week counts against the one after it.
const FORGET: f64 = 0.6;
/// Scaling between weeks goes no further: a day of outage must not make the next one look tenfold.
const SCALE_MAX: f64 = 4.0;
/// Past predictions compared with what came, at most: a week of them.
const CHECKED_MAX: usize = WEEK;
/// Fewer past predictions than this say little about noise: [`MARGIN`] is taken in their place.
const CHECKED_MIN: usize = 12;
/// Upper quantile of actual to predicted while it is not known.
const MARGIN: f64 = 1.5;
/// Longest look ahead, in hours.
pub const AHEAD_MAX: usize = DAY;

/// Events by hour of log time. Serialised as `{"end":491288,"hours":[…]}`: the hour under way, counted
/// from 1970-01-01T00:00:00Z, and events by hour up to it, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored")]
pub struct LoadHistory {
    end: i64,
    hours: VecDeque<u64>,
}

#[derive(Deserialize)]
struct Stored {
    end: i64,
    hours: VecDeque<u64>,
}

impl TryFrom<Stored> for LoadHistory {
    type Error = String;

    fn try_from(stored: Stored) -> Result<LoadHistory, String> {
        let Stored { end, hours } = stored;
        if hours.len() > HOURS_MAX || !(0..=Time::MAX.0 / HOUR).contains(&end) {
            let len = hours.len();
            return Err(format!("a load history ends in hour {end} and has {len} hours"));
        }
        Ok(LoadHistory { end, hours })
    }
}

/// What is expected to come in.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Events per second in the busiest of the hours asked about, as likely above as below.
    pub peak: f64,
    /// The same at the quantile asked for.
    pub upper: f64,
    /// Whole hours of history it rests on.
    pub hours: usize,
}

impl LoadHistory {
    /// Counts events that came at this log time. Times before the hour under way count in it: log time
    /// does not go back.
    pub fn add(&mut self, log_time: Time, events: u64) {
        self.reach(hour_of(log_time));
        let count = self.hours.back_mut().expect("reaching an hour made it");
        *count = count.saturating_add(events);
    }

    /// Adds another shard's history.
    pub fn merge(&mut self, other: &LoadHistory) {
        let Some(first) = other.first() else { return };
        self.reach(other.end);
        let mine = self.first().unwrap_or(self.end);
        let room = HOURS_MAX - self.hours.len();
        for _ in 0..room.min(usize::try_from(mine - first).unwrap_or(0)) {
            self.hours.push_front(0);
        }
        let mine = self.first().unwrap_or(self.end);
        for (hour, events) in (first..).zip(&other.hours) {
            let count = usize::try_from(hour - mine).ok().and_then(|at| self.hours.get_mut(at));
            if let Some(count) = count {
                *count = count.saturating_add(*events);
            }
        }
    }

    /// Makes `hour` the hour under way, if it is not behind.
    fn reach(&mut self, hour: i64) {
        if self.hours.is_empty() {
            (self.end, self.hours) = (hour, VecDeque::from([0]));
        }
        // Beyond what is kept, zeros would push out everything.
        if hour - self.end > HOURS_MAX as i64 {
            self.hours.clear();
            self.hours.resize(HOURS_MAX, 0);
            self.end = hour;
        }
        while self.end < hour {
            self.end += 1;
            self.hours.push_back(0);
        }
        let over = self.hours.len().saturating_sub(HOURS_MAX);
        self.hours.drain(..over);
    }

    fn first(&self) -> Option<i64> {
        (!self.hours.is_empty()).then(|| self.end + 1 - self.hours.len() as i64)
    }

    /// Events per second over the hour under way and the whole one before it, as of `now`.
    pub fn rate(&self, now: Time) -> f64 {
        let mut known = self.clone();
        known.reach(hour_of(now));
        let last: u64 = known.hours.iter().rev().take(2).fold(0, |sum, n| sum.saturating_add(*n));
        let began = if known.hours.len() > 1 { known.end - 1 } else { known.end };
        let seconds = (now.0 - began * HOUR).max(HOUR / 60) as f64 / 1e6;
        last as f64 / seconds
    }

    /// What will come in the hours after `now`, 1 to [`AHEAD_MAX`] of them (others are taken as the
    /// nearest). `quantile` is that of the upper figure, 0.5 to 1. Nothing without a whole hour of
    /// history.
    pub fn predict(&self, now: Time, ahead: usize, quantile: f64) -> Option<Prediction> {
        let ahead = ahead.clamp(1, AHEAD_MAX);
        let mut known = self.clone();
        known.reach(hour_of(now));
        // The hour under way is the first that is predicted.
        known.hours.pop_back();
        let past = Past::new(&known.hours);
        let hours = past.counts.len();
        if hours == 0 {
            return None;
        }
        let expected = (0..ahead).map(|at| past.expected(hours, hours + at));
        let peak = expected.fold(0.0, f64::max) / 3_600.0;
        Some(Prediction { peak, upper: peak * past.margin(ahead, quantile), hours })
    }
}

/// Whole hours, oldest first, with their running sums.
struct Past {
    counts: Vec<u64>,
    sums: Vec<f64>,
}

impl Past {
    fn new(hours: &VecDeque<u64>) -> Past {
        let counts: Vec<u64> = hours.iter().copied().collect();
        let mut sums = vec![0.0];
        for count in &counts {
            sums.push(sums.last().copied().unwrap_or(0.0) + *count as f64);
        }
        Past { counts, sums }
    }

    /// Events of the hours `from..to`.
    fn sum(&self, from: usize, to: usize) -> f64 {
        self.sums[to] - self.sums[from]
    }

    /// Events expected in hour `at`, by the hours before `known`, not after `at`.
    fn expected(&self, known: usize, at: usize) -> f64 {
        if let Some(expected) = self.as_before(known, at, WEEK) {
            return expected;
        }
        if let Some(expected) = self.as_before(known, at, DAY) {
            return expected;
        }
        let few = known.min(3);
        if few == 0 { 0.0 } else { self.sum(known - few, known) / few as f64 }
    }

    /// By the same hour of periods before, each scaled by the last day against its own.
    fn as_before(&self, known: usize, at: usize, period: usize) -> Option<f64> {
        let (mut weight, mut weights, mut total) = (1.0, 0.0, 0.0);
        // The first period back in which that hour is over.
        let first = (at + 1 - known.min(at + 1)).div_ceil(period).max(1);
        let mut back = first * period;
        while back <= at && weights < 10.0 {
            let like = at - back;
            // A whole day before, then and now.
            let scale = match known.checked_sub(back + DAY) {
                Some(from) => {
                    let (then, now) = (self.sum(from, from + DAY), self.sum(known - DAY, known));
                    if then > 0.0 { (now / then).clamp(1.0 / SCALE_MAX, SCALE_MAX) } else { 1.0 }
                }
                None => 1.0,
            };
            total += weight * scale * self.counts[like] as f64;
            weights += weight;
            weight *= FORGET;
            back += period;
        }
        (weights > 0.0).then(|| total / weights)
    }

    /// By how much to raise a prediction for the busiest of `ahead` hours, so that `quantile` of those
    /// of the past week would have been enough. At least 1.
    fn margin(&self, ahead: usize, quantile: f64) -> f64 {
        let hours = self.counts.len();
        let mut ratios = Vec::new();
        // As of `known`, when at least a day was.
        let begin = hours.saturating_sub(CHECKED_MAX + ahead).max(DAY);
        for known in begin..(hours + 1).saturating_sub(ahead).max(begin) {
            let window = known..known + ahead;
            let came = self.counts[window.clone()].iter().max().copied().unwrap_or(0) as f64;
            let expected = window.map(|at| self.expected(known, at)).fold(0.0, f64::max);
            if expected > 0.0 {
                ratios.push(came / expected);
            }
        }
        if ratios.len() < CHECKED_MIN {
            return MARGIN;
        }
        ratios.sort_unstable_by(f64::total_cmp);
        let at = (ratios.len() as f64 * quantile.clamp(0.5, 1.0)).ceil() as usize;
        ratios[at.clamp(1, ratios.len()) - 1].max(1.0)
    }
}

/// The history of one shard, counted once however often the shard is replayed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardLoad {
    /// Last usage position counted.
    position: u64,
    history: LoadHistory,
}

impl ShardLoad {
    /// Counts the events of a commit. One whose usage position was counted is not counted again.
    pub fn add(&mut self, usage_position: u64, log_time: Time, events: u64) {
        if usage_position > self.position {
            self.position = usage_position;
            self.history.add(log_time, events);
        }
    }

    /// Adds what another owner counted of the same shard, at other positions.
    pub fn merge(&mut self, other: &ShardLoad) {
        self.position = self.position.max(other.position);
        self.history.merge(&other.history);
    }

    /// Its history.
    pub fn history(&self) -> &LoadHistory {
        &self.history
    }
}

fn hour_of(time: Time) -> i64 {
    time.0.clamp(Time::MIN.0, Time::MAX.0 - 1) / HOUR
}

#[cfg(test)]
mod tests {
    use meterr_operators::rng::Rng;

    use super::*;

    fn at(hour: i64) -> Time {
        Time(491_000 * HOUR + hour * HOUR)
    }

    fn history(hours: &[u64]) -> LoadHistory {
        let mut history = LoadHistory::default();
        for (hour, events) in (0..).zip(hours) {
            history.add(at(hour), *events);
        }
        history
    }

    #[test]
    fn histories_of_shards_add_up_to_the_history_of_all() {
        for seed in 0..50 {
            let mut rng = Rng::stream(seed, 0);
            let mut shards = vec![LoadHistory::default(); 4];
            let mut all = LoadHistory::default();
            let mut hour = 0;
            for _ in 0..2_000 {
                let events = rng.below(1_000);
                shards[rng.below(4) as usize].add(at(hour), events);
                all.add(at(hour), events);
                hour += match rng.below(200) {
                    0 => 100,
                    1 => 3_000,
                    n => i64::from(n % 4 == 0),
                };
            }
            let mut merged = LoadHistory::default();
            for shard in &shards {
                merged.merge(shard);
            }
            assert_eq!(merged, all, "seed {seed}");
            let text = serde_json::to_string(&merged).unwrap();
            assert_eq!(serde_json::from_str::<LoadHistory>(&text).unwrap(), merged);
        }
    }

    #[test]
    fn what_is_no_history_is_refused() {
        let long = format!("{{\"end\":491000,\"hours\":[{}0]}}", "1,".repeat(HOURS_MAX));
        for text in [long.as_str(), r#"{"end":-1,"hours":[1]}"#, r#"{"end":1,"hours":[-1]}"#] {
            assert!(serde_json::from_str::<LoadHistory>(text).is_err(), "{text:.60}");
        }
        // The most that can stand in one.
        let most = format!("{{\"end\":491000,\"hours\":[{}]}}", vec![u64::MAX; 400].join_numbers());
        let mut history: LoadHistory = serde_json::from_str(&most).unwrap();
        history.merge(&history.clone());
        history.add(Time(491_001 * HOUR), u64::MAX);
        let predicted = history.predict(Time(491_002 * HOUR), 3, 0.95).unwrap();
        assert!(predicted.upper.is_finite(), "{predicted:?}");
    }

    trait JoinNumbers {
        fn join_numbers(&self) -> String;
    }

    impl JoinNumbers for Vec<u64> {
        fn join_numbers(&self) -> String {
            self.iter().map(u64::to_string).collect::<Vec<_>>().join(",")
        }
    }

    #[test]
    fn a_week_that_repeats_is_predicted_exactly() {
        let week: Vec<u64> = (0..168).map(|h| 3_600 * (10 + h % 24 * 5 + h / 24)).collect();
        let history = history(&week.repeat(3));
        for now in 0..168 {
            let mut known = history.clone();
            known.reach(hour_of(at(3 * 168)));
            for hour in 0..now {
                known.add(at(3 * 168 + hour), week[hour as usize]);
            }
            let predicted = known.predict(at(3 * 168 + now), 4, 0.95).unwrap();
            let came = (0..4).map(|n| week[((now + n) % 168) as usize]).max().unwrap();
            let came = came as f64 / 3_600.0;
            assert!(
                (predicted.peak - came).abs() < 1e-6 * came,
                "hour {now}: {predicted:?} {came}"
            );
            assert!(
                (predicted.upper - came).abs() < 1e-6 * came,
                "hour {now}: {predicted:?} {came}"
            );
        }
    }

    #[test]
    fn a_young_history_says_what_it_can() {
        assert_eq!(LoadHistory::default().predict(at(0), 4, 0.95), None);
        let mut history = LoadHistory::default();
        history.add(at(0), 7_200);
        assert_eq!(history.predict(at(0), 4, 0.95), None, "no whole hour");
        let predicted = history.predict(at(1), 4, 0.95).unwrap();
        assert_eq!((predicted.peak, predicted.upper, predicted.hours), (2.0, 2.0 * MARGIN, 1));
        // After a day, days stand in for weeks.
        let day: Vec<u64> = (0..24).map(|hour| 3_600 * (1 + hour % 24)).collect();
        let history = self::history(&day.repeat(3));
        let predicted = history.predict(at(72), 6, 0.95).unwrap();
        assert!((predicted.peak - 6.0).abs() < 1e-9, "{predicted:?}");
    }

    #[test]
    fn silence_counts_as_nothing_and_the_rate_is_that_of_now() {
        let mut history = LoadHistory::default();
        history.add(at(0), 3_600);
        history.add(at(1), 1_800);
        let half_past = Time(at(1).0 + HOUR / 2);
        assert_eq!(history.rate(half_past), 1.0);
        assert_eq!(history.rate(at(30)), 0.0);
        assert_eq!(history.predict(at(30), 1, 0.95).unwrap().peak, 0.0);
    }

    #[test]
    fn a_replayed_commit_counts_once() {
        let mut load = ShardLoad::default();
        for _ in 0..2 {
            for (position, events) in [(3, 10), (5, 20), (9, 5)] {
                load.add(position, at(0), events);
            }
        }
        assert_eq!(load.history(), &history(&[35]));
        let text = serde_json::to_string(&load).unwrap();
        assert_eq!(serde_json::from_str::<ShardLoad>(&text).unwrap(), load);
    }
}
