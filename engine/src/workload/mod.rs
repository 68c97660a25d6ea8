//! Workloads with the views they must lead to: what `meterr gen` writes, and what benches and
//! end-to-end tests feed and compare with.
//!
//! Events follow Zipf's law over orgs and over the users in an org; token counts are those of a
//! real trace; some events are late, sent twice, corrected or taken back, at times before what they
//! correct has arrived. The figures expected are computed beside, by code that shares nothing with
//! the engine.
//!
//! # Files
//! `events.ndjson` (native JSON, in the order to be sent), `prices.json` (a price book, to be
//! imported first), `expected/*.csv` (described in `expected.rs`), `workload.json`: options, counts
//! and the number of rows of each view. An existing `workload.json` is removed first and the new
//! one written last, so a directory with one is complete, whatever was interrupted before.
//!
//! # Limits
//! The same options give the same bytes, on every machine. Memory goes by the rows of the views (up
//! to one per user and day) and by the lines waiting to be sent again, not by the events. All
//! windows are in UTC. Events are in the past of any log started after the last of them; a
//! deployment takes them as long as it has forgotten no ids yet (or by backfill).

mod draw;
mod expected;
mod usage;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use indicatif::ProgressBar;
use meterr_operators::time::{DAY, Time};
use serde::{Deserialize, Serialize};
use serde_json::json;

pub use expected::EXPECTED;

use draw::MODELS;
use expected::{Expected, decimal};
use usage::Source;

/// Most ids of a workload: sums are proved to fit 64 bits for so many.
pub const EVENTS_MAX: u64 = 100_000_000;
/// Most orgs.
pub const ORGS_MAX: u32 = 100_000;
/// Most users.
pub const USERS_MAX: u32 = 10_000_000;
/// Most days.
pub const DAYS_MAX: u32 = 3_660;

/// What a workload is like. Shares are in parts per million of the ids.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Ids; the lines are a little more.
    pub events: u64,
    /// Everything random comes from it.
    pub seed: u64,
    /// Orgs.
    pub orgs: u32,
    /// Users of all orgs together; every org has at least one.
    pub users: u32,
    /// Exponent of Zipf's law over orgs and users.
    pub zipf: f64,
    /// First instant.
    pub start: Time,
    /// Days the events are spread over.
    pub days: u32,
    /// Events older than those around them.
    pub late_ppm: u32,
    /// By how many hours, at most.
    pub late_hours_max: u32,
    /// Events sent a second time.
    pub duplicate_ppm: u32,
    /// Events corrected by a revision with other tokens, user, model or time.
    pub correction_ppm: u32,
    /// Events taken back.
    pub void_ppm: u32,
    /// How many ids later the second line of an id is sent, at most.
    pub resend_distance_max: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            events: 100_000,
            seed: 1,
            orgs: 1_000,
            users: 100_000,
            zipf: 1.1,
            // 2026-01-01T00:00:00Z.
            start: Time(20_454 * DAY),
            days: 60,
            late_ppm: 20_000,
            late_hours_max: 72,
            duplicate_ppm: 10_000,
            correction_ppm: 5_000,
            void_ppm: 2_000,
            resend_distance_max: 50_000,
        }
    }
}

impl Options {
    fn check(&self) -> Result<(), GenerateError> {
        let wrong = |what: String| Err(GenerateError::Option(what));
        let ranges = [
            ("events", self.events, 1, EVENTS_MAX),
            ("orgs", self.orgs.into(), 1, ORGS_MAX.into()),
            ("users", self.users.into(), 1, USERS_MAX.into()),
            ("days", self.days.into(), 1, DAYS_MAX.into()),
            ("late_ppm", self.late_ppm.into(), 0, 1_000_000),
            ("late_hours_max", self.late_hours_max.into(), 0, 24 * u64::from(DAYS_MAX)),
            ("duplicate_ppm", self.duplicate_ppm.into(), 0, 1_000_000),
            ("correction_ppm", self.correction_ppm.into(), 0, 1_000_000),
            ("void_ppm", self.void_ppm.into(), 0, 1_000_000),
            ("resend_distance_max", self.resend_distance_max, 1, 1_000_000),
        ];
        for (name, value, min, max) in ranges {
            if !(min..=max).contains(&value) {
                return wrong(format!("{name} is {value}; it must be between {min} and {max}"));
            }
        }
        if !(0.0..=4.0).contains(&self.zipf) {
            return wrong(format!("zipf is {}; it must be between 0 and 4", self.zipf));
        }
        let last = self.start.0.saturating_add(i64::from(self.days) * DAY);
        if self.start < Time::MIN || last > Time::MAX.0 {
            let (start, days) = (self.start, self.days);
            return wrong(format!("start {start} and {days} days must lie between 1970 and 2200"));
        }
        Ok(())
    }
}

/// What was written.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Lines of `events.ndjson`.
    pub lines: u64,
    /// Its size.
    pub bytes: u64,
    /// Ids.
    pub events: u64,
    /// Ids that count in the end: all but those taken back.
    pub events_counted: u64,
    /// Late ids.
    pub late: u64,
    /// Ids sent twice.
    pub duplicates: u64,
    /// Ids corrected.
    pub corrections: u64,
    /// Ids taken back.
    pub voids: u64,
    /// Ids whose last version is sent first.
    pub out_of_order: u64,
    /// Cost of everything that counts, in USD.
    pub cost: String,
    /// Rows of each view.
    pub rows: BTreeMap<String, u64>,
}

/// Why no workload was written.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// An option is out of its range.
    #[error("{0}")]
    Option(String),
    /// Writing failed; the directory holds no complete workload.
    #[error("workload in {dir:?} not written")]
    Io {
        /// The directory.
        dir: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Writes a workload into a directory, which is created. `progress` is advanced by ids; pass
/// [`ProgressBar::hidden`] for none.
///
/// # Errors
/// When an option is out of its range, or writing fails.
pub fn generate(
    options: &Options,
    out_dir: &Path,
    progress: &ProgressBar,
) -> Result<Summary, GenerateError> {
    options.check()?;
    write_all(options, out_dir, progress)
        .map_err(|source| GenerateError::Io { dir: out_dir.to_owned(), source })
}

fn write_all(options: &Options, dir: &Path, progress: &ProgressBar) -> io::Result<Summary> {
    let expected_dir = dir.join("expected");
    fs::create_dir_all(&expected_dir)?;
    match fs::remove_file(dir.join("workload.json")) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let source = Source::new(options);
    let mut expected = Expected::default();
    let mut summary = Summary { events: options.events, ..Summary::default() };
    progress.set_length(options.events);

    let mut lines = Lines {
        file: BufWriter::with_capacity(1 << 20, File::create(dir.join("events.ndjson"))?),
        waiting: BinaryHeap::new(),
        lines: 0,
        bytes: 0,
    };
    let mut text = String::new();
    for n in 0..options.events {
        lines.send_due(n)?;
        let plan = source.plan(n);
        for version in &plan.versions {
            text.clear();
            source.render(&plan, version, &mut text);
            if version.delay == 0 {
                lines.send(&text)?;
            } else {
                lines.waiting.push(Reverse((n + version.delay, n, text.clone())));
            }
        }
        if let Some(usage) = &plan.counted {
            expected.count(usage);
            summary.events_counted += 1;
        }
        summary.late += u64::from(plan.late);
        summary.duplicates += u64::from(plan.duplicated);
        summary.corrections += u64::from(plan.corrected);
        summary.voids += u64::from(plan.voided);
        summary.out_of_order += u64::from(plan.out_of_order);
        if n % 1_024 == 0 {
            progress.set_position(n);
        }
    }
    lines.send_due(u64::MAX)?;
    lines.file.flush()?;
    (summary.lines, summary.bytes) = (lines.lines, lines.bytes);
    summary.cost = expected.cost();
    summary.rows = expected.write(&expected_dir, &source.names)?;
    write_json(&dir.join("prices.json"), &prices())?;
    write_json(
        &dir.join("workload.json"),
        &json!({"format": 1, "options": options, "summary": summary}),
    )?;
    progress.finish_and_clear();
    Ok(summary)
}

/// The lines, in the order to be sent.
struct Lines {
    file: BufWriter<File>,
    /// By the id they are to be sent before, then by their own: lines to be sent later.
    waiting: BinaryHeap<Reverse<(u64, u64, String)>>,
    lines: u64,
    bytes: u64,
}

impl Lines {
    fn send(&mut self, line: &str) -> io::Result<()> {
        self.lines += 1;
        self.bytes += line.len() as u64;
        self.file.write_all(line.as_bytes())
    }

    /// Sends what is due before id `n`.
    fn send_due(&mut self, n: u64) -> io::Result<()> {
        while self.waiting.peek().is_some_and(|Reverse((due, _, _))| *due <= n) {
            if let Some(Reverse((_, _, line))) = self.waiting.pop() {
                self.send(&line)?;
            }
        }
        Ok(())
    }
}

/// The price book, in USD per million tokens: pico-dollars a token divided by a million.
fn prices() -> serde_json::Value {
    let entries = MODELS.iter().map(|model| {
        json!({
            "provider": model.provider,
            "model": model.name,
            "input": decimal(model.input, 6),
            "cached_input": decimal(model.cached_input, 6),
            "output": decimal(model.output, 6),
        })
    });
    json!({"prices": entries.collect::<Vec<_>>()})
}

fn write_json(path: &Path, value: &serde_json::Value) -> io::Result<()> {
    let mut text = serde_json::to_vec_pretty(value).map_err(io::Error::other)?;
    text.push(b'\n');
    fs::write(path, text)
}
