//! The bytes of a segment file: header, frames, and a trailer once it is sealed. Little endian, no
//! alignment.
//!
//! ```text
//! file     <20 digits: position of the first record>.log
//! header   magic 8 | format u32 | uuid 16 | first position u64 | crc u32                  (40)
//! frame    magic 4 | body length u32 | position u64 | log time i64 | durable u64
//!          | flags u32 (1: commit) | crc of the body u32 | crc of the frame header u32    (44)
//!          then the body: subject length u32 | subject | headers u32
//!          | (name length u32 | value length u32 | name | value)* | payload
//! index    (position u64 | offset u64)*, one about every 64 KiB
//! trailer  magic 8 | first u64 | last u64 | last time i64 | commit position u64
//!          | commit offset u64 | end of frames u64 | index entries u32 | crc of the index u32
//!          | crc u32                                                                       (68)
//! ```
//!
//! All checksums are CRC-32C; but for the header's, which must be readable without knowing the log,
//! they start from the log's salt (see `identity.rs`). `durable` is the last
//! position known to be on disk when the frame was written: it tells recovery which records may
//! have been acknowledged. The frame magic holds two bytes that no UTF-8 text contains, so a search
//! for the next frame after damage does not stumble over JSON.

use bytes::Bytes;
use meterr_operators::time::Time;

use crate::embedded::identity::{Identity, Salt};
use crate::log::Message;

pub(super) const HEADER: usize = 40;
pub(super) const FRAME: usize = 44;
pub(super) const TRAILER: usize = 68;
/// Distance of index entries; what a read of one record has to go through at most.
pub(super) const INDEX_BYTES: u64 = 64 * 1024;
const INDEX_ENTRY: usize = 16;

const HEADER_MAGIC: [u8; 8] = *b"\xf5mtrSEG\xc1";
const TRAILER_MAGIC: [u8; 8] = *b"\xf5mtrEND\xc1";
pub(super) const FRAME_MAGIC: [u8; 4] = *b"\xf5mr\xc1";
const FORMAT: u32 = 1;
const FLAG_COMMIT: u32 = 1;

/// Whether a message is a commit record.
pub(super) fn commit_subject(subject: &str) -> bool {
    subject.ends_with(".commit")
}

/// Name of the segment that begins at a position.
pub(super) fn file_name(first: u64) -> String {
    format!("{first:020}.log")
}

/// The position in a segment's name; none when it is no such name.
pub(super) fn first_of_name(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".log")?;
    let plain = digits.len() == 20 && digits.bytes().all(|b| b.is_ascii_digit());
    if plain { digits.parse().ok().filter(|first| *first > 0) } else { None }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn i64_at(bytes: &[u8], at: usize) -> Option<i64> {
    Some(i64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// The header of a segment.
pub(super) fn encode_header(identity: &Identity, first: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER);
    out.extend_from_slice(&HEADER_MAGIC);
    out.extend_from_slice(&FORMAT.to_le_bytes());
    out.extend_from_slice(&identity.uuid);
    out.extend_from_slice(&first.to_le_bytes());
    let crc = crc32c::crc32c(&out);
    out.extend_from_slice(&crc.to_le_bytes());
    out
}

/// What a segment's header says.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum HeaderState {
    /// It is this log's, and of the segment named.
    Good,
    /// It is whole, but of another place: a sentence.
    Foreign(String),
    /// It cannot be believed.
    Damaged,
}

/// Judges a segment's header.
pub(super) fn check_header(bytes: &[u8], identity: &Identity, first: u64) -> HeaderState {
    if bytes.get(..HEADER) == Some(encode_header(identity, first).as_slice()) {
        return HeaderState::Good;
    }
    let Some(bytes) = bytes.get(..HEADER) else { return HeaderState::Damaged };
    let crc = crc32c::crc32c(&bytes[..HEADER - 4]);
    if bytes[..8] != HEADER_MAGIC || u32_at(bytes, HEADER - 4) != Some(crc) {
        return HeaderState::Damaged;
    }
    HeaderState::Foreign(match (u32_at(bytes, 8), u64_at(bytes, 28)) {
        (Some(format), _) if format != FORMAT => {
            format!("its format is {format}, this version of meterr reads format {FORMAT}")
        }
        (_, Some(named)) if bytes[12..28] == identity.uuid => {
            format!("its header says that it begins at position {named}; was it renamed?")
        }
        _ => "it belongs to another log; were files mixed up?".to_owned(),
    })
}

/// The fixed part of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct FrameHead {
    pub body_bytes: u32,
    pub position: u64,
    pub time: Time,
    pub durable: u64,
    pub commit: bool,
    body_crc: u32,
}

impl FrameHead {
    /// Reads the fixed part; none unless its checksum holds.
    pub fn decode(bytes: &[u8], salt: Salt) -> Option<FrameHead> {
        let bytes = bytes.get(..FRAME)?;
        if bytes[..4] != FRAME_MAGIC {
            return None;
        }
        let crc = crc32c::crc32c_append(salt.head, &bytes[..FRAME - 4]);
        if u32_at(bytes, FRAME - 4)? != crc {
            return None;
        }
        Some(FrameHead {
            body_bytes: u32_at(bytes, 4)?,
            position: u64_at(bytes, 8)?,
            time: Time(i64_at(bytes, 16)?),
            durable: u64_at(bytes, 24)?,
            commit: u32_at(bytes, 32)? & FLAG_COMMIT != 0,
            body_crc: u32_at(bytes, 36)?,
        })
    }

    /// Bytes of the whole frame.
    pub fn frame_bytes(&self) -> u64 {
        FRAME as u64 + u64::from(self.body_bytes)
    }

    /// Whether `body` is what was written.
    pub fn holds(&self, body: &[u8], salt: Salt) -> bool {
        crc32c::crc32c_append(salt.body, body) == self.body_crc
    }
}

/// Appends a frame that lacks position, time, durable position and the header's checksum, which
/// [`finish_frame`] puts in: only the writer thread knows them, while the costly checksum of the
/// body is computed here, by the caller. The body must be below 4 GiB, which the message limit
/// ensures.
pub(super) fn encode_frame(message: &Message, salt: Salt, out: &mut Vec<u8>) {
    let at = out.len();
    out.extend_from_slice(&FRAME_MAGIC);
    out.extend_from_slice(&(message.bytes() as u32).to_le_bytes());
    out.extend_from_slice(&[0; 24]);
    let flags = if commit_subject(&message.subject) { FLAG_COMMIT } else { 0 };
    out.extend_from_slice(&flags.to_le_bytes());
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&(message.subject.len() as u32).to_le_bytes());
    out.extend_from_slice(message.subject.as_bytes());
    out.extend_from_slice(&(message.headers.len() as u32).to_le_bytes());
    for (name, value) in &message.headers {
        out.extend_from_slice(&(name.len() as u32).to_le_bytes());
        out.extend_from_slice(&(value.len() as u32).to_le_bytes());
        out.extend_from_slice(name.as_bytes());
        out.extend_from_slice(value.as_bytes());
    }
    out.extend_from_slice(&message.payload);
    let crc = crc32c::crc32c_append(salt.body, &out[at + FRAME..]);
    out[at + 36..at + 40].copy_from_slice(&crc.to_le_bytes());
}

/// Completes the frame at the start of `frame`.
pub(super) fn finish_frame(frame: &mut [u8], salt: Salt, position: u64, time: Time, durable: u64) {
    frame[8..16].copy_from_slice(&position.to_le_bytes());
    frame[16..24].copy_from_slice(&time.0.to_le_bytes());
    frame[24..32].copy_from_slice(&durable.to_le_bytes());
    let crc = crc32c::crc32c_append(salt.head, &frame[..FRAME - 4]);
    frame[FRAME - 4..FRAME].copy_from_slice(&crc.to_le_bytes());
}

/// Reads a body whose checksum holds; none if its lengths do not fit each other. Allocates no more
/// than the body has bytes.
pub(super) fn decode_body(body: &[u8]) -> Option<Message> {
    fn take<'a>(rest: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
        let (head, tail) = rest.split_at_checked(n)?;
        *rest = tail;
        Some(head)
    }
    fn length(rest: &mut &[u8]) -> Option<usize> {
        u32_at(take(rest, 4)?, 0)?.try_into().ok()
    }
    fn text(rest: &mut &[u8], n: usize) -> Option<String> {
        Some(std::str::from_utf8(take(rest, n)?).ok()?.to_owned())
    }
    let mut rest = body;
    let n = length(&mut rest)?;
    let subject = text(&mut rest, n)?;
    let mut headers = Vec::new();
    for _ in 0..length(&mut rest)? {
        let (name, value) = (length(&mut rest)?, length(&mut rest)?);
        headers.push((text(&mut rest, name)?, text(&mut rest, value)?));
    }
    Some(Message { subject, headers, payload: Bytes::copy_from_slice(rest) })
}

/// Where a record lies in its segment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct IndexEntry {
    pub position: u64,
    pub offset: u64,
}

/// What a sealed segment says about itself at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Trailer {
    pub first: u64,
    /// `first - 1` when there is no record.
    pub last: u64,
    pub last_time: Time,
    /// The last commit record in this segment; position 0: none.
    pub commit: IndexEntry,
    /// Where the frames end and the index begins.
    pub frames_end: u64,
    pub index_entries: u32,
    index_crc: u32,
}

/// The bytes that seal a segment.
pub(super) fn encode_seal(
    salt: Salt,
    first: u64,
    last: u64,
    last_time: Time,
    commit: IndexEntry,
    frames_end: u64,
    index: &[IndexEntry],
) -> Vec<u8> {
    let mut out = Vec::with_capacity(index.len() * INDEX_ENTRY + TRAILER);
    for entry in index {
        out.extend_from_slice(&entry.position.to_le_bytes());
        out.extend_from_slice(&entry.offset.to_le_bytes());
    }
    let index_crc = crc32c::crc32c_append(salt.head, &out);
    let at = out.len();
    out.extend_from_slice(&TRAILER_MAGIC);
    for field in [first, last] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    out.extend_from_slice(&last_time.0.to_le_bytes());
    for field in [commit.position, commit.offset, frames_end] {
        out.extend_from_slice(&field.to_le_bytes());
    }
    out.extend_from_slice(&(index.len() as u32).to_le_bytes());
    out.extend_from_slice(&index_crc.to_le_bytes());
    let crc = crc32c::crc32c_append(salt.head, &out[at..]);
    out.extend_from_slice(&crc.to_le_bytes());
    out
}

impl Trailer {
    /// Reads the last [`TRAILER`] bytes of a file of `file_bytes`; none unless it is a trailer of
    /// the segment at `first` and fits the file's length.
    pub fn decode(bytes: &[u8], salt: Salt, first: u64, file_bytes: u64) -> Option<Trailer> {
        let bytes = bytes.get(..TRAILER)?;
        let crc = crc32c::crc32c_append(salt.head, &bytes[..TRAILER - 4]);
        if bytes[..8] != TRAILER_MAGIC || u32_at(bytes, TRAILER - 4)? != crc {
            return None;
        }
        let trailer = Trailer {
            first: u64_at(bytes, 8)?,
            last: u64_at(bytes, 16)?,
            last_time: Time(i64_at(bytes, 24)?),
            commit: IndexEntry { position: u64_at(bytes, 32)?, offset: u64_at(bytes, 40)? },
            frames_end: u64_at(bytes, 48)?,
            index_entries: u32_at(bytes, 56)?,
            index_crc: u32_at(bytes, 60)?,
        };
        let fits = trailer.first == first
            && trailer.frames_end.checked_add(trailer.index_bytes() as u64 + TRAILER as u64)
                == Some(file_bytes);
        fits.then_some(trailer)
    }

    /// Bytes of the index before it.
    pub fn index_bytes(&self) -> usize {
        self.index_entries as usize * INDEX_ENTRY
    }

    /// Reads the index; none unless its checksum holds.
    pub fn decode_index(&self, bytes: &[u8], salt: Salt) -> Option<Vec<IndexEntry>> {
        if crc32c::crc32c_append(salt.head, bytes) != self.index_crc {
            return None;
        }
        let entry =
            |pair: &[u8]| Some(IndexEntry { position: u64_at(pair, 0)?, offset: u64_at(pair, 8)? });
        bytes.chunks_exact(INDEX_ENTRY).map(entry).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SALT: Salt = Salt { head: 7, body: 11 };

    fn framed(message: &Message, position: u64) -> Vec<u8> {
        let mut frame = Vec::new();
        encode_frame(message, SALT, &mut frame);
        finish_frame(&mut frame, SALT, position, Time(5), position - 1);
        frame
    }

    fn decode(frame: &[u8], salt: Salt) -> Option<(FrameHead, Message)> {
        let head = FrameHead::decode(frame, salt)?;
        let body = frame.get(FRAME..head.frame_bytes() as usize)?;
        if head.holds(body, salt) { Some((head, decode_body(body)?)) } else { None }
    }

    proptest! {
        #[test]
        fn frames_come_back_and_no_changed_byte_passes(
            subject in "[a-z.@]{0,20}",
            headers in prop::collection::vec(("[a-z]{0,5}", ".{0,9}"), 0..4),
            payload in prop::collection::vec(any::<u8>(), 0..300),
            at in any::<prop::sample::Index>(),
            flip in 1..=255_u8,
        ) {
            let message = Message { subject, headers, payload: payload.into() };
            let mut frame = framed(&message, 9);
            prop_assert_eq!(frame.len(), FRAME + message.bytes());
            let (head, back) = decode(&frame, SALT).unwrap();
            prop_assert_eq!((head.position, head.time, head.durable), (9, Time(5), 8));
            prop_assert_eq!(head.commit, message.subject.ends_with(".commit"));
            prop_assert_eq!(&back, &message);
            // A frame of another log, such as one that a producer saw and sends as a payload.
            let other = Salt { head: 8, body: 11 };
            prop_assert!(decode(&frame, other).is_none());
            let at = at.index(frame.len());
            frame[at] ^= flip;
            prop_assert!(decode(&frame, SALT).is_none());
        }

        #[test]
        fn any_bytes_as_a_body_are_refused_or_read_without_panic(
            body in prop::collection::vec(prop_oneof![Just(0), 0..12_u8, any::<u8>()], 0..80)
        ) {
            if let Some(message) = decode_body(&body) {
                prop_assert_eq!(message.bytes(), body.len());
            }
        }
    }

    #[test]
    fn header_tells_damage_from_a_renamed_file() {
        let identity = Identity::generate("A");
        let mut bytes = encode_header(&identity, 12);
        assert_eq!(bytes.len(), HEADER);
        assert_eq!(check_header(&bytes, &identity, 12), HeaderState::Good);
        let foreign = |identity: &Identity, first| match check_header(&bytes, identity, first) {
            HeaderState::Foreign(why) => why,
            other => format!("{other:?}"),
        };
        assert!(foreign(&identity, 13).contains("begins at position 12"));
        assert!(foreign(&Identity::generate("A"), 12).contains("another log"));
        assert_eq!(check_header(&bytes[..20], &identity, 12), HeaderState::Damaged);
        bytes[30] ^= 1;
        assert_eq!(check_header(&bytes, &identity, 12), HeaderState::Damaged);
    }

    #[test]
    fn trailer_comes_back_and_must_fit_its_file() {
        let index =
            [IndexEntry { position: 3, offset: 40 }, IndexEntry { position: 9, offset: 70_000 }];
        let bytes = encode_seal(SALT, 3, 12, Time(4), index[1], 80_000, &index);
        let (list, end) = bytes.split_at(bytes.len() - TRAILER);
        let file_bytes = 80_000 + bytes.len() as u64;
        let trailer = Trailer::decode(end, SALT, 3, file_bytes).unwrap();
        assert_eq!((trailer.last, trailer.last_time, trailer.commit), (12, Time(4), index[1]));
        assert_eq!(trailer.decode_index(list, SALT).unwrap(), index);
        assert_eq!(Trailer::decode(end, SALT, 3, file_bytes + 1), None);
        assert_eq!(Trailer::decode(end, SALT, 4, file_bytes), None);
        let mut damaged = list.to_vec();
        damaged[3] ^= 1;
        assert_eq!(trailer.decode_index(&damaged, SALT), None);
    }

    #[test]
    fn names() {
        assert_eq!(file_name(42), "00000000000000000042.log");
        assert_eq!(first_of_name("00000000000000000042.log"), Some(42));
        for bad in ["42.log", "00000000000000000000.log", "0000000000000000004x.log", "identity"] {
            assert_eq!(first_of_name(bad), None);
        }
    }
}
