//! The prices of one model, by tier and context bound, as LiteLLM's cost calculator would bill them.
//!
//! Each row states every price that differs from the price book's own fall-backs, so that nothing
//! depends on the two programs falling back alike. The rules followed are those of
//! `litellm_core_utils/llm_cost_calc/utils.py` (LiteLLM 1.109.1, MIT licence), named at each function.

use meterr_operators::event::{CONTEXT_BOUNDS, METERS, Meter, Tier};
use meterr_operators::money::Atto;
use meterr_operators::price_book::{Price, PriceEntry};
use meterr_operators::time::Time;
use serde_json::Value;

use super::fields::Fields;

const INPUT: &str = "input_cost_per_token";
const OUTPUT: &str = "output_cost_per_token";
const CACHE_READ: &str = "cache_read_input_token_cost";
const CACHE_WRITE: &str = "cache_creation_input_token_cost";
const CACHE_WRITE_1H: &str = "cache_creation_input_token_cost_above_1hr";
const CACHE_HIT: &str = "input_cost_per_token_cache_hit";
const REASONING: &str = "output_cost_per_reasoning_token";
const AUDIO_INPUT: &str = "input_cost_per_audio_token";
const AUDIO_OUTPUT: &str = "output_cost_per_audio_token";
const IMAGE_TOKEN_OUTPUT: &str = "output_cost_per_image_token";
const SEARCH: &str = "search_context_cost_per_query";
const BILLING_UNIT: &str = "web_search_billing_unit";
const TABLE: &str = "tiered_pricing";
const BATCH: &str = "_batches";

/// Prices by meter, fall-backs applied.
type Rates = [Option<Price>; METERS];

/// Rates from each context bound on, bounds ascending from 0, neighbours differing.
type Ladder = Vec<(u64, Rates)>;

/// The prices of one tier from one context bound on.
pub(super) struct Row {
    tier: Tier,
    bound: u64,
    rates: Rates,
}

impl Row {
    /// The entry that amounts to these prices; what its fall-backs give anyway is left out.
    pub(super) fn entry(&self, provider: &str, model: &str, from: Option<Time>) -> PriceEntry {
        let rate = |meter: Meter| self.rates[meter as usize];
        let unless = |meter: Meter, fall_back: Meter| {
            rate(meter).filter(|price| Some(*price) != rate(fall_back))
        };
        PriceEntry {
            provider: provider.to_owned(),
            model: model.to_owned(),
            effective_from: from,
            input: rate(Meter::Input),
            cached_input: unless(Meter::CacheRead, Meter::Input),
            cache_write: unless(Meter::CacheWrite, Meter::Input),
            cache_write_1h: unless(Meter::CacheWrite1h, Meter::CacheWrite),
            output: rate(Meter::Output),
            reasoning: unless(Meter::Reasoning, Meter::Output),
            audio_input: unless(Meter::AudioInput, Meter::Input),
            audio_output: unless(Meter::AudioOutput, Meter::Output),
            image: rate(Meter::Images),
            search: rate(Meter::Searches),
            tier: self.tier,
            min_input_tokens: self.bound,
            org: None,
        }
    }
}

/// All rows of a model.
///
/// # Errors
/// When it has a table of context tiers that does not fit the context bounds: any row would then
/// bill some requests wrongly.
pub(super) fn resolve(provider: &str, fields: &Fields<'_>) -> Result<Vec<Row>, String> {
    let pieces = [image(fields), search(provider, fields)];
    let table = table(fields)?;
    let tabled = table.is_some();
    let standard = table.unwrap_or_else(|| ladder(fields, ""));
    let mut tiers = Vec::new();
    if !tabled {
        tiers.push((Tier::Flex, ladder(fields, "_flex")));
        tiers.push((Tier::Priority, ladder(fields, "_priority")));
    }
    tiers.extend(batch(fields).map(|ladder| (Tier::Batch, ladder)));
    // A tier that costs as the standard one needs no entries: the book falls back to that.
    tiers.retain(|(_, ladder)| *ladder != standard);
    tiers.insert(0, (Tier::Standard, standard));

    // DeepSeek's cached price stands there twice; the second one is carried over if it agrees.
    if fields.same(CACHE_HIT, CACHE_READ) {
        fields.carried(CACHE_HIT);
    }
    let mut rows = Vec::new();
    for (tier, ladder) in tiers {
        for (bound, mut rates) in ladder {
            [rates[Meter::Images as usize], rates[Meter::Searches as usize]] = pieces;
            if rates.iter().any(Option::is_some) {
                rows.push(Row { tier, bound, rates });
            }
        }
    }
    Ok(rows)
}

/// `200_000` as it stands in field names: `200k`.
fn thousands(bound: u64) -> String {
    format!("{}k", bound / 1_000)
}

fn compressed(rows: impl Iterator<Item = (u64, Rates)>) -> Ladder {
    let mut ladder: Ladder = Vec::new();
    for (bound, rates) in rows {
        if ladder.last().is_none_or(|(_, before)| *before != rates) {
            ladder.push((bound, rates));
        }
    }
    ladder
}

fn half(price: Price) -> Price {
    let twice = price.get().get();
    // Half to even, as everywhere; no price of today's map needs it.
    let up = i128::from(twice % 4 == 3);
    Price::new(Atto::new(twice / 2 + up))
}

/// Flat fields with `_above_<n>k_tokens` steps and a tier suffix: `_get_token_base_cost`,
/// `_resolve_reasoning_token_cost` and `_modality_token_cost`.
fn ladder(fields: &Fields<'_>, suffix: &str) -> Ladder {
    // `get_cost_per_unit`: a tier without a field of its own has the standard one.
    let unit =
        |field: &str| fields.price(&format!("{field}{suffix}")).or_else(|| fields.price(field));
    let mut input = unit(INPUT);
    let mut output = unit(OUTPUT);
    if output.is_none_or(|price| price.get() == Atto::ZERO) {
        // Models that only make images: all their output tokens are image tokens.
        output = fields.price(IMAGE_TOKEN_OUTPUT).or(output);
    }
    let mut cache_read = unit(CACHE_READ);
    let fireworks = fields.value("litellm_provider").is_some_and(|name| name == "fireworks_ai");
    if fireworks && cache_read.is_none() {
        // `with_default_cache_read_rate`: half the standard input price, except for embeddings, whose
        // provider has another name there.
        cache_read = fields.price(INPUT).map(half);
    }
    let mut cache_write = unit(CACHE_WRITE);
    let mut cache_write_1h = unit(CACHE_WRITE_1H);
    let mut rows = Vec::new();
    for bound in CONTEXT_BOUNDS {
        if bound > 0 {
            let step = format!("_above_{}_tokens", thousands(bound));
            let above = |field: &str| unit(&format!("{field}{step}"));
            input = above(INPUT).or(input);
            output = above(OUTPUT).or(output);
            cache_read = above(CACHE_READ).or(cache_read);
            cache_write = above(CACHE_WRITE).or(cache_write);
            // Here a tier does not take over the standard step.
            cache_write_1h =
                fields.price(&format!("{CACHE_WRITE_1H}{step}{suffix}")).or(cache_write_1h);
        }
        let write = cache_write.or(input);
        let reasoning = fields
            .price(&format!("{REASONING}{suffix}"))
            .or_else(|| {
                let own_output = !suffix.is_empty() && fields.has(&format!("{OUTPUT}{suffix}"));
                if own_output { output } else { fields.price(REASONING) }
            })
            .or(output);
        let mut rates = Rates::default();
        let mut set = |meter: Meter, price: Option<Price>| rates[meter as usize] = price;
        set(Meter::Input, input);
        set(Meter::CacheRead, cache_read.or(input));
        set(Meter::CacheWrite, write);
        set(Meter::CacheWrite1h, cache_write_1h.or(write));
        set(Meter::Output, output);
        set(Meter::Reasoning, reasoning);
        set(Meter::AudioInput, unit(AUDIO_INPUT).or(input));
        set(Meter::AudioOutput, fields.price(AUDIO_OUTPUT).or(output));
        rows.push((bound, rates));
    }
    compressed(rows.into_iter())
}

/// `batch_cost_calculator`, for models with a batch price. The one LiteLLM makes up for the others,
/// half the standard price, is not imported.
fn batch(fields: &Fields<'_>) -> Option<Ladder> {
    let flat = |field: &str| fields.price(&format!("{field}{BATCH}"));
    let own_output = flat(OUTPUT);
    if flat(INPUT).is_none() && own_output.is_none() {
        return None;
    }
    let rows = CONTEXT_BOUNDS.into_iter().enumerate().map(|(class, bound)| {
        // The highest step reached that has a field of its own, else the flat one.
        let unit = |field: &str| {
            let steps = CONTEXT_BOUNDS[1..=class].iter().rev();
            let mut named =
                steps.map(|step| format!("{field}_above_{}_tokens{BATCH}", thousands(*step)));
            named.find_map(|name| fields.price(&name)).or_else(|| flat(field))
        };
        let halved = |field: &str| fields.price(field).map(half);
        let output = unit(OUTPUT).or_else(|| halved(OUTPUT));
        let mut rates = Rates::default();
        let mut set = |meter: Meter, price: Option<Price>| rates[meter as usize] = price;
        if let Some(input) = unit(INPUT) {
            let write = unit(CACHE_WRITE).unwrap_or(input);
            set(Meter::Input, Some(input));
            set(Meter::CacheRead, Some(unit(CACHE_READ).unwrap_or(input)));
            set(Meter::CacheWrite, Some(write));
            set(Meter::CacheWrite1h, Some(unit(CACHE_WRITE_1H).unwrap_or(write)));
            set(Meter::AudioInput, Some(flat(AUDIO_INPUT).unwrap_or(input)));
        } else {
            let input = halved(INPUT);
            let write = halved(CACHE_WRITE).or(input);
            set(Meter::Input, input);
            set(Meter::CacheRead, halved(CACHE_READ).or(input));
            set(Meter::CacheWrite, write);
            set(Meter::CacheWrite1h, write);
            set(Meter::AudioInput, input);
        }
        set(Meter::Output, output);
        set(Meter::Reasoning, output);
        set(Meter::AudioOutput, output);
        (bound, rates)
    });
    Some(compressed(rows))
}

/// A `tiered_pricing` table by input size, which replaces the flat fields and knows no service
/// tiers: `_get_tiered_base_costs`. `None`: no such table.
fn table(fields: &Fields<'_>) -> Result<Option<Ladder>, String> {
    let Some(Value::Array(tiers)) = fields.value(TABLE) else { return Ok(None) };
    let tiers: Vec<_> = tiers.iter().filter_map(Value::as_object).collect();
    if tiers.is_empty() || !tiers.iter().all(|tier| tier.contains_key(INPUT)) {
        // A table of something else; stays unmapped.
        return Ok(None);
    }
    let mut rows = Vec::new();
    let mut end = Some(0);
    for tier in tiers {
        let range = tier.get("range").and_then(Value::as_array).map(Vec::as_slice);
        let Some([from, to]) = range else { return Err(unfit(fields)) };
        let (from, to) = (whole(from), whole(to));
        let fits = from.is_some_and(|from| CONTEXT_BOUNDS.contains(&from));
        let (Some(from), true) = (from.filter(|from| Some(*from) == end), fits) else {
            return Err(unfit(fields));
        };
        end = to;
        let price = |field: &str| fields.inner(TABLE, tier, field);
        let input = price(INPUT);
        let write = price(CACHE_WRITE).or(input);
        let output = price(OUTPUT).or_else(|| fields.price(OUTPUT));
        let reasoning =
            price(REASONING).or_else(|| price(OUTPUT)).or_else(|| fields.price(REASONING));
        let mut rates = Rates::default();
        let mut set = |meter: Meter, price: Option<Price>| rates[meter as usize] = price;
        set(Meter::Input, input);
        set(Meter::CacheRead, price(CACHE_READ).or(input));
        set(Meter::CacheWrite, write);
        set(Meter::CacheWrite1h, price(CACHE_WRITE_1H).or(write));
        set(Meter::Output, output);
        set(Meter::Reasoning, reasoning.or(output));
        set(Meter::AudioInput, fields.price(AUDIO_INPUT).or(input));
        set(Meter::AudioOutput, fields.price(AUDIO_OUTPUT).or(output));
        rows.push((from, rates));
        let known = ["range", INPUT, OUTPUT, CACHE_READ, CACHE_WRITE, CACHE_WRITE_1H, REASONING];
        for name in tier.keys().filter(|name| !known.contains(&name.as_str())) {
            fields.unmapped(format!("{TABLE}.{name}"));
        }
    }
    for superseded in [TABLE, INPUT, OUTPUT, CACHE_READ, CACHE_WRITE, CACHE_WRITE_1H] {
        fields.carried(superseded);
    }
    Ok(Some(compressed(rows.into_iter())))
}

fn unfit(fields: &Fields<'_>) -> String {
    fields.unmapped(TABLE.to_owned());
    let bounds: Vec<String> = CONTEXT_BOUNDS.iter().map(u64::to_string).collect();
    format!("ranges of {TABLE} do not join or do not begin at {}", bounds.join(", "))
}

/// A whole number, also when written as `32000.0`.
fn whole(value: &Value) -> Option<u64> {
    let text = value.as_number()?.to_string();
    let amount = Atto::parse(&text).ok()?.0.get();
    let usd = meterr_operators::money::USD;
    (amount % usd == 0).then(|| u64::try_from(amount / usd).ok()).flatten()
}

/// Per image made, else per image put in.
fn image(fields: &Fields<'_>) -> Option<Price> {
    fields.price("output_cost_per_image").or_else(|| fields.price("input_cost_per_image"))
}

/// Per web search. The map has three prices by how much a search may read; LiteLLM bills `medium`
/// unless the request says otherwise (`low` at Perplexity), and an event does not say. For models
/// that are searches themselves, the price of a query.
fn search(provider: &str, fields: &Fields<'_>) -> Option<Price> {
    if let Some(Value::Object(sizes)) = fields.value(SEARCH) {
        let size = if provider == "perplexity" { "low" } else { "medium" };
        let price =
            |size: &str| fields.inner(SEARCH, sizes, &format!("search_context_size_{size}"));
        let chosen = price(size);
        if ["low", "medium", "high"].into_iter().any(|other| price(other) != chosen) {
            fields.unmapped(format!("{SEARCH} (sizes other than {size})"));
        }
        if chosen.is_some() {
            fields.carried(SEARCH);
            let unit = fields.value(BILLING_UNIT).and_then(Value::as_str);
            let maker = fields.value("litellm_provider").and_then(Value::as_str).unwrap_or("");
            if unit == Some("per_query") {
                fields.carried(BILLING_UNIT);
            } else if matches!(provider, "google" | "vertex_ai") && !maker.contains("anthropic") {
                // Google's default: the price is for a prompt, however many searches it makes.
                fields.unmapped(format!("{SEARCH} (billed once a prompt)"));
            }
        }
        return chosen;
    }
    let mode = fields.value("mode").and_then(Value::as_str);
    if matches!(mode, Some("search" | "rerank")) {
        return fields.price("input_cost_per_query");
    }
    None
}
