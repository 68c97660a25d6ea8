//! Objects as they stand in the store: compressed, and with a key encrypted. Pure.
//!
//! ```text
//! "meterrbk" | u8 format | u8 kind | u8 0 | zstd(content)
//! "meterrbk" | u8 format | u8 kind | u8 1 | 8 bytes key number | 24 bytes nonce
//!                                         | XChaCha20-Poly1305(zstd(content)), with all before it and
//!                                           the object's name as associated data
//! ```
//!
//! Three keys are derived from the one given (BLAKE3 `derive_key`): for content, for names, for nonces.
//! A name is the BLAKE3 hash of the content, keyed if there is a key. The nonce is a keyed hash of what
//! it encrypts, so the same content gives the same object (writing it again changes nothing) and no
//! nonce is used for two contents; that a repeated content shows is of no use, since it has one name.
//! The key number, derived too, tells a wrong key from a damaged object.

use std::fmt;
use std::io::Read;

use base64::Engine;
use bytes::Bytes;
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{XChaCha20Poly1305, XNonce};

/// Format of objects.
const FORMAT: u8 = 1;
const MAGIC: &[u8; 8] = b"meterrbk";
const HEAD: usize = 11;
const NONCE: usize = 24;
const LEVEL: i32 = 3;

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Segment = 1,
    Manifest = 2,
}

/// Encrypts a store. Kept out of messages.
#[derive(Clone)]
pub struct Key {
    cipher: XChaCha20Poly1305,
    names: [u8; 32],
    nonces: [u8; 32],
    number: [u8; 8],
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(..)")
    }
}

/// A text that is no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "not a key: 32 bytes are needed, as 64 hexadecimal digits or 44 characters of base64, such as \
     `openssl rand -hex 32` prints"
)]
pub struct KeyError;

impl Key {
    /// The key of 32 bytes.
    pub fn new(secret: &[u8; 32]) -> Key {
        let derived = |what| blake3::derive_key(what, secret);
        let mut number = [0; 8];
        number.copy_from_slice(&derived("meterr 2026-11 backup key number")[..8]);
        let cipher = XChaCha20Poly1305::new(&derived("meterr 2026-11 backup content").into());
        Key {
            cipher,
            names: derived("meterr 2026-11 backup names"),
            nonces: derived("meterr 2026-11 backup nonces"),
            number,
        }
    }

    /// Reads a key: 64 hexadecimal digits, or base64 of 32 bytes; space around it does not matter.
    ///
    /// # Errors
    /// When it is none. The message does not repeat the text.
    pub fn parse(text: &str) -> Result<Key, KeyError> {
        let text = text.trim();
        let bytes = match text.len() {
            64 => hex(text).ok_or(KeyError)?,
            _ => base64::engine::general_purpose::STANDARD.decode(text).map_err(|_| KeyError)?,
        };
        let secret: [u8; 32] = bytes.try_into().map_err(|_| KeyError)?;
        Ok(Key::new(&secret))
    }
}

fn hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: &u8| char::from(*byte).to_digit(16);
    let pair = |pair: &[u8]| u8::try_from(digit(pair.first()?)? * 16 + digit(pair.get(1)?)?).ok();
    text.as_bytes().chunks(2).map(pair).collect()
}

/// Why an object cannot be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Unusable {
    Damaged(String),
    Newer(u32),
    /// Encrypted; whether a key was given.
    Locked(bool),
}

fn damaged(what: impl Into<String>) -> Unusable {
    Unusable::Damaged(what.into())
}

/// The hash that names a content, hexadecimal.
pub(super) fn hash(key: Option<&Key>, content: &[u8]) -> String {
    let hash = match key {
        Some(key) => blake3::keyed_hash(&key.names, content),
        None => blake3::hash(content),
    };
    hash.to_hex().to_string()
}

/// The object of a content.
pub(super) fn seal(
    key: Option<&Key>,
    kind: Kind,
    name: &str,
    content: &[u8],
) -> Result<Bytes, String> {
    let packed = zstd::bulk::compress(content, LEVEL).map_err(|e| format!("compressing: {e}"))?;
    let mut object = Vec::with_capacity(packed.len() + 64);
    object.extend_from_slice(MAGIC);
    object.extend_from_slice(&[FORMAT, kind as u8, u8::from(key.is_some())]);
    let Some(key) = key else {
        object.extend_from_slice(&packed);
        return Ok(object.into());
    };
    object.extend_from_slice(&key.number);
    let mut nonces = blake3::Hasher::new_keyed(&key.nonces);
    nonces.update(&(name.len() as u64).to_le_bytes()).update(name.as_bytes()).update(&packed);
    let mut nonce = [0; NONCE];
    nonce.copy_from_slice(&nonces.finalize().as_bytes()[..NONCE]);
    object.extend_from_slice(&nonce);
    let aad = [object.as_slice(), name.as_bytes()].concat();
    let sealed = key
        .cipher
        .encrypt(&XNonce::from(nonce), Payload { msg: &packed, aad: &aad })
        .map_err(|_| "encrypting failed".to_owned())?;
    object.extend_from_slice(&sealed);
    Ok(object.into())
}

/// The content of an object, of at most `len_max` bytes.
pub(super) fn open(
    key: Option<&Key>,
    kind: Kind,
    name: &str,
    object: &[u8],
    len_max: usize,
) -> Result<Bytes, Unusable> {
    let (head, rest) = object.split_at_checked(HEAD).ok_or_else(|| damaged("it is too short"))?;
    if !head.starts_with(MAGIC) {
        return Err(damaged("it is no object of a backup"));
    }
    match head[MAGIC.len()..] {
        [FORMAT, found, _] if found != kind as u8 => Err(damaged("it is of another kind")),
        [FORMAT, _, 0] => unpack(rest, len_max),
        [FORMAT, _, 1] => {
            let (number, sealed) =
                rest.split_at_checked(8).ok_or_else(|| damaged("it is too short"))?;
            let key = key.ok_or(Unusable::Locked(false))?;
            if number != key.number {
                return Err(Unusable::Locked(true));
            }
            let (nonce, sealed) =
                sealed.split_at_checked(NONCE).ok_or_else(|| damaged("it is too short"))?;
            let aad = [&object[..HEAD + 8 + NONCE], name.as_bytes()].concat();
            let nonce: [u8; NONCE] = nonce.try_into().map_err(|_| damaged("it is too short"))?;
            let packed = key
                .cipher
                .decrypt(&XNonce::from(nonce), Payload { msg: sealed, aad: &aad })
                .map_err(|_| damaged("it is not what was encrypted under its name"))?;
            unpack(&packed, len_max)
        }
        [found, ..] if found > FORMAT => Err(Unusable::Newer(found.into())),
        _ => Err(damaged("its head is not one that was ever written")),
    }
}

fn unpack(packed: &[u8], len_max: usize) -> Result<Bytes, Unusable> {
    let failed = |e: std::io::Error| damaged(format!("it cannot be unpacked: {e}"));
    let mut decoder =
        zstd::stream::read::Decoder::with_buffer(packed).map_err(failed)?.single_frame();
    let mut content = Vec::new();
    decoder.by_ref().take(len_max as u64 + 1).read_to_end(&mut content).map_err(failed)?;
    if content.len() > len_max {
        return Err(damaged(format!("its content is larger than {len_max} bytes")));
    }
    if !decoder.finish().is_empty() {
        return Err(damaged("bytes follow its end"));
    }
    Ok(content.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key(n: u8) -> Key {
        Key::new(&[n; 32])
    }

    #[test]
    fn a_key_is_read_in_two_forms_and_shown_in_none() {
        let hex = "07".repeat(32);
        let base64 = base64::engine::general_purpose::STANDARD.encode([7; 32]);
        for text in [hex.as_str(), base64.as_str(), &format!(" {hex}\n")] {
            assert_eq!(Key::parse(text).unwrap().number, key(7).number);
        }
        for wrong in ["", "07", &"0x".repeat(32), &"ü".repeat(32), &hex[1..], &base64[2..]] {
            assert_eq!(Key::parse(wrong).unwrap_err(), KeyError, "{wrong}");
        }
        assert_eq!(format!("{:?}", key(7)), "Key(..)");
    }

    #[test]
    fn names_show_nothing_across_keys() {
        let names = [None, Some(key(1)), Some(key(2))].map(|key| hash(key.as_ref(), b"the same"));
        assert!(names[0] != names[1] && names[1] != names[2] && names[0] != names[2]);
        assert_eq!(names[1], hash(Some(&key(1)), b"the same"));
    }

    #[test]
    fn an_object_is_opened_by_its_key_under_its_name_as_its_kind() {
        let sealed = seal(Some(&key(1)), Kind::Segment, "a", b"content").unwrap();
        let open = |key: Option<&Key>, kind, name| open(key, kind, name, &sealed, 100);
        assert_eq!(open(Some(&key(1)), Kind::Segment, "a").unwrap(), "content");
        assert_eq!(open(Some(&key(2)), Kind::Segment, "a"), Err(Unusable::Locked(true)));
        assert_eq!(open(None, Kind::Segment, "a"), Err(Unusable::Locked(false)));
        for (kind, name) in [(Kind::Segment, "b"), (Kind::Manifest, "a")] {
            assert!(matches!(open(Some(&key(1)), kind, name), Err(Unusable::Damaged(_))));
        }
    }

    #[test]
    fn a_later_format_and_a_bomb_are_named() {
        let mut later = seal(None, Kind::Segment, "a", b"x").unwrap().to_vec();
        later[8] = 2;
        assert_eq!(open(None, Kind::Segment, "a", &later, 9), Err(Unusable::Newer(2)));
        let bomb = seal(None, Kind::Segment, "a", &vec![0; 10_000_000]).unwrap();
        assert!(bomb.len() < 2000);
        let refused = open(None, Kind::Segment, "a", &bomb, 9_999_999).unwrap_err();
        assert_eq!(refused, damaged("its content is larger than 9999999 bytes"));
    }

    proptest! {
        #[test]
        fn content_survives(content in prop::collection::vec(any::<u8>(), 0..2000), keyed in any::<bool>()) {
            let key = keyed.then(|| key(9));
            let sealed = seal(key.as_ref(), Kind::Manifest, "n", &content).unwrap();
            prop_assert_eq!(&open(key.as_ref(), Kind::Manifest, "n", &sealed, 2000).unwrap()[..], &content[..]);
            prop_assert_eq!(seal(key.as_ref(), Kind::Manifest, "n", &content).unwrap(), sealed);
        }

        #[test]
        fn no_changed_byte_of_an_encrypted_object_passes(at in any::<prop::sample::Index>(), with in 1..=255_u8) {
            let mut sealed = seal(Some(&key(1)), Kind::Segment, "a", b"content").unwrap().to_vec();
            let at = at.index(sealed.len());
            sealed[at] ^= with;
            prop_assert!(open(Some(&key(1)), Kind::Segment, "a", &sealed, 100).is_err());
        }

        #[test]
        fn any_bytes_are_opened_or_refused(mut bytes in prop::collection::vec(any::<u8>(), 0..100), head in any::<bool>()) {
            if head {
                bytes.splice(0..0, *b"meterrbk\x01\x01\x00");
            }
            let _ = open(None, Kind::Segment, "a", &bytes, 100);
        }
    }
}
