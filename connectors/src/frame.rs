//! Frames: the one place where values become bincode and bytes become values again.
//!
//! bincode describes nothing of itself: another field order decodes to wrong values without an
//! error. So no bincode is written bare. A frame states what it holds, in which version, how long it
//! is and its checksum, and nothing is decoded before all four are found right:
//!
//! ```text
//! offset  0      4     6       8        12       16
//!         "mtrF" kind  schema  length   crc32c   payload (length bytes)
//! ```
//!
//! All numbers are little endian. The checksum covers kind, schema, length and payload. Payloads of
//! [`encode`] are bincode 2 `standard()` (little endian, variable-length integers).
//!
//! Limits: a frame is at most [`HEADER_LEN`] + [`Form::len_max`] bytes, and decoding allocates at
//! most about the `LIMIT` given, whatever the bytes say. [`encode`] refuses what [`decode`] would
//! refuse under the same limit, so that nothing is written that cannot be read back.
//!
//! A schema never changes its meaning: a changed type gets the next number in its [`Form`], and a
//! reader that knows several matches on [`Frame::schema`] and calls [`payload`].

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"mtrF";

/// Bytes before the payload.
pub const HEADER_LEN: usize = 16;

/// What a kind of frame looks like. One constant per kind; kinds never change their number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Form {
    /// Number of the kind.
    pub kind: u16,
    /// Schema that is written, and the newest one that can be read.
    pub schema: u16,
    /// Largest payload in bytes.
    pub len_max: u32,
}

/// A frame found sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Schema it was written in, at most the form's.
    pub schema: u16,
    /// What it holds.
    pub payload: &'a [u8],
}

/// Why bytes are not the frame expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Fewer bytes than the header, or than it announces.
    #[error("frame is cut short: {found} bytes of {expected}")]
    Short {
        /// Bytes there are.
        found: usize,
        /// Bytes there should be.
        expected: usize,
    },
    /// Not a frame at all.
    #[error("not a frame: it begins with {found:02x?}, not with {MAGIC:02x?}")]
    Magic {
        /// The first bytes.
        found: [u8; 4],
    },
    /// A frame of something else.
    #[error("frame is of kind {found}, not {expected}")]
    Kind {
        /// Kind found.
        found: u16,
        /// Kind wanted.
        expected: u16,
    },
    /// Written by a newer version.
    #[error("frame has schema {found}, newer than the known {known}")]
    Newer {
        /// Schema found.
        found: u16,
        /// Newest schema known.
        known: u16,
    },
    /// Written in an older schema than the caller reads.
    #[error("frame has schema {found}, which is no longer read (known is {known})")]
    Older {
        /// Schema found.
        found: u16,
        /// The schema read.
        known: u16,
    },
    /// More than the kind allows.
    #[error("frame holds {found} bytes, above the limit of {max}")]
    TooLarge {
        /// Length of the payload.
        found: usize,
        /// Limit of the kind.
        max: usize,
    },
    /// Bytes after the end.
    #[error("{extra} bytes follow the end of the frame")]
    Trailing {
        /// How many.
        extra: usize,
    },
    /// Damaged.
    #[error("checksum of the frame is {found:08x}, its bytes give {actual:08x}")]
    Checksum {
        /// The one stated.
        found: u32,
        /// The one of the bytes.
        actual: u32,
    },
    /// The payload is not a value of the type, or needs more memory than the limit.
    #[error("payload of the frame: {0}")]
    Payload(String),
}

/// A frame's header, for readers that take frames from a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Schema, at most the form's.
    pub schema: u16,
    /// Length of the payload, at most the form's limit.
    pub len: usize,
    crc: u32,
    head_crc: u32,
}

impl Header {
    /// Reads the header of a frame of this form from a stream. Nothing of the payload is believed
    /// yet, and nothing of a newer schema can be known.
    ///
    /// # Errors
    /// When it is not such a header.
    pub fn read(form: Form, bytes: &[u8; HEADER_LEN]) -> Result<Header, FrameError> {
        let header = Header::parse(form, bytes)?;
        header.admit(form)?;
        Ok(header)
    }

    fn parse(form: Form, bytes: &[u8; HEADER_LEN]) -> Result<Header, FrameError> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let magic = [bytes[0], bytes[1], bytes[2], bytes[3]];
        if magic != MAGIC {
            return Err(FrameError::Magic { found: magic });
        }
        let kind = u16_at(4);
        if kind != form.kind {
            return Err(FrameError::Kind { found: kind, expected: form.kind });
        }
        let head_crc = crc32c::crc32c(&bytes[4..12]);
        Ok(Header { schema: u16_at(6), len: u32_at(8) as usize, crc: u32_at(12), head_crc })
    }

    fn admit(&self, form: Form) -> Result<(), FrameError> {
        if self.schema > form.schema {
            return Err(FrameError::Newer { found: self.schema, known: form.schema });
        }
        if self.len > form.len_max as usize {
            return Err(FrameError::TooLarge { found: self.len, max: form.len_max as usize });
        }
        Ok(())
    }

    /// Checks the payload that follows the header.
    ///
    /// # Errors
    /// When it has another length or another checksum.
    pub fn check(&self, payload: &[u8]) -> Result<(), FrameError> {
        if payload.len() > self.len {
            return Err(FrameError::Trailing { extra: payload.len() - self.len });
        }
        if payload.len() < self.len {
            let (found, expected) = (HEADER_LEN + payload.len(), HEADER_LEN + self.len);
            return Err(FrameError::Short { found, expected });
        }
        let actual = crc32c::crc32c_append(self.head_crc, payload);
        if actual != self.crc {
            return Err(FrameError::Checksum { found: self.crc, actual });
        }
        Ok(())
    }
}

/// Puts bytes into a frame.
///
/// # Errors
/// When they are more than the form allows.
pub fn seal(form: Form, payload: &[u8]) -> Result<Vec<u8>, FrameError> {
    let len = u32::try_from(payload.len())
        .ok()
        .filter(|len| *len <= form.len_max)
        .ok_or(FrameError::TooLarge { found: payload.len(), max: form.len_max as usize })?;
    let mut frame = Vec::with_capacity(HEADER_LEN + payload.len());
    frame.extend_from_slice(&MAGIC);
    frame.extend_from_slice(&form.kind.to_le_bytes());
    frame.extend_from_slice(&form.schema.to_le_bytes());
    frame.extend_from_slice(&len.to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&frame[4..12]), payload);
    frame.extend_from_slice(&crc.to_le_bytes());
    frame.extend_from_slice(payload);
    Ok(frame)
}

/// Takes the bytes of exactly one frame apart.
///
/// # Errors
/// When they are not exactly one sound frame of this form.
pub fn open(form: Form, bytes: &[u8]) -> Result<Frame<'_>, FrameError> {
    let Some((head, payload)) = bytes.split_first_chunk::<HEADER_LEN>() else {
        return Err(FrameError::Short { found: bytes.len(), expected: HEADER_LEN });
    };
    let header = Header::parse(form, head)?;
    // The checksum first: a damaged schema number must not pass for a newer version.
    header.check(payload)?;
    header.admit(form)?;
    Ok(Frame { schema: header.schema, payload })
}

/// Encodes a value into a frame. `LIMIT` is the memory in bytes that decoding it may take, where a
/// container counts with the size its items have in memory; take a few times `len_max`.
///
/// # Errors
/// When the value is above the form's limit, or could not be decoded under `LIMIT`.
pub fn encode<T, const LIMIT: usize>(form: Form, value: &T) -> Result<Vec<u8>, FrameError>
where
    T: bincode::Encode + bincode::Decode<()>,
{
    let bytes = bincode::encode_to_vec(value, bincode::config::standard())
        .map_err(|error| FrameError::Payload(error.to_string()))?;
    let frame = seal(form, &bytes)?;
    // The decoder counts memory, not bytes, so only decoding tells whether the limit holds.
    payload::<T, LIMIT>(&bytes)?;
    Ok(frame)
}

/// Decodes the value of a frame written in the form's present schema.
///
/// # Errors
/// When the bytes are not exactly one sound frame of this form and schema, or not of this type.
pub fn decode<T, const LIMIT: usize>(form: Form, bytes: &[u8]) -> Result<T, FrameError>
where
    T: bincode::Decode<()>,
{
    let frame = open(form, bytes)?;
    if frame.schema != form.schema {
        return Err(FrameError::Older { found: frame.schema, known: form.schema });
    }
    payload::<T, LIMIT>(frame.payload)
}

/// Decodes a payload that [`open`] gave. All of its bytes must belong to the value.
///
/// # Errors
/// When they are not exactly one value of this type, or need more memory than `LIMIT`.
pub fn payload<T, const LIMIT: usize>(bytes: &[u8]) -> Result<T, FrameError>
where
    T: bincode::Decode<()>,
{
    let config = bincode::config::standard().with_limit::<LIMIT>();
    let (value, read) = bincode::decode_from_slice(bytes, config)
        .map_err(|error| FrameError::Payload(error.to_string()))?;
    if read != bytes.len() {
        return Err(FrameError::Trailing { extra: bytes.len() - read });
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FORM: Form = Form { kind: 900, schema: 3, len_max: 4096 };
    const LIMIT: usize = 64 * 1024;

    type Sample = (u64, i128, String, Vec<Vec<u8>>, Option<Vec<(u32, String)>>, [u8; 4]);

    fn sample() -> impl Strategy<Value = Sample> {
        use proptest::collection::vec;
        let pairs = proptest::option::of(vec((any::<u32>(), ".{0,8}"), 0..8));
        (
            any::<u64>(),
            any::<i128>(),
            ".{0,20}",
            vec(vec(any::<u8>(), 0..20), 0..8),
            pairs,
            any::<[u8; 4]>(),
        )
    }

    /// The frame again with a right checksum, so that what comes behind it is reached.
    fn resealed(schema: u16, payload: &[u8]) -> Vec<u8> {
        seal(Form { schema, ..FORM }, payload).unwrap()
    }

    #[test]
    fn each_fault_is_named() {
        let good = encode::<u64, LIMIT>(FORM, &300).unwrap();
        assert_eq!(decode::<u64, LIMIT>(FORM, &good), Ok(300));

        let read = |bytes: &[u8]| decode::<u64, LIMIT>(FORM, bytes).unwrap_err().to_string();
        assert_eq!(read(&good[..7]), "frame is cut short: 7 bytes of 16");
        assert_eq!(read(&good[..18]), "frame is cut short: 18 bytes of 19");
        assert_eq!(read(&[good.as_slice(), &[0]].concat()), "1 bytes follow the end of the frame");
        assert!(read(&[0; 16]).starts_with("not a frame"));
        assert_eq!(read(&resealed(4, &good[16..])), "frame has schema 4, newer than the known 3");
        let older = read(&resealed(2, &good[16..]));
        assert_eq!(older, "frame has schema 2, which is no longer read (known is 3)");
        let trailing = read(&resealed(3, &[good[16..].to_vec(), vec![1]].concat()));
        assert_eq!(trailing, "1 bytes follow the end of the frame");

        let mut damaged = good.clone();
        damaged[17] ^= 1;
        assert!(read(&damaged).starts_with("checksum of the frame"));
        let other = seal(Form { kind: 901, ..FORM }, &good[16..]).unwrap();
        assert_eq!(read(&other), "frame is of kind 901, not 900");
    }

    #[test]
    fn nothing_is_written_that_could_not_be_read_back() {
        // 3,000 bytes on the wire, 24,000 in memory.
        let value = vec![1_u64; 3000];
        assert!(encode::<Vec<u64>, 32_000>(FORM, &value).is_ok());
        assert!(matches!(
            encode::<Vec<u64>, 16_000>(FORM, &value),
            Err(FrameError::Payload(why)) if why.contains("LimitExceeded")
        ));
        assert_eq!(
            encode::<Vec<u8>, LIMIT>(FORM, &vec![1; 5000]),
            Err(FrameError::TooLarge { found: 5003, max: 4096 })
        );
    }

    #[test]
    fn a_few_hostile_bytes_do_not_allocate_exabytes() {
        // A vector that claims u64::MAX bytes, then one of 2^40 strings.
        for claim in
            [[&[253][..], &[255; 8]].concat(), [&[253][..], &(1_u64 << 40).to_le_bytes()].concat()]
        {
            assert!(payload::<Vec<u8>, LIMIT>(&claim).is_err());
            assert!(payload::<Vec<String>, LIMIT>(&claim).is_err());
            assert!(decode::<Vec<String>, LIMIT>(FORM, &resealed(3, &claim)).is_err());
        }
    }

    proptest! {
        #[test]
        fn what_is_encoded_decodes_to_itself(value in sample()) {
            let bytes = encode::<Sample, LIMIT>(FORM, &value).unwrap();
            prop_assert_eq!(decode::<Sample, LIMIT>(FORM, &bytes).unwrap(), value);
        }

        #[test]
        fn any_changed_byte_is_noticed(value in sample(), at in any::<prop::sample::Index>(), flip in 1..=255_u8) {
            let mut bytes = encode::<Sample, LIMIT>(FORM, &value).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(decode::<Sample, LIMIT>(FORM, &bytes).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode::<Sample, LIMIT>(FORM, &bytes);
            let _ = payload::<Sample, LIMIT>(&bytes);
            // Behind a right header, too.
            let _ = decode::<Sample, LIMIT>(FORM, &resealed(3, &bytes));
        }
    }
}
