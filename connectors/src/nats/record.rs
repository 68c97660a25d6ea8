//! Messages as JetStream keeps them ↔ records of a log.

use async_nats::jetstream::message::StreamMessage;
use async_nats::jetstream::stream::RawMessage;
use async_nats::{HeaderMap, HeaderName, HeaderValue};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use meterr_operators::time::Time;

use super::streams::TIME_HEADER;
use crate::log::{Message, Record};

/// Headers of the transport, which are no part of a message's content.
pub(super) fn of_transport(name: &str) -> bool {
    let begins = |prefix: &str| {
        name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    };
    begins("nats-") || name.eq_ignore_ascii_case(TIME_HEADER)
}

/// The headers that belong to a message, by name: the client keeps them in no order.
fn headers(map: Option<&HeaderMap>) -> Vec<(String, String)> {
    let Some(map) = map else { return Vec::new() };
    let mut headers: Vec<(String, String)> = map
        .iter()
        .filter(|(name, _)| !of_transport(name.as_ref()))
        .flat_map(|(name, values)| {
            values.iter().map(move |value| {
                let name: &str = name.as_ref();
                (name.to_owned(), value.as_str().to_owned())
            })
        })
        .collect();
    // Stable: values of one name keep their order.
    headers.sort_by(|a, b| a.0.cmp(&b.0));
    headers
}

/// Log time of a record: JetStream's timestamp, or the header's where the record was copied.
fn time(map: Option<&HeaderMap>, nanos: i128, copied: bool) -> Time {
    let header = || map?.get_last(TIME_HEADER)?.as_str().parse().ok();
    let stored = || Time(i64::try_from(nanos.div_euclid(1_000)).unwrap_or(i64::MAX));
    copied.then(header).flatten().map_or_else(stored, Time)
}

/// A record from a consumer's message. The position is in its reply subject, which only the server
/// writes. Returns also how many messages wait behind it.
pub(super) fn from_consumer(
    message: async_nats::jetstream::Message,
    copied_to: u64,
) -> Option<(Record, u64)> {
    let info = message.info().ok()?;
    let (position, pending) = (info.stream_sequence, info.pending);
    let nanos = info.published.unix_timestamp_nanos();
    let message = message.message;
    let map = message.headers.as_ref();
    let time = time(map, nanos, position <= copied_to);
    let headers = headers(map);
    let subject = message.subject.into_string();
    let message = Message { subject, headers, payload: message.payload };
    Some((Record { position, time, message }, pending))
}

/// A record from a message read directly.
pub(super) fn from_stream(message: StreamMessage, copied_to: u64) -> Record {
    let position = message.sequence;
    let nanos = message.time.unix_timestamp_nanos();
    let time = time(Some(&message.headers), nanos, position <= copied_to);
    let headers = headers(Some(&message.headers));
    let subject = message.subject.into_string();
    Record { position, time, message: Message { subject, headers, payload: message.payload } }
}

/// A record as a stream's leader gives it. Read here and not by the client, which keeps only the last of
/// several headers of one name, unlike for messages that come in other ways.
pub(super) fn from_raw(raw: RawMessage, copied_to: u64) -> Result<Record, String> {
    let decode = |text: &str| STANDARD.decode(text).map_err(|error| error.to_string());
    let headers = raw.headers.as_deref().map(decode).transpose()?.unwrap_or_default();
    let message = StreamMessage {
        subject: raw.subject.into(),
        sequence: raw.sequence,
        headers: parse_headers(&headers),
        payload: decode(&raw.payload)?.into(),
        time: raw.time,
    };
    Ok(from_stream(message, copied_to))
}

/// Headers as they are stored: a line with the version, then one a header, which goes on in lines that
/// begin with white space. What the client can read is read as it does, since what a message decodes to
/// must not depend on the way it came; what would break its connection is passed over.
fn parse_headers(bytes: &[u8]) -> HeaderMap {
    let mut map = HeaderMap::new();
    let text = String::from_utf8_lossy(bytes);
    let mut lines = text.lines().skip(1).peekable();
    while let Some(line) = lines.next() {
        let Some((name, value)) = line.split_once(':') else { continue };
        let mut value = value.trim_start().to_owned();
        while let Some(more) = lines.next_if(|line| line.starts_with(char::is_whitespace)) {
            value.push_str(more);
        }
        if let (Ok(name), Ok(value)) = (name.parse::<HeaderName>(), value.trim_end().parse()) {
            map.append::<HeaderName, HeaderValue>(name, value);
        }
    }
    map
}

/// The headers to publish a message with.
pub(super) fn to_headers(message: &Message) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in message.headers.iter().filter(|(name, _)| !of_transport(name)) {
        map.append(name.as_str(), value.as_str());
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_headers_are_read_like_all_others() {
        let bytes =
            "NATS/1.0\r\na: 1\r\na:2 \r\nce-id: x:y\r\nno header\r\nb c: 1\r\nd: 1\n2\r\n\r\n";
        let own = |n: &str, v: &str| (n.to_owned(), v.to_owned());
        let read = headers(Some(&parse_headers(bytes.as_bytes())));
        assert_eq!(read, [own("a", "1"), own("a", "2"), own("ce-id", "x:y"), own("d", "1")]);
        assert_eq!(headers(Some(&parse_headers(b""))), []);
        assert_eq!(headers(Some(&parse_headers(b"NATS/1.0\r\na: \xff\r\n\r\n"))).len(), 1);
    }

    #[test]
    fn headers_of_the_transport_are_not_content() {
        let mut map = HeaderMap::new();
        for (name, value) in [
            ("ce-id", "1"),
            ("Nats-Msg-Id", "x"),
            ("nats-sequence", "9"),
            ("Meterr-Time", "5"),
            ("a", "1"),
            ("a", "2"),
        ] {
            map.append(name, value);
        }
        let own = |n: &str, v: &str| (n.to_owned(), v.to_owned());
        assert_eq!(headers(Some(&map)), [own("a", "1"), own("a", "2"), own("ce-id", "1")]);
        assert_eq!(time(Some(&map), 7_999, false), Time(7), "a producer cannot set log time");
        assert_eq!(time(Some(&map), 7_999, true), Time(5));
        assert_eq!(time(None, -1, true), Time(-1));
    }
}
