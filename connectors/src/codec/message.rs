//! Messages of a log: headers undone, then lines.
//!
//! What a message decodes to depends on its bytes alone, so that a line found by position and number
//! is the same line at every reading: replay, and revisions that read the replaced content back,
//! rely on it.
//!
//! Limits: [`MESSAGE_LEN_MAX`] bytes of payload, before and after decompression; a zstd window of the
//! same size. A message beyond them is refused as a whole, as line 1.

use std::io::Read;

use bytes::Bytes;
use meterr_operators::event::{Event, Reason, Rejection, excerpt};

use super::json::{bad_value, malformed};
use super::request::{RawLines, raw_lines, split_request};
use super::{cloudevents, decode_line};
use crate::log::Message;

/// Most bytes of a message's payload, before and after decompression: 16 MiB.
pub const MESSAGE_LEN_MAX: usize = 16 * 1024 * 1024;

/// Largest zstd window, as a power of two; `MESSAGE_LEN_MAX` in bytes.
const ZSTD_WINDOW_LOG_MAX: u32 = MESSAGE_LEN_MAX.ilog2();

/// A message whose compression and envelope are undone: NDJSON, or the reason why it is none.
#[derive(Debug, Clone)]
pub struct Decoded {
    payload: Bytes,
    refused: Option<Rejection>,
}

impl Decoded {
    /// The events of the message, or its one refusal.
    pub fn lines(&self) -> Lines<'_> {
        match &self.refused {
            None => decode_lines(&self.payload),
            Some(rejection) => {
                Lines { lines: raw_lines(&[]), refused: Some((&self.payload, rejection)) }
            }
        }
    }

    /// The bytes of one line (from 1), as [`Decoded::lines`] shows them.
    pub fn line(&self, number: u32) -> Option<&[u8]> {
        if self.refused.is_some() {
            return (number == 1).then_some(&self.payload[..]);
        }
        raw_lines(&self.payload).find(|(n, _)| *n == number).map(|(_, line)| line)
    }
}

/// Undoes compression (`content-encoding: gzip` or `zstd`), CloudEvents in binary mode (`ce-`
/// headers), and the content types of [`super::split_request`]. A message without such headers is
/// NDJSON and is not copied.
pub fn decode_message(message: &Message) -> Decoded {
    match normalised(message) {
        Ok(payload) => Decoded { payload, refused: None },
        Err(rejection) => Decoded { payload: message.payload.clone(), refused: Some(rejection) },
    }
}

fn normalised(message: &Message) -> Result<Bytes, Rejection> {
    if message.payload.len() > MESSAGE_LEN_MAX {
        return Err(Rejection::new(
            Reason::TooLarge,
            format!(
                "the message has {} bytes; at most {MESSAGE_LEN_MAX} are taken",
                message.payload.len()
            ),
        ));
    }
    if message.headers.is_empty() {
        return Ok(message.payload.clone());
    }
    let header = |wanted: &str| {
        let found = message.headers.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted));
        found.map(|(_, value)| value.trim())
    };
    let payload = match header("content-encoding") {
        Some(encoding) => decompress(encoding, &message.payload)?,
        None => message.payload.clone(),
    };
    if cloudevents::binary(&message.headers) {
        let text = std::str::from_utf8(&payload).map_err(|error| {
            malformed(format!("not valid UTF-8 at byte {}", error.valid_up_to()))
        })?;
        return cloudevents::structured(&message.headers, text).map(Bytes::from);
    }
    match header("content-type") {
        Some(content_type) => {
            let mut lines = Vec::with_capacity(payload.len());
            for (_, line) in split_request(Some(content_type), &payload)? {
                lines.extend_from_slice(&line);
                lines.push(b'\n');
            }
            Ok(Bytes::from(lines))
        }
        None => Ok(payload),
    }
}

/// Undoes a content encoding, within the limit.
///
/// # Errors
/// `bad_value` for an encoding that is not read, `malformed` for damaged data, `too_large` beyond
/// [`MESSAGE_LEN_MAX`].
pub fn decompress(encoding: &str, payload: &Bytes) -> Result<Bytes, Rejection> {
    let damaged = |error: std::io::Error| malformed(format!("damaged {encoding} data: {error}"));
    match encoding.to_ascii_lowercase().as_str() {
        "" | "identity" => Ok(payload.clone()),
        "gzip" | "x-gzip" => {
            bounded(flate2::read::MultiGzDecoder::new(&payload[..])).map_err(damaged)?
        }
        "zstd" => {
            let mut decoder =
                zstd::stream::read::Decoder::with_buffer(&payload[..]).map_err(damaged)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(damaged)?;
            bounded(decoder).map_err(damaged)?
        }
        _ => Err(bad_value(format!(
            "content-encoding {:?} is not read; send gzip, zstd or none",
            excerpt(encoding)
        ))),
    }
}

/// Reads to the end or to the limit. The buffer grows with what comes, not with what is announced.
fn bounded(reader: impl Read) -> std::io::Result<Result<Bytes, Rejection>> {
    let mut out = Vec::new();
    reader.take(MESSAGE_LEN_MAX as u64 + 1).read_to_end(&mut out)?;
    if out.len() > MESSAGE_LEN_MAX {
        return Ok(Err(Rejection::new(
            Reason::TooLarge,
            format!("the message decompresses to more than {MESSAGE_LEN_MAX} bytes"),
        )));
    }
    Ok(Ok(Bytes::from(out)))
}

/// Decodes NDJSON: one item for each line that is not blank.
pub fn decode_lines(payload: &[u8]) -> Lines<'_> {
    Lines { lines: raw_lines(payload), refused: None }
}

/// Events of a payload: number of the line (from 1), its bytes without line end, and what it is.
#[derive(Debug, Clone)]
pub struct Lines<'a> {
    lines: RawLines<'a>,
    /// A message that is refused as a whole.
    refused: Option<(&'a [u8], &'a Rejection)>,
}

impl<'a> Iterator for Lines<'a> {
    type Item = (u32, &'a [u8], Result<Event<'a>, Rejection>);

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if let Some((raw, rejection)) = self.refused.take() {
            return Some((1, raw, Err(rejection.clone())));
        }
        let (number, line) = self.lines.next()?;
        Some((number, line, decode_line(line)))
    }
}
