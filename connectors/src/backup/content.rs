//! What a segment says: records of one log in a row, as bytes. Pure.
//!
//! ```text
//! u32 length of the stream's name, name | u64 first position | u32 records | the records
//! record  i64 time | u32 length, subject | u32 headers, each u32 length, name, u32 length, value
//!         | u32 length, payload
//! ```
//!
//! Numbers are little-endian. Whatever the bytes, memory stays in proportion to them.

use bytes::Bytes;
use meterr_operators::time::Time;

use crate::log::{Message, Record};

/// A segment is full when the next record would make it larger than this, in bytes as it takes there. One
/// record alone may be larger.
pub const SEGMENT_BYTES: usize = 8 * 1024 * 1024;
/// A segment is full with so many records.
pub const SEGMENT_RECORDS: usize = 100_000;
/// Most bytes of a content that are read: a full segment and one record of the largest size.
pub(super) const CONTENT_LEN_MAX: usize = SEGMENT_BYTES + 32 * 1024 * 1024;

/// Records of a log in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Content {
    pub stream: String,
    pub records: Vec<Record>,
}

/// What a record counts in a segment: the bytes it takes there.
pub(super) fn record_bytes(record: &Record) -> usize {
    let message = &record.message;
    let headers: usize = message.headers.iter().map(|(k, v)| 8 + k.len() + v.len()).sum();
    8 + 4 + message.subject.len() + 4 + headers + 4 + message.payload.len()
}

fn put(bytes: &mut Vec<u8>, part: &[u8]) {
    // A message is far below 4 GiB: the logs' limit is 17 MiB.
    bytes.extend_from_slice(&(part.len() as u32).to_le_bytes());
    bytes.extend_from_slice(part);
}

/// The bytes of records in a row.
pub(super) fn encode(stream: &str, records: &[Record]) -> Vec<u8> {
    let len: usize = records.iter().map(record_bytes).sum();
    let mut bytes = Vec::with_capacity(len + stream.len() + 16);
    put(&mut bytes, stream.as_bytes());
    let first = records.first().map_or(0, |record| record.position);
    bytes.extend_from_slice(&first.to_le_bytes());
    bytes.extend_from_slice(&(records.len() as u32).to_le_bytes());
    for record in records {
        bytes.extend_from_slice(&record.time.0.to_le_bytes());
        put(&mut bytes, record.message.subject.as_bytes());
        // By name: their order means nothing, and JetStream does not give it twice the same.
        let mut headers: Vec<&(String, String)> = record.message.headers.iter().collect();
        headers.sort_by(|a, b| a.0.cmp(&b.0));
        bytes.extend_from_slice(&(headers.len() as u32).to_le_bytes());
        for (name, value) in headers {
            put(&mut bytes, name.as_bytes());
            put(&mut bytes, value.as_bytes());
        }
        put(&mut bytes, &record.message.payload);
    }
    bytes
}

struct Input<'a> {
    whole: &'a Bytes,
    at: usize,
}

impl Input<'_> {
    fn take(&mut self, len: usize) -> Result<Bytes, &'static str> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.whole.len());
        let end = end.ok_or("it ends inside a record")?;
        let part = self.whole.slice(self.at..end);
        self.at = end;
        Ok(part)
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        self.take(N)?.as_ref().try_into().map_err(|_| "it ends inside a record")
    }

    fn u32(&mut self) -> Result<usize, &'static str> {
        Ok(u32::from_le_bytes(self.number()?) as usize)
    }

    fn bytes(&mut self) -> Result<Bytes, &'static str> {
        let len = self.u32()?;
        self.take(len)
    }

    fn text(&mut self) -> Result<String, &'static str> {
        String::from_utf8(self.bytes()?.into()).map_err(|_| "a text in it is not UTF-8")
    }
}

/// The records of a content; the error says what is wrong.
pub(super) fn decode(bytes: &Bytes) -> Result<Content, &'static str> {
    let mut input = Input { whole: bytes, at: 0 };
    let stream = input.text()?;
    let first = u64::from_le_bytes(input.number()?);
    let count = input.u32()?;
    let mut records = Vec::new();
    for n in 0..count as u64 {
        let position = first.checked_add(n).ok_or("its positions overflow")?;
        let time = Time(i64::from_le_bytes(input.number()?));
        let subject = input.text()?;
        let mut headers = Vec::new();
        for _ in 0..input.u32()? {
            headers.push((input.text()?, input.text()?));
        }
        let payload = input.bytes()?;
        records.push(Record { position, time, message: Message { subject, headers, payload } });
    }
    if input.at != bytes.len() {
        return Err("bytes follow its last record");
    }
    Ok(Content { stream, records })
}

#[cfg(test)]
mod tests {
    use super::super::testing::records;
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read(records in records(0..20)) {
            let bytes = Bytes::from(encode("USAGE_3", &records));
            let summed: usize = records.iter().map(record_bytes).sum();
            prop_assert_eq!(bytes.len(), summed + 4 + 7 + 12);
            let content = decode(&bytes).unwrap();
            prop_assert_eq!(content, Content { stream: "USAGE_3".to_owned(), records });
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes.into());
        }

        #[test]
        fn a_cut_content_is_refused(records in records(1..5), cut in any::<prop::sample::Index>()) {
            let bytes = Bytes::from(encode("OUT_0", &records));
            prop_assert!(decode(&bytes.slice(..cut.index(bytes.len()))).is_err());
        }
    }
}
