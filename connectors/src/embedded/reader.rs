//! Reading records, and checking all of them.
//!
//! Fresh records come from memory. Others come from the files: the sparse index tells where to
//! begin, at most 64 KiB before the record wanted, and frames are stepped over by their headers
//! from there. Every record returned has had its checksums and position verified.

use std::sync::Arc;

use crate::embedded::file::File;
use crate::embedded::recovery::{SCAN_BYTES, missing, read_trailer, zone_damages};
use crate::embedded::scan::{Look, Scan, Window, scan};
use crate::embedded::segment::{
    FRAME, FrameHead, HEADER, HeaderState, IndexEntry, check_header, decode_body, file_name,
};
use crate::embedded::state::{Budget, Sealed};
use crate::embedded::{Damage, Shared};
use crate::log::{LogError, LogResult, Record};

/// Bytes read at a time around one record.
const CHUNK_BYTES: usize = 64 * 1024;

/// Where a position lies.
enum Place {
    BeyondHead,
    Fresh(Vec<Record>),
    Missing(Damage),
    Sealed(Sealed),
    Active(Part),
}

/// A stretch of a segment to go through.
struct Part {
    name: String,
    file: Arc<dyn File>,
    frames_end: u64,
    /// Where to begin.
    entry: IndexEntry,
    /// Last position to be found in it.
    last: u64,
}

/// Why going through a part ended.
enum End {
    Part,
    Full,
    Damaged(Damage),
}

impl Shared {
    /// See [`crate::log::Log::read`].
    pub(super) fn read(&self, from: u64, bytes_max: usize) -> LogResult<Vec<Record>> {
        let mut records: Vec<Record> = Vec::new();
        let mut budget = Budget::new(bytes_max);
        let mut at = from.max(1);
        let chunk = bytes_max.clamp(CHUNK_BYTES, SCAN_BYTES);
        loop {
            // Fresh records are taken only as a whole answer: joining both ways of reading would
            // save nothing that a second read does not.
            let end = match self.place(at, bytes_max, records.is_empty()) {
                Place::BeyondHead => return Ok(records),
                Place::Fresh(records) => return Ok(records),
                Place::Missing(damage) => End::Damaged(damage),
                Place::Sealed(sealed) => {
                    let part = self.sealed_part(&sealed, at)?;
                    self.walk(&part, chunk, at, &mut budget, &mut records)?
                }
                Place::Active(part) => self.walk(&part, chunk, at, &mut budget, &mut records)?,
            };
            match end {
                End::Full => return Ok(records),
                End::Damaged(damage) if records.is_empty() => return Err(self.damaged(damage)),
                End::Damaged(_) => return Ok(records),
                End::Part => at = records.last().map_or(at, |record| record.position + 1),
            }
        }
    }

    fn place(&self, at: u64, bytes_max: usize, fresh: bool) -> Place {
        let state = self.state.read();
        if at > state.head {
            return Place::BeyondHead;
        }
        if fresh && let Some(records) = state.tail.read(at, bytes_max) {
            return Place::Fresh(records);
        }
        let active = &state.active;
        if at >= active.first {
            return Place::Active(Part {
                name: file_name(active.first),
                file: active.file.clone(),
                frames_end: active.frames_end,
                entry: nearest(&active.index, at, active.first),
                last: state.head,
            });
        }
        let after = state.sealed.partition_point(|sealed| sealed.first <= at);
        let resume = state.sealed.get(after).map_or(active.first, |sealed| sealed.first);
        match state.sealed[..after].last() {
            Some(sealed) if at <= sealed.last => Place::Sealed(sealed.clone()),
            before => Place::Missing(missing(before.map_or(1, |sealed| sealed.last + 1), resume)),
        }
    }

    fn sealed_part(&self, sealed: &Sealed, at: u64) -> LogResult<Part> {
        let name = file_name(sealed.first);
        let file = self.open_segment(sealed.first)?;
        let index = match &sealed.index {
            Some(index) => index.clone(),
            None => {
                let index = self.load_index(sealed, &file)?;
                let mut state = self.state.write();
                if let Some(held) = state.sealed.iter_mut().find(|s| s.first == sealed.first) {
                    held.index = Some(index.clone());
                }
                index
            }
        };
        let entry = nearest(&index, at, sealed.first);
        Ok(Part { name, file, frames_end: sealed.frames_end, entry, last: sealed.last })
    }

    /// Opens a segment, or gives it from the last time: a reader mostly goes on in the same one,
    /// and a long log has more segments than a process may have open files.
    fn open_segment(&self, first: u64) -> LogResult<Arc<dyn File>> {
        let mut last = self.last_opened.lock();
        if let Some((held, file)) = last.as_ref()
            && *held == first
        {
            return Ok(file.clone());
        }
        let name = file_name(first);
        let file =
            self.fs.open(&self.dir.join(&name)).map_err(|e| self.io("cannot open", &name, e))?;
        *last = Some((first, file.clone()));
        Ok(file)
    }

    /// The index at a segment's end, or one made anew when that is damaged.
    fn load_index(&self, sealed: &Sealed, file: &Arc<dyn File>) -> LogResult<Arc<[IndexEntry]>> {
        let name = file_name(sealed.first);
        let stored = self.stored_index(sealed, file)?;
        if let Some(index) = stored {
            return Ok(index.into());
        }
        tracing::warn!(
            stream = self.identity.log.stream,
            segment = name,
            "index of a segment is damaged, made anew in memory"
        );
        Ok(self.scan_segment(sealed, file)?.index.into())
    }

    fn stored_index(
        &self,
        sealed: &Sealed,
        file: &Arc<dyn File>,
    ) -> LogResult<Option<Vec<IndexEntry>>> {
        let name = file_name(sealed.first);
        let failed = |e| self.io("cannot read", &name, e);
        let bytes = file.size().map_err(failed)?;
        let trailer =
            read_trailer(file.as_ref(), &self.identity, sealed.first, bytes).map_err(failed)?;
        let Some(trailer) = trailer else { return Ok(None) };
        let mut index = vec![0; trailer.index_bytes()];
        file.read_at(&mut index, trailer.frames_end).map_err(failed)?;
        Ok(trailer.decode_index(&index, self.identity.salt))
    }

    fn scan_segment(&self, sealed: &Sealed, file: &Arc<dyn File>) -> LogResult<Scan> {
        let mut window = Window::new(file.clone(), sealed.frames_end, SCAN_BYTES);
        scan(&mut window, self.identity.salt, sealed.first, sealed.last + 1)
            .map_err(|e| self.io("cannot read", &file_name(sealed.first), e))
    }

    /// Takes records from position `at` on until the part ends, the budget is used up or damage is
    /// met.
    fn walk(
        &self,
        part: &Part,
        chunk: usize,
        mut at: u64,
        budget: &mut Budget,
        records: &mut Vec<Record>,
    ) -> LogResult<End> {
        let failed = |e| self.io("cannot read", &part.name, e);
        let salt = self.identity.salt;
        let mut window = Window::new(part.file.clone(), part.frames_end, chunk);
        let IndexEntry { mut position, mut offset } = part.entry;
        while position <= part.last {
            if position < at {
                let head = window.bytes(offset, FRAME).map_err(failed)?;
                if let Some(head) = head.and_then(|bytes| FrameHead::decode(bytes, salt))
                    && head.position == position
                {
                    offset += head.frame_bytes();
                    position += 1;
                    continue;
                }
            }
            let look = window.look(offset, salt).map_err(failed)?;
            if let Look::Frame(head) = &look
                && head.position == position
                && let Some(body) =
                    window.bytes(offset + FRAME as u64, head.body_bytes as usize).map_err(failed)?
                && let Some(message) = decode_body(body)
            {
                if !budget.take(message.payload.len()) {
                    return Ok(End::Full);
                }
                records.push(Record { position, time: head.time, message });
                offset += head.frame_bytes();
                position += 1;
                at = position;
                continue;
            }
            let from = match &look {
                Look::BadBody(head) if head.position >= position => offset + head.frame_bytes(),
                Look::Frame(head) if head.position > position => offset,
                _ => offset + 1,
            };
            let next = window.resume(from, salt, position, part.last + 1).map_err(failed)?;
            match next {
                Some((resumed, head)) if head.position <= at => {
                    (offset, position) = (resumed, head.position);
                }
                next => {
                    let place = format!("{}:{offset}", part.name);
                    let resume = next.map_or(part.last + 1, |(_, head)| head.position);
                    return Ok(End::Damaged(Damage { place, from: position, resume }));
                }
            }
        }
        Ok(End::Part)
    }

    /// The damage as an error.
    pub(super) fn damaged(&self, damage: Damage) -> LogError {
        let stream = self.identity.log.stream.clone();
        LogError::Damaged { stream, place: damage.place, from: damage.from, resume: damage.resume }
    }

    /// See [`crate::embedded::EmbeddedLog::verify`].
    pub(super) fn verify(&self) -> LogResult<Vec<Damage>> {
        let state = self.state.read();
        let mut segments = state.sealed.clone();
        let active = &state.active;
        // As far as it is durable now, the active segment is like any other without a trailer.
        segments.push(Sealed {
            first: active.first,
            last: state.head,
            frames_end: active.frames_end,
            file_bytes: active.frames_end,
            index: Some(Arc::from([])),
        });
        drop(state);
        let mut damages = Vec::new();
        let mut expected = 1;
        let active = segments.len() - 1;
        for (n, sealed) in segments.iter().enumerate() {
            let name = file_name(sealed.first);
            let failed = |e| self.io("cannot read", &name, e);
            if sealed.first > expected {
                damages.push(missing(expected, sealed.first));
            }
            expected = sealed.last + 1;
            let file = match self.fs.open(&self.dir.join(&name)) {
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                    damages.push(missing(sealed.first, expected));
                    continue;
                }
                file => file.map_err(failed)?,
            };
            let bytes = file.size().map_err(failed)?;
            let mut header = vec![0; bytes.min(HEADER as u64) as usize];
            file.read_at(&mut header, 0).map_err(failed)?;
            if check_header(&header, &self.identity, sealed.first) != HeaderState::Good {
                let (from, resume) = (sealed.first, sealed.first);
                damages.push(Damage { place: format!("{name}:0"), from, resume });
            }
            // A file that has become shorter is gone through as far as it goes.
            let readable = Sealed { frames_end: sealed.frames_end.min(bytes), ..sealed.clone() };
            let found = self.scan_segment(&readable, &file)?;
            damages.extend(zone_damages(&name, &found));
            if found.next < expected || found.tail {
                let place = format!("{name}:{}", found.end);
                damages.push(Damage { place, from: found.next, resume: expected });
            } else if n < active && self.stored_index(sealed, &file)?.is_none() {
                let place = format!("{name}:{}", sealed.frames_end);
                damages.push(Damage { place, from: expected, resume: expected });
            }
        }
        Ok(damages)
    }
}

/// The index entry at or before a position; the segment's start when the index has none.
fn nearest(index: &[IndexEntry], at: u64, first: u64) -> IndexEntry {
    let after = index.partition_point(|entry| entry.position <= at);
    let start = IndexEntry { position: first, offset: HEADER as u64 };
    index[..after].last().copied().unwrap_or(start)
}
