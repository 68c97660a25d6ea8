//! What a shard writes to its output log, and what subscribers get of it.
//!
//! An epoch is some *parts* and then one *commit record*. A part without a matching commit record does
//! not exist. Bodies are JSON:
//!
//! ```text
//! part    {"epoch":7,"token":2,"attempt":1,"part":0,"orgs":[
//!           {"org":"acme","views":{"org_day":[["2026-01-02T00:00:00Z",null,1,"0.0004125",0,[254,120,0,0,44]]], …}}, …],
//!          "dead_letters":[…]}
//! commit  {"epoch":7,"usage_position":118,"control_position":19,"log_time":"…","token":2,"attempt":1,
//!          "parts":1,"hash":"…"}
//! ```
//!
//! A row is `[window start or null, key or null, events, cost or null, unpriced events, [meters]]`, the
//! meters in the order of [`ALL_METERS`] with zeros at the end left out, followed by
//! `[compute, storage, bandwidth]` where any of these costs is not zero. Figures are absolute totals.
//! Arrays rather than objects: a loaded shard writes two or three rows an event, and names would
//! treble the bytes.

use std::collections::BTreeMap;
use std::io::Write;

use bytes::Bytes;
use meterr_connectors::api::{DeadLetter, Figures};
use meterr_connectors::changes::{OrgChanges, Row, figures_of};
use meterr_connectors::codec::raw_text;
use meterr_operators::event::ALL_METERS;
use meterr_operators::format;
use meterr_operators::ids::{Positions, ShardId};
use meterr_operators::money::Atto;
use meterr_operators::rollup::{ALL_VIEWS, Declared, View, ViewSet};
use meterr_operators::shard::{Dead, Shard, Withdrawn};
use meterr_operators::time::Time;
use meterr_operators::usage::Spend;
use meterr_operators::window::{Zone, hour_instant};
use serde::{Deserialize, Serialize};

/// Most bytes of a part, so that it fits a message of any transport; a larger epoch has more parts.
pub const PART_LEN_MAX: usize = 900 * 1024;

/// Newest format of commit records read here. A commit record's format is that of its parts too; every format
/// begins with `{"epoch":…`, by which epochs are found in the log.
pub const COMMIT_FORMAT: u32 = 1;
/// Newest format of parts read here.
pub const PART_FORMAT: u32 = 1;

/// The commit record of an epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// Epoch, from 1.
    pub epoch: u64,
    /// Last usage position contained.
    pub usage_position: u64,
    /// Last control position contained.
    pub control_position: u64,
    /// Log time of the shard.
    pub log_time: Time,
    /// Fencing token of the writer.
    pub token: u64,
    /// Counts attempts at this epoch under this token, from 1; 0 in a sealing record.
    pub attempt: u32,
    /// Parts before this record.
    pub parts: u32,
    /// blake3 over the parts' payloads in order, hexadecimal.
    pub hash: String,
    /// Set in a record that only takes the shard over: it repeats the epoch before it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub seal: bool,
}

impl Commit {
    /// Reads a commit record.
    ///
    /// # Errors
    /// A sentence, when it is of a newer format or none.
    pub fn read(record: &[u8]) -> Result<Commit, String> {
        format::check(record, COMMIT_FORMAT).map_err(|error| error.to_string())?;
        serde_json::from_slice(record).map_err(|error| error.to_string())
    }
}

/// Body of a part, as read back.
#[derive(Debug, Deserialize)]
pub struct Part {
    /// Epoch.
    pub epoch: u64,
    /// Token of the writer.
    pub token: u64,
    /// Attempt.
    pub attempt: u32,
    /// Number of the part, from 0.
    pub part: u32,
    /// Changed rows by org.
    #[serde(default)]
    pub orgs: Vec<OrgChanges>,
    /// Lines that were not counted.
    #[serde(default)]
    pub dead_letters: Vec<DeadLetter>,
}

impl Part {
    /// Reads a part.
    ///
    /// # Errors
    /// A sentence, when it is of a newer format or none.
    pub fn read(part: &[u8]) -> Result<Part, String> {
        format::check(part, PART_FORMAT).map_err(|error| error.to_string())?;
        serde_json::from_slice(part).map_err(|error| error.to_string())
    }
}

/// The figures of a value.
pub fn figures(spend: &Spend) -> Figures {
    let cost = (!spend.cost_unknown()).then_some(spend.cost);
    let other = spend.rest.as_ref().map_or([Atto::ZERO; 3], |rest| rest.other_costs);
    figures_of(spend.events, &spend.meters(), cost, other, spend.unpriced())
}

/// Where the changed rows of an org stand in an epoch's parts: the JSON object of its views.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OrgPiece {
    /// Number of the org.
    pub org: u32,
    /// The part.
    pub part: usize,
    /// Its bytes in the part.
    pub views: std::ops::Range<usize>,
}

/// What an epoch's output is.
#[derive(Debug)]
pub struct Parts {
    /// Bodies of the parts.
    pub parts: Vec<Bytes>,
    /// blake3 over them in order, hexadecimal.
    pub hash: String,
    /// Rows by org, an org's pieces one after the other.
    pub orgs: Vec<OrgPiece>,
}

/// Writes the parts of an epoch.
#[derive(Debug)]
pub struct PartWriter {
    epoch: u64,
    token: u64,
    attempt: u32,
    /// Length at which a part is closed; it may be a row longer.
    len_max: usize,
    parts: Vec<Vec<u8>>,
    /// The part being written; whether it holds anything yet.
    open: Vec<u8>,
    empty: bool,
    orgs: Vec<OrgPiece>,
}

/// One changed row on its way out.
#[derive(Clone, Copy)]
struct Changed<'a> {
    /// Org number.
    org: u32,
    /// View: declared ones after the built-in.
    view: u32,
    /// Whether it only takes back a row under a name it no longer has. Those go first.
    gone: bool,
    member: u32,
    window: u32,
    /// Zone in which the window's start is written.
    zone: u32,
    spend: &'a Spend,
    /// The view, where it is a declared one.
    declared: Option<&'a Declared>,
}

impl<'a> Changed<'a> {
    /// Adds the row, and takes it back under the names it had in zones its org no longer has.
    fn add_to(self, rows: &mut Vec<Changed<'a>>, withdrawn: &Withdrawn, nothing: &'a Spend) {
        if matches!(self.size(), Size::Day | Size::Month) {
            for (_, zone) in withdrawn.zones.iter().filter(|(org, _)| *org == self.org) {
                rows.push(Changed { gone: true, zone: *zone, spend: nothing, ..self });
            }
        }
        rows.push(self);
    }

    fn size(&self) -> Size {
        match (self.declared, ALL_VIEWS.get(self.view as usize)) {
            (Some(declared), _) => declared.window.into(),
            (None, Some(view)) => size_of_view(*view),
            (None, None) => Size::All,
        }
    }

    fn view_name(&self) -> &str {
        match (self.declared, ALL_VIEWS.get(self.view as usize)) {
            (Some(declared), _) => &declared.name,
            (None, view) => view.map_or("", |view| view.name()),
        }
    }

    fn values(&self) -> Option<&[Box<str>]> {
        self.declared.map(|declared| &*declared.members[self.member as usize].1)
    }
}

impl PartWriter {
    /// For one attempt at one epoch.
    pub fn new(epoch: u64, token: u64, attempt: u32) -> PartWriter {
        let (parts, open, orgs) = (Vec::new(), Vec::new(), Vec::new());
        PartWriter { epoch, token, attempt, len_max: PART_LEN_MAX, parts, open, empty: true, orgs }
    }

    fn begin(&mut self, field: &str) {
        let (epoch, token, attempt, part) =
            (self.epoch, self.token, self.attempt, self.parts.len());
        self.open.clear();
        let head = format!(
            "{{\"epoch\":{epoch},\"token\":{token},\"attempt\":{attempt},\"part\":{part},\"{field}\":["
        );
        self.open.extend_from_slice(head.as_bytes());
        self.empty = true;
    }

    fn end(&mut self) {
        if !self.empty {
            self.open.extend_from_slice(b"]}");
            self.parts.push(std::mem::take(&mut self.open));
        }
    }

    /// Adds all changed rows of a shard's views, by org, and takes back the rows whose names control
    /// changes withdrew.
    pub fn changes(&mut self, shard: &Shard, withdrawn: &Withdrawn, starts: &mut Starts) {
        let shared = shard.flow().shared().borrow();
        let (rollup, names) = (&shared.rollup, shared.names.names());
        let nothing = Spend::default();
        let mut rows: Vec<Changed<'_>> = Vec::with_capacity(rollup.changes_len());
        for view in ALL_VIEWS {
            for (member, window, spend) in rollup.table(view).changes() {
                let org = match kind(view) {
                    Kind::Org => member,
                    Kind::User => names.users[member as usize].org,
                    Kind::Model => names.org_models[member as usize].org,
                    Kind::Feature => names.org_features[member as usize].org,
                };
                let (view, zone) = (view as u32, shared.zone_of(org));
                let row =
                    Changed { org, view, gone: false, member, window, zone, spend, declared: None };
                row.add_to(&mut rows, withdrawn, &nothing);
            }
        }
        let after_built_in = |at: usize| (ALL_VIEWS.len() + at) as u32;
        for (at, declared) in rollup.declared.iter().enumerate() {
            let Some(declared) = declared else { continue };
            for (member, window, spend) in declared.table.changes() {
                let org = declared.members[member as usize].0;
                let (view, zone) = (after_built_in(at), shared.zone_of(org));
                let declared = Some(declared);
                let row = Changed { org, view, gone: false, member, window, zone, spend, declared };
                row.add_to(&mut rows, withdrawn, &nothing);
            }
        }
        for (n, old) in withdrawn.views.iter().enumerate() {
            // Under the number of the view that took its name, so that both stand in one list.
            let same = |view: &Option<Declared>| view.as_ref().is_some_and(|v| v.name == old.name);
            let at = rollup.declared.iter().position(same).unwrap_or(rollup.declared.len() + n);
            for (member, window, _) in old.table.rows() {
                let org = old.members[member as usize].0;
                let zones =
                    withdrawn.zones.iter().filter(|(of, _)| *of == org).map(|(_, zone)| *zone);
                for zone in zones.chain([shared.zone_of(org)]) {
                    let (view, spend, declared) = (after_built_in(at), &nothing, Some(old));
                    rows.push(Changed {
                        org,
                        view,
                        gone: true,
                        member,
                        window,
                        zone,
                        spend,
                        declared,
                    });
                }
            }
        }
        if rows.is_empty() {
            return;
        }
        // By number: numbers follow from the log alone, so a shard that was restored writes the same
        // bytes as one that never stopped. Members of declared views are numbered as they are met,
        // which a restore does in another order: those go by their values.
        rows.sort_unstable_by(|a, b| {
            let member = || match (a.values(), b.values()) {
                (None, None) => a.member.cmp(&b.member),
                (a, b) => a.cmp(&b),
            };
            (a.org, a.view, !a.gone)
                .cmp(&(b.org, b.view, !b.gone))
                .then_with(member)
                .then_with(|| (a.window, a.zone).cmp(&(b.window, b.zone)))
        });
        self.begin("orgs");
        let mut at = 0;
        while at < rows.len() {
            let org = rows[at].org;
            let len = rows[at..].iter().take_while(|row| row.org == org).count();
            let mut group = &rows[at..at + len];
            at += len;
            while !group.is_empty() {
                if self.open.len() > self.len_max {
                    self.end();
                    self.begin("orgs");
                }
                group = self.org(&shared, org, group, starts);
            }
        }
        self.end();
    }

    /// Writes rows of one org until the part is full; returns what is left.
    fn org<'a>(
        &mut self,
        shared: &meterr_operators::dataflow::Shared,
        org: u32,
        rows: &'a [Changed<'a>],
        starts: &mut Starts,
    ) -> &'a [Changed<'a>] {
        let out = &mut self.open;
        if !self.empty {
            out.push(b',');
        }
        self.empty = false;
        out.extend_from_slice(b"{\"org\":\"");
        // Orgs are [A-Za-z0-9_-], so need no escapes.
        out.extend_from_slice(shared.names.org_name(org).as_bytes());
        out.extend_from_slice(b"\",\"views\":");
        let (part, begin) = (self.parts.len(), out.len());
        out.push(b'{');
        let mut view = u32::MAX;
        for (at, row) in rows.iter().enumerate() {
            // At least one row, or the list to be closed would not be open.
            if at > 0 && out.len() > self.len_max {
                out.extend_from_slice(b"]}}");
                self.orgs.push(OrgPiece { org, part, views: begin..out.len() - 1 });
                return &rows[at..];
            }
            if row.view == view {
                out.push(b',');
            } else {
                if view != u32::MAX {
                    out.extend_from_slice(b"],");
                }
                view = row.view;
                write_text(out, row.view_name());
                out.extend_from_slice(b":[");
            }
            out.push(b'[');
            let zone = &shared.zones[row.zone as usize];
            match starts.of(row.size(), row.zone, zone, row.window) {
                Some(start) => {
                    out.push(b'"');
                    out.extend_from_slice(start.as_bytes());
                    out.extend_from_slice(b"\",");
                }
                None => out.extend_from_slice(b"null,"),
            }
            match (row.values(), ALL_VIEWS.get(view as usize)) {
                (Some(values), _) => {
                    let json = serde_json::to_string(values).unwrap_or_default();
                    write_text(out, &json);
                }
                (None, Some(view)) => match key_of(shared, *view, row.member) {
                    None => out.extend_from_slice(b"null"),
                    Some(key) => write_text(out, key),
                },
                (None, None) => out.extend_from_slice(b"null"),
            }
            write_figures(out, row.spend);
            out.push(b']');
        }
        out.extend_from_slice(b"]}}");
        self.orgs.push(OrgPiece { org, part, views: begin..out.len() - 1 });
        &[]
    }

    /// Adds dead letters.
    pub fn dead_letters(&mut self, shard: ShardId, dead: Vec<Dead>) {
        if dead.is_empty() {
            return;
        }
        self.begin("dead_letters");
        for (n, dead) in dead.into_iter().enumerate() {
            let letter = dead_letter(shard, self.epoch, n, dead);
            let json = serde_json::to_vec(&letter).expect("texts and numbers are always JSON");
            // A letter can be as long as many rows, so it is looked at before it goes in.
            if !self.empty && self.open.len() + json.len() > self.len_max {
                self.end();
                self.begin("dead_letters");
            }
            if !self.empty {
                self.open.push(b',');
            }
            self.empty = false;
            self.open.extend_from_slice(&json);
        }
        self.end();
    }

    /// The parts, their hash for the commit record, and where each org stands in them.
    pub fn finish(self) -> Parts {
        let hash = parts_hash(self.parts.iter().map(Vec::as_slice));
        Parts { parts: self.parts.into_iter().map(Bytes::from).collect(), hash, orgs: self.orgs }
    }
}

/// Hash of an epoch's parts, as its commit record states it.
pub fn parts_hash<'a>(parts: impl Iterator<Item = &'a [u8]>) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().to_hex().to_string()
}

fn dead_letter(shard: ShardId, epoch: u64, n: usize, dead: Dead) -> DeadLetter {
    let (raw, raw_base64, cut) = raw_text(&dead.raw);
    DeadLetter {
        id: format!("{shard}-{epoch}-{n}"),
        subject: dead.subject,
        position: dead.place.position,
        line: dead.place.line,
        reason: dead.rejection.reason,
        detail: dead.rejection.detail,
        raw,
        raw_base64,
        truncated: cut || dead.truncated,
        replayed: None,
    }
}

enum Kind {
    Org,
    User,
    Model,
    Feature,
}

fn kind(view: View) -> Kind {
    match view {
        View::OrgHour | View::OrgDay | View::OrgMonth | View::OrgAll => Kind::Org,
        View::UserDay | View::UserMonth => Kind::User,
        View::ModelDay | View::ModelMonth => Kind::Model,
        View::FeatureDay | View::FeatureMonth => Kind::Feature,
    }
}

/// Size of a window, for its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Size {
    /// Hours of UTC.
    Hour,
    /// Days of the org's zone.
    Day,
    /// Months of the org's zone.
    Month,
    /// All time.
    All,
}

impl From<meterr_operators::control::WindowSize> for Size {
    fn from(size: meterr_operators::control::WindowSize) -> Size {
        use meterr_operators::control::WindowSize;
        match size {
            WindowSize::Hour => Size::Hour,
            WindowSize::Day => Size::Day,
            WindowSize::Month => Size::Month,
            WindowSize::All => Size::All,
        }
    }
}

fn size_of_view(view: View) -> Size {
    match view {
        View::OrgHour => Size::Hour,
        View::OrgAll => Size::All,
        View::OrgDay | View::UserDay | View::ModelDay | View::FeatureDay => Size::Day,
        View::OrgMonth | View::UserMonth | View::ModelMonth | View::FeatureMonth => Size::Month,
    }
}

/// Starts of windows as text, remembered: a loaded shard writes the same few over and over.
#[derive(Debug, Default)]
pub struct Starts(std::collections::HashMap<(Size, u32, u32), Box<str>>);

impl Starts {
    /// Start of a window; `None` for all time.
    pub fn of(&mut self, size: Size, zone_at: u32, zone: &Zone, window: u32) -> Option<&str> {
        // Two years of hours and days in a few zones.
        if self.0.len() > 50_000 {
            self.0.clear();
        }
        let zone_at = if size == Size::Hour { 0 } else { zone_at };
        if size == Size::All {
            return None;
        }
        let start = self.0.entry((size, zone_at, window)).or_insert_with(|| {
            match size {
                Size::Hour => hour_instant(window).to_string(),
                Size::Day => zone.day_start(window),
                Size::Month | Size::All => zone.month_start(window),
            }
            .into()
        });
        Some(start)
    }
}

/// The key of a member: its name, `None` for the org itself.
pub fn key_of(
    shared: &meterr_operators::dataflow::Shared,
    view: View,
    member: u32,
) -> Option<&str> {
    let names = shared.names.names();
    match kind(view) {
        Kind::Org => None,
        Kind::User => Some(&names.users[member as usize].name),
        Kind::Model => Some(shared.names.symbol(names.org_models[member as usize].name)),
        Kind::Feature => Some(shared.names.symbol(names.org_features[member as usize].name)),
    }
}

fn write_text(out: &mut Vec<u8>, text: &str) {
    // Names have no control characters; quotes and backslashes are all that may need an escape.
    if text.bytes().any(|b| b == b'"' || b == b'\\' || b < 0x20) {
        let json = serde_json::to_vec(text).expect("a text is always JSON");
        out.extend_from_slice(&json);
    } else {
        out.push(b'"');
        out.extend_from_slice(text.as_bytes());
        out.push(b'"');
    }
}

fn write_figures(out: &mut Vec<u8>, spend: &Spend) {
    let mut number = itoa::Buffer::new();
    out.push(b',');
    out.extend_from_slice(number.format(spend.events).as_bytes());
    if spend.cost_unknown() {
        out.extend_from_slice(b",null,");
    } else {
        write!(out, ",\"{}\",", spend.cost).expect("writing to memory cannot fail");
    }
    out.extend_from_slice(number.format(spend.unpriced()).as_bytes());
    out.extend_from_slice(b",[");
    let meters = spend.meters();
    let used = meters.iter().rposition(|n| *n != 0).map_or(0, |at| at + 1);
    for (at, count) in meters[..used].iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        out.extend_from_slice(number.format(*count).as_bytes());
    }
    out.push(b']');
    let other = spend.rest.as_ref().map_or([Atto::ZERO; 3], |rest| rest.other_costs);
    if other != [Atto::ZERO; 3] {
        let [compute, storage, bandwidth] = other;
        write!(out, ",[\"{compute}\",\"{storage}\",\"{bandwidth}\"]")
            .expect("writing to memory cannot fail");
    }
    debug_assert_eq!(ALL_METERS.len(), meters.len());
}

/// Body of a live change, or of a snapshot.
pub fn stream_body(shard: ShardId, epoch: u64, as_of: &Positions, changes: &OrgChanges) -> Bytes {
    #[derive(Serialize)]
    struct Body<'a> {
        shard: ShardId,
        epoch: u64,
        as_of: &'a Positions,
        #[serde(flatten)]
        changes: &'a OrgChanges,
    }
    let body = Body { shard, epoch, as_of, changes };
    serde_json::to_vec(&body).expect("texts and numbers are always JSON").into()
}

/// All rows of an org, as a snapshot shows them: of the built-in views and of the declared ones.
pub fn org_rows(shard: &Shard, org: u32, set: ViewSet, starts: &mut Starts) -> OrgChanges {
    let mut rows = built_in_rows(shard, org, set, starts);
    let shared = shard.flow().shared().borrow();
    let zone_at = shared.zone_of(org);
    let zone = &shared.zones[zone_at as usize];
    for view in shared.rollup.declared.iter().flatten() {
        let mut list = Vec::new();
        for (member, (of, values)) in view.members.iter().enumerate() {
            if *of != org {
                continue;
            }
            let key = serde_json::to_string(values).unwrap_or_default();
            for (window, spend) in view.table.of_member(member as u32) {
                let start = starts.of(view.window.into(), zone_at, zone, window);
                let (window_start, key) = (start.map(str::to_owned), Some(key.clone()));
                list.push(Row { window_start, key, figures: figures(spend) });
            }
        }
        list.sort_unstable_by(|a, b| (&a.window_start, &a.key).cmp(&(&b.window_start, &b.key)));
        rows.views.insert(view.name.clone(), list);
    }
    rows
}

/// The rows of an org in the built-in views.
pub fn built_in_rows(shard: &Shard, org: u32, set: ViewSet, starts: &mut Starts) -> OrgChanges {
    let shared = shard.flow().shared().borrow();
    let mut rows =
        OrgChanges { org: shared.names.org_name(org).to_owned(), views: BTreeMap::new() };
    let members = shared.names.members(org);
    let zone_at = shared.zone_of(org);
    let zone = &shared.zones[zone_at as usize];
    let itself = [org];
    for view in ALL_VIEWS.into_iter().filter(|view| set.has(*view)) {
        let of: &[u32] = match kind(view) {
            Kind::Org => &itself,
            Kind::User => &members.users,
            Kind::Model => &members.models,
            Kind::Feature => &members.features,
        };
        let size = size_of_view(view);
        let mut list = Vec::new();
        for member in of {
            for (window, spend) in shared.rollup.table(view).of_member(*member) {
                let key = key_of(&shared, view, *member).map(str::to_owned);
                let window_start = starts.of(size, zone_at, zone, window).map(str::to_owned);
                list.push(Row { window_start, key, figures: figures(spend) });
            }
        }
        list.sort_unstable_by(|a, b| (&a.window_start, &a.key).cmp(&(&b.window_start, &b.key)));
        rows.views.insert(view.name().to_owned(), list);
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;
    use meterr_operators::event::METERS;

    #[test]
    fn a_row_reads_as_it_was_written() {
        let spend = Spend {
            events: 3,
            input: 10,
            cache_read: 2,
            output: 5,
            cost: Atto::new(412_500_000_000_000),
            rest: None,
        };
        let mut out = b"[\"2026-01-02T00:00:00Z\",\"u\\\"1\"".to_vec();
        write_figures(&mut out, &spend);
        out.push(b']');
        assert_eq!(
            String::from_utf8(out.clone()).unwrap(),
            r#"["2026-01-02T00:00:00Z","u\"1",3,"0.0004125",0,[10,2,0,0,5]]"#
        );
        let row: Row = serde_json::from_slice(&out).unwrap();
        assert_eq!(row.key.as_deref(), Some("u\"1"));
        assert_eq!(row.figures, figures(&spend));
    }

    #[test]
    fn a_row_with_other_costs_reads_as_it_was_written() {
        let rest = meterr_operators::usage::SpendRest {
            meters: [0, 0, 0, 0, 0, 2, 0],
            other_costs: [Atto::usd(1), Atto::ZERO, Atto::usd(2)],
            unpriced: 0,
        };
        let spend =
            Spend { events: 1, cost: Atto::usd(5), rest: Some(Box::new(rest)), ..Spend::default() };
        let mut out = b"[null,null".to_vec();
        write_figures(&mut out, &spend);
        out.push(b']');
        let row: Row = serde_json::from_slice(&out).unwrap();
        assert_eq!(row.figures, figures(&spend));
        assert_eq!((row.figures.images, row.figures.costs.ai), (2, Atto::usd(2)));
    }

    #[test]
    fn an_epoch_reads_the_same_wherever_its_parts_end() {
        use meterr_operators::event::{Event, EventFields, HashKey};
        use meterr_operators::shard::{History, Incoming};

        struct None;
        impl History for None {
            fn event_at(
                &mut self,
                _: meterr_operators::dedupe::Place,
            ) -> Result<Event<'static>, String> {
                Err("nothing is replaced here".to_owned())
            }
        }
        let mut worker = crate::worker::timely_worker();
        let key = HashKey([1; 16]);
        let mut shard = Shard::new(&mut worker, ShardId(0), 1, key, ViewSet::DEFAULT);
        let events: Vec<_> = (0..12)
            .map(|n| {
                let fields = EventFields {
                    id: format!("e{n}").into(),
                    time: Time(n * meterr_operators::time::DAY),
                    org: format!("org-{}", n % 3).into(),
                    user: format!("u{}", n % 4).into(),
                    provider: "p".into(),
                    model: "m".into(),
                    meters: [1; METERS],
                    ..EventFields::default()
                };
                (n as u32 + 1, &b""[..], Event::new(fields))
            })
            .collect();
        let time = Time(20 * meterr_operators::time::DAY);
        let message =
            Incoming { position: 1, time, subject: "usage.0.@batch", lines: events.into_iter() };
        shard.message(message, &mut None).unwrap();
        shard.close_epoch(&mut worker, 1);
        let rows_at = |len_max: usize| {
            let mut writer = PartWriter { len_max, ..PartWriter::new(1, 1, 1) };
            writer.changes(&shard, &Withdrawn::default(), &mut Starts::default());
            let Parts { parts, orgs, .. } = writer.finish();
            for piece in &orgs {
                let views = &parts[piece.part][piece.views.clone()];
                let _: BTreeMap<String, Vec<Row>> = serde_json::from_slice(views).unwrap();
            }
            let mut rows = Vec::new();
            for (n, part) in parts.iter().enumerate() {
                let part: Part = serde_json::from_slice(part).unwrap();
                assert_eq!(part.part as usize, n);
                for org in part.orgs {
                    for (view, list) in org.views {
                        rows.extend(
                            list.into_iter().map(|row| (org.org.clone(), view.clone(), row)),
                        );
                    }
                }
            }
            (parts.len(), rows)
        };
        let (one, whole) = rows_at(usize::MAX);
        assert_eq!(one, 1);
        let mut most = 0;
        for len_max in 1..6_000 {
            let (parts, mut rows) = rows_at(len_max);
            most = most.max(parts);
            // Views of an org cut in two are read in the order of their names in each part.
            let by_name = |row: &(String, String, Row)| {
                (row.0.clone(), row.1.clone(), row.2.window_start.clone(), row.2.key.clone())
            };
            let mut expected = whole.clone();
            expected.sort_by_key(by_name);
            rows.sort_by_key(by_name);
            assert_eq!(rows, expected, "parts of {len_max} bytes");
        }
        assert!(most > 20, "{most}");
    }
}
