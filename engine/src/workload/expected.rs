//! The views a workload must lead to, by arithmetic of its own: integers in pico-dollars, days
//! counted by division, nothing of the engine's. What it writes is compared with the engine, so it
//! must not share its mistakes.
//!
//! # Files
//! `<dimensions>_<window>.csv` with the columns `key`, `events`, `input_tokens`,
//! `cached_input_tokens`, `output_tokens` and `cost`. The key is the names joined by `|`, the
//! window last (`2026-01`, `2026-01-02` or `2026-01-02T03:00:00Z`, UTC); rows ascend by the names,
//! one after the other. `cost` is USD as everywhere: a plain decimal without trailing zeros.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use jiff::ToSpan;
use jiff::civil::{Date, date};

use super::draw::{FEATURES, MODELS};
use super::usage::{Names, Usage};

/// The files written, without `.csv`.
pub const EXPECTED: [&str; 7] = [
    "org_hour",
    "org_day",
    "org_month",
    "user_day",
    "user_month",
    "org_model_day",
    "org_feature_day",
];

/// Figures of a row. 64 bits hold the cost of every workload in pico-dollars: one event costs below
/// 5 × 10¹⁰ (tested beside the trace), and there are at most 10⁸.
#[derive(Debug, Clone, Copy, Default)]
struct Sums {
    events: u32,
    input_tokens: u64,
    cached_input_tokens: u64,
    output_tokens: u64,
    cost_pico: u64,
}

impl Sums {
    fn add(&mut self, other: &Sums) {
        self.events += other.events;
        self.input_tokens += other.input_tokens;
        self.cached_input_tokens += other.cached_input_tokens;
        self.output_tokens += other.output_tokens;
        self.cost_pico += other.cost_pico;
    }
}

/// Rows by an index of what they are about, and hours or days since 1970 (or months since year 0).
type Rows = HashMap<(u32, u32), Sums>;

/// The views, built up event by event.
#[derive(Default)]
pub(super) struct Expected {
    org_hour: Rows,
    user_day: Rows,
    org_model_day: Rows,
    org_feature_day: Rows,
}

impl Expected {
    /// Counts what stands in the end under one id.
    pub(super) fn count(&mut self, usage: &Usage) {
        let model = MODELS[usage.model as usize];
        let (cached, fresh) =
            (u64::from(usage.cached), u64::from(usage.input) - u64::from(usage.cached));
        let output = u64::from(usage.output);
        let sums = Sums {
            events: 1,
            input_tokens: u64::from(usage.input),
            cached_input_tokens: cached,
            output_tokens: output,
            cost_pico: fresh * model.input + cached * model.cached_input + output * model.output,
        };
        let hour = (usage.time_ms / 3_600_000) as u32;
        let day = hour / 24;
        let models = MODELS.len() as u32;
        let features = FEATURES.len() as u32;
        let of_model = usage.org * models + model_rank(usage.model);
        let of_feature = usage.org * features + usage.feature;
        self.org_hour.entry((usage.org, hour)).or_default().add(&sums);
        self.user_day.entry((usage.user, day)).or_default().add(&sums);
        self.org_model_day.entry((of_model, day)).or_default().add(&sums);
        self.org_feature_day.entry((of_feature, day)).or_default().add(&sums);
    }

    /// Cost of everything counted, in USD.
    pub(super) fn cost(&self) -> String {
        usd(self.org_hour.values().map(|sums| sums.cost_pico).sum())
    }

    /// Writes the files into a directory. Returns the rows of each.
    pub(super) fn write(self, dir: &Path, names: &Names) -> io::Result<BTreeMap<String, u64>> {
        let org_day = roll_up(&self.org_hour, |hour| hour / 24);
        let org_month = roll_up(&org_day, month_of);
        let user_month = roll_up(&self.user_day, month_of);
        let models = MODELS.len() as u32;
        let features = FEATURES.len() as u32;
        let mut ranked: Vec<&str> = MODELS.iter().map(|model| model.name).collect();
        ranked.sort_unstable();

        let org = |i: u32| names.org(i);
        let user = |i: u32| format!("{}|{}", names.org(names.org_of(i)), names.user(i));
        let model = |i: u32| format!("{}|{}", names.org(i / models), ranked[(i % models) as usize]);
        let feature =
            |i: u32| format!("{}|{}", names.org(i / features), FEATURES[(i % features) as usize]);
        type Named<'a> = &'a dyn Fn(u32) -> String;
        type Window = fn(u32) -> String;
        let files: [(&Rows, Named<'_>, Window); 7] = [
            (&self.org_hour, &org, hour_text),
            (&org_day, &org, day_text),
            (&org_month, &org, month_text),
            (&self.user_day, &user, day_text),
            (&user_month, &user, month_text),
            (&self.org_model_day, &model, day_text),
            (&self.org_feature_day, &feature, day_text),
        ];
        let mut written = BTreeMap::new();
        for (name, (rows, named, window)) in EXPECTED.into_iter().zip(files) {
            let file = std::fs::File::create(dir.join(format!("{name}.csv")))?;
            let mut file = BufWriter::new(file);
            write_rows(&mut file, rows, named, window)?;
            file.flush()?;
            written.insert(name.to_owned(), rows.len() as u64);
        }
        Ok(written)
    }
}

fn write_rows(
    to: &mut impl Write,
    rows: &Rows,
    named: &dyn Fn(u32) -> String,
    window: fn(u32) -> String,
) -> io::Result<()> {
    writeln!(to, "key,events,input_tokens,cached_input_tokens,output_tokens,cost")?;
    // Indices ascend as the names do.
    let mut order: Vec<&(u32, u32)> = rows.keys().collect();
    order.sort_unstable();
    let mut windows: HashMap<u32, String> = HashMap::new();
    for key in order {
        let sums = rows[key];
        let name = named(key.0);
        let window = windows.entry(key.1).or_insert_with(|| window(key.1));
        writeln!(
            to,
            "{name}|{window},{},{},{},{},{}",
            sums.events,
            sums.input_tokens,
            sums.cached_input_tokens,
            sums.output_tokens,
            usd(sums.cost_pico)
        )?;
    }
    Ok(())
}

fn roll_up(rows: &Rows, window: fn(u32) -> u32) -> Rows {
    let mut rolled = Rows::new();
    for ((index, at), sums) in rows {
        rolled.entry((*index, window(*at))).or_default().add(sums);
    }
    rolled
}

/// Place of a model in the order of their names.
fn model_rank(model: u32) -> u32 {
    let name = MODELS[model as usize].name;
    MODELS.iter().filter(|other| other.name < name).count() as u32
}

fn date_of(day: u32) -> Date {
    date(1970, 1, 1) + i64::from(day).days()
}

fn month_of(day: u32) -> u32 {
    let date = date_of(day);
    date.year().unsigned_abs() as u32 * 12 + u32::from(date.month().unsigned_abs()) - 1
}

fn hour_text(hour: u32) -> String {
    format!("{}T{:02}:00:00Z", date_of(hour / 24), hour % 24)
}

fn day_text(day: u32) -> String {
    date_of(day).to_string()
}

fn month_text(month: u32) -> String {
    format!("{:04}-{:02}", month / 12, month % 12 + 1)
}

/// Pico-dollars as USD.
pub(super) fn usd(pico: u64) -> String {
    decimal(pico, 12)
}

/// `value` / 10^`decimals`, without trailing zeros.
pub(super) fn decimal(value: u64, decimals: u32) -> String {
    let one = 10_u64.pow(decimals);
    let mut text = (value / one).to_string();
    let rest = value % one;
    if rest > 0 {
        let width = decimals as usize;
        write!(text, ".{rest:0width$}").expect("writing to a string cannot fail");
        text.truncate(text.trim_end_matches('0').len());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_plain() {
        assert_eq!(usd(0), "0");
        assert_eq!(usd(73_500_000), "0.0000735");
        assert_eq!(usd(10_000_000_000_000), "10");
        assert_eq!(usd(1), "0.000000000001");
        assert_eq!(decimal(2_500_000, 6), "2.5");
    }

    #[test]
    fn windows_are_named_as_in_answers() {
        // 1,767,323,045 s is 2026-01-02T03:04:05Z.
        let hour = 1_767_323_045 / 3_600;
        assert_eq!(hour_text(hour), "2026-01-02T03:00:00Z");
        assert_eq!(day_text(hour / 24), "2026-01-02");
        assert_eq!(month_text(month_of(hour / 24)), "2026-01");
        assert_eq!(month_text(month_of(hour / 24 - 2)), "2025-12");
    }
}
