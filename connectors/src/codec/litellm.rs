//! LiteLLM's StandardLoggingPayload, one object per request.
//!
//! * id: `id`. time: `startTime`, seconds since 1970 with decimals, read as decimal text (or RFC 3339).
//! * org: `metadata.user_api_key_org_id`, else `user_api_key_team_id`. user:
//!   `metadata.user_api_key_user_id`, else `end_user`, else `metadata.user_api_key_end_user_id`.
//! * provider: `custom_llm_provider`, by the price book's name of it (`gemini` is `google`:
//!   [`crate::price_import::provider_name`]). model: `model`, without the provider before a slash.
//! * Usage: the provider's object where the payload kept it (`metadata.usage_object`, else
//!   `response.usage`), since only it knows cached tokens; else `prompt_tokens`, `completion_tokens`.
//! * `response_cost` is not read: it is LiteLLM's own estimate, made with floats and its own price
//!   list; the price book counts. Only an answer from LiteLLM's cache (`cache_hit`) cost nothing,
//!   whatever its tokens: its explicit cost is 0.

use std::borrow::Cow;

use meterr_operators::event::{Event, EventFields, Rejection};
use meterr_operators::money::Atto;
use meterr_operators::time::{SECOND, Time};

use super::json::{Object, Value, bad_value, parse_time};
use super::native::Envelope;
use super::provider;
use crate::price_import::{provider_name, renamed};

/// Whether this is a StandardLoggingPayload.
pub(super) fn recognised(object: &Object<'_>) -> bool {
    object.has("startTime")
        && ["call_type", "custom_llm_provider", "litellm_call_id"]
            .iter()
            .any(|name| object.has(name))
}

/// Reads a payload.
pub(super) fn decode<'a>(
    object: &Object<'a>,
    envelope: Envelope<'a>,
) -> Result<Event<'a>, Rejection> {
    let metadata = object.object("metadata")?;
    let first = |names: &[(&Object<'a>, &str)]| -> Result<Cow<'a, str>, Rejection> {
        for (holder, name) in names {
            if let Some(text) = holder.name(name)? {
                return Ok(text);
            }
        }
        Ok(Cow::default())
    };
    let provider = first(&[(object, "custom_llm_provider")])?;
    let usage_object = match metadata.get("usage_object").filter(|value| value.object_like()) {
        Some(value) => Some(value.object("usage_object")?),
        None => response_usage(object)?,
    };
    let usage = provider::usage(usage_object.as_ref().unwrap_or(object), &provider)?;
    let fields = EventFields {
        id: first(&[(object, "id")])?,
        org: first(&[(&metadata, "user_api_key_org_id"), (&metadata, "user_api_key_team_id")])?,
        user: first(&[
            (&metadata, "user_api_key_user_id"),
            (object, "end_user"),
            (&metadata, "user_api_key_end_user_id"),
        ])?,
        model: without_prefix(first(&[(object, "model")])?, &provider),
        // After the model, whose prefix is LiteLLM's name of the provider.
        provider: renamed(provider),
        meters: usage.meters()?,
        explicit: cache_hit(object).then_some([Atto::ZERO; 4]),
        ..EventFields::default()
    };
    let time = object.get("startTime").map(epoch).transpose()?;
    envelope.complete(fields, time)
}

/// The usage object of the provider's answer, where the answer was kept and is an object.
fn response_usage<'a>(object: &Object<'a>) -> Result<Option<Object<'a>>, Rejection> {
    let Some(response) = object.get("response").filter(|value| value.object_like()) else {
        return Ok(None);
    };
    let response = response.object("response")?;
    response
        .get("usage")
        .filter(|value| value.object_like())
        .map(|value| value.object("usage"))
        .transpose()
}

/// Whether LiteLLM answered from its cache; its spend logs write Python's `True` as a string.
fn cache_hit(object: &Object<'_>) -> bool {
    object.get("cache_hit").is_some_and(|value| matches!(value.raw(), "true" | "\"True\""))
}

/// `openai/gpt-4o` of provider `openai` is the model `gpt-4o`; a prefix may be another spelling of
/// the provider, as `bedrock/…` of `bedrock_converse`. The import of prices names models alike.
fn without_prefix<'a>(model: Cow<'a, str>, provider: &str) -> Cow<'a, str> {
    let rest = |model: &str| -> Option<usize> {
        let (prefix, rest) = model.split_once('/')?;
        let same = prefix == provider || provider_name(prefix) == provider_name(provider);
        (same && !prefix.is_empty() && !rest.is_empty()).then(|| model.len() - rest.len())
    };
    let Some(start) = rest(&model) else { return model };
    match model {
        Cow::Borrowed(model) => Cow::Borrowed(&model[start..]),
        Cow::Owned(mut model) => Cow::Owned(model.split_off(start)),
    }
}

/// Seconds since 1970 with decimals, without a float; digits beyond the microsecond are cut off.
fn epoch(value: Value<'_>) -> Result<Time, Rejection> {
    if value.raw().starts_with('"') {
        let text = value.text("startTime")?;
        return parse_time("startTime", &text);
    }
    let wrong = || {
        bad_value(format!(
            "startTime must be seconds since 1970 such as 1735787045.123456, not {}",
            value.shown()
        ))
    };
    let (seconds, decimals) = value.raw().split_once('.').unwrap_or((value.raw(), ""));
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit());
    // Twelve digits of seconds are beyond any time that is taken, and far inside 64 bits of
    // microseconds.
    if seconds.is_empty() || seconds.len() > 12 || !digits(seconds) || !digits(decimals) {
        return Err(wrong());
    }
    let mut micros: i64 = 0;
    for at in 0..6 {
        let digit = decimals.as_bytes().get(at).map_or(0, |b| i64::from(b - b'0'));
        micros = micros * 10 + digit;
    }
    let seconds: i64 = seconds.parse().map_err(|_| wrong())?;
    Ok(Time(seconds * SECOND + micros))
}
