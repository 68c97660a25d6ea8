//! The importer's rules, one by one, and what it does with input that is not as it should be.
#![allow(clippy::unwrap_used)]

use meterr_connectors::price_import::{Import, PriceImportError, litellm};
use meterr_operators::event::Tier;
use meterr_operators::price_book::{Price, PriceBook, PriceEntry, check_entries};
use meterr_operators::time::Time;
use proptest::prelude::*;

fn import(json: &str) -> Import {
    litellm::import(json.as_bytes(), None).unwrap()
}

/// The map with one model of provider `p`.
fn model(fields: &str) -> Import {
    import(&format!(r#"{{"m":{{"litellm_provider":"p",{fields}}}}}"#))
}

/// An entry in short: tier, bound, then the prices that are stated, per million or per piece.
fn short(entry: &PriceEntry) -> String {
    let mut text = format!("{} {}", entry.tier.name(), entry.min_input_tokens);
    let fields = meterr_operators::price_book::PRICE_FIELDS.into_iter().zip(entry.written());
    for (at, (name, price)) in fields.enumerate() {
        if let Some(price) = price {
            let price = if at < 8 { price.to_per_million() } else { price.get().to_string() };
            text.push_str(&format!(" {name}={price}"));
        }
    }
    text
}

fn entries(fields: &str) -> Vec<String> {
    model(fields).entries.iter().map(short).collect()
}

#[test]
fn prices_are_decimal_text_and_fall_backs_are_left_out() {
    assert_eq!(
        entries(
            r#""input_cost_per_token":1.5e-07,"output_cost_per_token":0.0000006,
               "cache_read_input_token_cost":7.5E-8,"cache_creation_input_token_cost":1.5e-07,
               "output_cost_per_reasoning_token":6e-07,"input_cost_per_audio_token":"1e-6""#
        ),
        ["standard 0 input=0.15 cached_input=0.075 output=0.6 audio_input=1"]
    );
}

#[test]
fn no_digit_passes_through_a_float() {
    // The float nearest to this is 1.2345678901234567e-07; eighteen decimals hold 0.123456789012.
    let import = model(r#""input_cost_per_token":1.23456789012345678e-07"#);
    assert_eq!(import.entries[0].input, Some(Price::per_million("0.123456789012").unwrap()));
    let rounded = &import.rounded[0];
    assert_eq!(
        (rounded.key.as_str(), rounded.field.as_str(), rounded.text.as_str()),
        ("m", "input_cost_per_token", "1.23456789012345678e-07")
    );
    // A float would turn the last digit of this one.
    let import = model(r#""input_cost_per_token":0.100000000000000001"#);
    assert_eq!(import.entries[0].input.unwrap().get().to_string(), "0.100000000000000001");
    assert!(import.rounded.is_empty());
}

#[test]
fn tiers_and_context_steps_become_entries_of_their_own() {
    assert_eq!(
        entries(
            r#""input_cost_per_token":1e-06,"input_cost_per_token_above_200k_tokens":2e-06,
               "output_cost_per_token":4e-06,"output_cost_per_token_above_200k_tokens":6e-06,
               "cache_read_input_token_cost":1e-07,
               "input_cost_per_token_priority":2e-06,"output_cost_per_token_priority":8e-06,
               "input_cost_per_token_batches":5e-07,"output_cost_per_token_batches":2e-06"#
        ),
        [
            "standard 0 input=1 cached_input=0.1 output=4",
            // The cached price has no step and stays.
            "standard 200000 input=2 cached_input=0.1 output=6",
            // Cached input has no batch price and costs as batch input.
            "batch 0 input=0.5 output=2",
            // Without steps of its own a tier takes the standard ones over.
            "priority 0 input=2 cached_input=0.1 output=8",
            "priority 200000 input=2 cached_input=0.1 output=6",
        ]
    );
}

#[test]
fn a_tier_that_costs_as_the_standard_one_has_no_entries() {
    let fields = r#""input_cost_per_token":1e-06,"input_cost_per_token_flex":1e-06"#;
    assert_eq!(entries(fields), ["standard 0 input=1"]);
    assert!(model(fields).unmapped.is_empty());
}

#[test]
fn a_fireworks_model_without_a_cached_price_has_half_the_input_price() {
    for (provider, expected) in [
        ("fireworks_ai", "standard 0 input=1 cached_input=0.5"),
        ("fireworks_ai-embedding-models", "standard 0 input=1"),
    ] {
        let import = import(&format!(
            r#"{{"m":{{"litellm_provider":"{provider}","input_cost_per_token":1e-06}}}}"#
        ));
        assert_eq!(import.entries[0].provider, "fireworks_ai");
        assert_eq!(short(&import.entries[0]), expected);
    }
}

#[test]
fn one_batch_price_of_two_halves_the_other() {
    assert_eq!(
        entries(
            r#""input_cost_per_token":1e-06,"output_cost_per_token":4e-06,
               "input_cost_per_token_batches":4e-07"#
        )[1],
        "batch 0 input=0.4 output=2"
    );
}

#[test]
fn tables_by_input_size_replace_the_flat_prices_when_they_fit() {
    let table = |from: &str| {
        format!(
            r#""input_cost_per_token":9e-06,"output_cost_per_token":4e-06,"tiered_pricing":[
               {{"range":[0,32000.0],"input_cost_per_token":1e-06}},
               {{"range":[{from},1e6],"input_cost_per_token":2e-06,"output_cost_per_token":5e-06}}]"#
        )
    };
    let fit = model(&table("32000"));
    assert_eq!(
        fit.entries.iter().map(short).collect::<Vec<_>>(),
        ["standard 0 input=1 output=4", "standard 32000 input=2 output=5"]
    );
    assert!(fit.unmapped.is_empty());
    for unfit in ["33000", "128000", "\"x\"", "3.2e4000"] {
        let import = model(&table(unfit));
        assert_eq!(import.entries, vec![], "{unfit}");
        assert!(import.skipped[0].reason.contains("tiered_pricing"), "{:?}", import.skipped);
        assert!(import.unmapped.contains_key("tiered_pricing"));
    }
}

#[test]
fn searches_and_images_are_by_piece_and_stand_in_every_row() {
    assert_eq!(
        entries(
            r#""input_cost_per_token":1e-06,"input_cost_per_token_flex":5e-07,
               "output_cost_per_image":0.04,"input_cost_per_image":0.001,
               "search_context_cost_per_query":{"search_context_size_low":0.01,
               "search_context_size_medium":0.02,"search_context_size_high":0.03}"#
        ),
        ["standard 0 input=1 image=0.04 search=0.02", "flex 0 input=0.5 image=0.04 search=0.02"]
    );
    assert_eq!(
        entries(r#""mode":"rerank","input_cost_per_query":0.002"#),
        ["standard 0 search=0.002"]
    );
}

#[test]
fn a_search_price_that_is_for_a_whole_prompt_is_named() {
    let search = |fields: &str| {
        import(&format!(
            r#"{{"m":{{"litellm_provider":"gemini","search_context_cost_per_query":
               {{"search_context_size_low":1,"search_context_size_medium":1,
               "search_context_size_high":1}}{fields}}}}}"#
        ))
    };
    let per_prompt = search("").unmapped;
    assert_eq!(
        per_prompt.keys().collect::<Vec<_>>(),
        ["search_context_cost_per_query (billed once a prompt)"]
    );
    assert!(search(r#","web_search_billing_unit":"per_query""#).unmapped.is_empty());
}

#[test]
fn what_is_not_carried_over_is_counted_and_named() {
    let import = import(
        r#"{"a":{"litellm_provider":"p","input_cost_per_token":1e-06,"input_cost_per_second":1,
                 "max_tokens":5,"some_new_cost_per_thing":2,"output_cost_per_second":null},
            "b":{"litellm_provider":"p","input_cost_per_second":1},
            "c":{"litellm_provider":"p","input_cost_per_token":"free"},
            "d":{"input_cost_per_token":1},
            "e":[],
            "sample_spec":{"litellm_provider":"p","input_cost_per_token":1}}"#,
    );
    assert_eq!(import.entries.iter().map(|e| e.model.as_str()).collect::<Vec<_>>(), ["a"]);
    let unmapped: Vec<_> = import.unmapped.iter().map(|(f, u)| (f.as_str(), u.models)).collect();
    assert_eq!(
        unmapped,
        [("input_cost_per_second", 2), ("input_cost_per_token", 1), ("some_new_cost_per_thing", 1)]
    );
    assert_eq!(import.unmapped["input_cost_per_second"].examples, ["a", "b"]);
    let skipped: Vec<_> =
        import.skipped.iter().map(|s| (s.key.as_str(), s.reason.as_str())).collect();
    assert_eq!(
        skipped,
        [
            ("b", "no price per token, image or search"),
            ("c", "no price per token, image or search"),
            ("d", "litellm_provider is missing"),
            ("e", "not an object"),
            ("sample_spec", "an example of the format, not a model"),
        ]
    );
}

#[test]
fn prices_out_of_bounds_and_impossible_names_skip_their_model_alone() {
    let import = import(&format!(
        r#"{{"{long}":{{"litellm_provider":"p","input_cost_per_token":1e-06}},
             "dear":{{"litellm_provider":"p","input_cost_per_token":1.5}},
             "good":{{"litellm_provider":"p","input_cost_per_token":1}},
             "minus":{{"litellm_provider":"p","input_cost_per_token":-1e-06}}}}"#,
        long = "m".repeat(129)
    ));
    assert_eq!(import.entries.len(), 1);
    let reasons: Vec<_> = import.skipped.iter().map(|s| s.reason.as_str()).collect();
    assert!(reasons[0].contains("between 0 and 1000000"), "{reasons:?}");
    assert!(reasons[1].contains("-1 USD per million"), "{reasons:?}");
    assert!(reasons[2].contains("129 bytes"), "{reasons:?}");
}

#[test]
fn of_two_keys_for_one_name_the_one_with_the_provider_wins() {
    let import = import(
        r#"{"gemini-x":{"litellm_provider":"gemini","input_cost_per_token":1e-06},
            "gemini/gemini-x":{"litellm_provider":"gemini","input_cost_per_token":2e-06}}"#,
    );
    let [entry] = &import.entries[..] else { panic!("{:?}", import.entries) };
    assert_eq!((entry.provider.as_str(), entry.model.as_str()), ("google", "gemini-x"));
    assert_eq!(short(entry), "standard 0 input=2");
    assert_eq!(import.skipped[0].key, "gemini-x");
}

#[test]
fn the_stamp_is_the_start_of_every_entry() {
    let stamp = Time::parse("2026-11-24T00:00:00Z").unwrap();
    let json = br#"{"m":{"litellm_provider":"p","input_cost_per_token":1e-06}}"#;
    let import = litellm::import(json, Some(stamp)).unwrap();
    assert_eq!(import.entries[0].effective_from, Some(stamp));
    assert_eq!(import.entries[0].tier, Tier::Standard);
}

#[test]
fn what_is_no_map_is_refused() {
    for wrong in ["", "[]", "{", "3", "{\"a\":{}} x"] {
        let error = litellm::import(wrong.as_bytes(), None).unwrap_err();
        assert!(matches!(error, PriceImportError::Json(_)), "{wrong:?}: {error}");
    }
    assert!(litellm::import(b"\xff\xfe", None).is_err());
    let large = vec![b' '; litellm::BYTES_MAX + 1];
    assert!(matches!(litellm::import(&large, None), Err(PriceImportError::TooLarge(_))));
}

/// Any JSON in any field we know.
fn hostile() -> impl Strategy<Value = String> {
    let number = "-?[0-9]{1,4}(\\.[0-9]{1,30})?(e-?[0-9]{1,4})?";
    let value = prop_oneof![
        number.prop_map(|n| if n.trim_start_matches('-').starts_with('0') {
            "0".into()
        } else {
            n
        }),
        Just("null".to_owned()),
        Just("true".to_owned()),
        "[a-z0-9.e-]{0,12}".prop_map(|text| format!("\"{text}\"")),
        Just("[]".to_owned()),
        Just("{}".to_owned()),
        Just(r#"[{"range":[0,32000],"input_cost_per_token":1e-6},{"range":[]}]"#.to_owned()),
        Just(r#"[{"range":[0,1e3000],"input_cost_per_token":1e-6}]"#.to_owned()),
        Just(r#"{"search_context_size_medium":[1]}"#.to_owned()),
    ];
    let stem = prop::sample::select(vec![
        "input_cost_per_token",
        "output_cost_per_token",
        "cache_read_input_token_cost",
        "cache_creation_input_token_cost",
        "cache_creation_input_token_cost_above_1hr",
        "output_cost_per_reasoning_token",
        "input_cost_per_audio_token",
        "output_cost_per_image_token",
        "output_cost_per_image",
        "tiered_pricing",
        "search_context_cost_per_query",
        "mode",
    ]);
    let step = prop::sample::select(vec!["", "_above_200k_tokens", "_above_77k_tokens"]);
    let tier = prop::sample::select(vec!["", "_batches", "_flex", "_priority"]);
    prop::collection::btree_map((stem, step, tier), value, 0..12).prop_map(|fields| {
        let fields: Vec<String> = fields
            .into_iter()
            .map(|((stem, step, tier), value)| format!("\"{stem}{step}{tier}\":{value}"))
            .collect();
        format!(
            r#"{{"p/m":{{"litellm_provider":"p","x":0{}{}}}}}"#,
            if fields.is_empty() { "" } else { "," },
            fields.join(",")
        )
    })
}

proptest! {
    #[test]
    fn whatever_the_fields_hold_the_result_is_a_valid_book_or_a_reason(json in hostile()) {
        let import = litellm::import(json.as_bytes(), None).unwrap();
        prop_assert!(check_entries(&import.entries).is_ok());
        prop_assert!(PriceBook::new().apply(&import.entries, 1).is_ok());
        prop_assert_eq!(import.entries.is_empty(), !import.skipped.is_empty());
        prop_assert!(import.entries.iter().all(|entry| !entry.withdraws()));
    }

    #[test]
    fn bytes_that_are_no_map_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = litellm::import(&bytes, None);
    }
}
