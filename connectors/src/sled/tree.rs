//! Reading and writing checkpoints in the tree of an open database. Stateless.

use bytes::Bytes;
use meterr_operators::ids::{SHARDS_MAX, ShardId};

use super::directory::Fail;
use super::layout;
use crate::checkpoint::{CheckpointError, Manifest};
use crate::checkpoint_record::{
    CHUNK_FORM, Place, Record, Slot, SlotAt, Sound, Stored, record_hash, refused, walk,
};
use crate::frame::{self, FrameError, HEADER_LEN};

/// Slots of a shard in ascending order.
pub(super) type Slots = Vec<SlotAt>;

/// Most keys removed at a time, which bounds what a removal holds in memory.
const REMOVE_KEYS_MAX: usize = 1024;

/// Writes the layout's version into a new database.
pub(super) fn put_schema(db: &sled::Db) -> Result<(), Fail> {
    let frame = frame::seal(layout::STORE_FORM, &[]);
    let frame = frame.map_err(|error| Fail::Damaged(error.to_string()))?;
    db.insert(layout::STORE_KEY, frame)?;
    Ok(())
}

/// Checks that the database is one of ours in a known layout.
pub(super) fn check_schema(db: &sled::Db) -> Result<(), Fail> {
    let Some(frame) = db.get(layout::STORE_KEY)? else {
        return Err(Fail::Damaged("the version of the layout is missing".to_owned()));
    };
    match frame::open(layout::STORE_FORM, &frame) {
        Ok(_) => Ok(()),
        Err(FrameError::Newer { found, known }) => {
            Err(CheckpointError::Newer { found, known }.into())
        }
        Err(error) => Err(Fail::Damaged(format!("version of the layout: {error}"))),
    }
}

/// All manifests of a shard.
pub(super) fn slots(db: &sled::Db, shard: u16) -> Result<Slots, Fail> {
    let range = layout::manifests_from(shard, (0, 0))..layout::manifests_end(shard);
    let mut slots = Slots::new();
    for item in db.range(range) {
        let (key, value) = item?;
        let Some((_, place)) = layout::manifest_place(&key) else {
            return Err(Fail::Damaged("a key among the manifests names no place".to_owned()));
        };
        slots.push((place, Slot::read(&value, shard, place.0, place.1)));
    }
    Ok(slots)
}

/// Shards that have a manifest.
pub(super) fn shards(db: &sled::Db) -> Result<Vec<ShardId>, Fail> {
    let (mut from, end) = layout::all_manifests();
    let mut shards = Vec::new();
    while let Some(item) = db.range(from..end.clone()).next() {
        let (key, _) = item?;
        let Some((shard, _)) = layout::manifest_place(&key).filter(|(s, _)| *s < SHARDS_MAX) else {
            return Err(Fail::Damaged("a key among the manifests names no shard".to_owned()));
        };
        shards.push(ShardId(shard));
        from = layout::manifests_end(shard);
    }
    Ok(shards)
}

/// Chunks of a checkpoint, or what is wrong with them. Reads no more than the manifest says.
pub(super) fn chunks(
    db: &sled::Db,
    manifest: &Manifest,
) -> Result<Result<Vec<Bytes>, String>, Fail> {
    let place = (manifest.generation, manifest.index);
    let range =
        layout::chunks_from(manifest.shard, place)..layout::chunks_end(manifest.shard, place);
    let mut chunks = Vec::new();
    let mut frame = Vec::with_capacity(HEADER_LEN + CHUNK_FORM.len_max as usize);
    let mut next = (0_u32, 0_u16);
    for item in db.range(range) {
        let (key, value) = item?;
        let Some((_, _, chunk, piece)) = layout::piece_place(&key) else {
            return Ok(Err("a key among the chunks names no place".to_owned()));
        };
        if (chunk, piece) == (next.0 + 1, 0) {
            match opened(&frame) {
                Ok(bytes) => chunks.push(bytes),
                Err(problem) => return Ok(Err(format!("chunk {}: {problem}", next.0))),
            }
            frame.clear();
        } else if (chunk, piece) != next {
            return Ok(Err(format!("chunk {} is not complete", next.0)));
        }
        if chunk >= manifest.chunks || frame.len() + value.len() > frame.capacity() {
            return Ok(Err(format!("there is more than the {} chunks written", manifest.chunks)));
        }
        frame.extend_from_slice(&value);
        // A chunk has at most 16 pieces and the count of chunks is a u32, so neither can overflow
        // before the checks above end the loop.
        next = (chunk, piece + 1);
    }
    if !frame.is_empty() {
        match opened(&frame) {
            Ok(bytes) => chunks.push(bytes),
            Err(problem) => return Ok(Err(format!("chunk {}: {problem}", next.0))),
        }
    }
    Ok(Ok(chunks))
}

fn opened(frame: &[u8]) -> Result<Bytes, FrameError> {
    Ok(Bytes::copy_from_slice(frame::open(CHUNK_FORM, frame)?.payload))
}

/// Walks a generation, keeping of each sound checkpoint what `take` makes of it.
pub(super) fn walk_generation<T>(
    db: &sled::Db,
    slots: &[SlotAt],
    format_known: u16,
    take: impl FnMut(&Stored, Vec<Bytes>) -> T,
) -> Result<Sound<T>, Fail> {
    walk(slots, format_known, |manifest| chunks(db, manifest), take)
}

/// Writes the chunks of a checkpoint.
pub(super) fn put_chunks(
    db: &sled::Db,
    shard: u16,
    place: Place,
    chunks: &[Bytes],
) -> Result<(), Fail> {
    for (number, chunk) in (0_u32..).zip(chunks) {
        let frame = frame::seal(CHUNK_FORM, chunk).map_err(|error| refused(error.to_string()))?;
        for (piece, bytes) in (0_u16..).zip(frame.chunks(layout::PIECE_LEN)) {
            db.insert(layout::piece_key(shard, place, number, piece), bytes)?;
        }
    }
    Ok(())
}

/// Writes a manifest; its hash.
pub(super) fn put_manifest(db: &sled::Db, record: &Record) -> Result<[u8; 32], Fail> {
    let bytes = record.encode().map_err(|error| refused(error.to_string()))?;
    let Manifest { shard, generation, index, .. } = record.manifest;
    let hash = record_hash(&bytes);
    db.insert(layout::manifest_key(shard, (generation, index)), bytes)?;
    Ok(hash)
}

/// Writes chunks and manifest, into a database that is not in use yet.
pub(super) fn put_checkpoint(db: &sled::Db, record: &Record, chunks: &[Bytes]) -> Result<(), Fail> {
    let Manifest { shard, generation, index, .. } = record.manifest;
    put_chunks(db, shard, (generation, index), chunks)?;
    put_manifest(db, record).map(drop)
}

/// Removes the manifests in a range of keys, newest first, so that a crash leaves chains that are
/// whole from their base on. Says whether there was any.
pub(super) fn remove_manifests(db: &sled::Db, from: Vec<u8>, end: Vec<u8>) -> Result<bool, Fail> {
    let mut any = false;
    for key in db.range(from..end).keys().rev() {
        db.remove(key?)?;
        any = true;
    }
    Ok(any)
}

/// Removes everything in a range of keys.
pub(super) fn remove(db: &sled::Db, from: &[u8], end: &[u8]) -> Result<(), Fail> {
    loop {
        let keys = db.range(from..end).keys().take(REMOVE_KEYS_MAX);
        let keys = keys.collect::<Result<Vec<_>, _>>()?;
        for key in &keys {
            db.remove(key)?;
        }
        if keys.len() < REMOVE_KEYS_MAX {
            return Ok(());
        }
    }
}

/// Removes chunks that no manifest stands for, which writes that did not end leave behind.
pub(super) fn remove_orphans(db: &sled::Db) -> Result<(), Fail> {
    let (mut from, end) = layout::all_chunks();
    while let Some(key) = db.range(from..end.clone()).keys().next() {
        let key = key?;
        let Some((shard, place, ..)) = layout::piece_place(&key) else {
            return Err(Fail::Damaged("a key among the chunks names no place".to_owned()));
        };
        let chunks_end = layout::chunks_end(shard, place);
        if !db.contains_key(layout::manifest_key(shard, place))? {
            remove(db, &key, &chunks_end)?;
        }
        from = chunks_end;
    }
    Ok(())
}

/// Bytes of all chunks that a manifest stands for.
pub(super) fn live_bytes(db: &sled::Db) -> Result<u64, Fail> {
    let mut bytes = 0_u64;
    for shard in shards(db)? {
        let slots = slots(db, shard.0)?;
        let sizes = slots.iter().filter_map(|(_, slot)| slot.sound());
        bytes = sizes.fold(bytes, |sum, s| sum.saturating_add(s.record.manifest.bytes));
    }
    Ok(bytes)
}

/// Gives everything of one generation as it is, without reading it.
pub(super) fn copy_raw(
    from: &sled::Db,
    shard: u16,
    generation: u64,
    mut put: impl FnMut(sled::IVec, sled::IVec),
) -> Result<(), Fail> {
    let after = generation.checked_add(1);
    let end = |key: fn(u16, Place) -> Vec<u8>, end: fn(u16) -> Vec<u8>| match after {
        Some(after) => key(shard, (after, 0)),
        None => end(shard),
    };
    let chunks_end = end(layout::chunks_from, layout::shard_chunks_end);
    let manifests_end = end(layout::manifests_from, layout::manifests_end);
    let chunks = layout::chunks_from(shard, (generation, 0))..chunks_end;
    let manifests = layout::manifests_from(shard, (generation, 0))..manifests_end;
    for item in from.range(chunks).chain(from.range(manifests)) {
        let (key, value) = item?;
        put(key, value);
    }
    Ok(())
}
