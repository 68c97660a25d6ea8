//! Golden examples of every accepted format, and the rules of the foreign ones.

use std::fs;
use std::path::Path;

use meterr_operators::event::Meter;
use meterr_operators::time::Time;

use super::{refused, taken};
use crate::codec::{decode_line, encode_native, split_request};

/// Every `golden/NAME.json` decodes to `golden/NAME.native.json`, the same event in our own format.
/// `UPDATE_GOLDEN=1` writes the latter.
#[test]
fn golden_examples_of_every_format() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/codec/golden");
    let mut examples = 0;
    for entry in fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        if name.ends_with(".native.json") {
            continue;
        }
        let body = fs::read(&path).unwrap();
        let lines = split_request(Some("application/json"), &body).unwrap();
        assert_eq!(lines.len(), 1, "{name}");
        let event = decode_line(&lines[0].1).unwrap_or_else(|r| panic!("{name}: {r}"));
        let mut native = Vec::new();
        encode_native(&event, &mut native);
        assert_eq!(decode_line(&native).as_ref(), Ok(&event), "{name}");
        let golden = path.with_extension("native.json");
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            fs::write(&golden, &native).unwrap();
        }
        let wanted = fs::read(&golden).unwrap_or_else(|e| panic!("{}: {e}", golden.display()));
        assert_eq!(
            String::from_utf8(native).unwrap(),
            String::from_utf8(wanted).unwrap(),
            "{name}; UPDATE_GOLDEN=1 rewrites it"
        );
        examples += 1;
    }
    assert!(examples >= 14, "only {examples} examples found");
}

fn enveloped(provider: &str, usage: &str) -> String {
    format!(
        r#"{{"id":"1","time":"2026-01-02T03:04:05Z","org":"acme","user":"u","provider":"{provider}","model":"m","usage":{usage}}}"#
    )
}

/// Input without cache, cache read, cache writes (short, hour), output, reasoning.
fn tokens(line: &str) -> [u32; 6] {
    let event = taken(line);
    [
        Meter::Input,
        Meter::CacheRead,
        Meter::CacheWrite,
        Meter::CacheWrite1h,
        Meter::Output,
        Meter::Reasoning,
    ]
    .map(|meter| event.meters[meter as usize])
}

#[test]
fn cached_tokens_are_inside_at_openai_and_outside_at_anthropic() {
    let openai =
        r#"{"input_tokens":100,"output_tokens":1,"input_tokens_details":{"cached_tokens":40}}"#;
    assert_eq!(tokens(&enveloped("openai", openai)), [60, 40, 0, 0, 1, 0]);
    let anthropic = r#"{"input_tokens":100,"output_tokens":1,"cache_read_input_tokens":40}"#;
    assert_eq!(tokens(&enveloped("anthropic", anthropic)), [100, 40, 0, 0, 1, 0]);
    // The shape decides, not the name: Claude by another provider.
    assert_eq!(tokens(&enveloped("aws.bedrock", anthropic)), [100, 40, 0, 0, 1, 0]);
}

#[test]
fn marks_of_both_shapes_need_the_provider() {
    let both =
        r#"{"input_tokens":100,"output_tokens":1,"total_tokens":101,"cache_read_input_tokens":40}"#;
    assert_eq!(tokens(&enveloped("anthropic", both)), [100, 40, 0, 0, 1, 0]);
    assert_eq!(tokens(&enveloped("openai", both)), [100, 0, 0, 0, 1, 0]);
    assert_eq!(
        refused(&enveloped("proxy", both)),
        "bad_value: usage has fields of Anthropic and of OpenAI, so that it is not known whether \
         input_tokens includes cached tokens; give the provider, or our own fields"
    );
}

#[test]
fn audio_that_was_cached_is_billed_as_cached() {
    let line = enveloped(
        "openai",
        r#"{"prompt_tokens":100,"completion_tokens":10,"prompt_tokens_details":{"cached_tokens":70,"audio_tokens":50}}"#,
    );
    let event = taken(&line);
    assert_eq!(event.meters[Meter::CacheRead as usize], 70);
    assert_eq!(event.meters[Meter::AudioInput as usize], 30);
    assert_eq!(event.meters[Meter::Input as usize], 0);
    assert_eq!(event.input_tokens(), 100);
}

#[test]
fn more_cached_than_input_is_refused() {
    let usage = |cached: u32| {
        let details = format!(r#"{{"cached_tokens":{cached}}}"#);
        enveloped(
            "openai",
            &format!(
                r#"{{"prompt_tokens":100,"completion_tokens":1,"prompt_tokens_details":{details}}}"#
            ),
        )
    };
    assert_eq!(tokens(&usage(100)), [0, 100, 0, 0, 1, 0]);
    assert_eq!(
        refused(&usage(101)),
        "bad_value: cached, cache-write and audio tokens add up to 101, more than the 100 input \
         tokens they are parts of"
    );
}

#[test]
fn the_total_tells_whether_reasoning_is_outside() {
    let usage = |total: u32| {
        enveloped(
            "x_ai",
            &format!(
                r#"{{"prompt_tokens":100,"completion_tokens":20,"total_tokens":{total},"completion_tokens_details":{{"reasoning_tokens":15}}}}"#
            ),
        )
    };
    assert_eq!(tokens(&usage(120)), [100, 0, 0, 0, 5, 15]);
    assert_eq!(tokens(&usage(135)), [100, 0, 0, 0, 20, 15]);
}

#[test]
fn anthropic_cache_writes_with_and_without_split() {
    let usage = |fields: &str| {
        enveloped("anthropic", &format!(r#"{{"input_tokens":5,"output_tokens":1,{fields}}}"#))
    };
    assert_eq!(tokens(&usage(r#""cache_creation_input_tokens":30"#)), [5, 0, 30, 0, 1, 0]);
    let split =
        r#""cache_creation":{"ephemeral_5m_input_tokens":20,"ephemeral_1h_input_tokens":10}"#;
    assert_eq!(tokens(&usage(split)), [5, 0, 20, 10, 1, 0]);
    let both = format!(r#""cache_creation_input_tokens":30,{split}"#);
    assert_eq!(tokens(&usage(&both)), [5, 0, 20, 10, 1, 0]);
}

#[test]
fn sums_beyond_the_bound_are_refused() {
    let usage = |cached: u32| {
        enveloped(
            "anthropic",
            &format!(
                r#"{{"input_tokens":1,"cache_read_input_tokens":{cached},"output_tokens":0}}"#
            ),
        )
    };
    assert_eq!(tokens(&usage(999_999_999))[1], 999_999_999);
    assert_eq!(
        refused(&usage(1_000_000_000)),
        "out_of_bounds: input_tokens with what belongs to it is 1000000001; one event may carry \
         at most 1000000000"
    );
}

#[test]
fn usage_is_stated_once() {
    let twice = enveloped("openai", r#"{"prompt_tokens":1}"#)
        .replace("\"usage\"", "\"input_tokens\":1,\"usage\"");
    assert_eq!(
        refused(&twice),
        "bad_value: usage is given twice, by input_tokens and by usage; send one of them"
    );
    let empty = enveloped("openai", r#"{"seconds":12}"#);
    assert!(refused(&empty).starts_with("missing_field: usage has neither input_tokens"));
    let none = enveloped("openai", "null");
    assert!(refused(&none).starts_with("missing_field: the event states no usage"));
    let text = enveloped("openai", "\"12\"");
    assert_eq!(refused(&text), "bad_value: usage must be an object, not \"12\"");
    let flat = enveloped("openai", "null")
        .replace("\"usage\":null", "\"prompt_tokens\":7,\"completion_tokens\":2");
    assert_eq!(tokens(&flat), [7, 0, 0, 0, 2, 0]);
}

#[test]
fn tiers_by_the_names_of_providers() {
    let line = |tier: &str| {
        enveloped(
            "anthropic",
            &format!(r#"{{"input_tokens":1,"output_tokens":1,"service_tier":"{tier}"}}"#),
        )
    };
    for (name, tier) in [("default", "standard"), ("priority", "priority"), ("batch", "batch")] {
        assert_eq!(taken(&line(name)).tier.name(), tier);
    }
    assert_eq!(
        refused(&line("scale")),
        "bad_value: service_tier \"scale\" is not known; set service_tier beside usage to one of \
         standard, batch, flex, priority"
    );
    // Beside the usage it goes first.
    let mended = line("scale").replace("\"usage\"", "\"service_tier\":\"priority\",\"usage\"");
    assert_eq!(taken(&mended).tier.name(), "priority");
}

const CLOUD_EVENT: &str = r#"{"specversion":"1.0","id":"outer","source":"s","type":"t","subject":"outer-user","time":"2026-01-01T00:00:00Z","org":"outer","data":DATA}"#;

#[test]
fn what_the_data_says_goes_before_the_cloud_event() {
    let own = r#"{"id":"inner","time":"2026-02-01T00:00:00Z","org":"inner","user":"inner-user","cost":"1"}"#;
    let line = CLOUD_EVENT.replace("DATA", own);
    let event = taken(&line);
    assert_eq!((&*event.id, &*event.org, &*event.user), ("inner", "inner", "inner-user"));
    assert_eq!(event.time, Time::parse("2026-02-01T00:00:00Z").unwrap());
    let line = CLOUD_EVENT.replace("DATA", r#"{"cost":"1"}"#);
    let event = taken(&line);
    assert_eq!((&*event.id, &*event.org, &*event.user), ("outer", "outer", "outer-user"));
    assert_eq!(event.time, Time::parse("2026-01-01T00:00:00Z").unwrap());
    let line = line.replace("\"org\"", "\"user\":\"extension\",\"org\"");
    assert_eq!(taken(&line).user, "extension");
}

#[test]
fn broken_cloud_events_say_what_is_wrong() {
    let with = |data: &str| CLOUD_EVENT.replace("DATA", data);
    assert_eq!(refused(&with("null")), "missing_field: the CloudEvent has no \"data\"");
    assert_eq!(refused(&with("\"x\"")), "bad_value: data must be an object, not \"x\"");
    assert_eq!(
        refused(&with("{\"cost\":1}").replace("1.0", "0.3")),
        "bad_value: specversion must be \"1.0\", not \"0.3\""
    );
    assert_eq!(
        refused(&with(&with("{\"cost\":1}"))),
        "bad_value: the data of a CloudEvent is another CloudEvent"
    );
    assert!(
        refused(&with("{}").replace("\"data\"", "\"data_base64\""))
            .starts_with("bad_value: data_base64 is not read")
    );
}

#[test]
fn openai_time_of_creation_is_the_last_resort() {
    let data = r#"{"id":"r","object":"response","created_at":1767225600,"model":"gpt-5","usage":{"input_tokens":1,"output_tokens":1}}"#;
    let with_time = CLOUD_EVENT.replace("DATA", data);
    assert_eq!(taken(&with_time).provider, "openai");
    let without = with_time.replace("\"time\":\"2026-01-01T00:00:00Z\",", "");
    assert_eq!(taken(&without).time, Time::parse("2026-01-01T00:00:00Z").unwrap());
    let nothing = without.replace("created_at", "completed_at");
    assert_eq!(refused(&nothing), "missing_field: \"time\" is required");
}

fn span(attributes: &str) -> String {
    format!(
        r#"{{"id":"1","time":"2026-01-02T03:04:05Z","attributes":{{"gen_ai.provider.name":"p","gen_ai.request.model":"m","org":"acme","user.id":"u",{attributes}}}}}"#
    )
}

#[test]
fn spans_with_usage_are_taken_others_refused() {
    let usage = r#""gen_ai.usage.input_tokens":10,"gen_ai.usage.output_tokens":3"#;
    assert_eq!(tokens(&span(usage)), [10, 0, 0, 0, 3, 0]);
    assert_eq!(
        refused(&span(&format!(r#""gen_ai.operation.name":"invoke_agent",{usage}"#))),
        "bad_value: a span of invoke_agent repeats the usage of the spans below it; send spans of \
         model requests only"
    );
    assert_eq!(
        refused(&span(r#""gen_ai.operation.name":"chat""#)),
        "missing_field: the span has no gen_ai.usage.input_tokens and gen_ai.usage.output_tokens"
    );
    assert_eq!(
        refused(&span(r#""gen_ai.usage.input_tokens":10.0"#)),
        "bad_value: gen_ai.usage.input_tokens must be a whole number such as 374, not 10.0"
    );
    assert_eq!(
        refused(&span(r#""gen_ai.usage.input_tokens":"10""#)),
        "bad_value: gen_ai.usage.input_tokens must be a whole number such as 374, not \"10\""
    );
}

#[test]
fn span_attributes_may_stand_at_the_top() {
    let line = r#"{"id":"1","time":"2026-01-02T03:04:05Z","org":"acme","user":"u","gen_ai.system":"p","gen_ai.request.model":"m","gen_ai.usage.input_tokens":4,"gen_ai.usage.output_tokens":0}"#;
    assert_eq!(tokens(line), [4, 0, 0, 0, 0, 0]);
}

#[test]
fn otlp_attributes_are_unique_and_typed() {
    let line = |list: &str| {
        format!(
            r#"{{"id":"1","time":"2026-01-02T03:04:05Z","org":"acme","user":"u","attributes":[{{"key":"gen_ai.system","value":{{"stringValue":"p"}}}},{{"key":"gen_ai.request.model","value":{{"stringValue":"m"}}}},{list}]}}"#
        )
    };
    let count = r#"{"key":"gen_ai.usage.input_tokens","value":{"intValue":"7"}}"#;
    assert_eq!(tokens(&line(count)), [7, 0, 0, 0, 0, 0]);
    assert_eq!(
        refused(&line(&format!("{count},{count}"))),
        "malformed: attribute \"gen_ai.usage.input_tokens\" is given twice"
    );
    assert_eq!(
        refused(&line(&count.replace("\"intValue\":\"7\"", "\"doubleValue\":7.0"))),
        "bad_value: gen_ai.usage.input_tokens must be a whole number such as 374, not 7.0"
    );
    assert_eq!(
        refused(&line(&count.replace("\"7\"", "\"-7\""))),
        "bad_value: gen_ai.usage.input_tokens must be a whole number such as 374, not \"-7\""
    );
}

#[test]
fn attributes_of_other_kinds_are_no_span() {
    let line = r#"{"id":"1","time":"2026-01-02T03:04:05Z","org":"acme","user":"u","provider":"p","model":"m","input_tokens":4,"attributes":["x",1]}"#;
    assert_eq!(tokens(line), [4, 0, 0, 0, 0, 0]);
}

fn litellm(members: &str) -> String {
    format!(
        r#"{{"id":"1","call_type":"completion","custom_llm_provider":"openai","model":"openai/gpt-4o","prompt_tokens":20,"completion_tokens":10,"metadata":{{"user_api_key_org_id":"acme","user_api_key_team_id":"team","user_api_key_user_id":"u"}},{members}}}"#
    )
}

#[test]
fn litellm_times_pass_through_no_float() {
    let time = |text: &str| taken(&litellm(&format!("\"startTime\":{text}"))).time.0;
    assert_eq!(time("1767323045"), 1_767_323_045_000_000);
    assert_eq!(time("1767323045.1"), 1_767_323_045_100_000);
    assert_eq!(time("1767323045.123456789"), 1_767_323_045_123_456);
    assert_eq!(time("\"2026-01-02T03:04:05Z\""), 1_767_323_045_000_000);
    for wrong in ["1.767e9", "-1", "true"] {
        assert_eq!(
            refused(&litellm(&format!("\"startTime\":{wrong}"))),
            format!(
                "bad_value: startTime must be seconds since 1970 such as 1735787045.123456, not \
                 {wrong}"
            )
        );
    }
}

#[test]
fn litellm_uses_tokens_not_its_own_cost() {
    let line = litellm("\"startTime\":1767323045,\"response_cost\":0.5");
    let event = taken(&line);
    assert_eq!(event.explicit, None);
    assert_eq!((&*event.org, &*event.user, &*event.model), ("acme", "u", "gpt-4o"));
    assert_eq!(tokens(&line), [20, 0, 0, 0, 10, 0]);
    let kept = r#""startTime":1767323045,"response":{"usage":{"prompt_tokens":20,"completion_tokens":10,"prompt_tokens_details":{"cached_tokens":15}}}"#;
    assert_eq!(tokens(&litellm(kept)), [5, 15, 0, 0, 10, 0]);
}

/// An event finds its price only if the decoders and the price book name providers alike.
#[test]
fn spellings_of_a_provider_are_the_price_books() {
    let span = |attribute: &str, provider: &str| {
        let line = format!(
            r#"{{"id":"1","time":"2026-01-02T03:04:05Z","attributes":{{"{attribute}":"{provider}","gen_ai.response.model":"m","gen_ai.usage.input_tokens":1,"org":"acme","user":"u"}}}}"#
        );
        taken(&line).provider.to_string()
    };
    for (spelling, ours) in [
        ("gcp.gemini", "google"),
        ("gcp.vertex_ai", "vertex_ai"),
        ("aws.bedrock", "bedrock"),
        ("azure.ai.openai", "azure"),
        ("x_ai", "xai"),
        ("mistral_ai", "mistral"),
        ("openai", "openai"),
        ("our-own-gpu", "our-own-gpu"),
    ] {
        assert_eq!(span("gen_ai.provider.name", spelling), ours);
        assert_eq!(span("gen_ai.system", spelling), ours);
    }
    let payload = |provider: &str, model: &str| {
        let line = litellm("\"startTime\":1767323045")
            .replace("\"openai\"", &format!("{provider:?}"))
            .replace("openai/gpt-4o", model);
        let event = taken(&line);
        (event.provider.to_string(), event.model.to_string())
    };
    for (provider, model, ours) in [
        ("gemini", "gemini/gemini-2.5-pro", ("google", "gemini-2.5-pro")),
        ("vertex_ai-language-models", "gemini-2.5-pro", ("vertex_ai", "gemini-2.5-pro")),
        ("bedrock_converse", "bedrock/claude", ("bedrock", "claude")),
        ("openrouter", "openai/gpt-4o", ("openrouter", "openai/gpt-4o")),
        ("groq", "groq/", ("groq", "groq/")),
    ] {
        assert_eq!(payload(provider, model), (ours.0.to_owned(), ours.1.to_owned()));
    }
}
