//! Random histories of a small world, for tests of whatever turns logs into views.
//!
//! A history is what the logs of a deployment hold: messages of usage per shard, control changes,
//! and the boundaries at which epochs were closed. It is drawn so that the rare cases are common:
//! duplicates, conflicting ones, revisions out of order, voids before and after what they take
//! back, reinstated voids, events late, too late and too far ahead, log time that jumps across the
//! horizon, backfill, bad lines, reported costs, every tier and context class, retroactive and
//! future prices, overrides, time zones with odd offsets, declared views. The same seed gives the
//! same history.
//!
//! Two rules keep a history independent of how a reader groups its work: a change of the horizon,
//! which decides what later messages mean, has a boundary on both sides; and no record is more
//! than 24 h of log time after the one before it in its shard, since that would stop the shard.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::control::{ControlChange, HORIZON_SECONDS_DEFAULT};
use crate::event::{
    ALL_TIERS, CONTEXT_BOUNDS, COST_CATEGORIES, Event, EventFields, Meter, Reason, Rejection, Tier,
};
use crate::ids::{ShardId, shard_of};
use crate::money::Atto;
use crate::rng::Rng;
use crate::time::{DAY, HOUR, MINUTE, SECOND, SLOT, Time};

/// One record, or the end of an epoch.
#[derive(Debug, Clone)]
pub enum Step {
    /// A record of a usage log.
    Message(UsageMessage),
    /// A record of the control log.
    Control(ControlChange),
    /// All epochs are closed here, in every shard.
    Boundary,
}

/// A record of a usage log.
#[derive(Debug, Clone)]
pub struct UsageMessage {
    /// The shard whose log it stands in.
    pub shard: ShardId,
    /// Its position there; dense from 1.
    pub position: u64,
    /// The log's time of it. Falls now and then, as a server's clock may.
    pub time: Time,
    /// `usage.<shard>.<org>`, `….@batch`, `….@backfill` or `….@tick`.
    pub subject: String,
    /// Its lines; none in a tick.
    pub lines: Vec<Line>,
}

impl UsageMessage {
    /// The payload: the lines as NDJSON.
    pub fn payload(&self) -> String {
        self.lines.iter().map(|line| format!("{}\n", line.text)).collect()
    }

    /// The lines as a decoder finds them.
    pub fn decoded(&self) -> Vec<Result<Event<'static>, Rejection>> {
        self.lines.iter().map(|line| line.event.clone()).collect()
    }
}

/// A line of a message.
#[derive(Debug, Clone)]
pub struct Line {
    /// Native JSON, or what is meant to look like it.
    pub text: String,
    /// What a decoder makes of it. Of a refusal only the reason is binding.
    pub event: Result<Event<'static>, Rejection>,
}

/// Size of a history.
#[derive(Debug, Clone, Copy)]
pub struct HistoryOptions {
    /// Shards of the deployment.
    pub shards: u16,
    /// Orgs, at most 8.
    pub orgs: usize,
    /// Messages, control changes and boundaries, roughly.
    pub steps: usize,
    /// Most lines of a message.
    pub lines_max: u64,
}

impl Default for HistoryOptions {
    fn default() -> Self {
        HistoryOptions { shards: 2, orgs: 4, steps: 80, lines_max: 8 }
    }
}

/// Orgs of the world.
pub const ORGS: [&str; 8] =
    ["acme", "globex", "initech", "umbrella", "hooli", "Wayne_Ent", "o-6", "stark"];
/// Users; the same names in every org.
pub const USERS: [&str; 5] = ["u-1", "u-2", "zoë", "日本", "a b|c,d\"e"];
/// Providers and models. The last is never priced.
pub const MODELS: [(&str, &str); 5] = [
    ("openai", "gpt-4o"),
    ("openai", "gpt-4o-mini"),
    ("anthropic", "claude-sonnet-4-5"),
    ("azure", "gpt-4o"),
    ("nobody", "unpriced"),
];
/// Features.
pub const FEATURES: [&str; 3] = ["", "chat", "agent"];
/// Time zones: whole, half and quarter hours, half an hour of summer time, a day left out.
pub const TIME_ZONES: [&str; 7] = [
    "UTC",
    "Asia/Kolkata",
    "Asia/Kathmandu",
    "America/New_York",
    "Australia/Lord_Howe",
    "Pacific/Apia",
    "Africa/Casablanca",
];
/// Where log time begins: ordinary days, and some around which a zone changes its offset (New York
/// in spring and autumn, Lord Howe, the day Apia left out).
const STARTS: [&str; 6] = [
    "2026-01-30T22:10:00Z",
    "2026-03-07T20:00:00Z",
    "2026-10-31T21:00:00Z",
    "2026-04-04T09:00:00Z",
    "2011-12-29T12:00:00Z",
    "2024-02-28T23:59:59.999999Z",
];

/// A random history. It ends with a boundary.
pub fn history(rng: &mut Rng, options: &HistoryOptions) -> Vec<Step> {
    let mut world = World::new(rng, options);
    for _ in 0..world.rng.below(3) {
        world.prices();
    }
    if world.rng.percent(70) {
        world.horizon();
    }
    for _ in 0..options.steps {
        match world.rng.below(100) {
            0..66 => world.message(options.lines_max),
            66..74 => world.prices(),
            74..77 => world.time_zone(),
            77..80 => world.view(),
            80..82 => world.horizon(),
            82..86 => world.pass_time(),
            _ => world.steps.push(Step::Boundary),
        }
    }
    world.steps.push(Step::Boundary);
    world.steps
}

/// The event as native JSON, meters joined to the totals it is written with.
pub fn native_json(event: &EventFields<'_>) -> String {
    let mut fields = serde_json::Map::new();
    let mut set = |name: &str, value: Value| {
        fields.insert(name.to_owned(), value);
    };
    set("id", json!(event.id));
    set("time", json!(event.time));
    set("org", json!(event.org));
    if event.revision > 0 {
        set("revision", json!(event.revision));
    }
    if let Some(time) = event.original_time {
        set("original_time", json!(time));
    }
    if event.void {
        set("void", json!(true));
        return Value::Object(fields).to_string();
    }
    for (name, text) in [
        ("user", &event.user),
        ("provider", &event.provider),
        ("model", &event.model),
        ("feature", &event.feature),
    ] {
        if !text.is_empty() {
            set(name, json!(text));
        }
    }
    for (name, meters) in [
        ("input_tokens", &crate::event::INPUT_METERS[..]),
        ("cached_input_tokens", &[Meter::CacheRead]),
        ("cache_write_tokens", &[Meter::CacheWrite]),
        ("cache_write_1h_tokens", &[Meter::CacheWrite1h]),
        ("audio_input_tokens", &[Meter::AudioInput]),
        ("output_tokens", &crate::event::OUTPUT_METERS[..]),
        ("reasoning_tokens", &[Meter::Reasoning]),
        ("audio_output_tokens", &[Meter::AudioOutput]),
        ("images", &[Meter::Images]),
        ("searches", &[Meter::Searches]),
    ] {
        let units: u64 = meters.iter().map(|meter| u64::from(event.meters[*meter as usize])).sum();
        if units > 0 {
            set(name, json!(units));
        }
    }
    if event.tier != Tier::Standard {
        set("service_tier", json!(event.tier));
    }
    if let Some(costs) = &event.explicit {
        let by_category = COST_CATEGORIES.iter().zip(costs);
        let others = costs[..3].iter().any(|cost| *cost != Atto::ZERO);
        if others {
            let costs: serde_json::Map<String, Value> = by_category
                .filter(|(_, cost)| **cost != Atto::ZERO)
                .map(|(category, cost)| ((*category).to_owned(), json!(cost)))
                .collect();
            set("costs", Value::Object(costs));
        } else {
            set("cost", json!(costs[3]));
        }
    }
    if !event.tags.is_empty() {
        let tags = event.tags.iter().map(|(name, value)| (name.to_string(), json!(value)));
        set("tags", Value::Object(tags.collect()));
    }
    Value::Object(fields).to_string()
}

/// An id and what was or could have been sent under it.
struct Known {
    first_time: Time,
    versions: Vec<EventFields<'static>>,
}

struct World<'r> {
    rng: &'r mut Rng,
    steps: Vec<Step>,
    /// Orgs by the shard they live in; only shards with an org.
    orgs: BTreeMap<ShardId, Vec<&'static str>>,
    positions: BTreeMap<ShardId, u64>,
    /// The newest log time of any shard.
    now: Time,
    horizon: i64,
    known: BTreeMap<&'static str, Vec<Known>>,
}

impl<'r> World<'r> {
    fn new(rng: &'r mut Rng, options: &HistoryOptions) -> Self {
        let mut orgs: BTreeMap<ShardId, Vec<&'static str>> = BTreeMap::new();
        for org in &ORGS[..options.orgs.clamp(1, ORGS.len())] {
            orgs.entry(shard_of(org, options.shards)).or_default().push(org);
        }
        let now = Time::parse(rng.pick::<&str>(&STARTS)).expect("the times above are well formed");
        World {
            rng,
            steps: Vec::new(),
            orgs,
            positions: BTreeMap::new(),
            now,
            horizon: HORIZON_SECONDS_DEFAULT as i64 * SECOND,
            known: BTreeMap::new(),
        }
    }

    fn record(&mut self, shard: ShardId, time: Time, addressee: &str, lines: Vec<Line>) {
        let position = self.positions.entry(shard).or_insert(0);
        *position += 1;
        let subject = format!("usage.{shard}.{addressee}");
        let message = UsageMessage { shard, position: *position, time, subject, lines };
        self.steps.push(Step::Message(message));
    }

    fn message(&mut self, lines_max: u64) {
        if self.rng.percent(80) {
            self.now.0 += self.rng.between(0, 20 * MINUTE);
        }
        let shards: Vec<ShardId> = self.orgs.keys().copied().collect();
        let shard = *self.rng.pick(&shards);
        let orgs = self.orgs[&shard].clone();
        let own = *self.rng.pick(&orgs);
        let addressee = match self.rng.below(10) {
            0 => "@backfill",
            1..4 => "@batch",
            _ => own,
        };
        let lines = (0..1 + self.rng.below(lines_max.max(1)))
            .map(|_| {
                let strangers = self.rng.percent(3);
                let org = match (strangers, addressee.starts_with('@')) {
                    (true, _) => *self.rng.pick(&ORGS),
                    (false, true) => *self.rng.pick(&orgs),
                    (false, false) => own,
                };
                if self.rng.percent(5) { self.bad_line(org) } else { self.line(org) }
            })
            .collect();
        let fall = if self.rng.percent(5) { self.rng.between(0, 5 * MINUTE) } else { 0 };
        self.record(shard, Time(self.now.0 - fall), addressee, lines);
    }

    /// Lets log time pass in every shard, without usage.
    fn pass_time(&mut self) {
        let mut left = match self.rng.below(4) {
            0 => self.rng.between(HOUR, 20 * HOUR),
            // To the instant at which a bucket expires, and to just before it.
            1 => self.horizon + HOUR - self.now.0.rem_euclid(HOUR),
            2 => self.horizon + HOUR - self.now.0.rem_euclid(HOUR) - 1,
            _ => self.horizon + self.rng.between(0, 3 * HOUR),
        };
        while left > 0 {
            let step = left.min(20 * HOUR);
            self.now.0 += step;
            left -= step;
            let shards: Vec<ShardId> = self.orgs.keys().copied().collect();
            for shard in shards {
                self.record(shard, self.now, "@tick", Vec::new());
            }
        }
    }

    fn control(&mut self, change: Value) {
        // Read from its bytes, as every reader gets it.
        let change = ControlChange::parse(change.to_string().as_bytes())
            .expect("generated control changes are valid");
        self.steps.push(Step::Control(change));
    }

    fn horizon(&mut self) {
        let seconds = *self.rng.pick(&[3_600, 7_200, 10_000, 86_400, 3 * 86_400, 35 * 86_400]);
        self.steps.push(Step::Boundary);
        self.control(json!({"type": "horizon", "seconds": seconds}));
        self.steps.push(Step::Boundary);
        self.horizon = seconds * SECOND;
    }

    fn time_zone(&mut self) {
        let (org, zone) = (*self.rng.pick(&ORGS), *self.rng.pick(&TIME_ZONES));
        self.control(json!({"type": "time_zone", "org": org, "time_zone": zone}));
    }

    fn view(&mut self) {
        let name = *self.rng.pick(&["v1", "v2"]);
        if self.rng.percent(25) {
            return self.control(json!({"type": "view_removed", "name": name}));
        }
        let mut by = vec!["user", "provider", "model", "feature", "tag:team", "tag:env"];
        while by.len() > 3 || (by.len() > 1 && self.rng.percent(40)) {
            by.remove(self.rng.below(by.len() as u64) as usize);
        }
        let window = *self.rng.pick(&["hour", "day", "month", "all"]);
        self.control(json!({"type": "view", "name": name, "by": by, "window": window}));
    }

    fn prices(&mut self) {
        let mut prices: Vec<Value> = Vec::new();
        // At most one entry a model: a list must not contradict itself.
        for (provider, model) in &MODELS[..MODELS.len() - 1] {
            if !self.rng.percent(40) {
                continue;
            }
            let mut entry = json!({"provider": provider, "model": model});
            for (name, percent, decimals) in [
                ("input", 85, 4),
                ("cached_input", 40, 4),
                ("cache_write", 25, 4),
                ("cache_write_1h", 25, 4),
                ("output", 85, 4),
                ("reasoning", 30, 4),
                ("audio_input", 25, 4),
                ("audio_output", 25, 4),
                ("image", 40, 6),
                ("search", 40, 18),
            ] {
                if self.rng.percent(percent) {
                    let price = Atto::new(self.rng.between(0, 99_999).into());
                    let mut scaled = price.get();
                    (decimals..18).for_each(|_| scaled *= 10);
                    entry[name] = json!(Atto::new(scaled));
                }
            }
            if self.rng.percent(5) {
                // Without any price: a withdrawal.
                entry = json!({"provider": provider, "model": model});
            }
            if self.rng.percent(40) {
                entry["tier"] = json!(self.rng.pick(&ALL_TIERS));
            }
            if self.rng.percent(40) {
                entry["min_input_tokens"] = json!(self.rng.pick(&CONTEXT_BOUNDS));
            }
            if self.rng.percent(25) {
                entry["org"] = json!(self.rng.pick(&ORGS));
            }
            if self.rng.percent(65) {
                // Few beginnings, so that entries of one key meet and correct each other.
                let slot = match self.rng.below(3) {
                    0 => self.now.0.div_euclid(DAY) * DAY - self.rng.between(-2, 5) * DAY,
                    1 => self.now.0.div_euclid(SLOT) * SLOT + self.rng.between(-6, 4) * SLOT,
                    _ => self.now.0.div_euclid(HOUR) * HOUR - self.rng.between(0, 100) * HOUR,
                };
                entry["effective_from"] = json!(Time(slot));
            }
            prices.push(entry);
        }
        if !prices.is_empty() {
            self.control(json!({"type": "prices", "prices": prices}));
        }
    }

    fn bad_line(&mut self, org: &'static str) -> Line {
        let mut fields = self.fresh(org);
        match self.rng.below(7) {
            0 => {
                let mut text = native_json(&fields);
                text.truncate(20);
                return malformed(text);
            }
            1 => return malformed("not json".to_owned()),
            2 => fields.user = "".into(),
            3 => fields.org = "a.b".into(),
            4 => fields.meters[Meter::Input as usize] = 1_000_000_001,
            5 => fields.void = true,
            _ => fields.id = "".into(),
        }
        let line = line_of(fields);
        debug_assert!(line.event.is_err());
        line
    }

    fn line(&mut self, org: &'static str) -> Line {
        let ids = self.known.get(org).map_or(0, Vec::len);
        if ids == 0 || self.rng.percent(45) {
            let fields = self.fresh(org);
            let mut versions = vec![fields.clone()];
            let mut sent = fields.clone();
            if self.rng.percent(8) {
                // The void arrives before what it takes back, which may follow as a "resend".
                let revision = 1 + self.rng.below(3) as u32;
                sent = void_of(&fields, revision, None);
                versions.push(sent.clone());
            }
            let known = Known { first_time: fields.time, versions };
            self.known.entry(org).or_default().push(known);
            return line_of(sent);
        }
        // Recent ids half of the time: older ones are mostly forgotten, and refused as too late.
        let at = if self.rng.percent(50) {
            ids - 1 - self.rng.below(ids.min(6) as u64) as usize
        } else {
            self.rng.below(ids as u64) as usize
        };
        let known = &self.known[org][at];
        let first_time = known.first_time;
        let any = self.rng.pick(&known.versions).clone();
        let newest = known.versions.iter().max_by_key(|version| version.revision);
        let newest = newest.expect("an id has a version").revision;
        let content = known.versions.iter().rev().find(|version| !version.void).cloned();
        let content = content.expect("the first version is no void");
        let fields = match self.rng.below(20) {
            0..6 => return line_of(any),
            6..8 if any.void => void_of(&content, any.revision, Some(Time(any.time.0 + 1))),
            6..8 => {
                // Same revision, other content: conflicting, or superseded, or accepted if the
                // version it conflicts with was never sent.
                let mut fields = self.changed(any, first_time);
                fields.meters[Meter::Output as usize] ^= 1;
                return line_of(fields);
            }
            8..10 => {
                // A revision in between, too late to matter unless the newer ones are still to come.
                let mut fields = self.changed(content, first_time);
                fields.revision = self.rng.below(u64::from(newest) + 1) as u32;
                if fields.revision == 0 {
                    fields.original_time = None;
                }
                fields
            }
            10..14 => {
                let revision = newest + 1 + self.rng.below(2) as u32;
                let moved = self.rng.percent(20).then_some(self.now);
                let mut fields = void_of(&content, revision, moved);
                if fields.time != first_time || self.rng.percent(10) {
                    fields.original_time = Some(first_time);
                }
                fields
            }
            _ => {
                let mut fields = content;
                fields.revision = newest + 1 + self.rng.below(3) as u32;
                self.changed(fields, first_time)
            }
        };
        if let Some(known) = self.known.get_mut(org).and_then(|ids| ids.get_mut(at)) {
            known.versions.push(fields.clone());
        }
        line_of(fields)
    }

    /// Changes some of the content. Revision 0 keeps its time.
    fn changed(&mut self, mut fields: EventFields<'static>, first: Time) -> EventFields<'static> {
        let other = self.fresh_content();
        match self.rng.below(8) {
            0 => fields.user = other.user,
            1 => fields.meters = other.meters,
            2 => (fields.provider, fields.model) = (other.provider, other.model),
            3 => fields.feature = other.feature,
            4 => fields.tier = other.tier,
            5 => fields.explicit = other.explicit,
            6 => fields.tags = other.tags,
            _ => {
                fields = EventFields {
                    id: fields.id,
                    time: fields.time,
                    org: fields.org,
                    revision: fields.revision,
                    ..other
                }
            }
        }
        if fields.provider.is_empty() && fields.explicit.is_none() {
            (fields.provider, fields.model) = ("openai".into(), "gpt-4o".into());
        }
        if fields.revision > 0 && self.rng.percent(30) {
            fields.time = Time(fields.time.0 + self.rng.between(-2 * DAY, 30 * MINUTE));
        }
        let moved = fields.revision > 0 && fields.time != first;
        fields.original_time = moved.then_some(first);
        fields
    }

    fn fresh(&mut self, org: &'static str) -> EventFields<'static> {
        // Counted per org: the same ids in every org.
        let n = self.known.get(org).map_or(0, Vec::len);
        let time = self.event_time();
        EventFields { id: format!("e{n}").into(), org: org.into(), time, ..self.fresh_content() }
    }

    fn event_time(&mut self) -> Time {
        let now = self.now.0;
        let exact = self.rng.between(-1, 1);
        Time(match self.rng.below(100) {
            0..55 => now - self.rng.between(0, 2 * HOUR),
            55..70 => now - self.rng.between(0, 6 * DAY),
            70..80 => {
                let grain = *self.rng.pick(&[SLOT, 30 * MINUTE, HOUR, DAY]);
                (now - self.rng.between(0, 3 * DAY)).div_euclid(grain) * grain + exact
            }
            80..85 => now + self.rng.between(0, HOUR),
            85..88 => now + HOUR + exact,
            // Around the end of what is forgotten.
            88..95 => {
                let end = (now - self.horizon).div_euclid(HOUR) * HOUR;
                end + self.rng.between(0, 2) * HOUR + exact
            }
            _ => now - self.horizon - self.rng.between(0, 10 * DAY),
        })
    }

    /// Everything but the identity and the time.
    fn fresh_content(&mut self) -> EventFields<'static> {
        let (provider, model) = *self.rng.pick(&MODELS);
        let mut fields = EventFields {
            user: (*self.rng.pick(&USERS)).into(),
            provider: provider.into(),
            model: model.into(),
            feature: (*self.rng.pick(&FEATURES)).into(),
            tier: if self.rng.percent(60) { Tier::Standard } else { *self.rng.pick(&ALL_TIERS) },
            ..EventFields::default()
        };
        // Input by its total, so that it falls on both sides of the bounds of context classes.
        let mut input = match self.rng.below(10) {
            0..3 => {
                let bound = *self.rng.pick(&CONTEXT_BOUNDS) as i64;
                (bound + self.rng.between(-1, 1)).max(0)
            }
            3 => self.rng.between(0, 600_000),
            _ => self.rng.between(0, 5_000),
        };
        let mut output = self.rng.between(0, 2_000);
        for meter in [Meter::CacheRead, Meter::CacheWrite, Meter::CacheWrite1h, Meter::AudioInput] {
            if self.rng.percent(25) {
                let part = self.rng.between(0, input);
                fields.meters[meter as usize] = part as u32;
                input -= part;
            }
        }
        for meter in [Meter::Reasoning, Meter::AudioOutput] {
            if self.rng.percent(25) {
                let part = self.rng.between(0, output);
                fields.meters[meter as usize] = part as u32;
                output -= part;
            }
        }
        fields.meters[Meter::Input as usize] = input as u32;
        fields.meters[Meter::Output as usize] = output as u32;
        for meter in [Meter::Images, Meter::Searches] {
            if self.rng.percent(10) {
                fields.meters[meter as usize] = self.rng.between(1, 9) as u32;
            }
        }
        if self.rng.percent(12) {
            let mut costs = [Atto::ZERO; 4];
            costs[3] = Atto::new(self.rng.between(0, i64::MAX).into());
            if self.rng.percent(50) {
                costs[self.rng.below(3) as usize] = Atto::usd(self.rng.between(0, 1_000_000_000));
            }
            fields.explicit = Some(costs);
            if self.rng.percent(50) {
                (fields.provider, fields.model) = ("".into(), "".into());
            }
        }
        for (name, values) in [("env", ["prod", ""]), ("team", ["core", "ml"])] {
            if self.rng.percent(35) {
                fields.tags.push((name.into(), (*self.rng.pick(&values)).into()));
            }
        }
        fields
    }
}

fn void_of(of: &EventFields<'_>, revision: u32, time: Option<Time>) -> EventFields<'static> {
    EventFields {
        id: of.id.to_string().into(),
        org: of.org.to_string().into(),
        time: time.unwrap_or(of.time),
        revision,
        void: true,
        original_time: of.original_time,
        ..EventFields::default()
    }
}

fn line_of(fields: EventFields<'static>) -> Line {
    Line { text: native_json(&fields), event: Event::new(fields) }
}

fn malformed(text: String) -> Line {
    Line { text, event: Err(Rejection::new(Reason::Malformed, "not a JSON object")) }
}
