//! The oracle: what every figure must be, computed slowly and obviously.
//!
//! [`Reference`] is fed the same logs as the dataflow and keeps the accepted versions as they are.
//! Every question is answered by going through all of them, pricing each event anew from all
//! prices known. It shares with the rest only the types of values; it knows no dictionaries, no
//! differences, no slots as keys and no price intervals. Tests compare every view with it, and
//! `meterr verify` recomputes a deployment with it. Cost: O(events × price entries) a question;
//! all content in memory.
//!
//! # The rules
//! *Log time* of a shard is the running maximum of the times of its records. An id is remembered
//! in the *bucket*, one hour of log time, of its **first** arrival. A bucket is forgotten once log
//! time has reached its end plus the horizon; that happens before the lines of a record are looked
//! at, and the *expired end* is the end of the newest bucket ever forgotten. Only buckets that
//! hold an id exist. Accepted content stays counted after its id is forgotten.
//!
//! A line, in this order: what the decoder refused is a dead letter; so is an event of an org that
//! lives elsewhere (`wrong_shard`), or not of the subject's org (`org_mismatch`), or more than one
//! hour ahead of log time (`too_far_ahead`: its `time` or `original_time`), or so old that a copy
//! may have been forgotten (`too_late`: (`original_time` or `time`) − 1 h at or before the expired
//! end; not in a backfill). Then, by (org, id): unknown → remembered, counted unless void; lower
//! revision → ignored; same revision → ignored if the content is equal, else a dead letter; higher
//! revision → takes the earlier one's place.

use std::collections::BTreeMap;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use serde_json::Value;

use crate::control::{
    ControlChange, Dimension, HORIZON_SECONDS_DEFAULT, ViewDeclared, WindowSize, zone,
};
use crate::event::{
    ALL_METERS, CONTEXT_BOUNDS, Costs, Event, METERS, Meter, Reason, Rejection, Tier, context_class,
};
use crate::ids::{ShardId, shard_of};
use crate::money::Atto;
use crate::price_book::PriceEntry;
use crate::time::{HOUR, SECOND, Slot, Time};

/// How far an event may be ahead of log time.
const AHEAD_MAX: i64 = HOUR;
/// One bucket of ids.
const BUCKET: i64 = HOUR;

/// Figures of one row.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Row {
    /// Events counted.
    pub events: i64,
    /// Units per meter, by [`Meter`] as index.
    pub meters: [i64; METERS],
    /// Cost by the price book, of the priced part.
    pub book_cost: Atto,
    /// Explicit costs, by category.
    pub explicit: Costs,
    /// Events that use a meter no price is known for.
    pub unpriced_events: i64,
}

impl Row {
    /// The cost shown: of the priced part, explicit cost included; none when nothing is priced.
    pub fn cost(&self) -> Option<Atto> {
        let cost = self.book_cost + self.explicit.into_iter().sum();
        let nothing_priced = self.events > 0 && self.unpriced_events == self.events;
        if nothing_priced && cost == Atto::ZERO { None } else { Some(cost) }
    }

    fn add(&mut self, event: &Event<'_>, priced: &Priced) {
        self.events += 1;
        for (sum, count) in self.meters.iter_mut().zip(event.meters) {
            *sum += i64::from(count);
        }
        self.book_cost += priced.cost;
        for (sum, cost) in self.explicit.iter_mut().zip(event.explicit.unwrap_or_default()) {
            *sum += cost;
        }
        self.unpriced_events += i64::from(!priced.lacking.is_empty());
    }
}

impl std::ops::AddAssign for Row {
    fn add_assign(&mut self, other: Row) {
        self.events += other.events;
        for (sum, count) in self.meters.iter_mut().zip(other.meters) {
            *sum += count;
        }
        self.book_cost += other.book_cost;
        for (sum, cost) in self.explicit.iter_mut().zip(other.explicit) {
            *sum += cost;
        }
        self.unpriced_events += other.unpriced_events;
    }
}

/// Rows by window and key. The window is `2026-01-02T03:00:00Z` (hours), `2026-01-02` (days),
/// `2026-01` (months) or empty (all); the key has one text per dimension grouped by.
pub type Rows = BTreeMap<(String, Vec<String>), Row>;

/// A line that was not counted: position, line from 1, reason.
pub type Refused = (u64, u32, Reason);

/// Usage that lacks a price, by (provider, model, tier, lower bound of the context class).
pub type Unpriced = BTreeMap<(String, String, &'static str, u64), UnpricedUsage>;

/// What lacks a price in one row of [`Unpriced`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnpricedUsage {
    /// Meters in use that lack one, ascending.
    pub lacking: Vec<usize>,
    /// Start of the first slot with such usage.
    pub first: Time,
    /// Start of the last slot with such usage.
    pub last: Time,
    /// Events concerned.
    pub events: i64,
}

/// Everything the logs have told so far.
#[derive(Debug, Clone)]
pub struct Reference {
    shards: BTreeMap<ShardId, Shard>,
    shard_count: u16,
    horizon: i64,
    prices: Vec<Price>,
    time_zones: BTreeMap<String, TimeZone>,
    views: BTreeMap<String, ViewDeclared>,
}

/// One usage log.
#[derive(Debug, Clone, Default)]
struct Shard {
    log_time: Option<Time>,
    /// Every version ever counted, with what replaced or voided ones set to none.
    counted: Vec<Option<Event<'static>>>,
    /// By (org, id), of the ids not forgotten.
    remembered: BTreeMap<(String, String), Remembered>,
    /// The same ids by the start of the bucket of their first arrival.
    buckets: BTreeMap<i64, Vec<(String, String)>>,
    /// End of the newest bucket ever forgotten.
    expired_end: Option<i64>,
    dead_letters: Vec<Refused>,
}

#[derive(Debug, Clone)]
struct Remembered {
    /// The newest version.
    event: Event<'static>,
    /// Where it stands in `counted`, unless it is void.
    counted_at: Option<usize>,
}

impl Reference {
    /// Nothing known yet. `shard_count` is the number of shards of the deployment.
    pub fn new(shard_count: u16) -> Self {
        Reference {
            shards: BTreeMap::new(),
            shard_count,
            horizon: HORIZON_SECONDS_DEFAULT as i64 * SECOND,
            prices: Vec::new(),
            time_zones: BTreeMap::new(),
            views: BTreeMap::new(),
        }
    }

    /// A record of the control log. A new horizon holds from the next message on.
    pub fn control(&mut self, change: &ControlChange) {
        match change {
            ControlChange::Prices(change) => {
                self.prices.extend(change.prices.iter().map(Price::of));
            }
            ControlChange::TimeZone(change) => {
                let zone = zone(&change.time_zone).expect("checked when the change was read");
                self.time_zones.insert(change.org.clone(), zone);
            }
            ControlChange::View(view) => {
                self.views.insert(view.name.clone(), view.clone());
            }
            ControlChange::ViewRemoved(view) => {
                self.views.remove(&view.name);
            }
            ControlChange::Horizon(change) => self.horizon = change.seconds as i64 * SECOND,
            ControlChange::Seed(seed) => self.shard_count = seed.shards,
            ControlChange::DeadLetterReplayed(_) => {}
        }
    }

    /// A record of a usage log, with its lines as decoded. `subject` is `usage.<shard>.<org>`,
    /// `….@batch`, `….@backfill` or `….@tick`.
    pub fn message(
        &mut self,
        shard: ShardId,
        position: u64,
        log_time: Time,
        subject: &str,
        lines: &[Result<Event<'static>, Rejection>],
    ) {
        let (shard_count, horizon) = (self.shard_count, self.horizon);
        let state = self.shards.entry(shard).or_default();
        let now = state.log_time.map_or(log_time, |before| before.max(log_time));
        state.log_time = Some(now);
        state.forget(now, horizon);

        let addressee = subject.splitn(3, '.').nth(2).unwrap_or_default();
        for (line, decoded) in (1..).zip(lines) {
            let outcome = match decoded {
                Err(rejection) => Err(rejection.reason),
                Ok(event) if shard_of(&event.org, shard_count) != shard => Err(Reason::WrongShard),
                Ok(event) if !addressee.starts_with('@') && event.org != addressee => {
                    Err(Reason::OrgMismatch)
                }
                Ok(event) => state.event(event, now, addressee == "@backfill"),
            };
            if let Err(reason) = outcome {
                state.dead_letters.push((position, line, reason));
            }
        }
    }

    /// Log time of a shard.
    pub fn log_time(&self, shard: ShardId) -> Option<Time> {
        self.shards.get(&shard)?.log_time
    }

    /// The versions counted now, of all shards.
    pub fn counted(&self) -> impl Iterator<Item = &Event<'static>> {
        self.shards.values().flat_map(|shard| shard.counted.iter().flatten())
    }

    /// Events counted now.
    pub fn events_counted(&self) -> usize {
        self.counted().count()
    }

    /// Ids a shard remembers now.
    pub fn ids_remembered(&self, shard: ShardId) -> usize {
        self.shards.get(&shard).map_or(0, |shard| shard.remembered.len())
    }

    /// What a shard refused, in the order of its log.
    pub fn dead_letters(&self, shard: ShardId) -> &[Refused] {
        self.shards.get(&shard).map_or(&[], |shard| &shard.dead_letters)
    }

    /// The declared views, by name.
    pub fn views(&self) -> &BTreeMap<String, ViewDeclared> {
        &self.views
    }

    /// Orgs with at least one event counted, ascending.
    pub fn orgs(&self) -> Vec<String> {
        let mut orgs: Vec<String> = self.counted().map(|event| event.org.to_string()).collect();
        orgs.sort();
        orgs.dedup();
        orgs
    }

    /// Spend of an org, or of one of its users, by window and dimensions.
    pub fn spend(
        &self,
        org: &str,
        user: Option<&str>,
        window: WindowSize,
        by: &[Dimension],
    ) -> Rows {
        let zone = self.time_zones.get(org).cloned().unwrap_or(TimeZone::UTC);
        let mut rows = Rows::new();
        for event in self.counted().filter(|event| event.org == org) {
            if user.is_some_and(|user| event.user != user) {
                continue;
            }
            let key = by.iter().map(|dimension| value_of(event, dimension)).collect();
            let window = window_of(event.time, window, &zone);
            rows.entry((window, key)).or_default().add(event, &self.price(event));
        }
        rows
    }

    /// Rows of a declared view, by org; none when it is not declared.
    pub fn view(&self, name: &str) -> Option<BTreeMap<String, Rows>> {
        let view = self.views.get(name)?;
        let spend = |org: String| (org.clone(), self.spend(&org, None, view.window, &view.by));
        Some(self.orgs().into_iter().map(spend).collect())
    }

    /// What lacks a price in an org.
    pub fn unpriced(&self, org: &str) -> Unpriced {
        let mut rows = Unpriced::new();
        for event in self.counted().filter(|event| event.org == org) {
            let lacking = self.price(event).lacking;
            if lacking.is_empty() {
                continue;
            }
            let bound = CONTEXT_BOUNDS[context_class(event.input_tokens()) as usize];
            let key =
                (event.provider.to_string(), event.model.to_string(), event.tier.name(), bound);
            let slot = event.time.slot().start();
            let row = rows.entry(key).or_insert(UnpricedUsage {
                lacking: Vec::new(),
                first: slot,
                last: slot,
                events: 0,
            });
            row.lacking.extend(lacking);
            row.lacking.sort();
            row.lacking.dedup();
            row.first = row.first.min(slot);
            row.last = row.last.max(slot);
            row.events += 1;
        }
        rows
    }

    /// Prices one event by everything known now.
    fn price(&self, event: &Event<'_>) -> Priced {
        let mut priced = Priced::default();
        if event.reported() {
            return priced;
        }
        let in_force = self.price_in_force(event);
        for meter in ALL_METERS {
            let count = i64::from(event.meters[meter as usize]);
            if count == 0 {
                continue;
            }
            match in_force.and_then(|price| price.of_meter(meter)) {
                Some(price) => priced.cost += price * count,
                None => priced.lacking.push(meter as usize),
            }
        }
        priced
    }

    /// The price entry an event goes by: of the org's own entries if one applies, else of those for
    /// everybody; of its tier if one applies, else of the standard tier; of those with the largest
    /// lower bound.
    fn price_in_force(&self, event: &Event<'_>) -> Option<&Price> {
        let input_tokens = event.input_tokens();
        let slot = event.time.slot();
        let orgs = [Some(event.org.as_ref()), None];
        let tiers = [event.tier, Tier::Standard];
        for org in orgs {
            for tier in tiers {
                // Larger bounds first. The bound applies to larger requests only; 0 to all.
                for bound in CONTEXT_BOUNDS.into_iter().rev() {
                    if bound > 0 && input_tokens <= bound {
                        continue;
                    }
                    let same_key = self.prices.iter().filter(|price| {
                        price.org.as_deref() == org
                            && price.provider == event.provider
                            && price.model == event.model
                            && price.tier == tier.name()
                            && price.min_input_tokens == bound
                            && price.from <= slot
                    });
                    // The latest beginning; of equal ones the last known, as `max_by_key` keeps
                    // the last of equal items.
                    let latest = same_key.max_by_key(|price| price.from);
                    // One without any price is a withdrawal: as if the key had no entry.
                    if latest.is_some_and(|price| !price.units.is_empty()) {
                        return latest;
                    }
                }
            }
        }
        None
    }
}

impl Shard {
    /// Forgets the ids whose bucket has expired.
    fn forget(&mut self, now: Time, horizon: i64) {
        while let Some(bucket) = self.buckets.first_entry() {
            let end = *bucket.key() + BUCKET;
            if now.0 < end + horizon {
                break;
            }
            for id in bucket.remove() {
                self.remembered.remove(&id);
            }
            self.expired_end = Some(self.expired_end.map_or(end, |before| before.max(end)));
        }
    }

    /// An event that is in the right place.
    fn event(&mut self, event: &Event<'static>, now: Time, backfill: bool) -> Result<(), Reason> {
        let first_time = event.original_time.unwrap_or(event.time);
        if event.time.0 > now.0 + AHEAD_MAX || first_time.0 > now.0 + AHEAD_MAX {
            return Err(Reason::TooFarAhead);
        }
        if !backfill && self.expired_end.is_some_and(|end| first_time.0 - AHEAD_MAX <= end) {
            return Err(Reason::TooLate);
        }
        let id = (event.org.to_string(), event.id.to_string());
        let Some(known) = self.remembered.get_mut(&id) else {
            let bucket = now.0.div_euclid(BUCKET) * BUCKET;
            let counted_at = count(&mut self.counted, event);
            self.buckets.entry(bucket).or_default().push(id.clone());
            self.remembered.insert(id, Remembered { event: event.clone(), counted_at });
            return Ok(());
        };
        if event.revision < known.event.revision {
            return Ok(());
        }
        if event.revision == known.event.revision {
            let equal = same_content(event, &known.event);
            return if equal { Ok(()) } else { Err(Reason::ConflictingDuplicate) };
        }
        if let Some(at) = known.counted_at {
            self.counted[at] = None;
        }
        known.counted_at = count(&mut self.counted, event);
        known.event = event.clone();
        Ok(())
    }
}

/// Counts an event unless it is void; says where.
fn count(counted: &mut Vec<Option<Event<'static>>>, event: &Event<'static>) -> Option<usize> {
    if event.void {
        return None;
    }
    counted.push(Some(event.clone()));
    Some(counted.len() - 1)
}

/// Equal in everything but id, revision and `original_time`.
fn same_content(a: &Event<'_>, b: &Event<'_>) -> bool {
    a.time == b.time
        && a.void == b.void
        && a.user == b.user
        && a.provider == b.provider
        && a.model == b.model
        && a.feature == b.feature
        && a.meters == b.meters
        && a.tier == b.tier
        && a.explicit == b.explicit
        && a.tags == b.tags
}

fn value_of(event: &Event<'_>, dimension: &Dimension) -> String {
    match dimension {
        Dimension::User => event.user.to_string(),
        Dimension::Provider => event.provider.to_string(),
        Dimension::Model => event.model.to_string(),
        Dimension::Feature => event.feature.to_string(),
        Dimension::Tag(wanted) => {
            let tag = event.tags.iter().find(|(name, _)| name == wanted);
            tag.map(|(_, value)| value.to_string()).unwrap_or_default()
        }
    }
}

/// The window a time lies in: that of the beginning of its slot, so that no slot is divided. The
/// first day and month are those of 1970-01-01; they hold what a zone west of Greenwich has before.
fn window_of(time: Time, window: WindowSize, zone: &TimeZone) -> String {
    let start = Timestamp::from_microsecond(time.slot().start().0)
        .expect("event times lie between 1970 and 2200");
    let day = || start.to_zoned(zone.clone()).date().max(jiff::civil::date(1970, 1, 1));
    match window {
        WindowSize::Hour => start.strftime("%Y-%m-%dT%H:00:00Z").to_string(),
        WindowSize::Day => day().strftime("%Y-%m-%d").to_string(),
        WindowSize::Month => day().strftime("%Y-%m").to_string(),
        WindowSize::All => String::new(),
    }
}

/// What the price book says about one event.
#[derive(Debug, Default)]
struct Priced {
    cost: Atto,
    /// Meters in use that lack a price.
    lacking: Vec<usize>,
}

/// One price entry, as it stands in the control log.
#[derive(Debug, Clone)]
struct Price {
    org: Option<String>,
    provider: String,
    model: String,
    tier: String,
    min_input_tokens: u64,
    from: Slot,
    /// Price of one unit by the name it is written with.
    units: BTreeMap<&'static str, Atto>,
}

impl Price {
    /// Reads the written form rather than the fields, so that nothing is shared with the reading
    /// the dataflow uses.
    fn of(entry: &PriceEntry) -> Price {
        let written = serde_json::to_value(entry).expect("an entry is plain data");
        let text = |name: &str| written.get(name).and_then(Value::as_str).map(str::to_owned);
        let mut units = BTreeMap::new();
        for (name, power) in [
            ("input", 6),
            ("cached_input", 6),
            ("cache_write", 6),
            ("cache_write_1h", 6),
            ("output", 6),
            ("reasoning", 6),
            ("audio_input", 6),
            ("audio_output", 6),
            ("image", 0),
            ("search", 0),
        ] {
            if let Some(price) = text(name) {
                let (price, _) = Atto::parse_per(&price, power).expect("checked when it was read");
                units.insert(name, price);
            }
        }
        Price {
            org: text("org"),
            provider: text("provider").unwrap_or_default(),
            model: text("model").unwrap_or_default(),
            tier: text("tier").unwrap_or_else(|| Tier::Standard.name().to_owned()),
            min_input_tokens: written.get("min_input_tokens").and_then(Value::as_u64).unwrap_or(0),
            from: text("effective_from").map_or(Slot::MIN, |time| {
                Time::parse(&time).expect("checked when it was read").slot()
            }),
            units,
        }
    }

    /// Price of one unit of a meter: its own, else that of what it is a kind of.
    fn of_meter(&self, meter: Meter) -> Option<Atto> {
        let names: &[&str] = match meter {
            Meter::Input => &["input"],
            Meter::CacheRead => &["cached_input", "input"],
            Meter::CacheWrite => &["cache_write", "input"],
            Meter::CacheWrite1h => &["cache_write_1h", "cache_write", "input"],
            Meter::Output => &["output"],
            Meter::Reasoning => &["reasoning", "output"],
            Meter::AudioInput => &["audio_input", "input"],
            Meter::AudioOutput => &["audio_output", "output"],
            Meter::Images => &["image"],
            Meter::Searches => &["search"],
        };
        names.iter().find_map(|name| self.units.get(name)).copied()
    }
}
