//! The usage event after validation; it cannot be built invalid.
//!
//! Decoders at the edge bring every accepted format into [`EventFields`], with usage split into
//! *disjoint* meters, so that a cached token is never billed twice. [`Event::new`] is the only way
//! to an [`Event`] and checks every rule that needs no state. Rules that need state (duplicates,
//! lateness, the subject an event came by) belong to [`crate::dedupe`] and to the shard.

use std::borrow::Cow;
use std::fmt;
use std::hash::Hasher;
use std::ops::Deref;

use serde::{Deserialize, Serialize};
use siphasher::sip::SipHasher13;

use crate::ids::org_valid;
use crate::money::Atto;
use crate::time::Time;

/// Number of meters.
pub const METERS: usize = 10;

/// One billable unit. The token meters are disjoint: their sums are the totals users know
/// (`input_tokens` = `Input` + `CacheRead` + `CacheWrite` + `CacheWrite1h` + `AudioInput`;
/// `output_tokens` = `Output` + `Reasoning` + `AudioOutput`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Meter {
    /// Input tokens that were neither read from nor written to a cache, text.
    Input,
    /// Input tokens read from a prompt cache.
    CacheRead,
    /// Input tokens written to a prompt cache for the short time (5 minutes at Anthropic).
    CacheWrite,
    /// Input tokens written to a prompt cache for one hour.
    CacheWrite1h,
    /// Output tokens, text, without reasoning.
    Output,
    /// Reasoning ("thinking") tokens.
    Reasoning,
    /// Audio tokens of the input.
    AudioInput,
    /// Audio tokens of the output.
    AudioOutput,
    /// Images, by piece.
    Images,
    /// Web searches, by piece.
    Searches,
}

/// All meters in the order of their index.
pub const ALL_METERS: [Meter; METERS] = [
    Meter::Input,
    Meter::CacheRead,
    Meter::CacheWrite,
    Meter::CacheWrite1h,
    Meter::Output,
    Meter::Reasoning,
    Meter::AudioInput,
    Meter::AudioOutput,
    Meter::Images,
    Meter::Searches,
];

/// Count per meter of one event, indexed by `Meter as usize`.
pub type Meters = [u32; METERS];

/// Most units of one meter, and most input or output tokens, one event may carry.
pub const METER_MAX: u64 = 1_000_000_000;
/// Largest explicit cost of one event and category.
pub const COST_MAX: Atto = Atto::usd(1_000_000_000);
/// Longest id, org, user, provider, model and feature, in bytes.
pub const NAME_LEN_MAX: usize = 128;
/// Most tags of one event.
pub const TAGS_MAX: usize = 16;

/// Service tier of the request, which some providers price apart.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Tier {
    /// The ordinary one.
    #[default]
    Standard,
    /// Asynchronous batches.
    Batch,
    /// Slower and cheaper.
    Flex,
    /// Faster and dearer.
    Priority,
}

/// All tiers.
pub const ALL_TIERS: [Tier; 4] = [Tier::Standard, Tier::Batch, Tier::Flex, Tier::Priority];

impl Tier {
    /// The name in every format of ours.
    pub const fn name(self) -> &'static str {
        match self {
            Tier::Standard => "standard",
            Tier::Batch => "batch",
            Tier::Flex => "flex",
            Tier::Priority => "priority",
        }
    }

    /// The tier of that name.
    pub fn by_name(name: &str) -> Option<Tier> {
        ALL_TIERS.into_iter().find(|tier| tier.name() == name)
    }
}

/// Lower bounds of the context classes, in input tokens (decimal thousands): a request whose input
/// is *larger* than `CONTEXT_BOUNDS[i]` is at least of class `i`. Class 0 is everything else.
pub const CONTEXT_BOUNDS: [u64; 8] =
    [0, 32_000, 100_000, 128_000, 200_000, 256_000, 272_000, 512_000];

/// The class of a request's input size: an index into [`CONTEXT_BOUNDS`].
pub fn context_class(input_tokens: u64) -> u8 {
    (CONTEXT_BOUNDS.iter().rposition(|bound| input_tokens > *bound).unwrap_or(0)) as u8
}

/// Categories of explicit cost, in the order of [`EventFields::explicit`].
pub const COST_CATEGORIES: [&str; 4] = ["compute", "storage", "bandwidth", "ai"];

/// Explicit cost per category.
pub type Costs = [Atto; 4];

/// What a decoder found, before it is checked. Times are as sent; usage is already disjoint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EventFields<'a> {
    /// Identity for exactly-once, unique per org.
    pub id: Cow<'a, str>,
    /// Event time, by which windows and prices go.
    pub time: Time,
    /// The tenant.
    pub org: Cow<'a, str>,
    /// Who in the org; empty only in a void.
    pub user: Cow<'a, str>,
    /// Empty only with an explicit cost, or in a void.
    pub provider: Cow<'a, str>,
    /// Empty only with an explicit cost, or in a void.
    pub model: Cow<'a, str>,
    /// What the usage was for; default empty.
    pub feature: Cow<'a, str>,
    /// Disjoint counts.
    pub meters: Meters,
    /// Service tier.
    pub tier: Tier,
    /// Explicit cost by category; the price book is then not applied.
    pub explicit: Option<Costs>,
    /// The same id with a higher revision replaces the earlier one.
    pub revision: u32,
    /// Takes the event back.
    pub void: bool,
    /// The first version's `time`, where a revision changed it.
    pub original_time: Option<Time>,
    /// Flat tags, ascending by name, names unique.
    pub tags: Vec<(Cow<'a, str>, Cow<'a, str>)>,
}

/// A checked event. Read-only; see [`EventFields`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event<'a>(EventFields<'a>);

impl<'a> Deref for Event<'a> {
    type Target = EventFields<'a>;
    fn deref(&self) -> &EventFields<'a> {
        &self.0
    }
}

/// Why an event was not counted. The name is part of every format.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// Not JSON, or not an object of a known form.
    Malformed,
    /// A required field is absent.
    MissingField,
    /// A field has a value of the wrong kind or form.
    BadValue,
    /// The event's org is not the one its subject names.
    OrgMismatch,
    /// The event's org lives in another shard than the log it came by.
    WrongShard,
    /// Same id and revision as an earlier event, but other content.
    ConflictingDuplicate,
    /// So old that an earlier copy of it may have been forgotten already.
    TooLate,
    /// More than an hour ahead of log time.
    TooFarAhead,
    /// A number beyond what sums are proved safe for.
    OutOfBounds,
    /// The line or message is larger than the limit.
    TooLarge,
}

/// All reasons, for metrics and documentation.
pub const ALL_REASONS: [Reason; 10] = [
    Reason::Malformed,
    Reason::MissingField,
    Reason::BadValue,
    Reason::OrgMismatch,
    Reason::WrongShard,
    Reason::ConflictingDuplicate,
    Reason::TooLate,
    Reason::TooFarAhead,
    Reason::OutOfBounds,
    Reason::TooLarge,
];

impl Reason {
    /// The reason code.
    pub const fn name(self) -> &'static str {
        match self {
            Reason::Malformed => "malformed",
            Reason::MissingField => "missing_field",
            Reason::BadValue => "bad_value",
            Reason::OrgMismatch => "org_mismatch",
            Reason::WrongShard => "wrong_shard",
            Reason::ConflictingDuplicate => "conflicting_duplicate",
            Reason::TooLate => "too_late",
            Reason::TooFarAhead => "too_far_ahead",
            Reason::OutOfBounds => "out_of_bounds",
            Reason::TooLarge => "too_large",
        }
    }
}

/// A refusal: the reason code, and a sentence for a person (what was wrong, where, what to do).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// The reason code.
    pub reason: Reason,
    /// Lower case, no final stop, values quoted and cut to a bounded length.
    pub detail: String,
}

impl Rejection {
    /// A refusal with its sentence.
    pub fn new(reason: Reason, detail: impl Into<String>) -> Self {
        Rejection { reason, detail: detail.into() }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason.name(), self.detail)
    }
}

impl std::error::Error for Rejection {}

/// Key of the hashes that identify ids and content. Random per deployment and kept with its logs:
/// without it a tenant could craft an id that collides with another tenant's and make that one's
/// event look like a duplicate.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HashKey(pub [u8; 16]);

impl fmt::Debug for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HashKey(…)")
    }
}

impl<'a> Event<'a> {
    /// Checks every rule that needs no state.
    ///
    /// # Errors
    /// The first rule broken, with a sentence that names the field.
    pub fn new(fields: EventFields<'a>) -> Result<Event<'a>, Rejection> {
        name_valid("id", &fields.id)?;
        if fields.org.is_empty() {
            return Err(missing("org"));
        }
        if !org_valid(&fields.org) {
            return Err(Rejection::new(
                Reason::BadValue,
                format!(
                    "org {:?} must be 1 to 128 characters of A-Z, a-z, 0-9, '_' and '-'",
                    excerpt(&fields.org)
                ),
            ));
        }
        for (field, time) in [("time", Some(fields.time)), ("original_time", fields.original_time)]
        {
            if time.is_some_and(|t| t < Time::MIN || t >= Time::MAX) {
                return Err(Rejection::new(
                    Reason::OutOfBounds,
                    format!("{field} must lie between 1970-01-01 and 2200-01-01"),
                ));
            }
        }
        if fields.original_time.is_some() && fields.revision == 0 {
            return Err(Rejection::new(
                Reason::BadValue,
                "original_time belongs to a revision above 0; this event has revision 0",
            ));
        }
        if fields.void {
            if fields.revision == 0 {
                return Err(Rejection::new(
                    Reason::BadValue,
                    "a void needs a revision above that of the event it takes back",
                ));
            }
            return Ok(Event(EventFields {
                id: fields.id,
                time: fields.time,
                org: fields.org,
                revision: fields.revision,
                void: true,
                original_time: fields.original_time,
                ..EventFields::default()
            }));
        }
        name_valid("user", &fields.user)?;
        let priced = fields.explicit.is_none();
        for (field, text) in [("provider", &fields.provider), ("model", &fields.model)] {
            if !text.is_empty() || priced {
                name_valid(field, text)?;
            }
        }
        if !fields.feature.is_empty() {
            name_valid("feature", &fields.feature)?;
        }
        let sum = |meters: &[Meter]| -> u64 {
            meters.iter().map(|m| u64::from(fields.meters[*m as usize])).sum()
        };
        for (field, total) in [
            ("input_tokens", sum(&INPUT_METERS)),
            ("output_tokens", sum(&OUTPUT_METERS)),
            ("images", sum(&[Meter::Images])),
            ("searches", sum(&[Meter::Searches])),
        ] {
            if total > METER_MAX {
                return Err(Rejection::new(
                    Reason::OutOfBounds,
                    format!("{field} is {total}; one event may carry at most {METER_MAX}"),
                ));
            }
        }
        for (category, cost) in COST_CATEGORIES.iter().zip(fields.explicit.iter().flatten()) {
            if *cost < Atto::ZERO || *cost > COST_MAX {
                return Err(Rejection::new(
                    Reason::OutOfBounds,
                    format!("{category} cost is {cost} USD; it must be between 0 and {COST_MAX}"),
                ));
            }
        }
        if fields.tags.len() > TAGS_MAX {
            return Err(Rejection::new(
                Reason::OutOfBounds,
                format!("{} tags; one event may carry at most {TAGS_MAX}", fields.tags.len()),
            ));
        }
        for (name, value) in &fields.tags {
            name_valid("tag name", name)?;
            if !value.is_empty() {
                name_valid("tag value", value)?;
            }
        }
        if fields.tags.windows(2).any(|pair| pair[0].0 >= pair[1].0) {
            return Err(Rejection::new(Reason::BadValue, "a tag is named twice"));
        }
        Ok(Event(fields))
    }

    /// Total input tokens, cached ones included.
    pub fn input_tokens(&self) -> u64 {
        INPUT_METERS.iter().map(|m| u64::from(self.meters[*m as usize])).sum()
    }

    /// Total output tokens, reasoning included.
    pub fn output_tokens(&self) -> u64 {
        OUTPUT_METERS.iter().map(|m| u64::from(self.meters[*m as usize])).sum()
    }

    /// Whether the price book is not applied, since the cost came with the event.
    pub fn reported(&self) -> bool {
        self.explicit.is_some()
    }

    /// 128-bit fingerprint of (org, id).
    pub fn fingerprint(&self, key: &HashKey) -> u128 {
        let mut hasher = siphasher::sip128::SipHasher13::new_with_key(&key.0);
        hasher.write(self.org.as_bytes());
        hasher.write_u8(0xff);
        hasher.write(self.id.as_bytes());
        use siphasher::sip128::Hasher128;
        hasher.finish128().as_u128()
    }

    /// 64-bit hash of the normalised content: everything but id, revision and `original_time`.
    pub fn content_hash(&self, key: &HashKey) -> u64 {
        let mut hasher = SipHasher13::new_with_key(&key.0);
        let mut fixed = [0u8; 8 + 4 * METERS + 3];
        fixed[..8].copy_from_slice(&self.time.0.to_le_bytes());
        for (at, count) in self.meters.iter().enumerate() {
            fixed[8 + 4 * at..12 + 4 * at].copy_from_slice(&count.to_le_bytes());
        }
        fixed[48] = self.tier as u8;
        fixed[49] = u8::from(self.void);
        fixed[50] = u8::from(self.explicit.is_some());
        hasher.write(&fixed);
        for text in [&self.user, &self.provider, &self.model, &self.feature] {
            hasher.write(text.as_bytes());
            hasher.write_u8(0xff);
        }
        for cost in self.explicit.iter().flatten() {
            hasher.write(&cost.get().to_le_bytes());
        }
        for text in self.tags.iter().flat_map(|(name, value)| [name, value]) {
            hasher.write(text.as_bytes());
            hasher.write_u8(0xff);
        }
        hasher.finish()
    }

    /// A copy that borrows nothing.
    pub fn into_owned(self) -> Event<'static> {
        let own = |text: Cow<'a, str>| -> Cow<'static, str> { Cow::Owned(text.into_owned()) };
        let f = self.0;
        Event(EventFields {
            id: own(f.id),
            time: f.time,
            org: own(f.org),
            user: own(f.user),
            provider: own(f.provider),
            model: own(f.model),
            feature: own(f.feature),
            meters: f.meters,
            tier: f.tier,
            explicit: f.explicit,
            revision: f.revision,
            void: f.void,
            original_time: f.original_time,
            tags: f.tags.into_iter().map(|(name, value)| (own(name), own(value))).collect(),
        })
    }
}

/// The meters whose sum is `input_tokens`.
pub const INPUT_METERS: [Meter; 5] =
    [Meter::Input, Meter::CacheRead, Meter::CacheWrite, Meter::CacheWrite1h, Meter::AudioInput];
/// The meters whose sum is `output_tokens`.
pub const OUTPUT_METERS: [Meter; 3] = [Meter::Output, Meter::Reasoning, Meter::AudioOutput];

fn missing(field: &str) -> Rejection {
    Rejection::new(Reason::MissingField, format!("{field:?} is required"))
}

/// Beginning of a hostile text, for a message.
pub fn excerpt(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

pub(crate) fn name_valid(field: &str, text: &str) -> Result<(), Rejection> {
    if text.is_empty() {
        return Err(missing(field));
    }
    if text.len() > NAME_LEN_MAX {
        return Err(Rejection::new(
            Reason::BadValue,
            format!("{field} has {} bytes; at most {NAME_LEN_MAX} are taken", text.len()),
        ));
    }
    // Bytes above 0x7f are checked as characters only where there are any: names are ASCII mostly.
    let control = text.bytes().any(|b| b < 0x20 || b == 0x7f)
        || (!text.is_ascii() && text.chars().any(char::is_control));
    if control {
        return Err(Rejection::new(
            Reason::BadValue,
            format!("{field} {:?} has a control character", excerpt(text)),
        ));
    }
    Ok(())
}
