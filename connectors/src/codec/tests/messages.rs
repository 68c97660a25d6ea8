//! Messages, payloads and request bodies.

use std::io::Write;

use meterr_operators::event::Reason;

use super::native_with;
use crate::codec::{LINE_LEN_MAX, MESSAGE_LEN_MAX, decode_lines, decode_message, split_request};
use crate::log::Message;

fn line(id: &str) -> String {
    native_with(&format!("\"id\":\"{id}\""))
}

fn message(headers: &[(&str, &str)], payload: impl Into<Vec<u8>>) -> Message {
    let mut message = Message::new("usage.0.acme", payload.into());
    message.headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
    message
}

/// Line numbers with ids, or with `reason: detail`.
fn seen(message: &Message) -> Vec<(u32, String)> {
    let decoded = decode_message(message);
    let seen = decoded.lines().map(|(number, raw, event)| {
        assert_eq!(decoded.line(number), Some(raw));
        (number, event.map_or_else(|rejection| rejection.to_string(), |event| event.id.to_string()))
    });
    seen.collect()
}

fn ids(expected: &[(u32, &str)]) -> Vec<(u32, String)> {
    expected.iter().map(|(n, id)| (*n, (*id).to_owned())).collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

#[test]
fn one_bad_line_spoils_only_itself() {
    let long = "x".repeat(LINE_LEN_MAX + 1);
    let payload = format!("{}\r\n\n \t\nnonsense\n{long}\n{}", line("a"), line("b"));
    let found: Vec<(u32, Result<String, Reason>)> = decode_lines(payload.as_bytes())
        .map(|(n, _, event)| (n, event.map(|e| e.id.to_string()).map_err(|r| r.reason)))
        .collect();
    assert_eq!(
        found,
        [
            (1, Ok("a".to_owned())),
            (4, Err(Reason::Malformed)),
            (5, Err(Reason::TooLarge)),
            (6, Ok("b".to_owned())),
        ]
    );
    let raw: Vec<&[u8]> = decode_lines(b"x\r\n\r\ny").map(|(_, raw, _)| raw).collect();
    assert_eq!(raw, [b"x", b"y"]);
    assert_eq!(decode_lines(b"").count(), 0);
}

#[test]
fn compressed_messages_are_the_same_message() {
    let payload = format!("{}\n{}\n", line("a"), line("b"));
    let expected = ids(&[(1, "a"), (2, "b")]);
    assert_eq!(seen(&message(&[], payload.as_bytes())), expected);
    let zipped = gzip(payload.as_bytes());
    assert_eq!(seen(&message(&[("Content-Encoding", "gzip")], zipped.clone())), expected);
    let packed = zstd::encode_all(payload.as_bytes(), 1).unwrap();
    assert_eq!(seen(&message(&[("content-encoding", "zstd")], packed)), expected);

    let damaged = seen(&message(&[("content-encoding", "gzip")], &zipped[..zipped.len() / 2]));
    assert!(damaged[0].1.starts_with("malformed: damaged gzip data: "), "{damaged:?}");
    let unknown = seen(&message(&[("content-encoding", "br")], payload.as_bytes()));
    let detail = "bad_value: content-encoding \"br\" is not read; send gzip, zstd or none";
    assert_eq!(unknown, ids(&[(1, detail)]));
}

#[test]
fn decompression_is_bounded() {
    let bomb = vec![b'\n'; MESSAGE_LEN_MAX + 1];
    let detail = "too_large: the message decompresses to more than 16777216 bytes";
    let zipped = gzip(&bomb);
    assert_eq!(seen(&message(&[("content-encoding", "gzip")], zipped)), ids(&[(1, detail)]));
    let packed = zstd::encode_all(&bomb[..], 1).unwrap();
    assert_eq!(seen(&message(&[("content-encoding", "zstd")], packed)), ids(&[(1, detail)]));
    let detail = "too_large: the message has 16777217 bytes; at most 16777216 are taken";
    assert_eq!(seen(&message(&[], bomb.clone())), ids(&[(1, detail)]));
    assert_eq!(seen(&message(&[], &bomb[1..])), ids(&[]));
}

#[test]
fn cloud_events_in_binary_mode() {
    let headers = [
        ("ce-specversion", "1.0"),
        ("ce-id", "ce%2D1 %E2%82%AC %"),
        ("Ce-Source", "/x"),
        ("ce-type", "t"),
        ("ce-subject", "u"),
        ("ce-org", "acme"),
        ("ce-time", "2026-01-02T03:04:05Z"),
        ("content-type", "application/json"),
    ];
    let data = "{\n \"provider\":\"openai\",\n \"model\":\"gpt-4o\",\n \"input_tokens\":1\n}";
    let binary = message(&headers, data);
    assert_eq!(seen(&binary), ids(&[(1, "ce-1 € %")]));
    // The dead letter of such an event shows all of it.
    let broken = message(&headers, "{\"input_tokens\":\n-1}");
    let decoded = decode_message(&broken);
    let raw = String::from_utf8(decoded.line(1).unwrap().to_vec()).unwrap();
    assert!(raw.starts_with("{\"specversion\":\"1.0\",\"id\":\"ce-1 € %\","), "{raw}");
    assert!(raw.ends_with(",\"data\":{\"input_tokens\":-1}}"), "{raw}");
    // A payload cannot add attributes to its envelope.
    let injected = seen(&message(&headers, "{\"cost\":1},\"user\":\"other\""));
    assert!(injected[0].1.starts_with("malformed: the payload is not valid JSON"), "{injected:?}");
}

#[test]
fn cloud_events_in_a_batch() {
    let event = |id: &str| {
        format!(
            "{{\"specversion\":\"1.0\",\"id\":\"{id}\",\"org\":\"acme\",\"subject\":\"u\",\n\
             \"time\":\"2026-01-02T03:04:05Z\",\"data\":{{\"cost\":1}}}}"
        )
    };
    let batch = format!("[{},\n{}]", event("a"), event("b"));
    let headers = [("content-type", "application/cloudevents-batch+json; charset=utf-8")];
    assert_eq!(seen(&message(&headers, batch)), ids(&[(1, "a"), (2, "b")]));
    let headers = [("content-type", "application/cloudevents+json")];
    assert_eq!(seen(&message(&headers, event("a"))), ids(&[(1, "a")]));
}

/// The lines of a body as text.
fn split(content_type: Option<&str>, body: &str) -> Vec<(u32, String)> {
    let lines = split_request(content_type, body.as_bytes()).unwrap();
    lines.into_iter().map(|(n, line)| (n, String::from_utf8(line.into_owned()).unwrap())).collect()
}

#[test]
fn bodies_are_cut_into_lines() {
    for content_type in [None, Some("application/json"), Some("text/plain;charset=UTF-8")] {
        assert_eq!(split(content_type, "{\"a\":1}"), ids(&[(1, "{\"a\":1}")]));
        assert_eq!(
            split(content_type, "\n{\"a\":1}\r\n\n{\"b\":2}\n"),
            ids(&[(2, "{\"a\":1}"), (4, "{\"b\":2}")])
        );
        assert_eq!(
            split(content_type, "{\n  \"a\": \"x \\\" y\",\n  \"b\": [1, 2]\n}\n"),
            ids(&[(1, "{\"a\":\"x \\\" y\",\"b\":[1,2]}")])
        );
        assert_eq!(
            split(content_type, " [ {\"a\": 1},\n {\n\"b\":2}, 3 ]"),
            ids(&[(1, "{\"a\": 1}"), (2, "{\"b\":2}"), (3, "3")])
        );
        // Lines of which the first is bad are still lines.
        assert_eq!(
            split(content_type, "{\"a\":}\n{\"b\":2}"),
            ids(&[(1, "{\"a\":}"), (2, "{\"b\":2}")])
        );
        assert_eq!(split(content_type, ""), ids(&[]));
        assert_eq!(split(content_type, "[]"), ids(&[]));
    }
    assert_eq!(split(Some("application/x-ndjson"), "[1]\n{}"), ids(&[(1, "[1]"), (2, "{}")]));
    assert_eq!(split(Some("application/cloudevents+json"), "\n"), ids(&[]));
}

#[test]
fn bodies_of_which_nothing_can_be_taken() {
    let refused = |content_type: Option<&str>, body: &[u8]| {
        split_request(content_type, body).unwrap_err().to_string()
    };
    assert_eq!(
        refused(None, b"[{}, {]"),
        "malformed: not a valid JSON array: key must be a string at column 7"
    );
    assert_eq!(
        refused(None, b"{\n\"a\": oops\n}"),
        "malformed: not valid JSON: expected value at line 2 column 6"
    );
    assert_eq!(refused(None, b"[\"\xff\"]"), "malformed: not valid UTF-8 at byte 2");
    assert_eq!(
        refused(Some("application/xml"), b"{}"),
        "bad_value: content type \"application/xml\" is not read; send application/x-ndjson, \
         application/json, application/cloudevents+json or application/cloudevents-batch+json"
    );
    assert_eq!(
        refused(None, &vec![b' '; MESSAGE_LEN_MAX + 1]),
        "too_large: the body has 16777217 bytes; at most 16777216 are taken"
    );
}
