//! Where things stand in the one tree of the database.
//!
//! ```text
//! "f"                                              store format: a STORE_FORM frame
//! "m" shard generation index                       manifest: a framed record
//! "c" shard generation index chunk piece           part of a framed chunk
//! ```
//!
//! shard and piece are u16, generation is u64, index and chunk are u32, all big endian, so that keys
//! sort by shard, then by age. A chunk's frame is cut into pieces of [`PIECE_LEN`] bytes.
//!
//! Why pieces: sled writes a page above 128 KiB less a header into a file of its own, which it never
//! syncs. A page is a leaf with all its values, and a leaf is split by the number of its items (17
//! and more), never by their size; while leaves merge it may hold 20. So a value must stay below a
//! twentieth of 128 KiB. At this length the fullest leaf has 82 KiB.

use meterr_operators::ids::SHARDS_MAX;

use crate::checkpoint::CHUNK_LEN_MAX;
use crate::checkpoint_record::Place;
use crate::frame::{Form, HEADER_LEN};

/// Version of this layout. A database of a newer one is not touched.
pub const STORE_SCHEMA: u16 = 1;

/// Form of the value that states the layout's version; its payload is empty.
pub const STORE_FORM: Form = Form { kind: 5, schema: STORE_SCHEMA, len_max: 64 };

/// Key of the value that states the layout's version.
pub const STORE_KEY: &[u8] = b"f";

/// Largest value: a sixteenth of the largest framed chunk.
pub const PIECE_LEN: usize = (CHUNK_LEN_MAX + HEADER_LEN).div_ceil(16);

const MANIFEST: u8 = b'm';
const CHUNK: u8 = b'c';

/// Key of a manifest.
pub fn manifest_key(shard: u16, (generation, index): Place) -> Vec<u8> {
    place_key(MANIFEST, shard, generation, index)
}

/// Where the manifests of a shard begin, from a place on.
pub fn manifests_from(shard: u16, place: Place) -> Vec<u8> {
    manifest_key(shard, place)
}

/// Where the manifests of a shard end (a key that is above all of them).
pub fn manifests_end(shard: u16) -> Vec<u8> {
    after_shard(MANIFEST, shard)
}

/// The place a manifest's key names, with its shard.
pub fn manifest_place(key: &[u8]) -> Option<(u16, Place)> {
    let place = key.strip_prefix(&[MANIFEST])?;
    (place.len() == 14).then(|| place_of(place)).flatten()
}

/// Key of a piece of a chunk.
pub fn piece_key(shard: u16, (generation, index): Place, chunk: u32, piece: u16) -> Vec<u8> {
    let mut key = place_key(CHUNK, shard, generation, index);
    key.extend_from_slice(&chunk.to_be_bytes());
    key.extend_from_slice(&piece.to_be_bytes());
    key
}

/// The place, chunk and piece a key names, with its shard.
pub fn piece_place(key: &[u8]) -> Option<(u16, Place, u32, u16)> {
    let (place, rest) = key.strip_prefix(&[CHUNK])?.split_at_checked(14)?;
    let (chunk, piece) = rest.split_first_chunk::<4>()?;
    let (shard, place) = place_of(place)?;
    Some((shard, place, u32::from_be_bytes(*chunk), u16::from_be_bytes(piece.try_into().ok()?)))
}

/// Where the chunks of a shard begin, from a place on.
pub fn chunks_from(shard: u16, (generation, index): Place) -> Vec<u8> {
    place_key(CHUNK, shard, generation, index)
}

/// Where the chunks of one checkpoint end (a key that is above all of them).
pub fn chunks_end(shard: u16, (generation, index): Place) -> Vec<u8> {
    // Place and shard are followed by more bytes in every key, so a longer run of ones is above.
    match index.checked_add(1) {
        Some(next) => place_key(CHUNK, shard, generation, next),
        None => [place_key(CHUNK, shard, generation, index), vec![0xff; 7]].concat(),
    }
}

/// Where all chunks of a shard end.
pub fn shard_chunks_end(shard: u16) -> Vec<u8> {
    after_shard(CHUNK, shard)
}

/// All manifests: first key and a key above all.
pub fn all_manifests() -> (Vec<u8>, Vec<u8>) {
    (manifests_from(0, (0, 0)), vec![MANIFEST + 1])
}

/// All chunks: first key and a key above all.
pub fn all_chunks() -> (Vec<u8>, Vec<u8>) {
    (chunks_from(0, (0, 0)), vec![CHUNK + 1])
}

fn place_key(prefix: u8, shard: u16, generation: u64, index: u32) -> Vec<u8> {
    let mut key = Vec::with_capacity(21);
    key.push(prefix);
    key.extend_from_slice(&shard.to_be_bytes());
    key.extend_from_slice(&generation.to_be_bytes());
    key.extend_from_slice(&index.to_be_bytes());
    key
}

fn after_shard(prefix: u8, shard: u16) -> Vec<u8> {
    debug_assert!(shard < SHARDS_MAX);
    place_key(prefix, shard.saturating_add(1), 0, 0)
}

fn place_of(bytes: &[u8]) -> Option<(u16, Place)> {
    let (shard, rest) = bytes.split_first_chunk::<2>()?;
    let (generation, index) = rest.split_first_chunk::<8>()?;
    let index = u32::from_be_bytes(index.try_into().ok()?);
    Some((u16::from_be_bytes(*shard), (u64::from_be_bytes(*generation), index)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Segment size of sled divided by its minimum of items, less the headers.
    const BLOB_THRESHOLD: usize = 512 * 1024 / 4 - 20 - 32;

    #[test]
    fn the_fullest_leaf_stays_below_the_size_of_a_file_of_its_own() {
        let key = piece_key(255, (u64::MAX, u32::MAX), u32::MAX, u16::MAX).len();
        assert!(24 * (PIECE_LEN + key + 20) < BLOB_THRESHOLD);
        assert!((CHUNK_LEN_MAX + HEADER_LEN).div_ceil(PIECE_LEN) <= 16);
    }

    proptest! {
        #[test]
        fn keys_read_back_and_sort_by_place(
            a in (0..SHARDS_MAX, any::<u64>(), any::<u32>(), any::<u32>(), any::<u16>()),
            b in (0..SHARDS_MAX, any::<u64>(), any::<u32>(), any::<u32>(), any::<u16>()),
        ) {
            let piece = |k: (u16, u64, u32, u32, u16)| piece_key(k.0, (k.1, k.2), k.3, k.4);
            prop_assert_eq!(piece_place(&piece(a)), Some((a.0, (a.1, a.2), a.3, a.4)));
            prop_assert_eq!(piece(a).cmp(&piece(b)), a.cmp(&b));
            let manifest = manifest_key(a.0, (a.1, a.2));
            prop_assert_eq!(manifest_place(&manifest), Some((a.0, (a.1, a.2))));
            prop_assert!(manifest < manifests_end(a.0));
            prop_assert!(piece(a) >= chunks_from(a.0, (a.1, a.2)));
            prop_assert!(piece(a) < chunks_end(a.0, (a.1, a.2)));
            prop_assert!(chunks_end(a.0, (a.1, a.2)) <= shard_chunks_end(a.0));
        }

        #[test]
        fn other_keys_are_no_places(key in proptest::collection::vec(any::<u8>(), 0..24)) {
            if let Some((shard, place)) = manifest_place(&key) {
                prop_assert_eq!(manifest_key(shard, place), key);
            } else if let Some((shard, place, chunk, piece)) = piece_place(&key) {
                prop_assert_eq!(piece_key(shard, place, chunk, piece), key);
            }
        }
    }
}
