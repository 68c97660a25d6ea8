//! A shard's state ↔ the chunks of a checkpoint.
//!
//! Each chunk is a frame that holds one `Piece` and stands alone, so that encoding needs no more
//! memory than a chunk beside the state. Pieces come in any number and order; [`decode`] puts them
//! together. The format is versioned by [`FORMAT`] in the manifest and by the frame's schema.

use bytes::Bytes;
use meterr_connectors::checkpoint::CHUNK_LEN_MAX;
use meterr_connectors::frame::{self, Form};
use meterr_operators::dataflow::UsageUpdate;
use meterr_operators::dedupe::{DedupeState, Entry};
use meterr_operators::dictionary::Names;
use meterr_operators::shard::ShardState;

/// Version of the chunks' format, as manifests state it. Version 1 had no epochs of orgs; it is read.
pub const FORMAT: u16 = 2;

/// A frame of a piece. The store adds a frame of its own, for which a little room is left.
const FORM: Form = Form { kind: 100, schema: FORMAT, len_max: (CHUNK_LEN_MAX - 64) as u32 };

/// Memory a piece may take when decoded: a chunk of the smallest rows is some times its bytes.
const MEMORY_MAX: usize = 32 * CHUNK_LEN_MAX;

#[derive(Debug, bincode::Encode, bincode::Decode)]
enum Piece {
    /// Everything that is small: positions, buckets, epochs with dead letters.
    Head {
        ids: DedupeState,
        log_time: i64,
        usage_position: u64,
    },
    Names(Names),
    Usage(Vec<UsageUpdate>),
    Entries(Vec<(Entry, u32)>),
    Changed(Vec<(u64, Entry, u32)>),
    Dead(Vec<(u64, u32)>),
    /// Org by number, and the epoch that changed it last.
    Epochs(Vec<(u32, u64)>),
}

/// Encodes a state, and the epochs that changed its orgs last.
///
/// # Errors
/// When a single row does not fit a chunk, which no accepted input can cause.
pub fn encode(state: ShardState, epochs: Vec<(u32, u64)>) -> Result<Vec<Bytes>, frame::FrameError> {
    let ShardState { names, usage, mut ids, log_time, usage_position, dead } = state;
    let mut chunks = Vec::new();
    pieces(&mut chunks, dead, 2_000, Piece::Dead)?;
    pieces(&mut chunks, std::mem::take(&mut ids.entries), 1_000, Piece::Entries)?;
    pieces(&mut chunks, std::mem::take(&mut ids.changed), 1_000, Piece::Changed)?;
    put(&mut chunks, &Piece::Head { ids, log_time, usage_position })?;
    // Names hold each other's numbers, so kinds go in the order in which they refer.
    let Names { symbols, orgs, users, rates, labels, org_models, org_features } = names;
    let wrap = |list| Piece::Names(Names { symbols: list, ..Names::default() });
    pieces(&mut chunks, symbols, 200, wrap)?;
    let wrap = |list| Piece::Names(Names { orgs: list, ..Names::default() });
    pieces(&mut chunks, orgs, 200, wrap)?;
    let wrap = |list| Piece::Names(Names { users: list, ..Names::default() });
    pieces(&mut chunks, users, 200, wrap)?;
    let wrap = |list| Piece::Names(Names { org_models: list, ..Names::default() });
    pieces(&mut chunks, org_models, 2_000, wrap)?;
    let wrap = |list| Piece::Names(Names { org_features: list, ..Names::default() });
    pieces(&mut chunks, org_features, 2_000, wrap)?;
    let wrap = |list| Piece::Names(Names { rates: list, ..Names::default() });
    pieces(&mut chunks, rates, 1_000, wrap)?;
    let wrap = |list| Piece::Names(Names { labels: list, ..Names::default() });
    pieces(&mut chunks, labels, 200, wrap)?;
    pieces(&mut chunks, usage, 500, Piece::Usage)?;
    pieces(&mut chunks, epochs, 4_000, Piece::Epochs)?;
    Ok(chunks)
}

fn pieces<T>(
    chunks: &mut Vec<Bytes>,
    list: Vec<T>,
    most: usize,
    wrap: impl Fn(Vec<T>) -> Piece,
) -> Result<(), frame::FrameError> {
    let mut list = list.into_iter().peekable();
    while list.peek().is_some() {
        put(chunks, &wrap(list.by_ref().take(most).collect()))?;
    }
    Ok(())
}

fn put(chunks: &mut Vec<Bytes>, piece: &Piece) -> Result<(), frame::FrameError> {
    chunks.push(frame::encode::<Piece, MEMORY_MAX>(FORM, piece)?.into());
    Ok(())
}

/// Decodes the chunks of one checkpoint.
///
/// # Errors
/// When a chunk is not what [`encode`] writes.
pub fn decode(chunks: &[Bytes]) -> Result<(ShardState, Vec<(u32, u64)>), frame::FrameError> {
    let mut state = ShardState::default();
    let mut epochs = Vec::new();
    for chunk in chunks {
        // Every version's pieces are among those of the newest.
        let frame = frame::open(FORM, chunk)?;
        match frame::payload::<Piece, MEMORY_MAX>(frame.payload)? {
            Piece::Head { ids, log_time, usage_position } => {
                let entries = std::mem::take(&mut state.ids.entries);
                let changed = std::mem::take(&mut state.ids.changed);
                state.ids = DedupeState { entries, changed, ..ids };
                state.log_time = log_time;
                state.usage_position = usage_position;
            }
            Piece::Names(more) => {
                let names = &mut state.names;
                names.symbols.extend(more.symbols);
                names.orgs.extend(more.orgs);
                names.users.extend(more.users);
                names.rates.extend(more.rates);
                names.labels.extend(more.labels);
                names.org_models.extend(more.org_models);
                names.org_features.extend(more.org_features);
            }
            Piece::Usage(rows) => state.usage.extend(rows),
            Piece::Entries(entries) => state.ids.entries.extend(entries),
            Piece::Changed(changed) => state.ids.changed.extend(changed),
            Piece::Dead(dead) => state.dead.extend(dead),
            Piece::Epochs(kept) => epochs.extend(kept),
        }
    }
    Ok((state, epochs))
}
