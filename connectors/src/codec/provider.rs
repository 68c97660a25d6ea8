//! `usage` objects of providers: OpenAI chat completions, OpenAI responses, Anthropic messages, and
//! what compatible servers and LiteLLM made of them.
//!
//! The shape decides, since many providers answer in the shape of another: `prompt_tokens` and
//! `completion_tokens` are the chat shape, where cached tokens are *inside* the prompt; cache counts
//! beside `input_tokens` are Anthropic's, where they are *outside*; everything else with
//! `input_tokens` is the responses shape, inside again. Only where the marks of both are there does
//! the provider's name decide.
//!
//! An audio token read from the cache is counted under both names there; it is billed as cached.

use meterr_operators::event::{METER_MAX, Reason, Rejection, Tier, excerpt};

use super::json::{Object, bad_value};
use super::usage::Usage;

/// Reads a usage object in whichever shape it is.
pub(super) fn usage(usage: &Object<'_>, provider: &str) -> Result<Usage, Rejection> {
    let any = |names: &[&str]| names.iter().any(|name| usage.has(name));
    if any(&["prompt_tokens", "completion_tokens"]) {
        return chat(usage);
    }
    if !any(&["input_tokens", "output_tokens"]) {
        return Err(Rejection::new(
            Reason::MissingField,
            "usage has neither input_tokens and output_tokens nor prompt_tokens and \
             completion_tokens",
        ));
    }
    let outside = any(&[
        "cache_read_input_tokens",
        "cache_creation_input_tokens",
        "cache_creation",
        "server_tool_use",
    ]);
    let inside = any(&["input_tokens_details", "input_token_details", "total_tokens"]);
    match (outside, inside) {
        (true, false) => anthropic(usage),
        (false, _) => responses(usage),
        (true, true) if provider == "anthropic" => anthropic(usage),
        (true, true) if provider == "openai" => responses(usage),
        (true, true) => Err(bad_value(
            "usage has fields of Anthropic and of OpenAI, so that it is not known whether \
             input_tokens includes cached tokens; give the provider, or our own fields"
                .to_owned(),
        )),
    }
}

/// The provider a whole response comes from, where nothing else names it.
pub(super) fn of_response(response: &Object<'_>) -> Option<&'static str> {
    let is = |name: &str, wanted: &[&str]| matches!(response.text(name), Ok(Some(text)) if wanted.contains(&&*text));
    if is("object", &["chat.completion", "text_completion", "response"]) {
        Some("openai")
    } else if is("type", &["message"]) {
        Some("anthropic")
    } else {
        None
    }
}

/// The service tier by our name or a provider's.
pub(super) fn tier(name: &str) -> Result<Tier, Rejection> {
    match name {
        // What was asked for, where the answer does not say what was given, or a provider's word
        // for its ordinary tier.
        "" | "auto" | "default" | "standard_only" | "on_demand" => Ok(Tier::Standard),
        _ => Tier::by_name(name).ok_or_else(|| {
            bad_value(format!(
                "service_tier {:?} is not known; set service_tier beside usage to one of \
                 standard, batch, flex, priority",
                excerpt(name)
            ))
        }),
    }
}

/// OpenAI chat completions and embeddings. Also takes the cache counts that LiteLLM and DeepSeek put
/// beside `prompt_tokens`, which are inside it as well.
fn chat(usage: &Object<'_>) -> Result<Usage, Rejection> {
    let prompt = usage.object("prompt_tokens_details")?;
    let completion = usage.object("completion_tokens_details")?;
    let count = |name: &str| usage.count(name);
    let mut found = Usage {
        input: count("prompt_tokens")?.unwrap_or(0),
        cached: first(&[
            prompt.count("cached_tokens")?,
            count("cache_read_input_tokens")?,
            count("prompt_cache_hit_tokens")?,
        ]),
        audio_input: prompt.count("audio_tokens")?.unwrap_or(0),
        output: count("completion_tokens")?.unwrap_or(0),
        reasoning: completion.count("reasoning_tokens")?.unwrap_or(0),
        audio_output: completion.count("audio_tokens")?.unwrap_or(0),
        ..Usage::default()
    };
    let written = first(&[
        prompt.count("cache_write_tokens")?,
        prompt.count("cache_creation_tokens")?,
        count("cache_creation_input_tokens")?,
    ]);
    let split = prompt.object("cache_creation_token_details")?;
    found.cache_write_1h = split.count("ephemeral_1h_input_tokens")?.unwrap_or(0).min(written);
    found.cache_write = written - found.cache_write_1h;
    // Some compatible servers leave reasoning out of the completion; their total tells.
    if let Some(total) = count("total_tokens")?
        && found.reasoning > 0
        && u64::from(total)
            == u64::from(found.input) + u64::from(found.output) + u64::from(found.reasoning)
    {
        found.output = whole("completion_tokens", found.output, &[found.reasoning])?;
    }
    found.clamp_audio();
    Ok(found)
}

/// OpenAI responses; realtime and transcription name the details in the singular.
fn responses(usage: &Object<'_>) -> Result<Usage, Rejection> {
    let details = |plural: &str, singular: &str| {
        if usage.has(plural) { usage.object(plural) } else { usage.object(singular) }
    };
    let input = details("input_tokens_details", "input_token_details")?;
    let output = details("output_tokens_details", "output_token_details")?;
    let mut found = Usage {
        input: usage.count("input_tokens")?.unwrap_or(0),
        cached: input.count("cached_tokens")?.unwrap_or(0),
        cache_write: input.count("cache_write_tokens")?.unwrap_or(0),
        audio_input: input.count("audio_tokens")?.unwrap_or(0),
        output: usage.count("output_tokens")?.unwrap_or(0),
        reasoning: output.count("reasoning_tokens")?.unwrap_or(0),
        audio_output: output.count("audio_tokens")?.unwrap_or(0),
        ..Usage::default()
    };
    found.clamp_audio();
    Ok(found)
}

/// Anthropic messages: `input_tokens` are what was neither read from nor written to the cache.
fn anthropic(usage: &Object<'_>) -> Result<Usage, Rejection> {
    let fresh = usage.count("input_tokens")?.unwrap_or(0);
    let cached = usage.count("cache_read_input_tokens")?.unwrap_or(0);
    let split = usage.object("cache_creation")?;
    let short = split.count("ephemeral_5m_input_tokens")?.unwrap_or(0);
    let hour = split.count("ephemeral_1h_input_tokens")?.unwrap_or(0);
    // The sum is the figure of old; the split, where there is one, says how much of it was for an
    // hour.
    let written = match usage.count("cache_creation_input_tokens")? {
        Some(written) => written,
        None => whole("cache_creation", short, &[hour])?,
    };
    let cache_write_1h = hour.min(written);
    Ok(Usage {
        input: whole("input_tokens", fresh, &[cached, written])?,
        cached,
        cache_write: written - cache_write_1h,
        cache_write_1h,
        output: usage.count("output_tokens")?.unwrap_or(0),
        reasoning: usage.object("output_tokens_details")?.count("thinking_tokens")?.unwrap_or(0),
        searches: usage.object("server_tool_use")?.count("web_search_requests")?.unwrap_or(0),
        ..Usage::default()
    })
}

/// The first count that is there.
fn first(counts: &[Option<u32>]) -> u32 {
    counts.iter().flatten().next().copied().unwrap_or(0)
}

/// A count and what belongs to it without being in it.
fn whole(name: &str, count: u32, beside: &[u32]) -> Result<u32, Rejection> {
    let sum = u64::from(count) + beside.iter().map(|n| u64::from(*n)).sum::<u64>();
    u32::try_from(sum).ok().filter(|_| sum <= METER_MAX).ok_or_else(|| {
        Rejection::new(
            Reason::OutOfBounds,
            format!(
                "{name} with what belongs to it is {sum}; one event may carry at most {METER_MAX}"
            ),
        )
    })
}
