//! OpenTelemetry GenAI: the attributes of an inference span, as JSON.
//!
//! Attributes stand in `attributes`, as a flat object or as OTLP's list of `{key, value}`, or at the
//! top beside `id` and `time`. `gen_ai.usage.input_tokens` includes cached and cache-write tokens,
//! `output_tokens` includes reasoning. Names follow the semantic conventions of GenAI, with their
//! deprecated predecessors.
//!
//! * id: `id`, `meterr.id`, `gen_ai.response.id`, trace and span id; the first there is. The response
//!   comes before the span because two layers of instrumentation make two spans of one request.
//! * time: `time`, the span's start.
//! * org: `org`, attribute `meterr.org` or `org`. user: `user`, attribute `meterr.user`, `user`,
//!   `user.id` or `enduser.id`. feature: `feature`, attribute `meterr.feature`.
//! * provider: `gen_ai.provider.name`, else `gen_ai.system`, by the price book's name of it
//!   (`aws.bedrock` is `bedrock`: [`crate::price_import::provider_name`]).
//! * A span of an agent or workflow sums up the spans below it and is refused.
//! * `gen_ai.usage.cost` is an estimate of the instrumentation and not read: the price book counts.

use std::borrow::Cow;

use meterr_operators::event::{Event, EventFields, Reason, Rejection, excerpt};
use meterr_operators::time::Time;

use super::json::{Object, Value, bad_value, bounded_count, elements, malformed, parse_time};
use super::native::Envelope;
use super::provider;
use super::usage::Usage;
use crate::price_import::renamed;

/// Operations whose spans repeat the usage of other spans, or have none.
const SUMMING: [&str; 4] = ["create_agent", "invoke_agent", "invoke_workflow", "execute_tool"];

/// The attributes of a span, with keys that are unique.
pub(super) enum Attributes<'a> {
    /// `{"gen_ai.request.model": "gpt-4o", …}`.
    Flat(Object<'a>),
    /// `[{"key": "gen_ai.request.model", "value": {"stringValue": "gpt-4o"}}, …]`.
    Listed(Vec<(Cow<'a, str>, Object<'a>)>),
    /// Beside the other members of the object.
    Top,
}

/// The span attributes, if the object has any of GenAI's.
///
/// # Errors
/// When they are there but are no proper attributes.
pub(super) fn attributes<'a>(object: &Object<'a>) -> Result<Option<Attributes<'a>>, Rejection> {
    let ours = |key: &str| key.starts_with("gen_ai.");
    let Some(value) = object.get("attributes") else {
        return Ok(object.members().any(|(key, _)| ours(key)).then_some(Attributes::Top));
    };
    // Looked at as text first: a native event may have attributes of its own, of any form.
    if !value.raw().contains("gen_ai.") {
        return Ok(None);
    }
    if value.object_like() {
        return Ok(Some(Attributes::Flat(value.object("attributes")?)));
    }
    if !value.raw().starts_with('[') {
        return Ok(None);
    }
    let mut listed: Vec<(Cow<'a, str>, Object<'a>)> = Vec::new();
    for element in elements(value.raw())? {
        let attribute = element.object("an element of attributes")?;
        let (Some(key), Some(value)) = (attribute.text("key")?, attribute.get("value")) else {
            continue;
        };
        listed.push((key, value.object("the value of an attribute")?));
    }
    listed.sort_by(|(one, _), (other, _)| one.cmp(other));
    if let Some(pair) = listed.windows(2).find(|pair| pair[0].0 == pair[1].0) {
        return Err(malformed(format!("attribute {:?} is given twice", excerpt(&pair[0].0))));
    }
    Ok(Some(Attributes::Listed(listed)))
}

/// A span's attributes together with its own members.
struct Span<'s, 'a> {
    object: &'s Object<'a>,
    attributes: &'s Attributes<'a>,
}

impl<'a> Span<'_, 'a> {
    /// The value of an attribute, and whether it came as OTLP's `intValue`.
    fn value(&self, key: &str) -> Result<Option<(Value<'a>, bool)>, Rejection> {
        let typed = match self.attributes {
            Attributes::Flat(object) => return Ok(object.get(key).map(|value| (value, false))),
            Attributes::Top => return Ok(self.object.get(key).map(|value| (value, false))),
            Attributes::Listed(list) => list.iter().find(|(name, _)| name == key),
        };
        let Some((_, typed)) = typed else { return Ok(None) };
        for kind in ["stringValue", "intValue", "doubleValue", "boolValue"] {
            if let Some(value) = typed.get(kind) {
                return Ok(Some((value, kind == "intValue")));
            }
        }
        Ok(None)
    }

    /// The first of some attributes, as a text that is not empty.
    fn text(&self, keys: &[&str]) -> Result<Option<Cow<'a, str>>, Rejection> {
        for key in keys {
            if let Some((value, _)) = self.value(key)? {
                let text = value.text(key)?;
                if !text.is_empty() {
                    return Ok(Some(text));
                }
            }
        }
        Ok(None)
    }

    /// The first of some attributes, as a count. `intValue` may be digits in a string, which is how
    /// JSON writes 64 bits in OTLP.
    fn count(&self, keys: &[&str]) -> Result<Option<u32>, Rejection> {
        for key in keys {
            let Some((value, int)) = self.value(key)? else { continue };
            let digits = value.raw().trim_matches('"');
            if int && !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) {
                return bounded_count(key, digits).map(Some);
            }
            return value.count(key).map(Some);
        }
        Ok(None)
    }

    /// The span's own member, else an attribute.
    fn name(&self, member: &str, keys: &[&str]) -> Result<Option<Cow<'a, str>>, Rejection> {
        match self.object.name(member)? {
            Some(text) => Ok(Some(text)),
            None => self.text(keys),
        }
    }

    fn id(&self) -> Result<Option<Cow<'a, str>>, Rejection> {
        if let Some(id) = self.name("id", &["meterr.id", "gen_ai.response.id"])? {
            return Ok(Some(id));
        }
        for (trace, span) in [("traceId", "spanId"), ("trace_id", "span_id")] {
            if let (Some(trace), Some(span)) = (self.object.name(trace)?, self.object.name(span)?) {
                return Ok(Some(Cow::Owned(format!("{trace}:{span}"))));
            }
        }
        Ok(None)
    }

    fn time(&self) -> Result<Option<Time>, Rejection> {
        for name in ["time", "start_time"] {
            if let Some(text) = self.object.text(name)? {
                return parse_time(name, &text).map(Some);
            }
        }
        for name in ["startTimeUnixNano", "start_time_unix_nano"] {
            let Some(value) = self.object.get(name) else { continue };
            let digits = value.raw().trim_matches('"');
            return match digits.parse::<i64>() {
                Ok(nanos) if nanos >= 0 => Ok(Some(Time(nanos / 1_000))),
                _ => Err(bad_value(format!(
                    "{name} must be nanoseconds since 1970, not {}",
                    value.shown()
                ))),
            };
        }
        Ok(None)
    }
}

/// Reads a span.
pub(super) fn decode<'a>(
    object: &Object<'a>,
    attributes: &Attributes<'a>,
    envelope: Envelope<'a>,
) -> Result<Event<'a>, Rejection> {
    let span = Span { object, attributes };
    if let Some(operation) = span.text(&["gen_ai.operation.name"])?
        && SUMMING.contains(&&*operation)
    {
        return Err(bad_value(format!(
            "a span of {operation} repeats the usage of the spans below it; send spans of model \
             requests only"
        )));
    }
    let count = |keys: &[&str]| Ok::<u32, Rejection>(span.count(keys)?.unwrap_or(0));
    let usage = Usage {
        input: count(&["gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens"])?,
        cached: count(&[
            "gen_ai.usage.cache_read.input_tokens",
            "gen_ai.usage.cache_read_input_tokens",
        ])?,
        cache_write: count(&[
            "gen_ai.usage.cache_creation.input_tokens",
            "gen_ai.usage.cache_creation_input_tokens",
        ])?,
        output: count(&["gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens"])?,
        reasoning: count(&["gen_ai.usage.reasoning.output_tokens"])?,
        ..Usage::default()
    };
    if !stated(&span)? {
        return Err(Rejection::new(
            Reason::MissingField,
            "the span has no gen_ai.usage.input_tokens and gen_ai.usage.output_tokens",
        ));
    }
    let tier =
        span.text(&["openai.response.service_tier", "gen_ai.openai.response.service_tier"])?;
    let provider = span.text(&["gen_ai.provider.name", "gen_ai.system"])?.unwrap_or_default();
    let fields = EventFields {
        id: span.id()?.unwrap_or_default(),
        org: span.name("org", &["meterr.org", "org"])?.unwrap_or_default(),
        user: span
            .name("user", &["meterr.user", "user", "user.id", "enduser.id"])?
            .unwrap_or_default(),
        provider: renamed(provider),
        model: span.text(&["gen_ai.response.model", "gen_ai.request.model"])?.unwrap_or_default(),
        feature: span.name("feature", &["meterr.feature"])?.unwrap_or_default(),
        meters: usage.meters()?,
        tier: provider::tier(tier.as_deref().unwrap_or_default())?,
        ..EventFields::default()
    };
    let time = span.time()?;
    envelope.complete(fields, time)
}

/// Whether the span states tokens at all, be they none.
fn stated(span: &Span<'_, '_>) -> Result<bool, Rejection> {
    Ok(span.count(&["gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens"])?.is_some()
        || span.count(&["gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens"])?.is_some())
}
