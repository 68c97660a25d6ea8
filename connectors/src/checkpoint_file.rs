//! One generation of a shard's checkpoints as a file: backup, hand-over to another machine, and the
//! golden files that hold later versions to today's format.
//!
//! ```text
//! header frame    shard, generation, number of checkpoints
//! per checkpoint  manifest frame, then one frame per chunk, in order
//! end frame       blake3 of every byte before it
//! ```
//!
//! Nothing follows the end frame. A file is believed only as a whole: a cut or changed file is
//! refused before anything of it is written to a store. Whatever the bytes, memory stays in
//! proportion to what was really read, and at most [`FILE_LEN_MAX`] bytes are read.
//!
//! Crash behaviour: an import writes checkpoint by checkpoint, base first, so a crash leaves a
//! shorter chain that is sound, which a new import leaves behind as an older generation. An export
//! that was interrupted lacks its end and is refused on import.

use std::io::{Read, Write};

use bytes::Bytes;
use meterr_operators::ids::ShardId;

use crate::checkpoint::{CHUNK_LEN_MAX, Chain, CheckpointError, CheckpointStore, Kind, Manifest};
use crate::checkpoint_record::{
    CHUNK_FORM, MANIFEST_FORM, NO_PREVIOUS, Record, Slot, Stored, problem_of, problem_of_link,
    record_hash,
};
use crate::frame::{self, Form, FrameError, HEADER_LEN, Header};

/// Most bytes of a file that an import reads.
pub const FILE_LEN_MAX: u64 = 8 << 30;

const HEADER_FORM: Form = Form { kind: 3, schema: 1, len_max: 64 };
const END_FORM: Form = Form { kind: 4, schema: 1, len_max: 32 };

#[derive(Debug, Clone, PartialEq, Eq, bincode::Encode, bincode::Decode)]
struct FileHeader {
    shard: u16,
    generation: u64,
    checkpoints: u32,
}

/// What was exported or imported.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Transferred {
    /// The shard.
    pub shard: u16,
    /// The generation; on import the one it has in the store now.
    pub generation: u64,
    /// Base and deltas.
    pub checkpoints: u32,
    /// Bytes of all chunks.
    pub bytes: u64,
    /// Last usage position contained.
    pub usage_position: u64,
    /// Last committed epoch contained.
    pub epoch: u64,
}

impl Transferred {
    fn of(chain: &Chain, generation: u64) -> Option<Transferred> {
        let (last, _) = chain.last()?;
        Some(Transferred {
            shard: last.shard,
            generation,
            checkpoints: chain.len() as u32,
            bytes: chain.iter().map(|(manifest, _)| manifest.bytes).sum(),
            usage_position: last.usage_position,
            epoch: last.epoch,
        })
    }
}

fn unsound(what: impl Into<String>) -> CheckpointError {
    CheckpointError::File { what: what.into() }
}

fn framed(what: &str, error: FrameError) -> CheckpointError {
    match error {
        FrameError::Newer { found, known } => CheckpointError::Newer { found, known },
        error => unsound(format!("{what}: {error}")),
    }
}

/// Writes the newest sound generation of a shard. Flushes the writer; making the file durable is the
/// caller's.
///
/// # Errors
/// When the shard has no checkpoint that verifies, the store cannot be read, or writing fails.
pub fn export(
    store: &dyn CheckpointStore,
    shard: ShardId,
    writer: impl Write,
) -> Result<Transferred, CheckpointError> {
    let chain = store.load(shard, None)?.unwrap_or_default();
    let Some((base, _)) = chain.first() else {
        return Err(unsound(format!("shard {shard} has no checkpoint that verifies")));
    };
    let generation = base.generation;
    let header = FileHeader { shard: shard.0, generation, checkpoints: chain.len() as u32 };
    let mut out = HashedWriter { writer, hasher: blake3::Hasher::new() };
    let header = frame::encode::<_, 1024>(HEADER_FORM, &header);
    out.put(&header.map_err(|error| framed("header", error))?)?;
    let mut previous = NO_PREVIOUS;
    for (manifest, chunks) in &chain {
        let record = Record { manifest: manifest.clone(), previous };
        let record = record.encode().map_err(|error| framed("manifest", error))?;
        previous = record_hash(&record);
        out.put(&record)?;
        for chunk in chunks {
            out.put(&frame::seal(CHUNK_FORM, chunk).map_err(|error| framed("chunk", error))?)?;
        }
    }
    let hash = *out.hasher.finalize().as_bytes();
    out.put(&frame::seal(END_FORM, &hash).map_err(|error| framed("end", error))?)?;
    out.writer.flush().map_err(|error| unsound(format!("writing: {error}")))?;
    Transferred::of(&chain, generation).ok_or_else(|| unsound("nothing was exported"))
}

/// Reads a whole file and checks all of it. Touches no store.
///
/// # Errors
/// When anything of the file is not as an export wrote it.
pub fn read(reader: impl Read) -> Result<Chain, CheckpointError> {
    let mut input = HashedReader { reader, hasher: blake3::Hasher::new(), read: 0 };
    let header = input.frame(HEADER_FORM, "header")?;
    let header: FileHeader =
        frame::payload::<_, 1024>(&header.payload).map_err(|error| framed("header", error))?;
    if header.checkpoints == 0 {
        return Err(unsound("it holds no checkpoint"));
    }
    let mut chain = Chain::new();
    let mut previous: Option<Stored> = None;
    for index in 0..header.checkpoints {
        let name = format!("manifest {index}");
        let bytes = input.frame(MANIFEST_FORM, &name)?.whole;
        let stored = match Slot::read(&bytes, header.shard, header.generation, index) {
            Slot::Sound(stored) => *stored,
            Slot::Newer { found, known } => return Err(CheckpointError::Newer { found, known }),
            Slot::Unsound(problem) => return Err(unsound(format!("{name}: {problem}"))),
        };
        if let Some(problem) = problem_of_link(previous.as_ref(), &stored.record) {
            return Err(unsound(format!("{name}: {problem}")));
        }
        let mut chunks = Vec::new();
        for chunk in 0..stored.record.manifest.chunks {
            let name = format!("chunk {chunk} of checkpoint {index}");
            chunks.push(Bytes::from(input.frame(CHUNK_FORM, &name)?.payload));
        }
        if let Some(problem) = problem_of(&stored.record.manifest, &chunks) {
            return Err(unsound(format!("checkpoint {index}: {problem}")));
        }
        chain.push((stored.record.manifest.clone(), chunks));
        previous = Some(stored);
    }
    let expected = *input.hasher.finalize().as_bytes();
    if input.frame(END_FORM, "end")?.payload != expected {
        return Err(unsound("its hash is not that of its content"));
    }
    let mut more = [0];
    match input.reader.read(&mut more) {
        Ok(0) => Ok(chain),
        Ok(_) => Err(unsound("bytes follow its end")),
        Err(error) => Err(unsound(format!("reading: {error}"))),
    }
}

/// Reads a file and adds its checkpoints to the store as the newest generation of its shard. The
/// generation keeps its number when the store has none as high, and gets the next one otherwise.
///
/// # Errors
/// When the file is not sound (nothing was written then), is of a format above `format_known`, or
/// the store fails.
pub fn import(
    store: &dyn CheckpointStore,
    format_known: u16,
    reader: impl Read,
) -> Result<Transferred, CheckpointError> {
    let chain = read(reader)?;
    let Some((base, _)) = chain.first() else { return Err(unsound("it holds no checkpoint")) };
    if base.format > format_known {
        return Err(CheckpointError::Newer { found: base.format, known: format_known });
    }
    let newest = store.list(base.shard_id())?.iter().map(|m| m.generation).max().unwrap_or(0);
    let generation = base.generation.max(newest.saturating_add(1));
    for (manifest, chunks) in &chain {
        debug_assert_eq!(manifest.kind == Kind::Base, manifest.index == 0);
        store.write(&Manifest { generation, ..manifest.clone() }, chunks)?;
    }
    Transferred::of(&chain, generation).ok_or_else(|| unsound("it holds no checkpoint"))
}

struct HashedWriter<W> {
    writer: W,
    hasher: blake3::Hasher,
}

impl<W: Write> HashedWriter<W> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.hasher.update(bytes);
        self.writer.write_all(bytes).map_err(|error| unsound(format!("writing: {error}")))
    }
}

/// A frame read from a file.
struct Read1 {
    payload: Vec<u8>,
    whole: Vec<u8>,
}

struct HashedReader<R> {
    reader: R,
    hasher: blake3::Hasher,
    read: u64,
}

impl<R: Read> HashedReader<R> {
    fn fill(&mut self, buffer: &mut [u8], name: &str) -> Result<(), CheckpointError> {
        self.read += buffer.len() as u64;
        if self.read > FILE_LEN_MAX {
            return Err(unsound(format!("it is longer than {FILE_LEN_MAX} bytes")));
        }
        self.reader.read_exact(buffer).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => unsound(format!("it ends inside the {name}")),
            _ => unsound(format!("reading the {name}: {error}")),
        })?;
        self.hasher.update(buffer);
        Ok(())
    }

    /// The next frame, which must be of this form. Allocates at most what the form allows.
    fn frame(&mut self, form: Form, name: &str) -> Result<Read1, CheckpointError> {
        debug_assert!(form.len_max as usize <= CHUNK_LEN_MAX);
        let mut head = [0; HEADER_LEN];
        self.fill(&mut head, name)?;
        let header = Header::read(form, &head).map_err(|error| framed(name, error))?;
        let mut payload = vec![0; header.len];
        self.fill(&mut payload, name)?;
        header.check(&payload).map_err(|error| framed(name, error))?;
        if header.schema != form.schema {
            let (found, known) = (header.schema, form.schema);
            return Err(framed(name, FrameError::Older { found, known }));
        }
        let whole =
            if form == MANIFEST_FORM { [&head, payload.as_slice()].concat() } else { vec![] };
        Ok(Read1 { payload, whole })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use proptest::sample::Index;

    use super::*;
    use crate::checkpoint_memory::MemoryCheckpointStore;
    use crate::checkpoint_testing::{checkpoint, load, said, write};

    fn filled() -> MemoryCheckpointStore {
        let store = MemoryCheckpointStore::new(1);
        write(&store, &checkpoint(6, 3, 0, 1, &[CHUNK_LEN_MAX, 10]));
        write(&store, &checkpoint(6, 4, 0, 1, &[2000, 0, 300]));
        write(&store, &checkpoint(6, 4, 1, 1, &[]));
        write(&store, &checkpoint(6, 4, 2, 1, &[70]));
        store
    }

    fn file() -> Vec<u8> {
        let mut file = Vec::new();
        export(&filled(), ShardId(6), &mut file).unwrap();
        file
    }

    #[test]
    fn what_is_exported_is_imported() {
        let source = filled();
        let mut file = Vec::new();
        let exported = export(&source, ShardId(6), &mut file).unwrap();
        let expected = Transferred {
            shard: 6,
            generation: 4,
            checkpoints: 3,
            bytes: 2370,
            usage_position: 40_020,
            epoch: 4002,
        };
        assert_eq!(exported, expected);
        let target = MemoryCheckpointStore::new(1);
        assert_eq!(import(&target, 1, file.as_slice()).unwrap(), expected);
        assert_eq!(load(&target, 6), load(&source, 6));

        // Where the number is taken it becomes the next one, content unchanged.
        let again = import(&target, 1, file.as_slice()).unwrap();
        assert_eq!(again, Transferred { generation: 5, ..expected });
        let chain = load(&target, 6).unwrap();
        let chunks = |chain: &Chain| chain.iter().map(|part| part.1.clone()).collect::<Vec<_>>();
        assert_eq!(chunks(&chain), chunks(&load(&source, 6).unwrap()));

        let none = export(&target, ShardId(1), Vec::new());
        assert_eq!(said(none), "checkpoint file: shard 1 has no checkpoint that verifies");
        let newer = import(&target, 0, file.as_slice());
        assert!(matches!(newer, Err(CheckpointError::Newer { found: 1, known: 0 })));
    }

    #[test]
    fn of_a_damaged_generation_the_part_that_verifies_is_exported() {
        let source = filled();
        assert!(source.damage(ShardId(6), 4, 2));
        let mut file = Vec::new();
        assert_eq!(export(&source, ShardId(6), &mut file).unwrap().checkpoints, 2);
        assert_eq!(read(file.as_slice()).unwrap().len(), 2);
    }

    #[test]
    fn a_file_is_believed_only_as_a_whole() {
        let file = file();
        let read = |bytes: &[u8]| said(read(bytes));
        assert_eq!(read(b""), "checkpoint file: it ends inside the header");
        let cut = read(&file[..file.len() - 1]);
        assert_eq!(cut, "checkpoint file: it ends inside the end");
        assert_eq!(
            read(&[file.as_slice(), b"x"].concat()),
            "checkpoint file: bytes follow its end"
        );

        // Frames that are sound each, but not those that were written together.
        let end = file.len() - HEADER_LEN - 32;
        let other_end = frame::seal(END_FORM, &[0; 32]).unwrap();
        let text = read(&[&file[..end], other_end.as_slice()].concat());
        assert_eq!(text, "checkpoint file: its hash is not that of its content");
        let header = |generation: u64, checkpoints: u32| {
            let header = FileHeader { shard: 6, generation, checkpoints };
            frame::encode::<_, 1024>(HEADER_FORM, &header).unwrap()
        };
        let text = read(&[header(5, 3).as_slice(), &file[header(4, 3).len()..]].concat());
        assert!(text.contains("generation 4, index 0 stands in this place"), "{text}");
        assert_eq!(read(&header(4, 0)), "checkpoint file: it holds no checkpoint");
        let newer = Form { schema: 2, ..HEADER_FORM };
        let text = read(&frame::seal(newer, &[0; 8]).unwrap());
        assert!(text.starts_with("checkpoint format 2 is newer"), "{text}");
    }

    #[test]
    fn nothing_of_a_bad_file_reaches_the_store() {
        let file = file();
        let target = MemoryCheckpointStore::new(1);
        assert!(import(&target, 1, &file[..file.len() - 10]).is_err());
        assert_eq!(target.shards().unwrap(), []);
    }

    proptest! {
        #[test]
        fn any_change_is_noticed(at in any::<Index>(), flip in 1..=255_u8, cut in any::<bool>()) {
            let mut bytes = file();
            let at = at.index(bytes.len());
            if cut { bytes.truncate(at) } else { bytes[at] ^= flip }
            prop_assert!(read(bytes.as_slice()).is_err());
        }

        #[test]
        fn arbitrary_bytes_never_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            keep in any::<Index>(),
        ) {
            prop_assert!(read(bytes.as_slice()).is_err());
            let file = file();
            let mixed = [&file[..keep.index(file.len())], bytes.as_slice()].concat();
            prop_assert!(read(mixed.as_slice()).is_err());
        }
    }
}
