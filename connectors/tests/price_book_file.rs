//! The price book that ships: it loads, it applies, and it is what the importer makes.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use meterr_connectors::price_import::{litellm, read_toml, write_toml};
use meterr_operators::event::{Meter, Tier};
use meterr_operators::price_book::{Price, PriceBook, PriceEntry, Prices, RateKey};
use meterr_operators::time::Slot;

const SHIPPED: &str = include_str!("../../config/price_book.toml");

fn shipped() -> Vec<PriceEntry> {
    read_toml(SHIPPED).unwrap()
}

fn prices(book: &PriceBook, provider: &str, model: &str, tier: Tier, context: u8) -> Prices {
    let key = RateKey { org: "acme", provider, model, tier, context };
    book.at(&key, Slot::MIN).unwrap_or_else(|| panic!("no price for {provider} {model}"))
}

fn per_million(prices: Prices, meter: Meter) -> String {
    Price::new(prices.get(meter).unwrap()).to_per_million()
}

#[test]
fn it_applies_whole_and_prices_history() {
    let mut book = PriceBook::new();
    book.apply(&shipped(), 1).unwrap();
    assert!(book.len() > 2_000);
    assert!(book.entries(None).iter().all(|entry| entry.effective_from.is_none()));
    assert!(SHIPPED.len() < 400_000, "{} bytes", SHIPPED.len());
    assert!(shipped().iter().all(|entry| entry.rounded().is_empty() && !entry.withdraws()));
}

/// The models of the reference workload, with the price pages' figures of 2026-11-24: input, cached
/// input and output in USD per million tokens.
#[test]
fn it_knows_the_models_of_the_reference_workload() {
    let mut book = PriceBook::new();
    book.apply(&shipped(), 1).unwrap();
    for (provider, model, input, cached, output) in [
        ("openai", "gpt-4o", "2.5", "1.25", "10"),
        ("openai", "gpt-4o-mini", "0.15", "0.075", "0.6"),
        ("openai", "gpt-5", "1.25", "0.125", "10"),
        ("openai", "gpt-5-mini", "0.25", "0.025", "2"),
        ("openai", "gpt-4.1", "2", "0.5", "8"),
        ("openai", "gpt-4.1-mini", "0.4", "0.1", "1.6"),
        ("openai", "o3", "2", "0.5", "8"),
        ("openai", "o4-mini", "1.1", "0.275", "4.4"),
        ("anthropic", "claude-sonnet-4-5", "3", "0.3", "15"),
        ("anthropic", "claude-haiku-4-5", "1", "0.1", "5"),
        ("google", "gemini-2.5-pro", "1.25", "0.125", "10"),
        ("google", "gemini-2.5-flash", "0.3", "0.03", "2.5"),
        ("mistral", "mistral-large-latest", "0.5", "0.05", "1.5"),
        ("deepseek", "deepseek-chat", "0.28", "0.028", "0.42"),
        ("openai", "text-embedding-3-small", "0.02", "0.02", "0"),
        ("openai", "text-embedding-3-large", "0.13", "0.13", "0"),
    ] {
        let prices = prices(&book, provider, model, Tier::Standard, 0);
        let found =
            [Meter::Input, Meter::CacheRead, Meter::Output].map(|meter| per_million(prices, meter));
        assert_eq!(found, [input, cached, output], "{provider} {model}");
    }
    // And what the workload does not ask for: tiers, long context, the one-hour cache.
    let pro = prices(&book, "google", "gemini-2.5-pro", Tier::Standard, 4);
    assert_eq!(per_million(pro, Meter::Output), "15");
    let batch = prices(&book, "openai", "gpt-4o", Tier::Batch, 0);
    assert_eq!(per_million(batch, Meter::Input), "1.25");
    let sonnet = prices(&book, "anthropic", "claude-sonnet-4-5", Tier::Standard, 0);
    assert_eq!(per_million(sonnet, Meter::CacheWrite1h), "6");
}

/// The source has 3 MB and is not kept here; the excerpt for the golden costs is. Every model of the
/// shipped book that is in the excerpt has the entries the importer makes of it.
#[test]
fn it_is_what_the_importer_makes() {
    let by_model = |entries: Vec<PriceEntry>| {
        let mut models: BTreeMap<(String, String), Vec<PriceEntry>> = BTreeMap::new();
        for entry in entries {
            let name = (entry.provider.clone(), entry.model.clone());
            models.entry(name).or_default().push(entry);
        }
        models
    };
    let import = litellm::import(include_bytes!("golden/litellm_prices.json"), None).unwrap();
    let imported = by_model(import.entries);
    let mut compared = 0;
    for (name, entries) in by_model(shipped()) {
        if let Some(made) = imported.get(&name) {
            assert_eq!(*made, entries, "{name:?}");
            compared += 1;
        }
    }
    assert!(compared > 200, "only {compared} models compared");
}

#[test]
fn what_is_written_is_read_back_and_mistakes_are_named() {
    let entries = shipped();
    let text = write_toml(&entries, "first\nsecond").unwrap();
    assert!(text.starts_with("# first\n# second\n\n[[prices]]\n"));
    assert_eq!(read_toml(&text).unwrap(), entries);
    for (wrong, part) in [
        ("prices = 3", "prices"),
        ("[[prices]]\nprovider = \"p\"", "model"),
        ("[[prices]]\nprovider = \"p\"\nmodel = \"m\"\ninput = 0.15", "decimal string"),
        ("[[prices]]\nprovider = \"p\"\nmodel = \"m\"\ninptu = \"1\"", "inptu"),
        ("[[prices]]\nprovider = \"p\"\nmodel = \"m\"\ntier = \"fast\"", "fast"),
        ("[[price]]", "price"),
    ] {
        let error = read_toml(wrong).unwrap_err().to_string();
        assert!(error.contains(part), "{wrong:?}: {error}");
    }
}
