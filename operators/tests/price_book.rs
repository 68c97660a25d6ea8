//! The price book against a naive reference: every rate at every instant is looked up by scanning
//! all entries ever applied, straight from the rules in `price_book`'s header.
#![allow(clippy::unwrap_used)]

use meterr_operators::event::{ALL_TIERS, CONTEXT_BOUNDS, METERS, Meter, Tier};
use meterr_operators::money::Atto;
use meterr_operators::price_book::{Price, PriceBook, PriceEntry, PriceList, Prices, RateKey};
use meterr_operators::time::{SLOT, Slot, Time};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

/// The entry of exactly this key in force at `slot`: the latest start at or before it, and of equal
/// starts the one applied last.
fn in_force<'a>(
    applied: &'a [PriceEntry],
    key: &RateKey<'_>,
    org: Option<&str>,
    tier: Tier,
    bound: u64,
    slot: Slot,
) -> Option<&'a PriceEntry> {
    let mut found: Option<&PriceEntry> = None;
    for entry in applied {
        let same_key = entry.provider == key.provider
            && entry.model == key.model
            && entry.org.as_deref() == org
            && entry.tier == tier
            && entry.min_input_tokens == bound;
        let from = |entry: &PriceEntry| entry.effective_from.map_or(0, |time| time.0);
        let started = from(entry) <= slot.start().0;
        if same_key && started && found.is_none_or(|held| from(entry) >= from(held)) {
            found = Some(entry);
        }
    }
    found.filter(|entry| !entry.withdraws())
}

fn reference(applied: &[PriceEntry], key: &RateKey<'_>, slot: Slot) -> Option<Prices> {
    for org in [Some(key.org), None] {
        for tier in [key.tier, Tier::Standard] {
            for bound in CONTEXT_BOUNDS[..=usize::from(key.context)].iter().rev() {
                if let Some(entry) = in_force(applied, key, org, tier, *bound, slot) {
                    return Some(resolved(entry));
                }
            }
        }
    }
    None
}

fn resolved(entry: &PriceEntry) -> Prices {
    let first = |fields: &[Option<Price>]| fields.iter().flatten().next().map(|price| price.get());
    let e = entry;
    let mut prices = Prices::default();
    let mut set = |meter: Meter, price: Option<Atto>| prices.per_unit[meter as usize] = price;
    set(Meter::Input, first(&[e.input]));
    set(Meter::CacheRead, first(&[e.cached_input, e.input]));
    set(Meter::CacheWrite, first(&[e.cache_write, e.input]));
    set(Meter::CacheWrite1h, first(&[e.cache_write_1h, e.cache_write, e.input]));
    set(Meter::Output, first(&[e.output]));
    set(Meter::Reasoning, first(&[e.reasoning, e.output]));
    set(Meter::AudioInput, first(&[e.audio_input, e.input]));
    set(Meter::AudioOutput, first(&[e.audio_output, e.output]));
    set(Meter::Images, first(&[e.image]));
    set(Meter::Searches, first(&[e.search]));
    prices
}

/// Few values everywhere, so that entries meet: same keys, same starts, equal prices.
fn entries() -> impl Strategy<Value = PriceEntry> {
    let price = || option::weighted(0.4, (0..3i128).prop_map(|n| Price::new(Atto::new(n))));
    (
        select(vec!["m", "n"]),
        option::weighted(0.8, 0..6i64),
        prop::array::uniform10(price()),
        select(ALL_TIERS[..2].to_vec()),
        select(CONTEXT_BOUNDS[..4].to_vec()),
        option::weighted(0.4, select(vec!["a", "b"])),
        prop::bool::weighted(0.1),
    )
        .prop_map(|(model, from, prices, tier, min_input_tokens, org, withdraw)| {
            let [input, cached_input, cache_write, cache_write_1h, output, ..] = prices;
            let [.., reasoning, audio_input, audio_output, image, search] = prices;
            let entry = PriceEntry {
                provider: "p".into(),
                model: model.into(),
                effective_from: from.map(|n| Time(n * SLOT)),
                tier,
                min_input_tokens,
                org: org.map(str::to_owned),
                ..PriceEntry::default()
            };
            if withdraw {
                return entry;
            }
            PriceEntry {
                input,
                cached_input,
                cache_write,
                cache_write_1h,
                output,
                reasoning,
                audio_input,
                audio_output,
                image,
                search,
                ..entry
            }
        })
}

fn keys() -> Vec<RateKey<'static>> {
    let mut keys = Vec::new();
    for org in ["a", "b", "c"] {
        for model in ["m", "n"] {
            for tier in [Tier::Standard, Tier::Batch, Tier::Priority] {
                for context in [0, 1, 2, 3, 7] {
                    keys.push(RateKey { org, provider: "p", model, tier, context });
                }
            }
        }
    }
    keys
}

proptest! {
    #[test]
    fn timelines_equal_the_naive_reference(entries in vec(entries(), 0..24)) {
        let mut book = PriceBook::new();
        for (at, entry) in entries.iter().enumerate() {
            book.apply(std::slice::from_ref(entry), at as u64).unwrap();
        }
        for key in keys() {
            let timeline = book.timeline(&key);
            prop_assert_eq!(timeline[0].0, Slot::MIN);
            prop_assert!(timeline.windows(2).all(|w| w[0].0 < w[1].0 && w[0].1 != w[1].1));
            for slot in (0..8).map(Slot).chain([Slot(Slot::END.0 - 1)]) {
                let (_, prices) = timeline.iter().rfind(|(from, _)| *from <= slot).unwrap();
                prop_assert_eq!(*prices, reference(&entries, &key, slot), "{:?} {:?}", key, slot);
                prop_assert_eq!(book.at(&key, slot), *prices);
            }
        }
    }

    #[test]
    fn only_touched_models_change_and_a_listing_rebuilds_the_book(
        before in vec(entries(), 0..12),
        after in vec(entries(), 0..4),
    ) {
        let mut book = PriceBook::new();
        for (at, entry) in before.iter().enumerate() {
            book.apply(std::slice::from_ref(entry), at as u64).unwrap();
        }
        let old = book.clone();
        if let Ok(touched) = book.apply(&after, 100) {
            for key in keys() {
                let (provider, model) = (key.provider.to_owned(), key.model.to_owned());
                if !touched.contains(&(provider, model)) {
                    prop_assert_eq!(old.timeline(&key), book.timeline(&key));
                }
            }
            prop_assert_eq!(book.clone().apply(&after, 101).unwrap(), vec![]);
        } else {
            prop_assert_eq!(&old, &book);
        }

        let mut rebuilt = PriceBook::new();
        for (entry, position) in book.listing(None) {
            rebuilt.apply(&[entry], position).unwrap();
        }
        prop_assert_eq!(&rebuilt, &book);
        prop_assert_eq!(book.len(), book.entries(None).len());
        prop_assert_eq!(
            book.len(),
            book.entries(Some("m")).len() + book.entries(Some("n")).len()
        );

        // And the written form keeps everything but the positions.
        let list = PriceList { prices: book.entries(None) };
        let text = serde_json::to_string(&list).unwrap();
        prop_assert_eq!(serde_json::from_str::<PriceList>(&text).unwrap(), list);
    }
}

fn entry(model: &str, input: &str, from: Option<&str>) -> PriceEntry {
    PriceEntry {
        provider: "openai".into(),
        model: model.into(),
        input: Some(Price::per_million(input).unwrap()),
        effective_from: from.map(|text| Time::parse(text).unwrap()),
        ..PriceEntry::default()
    }
}

fn key(org: &'static str) -> RateKey<'static> {
    RateKey { org, provider: "openai", model: "m", tier: Tier::Standard, context: 0 }
}

fn inputs(book: &PriceBook, org: &'static str) -> Vec<Option<String>> {
    let price = |prices: Option<Prices>| Some(Price::new(prices?.get(Meter::Input)?));
    let timeline = book.timeline(&key(org));
    timeline.iter().map(|(_, prices)| price(*prices).map(Price::to_per_million)).collect()
}

#[test]
fn an_entry_holds_until_the_next_of_its_key_and_a_withdrawal_ends_it() {
    let mut book = PriceBook::new();
    book.apply(&[entry("m", "3", Some("2026-02-01T00:00:00Z"))], 1).unwrap();
    book.apply(&[entry("m", "2", None)], 2).unwrap();
    assert_eq!(inputs(&book, "acme"), [Some("2".into()), Some("3".into())]);
    // A correction of the past replaces the earlier knowledge.
    book.apply(&[entry("m", "2.5", None)], 3).unwrap();
    assert_eq!(inputs(&book, "acme"), [Some("2.5".into()), Some("3".into())]);
    // An override of one org, and its end.
    let mut ours = entry("m", "1", Some("2026-01-01T00:00:00Z"));
    ours.org = Some("acme".into());
    let mut end = PriceEntry { input: None, ..ours.clone() };
    end.effective_from = Some(Time::parse("2026-03-01T00:00:00Z").unwrap());
    book.apply(&[ours, end], 4).unwrap();
    assert_eq!(inputs(&book, "acme"), [Some("2.5".into()), Some("1".into()), Some("3".into())]);
    assert_eq!(inputs(&book, "other"), [Some("2.5".into()), Some("3".into())]);
    let positions: Vec<u64> = book.listing(None).iter().map(|(_, position)| *position).collect();
    assert_eq!(positions, [3, 1, 4, 4]);
}

#[test]
fn a_list_with_one_wrong_entry_changes_nothing() {
    let mut book = PriceBook::new();
    let list = [entry("m", "2", None), entry("m", "2", Some("2026-02-01T00:01:00Z"))];
    let errors = book.apply(&list, 1).unwrap_err();
    assert_eq!((errors.len(), errors[0].index, errors[0].field), (1, 1, "effective_from"));
    assert!(book.is_empty());
    assert_eq!(book.timeline(&key("acme")), [(Slot::MIN, None)]);
}

#[test]
fn cost_adds_the_priced_part_and_names_what_lacks_a_price() {
    let prices = Prices::of(&entry("m", "2", None));
    let mut meters = [0; METERS];
    meters[Meter::Input as usize] = 1_000_000;
    meters[Meter::CacheRead as usize] = 500_000;
    assert_eq!(prices.cost(&meters), (Atto::usd(3), 0));
    meters[Meter::Output as usize] = 1;
    meters[Meter::Images as usize] = 1;
    let lacking = 1 << Meter::Output as u16 | 1 << Meter::Images as u16;
    assert_eq!(prices.cost(&meters), (Atto::usd(3), lacking));
}

/// Ten thousand entries of one model, then a timeline: the shape that an index by entry alone, or a
/// scan per start, would turn into 10^8 steps.
#[test]
fn ten_thousand_entries_of_one_model_are_no_matter() {
    let list: Vec<PriceEntry> = (0..10_000i64)
        .map(|n| PriceEntry {
            effective_from: Some(Time(n * SLOT)),
            input: Some(Price::new(Atto::new(i128::from(n)))),
            tier: ALL_TIERS[n as usize % 4],
            ..entry("m", "1", None)
        })
        .collect();
    let mut book = PriceBook::new();
    assert_eq!(book.apply(&list, 1).unwrap(), [("openai".to_owned(), "m".to_owned())]);
    assert_eq!(book.timeline(&key("acme")).len(), 2_500);
    let flex = RateKey { tier: Tier::Flex, ..key("acme") };
    // The standard price until the first flex entry, in slot 2.
    assert_eq!(book.timeline(&flex).len(), 2_501);
}
