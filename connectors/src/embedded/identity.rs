//! The identity file: what a log directory is. Four lines of text and a checksum:
//!
//! ```text
//! meterr log, format 1
//! stream USAGE_3
//! uuid 0b7c2d5e-…
//! salt 5f0c1a2b3c4d5e6f
//! crc32c 9a8b7c6d
//! ```
//!
//! It is the last thing written when a log is created (temporary file, sync, rename, sync of the
//! directory), so a directory with an identity once had its first segment, and one without holds
//! nothing that was ever acknowledged.
//!
//! The salt enters every checksum. A producer chooses the payload but does not know the salt, so no
//! payload can hold bytes that pass for a record when the bytes around it are damaged.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::path::Path;

use crate::embedded::file::FileSystem;
use crate::log::LogIdentity;

/// Name of the file.
pub(super) const FILE: &str = "identity";
const TEMPORARY: &str = "identity.tmp";
const FIRST_LINE: &str = "meterr log, format ";
const FORMAT: u32 = 1;
/// Far above any real one; guards against reading a huge file that merely has the name.
const BYTES_MAX: u64 = 4096;

/// Start values of the checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Salt {
    /// For frame, segment and trailer headers.
    pub head: u32,
    /// For bodies.
    pub body: u32,
}

/// What the file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    pub log: LogIdentity,
    pub uuid: [u8; 16],
    pub salt: Salt,
}

impl Identity {
    /// A new one. Randomness is the operating system's, by way of the standard library's hasher
    /// keys, stretched by BLAKE3.
    pub fn generate(stream: &str) -> Identity {
        let mut hasher = blake3::Hasher::new();
        for n in 0..4_u64 {
            hasher.update(&RandomState::new().hash_one(n).to_le_bytes());
        }
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        hasher.update(&since.unwrap_or_default().as_nanos().to_le_bytes());
        hasher.update(&std::process::id().to_le_bytes());
        let mut bytes = [0; 24];
        hasher.finalize_xof().fill(&mut bytes);
        let (mut uuid, mut head, mut body) = ([0; 16], [0; 4], [0; 4]);
        uuid.copy_from_slice(&bytes[..16]);
        head.copy_from_slice(&bytes[16..20]);
        body.copy_from_slice(&bytes[20..]);
        // Version 4, variant 1.
        uuid[6] = uuid[6] & 0x0f | 0x40;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        let salt = Salt { head: u32::from_le_bytes(head), body: u32::from_le_bytes(body) };
        let log = LogIdentity { stream: stream.to_owned(), uuid: uuid_text(&uuid) };
        Identity { log, uuid, salt }
    }

    /// One with the name of the log that a copy is made of; the error says why that cannot be. The
    /// salt is new, as the files are.
    pub fn named(stream: &str, uuid: &str) -> Result<Identity, String> {
        let bytes = name_bytes(uuid).ok_or_else(|| {
            format!("{uuid:?} cannot name a log: 1 to 64 of A-Z, a-z, 0-9, - and _ can")
        })?;
        let mut identity = Identity::generate(stream);
        identity.uuid = bytes;
        uuid.clone_into(&mut identity.log.uuid);
        Ok(identity)
    }

    fn encode(&self) -> String {
        let mut text = format!(
            "{FIRST_LINE}{FORMAT}\nstream {}\nuuid {}\nsalt {:08x}{:08x}\n",
            self.log.stream, self.log.uuid, self.salt.head, self.salt.body
        );
        let crc = crc32c::crc32c(text.as_bytes());
        text.push_str(&format!("crc32c {crc:08x}\n"));
        text
    }

    /// Reads the file's bytes for the stream expected; the error says what is wrong and what to do.
    fn decode(bytes: &[u8], stream: &str) -> Result<Identity, String> {
        let damaged = || {
            "its identity file is damaged; put back the file of a backup of this directory"
                .to_owned()
        };
        let text = std::str::from_utf8(bytes).map_err(|_| damaged())?;
        // The version goes first: a later format may check itself in another way.
        let version = text.lines().next().and_then(|l| l.strip_prefix(FIRST_LINE));
        match version.and_then(|v| v.parse::<u32>().ok()) {
            Some(FORMAT) => {}
            Some(other) => {
                return Err(format!(
                    "its format is {other}, this version of meterr reads format {FORMAT}"
                ));
            }
            None => return Err(damaged()),
        }
        let crc_at = text.rfind("crc32c ").ok_or_else(damaged)?;
        let crc = text[crc_at + 7..].strip_suffix('\n').ok_or_else(damaged)?;
        if hex_u32(crc) != Some(crc32c::crc32c(&bytes[..crc_at])) {
            return Err(damaged());
        }
        let field = |name: &str| {
            text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' ')).ok_or_else(damaged)
        };
        if field("stream")? != stream {
            return Err(format!(
                "the directory holds stream {:?}, not {stream:?}; were directories exchanged?",
                field("stream")?
            ));
        }
        let name = field("uuid")?.to_owned();
        let uuid = name_bytes(&name).ok_or_else(damaged)?;
        let salt = field("salt")?;
        let halves = (salt.len() == 16 && salt.is_ascii()).then(|| salt.split_at(8));
        let (head, body) = halves.ok_or_else(damaged)?;
        let salt = Salt {
            head: hex_u32(head).ok_or_else(damaged)?,
            body: hex_u32(body).ok_or_else(damaged)?,
        };
        let log = LogIdentity { stream: stream.to_owned(), uuid: name };
        Ok(Identity { log, uuid, salt })
    }

    /// Reads the file in `dir`; the inner error is a sentence about its content.
    pub fn load(
        fs: &dyn FileSystem,
        dir: &Path,
        stream: &str,
    ) -> io::Result<Result<Identity, String>> {
        let file = fs.open(&dir.join(FILE))?;
        let mut bytes = vec![0; file.size()?.min(BYTES_MAX) as usize];
        file.read_at(&mut bytes, 0)?;
        Ok(Identity::decode(&bytes, stream))
    }

    /// Writes the file durably. Before the rename there is no log, after it there is one.
    pub fn store(&self, fs: &dyn FileSystem, dir: &Path) -> io::Result<()> {
        let temporary = dir.join(TEMPORARY);
        match fs.remove(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let file = fs.create(&temporary)?;
        file.write_at(self.encode().as_bytes(), 0)?;
        file.sync_data()?;
        fs.rename(&temporary, &dir.join(FILE))?;
        fs.sync_dir(dir)
    }
}

fn hex_u32(text: &str) -> Option<u32> {
    let hex = text.len() == 8 && text.bytes().all(|b| b.is_ascii_hexdigit());
    if hex { u32::from_str_radix(text, 16).ok() } else { None }
}

fn uuid_text(bytes: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (n, byte) in bytes.iter().enumerate() {
        if matches!(n, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// What stands for a log's name in its segments: the UUID, or a hash of a name that is none, as that
/// of a stream which somebody else created.
fn name_bytes(name: &str) -> Option<[u8; 16]> {
    if let Some(bytes) = uuid_bytes(name).filter(|bytes| uuid_text(bytes) == name) {
        return Some(bytes);
    }
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_');
    let fits = (1..=64).contains(&name.len()) && name.bytes().all(plain);
    let mut bytes = [0; 16];
    bytes.copy_from_slice(&blake3::hash(name.as_bytes()).as_bytes()[..16]);
    fits.then_some(bytes)
}

fn uuid_bytes(text: &str) -> Option<[u8; 16]> {
    let hex: Vec<u8> = text.bytes().filter(|b| *b != b'-').collect();
    if text.len() != 36 || hex.len() != 32 || !hex.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(hex.chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encode_then_decode_gives_the_same() {
        let identity = Identity::generate("USAGE_3");
        assert_eq!(Identity::decode(identity.encode().as_bytes(), "USAGE_3"), Ok(identity));
    }

    #[test]
    fn a_copy_keeps_the_name_and_has_a_salt_of_its_own() {
        let source = Identity::generate("USAGE_3");
        let copy = Identity::named("USAGE_3", &source.log.uuid).unwrap();
        assert_eq!((&copy.log, copy.uuid), (&source.log, source.uuid));
        assert_ne!(copy.salt, source.salt);
        let other = Identity::named("USAGE_3", "created-17").unwrap();
        assert_eq!(Identity::decode(other.encode().as_bytes(), "USAGE_3"), Ok(other.clone()));
        assert_ne!(other.uuid, Identity::named("USAGE_3", "created-18").unwrap().uuid);
        for bad in ["", "a b", "a\nsalt 0", &"a".repeat(65)] {
            assert!(Identity::named("USAGE_3", bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn two_generated_ones_differ() {
        let (a, b) = (Identity::generate("A"), Identity::generate("A"));
        assert_ne!(a.log.uuid, b.log.uuid);
        assert_ne!(a.salt, b.salt);
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let good = Identity::generate("USAGE_3").encode().into_bytes();
        for at in 0..good.len() {
            for flip in [1, 0x80] {
                let mut bad = good.clone();
                bad[at] ^= flip;
                assert!(Identity::decode(&bad, "USAGE_3").is_err(), "byte {at}");
            }
            assert!(Identity::decode(&good[..at], "USAGE_3").is_err(), "cut at {at}");
        }
    }

    #[test]
    fn another_stream_and_another_format_are_named() {
        let text = Identity::generate("OUT_1").encode();
        let other = Identity::decode(text.as_bytes(), "OUT_2").unwrap_err();
        assert!(other.contains("\"OUT_1\", not \"OUT_2\""), "{other}");
        let newer = text.replace("format 1", "format 7");
        let newer = Identity::decode(newer.as_bytes(), "OUT_1").unwrap_err();
        assert!(newer.contains("format is 7"), "{newer}");
    }
}
