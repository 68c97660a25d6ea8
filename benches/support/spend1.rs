//! SPEND-1: a million usage events of 1,000 orgs and 16 models over 60 days, with the exact views
//! they must lead to. 1 % of the events are sent twice, 2 % arrive up to three days late.
//!
//! The file is made by `benches/spend1/make` and not kept in the repository.

use std::collections::HashMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use meterr_operators::price_book::{Price, PriceEntry};
use meterr_operators::time::{Time, civil_from_days};

/// Lines fed before an epoch closes.
pub const STEP: usize = 10_000;

/// Provider, model, and pico-dollars a token: input, cached input, output.
pub const MODELS: [(&str, &str, [i64; 3]); 16] = [
    ("openai", "gpt-4o", [2_500_000, 1_250_000, 10_000_000]),
    ("openai", "gpt-4o-mini", [150_000, 75_000, 600_000]),
    ("openai", "gpt-5", [1_250_000, 125_000, 10_000_000]),
    ("openai", "gpt-5-mini", [250_000, 25_000, 2_000_000]),
    ("openai", "gpt-4.1", [2_000_000, 500_000, 8_000_000]),
    ("openai", "gpt-4.1-mini", [400_000, 100_000, 1_600_000]),
    ("openai", "o3", [2_000_000, 500_000, 8_000_000]),
    ("openai", "o4-mini", [1_100_000, 275_000, 4_400_000]),
    ("anthropic", "claude-sonnet-4-5", [3_000_000, 300_000, 15_000_000]),
    ("anthropic", "claude-haiku-4-5", [1_000_000, 100_000, 5_000_000]),
    ("google", "gemini-2.5-pro", [1_250_000, 125_000, 10_000_000]),
    ("google", "gemini-2.5-flash", [300_000, 30_000, 2_500_000]),
    ("mistral", "mistral-large-latest", [500_000, 50_000, 1_500_000]),
    ("deepseek", "deepseek-chat", [280_000, 28_000, 420_000]),
    ("openai", "text-embedding-3-small", [20_000, 20_000, 0]),
    ("openai", "text-embedding-3-large", [130_000, 130_000, 0]),
];

/// The model whose price is halved afterwards, and from when.
pub const REPRICED: &str = "gpt-4o-mini";
/// First instant of the new price.
pub const REPRICED_FROM: &str = "2026-01-15T00:00:00Z";
/// The same as days since 1970.
pub const REPRICED_DAY: u32 = 20_468;

/// The price book of SPEND-1.
pub fn prices() -> Vec<PriceEntry> {
    MODELS.iter().map(|(provider, model, pico)| entry(provider, model, *pico)).collect()
}

/// The retroactive price change.
pub fn halved() -> PriceEntry {
    let (provider, model, pico) =
        MODELS.iter().find(|(_, model, _)| *model == REPRICED).expect("it is in the list");
    let from = Time::parse(REPRICED_FROM).expect("it is RFC 3339");
    PriceEntry { effective_from: Some(from), ..entry(provider, model, pico.map(|p| p / 2)) }
}

fn entry(provider: &str, model: &str, pico: [i64; 3]) -> PriceEntry {
    // Pico-dollars a token are micro-dollars per million tokens.
    let price = |pico: i64| {
        let text = format!("{}.{:06}", pico / 1_000_000, pico % 1_000_000);
        Some(Price::per_million(&text).expect("digits with a point are a price"))
    };
    PriceEntry {
        provider: provider.to_owned(),
        model: model.to_owned(),
        input: price(pico[0]),
        cached_input: price(pico[1]),
        output: price(pico[2]),
        ..PriceEntry::default()
    }
}

/// The events, from `METERR_SPEND1` or where the generator puts them.
///
/// # Errors
/// When they are not there; the message says how to make them.
pub fn path() -> Result<PathBuf> {
    let path = std::env::var_os("METERR_SPEND1").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("target/spend1/events.ndjson"),
        PathBuf::from,
    );
    if !path.exists() {
        bail!(
            "{} does not exist; make it with benches/spend1/make, or set METERR_SPEND1",
            path.display()
        );
    }
    Ok(path)
}

/// What a view shows for one key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Figures {
    /// Events.
    pub events: i64,
    /// Input tokens, cached ones included.
    pub input: i64,
    /// Cached input tokens.
    pub cached: i64,
    /// Output tokens.
    pub output: i64,
    /// Cost in atto-dollars.
    pub cost: i128,
}

/// Rows of a view by key: `org|user|2026-01`, `org|model|2026-01-31`, `org|2026-01`.
pub type Rows = HashMap<String, Figures>;

/// The three views of SPEND-1.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Views {
    /// Users by month.
    pub user_month: Rows,
    /// Models of an org by day.
    pub org_model_day: Rows,
    /// Orgs by month.
    pub org_month: Rows,
}

impl Views {
    /// The rows expected of the file of events, which lie beside it.
    ///
    /// # Errors
    /// When one of the files is missing or not what the generator writes.
    pub fn expected(events: &Path) -> Result<Views> {
        Ok(Views {
            user_month: rows(&events.with_file_name("user_month.csv"))?,
            org_model_day: rows(&events.with_file_name("org_model_day.csv"))?,
            org_month: rows(&events.with_file_name("org_month.csv"))?,
        })
    }

    /// Compares every row by value.
    ///
    /// # Errors
    /// Names the first view, key and figures that differ.
    pub fn check(&self, expected: &Views) -> Result<()> {
        for (view, found, wanted) in [
            ("user_month", &self.user_month, &expected.user_month),
            ("org_model_day", &self.org_model_day, &expected.org_model_day),
            ("org_month", &self.org_month, &expected.org_month),
        ] {
            let key = found.keys().chain(wanted.keys()).find(|k| found.get(*k) != wanted.get(*k));
            if let Some(key) = key {
                bail!("{view}, {key:?}: {:?} instead of {:?}", found.get(key), wanted.get(key));
            }
        }
        Ok(())
    }
}

fn rows(path: &Path) -> Result<Rows> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("{} cannot be read", path.display()))?;
    let mut rows = Rows::new();
    for line in text.lines().skip(1) {
        let fields: Vec<&str> = line.split(',').collect();
        let [key, events, input, cached, output, pico] = fields[..] else {
            bail!("{}: {line:?} has not six fields", path.display());
        };
        let figures = Figures {
            events: events.parse()?,
            input: input.parse()?,
            cached: cached.parse()?,
            output: output.parse()?,
            cost: pico.parse::<i128>()? * 1_000_000,
        };
        rows.insert(key.to_owned(), figures);
    }
    Ok(rows)
}

/// `2026-01-31` of a day since 1970.
pub fn day_text(day: u32) -> String {
    let (year, month, date) = civil_from_days(i64::from(day));
    format!("{year:04}-{month:02}-{date:02}")
}

/// `2026-01` of a month since 1970-01.
pub fn month_text(month: u32) -> String {
    format!("{:04}-{:02}", 1970 + month / 12, month % 12 + 1)
}

/// Ends of the steps of a text of lines.
pub fn steps(text: &[u8], lines: usize) -> Vec<&[u8]> {
    let mut steps = Vec::new();
    let (mut start, mut seen) = (0, 0);
    for end in memchr::memchr_iter(b'\n', text) {
        seen += 1;
        if seen % lines == 0 {
            steps.push(&text[start..=end]);
            start = end + 1;
        }
    }
    if start < text.len() {
        steps.push(&text[start..]);
    }
    steps
}

/// The first lines of a text.
pub fn first_lines(text: &[u8], lines: usize) -> &[u8] {
    let mut ends = memchr::memchr_iter(b'\n', text);
    let end = lines.checked_sub(1).map(|before| ends.nth(before));
    match end {
        None => &[],
        Some(end) => &text[..end.map_or(text.len(), |end| end + 1)],
    }
}

/// Lines of a text.
pub fn lines(text: &[u8]) -> usize {
    memchr::memchr_iter(b'\n', text).count()
}

/// The events once more as other events: ids end in the number of the repetition, days are moved by
/// 59 days each.
///
/// # Errors
/// When the text is not in the form of SPEND-1.
pub fn repetition(text: &[u8], number: usize) -> Result<Vec<u8>> {
    const ID_END: usize = 27;
    const DATE: usize = 37;
    let mut copy = text.to_vec();
    let mut start = 0;
    for end in memchr::memchr_iter(b'\n', text) {
        let line = &mut copy[start..end];
        start = end + 1;
        if line.get(ID_END..DATE) != Some(br#"","time":""#) {
            bail!("a line is not in the form of SPEND-1");
        }
        let mut id = [0; 4];
        write_ascii(&mut id, format_args!("{:04x}", number + 1));
        line[ID_END - 4..ID_END].copy_from_slice(&id);
        let date = std::str::from_utf8(&line[DATE..DATE + 10])?;
        let midnight = Time::parse(&format!("{date}T00:00:00Z")).ok().context("a date")?;
        let day = (midnight.0 / 86_400_000_000) as u32 + 59 * number as u32;
        line[DATE..DATE + 10].copy_from_slice(day_text(day).as_bytes());
    }
    Ok(copy)
}

fn write_ascii(to: &mut [u8], text: std::fmt::Arguments<'_>) {
    let mut all = String::new();
    // Writing to a string cannot fail.
    let _ = all.write_fmt(text);
    to.copy_from_slice(&all.as_bytes()[..to.len()]);
}

/// A small workload of the same form, from a fixed sequence, for checks.
pub fn small(events: usize) -> Vec<u8> {
    let mut random = meterr_operators::rng::Rng::new(1);
    let mut below = |n: u64| random.below(n);
    let mut lines: Vec<String> = Vec::with_capacity(events + events / 50);
    for event in 0..events {
        let (_, model, _) = MODELS[below(16) as usize];
        let provider = MODELS.iter().find(|(_, m, _)| *m == model).map_or("", |(p, ..)| p);
        let (org, user) = (below(20), below(10));
        let input = below(4_000);
        let cached = if below(10) < 3 { below(input + 1) } else { 0 };
        let line = format!(
            concat!(
                r#"{{"id":"{:016x}0001","time":"{}T{:02}:{:02}:{:02}.{:03}Z","org":"org_{:04}","#,
                r#""user":"u{:04}_{:05}","provider":"{}","model":"{}","feature":"chat","#,
                r#""input_tokens":{},"cached_input_tokens":{},"output_tokens":{}}}"#,
            ),
            (event as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15),
            day_text(20_454 + (event * 59 / events) as u32),
            below(24),
            below(60),
            below(60),
            below(1_000),
            org,
            org,
            user,
            provider,
            model,
            input,
            cached,
            below(800),
        );
        lines.push(line);
        if below(50) == 0 {
            let again = below(lines.len() as u64) as usize;
            lines.push(lines[again].clone());
        }
    }
    lines.iter().flat_map(|line| line.bytes().chain([b'\n'])).collect()
}
