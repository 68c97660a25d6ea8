//! The native format, and the envelope of it around a provider's `usage` object or response.
//!
//! Unknown members are ignored, so that producers may be ahead of the engine. Yet an event without
//! any usage that is understood is refused: a misspelt `input_tokens` must not count as zero spend.

use std::borrow::Cow;

use meterr_operators::event::{
    COST_CATEGORIES, Costs, Event, EventFields, Meter, Reason, Rejection, Tier, excerpt,
};
use meterr_operators::money::Atto;
use meterr_operators::time::{SECOND, Time};

use super::json::{Object, Texts, Value, bad_value};
use super::provider;
use super::usage::Usage;

/// What surrounds the usage, such as the attributes of a CloudEvent: taken where the usage itself
/// does not say.
#[derive(Debug, Default)]
pub(super) struct Envelope<'a> {
    pub id: Option<Cow<'a, str>>,
    pub time: Option<Time>,
    pub org: Option<Cow<'a, str>>,
    pub user: Option<Cow<'a, str>>,
    pub provider: Option<Cow<'a, str>>,
    pub model: Option<Cow<'a, str>>,
    pub feature: Option<Cow<'a, str>>,
}

impl<'a> Envelope<'a> {
    /// Fills the names and the time that are still empty, and checks the whole.
    pub(super) fn complete(
        self,
        mut fields: EventFields<'a>,
        time: Option<Time>,
    ) -> Result<Event<'a>, Rejection> {
        for (name, outer) in [
            (&mut fields.id, self.id),
            (&mut fields.org, self.org),
            (&mut fields.user, self.user),
            (&mut fields.provider, self.provider),
            (&mut fields.model, self.model),
            (&mut fields.feature, self.feature),
        ] {
            if name.is_empty()
                && let Some(outer) = outer
            {
                *name = outer;
            }
        }
        fields.time = time
            .or(self.time)
            .ok_or_else(|| Rejection::new(Reason::MissingField, "\"time\" is required"))?;
        Event::new(fields)
    }
}

/// Reads a native object.
pub(super) fn decode<'a>(
    object: &Object<'a>,
    mut envelope: Envelope<'a>,
) -> Result<Event<'a>, Rejection> {
    let mut fields = EventFields::default();
    let mut time = None;
    let mut tier = None;
    let (mut cost, mut costs) = (None, None);
    let mut provider_usage = None;
    let mut usage = Usage::default();
    // A member of ours that states tokens; one that states pieces, which no `usage` object excludes.
    let (mut tokens, mut pieces) = (None, false);
    for (name, value) in object.members() {
        match name {
            "id" => fields.id = value.text(name)?,
            "time" => time = Some(value.time(name)?),
            "org" => fields.org = value.text(name)?,
            "user" => fields.user = value.text(name)?,
            "provider" => fields.provider = value.text(name)?,
            "model" => fields.model = value.text(name)?,
            "feature" => fields.feature = value.text(name)?,
            "service_tier" => tier = Some(value.text(name)?),
            "revision" => fields.revision = revision(value)?,
            "void" => fields.void = value.boolean(name)?,
            "original_time" => fields.original_time = Some(value.time(name)?),
            "tags" => fields.tags = tags(value)?,
            "cost" => cost = Some(value.amount(name)?),
            "costs" => costs = Some(category_costs(value)?),
            "usage" => provider_usage = Some(value.object(name)?),
            "images" | "searches" => {
                let count = value.count(name)?;
                *(if name == "images" { &mut usage.images } else { &mut usage.searches }) = count;
                pieces = true;
            }
            _ => {
                if let Some(count) = token_count(&mut usage, name) {
                    *count = value.count(name)?;
                    tokens = Some(name);
                }
            }
        }
    }
    fields.explicit = explicit(cost, costs)?;
    let flat_chat = object.has("prompt_tokens") || object.has("completion_tokens");
    let by_provider = provider_usage.is_some() || flat_chat;
    if by_provider {
        if let Some(name) = tokens {
            let other = if flat_chat { "prompt_tokens or completion_tokens" } else { "usage" };
            return Err(bad_value(format!(
                "usage is given twice, by {name} and by {other}; send one of them"
            )));
        }
        let stated = provider_usage.as_ref().unwrap_or(object);
        if fields.provider.is_empty() {
            let by_form = || provider::of_response(object).map(Cow::Borrowed);
            fields.provider = envelope.provider.take().or_else(by_form).unwrap_or_default();
        }
        if time.is_none() && envelope.time.is_none() {
            time = created(object)?;
        }
        // OpenAI states the tier beside its usage, Anthropic within.
        if tier.is_none() {
            tier = stated.text("service_tier")?;
        }
        fields.tier = provider::tier(tier.as_deref().unwrap_or_default())?;
        let found = provider::usage(stated, &fields.provider)?;
        if found.searches > 0 && usage.searches > 0 {
            return Err(bad_value(
                "searches are given twice, by searches and by usage; send one of them".to_owned(),
            ));
        }
        usage =
            Usage { images: usage.images, searches: found.searches.max(usage.searches), ..found };
    } else if tokens.is_none() && !pieces && fields.explicit.is_none() && !fields.void {
        return Err(Rejection::new(
            Reason::MissingField,
            "the event states no usage: give input_tokens and output_tokens, usage, images, \
             searches, cost or costs",
        ));
    }
    if !by_provider && let Some(tier) = tier {
        fields.tier = Tier::by_name(&tier).ok_or_else(|| {
            bad_value(format!(
                "service_tier {:?} is none of standard, batch, flex, priority",
                excerpt(&tier)
            ))
        })?;
    }
    fields.meters = usage.meters()?;
    envelope.complete(fields, time)
}

/// The token count a member of ours stands for.
fn token_count<'u>(usage: &'u mut Usage, name: &str) -> Option<&'u mut u32> {
    Some(match name {
        "input_tokens" => &mut usage.input,
        "cached_input_tokens" => &mut usage.cached,
        "cache_write_tokens" => &mut usage.cache_write,
        "cache_write_1h_tokens" => &mut usage.cache_write_1h,
        "output_tokens" => &mut usage.output,
        "reasoning_tokens" => &mut usage.reasoning,
        "audio_input_tokens" => &mut usage.audio_input,
        "audio_output_tokens" => &mut usage.audio_output,
        _ => return None,
    })
}

/// When a response of OpenAI was made, in whole seconds: the time of an event that has no other.
fn created(object: &Object<'_>) -> Result<Option<Time>, Rejection> {
    for name in ["created", "created_at"] {
        let Some(value) = object.get(name) else { continue };
        // At most ten digits are a second before the year 2287; Anthropic's texts are passed by.
        if value.raw().len() <= 10
            && let Ok(seconds) = value.raw().parse::<u32>()
        {
            return Ok(Some(Time(i64::from(seconds) * SECOND)));
        }
    }
    Ok(None)
}

fn revision(value: Value<'_>) -> Result<u32, Rejection> {
    let raw = value.raw();
    if raw.is_empty() || !raw.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad_value(format!(
            "revision must be a whole number such as 1, not {}",
            value.shown()
        )));
    }
    raw.parse().map_err(|_| {
        Rejection::new(
            Reason::OutOfBounds,
            format!("revision is {}; it may be at most {}", value.shown(), u32::MAX),
        )
    })
}

/// Tags in the order of their names; that no name comes twice is checked by the object.
fn tags(value: Value<'_>) -> Result<Texts<'_>, Rejection> {
    let mut tags = value.object("tags")?.into_texts("tags")?;
    tags.sort_unstable();
    Ok(tags)
}

fn category_costs(value: Value<'_>) -> Result<Costs, Rejection> {
    let mut costs = Costs::default();
    let mut named = false;
    for (name, value) in value.object("costs")?.members() {
        let Some(at) = COST_CATEGORIES.iter().position(|category| *category == name) else {
            return Err(bad_value(format!(
                "costs names {:?}; the categories are compute, storage, bandwidth, ai",
                excerpt(name)
            )));
        };
        costs[at] = value.amount(name)?;
        named = true;
    }
    if !named {
        return Err(bad_value(
            "costs names none of its categories compute, storage, bandwidth, ai".to_owned(),
        ));
    }
    Ok(costs)
}

/// `cost` alone is of category `ai`; beside `costs` it must be their sum.
fn explicit(cost: Option<Atto>, costs: Option<Costs>) -> Result<Option<Costs>, Rejection> {
    match (cost, costs) {
        (Some(cost), Some(costs)) => {
            let sum: Atto = costs.iter().copied().sum();
            if sum != cost {
                return Err(bad_value(format!("cost is {cost} USD, but costs add up to {sum}")));
            }
            Ok(Some(costs))
        }
        (Some(cost), None) => Ok(Some([Atto::ZERO, Atto::ZERO, Atto::ZERO, cost])),
        (None, costs) => Ok(costs),
    }
}

/// Appends the event as one line of the native format, newline included. Reading it gives an equal
/// event, whatever format it came in.
pub fn encode_native(event: &Event<'_>, out: &mut Vec<u8>) {
    out.push(b'{');
    text_member(out, "id", &event.id);
    member(out, "time");
    out.extend_from_slice(format!("\"{}\"", event.time).as_bytes());
    text_member(out, "org", &event.org);
    for (name, text) in [
        ("user", &event.user),
        ("provider", &event.provider),
        ("model", &event.model),
        ("feature", &event.feature),
    ] {
        if !text.is_empty() {
            text_member(out, name, text);
        }
    }
    if !event.void {
        let meter = |meter: Meter| u64::from(event.meters[meter as usize]);
        // The wholes stand even when zero: an event that states no usage would be refused.
        count_member(out, "input_tokens", event.input_tokens());
        count_member(out, "output_tokens", event.output_tokens());
        for (name, count) in [
            ("cached_input_tokens", meter(Meter::CacheRead)),
            ("cache_write_tokens", meter(Meter::CacheWrite)),
            ("cache_write_1h_tokens", meter(Meter::CacheWrite1h)),
            ("reasoning_tokens", meter(Meter::Reasoning)),
            ("audio_input_tokens", meter(Meter::AudioInput)),
            ("audio_output_tokens", meter(Meter::AudioOutput)),
            ("images", meter(Meter::Images)),
            ("searches", meter(Meter::Searches)),
        ] {
            if count > 0 {
                count_member(out, name, count);
            }
        }
    }
    if event.tier != Tier::Standard {
        text_member(out, "service_tier", event.tier.name());
    }
    if let Some(costs) = &event.explicit {
        encode_costs(out, costs);
    }
    if event.revision > 0 {
        count_member(out, "revision", u64::from(event.revision));
    }
    if event.void {
        member(out, "void");
        out.extend_from_slice(b"true");
    }
    if let Some(time) = event.original_time {
        member(out, "original_time");
        out.extend_from_slice(format!("\"{time}\"").as_bytes());
    }
    if !event.tags.is_empty() {
        member(out, "tags");
        out.push(b'{');
        for (name, value) in &event.tags {
            text_member(out, name, value);
        }
        out.push(b'}');
    }
    out.extend_from_slice(b"}\n");
}

fn encode_costs(out: &mut Vec<u8>, costs: &Costs) {
    let [compute, storage, bandwidth, ai] = costs;
    if [compute, storage, bandwidth].iter().all(|cost| **cost == Atto::ZERO) {
        return text_member(out, "cost", &ai.to_string());
    }
    member(out, "costs");
    out.push(b'{');
    for (name, cost) in COST_CATEGORIES.iter().zip(costs) {
        if *cost != Atto::ZERO {
            text_member(out, name, &cost.to_string());
        }
    }
    out.push(b'}');
}

fn count_member(out: &mut Vec<u8>, name: &str, count: u64) {
    member(out, name);
    out.extend_from_slice(itoa::Buffer::new().format(count).as_bytes());
}

fn text_member(out: &mut Vec<u8>, name: &str, value: &str) {
    member(out, name);
    push_text(out, value);
}

/// Begins a member: a comma unless it is the first of its object, the name, a colon.
fn member(out: &mut Vec<u8>, name: &str) {
    if out.last() != Some(&b'{') {
        out.push(b',');
    }
    push_text(out, name);
    out.push(b':');
}

/// A JSON string.
pub(super) fn push_text(out: &mut Vec<u8>, text: &str) {
    if text.bytes().any(|b| b < 0x20 || b == b'"' || b == b'\\') {
        // Into memory, where writing cannot fail; a text cannot fail to be JSON.
        serde_json::to_writer(&mut *out, text).expect("a text is written to memory");
    } else {
        out.push(b'"');
        out.extend_from_slice(text.as_bytes());
        out.push(b'"');
    }
}
