//! Opening a log: what is believed of what a crash, a failed write or a damaged disk left.
//!
//! | found | taken as | done |
//! |---|---|---|
//! | no identity, no records | creation was cut short | created anew |
//! | bytes after the last good frame of the last segment, not sealed | torn tail | cut |
//! | an empty sector among frames of the last, never acknowledged group | torn group | cut from there |
//! | anything else between good frames, or before the end a trailer gives | damage | reported, never cut |
//! | last file not even a header long | creation of a segment was cut short | removed |
//! | sealed segment without its trailer | damage | gone through; lost positions follow from the next file's name |
//! | a segment missing between others | damage | reported |
//! | identity missing or damaged, file of another log or format, overlapping files | mistake | refused |
//!
//! A group is believed to have been acknowledged when a later frame says so (`durable` in
//! `segment.rs`) or a trailer was written after it. Only the last group before a crash has neither.
//! In it, power failure and decay of a record that nothing valid follows look alike: both are cut,
//! and the report says so; the engine notices by the position and hash in its checkpoint if the
//! record had been used.
//!
//! That last group is written again before it is believed. After a failed sync the page cache may
//! show bytes that the disk never got, and a second sync would say nothing.
//!
//! Only the last segment is read in full here, so opening costs the same however long the log is.
//! Sealed segments are known by their trailers; their records are checked when read, and by
//! `verify`.

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::embedded::file::{File, FileSystem};
use crate::embedded::identity::{self, Identity};
use crate::embedded::scan::{Look, Scan, Window, scan};
use crate::embedded::segment::{
    HEADER, HeaderState, IndexEntry, TRAILER, Trailer, check_header, decode_body, encode_header,
    file_name, first_of_name,
};
use crate::embedded::state::{Active, Commit, CommitRecord, Sealed, State, Tail};
use crate::embedded::{Damage, RecoveryReport};
use crate::log::{LogError, LogResult, Record};

/// Bytes read at a time when going through a whole segment.
pub(super) const SCAN_BYTES: usize = 1024 * 1024;

/// An opened log.
pub(super) struct Opened {
    pub identity: Identity,
    pub state: State,
    /// The last commit record in the active segment.
    pub segment_commit: IndexEntry,
    pub report: RecoveryReport,
}

/// Makes a segment file, durably: nothing may be acknowledged from a file whose name could vanish.
pub(super) fn create_segment(
    fs: &dyn FileSystem,
    dir: &Path,
    identity: &Identity,
    first: u64,
) -> io::Result<Arc<dyn File>> {
    let file = fs.create(&dir.join(file_name(first)))?;
    file.write_at(&encode_header(identity, first), 0)?;
    file.sync_data()?;
    fs.sync_dir(dir)?;
    Ok(file)
}

/// Reads the trailer of a segment, if there is one.
pub(super) fn read_trailer(
    file: &dyn File,
    identity: &Identity,
    first: u64,
    file_bytes: u64,
) -> io::Result<Option<Trailer>> {
    let Some(at) = file_bytes.checked_sub(TRAILER as u64) else { return Ok(None) };
    let mut bytes = [0; TRAILER];
    file.read_at(&mut bytes, at)?;
    Ok(Trailer::decode(&bytes, identity.salt, first, file_bytes))
}

/// The damages a scan found in a segment, without what follows its last frame.
pub(super) fn zone_damages(name: &str, scan: &Scan) -> Vec<Damage> {
    let damage = |zone: &crate::embedded::scan::Zone| Damage {
        place: format!("{name}:{}", zone.offset),
        from: zone.from,
        resume: zone.resume,
    };
    scan.zones.iter().map(damage).collect()
}

/// Opens the log in `dir`, creating it if there is none. With `uuid` it has that identity when it is
/// created, and must have it when it is there.
pub(super) fn open(
    fs: &dyn FileSystem,
    dir: &Path,
    stream: &str,
    uuid: Option<&str>,
    tail_bytes: usize,
) -> LogResult<Opened> {
    let failed = |what: &str, path: &Path, source: io::Error| LogError::Io {
        stream: stream.to_owned(),
        what: format!("{what} {}", path.display()),
        source,
    };
    if stream.is_empty() || stream.contains(char::is_control) {
        return Err(LogError::Format {
            stream: stream.to_owned(),
            what: "a stream's name must not be empty or hold control characters".to_owned(),
        });
    }
    let fresh = match uuid {
        Some(uuid) => Identity::named(stream, uuid)
            .map_err(|what| LogError::Format { stream: stream.to_owned(), what })?,
        None => Identity::generate(stream),
    };
    fs.create_dir(dir).map_err(|e| failed("cannot make", dir, e))?;
    let names = fs.list(dir).map_err(|e| failed("cannot list", dir, e))?;
    let mut firsts: Vec<u64> = names.iter().filter_map(|name| first_of_name(name)).collect();
    firsts.sort_unstable();
    let opening = Opening { fs, dir, stream };
    let (identity, created) = if names.iter().any(|name| name == identity::FILE) {
        let path = dir.join(identity::FILE);
        let read = Identity::load(fs, dir, stream).map_err(|e| failed("cannot read", &path, e))?;
        let read = read.map_err(|what| opening.format(what))?;
        if uuid.is_some() && read.log != fresh.log {
            return Err(opening.format(format!(
                "the directory holds the log {}, not {}; name another directory, or move this one \
                 away",
                read.log.uuid, fresh.log.uuid
            )));
        }
        (read, false)
    } else {
        (opening.create(fresh, &mut firsts)?, true)
    };
    if firsts.is_empty() {
        return Err(opening.format(
            "its identity file is there but all segment files are missing; put them back, or move \
             the directory away to begin a new log"
                .to_owned(),
        ));
    }
    opening.segments(identity, firsts, created, tail_bytes)
}

struct Opening<'a> {
    fs: &'a dyn FileSystem,
    dir: &'a Path,
    stream: &'a str,
}

impl Opening<'_> {
    fn format(&self, what: String) -> LogError {
        LogError::Format { stream: self.stream.to_owned(), what }
    }

    fn io(&self, what: &str, name: &str, source: io::Error) -> LogError {
        let path = self.dir.join(name);
        LogError::Io {
            stream: self.stream.to_owned(),
            what: format!("{what} {}", path.display()),
            source,
        }
    }

    /// Creates the log: first its first segment, then the identity, which makes it one.
    fn create(&self, identity: Identity, firsts: &mut Vec<u64>) -> LogResult<Identity> {
        for first in firsts.drain(..) {
            let name = file_name(first);
            let path = self.dir.join(&name);
            let file = self.fs.open(&path).map_err(|e| self.io("cannot open", &name, e))?;
            let bytes = file.size().map_err(|e| self.io("cannot measure", &name, e))?;
            if first != 1 || bytes > HEADER as u64 {
                return Err(self.format(format!(
                    "its identity file is missing though {name:?} holds records; put back the \
                     file of a backup of this directory"
                )));
            }
            self.fs.remove(&path).map_err(|e| self.io("cannot remove", &name, e))?;
        }
        let name = file_name(1);
        create_segment(self.fs, self.dir, &identity, 1)
            .map_err(|e| self.io("cannot make", &name, e))?;
        identity
            .store(self.fs, self.dir)
            .map_err(|e| self.io("cannot write", identity::FILE, e))?;
        firsts.push(1);
        Ok(identity)
    }

    fn segments(
        &self,
        identity: Identity,
        mut firsts: Vec<u64>,
        created: bool,
        tail_bytes: usize,
    ) -> LogResult<Opened> {
        let mut report = RecoveryReport { created, ..RecoveryReport::default() };
        self.drop_unborn(&identity, &mut firsts, &mut report)?;
        let mut sealed: Vec<Sealed> = Vec::with_capacity(firsts.len());
        let mut commits: Vec<(u64, IndexEntry)> = Vec::new();
        let mut last_time = None;
        let mut expected = 1;
        // Damages that a trailer does not vouch to be free of commit records.
        let mut may_hide_commit: Vec<Damage> = Vec::new();
        let active_first = firsts.pop().unwrap_or(1);
        for (n, first) in firsts.iter().copied().enumerate() {
            let next_first = firsts.get(n + 1).copied().unwrap_or(active_first);
            self.adjoin(expected, first, &mut may_hide_commit)?;
            let found = self.sealed(&identity, first, next_first)?;
            expected = found.segment.last + 1;
            last_time = last_time.max(found.last_time);
            if found.commit.position > 0 {
                commits.push((first, found.commit));
            }
            if found.vouched {
                report.damaged.extend(found.damages);
            } else {
                may_hide_commit.extend(found.damages);
            }
            sealed.push(found.segment);
        }
        self.adjoin(expected, active_first, &mut may_hide_commit)?;
        let last = self.last(&identity, active_first, &mut report)?;
        last_time = last_time.max(last.scan.last_time).max(last.trailer.map(|t| t.last_time));
        if last.trailer.is_some() {
            report.damaged.extend(last.damages);
        } else {
            may_hide_commit.extend(last.damages);
        }
        let commit_entry = last.trailer.map_or(last.scan.commit, |trailer| trailer.commit);
        if commit_entry.position > 0 {
            commits.push((active_first, commit_entry));
        }
        let commit = self.commit(&identity, commits.last().copied(), &may_hide_commit)?;
        let mut segment_commit = commit_entry;
        if matches!(commit.record, CommitRecord::Damaged(_))
            && let Some(zone) = last.scan.zones.iter().find(|z| z.resume == commit.position + 1)
        {
            // So that the trailer written at the end does not vouch for the older one.
            segment_commit = IndexEntry { position: commit.position, offset: zone.offset };
        }
        report.damaged.extend(may_hide_commit);
        report.damaged.sort_by_key(|damage| damage.from);
        let head = last.next - 1;
        let state = State {
            sealed,
            active: last.active,
            head,
            last_time: if head == 0 { None } else { last_time },
            commit,
            tail: Tail::new(tail_bytes),
            poisoned: None,
        };
        report.segments = state.sealed.len() + 1;
        report.bytes = state.file_bytes();
        report.records = head;
        Ok(Opened { identity, state, segment_commit, report })
    }

    /// Removes a last segment that was being created when the power went: its header was not yet
    /// durable, so no frame was ever written to it.
    fn drop_unborn(
        &self,
        identity: &Identity,
        firsts: &mut Vec<u64>,
        report: &mut RecoveryReport,
    ) -> LogResult<()> {
        let Some(first) = firsts.last().copied().filter(|_| firsts.len() > 1) else {
            return Ok(());
        };
        let name = file_name(first);
        let path = self.dir.join(&name);
        let file = self.fs.open(&path).map_err(|e| self.io("cannot open", &name, e))?;
        let bytes = file.size().map_err(|e| self.io("cannot measure", &name, e))?;
        let state = self.header(file.as_ref(), identity, first, bytes)?;
        if bytes <= HEADER as u64 && state == HeaderState::Damaged {
            self.fs.remove(&path).map_err(|e| self.io("cannot remove", &name, e))?;
            self.fs.sync_dir(self.dir).map_err(|e| self.io("cannot sync", "", e))?;
            report.cut_bytes += bytes;
            firsts.pop();
        }
        Ok(())
    }

    fn header(
        &self,
        file: &dyn File,
        identity: &Identity,
        first: u64,
        file_bytes: u64,
    ) -> LogResult<HeaderState> {
        let mut bytes = vec![0; file_bytes.min(HEADER as u64) as usize];
        let name = file_name(first);
        file.read_at(&mut bytes, 0).map_err(|e| self.io("cannot read", &name, e))?;
        match check_header(&bytes, identity, first) {
            HeaderState::Foreign(why) => Err(self.format(format!("{name:?} does not fit: {why}"))),
            state => Ok(state),
        }
    }

    /// Checks that a segment continues the one before it.
    fn adjoin(&self, expected: u64, first: u64, damages: &mut Vec<Damage>) -> LogResult<()> {
        if first < expected {
            return Err(self.format(format!(
                "{:?} begins at a position that the file before it already holds (up to {}); are \
                 files of a copy mixed in?",
                file_name(first),
                expected - 1
            )));
        }
        if first > expected {
            damages.push(missing(expected, first));
        }
        Ok(())
    }

    fn sealed(&self, identity: &Identity, first: u64, next_first: u64) -> LogResult<SealedFound> {
        let name = file_name(first);
        let file =
            self.fs.open(&self.dir.join(&name)).map_err(|e| self.io("cannot open", &name, e))?;
        let file_bytes = file.size().map_err(|e| self.io("cannot measure", &name, e))?;
        let mut damages = Vec::new();
        if self.header(file.as_ref(), identity, first, file_bytes)? == HeaderState::Damaged {
            damages.push(Damage { place: format!("{name}:0"), from: first, resume: first });
        }
        let trailer = read_trailer(file.as_ref(), identity, first, file_bytes)
            .map_err(|e| self.io("cannot read", &name, e))?;
        if let Some(trailer) = trailer {
            let segment = Sealed {
                first,
                last: trailer.last,
                frames_end: trailer.frames_end,
                file_bytes,
                index: None,
            };
            let last_time = (trailer.last >= first).then_some(trailer.last_time);
            let commit = trailer.commit;
            return Ok(SealedFound { segment, damages, last_time, commit, vouched: true });
        }
        let mut window = Window::new(file, file_bytes, SCAN_BYTES);
        let scan = scan(&mut window, identity.salt, first, next_first)
            .map_err(|e| self.io("cannot read", &name, e))?;
        damages.extend(zone_damages(&name, &scan));
        // The trailer itself is damaged at least, and records are lost up to the next file's first.
        let place = format!("{name}:{}", scan.end);
        damages.push(Damage { place, from: scan.next, resume: next_first });
        let segment = Sealed {
            first,
            last: next_first - 1,
            frames_end: scan.end,
            file_bytes,
            index: Some(scan.index.into()),
        };
        let (last_time, commit) = (scan.last_time, scan.commit);
        Ok(SealedFound { segment, damages, last_time, commit, vouched: false })
    }

    /// Brings the last segment into a state that can be appended to.
    fn last(
        &self,
        identity: &Identity,
        first: u64,
        report: &mut RecoveryReport,
    ) -> LogResult<LastFound> {
        let name = file_name(first);
        let failed = |what: &'static str| {
            let name = name.clone();
            move |e| self.io(what, &name, e)
        };
        let file = self.fs.open(&self.dir.join(&name)).map_err(failed("cannot open"))?;
        let file_bytes = file.size().map_err(failed("cannot measure"))?;
        let mut damages = Vec::new();
        if self.header(file.as_ref(), identity, first, file_bytes)? == HeaderState::Damaged {
            damages.push(Damage { place: format!("{name}:0"), from: first, resume: first });
        }
        let trailer = read_trailer(file.as_ref(), identity, first, file_bytes)
            .map_err(failed("cannot read"))?;
        let go_through = |end: u64| {
            let mut window = Window::new(file.clone(), end, SCAN_BYTES);
            scan(&mut window, identity.salt, first, u64::MAX)
        };
        let end = trailer.map_or(file_bytes, |trailer| trailer.frames_end);
        let mut scan = go_through(end).map_err(failed("cannot read"))?;
        let (frames_end, next);
        if let Some(trailer) = trailer {
            // Closed in good order: all of it was durable, so whatever is wrong is damage.
            if scan.next <= trailer.last {
                let place = format!("{name}:{}", scan.end);
                damages.push(Damage { place, from: scan.next, resume: trailer.last + 1 });
            }
            (frames_end, next) = (trailer.frames_end, trailer.last + 1);
            // The index goes unused, but a disk that spoils it may spoil more. Sealing may have
            // been cut short, though.
            let mut index = vec![0; trailer.index_bytes()];
            file.read_at(&mut index, frames_end).map_err(failed("cannot read"))?;
            if trailer.decode_index(&index, identity.salt).is_none()
                && !Window::new(file.clone(), file_bytes, SCAN_BYTES)
                    .has_empty_sector(frames_end, file_bytes)
                    .map_err(failed("cannot read"))?
            {
                let place = format!("{name}:{frames_end}");
                damages.push(Damage { place, from: next, resume: next });
            }
        } else {
            let durable = scan.durable;
            let torn = scan.zones.iter().find(|zone| zone.from > durable && zone.empty_sector);
            if let Some(torn) = torn.copied() {
                scan = go_through(torn.offset).map_err(failed("cannot read"))?;
            }
            (frames_end, next) = (scan.end.max(HEADER as u64), scan.next);
            report.cut_bytes += file_bytes.saturating_sub(frames_end);
            if scan.durable < first {
                // Nothing of this file is known to be durable, its header neither.
                scan.group_start = 0;
            }
        }
        damages.extend(zone_damages(&name, &scan));
        if file_bytes != frames_end {
            file.set_len(frames_end).map_err(failed("cannot cut"))?;
        }
        if trailer.is_none() {
            rewrite(file.as_ref(), scan.group_start, frames_end).map_err(failed("cannot write"))?;
        }
        file.sync_data().map_err(failed("cannot sync"))?;
        self.fs.sync_dir(self.dir).map_err(|e| self.io("cannot sync", "", e))?;
        let active = Active { first, file, frames_end, index: std::mem::take(&mut scan.index) };
        Ok(LastFound { active, scan, trailer, next, damages })
    }

    /// Finds out what the newest commit record is, and whether it can be known at all.
    fn commit(
        &self,
        identity: &Identity,
        newest: Option<(u64, IndexEntry)>,
        may_hide_commit: &[Damage],
    ) -> LogResult<Commit> {
        let position = newest.map_or(0, |(_, entry)| entry.position);
        let hidden = may_hide_commit.iter().filter(|d| d.from < d.resume && d.resume > position);
        if let Some(damage) = hidden.max_by_key(|damage| damage.resume) {
            // Taken for as new as it can be: a writer that only knows an older commit must not pass.
            let position = damage.resume - 1;
            return Ok(Commit { position, record: CommitRecord::Damaged(damage.clone()) });
        }
        let Some((first, entry)) = newest else {
            return Ok(Commit { position, record: CommitRecord::None });
        };
        let name = file_name(first);
        let failed = |e| self.io("cannot read", &name, e);
        let file = self.fs.open(&self.dir.join(&name)).map_err(failed)?;
        let end = file.size().map_err(failed)?;
        let mut window = Window::new(file, end, 4096);
        let record = read_record(&mut window, identity, entry).map_err(failed)?;
        let record = match record {
            Some(record) => CommitRecord::Known(record),
            None => CommitRecord::Damaged(Damage {
                place: format!("{name}:{}", entry.offset),
                from: position,
                resume: position + 1,
            }),
        };
        Ok(Commit { position, record })
    }
}

struct SealedFound {
    segment: Sealed,
    damages: Vec<Damage>,
    last_time: Option<meterr_operators::time::Time>,
    commit: IndexEntry,
    /// A trailer says which record is the last commit.
    vouched: bool,
}

struct LastFound {
    active: Active,
    scan: Scan,
    trailer: Option<Trailer>,
    /// The position the next record gets.
    next: u64,
    damages: Vec<Damage>,
}

/// The damage that a missing segment file is.
pub(super) fn missing(from: u64, resume: u64) -> Damage {
    Damage { place: format!("{} (file missing)", file_name(from)), from, resume }
}

/// Reads the record known to stand at a place; none when it cannot be believed.
pub(super) fn read_record(
    window: &mut Window,
    identity: &Identity,
    entry: IndexEntry,
) -> io::Result<Option<Record>> {
    let Look::Frame(head) = window.look(entry.offset, identity.salt)? else { return Ok(None) };
    let body = window
        .bytes(entry.offset + crate::embedded::segment::FRAME as u64, head.body_bytes as usize)?;
    Ok(body
        .filter(|_| head.position == entry.position)
        .and_then(decode_body)
        .map(|message| Record { position: head.position, time: head.time, message }))
}

/// Writes bytes over themselves, so that the next sync has to bring them to the disk.
fn rewrite(file: &dyn File, from: u64, to: u64) -> io::Result<()> {
    let mut at = from;
    let mut bytes = Vec::new();
    while at < to {
        bytes.resize((to - at).min(SCAN_BYTES as u64) as usize, 0);
        file.read_at(&mut bytes, at)?;
        file.write_at(&bytes, at)?;
        at += bytes.len() as u64;
    }
    Ok(())
}
