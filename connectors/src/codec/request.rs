//! Bodies of requests, cut into lines of one JSON object each.

use std::borrow::Cow;

use meterr_operators::event::{Reason, Rejection, excerpt};
use serde_json::value::RawValue;

use super::MESSAGE_LEN_MAX;
use super::json::{bad_value, elements, malformed};

/// Lines of a request: number (from 1) and bytes, copied only where they had to be put together.
pub type RequestLines<'a> = Vec<(u32, Cow<'a, [u8]>)>;

/// How a body is put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    /// One object a line.
    Lines,
    /// One object, on however many lines.
    Single,
    /// An array of objects.
    Array,
}

/// Cuts the body of a request into lines, one event each, with the line it stands on (from 1; in an
/// array the number of the element). Lines are not decoded yet; a body of several lines that are no
/// JSON is cut all the same, as one bad line spoils only itself. Blank lines are left out. What is
/// returned holds no newline: an object printed over several lines is compacted.
///
/// `content_type` may be absent or general (`application/json`): the first bytes tell then.
///
/// # Errors
/// When nothing of the body can be taken: `too_large`, `malformed` (an array or a single object that
/// does not parse), `bad_value` (a content type that is not read).
pub fn split_request<'a>(
    content_type: Option<&str>,
    body: &'a [u8],
) -> Result<RequestLines<'a>, Rejection> {
    if body.len() > MESSAGE_LEN_MAX {
        return Err(Rejection::new(
            Reason::TooLarge,
            format!("the body has {} bytes; at most {MESSAGE_LEN_MAX} are taken", body.len()),
        ));
    }
    match form(content_type, body)? {
        Form::Lines => Ok(raw_lines(body).map(|(n, line)| (n, Cow::Borrowed(line))).collect()),
        Form::Single if body.trim_ascii().is_empty() => Ok(Vec::new()),
        Form::Single => {
            let value: &RawValue = serde_json::from_slice(body)
                .map_err(|error| malformed(format!("not valid JSON: {error}")))?;
            Ok(vec![(1, one_line(value.get().as_bytes()))])
        }
        Form::Array => {
            let text = std::str::from_utf8(body).map_err(|error| {
                malformed(format!("not valid UTF-8 at byte {}", error.valid_up_to()))
            })?;
            let events = elements(text)?;
            Ok((1..).zip(events).map(|(n, value)| (n, one_line(value.raw().as_bytes()))).collect())
        }
    }
}

/// The form of a body.
fn form(content_type: Option<&str>, body: &[u8]) -> Result<Form, Rejection> {
    let media = content_type.unwrap_or_default();
    let media = media.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let array = body.trim_ascii_start().starts_with(b"[");
    Ok(match media.as_str() {
        "application/x-ndjson"
        | "application/ndjson"
        | "application/jsonl"
        | "application/jsonlines"
        | "application/x-jsonlines" => Form::Lines,
        "application/cloudevents-batch+json" => Form::Array,
        "application/cloudevents+json" => Form::Single,
        // What curl and others say when nobody told them.
        ""
        | "application/json"
        | "text/json"
        | "text/plain"
        | "application/octet-stream"
        | "application/x-www-form-urlencoded" => {
            if array {
                Form::Array
            } else if one_object(body) {
                Form::Single
            } else {
                Form::Lines
            }
        }
        _ => {
            return Err(bad_value(format!(
                "content type {:?} is not read; send application/x-ndjson, application/json, \
                 application/cloudevents+json or application/cloudevents-batch+json",
                excerpt(&media)
            )));
        }
    })
}

/// Whether a body that is no array is one object rather than lines. It is when its first value is
/// all there is; where that does not parse, when its first line does not end like an object.
fn one_object(body: &[u8]) -> bool {
    let Some((_, line)) = raw_lines(body).next() else { return false };
    if line.trim_ascii_end().ends_with(b"}") {
        let mut values = serde_json::Deserializer::from_slice(body).into_iter::<&RawValue>();
        let parsed = matches!(values.next(), Some(Ok(_)));
        parsed && body[values.byte_offset()..].trim_ascii().is_empty()
    } else {
        line.trim_ascii_start().starts_with(b"{")
    }
}

/// One valid value as one line.
fn one_line(value: &[u8]) -> Cow<'_, [u8]> {
    if value.iter().any(|b| matches!(b, b'\n' | b'\r')) {
        Cow::Owned(compact(value))
    } else {
        Cow::Borrowed(value)
    }
}

/// Leaves out the white space between the tokens of a JSON text.
pub(super) fn compact(json: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(json.len());
    let (mut quoted, mut escaped) = (false, false);
    for &byte in json {
        if !quoted && matches!(byte, b' ' | b'\t' | b'\n' | b'\r') {
            continue;
        }
        if byte == b'"' && !escaped {
            quoted = !quoted;
        }
        escaped = quoted && byte == b'\\' && !escaped;
        out.push(byte);
    }
    out
}

/// The lines of a text that are not blank, numbered from 1, without their ends (`\n` or `\r\n`).
pub(super) fn raw_lines(payload: &[u8]) -> RawLines<'_> {
    RawLines { rest: payload, line: 0 }
}

/// See [`raw_lines`].
#[derive(Debug, Clone)]
pub(super) struct RawLines<'a> {
    rest: &'a [u8],
    line: u32,
}

impl<'a> Iterator for RawLines<'a> {
    type Item = (u32, &'a [u8]);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        while !self.rest.is_empty() {
            let (line, rest) = match memchr::memchr(b'\n', self.rest) {
                Some(end) => (&self.rest[..end], &self.rest[end + 1..]),
                None => (self.rest, &self.rest[self.rest.len()..]),
            };
            self.rest = rest;
            self.line = self.line.saturating_add(1);
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if !line.trim_ascii().is_empty() {
                return Some((self.line, line));
            }
        }
        None
    }
}
