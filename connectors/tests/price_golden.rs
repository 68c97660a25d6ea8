//! Costs by imported prices against the costs LiteLLM itself arrives at.
//!
//! `golden/litellm_costs.json` holds what LiteLLM 1.109.1 billed for 6,799 requests to 696 models over
//! tiers, caches, context sizes, reasoning, audio, images and searches; `golden/litellm_prices.json`
//! the part of its price map for those models. Both are made by `tools/make_litellm_golden.py`.
//! A cost must be equal up to the rounding of LiteLLM's floats, or fall into one of [`CLASSES`], each
//! of which says by how much it differs and is checked to that figure. The number of cases in each
//! class is fixed, so that no new difference hides in one.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};

use meterr_connectors::price_import::{Import, litellm};
use meterr_operators::event::{CONTEXT_BOUNDS, INPUT_METERS, Meter, Meters, Tier, context_class};
use meterr_operators::money::Atto;
use meterr_operators::price_book::{Price, PriceBook, Prices, RateKey};
use meterr_operators::time::Slot;
use serde::Deserialize;
use serde_json::Value;

/// Name, number of cases, and why the costs differ. `config/PRICES.md` has the same table.
const CLASSES: [(&str, usize, &str); 10] = [
    ("equal", 6_171, "up to the rounding of floats, one part in 10^12"),
    (
        "absent",
        90,
        "a meter without a price: LiteLLM bills it as free, we bill the rest alike and call the event \
         unpriced",
    ),
    (
        "batch_assumed",
        446,
        "no batch price in the map: LiteLLM assumes half the standard price for any provider; we bill \
         the standard price until a batch price is set",
    ),
    (
        "batch_image_tokens",
        12,
        "no batch price, output priced per image token only: LiteLLM bills batch output as free",
    ),
    (
        "batch_unknown",
        3,
        "LiteLLM looks for AI21's models under another provider when it prices a batch, finds none and \
         bills nothing",
    ),
    (
        "tier_ignored",
        15,
        "LiteLLM never passes the tier to its Fireworks calculator; the map has the prices, we use them",
    ),
    (
        "perplexity",
        36,
        "LiteLLM's Perplexity calculator knows neither caches nor context steps, since Perplexity \
         reports the cost itself; the map has the prices, we use them",
    ),
    (
        "per_prompt",
        14,
        "Google bills a prompt that searches once, however often it does; meterr bills each search the \
         event counts",
    ),
    (
        "reached",
        8,
        "xAI's long context begins when the bound is reached, our classes when it is exceeded: differs \
         at exactly the bound",
    ),
    ("rounded", 4, "a price with more than eighteen decimals: at most half an atto-dollar a unit"),
];

#[derive(Deserialize)]
struct Golden {
    litellm: String,
    models: Vec<Model>,
}

#[derive(Deserialize)]
struct Model {
    key: String,
    provider: String,
    model: String,
    cases: Vec<(Tier, Meters, String)>,
}

fn imported() -> Import {
    litellm::import(include_bytes!("golden/litellm_prices.json"), None).unwrap()
}

fn golden() -> Golden {
    serde_json::from_str(include_str!("golden/litellm_costs.json")).unwrap()
}

/// Equal up to the rounding of LiteLLM's floats, plus `slack` atto-dollars. Ten atto-dollars are the
/// decimals of their figure that ours cannot hold.
fn close(ours: i128, theirs: i128, slack: i128) -> bool {
    (ours - theirs).abs() <= theirs.abs() / 1_000_000_000_000 + 10 + slack
}

struct Case<'a> {
    model: &'a Model,
    tier: Tier,
    meters: Meters,
    theirs: i128,
}

impl Case<'_> {
    fn input_tokens(&self) -> u64 {
        INPUT_METERS.iter().map(|meter| u64::from(self.meters[*meter as usize])).sum()
    }

    fn prices(&self, book: &PriceBook, tier: Tier, context: u8) -> Prices {
        let (provider, model) = (&self.model.provider, &self.model.model);
        let key = RateKey { org: "acme", provider, model, tier, context };
        book.at(&key, Slot::MIN).unwrap_or_default()
    }

    fn cost(&self, prices: &Prices) -> i128 {
        prices.cost(&self.meters).0.get()
    }
}

/// Which class a case is of, or how the costs differ when none explains it.
fn class(
    case: &Case<'_>,
    book: &PriceBook,
    rounded: &BTreeSet<&str>,
    fields: &Value,
) -> Result<&'static str, String> {
    let context = context_class(case.input_tokens());
    let prices = case.prices(book, case.tier, context);
    let (ours, lacking) = prices.cost(&case.meters);
    let (ours, theirs) = (ours.get(), case.theirs);
    let units: i128 = case.meters.iter().map(|count| i128::from(*count)).sum();
    let is_rounded = rounded.contains(case.model.key.as_str());
    let provider = case.model.provider.as_str();

    if close(ours, theirs, 0) {
        return Ok(if lacking == 0 { "equal" } else { "absent" });
    }
    if is_rounded && close(ours, theirs, units / 2) {
        return Ok("rounded");
    }
    let has = |field: &str| fields.get(field).is_some();
    let batch = ["input", "output"].map(|side| format!("{side}_cost_per_token_batches"));
    if case.tier == Tier::Batch && !batch.iter().any(|field| has(field)) {
        if close(ours, 2 * theirs, 0) {
            return Ok("batch_assumed");
        }
        if provider == "ai21" && theirs == 0 {
            return Ok("batch_unknown");
        }
        let output = prices.get(Meter::Output).unwrap_or_default();
        let output = (output * i64::from(case.meters[Meter::Output as usize])).get();
        let image_tokens = has("output_cost_per_image_token") && !has("output_cost_per_token");
        if image_tokens && close(ours - output, 2 * theirs, 0) {
            return Ok("batch_image_tokens");
        }
    }
    if provider == "fireworks_ai" && case.tier == Tier::Priority {
        let standard = case.cost(&case.prices(book, Tier::Standard, context));
        if close(standard, theirs, 0) {
            return Ok("tier_ignored");
        }
    }
    if provider == "perplexity" {
        let flat = case.prices(book, Tier::Standard, 0);
        let at = |meter: Meter, count: u64| {
            (flat.get(meter).unwrap_or_default() * i64::try_from(count).unwrap()).get()
        };
        let count = |meter: Meter| u64::from(case.meters[meter as usize]);
        let cost = at(Meter::Input, case.input_tokens())
            + at(Meter::Output, count(Meter::Output) + count(Meter::AudioOutput))
            + at(Meter::Reasoning, count(Meter::Reasoning));
        if close(cost, theirs, 0) {
            return Ok("perplexity");
        }
    }
    let searches = i128::from(case.meters[Meter::Searches as usize]);
    let per_prompt = matches!(provider, "google" | "vertex_ai")
        && fields.get("web_search_billing_unit").is_none_or(|unit| unit == "per_prompt");
    if per_prompt && searches > 1 && units == searches && close(ours, searches * theirs, searches) {
        return Ok("per_prompt");
    }
    if provider == "xai" && CONTEXT_BOUNDS.contains(&case.input_tokens()) {
        let above = case.cost(&case.prices(book, case.tier, context + 1));
        if close(above, theirs, 0) {
            return Ok("reached");
        }
    }
    let (ours, theirs) = (Atto::new(ours), Atto::new(theirs));
    let Case { model: Model { key, .. }, tier, meters, .. } = case;
    Err(format!("{key} {tier:?} {meters:?}: {ours} here, {theirs} at LiteLLM"))
}

#[test]
fn costs_equal_litellms_or_differ_for_a_listed_reason() {
    let (import, golden) = (imported(), golden());
    assert_eq!(golden.litellm, "1.109.1");
    let source: Value =
        serde_json::from_slice(include_bytes!("golden/litellm_prices.json")).unwrap();
    let mut book = PriceBook::new();
    book.apply(&import.entries, 1).unwrap();
    let rounded: BTreeSet<&str> = import.rounded.iter().map(|r| r.key.as_str()).collect();

    let mut found: BTreeMap<&str, usize> = BTreeMap::new();
    let mut unexplained = Vec::new();
    for model in &golden.models {
        for (tier, meters, cost) in &model.cases {
            let theirs = Atto::parse(cost).unwrap().0.get();
            let case = Case { model, tier: *tier, meters: *meters, theirs };
            match class(&case, &book, &rounded, &source[&model.key]) {
                Ok(class) => *found.entry(class).or_default() += 1,
                Err(difference) => unexplained.push(difference),
            }
        }
    }
    assert!(
        unexplained.is_empty(),
        "{} unexplained:\n{}",
        unexplained.len(),
        unexplained.join("\n")
    );
    let expected = CLASSES.iter().map(|(name, cases, _)| (*name, *cases)).collect();
    assert_eq!(found, expected);
}

/// The comparison is worth what it would notice: one pico-dollar a token, the millionth part of a
/// dollar per million tokens, on the output price.
#[test]
fn a_wrong_price_would_be_noticed() {
    let golden = golden();
    let right = imported().entries;
    let mut wrong = right.clone();
    for entry in &mut wrong {
        entry.output = entry.output.map(|price| Price::new(price.get() + Atto::new(1_000_000)));
    }
    let [right, wrong] = [right, wrong].map(|entries| {
        let mut book = PriceBook::new();
        book.apply(&entries, 1).unwrap();
        book
    });
    let (mut equal, mut noticed) = (0, 0);
    for model in &golden.models {
        for (tier, meters, cost) in &model.cases {
            let theirs = Atto::parse(cost).unwrap().0.get();
            let case = Case { model, tier: *tier, meters: *meters, theirs };
            let context = context_class(case.input_tokens());
            let matches = |book| close(case.cost(&case.prices(book, *tier, context)), theirs, 0);
            if matches(&right) && meters[Meter::Output as usize] > 0 {
                equal += 1;
                noticed += usize::from(!matches(&wrong));
            }
        }
    }
    assert!(equal > 5_000 && noticed * 100 > equal * 98, "{noticed} of {equal} notice");
}

#[test]
fn every_model_asked_for_is_found_under_its_name() {
    let import = imported();
    let names: BTreeSet<(&str, &str)> =
        import.entries.iter().map(|e| (e.provider.as_str(), e.model.as_str())).collect();
    for model in golden().models {
        let name = (model.provider.as_str(), model.model.as_str());
        assert!(names.contains(&name), "{}: {name:?}", model.key);
    }
    assert_eq!(import.skipped, vec![]);
}

#[test]
fn the_documentation_lists_every_class() {
    let table = include_str!("../../config/PRICES.md");
    for (name, cases, _) in CLASSES {
        assert!(table.contains(&format!("| `{name}` | {cases} |")), "{name} ({cases})");
    }
}
