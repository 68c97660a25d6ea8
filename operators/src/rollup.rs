//! Spend per org, user, model and feature: the views, as values kept current.
//!
//! A view is a sum of differences and nothing else, so it needs no history: each table holds the
//! current value per (member, window) and adds what comes. Rows changed since the last
//! [`Rollup::clear_changes`] are listed, each once. A row whose value has become nothing is kept as an
//! empty place and counts as absent.
//!
//! Tables are made to grow without a pause: values stand in blocks that never move, found by 16
//! hash tables of small references.

use hashbrown::HashTable;

use crate::control::{Dimension, WindowSize};
use crate::dictionary::{Dictionary, NONE};
use crate::time::Slot;
use crate::usage::Spend;
use crate::window::{Zone, hour_of, month_of};

/// A view kept by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(usize)]
pub enum View {
    /// Org by hour of UTC.
    OrgHour,
    /// Org by day.
    OrgDay,
    /// Org by month.
    OrgMonth,
    /// Org, all time.
    OrgAll,
    /// User by day.
    UserDay,
    /// User by month.
    UserMonth,
    /// Model of an org by day.
    ModelDay,
    /// Model of an org by month.
    ModelMonth,
    /// Feature of an org by day.
    FeatureDay,
    /// Feature of an org by month.
    FeatureMonth,
}

/// All of them, in the order of their index.
pub const ALL_VIEWS: [View; 10] = [
    View::OrgHour,
    View::OrgDay,
    View::OrgMonth,
    View::OrgAll,
    View::UserDay,
    View::UserMonth,
    View::ModelDay,
    View::ModelMonth,
    View::FeatureDay,
    View::FeatureMonth,
];

impl View {
    /// Its name in every format.
    pub const fn name(self) -> &'static str {
        match self {
            View::OrgHour => "org_hour",
            View::OrgDay => "org_day",
            View::OrgMonth => "org_month",
            View::OrgAll => "org_all",
            View::UserDay => "user_day",
            View::UserMonth => "user_month",
            View::ModelDay => "model_day",
            View::ModelMonth => "model_month",
            View::FeatureDay => "feature_day",
            View::FeatureMonth => "feature_month",
        }
    }
}

/// Which views are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ViewSet(u16);

impl ViewSet {
    /// All ten.
    pub const DEFAULT: ViewSet = ViewSet((1 << ALL_VIEWS.len()) - 1);

    /// Only these.
    pub fn of(views: &[View]) -> ViewSet {
        ViewSet(views.iter().fold(0, |set, view| set | 1 << *view as usize))
    }

    /// Whether a view is kept.
    pub fn has(self, view: View) -> bool {
        self.0 & (1 << view as usize) != 0
    }
}

const BLOCK: usize = 1024;
const TABLES: usize = 16;

#[derive(Debug)]
struct Row {
    member: u32,
    window: u32,
    /// Next row of the same member.
    next: u32,
    /// Seal at which it was listed as changed, so that it is listed once.
    listed: u32,
    spend: Spend,
}

/// The rows of one view: (member, window) → spend.
#[derive(Debug)]
pub struct Table {
    blocks: Vec<Vec<Row>>,
    len: u32,
    tables: Vec<HashTable<u32>>,
    heads: Vec<u32>,
    changed: Vec<u32>,
    seal: u32,
}

impl Default for Table {
    fn default() -> Self {
        Table {
            blocks: Vec::new(),
            len: 0,
            tables: vec![HashTable::new(); TABLES],
            heads: Vec::new(),
            changed: Vec::new(),
            seal: 1,
        }
    }
}

#[inline]
fn hash(member: u32, window: u32) -> u64 {
    // A multiplication spreads dense numbers over the high bits; the fold brings them down to those
    // that choose the place. Two 64-bit factors, so that it cannot overflow.
    let key = u64::from(member) << 32 | u64::from(window);
    let product = u128::from(key) * u128::from(0x9E37_79B9_7F4A_7C15_u64);
    (product as u64) ^ (product >> 64) as u64
}

#[inline]
fn table_of(hash: u64) -> usize {
    // By bits that the tables do not use themselves: they take the lowest and the highest.
    (hash >> 40) as usize % TABLES
}

impl Table {
    fn row(&self, at: u32) -> &Row {
        &self.blocks[at as usize / BLOCK][at as usize % BLOCK]
    }

    /// Adds a difference to a row.
    #[inline]
    pub fn add(&mut self, member: u32, window: u32, spend: &Spend) {
        let hash = hash(member, window);
        let blocks = &self.blocks;
        let same = |at: &u32| {
            let row = &blocks[*at as usize / BLOCK][*at as usize % BLOCK];
            row.member == member && row.window == window
        };
        let table = &mut self.tables[table_of(hash)];
        let at = match table.find(hash, same) {
            Some(at) => *at,
            None => {
                let at = self.len;
                assert!(at < NONE, "rows of one view fit 32-bit references");
                table.insert_unique(hash, at, |at| {
                    let row = &blocks[*at as usize / BLOCK][*at as usize % BLOCK];
                    self::hash(row.member, row.window)
                });
                self.len += 1;
                if self.heads.len() <= member as usize {
                    self.heads.resize(member as usize + 1, NONE);
                }
                let next = std::mem::replace(&mut self.heads[member as usize], at);
                if (at as usize).is_multiple_of(BLOCK) {
                    self.blocks.push(Vec::with_capacity(BLOCK));
                }
                let row = Row { member, window, next, listed: 0, spend: Spend::default() };
                self.blocks[at as usize / BLOCK].push(row);
                at
            }
        };
        let row = &mut self.blocks[at as usize / BLOCK][at as usize % BLOCK];
        row.spend.add(spend);
        if row.listed != self.seal {
            row.listed = self.seal;
            self.changed.push(at);
        }
    }

    /// The value of a row, if it is anything.
    pub fn get(&self, member: u32, window: u32) -> Option<&Spend> {
        let hash = hash(member, window);
        let at = self.tables[table_of(hash)].find(hash, |at| {
            let row = self.row(*at);
            row.member == member && row.window == window
        })?;
        let spend = &self.row(*at).spend;
        (!spend.is_nothing()).then_some(spend)
    }

    /// Rows of one member: window and value.
    pub fn of_member(&self, member: u32) -> impl Iterator<Item = (u32, &Spend)> {
        let mut at = self.heads.get(member as usize).copied().unwrap_or(NONE);
        std::iter::from_fn(move || {
            while at != NONE {
                let row = self.row(at);
                at = row.next;
                if !row.spend.is_nothing() {
                    return Some((row.window, &row.spend));
                }
            }
            None
        })
    }

    /// All rows: member, window, value.
    pub fn rows(&self) -> impl Iterator<Item = (u32, u32, &Spend)> {
        let rows = self.blocks.iter().flatten();
        rows.filter(|r| !r.spend.is_nothing()).map(|r| (r.member, r.window, &r.spend))
    }

    /// Rows changed since the last clearing: member, window, value (nothing where it was removed).
    pub fn changes(&self) -> impl Iterator<Item = (u32, u32, &Spend)> {
        self.changed.iter().map(|at| {
            let row = self.row(*at);
            (row.member, row.window, &row.spend)
        })
    }

    /// Rows changed since the last clearing.
    pub fn changes_len(&self) -> usize {
        self.changed.len()
    }

    /// Begins a new list of changes.
    pub fn clear_changes(&mut self) {
        self.changed.clear();
        self.seal = self.seal.checked_add(1).unwrap_or_else(|| {
            // Once in 4 billion epochs: no row may look as if it were listed in one to come.
            self.blocks.iter_mut().flatten().for_each(|row| row.listed = 0);
            1
        });
    }

    /// Bytes of memory held, as allocated; without what stands behind the rare parts' pointers.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(|b| b.capacity() * size_of::<Row>()).sum::<usize>()
            + self.tables.iter().map(HashTable::allocation_size).sum::<usize>()
            + (self.heads.capacity() + self.changed.capacity()) * 4
    }

    /// Rows, empty places included.
    pub fn len(&self) -> usize {
        self.len as usize
    }

    /// Whether there never was a row.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

/// A priced difference on its way into the views.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Priced {
    /// Rate number.
    pub rate: u32,
    /// Slot.
    pub slot: Slot,
    /// User number.
    pub user: u32,
    /// Label number.
    pub label: u32,
    /// Zone by which its day goes; an index of the shard's zones.
    pub zone: u32,
    /// Only this declared view (an index), or [`NONE`] for all.
    pub only: u32,
    /// The difference.
    pub spend: Spend,
}

/// A view declared by a user: any dimensions, kept live like the others.
#[derive(Debug)]
pub struct Declared {
    /// Its name.
    pub name: String,
    /// Dimensions.
    pub by: Vec<Dimension>,
    /// Window size.
    pub window: WindowSize,
    /// Values of the dimensions by member number; the org first.
    pub members: Vec<(u32, Vec<Box<str>>)>,
    index: hashbrown::HashMap<(u32, Vec<Box<str>>), u32>,
    /// The rows.
    pub table: Table,
}

/// Number of the window a slot lies in.
pub fn window_of(size: WindowSize, slot: Slot, zone: &Zone) -> u32 {
    match size {
        WindowSize::Hour => hour_of(slot),
        WindowSize::Day => zone.day(slot),
        WindowSize::Month => month_of(zone.day(slot)),
        WindowSize::All => 0,
    }
}

/// The value of a dimension in a usage row.
pub fn value_of<'a>(
    dimension: &Dimension,
    names: &'a Dictionary,
    rate: u32,
    user: u32,
    label: u32,
) -> &'a str {
    let all = names.names();
    match dimension {
        Dimension::User => &all.users[user as usize].name,
        Dimension::Model => names.symbol(all.rates[rate as usize].model),
        Dimension::Provider => names.symbol(all.rates[rate as usize].provider),
        Dimension::Feature => names.symbol(all.labels[label as usize].feature),
        Dimension::Tag(tag) => {
            let tags = &all.labels[label as usize].tags;
            let found = tags.iter().find(|(name, _)| names.symbol(*name) == tag);
            found.map_or("", |(_, value)| names.symbol(*value))
        }
    }
}

impl Declared {
    /// An empty view.
    pub fn new(name: String, by: Vec<Dimension>, window: WindowSize) -> Declared {
        Declared {
            name,
            by,
            window,
            members: Vec::new(),
            index: hashbrown::HashMap::new(),
            table: Table::default(),
        }
    }

    fn add(&mut self, names: &Dictionary, zone: &Zone, priced: &Priced) {
        let org = names.names().rates[priced.rate as usize].org;
        let values = self
            .by
            .iter()
            .map(|d| value_of(d, names, priced.rate, priced.user, priced.label).into())
            .collect();
        let key = (org, values);
        let member = match self.index.get(&key) {
            Some(member) => *member,
            None => {
                let member = self.members.len() as u32;
                self.members.push(key.clone());
                self.index.insert(key, member);
                member
            }
        };
        self.table.add(member, window_of(self.window, priced.slot, zone), &priced.spend);
    }
}

/// All views of a shard.
#[derive(Debug)]
pub struct Rollup {
    set: ViewSet,
    tables: [Table; ALL_VIEWS.len()],
    /// Declared views; removed ones leave an empty place, so that indexes stay.
    pub declared: Vec<Option<Declared>>,
    /// Consecutive differences of one rate, hour and day, summed before they are spread.
    run: Option<Run>,
}

#[derive(Debug)]
struct Run {
    org: u32,
    org_model: u32,
    hour: u32,
    day: u32,
    spend: Spend,
}

impl Rollup {
    /// Empty views.
    pub fn new(set: ViewSet) -> Rollup {
        Rollup { set, tables: Default::default(), declared: Vec::new(), run: None }
    }

    /// The rows of a view; empty where it is not kept.
    pub fn table(&self, view: View) -> &Table {
        &self.tables[view as usize]
    }

    /// Which views are kept.
    pub fn set(&self) -> ViewSet {
        self.set
    }

    /// Adds a priced difference to every view it belongs to.
    #[inline]
    pub fn add(&mut self, names: &Dictionary, zones: &[Zone], priced: &Priced) {
        let zone = &zones[priced.zone as usize];
        if priced.only != NONE {
            if let Some(Some(view)) = self.declared.get_mut(priced.only as usize) {
                view.add(names, zone, priced);
            }
            return;
        }
        for view in self.declared.iter_mut().flatten() {
            view.add(names, zone, priced);
        }
        let rate = &names.names().rates[priced.rate as usize];
        let (hour, day) = (hour_of(priced.slot), zone.day(priced.slot));
        let month = month_of_cached(day);
        let spend = &priced.spend;
        self.into(View::UserDay, priced.user, day, spend);
        self.into(View::UserMonth, priced.user, month, spend);
        if self.set.has(View::FeatureDay) || self.set.has(View::FeatureMonth) {
            let feature = names.names().labels[priced.label as usize].org_feature;
            self.into(View::FeatureDay, feature, day, spend);
            self.into(View::FeatureMonth, feature, month, spend);
        }
        match &mut self.run {
            Some(run) if run.org_model == rate.org_model && run.hour == hour && run.day == day => {
                run.spend.add(spend);
            }
            _ => {
                self.flush();
                let (org, org_model) = (rate.org, rate.org_model);
                self.run = Some(Run { org, org_model, hour, day, spend: spend.clone() });
            }
        }
    }

    #[inline]
    fn into(&mut self, view: View, member: u32, window: u32, spend: &Spend) {
        if self.set.has(view) {
            self.tables[view as usize].add(member, window, spend);
        }
    }

    /// Spreads what is still summed up. Must follow the last [`Rollup::add`] of an epoch.
    pub fn flush(&mut self) {
        let Some(run) = self.run.take() else { return };
        // Also where it adds up to nothing: a change of zone takes a row out of a day and puts it into
        // the same one, which now begins at another instant, so the row must be listed.
        let month = month_of_cached(run.day);
        self.into(View::ModelDay, run.org_model, run.day, &run.spend);
        self.into(View::ModelMonth, run.org_model, month, &run.spend);
        self.into(View::OrgHour, run.org, run.hour, &run.spend);
        self.into(View::OrgDay, run.org, run.day, &run.spend);
        self.into(View::OrgMonth, run.org, month, &run.spend);
        self.into(View::OrgAll, run.org, 0, &run.spend);
    }

    /// Rows changed since the last clearing, in all views.
    pub fn changes_len(&self) -> usize {
        let declared = self.declared.iter().flatten().map(|d| d.table.changes_len());
        self.tables.iter().map(Table::changes_len).chain(declared).sum()
    }

    /// Begins a new list of changes in every view.
    pub fn clear_changes(&mut self) {
        self.tables.iter_mut().for_each(Table::clear_changes);
        self.declared.iter_mut().flatten().for_each(|d| d.table.clear_changes());
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        let declared = self.declared.iter().flatten().map(|d| d.table.bytes());
        self.tables.iter().map(Table::bytes).chain(declared).sum()
    }

    /// Checks that sum over users = org = sum over models = sum over features, for every day and
    /// month that the views have, and that an org's hours, its days and its months add up to all
    /// of it.
    ///
    /// # Errors
    /// Names the first org, window and pair of sums that differ.
    pub fn check_sums(&self, names: &Dictionary) -> Result<(), String> {
        type Sums = std::collections::BTreeMap<(u32, u32), Spend>;
        let all = names.names();
        let sums = |view: View, org: &dyn Fn(u32) -> u32, window_of: &dyn Fn(u32) -> u32| {
            let mut sums = Sums::new();
            for (member, window, spend) in self.table(view).rows() {
                sums.entry((org(member), window_of(window))).or_default().add(spend);
            }
            sums.retain(|_, spend| !spend.is_nothing());
            sums
        };
        let compare = |whole: View, wholes: &Sums, part: View, parts: &Sums| {
            let differs =
                wholes.keys().chain(parts.keys()).find(|k| wholes.get(*k) != parts.get(*k));
            let Some((org, window)) = differs else { return Ok(()) };
            Err(format!(
                "org {:?}, window {window}: {} says {:?}, the sum of {} is {:?}",
                names.org_name(*org),
                whole.name(),
                wholes.get(&(*org, *window)),
                part.name(),
                parts.get(&(*org, *window)),
            ))
        };
        for (of_org, parts) in [
            (View::OrgDay, [View::UserDay, View::ModelDay, View::FeatureDay]),
            (View::OrgMonth, [View::UserMonth, View::ModelMonth, View::FeatureMonth]),
        ] {
            if !self.set.has(of_org) {
                continue;
            }
            let whole = sums(of_org, &|org| org, &|window| window);
            for part in parts.into_iter().filter(|part| self.set.has(*part)) {
                let org_of = |member: u32| match part {
                    View::UserDay | View::UserMonth => all.users[member as usize].org,
                    View::ModelDay | View::ModelMonth => all.org_models[member as usize].org,
                    _ => all.org_features[member as usize].org,
                };
                compare(of_org, &whole, part, &sums(part, &org_of, &|window| window))?;
            }
        }
        if self.set.has(View::OrgAll) {
            let whole = sums(View::OrgAll, &|org| org, &|_| 0);
            for part in [View::OrgHour, View::OrgDay, View::OrgMonth] {
                if self.set.has(part) {
                    compare(View::OrgAll, &whole, part, &sums(part, &|org| org, &|_| 0))?;
                }
            }
        }
        Ok(())
    }
}

#[inline]
fn month_of_cached(day: u32) -> u32 {
    thread_local! {
        // Consecutive rows mostly share their day.
        static LAST: std::cell::Cell<(u32, u32)> = const { std::cell::Cell::new((0, 0)) };
    }
    LAST.with(|last| {
        let (known, month) = last.get();
        if known == day {
            return month;
        }
        let month = month_of(day);
        last.set((day, month));
        month
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_change_is_lost_when_seals_begin_anew() {
        let spend = Spend { events: 1, ..Spend::default() };
        let mut table = Table::default();
        // Listed by the first seal, never touched for as long as seals go.
        table.add(1, 7, &spend);
        table.seal = u32::MAX;
        table.add(2, 7, &spend);
        table.clear_changes();
        table.add(1, 7, &spend);
        table.add(1, 7, &spend);
        table.add(2, 7, &spend);
        let changes: Vec<_> = table.changes().map(|(m, _, s)| (m, s.events)).collect();
        assert_eq!(changes, [(1, 3), (2, 2)]);
    }

    #[test]
    fn rows_are_found_whatever_their_numbers() {
        let mut table = Table::default();
        let ends = [0, 1, 2, 1 << 16, u32::MAX - 1, u32::MAX];
        let members = [0, 1, 2, 70_000, 300_000];
        for (at, member) in members.into_iter().enumerate() {
            for window in ends {
                let events = 1 + i64::from(window) + at as i64;
                table.add(member, window, &Spend { events, ..Spend::default() });
            }
        }
        for (at, member) in members.into_iter().enumerate() {
            for window in ends {
                let events = table.get(member, window).map(|spend| spend.events);
                assert_eq!(events, Some(1 + i64::from(window) + at as i64));
            }
        }
    }
}
