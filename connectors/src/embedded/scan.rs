//! Going through the frames of a segment, damage included.
//!
//! A record is believed only if both checksums of its frame hold and its position continues the
//! ones before. Where that fails, the search goes on byte by byte for the next frame that can be
//! believed; what lies between is a [`Zone`]. A frame whose header holds but whose body does not is
//! stepped over by its length, so nothing inside a payload is ever taken for a record.

use std::io;
use std::sync::Arc;

use memchr::memmem;
use meterr_operators::time::Time;

use crate::embedded::file::File;
use crate::embedded::identity::Salt;
use crate::embedded::segment::{FRAME, FRAME_MAGIC, FrameHead, HEADER, INDEX_BYTES, IndexEntry};

/// What power failure leaves in units of.
const SECTOR: u64 = 512;

/// A file up to `end`, read in chunks.
pub(super) struct Window {
    file: Arc<dyn File>,
    end: u64,
    chunk: usize,
    at: u64,
    bytes: Vec<u8>,
}

impl Window {
    pub fn new(file: Arc<dyn File>, end: u64, chunk: usize) -> Window {
        Window { file, end, chunk, at: 0, bytes: Vec::new() }
    }

    /// The bytes at `offset`; none when the file ends before. Never allocates beyond the file's
    /// length.
    pub fn bytes(&mut self, offset: u64, len: usize) -> io::Result<Option<&[u8]>> {
        let fits = offset.checked_add(len as u64).is_some_and(|to| to <= self.end);
        if !fits {
            return Ok(None);
        }
        let held = offset >= self.at && offset + len as u64 <= self.at + self.bytes.len() as u64;
        if !held {
            let rest = usize::try_from(self.end - offset).unwrap_or(usize::MAX);
            let want = len.max(self.chunk).min(rest);
            self.at = offset;
            self.bytes.resize(want, 0);
            if let Err(e) = self.file.read_at(&mut self.bytes, offset) {
                self.bytes.clear();
                return Err(e);
            }
        }
        let from = (offset - self.at) as usize;
        Ok(self.bytes.get(from..from + len))
    }

    /// As many bytes from `offset` as come cheaply, at least one unless the file ends there.
    fn some(&mut self, offset: u64) -> io::Result<&[u8]> {
        if self.bytes(offset, 1)?.is_none() {
            return Ok(&[]);
        }
        Ok(&self.bytes[(offset - self.at) as usize..])
    }

    /// What stands at an offset.
    pub fn look(&mut self, offset: u64, salt: Salt) -> io::Result<Look> {
        let Some(head) = self.bytes(offset, FRAME)?.and_then(|b| FrameHead::decode(b, salt)) else {
            return Ok(Look::Nothing);
        };
        match self.bytes(offset + FRAME as u64, head.body_bytes as usize)? {
            Some(body) if head.holds(body, salt) => Ok(Look::Frame(head)),
            Some(_) => Ok(Look::BadBody(head)),
            None => Ok(Look::Nothing),
        }
    }

    /// Where the next frame might begin, at or after `from`; the end when nowhere.
    fn candidate(&mut self, mut from: u64) -> io::Result<u64> {
        loop {
            let bytes = self.some(from)?;
            if let Some(at) = memmem::find(bytes, &FRAME_MAGIC) {
                return Ok(from + at as u64);
            }
            if bytes.len() < FRAME_MAGIC.len() {
                return Ok(self.end);
            }
            from += (bytes.len() - (FRAME_MAGIC.len() - 1)) as u64;
        }
    }

    /// The next frame at or after `from` that can be believed, with a position in
    /// `expected..upper`.
    pub fn resume(
        &mut self,
        mut from: u64,
        salt: Salt,
        expected: u64,
        upper: u64,
    ) -> io::Result<Option<(u64, FrameHead)>> {
        loop {
            let at = self.candidate(from)?;
            if at >= self.end {
                return Ok(None);
            }
            match self.look(at, salt)? {
                Look::Frame(head) if (expected..upper).contains(&head.position) => {
                    return Ok(Some((at, head)));
                }
                Look::BadBody(head) if (expected..upper).contains(&head.position) => {
                    from = at + head.frame_bytes();
                }
                _ => from = at + 1,
            }
        }
    }

    /// Whether some sector's share of `from..to`, up to the sector's end, is all zeros.
    pub fn has_empty_sector(&mut self, mut from: u64, to: u64) -> io::Result<bool> {
        while let next = (from / SECTOR + 1) * SECTOR
            && next <= to
        {
            match self.bytes(from, (next - from) as usize)? {
                Some(bytes) if bytes.iter().all(|b| *b == 0) => return Ok(true),
                _ => from = next,
            }
        }
        Ok(false)
    }
}

/// What stands at an offset.
pub(super) enum Look {
    /// A frame to believe.
    Frame(FrameHead),
    /// A frame whose body is damaged.
    BadBody(FrameHead),
    /// Nothing that could be believed.
    Nothing,
}

/// A stretch that holds no frame to believe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Zone {
    /// Where it begins.
    pub offset: u64,
    /// First position missing because of it.
    pub from: u64,
    /// Position of the frame after it; equal to `from` when no record is missing.
    pub resume: u64,
    /// A sector in it reads as zeros, as those do that a power failure kept from the disk.
    pub empty_sector: bool,
}

/// What a segment holds.
#[derive(Debug, Default)]
pub(super) struct Scan {
    pub index: Vec<IndexEntry>,
    /// The position after the last frame believed.
    pub next: u64,
    /// Records believed.
    pub records: u64,
    pub last_time: Option<Time>,
    /// The last commit record, even if its body is damaged; position 0: none.
    pub commit: IndexEntry,
    /// Where the last frame believed ends.
    pub end: u64,
    /// The last position that some frame knows to be durable.
    pub durable: u64,
    /// Where the frames written after that begin.
    pub group_start: u64,
    /// Damage between frames.
    pub zones: Vec<Zone>,
    /// Whether bytes follow the last frame believed.
    pub tail: bool,
}

/// Goes through all frames of the window, from the segment's first position on. Positions from
/// `upper` on belong to the next segment and are not believed here.
pub(super) fn scan(window: &mut Window, salt: Salt, first: u64, upper: u64) -> io::Result<Scan> {
    let mut scan =
        Scan { next: first, end: HEADER as u64, group_start: HEADER as u64, ..Scan::default() };
    while scan.end < window.end {
        let (at, head) = match window.look(scan.end, salt)? {
            Look::Frame(head) if head.position == scan.next => (scan.end, head),
            look => {
                let from = match &look {
                    Look::BadBody(head) if (scan.next..upper).contains(&head.position) => {
                        scan.end + head.frame_bytes()
                    }
                    Look::Frame(head) if (scan.next..upper).contains(&head.position) => scan.end,
                    _ => scan.end + 1,
                };
                let Some((at, head)) = window.resume(from, salt, scan.next, upper)? else {
                    scan.tail = true;
                    return Ok(scan);
                };
                let empty_sector = window.has_empty_sector(scan.end, at)?;
                let (offset, from) = (scan.end, scan.next);
                scan.zones.push(Zone { offset, from, resume: head.position, empty_sector });
                (at, head)
            }
        };
        scan.accept(at, &head);
    }
    Ok(scan)
}

impl Scan {
    fn accept(&mut self, at: u64, head: &FrameHead) {
        let entry = IndexEntry { position: head.position, offset: at };
        if self.index.last().is_none_or(|last| at - last.offset >= INDEX_BYTES) {
            self.index.push(entry);
        }
        if head.commit {
            self.commit = entry;
        }
        if head.durable > self.durable {
            self.durable = head.durable;
            self.group_start = at;
        }
        self.next = head.position + 1;
        self.records += 1;
        self.last_time = self.last_time.max(Some(head.time));
        self.end = at + head.frame_bytes();
    }
}
