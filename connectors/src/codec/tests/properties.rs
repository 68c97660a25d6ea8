//! Properties over random events, damaged lines and arbitrary bytes.

use std::borrow::Cow;

use meterr_operators::event::{ALL_TIERS, COST_MAX, Event, EventFields, Meter, Rejection, Tier};
use meterr_operators::money::Atto;
use meterr_operators::time::Time;
use proptest::collection::{btree_map, vec};
use proptest::option;
use proptest::prelude::*;
use proptest::sample::{Index, select};

use crate::codec::{
    decode_line, decode_lines, decode_message, encode_native, fast, general, raw_text,
    split_request,
};
use crate::log::Message;

/// Lines of every format, to be damaged.
const SAMPLES: [&str; 14] = [
    include_str!("../golden/native.json"),
    include_str!("../golden/native_all_fields.json"),
    include_str!("../golden/native_void.json"),
    include_str!("../golden/native_cost.json"),
    include_str!("../golden/openai_chat.json"),
    include_str!("../golden/openai_responses.json"),
    include_str!("../golden/anthropic.json"),
    include_str!("../golden/cloudevent_native.json"),
    include_str!("../golden/cloudevent_openai_response.json"),
    include_str!("../golden/cloudevent_anthropic_response.json"),
    include_str!("../golden/otel_flat.json"),
    include_str!("../golden/otel_otlp.json"),
    include_str!("../golden/litellm.json"),
    include_str!("../golden/litellm_cache_hit.json"),
];

/// One change of some bytes.
#[derive(Debug, Clone)]
enum Damage {
    Set(Index, u8),
    Insert(Index, Vec<u8>),
    Remove(Index, u8),
    Repeat(Index, u8),
}

fn damage() -> impl Strategy<Value = Damage> {
    // Tokens of JSON and of our formats do more harm than random bytes.
    let pieces: Vec<&[u8]> = vec![
        b"\"",
        b"\\",
        b"{",
        b"}",
        b"[",
        b"]",
        b",",
        b":",
        b" ",
        b"\n",
        b"\0",
        b"\xff",
        b"0",
        b"9",
        b"-",
        b".",
        b"e9",
        b"null",
        b"true",
        b"\\u0000",
        b"\\ud800",
        "ä".as_bytes(),
        b"{\"\":",
        b"\"id\":\"x\",",
        b"\"usage\":{},",
        b"\"attributes\":[],",
        b"\"specversion\":\"1.0\",",
        b"\"prompt_tokens\":1,",
        b"\"cost\":1e400,",
        b"99999999999999999999",
    ];
    let piece = select(pieces).prop_map(<[u8]>::to_vec);
    prop_oneof![
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Damage::Set(at, byte)),
        (any::<Index>(), piece).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        (any::<Index>(), 1..20u8).prop_map(|(at, len)| Damage::Remove(at, len)),
        (any::<Index>(), 1..40u8).prop_map(|(at, len)| Damage::Repeat(at, len)),
    ]
}

fn damaged(text: &[u8], damages: &[Damage]) -> Vec<u8> {
    let mut bytes = text.to_vec();
    for damage in damages {
        if bytes.is_empty() {
            break;
        }
        let range = |at: &Index, len: u8, total: usize| {
            let at = at.index(total);
            at..(at + usize::from(len)).min(total)
        };
        match damage {
            Damage::Set(at, byte) => {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            Damage::Insert(at, piece) => {
                let at = at.index(bytes.len());
                bytes.splice(at..at, piece.iter().copied());
            }
            Damage::Remove(at, len) => {
                bytes.drain(range(at, *len, bytes.len()));
            }
            Damage::Repeat(at, len) => {
                let range = range(at, *len, bytes.len());
                let piece = bytes[range.clone()].to_vec();
                bytes.splice(range.start..range.start, piece);
            }
        }
    }
    bytes
}

/// A name, mostly plain.
fn name() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[a-z0-9_.-]{1,20}",
        1 => "[a-zäß€😀 \"\\\\/{}:,]{1,12}",
    ]
}

/// Members of a native object, in random order, with odd values among them.
fn members() -> impl Strategy<Value = Vec<(String, String)>> {
    let text = |name: &'static str, value: BoxedStrategy<String>| {
        value.prop_map(move |v| (name.to_owned(), serde_json::to_string(&v).unwrap())).boxed()
    };
    let time = select(vec![
        "2026-01-02T03:04:05.123Z",
        "2026-01-02T03:04:05+01:00",
        "1969-12-31T23:59:59Z",
        "soon",
    ])
    .prop_map(str::to_owned)
    .boxed();
    let counts = select(vec![
        "input_tokens",
        "cached_input_tokens",
        "cache_write_tokens",
        "cache_write_1h_tokens",
        "output_tokens",
        "reasoning_tokens",
        "audio_input_tokens",
        "audio_output_tokens",
        "images",
        "searches",
        "revision",
    ]);
    let number = prop_oneof![
        8 => (0..3_000u32).prop_map(|n| n.to_string()),
        1 => select(vec!["1000000000", "1000000001", "4294967295", "007", "1.0", "-1", "null", "\"5\""])
            .prop_map(str::to_owned),
    ];
    let odd = select(vec![
        ("tags", r#"{"a":"b"}"#),
        ("cost", "0.5"),
        ("costs", r#"{"ai":1}"#),
        ("void", "false"),
        ("void", "true"),
        ("unknown", "[1,{}]"),
        ("service_tier", "\"batch\""),
        ("service_tier", "\"\""),
        ("usage", r#"{"prompt_tokens":1}"#),
        ("feature", "null"),
        ("original_time", "\"2026-01-02T03:04:05Z\""),
        ("attributes", "{}"),
    ])
    .prop_map(|(name, value)| (name.to_owned(), value.to_owned()));
    let required = (
        text("id", name().boxed()),
        text("time", prop_oneof![9 => Just("2026-01-02T03:04:05Z".to_owned()), 1 => time].boxed()),
        text("org", "[a-zA-Z0-9_-]{1,12}".boxed()),
        text("user", name().boxed()),
        text("provider", name().boxed()),
        text("model", name().boxed()),
    )
        .prop_map(|(a, b, c, d, e, f)| vec![a, b, c, d, e, f]);
    let more = vec(
        prop_oneof![
            6 => (counts, number).prop_map(|(name, value)| (name.to_owned(), value)),
            1 => odd,
            1 => text("feature", name().boxed()),
        ],
        0..8,
    );
    let input = (20_000..90_000u32).prop_map(|n| ("input_tokens".to_owned(), n.to_string()));
    let output = (20_000..90_000u32).prop_map(|n| ("output_tokens".to_owned(), n.to_string()));
    (required, more, input, output)
        .prop_map(|(mut all, more, input, output)| {
            all.push(input);
            all.push(output);
            for (name, value) in more {
                // Keys twice are what damage makes; here they would leave little else to see.
                if !all.iter().any(|(known, _)| *known == name) {
                    all.push((name, value));
                }
            }
            all
        })
        .prop_shuffle()
}

fn rendered(members: &[(String, String)], blank: &str) -> String {
    let members: Vec<String> =
        members.iter().map(|(name, value)| format!("\"{name}\":{blank}{value}")).collect();
    format!("{blank}{{{}{blank}}}{blank}", members.join(&format!(",{blank}")))
}

/// What the fast path takes, the general path takes with the same result.
fn compare(line: &str) -> Result<bool, TestCaseError> {
    let Some(fields) = fast::scan(line) else { return Ok(false) };
    prop_assert_eq!(Event::new(fields), general::decode(line), "{}", line);
    Ok(true)
}

#[test]
fn the_fast_path_is_the_general_path() {
    // Counted, since a fast path that takes nothing would pass as well.
    let (fast, all) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    let mut runner = proptest::test_runner::TestRunner::default();
    runner
        .run(&(members(), select(vec!["", " ", "  ", "\t"])), |(members, blank)| {
            all.set(all.get() + 1);
            fast.set(fast.get() + u32::from(compare(&rendered(&members, blank))?));
            Ok(())
        })
        .unwrap();
    assert!(fast.get() > all.get() / 10, "{} of {} took the fast path", fast.get(), all.get());
}

fn fields() -> impl Strategy<Value = EventFields<'static>> {
    let time = (0..Time::MAX.0).prop_map(Time);
    let costs = prop_oneof![Just(0), 0..=COST_MAX.get()].prop_map(Atto::new);
    let costs = [costs.clone(), costs.clone(), costs.clone(), costs];
    let own = |text: String| -> Cow<'static, str> { Cow::Owned(text) };
    (
        (name(), time.clone(), "[a-zA-Z0-9_-]{1,20}", name(), name(), name()),
        (option::of(name()), proptest::array::uniform10(0..90_000_000u32)),
        (select(ALL_TIERS.to_vec()), option::of(costs), 0..3u32, any::<bool>()),
        (option::of(time), btree_map(name(), option::of(name()), 0..4)),
    )
        .prop_map(move |(names, (feature, meters), (tier, explicit, revision, void), last)| {
            let (id, time, org, user, provider, model) = names;
            EventFields {
                id: own(id),
                time,
                org: own(org),
                user: own(user),
                provider: own(provider),
                model: own(model),
                feature: own(feature.unwrap_or_default()),
                meters,
                tier,
                explicit,
                revision,
                void: void && revision > 0,
                original_time: last.0.filter(|_| revision > 0),
                tags: last
                    .1
                    .into_iter()
                    .map(|(name, value)| (own(name), own(value.unwrap_or_default())))
                    .collect(),
            }
        })
}

/// No detail may grow with what a sender sends.
fn bounded(result: &Result<Event<'_>, Rejection>) -> Result<(), TestCaseError> {
    if let Err(rejection) = result {
        prop_assert!(rejection.detail.len() < 600, "{}", rejection);
        prop_assert!(!rejection.detail.ends_with('.'), "{}", rejection);
    }
    Ok(())
}

/// An event's parts add up to its wholes, and survive the way through our own format.
fn sound(result: &Result<Event<'_>, Rejection>) -> Result<(), TestCaseError> {
    bounded(result)?;
    if let Ok(event) = result {
        let mut native = Vec::new();
        encode_native(event, &mut native);
        let again = decode_line(&native);
        prop_assert_eq!(again.as_ref(), Ok(event));
        prop_assert_eq!(native.iter().filter(|b| **b == b'\n').count(), 1);
    }
    Ok(())
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(fields in fields()) {
        let event = Event::new(fields).unwrap();
        let mut line = Vec::new();
        encode_native(&event, &mut line);
        prop_assert_eq!(decode_line(&line), Ok(event));
    }

    #[test]
    fn damaged_native_lines_give_the_same_on_both_paths(
        members in members(),
        damages in vec(damage(), 1..4),
    ) {
        let bytes = damaged(rendered(&members, "").as_bytes(), &damages);
        if let Ok(line) = std::str::from_utf8(&bytes) {
            compare(line)?;
        }
        sound(&decode_line(&bytes))?;
    }

    #[test]
    fn damaged_lines_of_any_format_do_no_harm(
        sample in select(SAMPLES.to_vec()),
        damages in vec(damage(), 0..6),
    ) {
        let bytes = damaged(sample.as_bytes(), &damages);
        sound(&decode_line(&bytes))?;
        for (number, raw, result) in decode_lines(&bytes) {
            prop_assert!(number >= 1 && !raw.contains(&b'\n'));
            sound(&result)?;
        }
    }

    #[test]
    fn what_is_taken_is_valid_json(sample in select(SAMPLES.to_vec()), damages in vec(damage(), 1..3)) {
        let bytes = damaged(sample.as_bytes(), &damages);
        if decode_line(&bytes).is_ok() {
            let valid = serde_json::from_slice::<serde_json::Value>(&bytes);
            // Members nobody reads may hold a lone surrogate, which is JSON's grammar all the same.
            let surrogate = bytes.windows(3).any(|w| w == b"\\ud");
            prop_assert!(surrogate || valid.is_ok(), "{:?}", valid);
        }
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(bytes in vec(any::<u8>(), 0..300)) {
        bounded(&decode_line(&bytes))?;
        let _ = split_request(None, &bytes);
        let (text, base64, truncated) = raw_text(&bytes);
        prop_assert!(text.is_some() != base64.is_some() && !truncated);
        if let Some(text) = text {
            prop_assert_eq!(text.as_bytes(), &bytes[..]);
        }
    }

    #[test]
    fn arbitrary_messages_do_no_harm(
        bytes in prop_oneof![
            vec(any::<u8>(), 0..200),
            (select(SAMPLES.to_vec()), vec(damage(), 0..3)).prop_map(|(s, d)| damaged(s.as_bytes(), &d)),
            (select(SAMPLES.to_vec()), vec(damage(), 0..3)).prop_map(|(s, d)| {
                damaged(&zstd::encode_all(s.as_bytes(), 1).unwrap(), &d)
            }),
        ],
        headers in vec((
            select(vec!["content-encoding", "content-type", "ce-specversion", "ce-id", "ce-data", "ce-é"]),
            select(vec!["gzip", "zstd", "identity", "1.0", "application/json", "%e2%28%a1", "application/cloudevents-batch+json"]),
        ), 0..4),
    ) {
        let mut message = Message::new("usage.0.acme", bytes);
        message.headers =
            headers.into_iter().map(|(n, v)| (n.to_owned(), v.to_owned())).collect();
        let decoded = decode_message(&message);
        for (number, raw, result) in decoded.lines() {
            prop_assert_eq!(decoded.line(number), Some(raw));
            bounded(&result)?;
        }
    }

    #[test]
    fn a_request_cut_into_lines_has_no_newlines(
        sample in select(SAMPLES.to_vec()),
        damages in vec(damage(), 0..3),
        content_type in option::of(select(vec!["application/json", "application/x-ndjson", "application/cloudevents+json"])),
    ) {
        let bytes = damaged(sample.as_bytes(), &damages);
        for (number, line) in split_request(content_type, &bytes).unwrap_or_default() {
            prop_assert!(number >= 1 && !line.contains(&b'\n') && !line.trim_ascii().is_empty());
        }
    }

    #[test]
    fn native_parts_add_up(counts in proptest::array::uniform5(0..2_000u32)) {
        let [input, cached, write, hour, audio] = counts;
        let line = super::native_with(&format!(
            "\"input_tokens\":{input},\"cached_input_tokens\":{cached},\"cache_write_tokens\":{write},\
             \"cache_write_1h_tokens\":{hour},\"audio_input_tokens\":{audio}"
        ));
        match decode_line(line.as_bytes()) {
            Ok(event) => {
                prop_assert_eq!(event.input_tokens(), u64::from(input));
                prop_assert_eq!(event.meters[Meter::CacheRead as usize], cached);
                prop_assert_eq!(event.tier, Tier::Standard);
            }
            Err(_) => prop_assert!(cached + write + hour + audio > input),
        }
    }
}
