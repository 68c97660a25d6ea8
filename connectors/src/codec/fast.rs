//! Fast path: a hand scanner for plain native events.
//!
//! Invariant: what it accepts, [`super::general`] accepts with the same result; whatever is unusual
//! it leaves to it by answering `None`. Unusual are escapes, control characters, white space other
//! than blanks, an unknown or doubled field, a value of another type than expected, a cost, tags, a
//! void, and everything that is refused. So there is one set of messages and one set of rules, and
//! this file may stay simple. Property tests compare the two on random and on damaged lines.

use std::borrow::Cow;

use meterr_operators::event::{EventFields, METER_MAX, Tier};
use meterr_operators::time::Time;

use super::usage::Usage;

/// Reads a plain native event, or leaves it to the general path.
pub(super) fn scan(line: &str) -> Option<EventFields<'_>> {
    // Decided for the whole line at once, in a loop the compiler turns into vector code. After it,
    // a string ends at the next quote.
    let plain = line.bytes().fold(true, |plain, b| plain & (b >= 0x20) & (b != b'\\'));
    if !plain {
        return None;
    }
    let mut cursor = Cursor { line, bytes: line.as_bytes(), at: 0 };
    let mut fields = EventFields::default();
    let mut usage = Usage::default();
    let mut tier = None;
    let mut seen: u32 = 0;
    cursor.skip_blanks();
    cursor.take(b'{')?;
    loop {
        cursor.skip_blanks();
        let key = cursor.text()?;
        cursor.skip_blanks();
        cursor.take(b':')?;
        cursor.skip_blanks();
        let bit = match key {
            "id" => {
                fields.id = Cow::Borrowed(cursor.text()?);
                ID
            }
            "time" => {
                fields.time = Time::parse(cursor.text()?).ok()?;
                TIME
            }
            "org" => {
                fields.org = Cow::Borrowed(cursor.text()?);
                1 << 2
            }
            "user" => {
                fields.user = Cow::Borrowed(cursor.text()?);
                1 << 3
            }
            "provider" => {
                fields.provider = Cow::Borrowed(cursor.text()?);
                1 << 4
            }
            "model" => {
                fields.model = Cow::Borrowed(cursor.text()?);
                1 << 5
            }
            "feature" => {
                fields.feature = Cow::Borrowed(cursor.text()?);
                1 << 6
            }
            "input_tokens" => {
                usage.input = cursor.count()?;
                INPUT
            }
            "cached_input_tokens" => {
                usage.cached = cursor.count()?;
                1 << 8
            }
            "output_tokens" => {
                usage.output = cursor.count()?;
                1 << 9
            }
            "reasoning_tokens" => {
                usage.reasoning = cursor.count()?;
                1 << 10
            }
            "cache_write_tokens" => {
                usage.cache_write = cursor.count()?;
                1 << 11
            }
            "cache_write_1h_tokens" => {
                usage.cache_write_1h = cursor.count()?;
                1 << 12
            }
            "audio_input_tokens" => {
                usage.audio_input = cursor.count()?;
                1 << 13
            }
            "audio_output_tokens" => {
                usage.audio_output = cursor.count()?;
                1 << 14
            }
            "images" => {
                usage.images = cursor.count()?;
                1 << 15
            }
            "searches" => {
                usage.searches = cursor.count()?;
                1 << 16
            }
            "service_tier" => {
                tier = Some(Tier::by_name(cursor.text()?)?);
                1 << 17
            }
            "revision" => {
                fields.revision = cursor.count()?;
                1 << 18
            }
            _ => return None,
        };
        if seen & bit != 0 {
            return None;
        }
        seen |= bit;
        cursor.skip_blanks();
        match cursor.next()? {
            b',' => {}
            b'}' => break,
            _ => return None,
        }
    }
    cursor.skip_blanks();
    // Without `input_tokens` the event may still have usage; how rare that is makes it unusual.
    let needed = ID | TIME | INPUT;
    if cursor.at != line.len() || seen & needed != needed {
        return None;
    }
    fields.meters = usage.meters().ok()?;
    fields.tier = tier.unwrap_or_default();
    Some(fields)
}

const ID: u32 = 1;
const TIME: u32 = 1 << 1;
const INPUT: u32 = 1 << 7;

struct Cursor<'a> {
    line: &'a str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    #[inline]
    fn next(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    #[inline]
    fn take(&mut self, wanted: u8) -> Option<()> {
        (self.next()? == wanted).then_some(())
    }

    #[inline]
    fn skip_blanks(&mut self) {
        while self.bytes.get(self.at) == Some(&b' ') {
            self.at += 1;
        }
    }

    /// A string; the line is known to have no escapes and no control characters.
    #[inline]
    fn text(&mut self) -> Option<&'a str> {
        self.take(b'"')?;
        let start = self.at;
        let end = start + memchr::memchr(b'"', self.bytes.get(start..)?)?;
        self.at = end + 1;
        self.line.get(start..end)
    }

    /// Digits without sign, point, exponent or leading zero, at most `METER_MAX`.
    #[inline]
    fn count(&mut self) -> Option<u32> {
        let start = self.at;
        let mut count: u64 = 0;
        while let Some(digit) = self.bytes.get(self.at).map(|b| b.wrapping_sub(b'0')) {
            if digit > 9 {
                break;
            }
            count = count * 10 + u64::from(digit);
            self.at += 1;
            if count > METER_MAX {
                return None;
            }
        }
        let len = self.at - start;
        if len == 0 || (len > 1 && self.bytes[start] == b'0') {
            return None;
        }
        Some(count as u32)
    }
}
