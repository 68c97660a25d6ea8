//! CloudEvents 1.0, structured: an envelope around any of the other formats.
//!
//! `data` goes first: its `id`, `time`, `org`, `user`, … stand where it has them. Else `id` and `time`
//! are the CloudEvent's, `org`, `user`, `provider`, `model` and `feature` its extension attributes,
//! and `subject` is the user. CloudEvents make (`source`, `id`) unique, we (`org`, `id`): sources
//! that number their events alone should put an id of their own into `data`.

use std::borrow::Cow;

use meterr_operators::event::{Event, Reason, Rejection};

use super::json::{Object, bad_value};
use super::native::{Envelope, push_text};
use super::{general, json};

/// Whether this is a CloudEvent.
pub(super) fn recognised(object: &Object<'_>) -> bool {
    object.has("specversion")
}

/// Reads a CloudEvent.
pub(super) fn decode<'a>(object: &Object<'a>) -> Result<Event<'a>, Rejection> {
    if object.text("specversion")?.as_deref() != Some("1.0") {
        let found = object.get("specversion").map(json::Value::shown).unwrap_or_default();
        return Err(bad_value(format!("specversion must be \"1.0\", not {found}")));
    }
    if object.has("data_base64") {
        return Err(bad_value(
            "data_base64 is not read; send the usage as a JSON object in data".to_owned(),
        ));
    }
    let Some(data) = object.get("data") else {
        return Err(Rejection::new(Reason::MissingField, "the CloudEvent has no \"data\""));
    };
    let envelope = Envelope {
        id: object.name("id")?,
        time: object.get("time").map(|value| value.time("time")).transpose()?,
        org: object.name("org")?,
        user: match object.name("user")? {
            Some(user) => Some(user),
            None => object.name("subject")?,
        },
        provider: object.name("provider")?,
        model: object.name("model")?,
        feature: object.name("feature")?,
    };
    let data = data.object("data")?;
    if recognised(&data) {
        return Err(bad_value("the data of a CloudEvent is another CloudEvent".to_owned()));
    }
    general::decode_object(&data, envelope)
}

/// Whether headers are those of a CloudEvent in binary mode.
pub(super) fn binary(headers: &[(String, String)]) -> bool {
    headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("ce-specversion"))
}

/// Brings a CloudEvent in binary mode (attributes in `ce-` headers, data as payload) into structured
/// form on one line, so that there is one reader and a dead letter shows the whole event.
///
/// # Errors
/// When the payload is no JSON.
pub(super) fn structured(
    headers: &[(String, String)],
    payload: &str,
) -> Result<Vec<u8>, Rejection> {
    // Checked by itself: a payload of `{},"org":"x"` must not become a part of the envelope.
    let data: &serde_json::value::RawValue = serde_json::from_str(payload)
        .map_err(|error| json::malformed(format!("the payload is not valid JSON: {error}")))?;
    let mut line = Vec::with_capacity(payload.len() + 256);
    line.push(b'{');
    for (name, value) in headers {
        let Some(attribute) =
            name.get(..3).filter(|p| p.eq_ignore_ascii_case("ce-")).map(|_| &name[3..])
        else {
            continue;
        };
        if attribute.eq_ignore_ascii_case("data") {
            continue;
        }
        push_text(&mut line, &attribute.to_ascii_lowercase());
        line.push(b':');
        push_text(&mut line, &percent_decoded(value));
        line.push(b',');
    }
    line.extend_from_slice(b"\"data\":");
    line.extend_from_slice(&super::request::compact(data.get().as_bytes()));
    line.push(b'}');
    Ok(line)
}

/// A header value of a binding, where `%XX` stands for a byte. What is no such sequence, or would not
/// be UTF-8, stands for itself.
fn percent_decoded(value: &str) -> Cow<'_, str> {
    if !value.contains('%') {
        return Cow::Borrowed(value);
    }
    let digit = |byte: Option<&u8>| byte.and_then(|b| char::from(*b).to_digit(16));
    let bytes = value.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        if byte == b'%'
            && let (Some(high), Some(low)) = (digit(bytes.get(at + 1)), digit(bytes.get(at + 2)))
        {
            decoded.push((high * 16 + low) as u8);
            at += 3;
        } else {
            decoded.push(byte);
            at += 1;
        }
    }
    String::from_utf8(decoded).map_or(Cow::Borrowed(value), Cow::Owned)
}
