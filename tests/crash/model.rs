//! What must come out, recomputed from what was sent: the highest revision of each id, priced by the
//! last price for its time, summed by days of the org's zone. No deltas, no positions; sums of
//! integers in maps of text.

use std::collections::BTreeMap;

use meterr_operators::time::{DAY, HOUR, Time};
use serde_json::Value;

use crate::support::Server;
use crate::support::money::{per_million, pico};

/// Orgs; the first two have most of the events. Of four shards each has one.
pub const ORGS: [&str; 5] = ["acme", "globex", "initech", "umbrella", "prestige"];
/// Models, all of one provider of ours.
pub const MODELS: [&str; 3] = ["small", "medium", "large"];
/// Zones without summer time, so that their days can be had by arithmetic. Zones with it are tested
/// where the calendar is.
pub const ZONES: [(&str, i64, &str); 4] = [
    ("UTC", 0, "Z"),
    ("Asia/Kolkata", 330, "+05:30"),
    ("Asia/Tokyo", 540, "+09:00"),
    ("America/Phoenix", -420, "-07:00"),
];
/// First instant of events: 2026-03-01.
pub const START: Time = Time(20_513 * DAY);

/// One version of an event.
#[derive(Debug, Clone, PartialEq)]
pub struct Version {
    pub revision: u32,
    /// The first version's time.
    pub original: Time,
    pub time: Time,
    pub org: usize,
    pub user: u64,
    pub model: usize,
    pub feature: u64,
    pub input: i64,
    pub cached: i64,
    pub output: i64,
    pub void: bool,
}

impl Version {
    /// As a line of the native format.
    pub fn line(&self, id: &str) -> String {
        let Version { revision, original, time, user, input, cached, output, .. } = self;
        let org = ORGS[self.org];
        if self.void {
            return format!(
                "{{\"id\":\"{id}\",\"time\":\"{time}\",\"org\":\"{org}\",\"revision\":{revision},\
                 \"original_time\":\"{original}\",\"void\":true}}\n"
            );
        }
        let corrected = match revision {
            0 => String::new(),
            _ => format!(",\"revision\":{revision},\"original_time\":\"{original}\""),
        };
        format!(
            "{{\"id\":\"{id}\",\"time\":\"{time}\",\"org\":\"{org}\",\"user\":\"u{user}\",\
             \"provider\":\"tests\",\"model\":\"{}\",\"feature\":\"f{}\",\"input_tokens\":{input},\
             \"cached_input_tokens\":{cached},\"output_tokens\":{output}{corrected}}}\n",
            MODELS[self.model], self.feature
        )
    }
}

/// Prices in pico-dollars a token: input, cached input, output.
pub type Rates = [i128; 3];

/// Everything that was sent and acknowledged.
#[derive(Debug, Default)]
pub struct Model {
    /// Highest revision by org and id.
    pub events: BTreeMap<(usize, String), Version>,
    /// By model, from when; the last change of a key counts.
    pub prices: BTreeMap<(usize, Time), Rates>,
    /// Index into [`ZONES`] by org.
    pub zones: BTreeMap<usize, usize>,
}

/// Events, input, cached, output, pico-dollars of the priced, unpriced events.
type Sums = [i128; 6];
/// (window start, key) → sums.
type Rows = BTreeMap<(Option<String>, Option<String>), Sums>;

impl Model {
    /// Takes in a version that was acknowledged.
    pub fn sent(&mut self, id: &str, version: &Version) {
        let key = (version.org, id.to_owned());
        match self.events.get(&key) {
            Some(known) if known.revision >= version.revision => {}
            _ => drop(self.events.insert(key, version.clone())),
        }
    }

    /// Events that count.
    pub fn events_counted(&self) -> u64 {
        self.events.values().filter(|version| !version.void).count() as u64
    }

    fn rates(&self, model: usize, time: Time) -> Option<Rates> {
        let (_, rates) =
            self.prices.range(..=(model, time)).next_back().filter(|(k, _)| k.0 == model)?;
        Some(*rates)
    }

    fn day(&self, org: usize, time: Time) -> String {
        let (_, minutes, suffix) = ZONES[self.zones.get(&org).copied().unwrap_or(0)];
        let local = time.0 + minutes * (HOUR / 60);
        let text = Time(local - local.rem_euclid(DAY)).to_string();
        text.replace('Z', suffix)
    }

    fn expected(&self, org: usize, window: &str, by: &str) -> Rows {
        let mut rows = Rows::new();
        for ((of, _), v) in self.events.iter().filter(|(_, version)| !version.void) {
            if *of != org {
                continue;
            }
            let start = match window {
                "hour" => Some(Time(v.time.0 - v.time.0.rem_euclid(HOUR)).to_string()),
                "day" => Some(self.day(org, v.time)),
                "month" => Some(format!(
                    "{}01{}",
                    &self.day(org, v.time)[..8],
                    &self.day(org, v.time)[10..]
                )),
                _ => None,
            };
            let key = match by {
                "user" => Some(format!("u{}", v.user)),
                "model" => Some(MODELS[v.model].to_owned()),
                "feature" => Some(format!("f{}", v.feature)),
                "provider" => Some("tests".to_owned()),
                _ => None,
            };
            let sums = rows.entry((start, key)).or_default();
            let counts = [1, v.input.into(), v.cached.into(), v.output.into()];
            for (sum, count) in sums.iter_mut().zip(counts) {
                *sum += count;
            }
            match self.rates(v.model, v.time) {
                Some([input, cached, output]) => {
                    sums[4] += input * i128::from(v.input - v.cached)
                        + cached * i128::from(v.cached)
                        + output * i128::from(v.output);
                }
                None => sums[5] += 1,
            }
        }
        rows
    }

    /// Compares every view of every org with what must come out, once a position is counted.
    pub fn check(&self, server: &Server, at: &str) {
        for (number, org) in ORGS.iter().enumerate() {
            for (window, by) in [
                ("hour", "none"),
                ("day", "none"),
                ("month", "none"),
                ("all", "none"),
                ("day", "user"),
                ("month", "user"),
                ("day", "model"),
                ("month", "model"),
                ("day", "feature"),
                ("month", "feature"),
                ("hour", "user"),
                ("all", "provider"),
            ] {
                let path = format!(
                    "/v1/orgs/{org}/spend?window={window}&by={by}&limit=10000&min_position={at}"
                );
                let found: Rows = server.rows(&path).iter().map(row).collect();
                let expected = self.expected(number, window, by);
                for (key, sums) in &expected {
                    assert_eq!(found.get(key), Some(sums), "{org} by {by} and {window}: {key:?}");
                }
                for key in found.keys() {
                    assert!(
                        expected.contains_key(key),
                        "{org} by {by} and {window}: {key:?} is no row"
                    );
                }
            }
        }
    }
}

fn row(row: &Value) -> ((Option<String>, Option<String>), Sums) {
    let text = |name: &str| row[name].as_str().map(str::to_owned);
    let count = |name: &str| i128::from(row[name].as_i64().unwrap());
    let cost = match row["cost"].as_str() {
        Some(cost) => pico(cost),
        // Nothing in the row is priced.
        None => {
            assert_eq!(row["events"], row["unpriced_events"], "{row}");
            0
        }
    };
    let sums = [
        count("events"),
        count("input_tokens"),
        count("cached_input_tokens"),
        count("output_tokens"),
        cost,
        count("unpriced_events"),
    ];
    ((text("window_start"), text("key")), sums)
}

/// A price entry as `POST /v1/prices` takes it.
pub fn entry(model: usize, from: Time, [input, cached, output]: Rates) -> Value {
    serde_json::json!({
        "provider": "tests",
        "model": MODELS[model],
        "effective_from": from.to_string(),
        "input": per_million(input),
        "cached_input": per_million(cached),
        "output": per_million(output),
    })
}
