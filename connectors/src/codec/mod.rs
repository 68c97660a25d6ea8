//! Bytes to events and back. Wire types of events live here and nowhere else.
//!
//! | file | what |
//! |---|---|
//! | `fast` | hand scanner for plain native lines; leaves everything else to `general` |
//! | `general` | any accepted format, recognised by its members |
//! | `native` | the native format and the envelope of it; writing it |
//! | `provider` | `usage` objects of OpenAI and Anthropic |
//! | `cloudevents`, `otel`, `litellm` | formats of others |
//! | `usage` | wholes and parts to disjoint meters, so that nothing is billed twice |
//! | `message`, `request` | messages of a log and bodies of requests, cut into lines |
//! | `json`, `raw` | JSON objects read lazily; refused bytes as dead letters keep them |
//!
//! Invariants: no bytes make a decoder panic or recurse without bound; memory is bounded by the size
//! of the input (of decompressed messages by [`MESSAGE_LEN_MAX`]); the same bytes give the same
//! result for ever within one decoder version; numbers never pass through a float; the sentence of a
//! refusal is of bounded length.
//!
//! In every format a member that is `null` counts as absent, and a key given twice is refused in each
//! object that is read.

mod cloudevents;
mod fast;
mod general;
mod json;
mod litellm;
mod message;
mod native;
mod otel;
mod provider;
mod raw;
mod request;
#[cfg(test)]
mod tests;
mod usage;

pub use message::{Decoded, Lines, MESSAGE_LEN_MAX, decode_lines, decode_message, decompress};
pub use native::encode_native;
pub use raw::{RAW_LEN_MAX, raw_text};
pub use request::{RequestLines, split_request};

use meterr_operators::event::{Event, Reason, Rejection};

/// Longest line taken: 256 KiB.
pub const LINE_LEN_MAX: usize = 256 * 1024;

/// Decodes one JSON object in any accepted format.
///
/// # Errors
/// Why it is no event, with a sentence for the sender.
pub fn decode_line(line: &[u8]) -> Result<Event<'_>, Rejection> {
    if line.len() > LINE_LEN_MAX {
        return Err(Rejection::new(
            Reason::TooLarge,
            format!("the line has {} bytes; at most {LINE_LEN_MAX} are taken", line.len()),
        ));
    }
    let text = match std::str::from_utf8(line) {
        Ok(text) => text,
        Err(error) => {
            return Err(json::malformed(format!(
                "not valid UTF-8 at byte {}",
                error.valid_up_to()
            )));
        }
    };
    match fast::scan(text) {
        Some(fields) => Event::new(fields),
        None => general::decode(text),
    }
}
