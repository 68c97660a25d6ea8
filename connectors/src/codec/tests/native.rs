//! The rules of the native format, each beside its valid twin.

use meterr_operators::event::{Meter, Reason};
use meterr_operators::money::Atto;

use super::{native_with, reason, refused, taken};
use crate::codec::{LINE_LEN_MAX, fast, raw_text};

const PLAIN: &str = r#"{"id":"1","time":"2026-01-02T03:04:05.123Z","org":"acme","user":"u","provider":"openai","model":"gpt-4o","input_tokens":374,"cached_input_tokens":120,"output_tokens":44,"reasoning_tokens":4}"#;

#[test]
fn parts_are_taken_out_of_wholes() {
    let event = taken(PLAIN);
    assert_eq!(event.meters[Meter::Input as usize], 254);
    assert_eq!(event.meters[Meter::CacheRead as usize], 120);
    assert_eq!(event.meters[Meter::Output as usize], 40);
    assert_eq!(event.meters[Meter::Reasoning as usize], 4);
    assert_eq!((event.input_tokens(), event.output_tokens()), (374, 44));
}

#[test]
fn plain_lines_take_the_fast_path_and_unusual_ones_do_not() {
    assert!(fast::scan(PLAIN).is_some());
    assert!(fast::scan(&PLAIN.replace(":", " : ").replace("03 : 04 : 05", "03:04:05")).is_some());
    assert!(fast::scan(&PLAIN.replace("acme", "ä")).is_some());
    for (from, to) in [
        ("\"u\"", "\"u\\u0041\""),
        ("\"u\"", "null"),
        ("374", "374.0"),
        ("374", "0374"),
        ("374", "-374"),
        ("374", "3740000000"),
        ("\"user\"", "\"new\""),
        ("\"user\"", "\"org\""),
        (",\"org\"", ",\t\"org\""),
        ("}", ",\"tags\":{}}"),
        ("}", ",}"),
        ("}", "}}"),
    ] {
        let line = PLAIN.replace(from, to);
        assert_ne!(line, PLAIN);
        assert!(fast::scan(&line).is_none(), "{line}");
    }
}

#[test]
fn counts_are_whole_numbers() {
    for (value, detail) in [
        ("374.0", "bad_value: input_tokens must be a whole number such as 374, not 374.0"),
        ("3.74e2", "bad_value: input_tokens must be a whole number such as 374, not 3.74e2"),
        ("\"374\"", "bad_value: input_tokens must be a whole number such as 374, not \"374\""),
        ("-1", "bad_value: input_tokens must be a whole number such as 374, not -1"),
        ("true", "bad_value: input_tokens must be a whole number such as 374, not true"),
        ("[1]", "bad_value: input_tokens must be a whole number such as 374, not [1]"),
        (
            "1000000001",
            "out_of_bounds: input_tokens is 1000000001; one event may carry at most 1000000000",
        ),
    ] {
        assert_eq!(refused(&PLAIN.replace("374", value)), detail);
    }
    let most = PLAIN.replace("374", "1000000000");
    assert_eq!(taken(&most).input_tokens(), 1_000_000_000);
    let huge = refused(&PLAIN.replace("374", &"9".repeat(100_000)));
    assert!(huge.starts_with("out_of_bounds: input_tokens is 99999") && huge.len() < 300, "{huge}");
}

#[test]
fn parts_beyond_their_whole_are_refused() {
    assert_eq!(
        refused(&PLAIN.replace("120", "375")),
        "bad_value: cached, cache-write and audio tokens add up to 375, more than the 374 input \
         tokens they are parts of"
    );
    assert_eq!(
        refused(&PLAIN.replace("\"reasoning_tokens\":4", "\"reasoning_tokens\":45")),
        "bad_value: reasoning and audio tokens add up to 45, more than the 44 output tokens they \
         are parts of"
    );
    taken(
        &PLAIN.replace("120", "374").replace("\"reasoning_tokens\":4", "\"reasoning_tokens\":44"),
    );
}

#[test]
fn required_members_are_named() {
    for name in ["id", "time", "org", "user", "provider", "model"] {
        let line = native_with(&format!("{name:?}:null"));
        assert_eq!(refused(&line), format!("missing_field: {name:?} is required"));
    }
    taken(&native_with("\"feature\":null"));
    assert_eq!(refused(&native_with("\"id\":12")), "bad_value: id must be a string, not 12");
    assert_eq!(
        refused(&native_with("\"time\":\"yesterday\"")),
        "bad_value: time \"yesterday\": not an RFC 3339 time such as 2026-01-02T03:04:05Z"
    );
}

#[test]
fn a_misspelt_count_is_no_zero_spend() {
    let line = native_with("\"input_tokens\":null,\"output_tokens\":null,\"inputTokens\":5");
    assert_eq!(
        refused(&line),
        "missing_field: the event states no usage: give input_tokens and output_tokens, usage, \
         images, searches, cost or costs"
    );
    taken(&native_with("\"input_tokens\":null,\"output_tokens\":0"));
    taken(&native_with("\"input_tokens\":null,\"output_tokens\":null,\"images\":1"));
    taken(&native_with("\"inputTokens\":5"));
}

#[test]
fn costs_are_decimal_text() {
    let cost = |members: &str| {
        let line = native_with(members);
        taken(&line).explicit.unwrap().map(|amount| amount.to_string())
    };
    // As a float this number would be 0.1000000000000000055….
    assert_eq!(cost("\"cost\":0.1"), ["0", "0", "0", "0.1"]);
    assert_eq!(cost("\"cost\":\"0.000000000000000001\""), ["0", "0", "0", "0.000000000000000001"]);
    assert_eq!(cost("\"cost\":1e-3"), ["0", "0", "0", "0.001"]);
    assert_eq!(cost("\"costs\":{\"compute\":1,\"storage\":\"2\"}"), ["1", "2", "0", "0"]);
    assert_eq!(cost("\"cost\":3,\"costs\":{\"compute\":1,\"ai\":2}"), ["1", "0", "0", "2"]);
    taken(&native_with("\"cost\":1,\"provider\":null,\"model\":null"));
    for (members, detail) in [
        (
            "\"cost\":\"a lot\"",
            "bad_value: cost must be a decimal such as \"0.0004125\", not \"a lot\"",
        ),
        ("\"cost\":true", "bad_value: cost must be a decimal such as \"0.0004125\", not true"),
        ("\"cost\":-1", "out_of_bounds: cost is -1 USD; it must be between 0 and 1000000000"),
        (
            "\"cost\":\"1e30\"",
            "out_of_bounds: cost is 1e30 USD; it must be between 0 and 1000000000",
        ),
        ("\"cost\":2,\"costs\":{\"compute\":1}", "bad_value: cost is 2 USD, but costs add up to 1"),
        (
            "\"costs\":{\"gpu\":1}",
            "bad_value: costs names \"gpu\"; the categories are compute, storage, bandwidth, ai",
        ),
        (
            "\"costs\":{}",
            "bad_value: costs names none of its categories compute, storage, bandwidth, ai",
        ),
        // Four of the largest amounts that parse would overflow a sum.
        (
            "\"cost\":1,\"costs\":{\"compute\":\"99999999999999999999\",\"storage\":\"99999999999999999999\",\"bandwidth\":\"99999999999999999999\",\"ai\":\"99999999999999999999\"}",
            "out_of_bounds: ai is 99999999999999999999 USD; it must be between 0 and \
             1000000000",
        ),
    ] {
        assert_eq!(refused(&native_with(members)), detail);
    }
    assert_eq!(taken(&native_with("\"cost\":\"0\"")).explicit, Some([Atto::ZERO; 4]));
}

#[test]
fn revisions_and_voids() {
    let line = native_with("\"revision\":4294967295,\"original_time\":\"2026-01-01T00:00:00Z\"");
    assert_eq!(taken(&line).revision, u32::MAX);
    for (members, detail) in [
        ("\"revision\":1.0", "bad_value: revision must be a whole number such as 1, not 1.0"),
        (
            "\"revision\":4294967296",
            "out_of_bounds: revision is 4294967296; it may be at most 4294967295",
        ),
        ("\"void\":\"true\"", "bad_value: void must be true or false, not \"true\""),
        (
            "\"void\":true",
            "bad_value: a void needs a revision above that of the event it takes back",
        ),
        (
            "\"original_time\":\"2026-01-01T00:00:00Z\"",
            "bad_value: original_time belongs to a revision above 0; this event has revision 0",
        ),
    ] {
        assert_eq!(refused(&native_with(members)), detail);
    }
    let line = r#"{"id":"1","time":"2026-01-02T03:04:05Z","org":"acme","revision":1,"void":true}"#;
    assert!(taken(line).void);
}

#[test]
fn tags_are_a_flat_map() {
    let line = native_with(r#""tags":{"team":"red","env":"prod","none":null,"empty":""}"#);
    let event = taken(&line);
    let tags: Vec<(&str, &str)> = event.tags.iter().map(|(k, v)| (&**k, &**v)).collect();
    assert_eq!(tags, [("empty", ""), ("env", "prod"), ("team", "red")]);
    assert_eq!(
        refused(&native_with(r#""tags":{"team":1}"#)),
        "bad_value: tags.team must be a string, not 1"
    );
    let many: Vec<String> = (0..17).map(|n| format!("\"t{n}\":\"v\"")).collect();
    assert_eq!(
        refused(&native_with(&format!("\"tags\":{{{}}}", many.join(",")))),
        "out_of_bounds: 17 tags; one event may carry at most 16"
    );
    taken(&native_with(&format!("\"tags\":{{{}}}", many[..16].join(","))));
}

#[test]
fn tiers_are_ours() {
    assert_eq!(taken(&native_with("\"service_tier\":\"batch\"")).tier.name(), "batch");
    assert_eq!(
        refused(&native_with("\"service_tier\":\"default\"")),
        "bad_value: service_tier \"default\" is none of standard, batch, flex, priority"
    );
}

#[test]
fn what_is_no_object_is_malformed() {
    for (line, detail) in [
        ("", "malformed: expected a JSON object, found \"\""),
        ("[1]", "malformed: expected a JSON object, found \"[1]\""),
        ("hello", "malformed: expected a JSON object, found \"hello\""),
        ("{", "malformed: not valid JSON: EOF while parsing an object at column 1"),
        ("{\"a\":1,}", "malformed: not valid JSON: trailing comma at column 8"),
        ("{} {}", "malformed: not valid JSON: trailing characters at column 4"),
        ("{\"a\":01}", "malformed: not valid JSON: invalid number at column 7"),
    ] {
        assert_eq!(refused(line), detail);
    }
    assert_eq!(reason(b"{\"id\":\"\xff\"}"), Reason::Malformed);
    assert_eq!(
        refused(&PLAIN.replace("\"u\"", "\"\\ud800\"")),
        "malformed: user is no valid JSON string: unexpected end of hex escape at column 8"
    );
    taken(&PLAIN.replace("\"u\"", "\"\\ud83d\\ude00\""));
}

#[test]
fn a_key_given_twice_is_malformed() {
    let twice = PLAIN.replace("\"output_tokens\":44", "\"output_tokens\":44,\"output_tokens\":44");
    assert_eq!(refused(&twice), "malformed: the key \"output_tokens\" is given twice");
    // Also when it is written in another way, or is a member nobody knows.
    let escaped =
        PLAIN.replace("\"output_tokens\":44", "\"output_tokens\":44,\"output\\u005ftokens\":44");
    assert_eq!(refused(&escaped), "malformed: the key \"output_tokens\" is given twice");
    let unknown = PLAIN.replace("\"output_tokens\":44", "\"x\":1,\"x\":null");
    assert_eq!(refused(&unknown), "malformed: the key \"x\" is given twice");
    // And in objects large enough to be sorted.
    let many: Vec<String> = (0..40_000).map(|n| format!("\"{n}\":0")).collect();
    let many = format!("{{{},\"777\":1}}", &many[..20_000].join(","));
    assert_eq!(refused(&many), "malformed: the key \"777\" is given twice");
}

#[test]
fn depth_does_not_overflow_the_stack() {
    for deep in ["[".repeat(200_000), "{\"a\":".repeat(40_000)] {
        assert_eq!(reason(format!("{{\"x\":{deep}").as_bytes()), Reason::Malformed);
    }
    let nested = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    taken(&PLAIN.replace("{\"id\"", &format!("{{\"x\":{nested},\"id\"")));
}

#[test]
fn a_line_is_bounded() {
    let padding = LINE_LEN_MAX - PLAIN.len();
    taken(&format!("{PLAIN}{}", " ".repeat(padding)));
    assert_eq!(
        refused(&format!("{PLAIN}{}", " ".repeat(padding + 1))),
        "too_large: the line has 262145 bytes; at most 262144 are taken"
    );
}

#[test]
fn dead_letters_keep_text_or_base64() {
    assert_eq!(raw_text(b"{x}"), (Some("{x}".to_owned()), None, false));
    assert_eq!(raw_text(b"\xff\x00"), (None, Some("/wA=".to_owned()), false));
    // A character cut in two at the limit is left out; the rest is still text.
    let long = "ä".repeat(40_000);
    let (text, base64, truncated) = raw_text(&long.as_bytes()[1..]);
    assert_eq!((text, truncated), (None, true));
    assert_eq!(base64.unwrap().len(), (64 * 1024_usize).div_ceil(3) * 4);
    let shifted = format!("a{long}");
    let (text, base64, truncated) = raw_text(shifted.as_bytes());
    assert_eq!((text.unwrap().len(), base64, truncated), (64 * 1024 - 1, None, true));
}
