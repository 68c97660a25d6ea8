//! Tests of the decoders: golden examples of every format, each rule beside its valid twin, and
//! properties over random and damaged bytes.

mod formats;
mod messages;
mod native;
mod properties;

use meterr_operators::event::{Event, Reason};

use super::decode_line;

/// An event that must be taken.
pub(super) fn taken(line: &str) -> Event<'_> {
    decode_line(line.as_bytes()).unwrap_or_else(|rejection| panic!("{line}\n{rejection}"))
}

/// The refusal of a line that must not be taken, as `reason: detail`.
pub(super) fn refused(line: &str) -> String {
    match decode_line(line.as_bytes()) {
        Ok(event) => panic!("{line}\nwas taken as {event:?}"),
        Err(rejection) => rejection.to_string(),
    }
}

/// The reason alone.
pub(super) fn reason(line: &[u8]) -> Reason {
    decode_line(line).expect_err("the line must be refused").reason
}

/// A native line with members added or put in the place of others of that name.
pub(super) fn native_with(members: &str) -> String {
    let mut line: serde_json::Map<String, serde_json::Value> = serde_json::from_str(
        r#"{"id":"1","time":"2026-01-02T03:04:05Z","org":"acme","user":"u","provider":"openai",
            "model":"gpt-4o","input_tokens":100,"output_tokens":10}"#,
    )
    .unwrap();
    let more: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&format!("{{{members}}}")).unwrap();
    line.extend(more);
    serde_json::to_string(&line).unwrap()
}
