//! The floor: what a good engineer writes by hand for SPEND-1's three views and nothing more.
//!
//! One thread, serde_json, interned names, foldhash maps, a set of ids, rows counted as changed once
//! a step. Nothing is durable, nothing can be taken back, no price can change afterwards without
//! reading everything again. It shows what the job itself costs, and what the abilities of the
//! dataflow cost on top. Being independent of it, it also says what the views must be.

use anyhow::{Context, Result};
use foldhash::fast::RandomState;
use hashbrown::{HashMap, HashSet};
use serde::Deserialize;

use super::spend1::{Figures, MODELS, REPRICED, Views, day_text, month_text};

#[derive(Deserialize)]
struct Line<'a> {
    id: &'a str,
    time: &'a str,
    org: &'a str,
    user: &'a str,
    model: &'a str,
    input_tokens: u32,
    cached_input_tokens: u32,
    output_tokens: u32,
}

#[derive(Default)]
struct Row {
    figures: Figures,
    /// Step at which it was counted as changed.
    step: u32,
}

type Table = HashMap<(u32, u32), Row, RandomState>;

/// All state.
#[derive(Default)]
pub struct Floor {
    /// From this day on the price of [`REPRICED`] is half.
    halved_from: Option<u32>,
    /// Ids with their org in the upper bits.
    ids: HashSet<u128, RandomState>,
    orgs: HashMap<Box<str>, u32, RandomState>,
    org_names: Vec<Box<str>>,
    /// By org: user names to numbers.
    users: Vec<HashMap<Box<str>, u32, RandomState>>,
    user_names: Vec<(u32, Box<str>)>,
    models: HashMap<&'static str, u32, RandomState>,
    user_month: Table,
    org_model_day: Table,
    org_month: Table,
    step: u32,
    changed: Vec<(u8, u32, u32)>,
}

/// What a run did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Done {
    /// Rows changed, each once a step.
    pub changed: u64,
    /// Sum over the changed rows of what they show, so that output is looked at and comparable.
    pub checksum: u64,
}

impl Done {
    /// Takes in one changed row.
    #[inline]
    pub fn row(&mut self, events: i64, cost: i128) {
        self.changed += 1;
        let mixed = (events as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ cost as u64;
        self.checksum = self.checksum.wrapping_add(mixed);
    }
}

impl Floor {
    /// Nothing yet; with `halved_from` (a day since 1970) prices are those after the change.
    pub fn new(halved_from: Option<u32>) -> Floor {
        let models = MODELS.iter().zip(0..).map(|((_, model, _), n)| (*model, n)).collect();
        Floor { halved_from, models, ..Floor::default() }
    }

    /// Takes in the lines of a step.
    ///
    /// # Errors
    /// When a line is not in the form of SPEND-1.
    pub fn step(&mut self, text: &[u8], done: &mut Done) -> Result<()> {
        self.step += 1;
        for line in text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()) {
            self.line(serde_json::from_slice(line)?)?;
        }
        for (table, member, window) in self.changed.drain(..) {
            let table = match table {
                0 => &self.user_month,
                1 => &self.org_model_day,
                _ => &self.org_month,
            };
            if let Some(Row { figures, .. }) = table.get(&(member, window)) {
                done.row(figures.events, figures.cost);
            }
        }
        Ok(())
    }

    fn line(&mut self, line: Line<'_>) -> Result<()> {
        let org = match self.orgs.get(line.org) {
            Some(org) => *org,
            None => {
                let org = self.org_names.len() as u32;
                self.orgs.insert(line.org.into(), org);
                self.org_names.push(line.org.into());
                self.users.push(HashMap::default());
                org
            }
        };
        let id = u128::from_str_radix(line.id, 16)?;
        if !self.ids.insert(u128::from(org) << 96 | id) {
            return Ok(());
        }
        let users = &mut self.users[org as usize];
        let user = match users.get(line.user) {
            Some(user) => *user,
            None => {
                let user = self.user_names.len() as u32;
                users.insert(line.user.into(), user);
                self.user_names.push((org, line.user.into()));
                user
            }
        };
        let model = *self.models.get(line.model).context("a model of SPEND-1")?;
        let (day, month) = day_and_month(line.time).context("a time of SPEND-1")?;
        let mut price = MODELS[model as usize].2;
        if self.halved_from.is_some_and(|from| day >= from) && MODELS[model as usize].1 == REPRICED
        {
            price = price.map(|p| p / 2);
        }
        let [input, cached, output] =
            [line.input_tokens, line.cached_input_tokens, line.output_tokens].map(i64::from);
        let pico = (input - cached) * price[0] + cached * price[1] + output * price[2];
        let figures =
            Figures { events: 1, input, cached, output, cost: i128::from(pico) * 1_000_000 };
        for (table, rows, member, window) in [
            (0, &mut self.user_month, user, month),
            (1, &mut self.org_model_day, org << 8 | model, day),
            (2, &mut self.org_month, org, month),
        ] {
            let row = rows.entry((member, window)).or_default();
            let sum = &mut row.figures;
            sum.events += figures.events;
            sum.input += figures.input;
            sum.cached += figures.cached;
            sum.output += figures.output;
            sum.cost += figures.cost;
            if row.step != self.step {
                row.step = self.step;
                self.changed.push((table, member, window));
            }
        }
        Ok(())
    }

    /// The views, by name.
    pub fn views(&self) -> Views {
        let mut views = Views::default();
        let org = |org: u32| &self.org_names[org as usize];
        for ((user, month), row) in &self.user_month {
            let (of, name) = &self.user_names[*user as usize];
            let key = format!("{}|{name}|{}", org(*of), month_text(*month));
            views.user_month.insert(key, row.figures);
        }
        for ((member, day), row) in &self.org_model_day {
            let model = MODELS[(member & 0xff) as usize].1;
            let key = format!("{}|{model}|{}", org(member >> 8), day_text(*day));
            views.org_model_day.insert(key, row.figures);
        }
        for ((of, month), row) in &self.org_month {
            views.org_month.insert(format!("{}|{}", org(*of), month_text(*month)), row.figures);
        }
        views
    }
}

/// Days since 1970 and months since 1970-01 of `2026-01-31T…Z`.
#[inline]
fn day_and_month(time: &str) -> Option<(u32, u32)> {
    let date = time.as_bytes().get(..10)?;
    let digit = |at: usize| u32::from(date[at].wrapping_sub(b'0'));
    let year = digit(0) * 1000 + digit(1) * 100 + digit(2) * 10 + digit(3);
    let (month, date) = (digit(5) * 10 + digit(6), digit(8) * 10 + digit(9));
    let days =
        meterr_operators::time::days_from_civil(i64::from(year), i64::from(month), i64::from(date));
    Some((u32::try_from(days).ok()?, (year.checked_sub(1970)?) * 12 + month.checked_sub(1)?))
}
