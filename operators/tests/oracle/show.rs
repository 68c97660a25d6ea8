//! What a shard shows and what the oracle says it must show, brought into one form with names.

use std::collections::{BTreeMap, BTreeSet};

use meterr_operators::control::{Dimension, WindowSize};
use meterr_operators::dataflow::Shared;
use meterr_operators::event::METERS;
use meterr_operators::ids::{ShardId, shard_of};
use meterr_operators::money::Atto;
use meterr_operators::reference::{Reference, Refused, Row};
use meterr_operators::rollup::{ALL_VIEWS, Declared, Table, View};
use meterr_operators::shard::Shard;
use meterr_operators::time::{SLOT, Time, civil_from_days};
use meterr_operators::usage::Spend;
use meterr_operators::window::hour_instant;

/// Every figure of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Figures {
    pub events: i64,
    pub meters: [i64; METERS],
    /// Absent when nothing is priced.
    pub cost: Option<Atto>,
    /// Compute, storage, bandwidth, ai.
    pub costs: [Atto; 4],
    pub unpriced_events: i64,
}

/// View, org, window, key.
pub type RowName = (String, String, String, Vec<String>);
/// Rows of all views.
pub type Rows = BTreeMap<RowName, Figures>;
/// Rows that changed; none where one went away.
pub type Changes = BTreeMap<RowName, Option<Figures>>;

/// Everything a shard shows at the end of an epoch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    pub rows: Rows,
    /// Names of declared views.
    pub declared: BTreeSet<String>,
    /// Ids remembered.
    pub ids: u64,
    /// All dead letters so far.
    pub dead: Vec<Refused>,
}

impl Shown {
    /// The first differences, or nothing when all is equal.
    pub fn differences(&self, expected: &Shown) -> Option<String> {
        rows_differ(&self.rows, &expected.rows)
            .or_else(|| differ("declared views", &self.declared, &expected.declared))
            .or_else(|| differ("dead letters", &self.dead, &expected.dead))
            .or_else(|| differ("ids remembered", &self.ids, &expected.ids))
    }
}

/// Says how two values differ.
pub fn differ<T: std::fmt::Debug + PartialEq>(what: &str, is: &T, expected: &T) -> Option<String> {
    (is != expected).then(|| format!("{what}: is {is:?}, must be {expected:?}"))
}

/// Says how two maps of rows differ: the first three rows.
pub fn rows_differ<V: std::fmt::Debug + PartialEq>(
    is: &BTreeMap<RowName, V>,
    expected: &BTreeMap<RowName, V>,
) -> Option<String> {
    let names: BTreeSet<&RowName> = is.keys().chain(expected.keys()).collect();
    let differing: Vec<&RowName> =
        names.into_iter().filter(|name| is.get(*name) != expected.get(*name)).collect();
    let shown = differing.iter().take(3).map(|name| {
        format!("{name:?}\n    is      {:?}\n    must be {:?}", is.get(*name), expected.get(*name))
    });
    let shown: Vec<String> = shown.collect();
    (!shown.is_empty())
        .then(|| format!("{} rows differ\n  {}", differing.len(), shown.join("\n  ")))
}

/// Window and dimensions of a built-in view.
pub fn form(view: View) -> (WindowSize, Vec<Dimension>) {
    let window = match view {
        View::OrgHour => WindowSize::Hour,
        View::OrgAll => WindowSize::All,
        View::OrgDay | View::UserDay | View::ModelDay | View::FeatureDay => WindowSize::Day,
        View::OrgMonth | View::UserMonth | View::ModelMonth | View::FeatureMonth => {
            WindowSize::Month
        }
    };
    let by = match view {
        View::OrgHour | View::OrgDay | View::OrgMonth | View::OrgAll => vec![],
        View::UserDay | View::UserMonth => vec![Dimension::User],
        View::ModelDay | View::ModelMonth => vec![Dimension::Model],
        View::FeatureDay | View::FeatureMonth => vec![Dimension::Feature],
    };
    (window, by)
}

fn of_row(row: &Row) -> Figures {
    let [compute, storage, bandwidth, ai] = row.explicit;
    Figures {
        events: row.events,
        meters: row.meters,
        cost: row.cost(),
        costs: [compute, storage, bandwidth, ai + row.book_cost],
        unpriced_events: row.unpriced_events,
    }
}

fn of_spend(spend: &Spend) -> Figures {
    let [compute, storage, bandwidth] =
        spend.rest.as_ref().map_or([Atto::ZERO; 3], |rest| rest.other_costs);
    Figures {
        events: spend.events,
        meters: spend.meters(),
        cost: (!spend.cost_unknown()).then_some(spend.cost),
        costs: [compute, storage, bandwidth, spend.cost - (compute + storage + bandwidth)],
        unpriced_events: spend.unpriced(),
    }
}

/// What every shard must show by the oracle.
pub fn expected(reference: &Reference, shards: u16) -> BTreeMap<ShardId, Shown> {
    let mut all: BTreeMap<ShardId, Shown> = (0..shards)
        .map(ShardId)
        .map(|shard| {
            let shown = Shown {
                rows: Rows::new(),
                declared: reference.views().keys().cloned().collect(),
                ids: reference.ids_remembered(shard) as u64,
                dead: reference.dead_letters(shard).to_vec(),
            };
            (shard, shown)
        })
        .collect();
    let mut put = |view: &str, org: &str, rows: meterr_operators::reference::Rows| {
        let shown = all.get_mut(&shard_of(org, shards)).unwrap();
        for ((window, key), row) in rows {
            shown.rows.insert((view.to_owned(), org.to_owned(), window, key), of_row(&row));
        }
    };
    for org in reference.orgs() {
        for view in ALL_VIEWS {
            let (window, by) = form(view);
            put(view.name(), &org, reference.spend(&org, None, window, &by));
        }
    }
    for name in reference.views().keys() {
        for (org, rows) in reference.view(name).unwrap() {
            put(&format!("declared {name}"), &org, rows);
        }
    }
    all
}

/// The rows a shard shows, and those that changed since its last list of changes was cleared.
pub fn rows_of(shard: &Shard) -> (Rows, Changes) {
    let shared = shard.flow().shared().borrow();
    let (mut rows, mut changes) = (Rows::new(), Changes::new());
    for view in ALL_VIEWS {
        let name = |member, window| name_of(&shared, view, member, window);
        let check = |name: &RowName, window| check_start(&shared, form(view).0, name, window);
        read(shared.rollup.table(view), name, check, &mut rows, &mut changes);
    }
    for view in shared.rollup.declared.iter().flatten() {
        let name = |member, window| declared_name_of(&shared, view, member, window);
        let check = |name: &RowName, window| check_start(&shared, view.window, name, window);
        read(&view.table, name, check, &mut rows, &mut changes);
    }
    (rows, changes)
}

/// Names of a shard's declared views.
pub fn declared_of(shard: &Shard) -> BTreeSet<String> {
    let shared = shard.flow().shared().borrow();
    let names: Vec<&String> = shared.rollup.declared.iter().flatten().map(|v| &v.name).collect();
    let set: BTreeSet<String> = names.iter().map(|name| (*name).clone()).collect();
    assert_eq!(set.len(), names.len(), "a view is declared twice: {names:?}");
    set
}

fn read(
    table: &Table,
    name: impl Fn(u32, u32) -> RowName,
    check: impl Fn(&RowName, u32),
    rows: &mut Rows,
    changes: &mut Changes,
) {
    for (member, window, spend) in table.rows() {
        let name = name(member, window);
        check(&name, window);
        // The other two ways to a row must lead to the same one.
        assert_eq!(table.get(member, window), Some(spend), "{name:?}");
        assert!(table.of_member(member).any(|(w, s)| w == window && s == spend), "{name:?}");
        let twice = rows.insert(name.clone(), of_spend(spend));
        assert_eq!(twice, None, "two rows of one name {name:?}");
    }
    for (member, window, spend) in table.changes() {
        let figures = (!spend.is_nothing()).then(|| of_spend(spend));
        assert_eq!(table.get(member, window).is_some(), figures.is_some());
        let name = name(member, window);
        let twice = changes.insert(name.clone(), figures);
        assert_eq!(twice, None, "a change is listed twice: {name:?}");
    }
}

fn name_of(shared: &Shared, view: View, member: u32, window: u32) -> RowName {
    let names = shared.names.names();
    let at = member as usize;
    let symbol = |symbol: u32| shared.names.symbol(symbol).to_owned();
    let (org, key) = match form(view).1.first() {
        None => (member, vec![]),
        Some(Dimension::User) => (names.users[at].org, vec![names.users[at].name.to_string()]),
        Some(Dimension::Model) => {
            (names.org_models[at].org, vec![symbol(names.org_models[at].name)])
        }
        Some(_) => (names.org_features[at].org, vec![symbol(names.org_features[at].name)]),
    };
    row_name(shared, view.name().to_owned(), org, form(view).0, window, key)
}

fn declared_name_of(shared: &Shared, view: &Declared, member: u32, window: u32) -> RowName {
    let (org, values) = &view.members[member as usize];
    let key = values.iter().map(ToString::to_string).collect();
    row_name(shared, format!("declared {}", view.name), *org, view.window, window, key)
}

fn row_name(
    shared: &Shared,
    view: String,
    org: u32,
    size: WindowSize,
    window: u32,
    key: Vec<String>,
) -> RowName {
    (view, shared.names.org_name(org).to_owned(), window_name(size, window), key)
}

/// A window as the oracle names it. By its number alone: a row that went away with a change of its
/// org's time zone may be of a day the new zone never had.
fn window_name(size: WindowSize, window: u32) -> String {
    let (year, month, date) = match size {
        WindowSize::All => return String::new(),
        WindowSize::Hour => return hour_instant(window).to_string(),
        WindowSize::Day => civil_from_days(i64::from(window)),
        WindowSize::Month => (1970 + i64::from(window / 12), i64::from(window % 12) + 1, 1),
    };
    let date = format!("{year:04}-{month:02}-{date:02}");
    date[..if size == WindowSize::Day { 10 } else { 7 }].to_owned()
}

/// What readers are shown as the start of a window is its first instant, in its org's zone.
fn check_start(shared: &Shared, size: WindowSize, name: &RowName, window: u32) {
    let (_, org, label, _) = name;
    let zone = &shared.zones[shared.zone_of(shared.names.org(org).unwrap()) as usize];
    let (start, instant) = match size {
        WindowSize::All | WindowSize::Hour => return,
        WindowSize::Day => (zone.day_start(window), zone.day_instant(window)),
        WindowSize::Month => (zone.month_start(window), zone.month_instant(window)),
    };
    assert!(start.starts_with(label), "{}: {start} is no start of {label}", zone.name());
    assert_eq!(Time::parse(&start), Ok(instant), "{}: {start}", zone.name());
    let first_day = zone.day(instant.slot());
    assert!(size == WindowSize::Month || first_day == window, "{}: {start}", zone.name());
    let before = zone.day(Time(instant.0 - SLOT).slot());
    // The first day and month hold what lies before them.
    assert!(before < first_day || first_day == 0, "{}: {label} starts before {start}", zone.name());
}
