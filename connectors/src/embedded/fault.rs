//! A file system in memory that can lose power, run out of space and fail to sync, for tests and
//! simulation.
//!
//! It keeps what programs see apart from what is on disk. [`FaultFs::crash`] takes away any part
//! of what was not synced: operations may survive whole, as a prefix torn at any byte, or sector by
//! sector in any combination (sectors that did not make it read as zeros where the file had grown).
//! Names behave as in a journal: a prefix of the unsynced changes survives. A sync that was made to
//! fail drops the bytes it was to save from the disk for good while programs go on seeing them, as
//! Linux does.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::embedded::file::{File, FileSystem};

const SECTOR: usize = 512;

/// The file system; clones share it.
#[derive(Clone, Default)]
pub struct FaultFs {
    disk: Arc<Disk>,
}

#[derive(Default)]
struct Disk {
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Default)]
struct State {
    /// Raised by a crash: handles from before are dead.
    boot: u64,
    next_file: u64,
    files: BTreeMap<u64, Content>,
    /// What programs see.
    names: BTreeMap<PathBuf, u64>,
    durable_names: BTreeMap<PathBuf, u64>,
    unsynced_names: Vec<(PathBuf, NameChange)>,
    writes: u64,
    syncs: u64,
    fail_write: Option<(u64, usize)>,
    fail_sync: Option<u64>,
    /// Syncs up to this number pass, later ones wait.
    hold_after: Option<u64>,
    held: u64,
}

#[derive(Default)]
struct Content {
    seen: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Change>,
}

enum Change {
    Write { at: usize, bytes: Vec<u8> },
    Length(usize),
}

/// A change of the names in one directory. The path kept beside it is the one concerned.
enum NameChange {
    Set(u64),
    Removed,
    Renamed { to: PathBuf, file: u64 },
}

impl NameChange {
    fn apply(&self, path: &Path, names: &mut BTreeMap<PathBuf, u64>) {
        match self {
            NameChange::Set(file) => {
                names.insert(path.to_owned(), *file);
            }
            NameChange::Removed => {
                names.remove(path);
            }
            NameChange::Renamed { to, file } => {
                names.remove(path);
                names.insert(to.clone(), *file);
            }
        }
    }
}

impl Change {
    fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Change::Write { at, bytes } => write(content, *at, bytes),
            Change::Length(len) => content.resize(*len, 0),
        }
    }
}

fn write(content: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    if content.len() < at + bytes.len() {
        content.resize(at + bytes.len(), 0);
    }
    content[at..at + bytes.len()].copy_from_slice(bytes);
}

/// SplitMix64 (Steele, Lea, Flood 2014): enough to choose what a crash leaves.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..=max`.
    fn up_to(&mut self, max: usize) -> usize {
        (self.next() % (max as u64 + 1)) as usize
    }
}

impl Content {
    fn crash(&mut self, random: &mut Random) {
        let changes = std::mem::take(&mut self.unsynced);
        let mut disk = self.durable.clone();
        match random.up_to(3) {
            0 => {}
            1 => changes.iter().for_each(|change| change.apply(&mut disk)),
            2 => {
                let whole = random.up_to(changes.len());
                changes[..whole].iter().for_each(|change| change.apply(&mut disk));
                if let Some(Change::Write { at, bytes }) = changes.get(whole) {
                    write(&mut disk, *at, &bytes[..random.up_to(bytes.len())]);
                }
            }
            _ => {
                for change in &changes {
                    let Change::Write { at, bytes } = change else {
                        change.apply(&mut disk);
                        continue;
                    };
                    disk.resize(disk.len().max(at + bytes.len()), 0);
                    let mut from = 0;
                    while from < bytes.len() {
                        let to = bytes.len().min(((at + from) / SECTOR + 1) * SECTOR - at);
                        if random.up_to(1) == 1 {
                            write(&mut disk, at + from, &bytes[from..to]);
                        }
                        from = to;
                    }
                }
            }
        }
        self.durable = disk;
        self.seen = self.durable.clone();
    }
}

impl FaultFs {
    /// An empty one.
    pub fn new() -> FaultFs {
        FaultFs::default()
    }

    /// Takes the power away and gives it back: what was not synced is lost in whole or in part, as
    /// `seed` decides; every open file is dead.
    pub fn crash(&self, seed: u64) {
        let mut state = self.disk.state.lock();
        let state = &mut *state;
        let mut random = Random(seed);
        state.boot += 1;
        let survive = random.up_to(state.unsynced_names.len());
        for (path, change) in state.unsynced_names.drain(..).take(survive) {
            change.apply(&path, &mut state.durable_names);
        }
        state.names = state.durable_names.clone();
        let named: std::collections::BTreeSet<u64> = state.names.values().copied().collect();
        state.files.retain(|file, _| named.contains(file));
        state.files.values_mut().for_each(|content| content.crash(&mut random));
        (state.fail_write, state.fail_sync, state.hold_after) = (None, None, None);
        self.disk.released.notify_all();
    }

    /// The `nth` write from now (1: the next) writes only `keep` bytes, then fails with "no space".
    pub fn fail_write(&self, nth: u64, keep: usize) {
        let mut state = self.disk.state.lock();
        state.fail_write = Some((state.writes + nth, keep));
    }

    /// The `nth` sync of a file or directory from now (1: the next) fails, and what it was to save
    /// never reaches the disk although it is still seen.
    pub fn fail_sync(&self, nth: u64) {
        let mut state = self.disk.state.lock();
        state.fail_sync = Some(state.syncs + nth);
    }

    /// Lets `pass` more syncs through and makes every later one wait until
    /// [`FaultFs::release_syncs`] or a crash.
    pub fn hold_syncs(&self, pass: u64) {
        let mut state = self.disk.state.lock();
        state.hold_after = Some(state.syncs + pass);
    }

    /// Ends [`FaultFs::hold_syncs`].
    pub fn release_syncs(&self) {
        self.disk.state.lock().hold_after = None;
        self.disk.released.notify_all();
    }

    /// Takes back the failures asked for that have not happened yet.
    pub fn heal(&self) {
        let mut state = self.disk.state.lock();
        (state.fail_write, state.fail_sync) = (None, None);
    }

    /// Whether a sync is waiting now.
    pub fn sync_held(&self) -> bool {
        self.disk.state.lock().held > 0
    }

    /// Syncs of files and directories begun so far.
    pub fn syncs(&self) -> u64 {
        self.disk.state.lock().syncs
    }

    /// Writes so far.
    pub fn writes(&self) -> u64 {
        self.disk.state.lock().writes
    }

    /// Paths of all files, in order.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.disk.state.lock().names.keys().cloned().collect()
    }

    /// Content of a file as programs see it; none when there is no such file.
    pub fn bytes(&self, path: &Path) -> Option<Vec<u8>> {
        let state = self.disk.state.lock();
        state.files.get(state.names.get(path)?).map(|content| content.seen.clone())
    }

    /// Puts content under a name, durably: damage, a cut, a file of another log. Open files see it.
    pub fn put(&self, path: &Path, bytes: Vec<u8>) {
        let mut state = self.disk.state.lock();
        let file = match state.names.get(path) {
            Some(file) => *file,
            None => state.new_file(path),
        };
        state.durable_names.insert(path.to_owned(), file);
        let content = state.files.entry(file).or_default();
        *content = Content { seen: bytes.clone(), durable: bytes, unsynced: Vec::new() };
    }
}

impl Disk {
    /// Counts a sync, makes it wait while syncs are held, and says whether it is to fail. After a
    /// wait the machine may have been restarted.
    fn begin_sync(&self, state: &mut MutexGuard<'_, State>) -> bool {
        state.syncs += 1;
        let (sync, boot) = (state.syncs, state.boot);
        let failing = state.fail_sync == Some(sync);
        if failing {
            state.fail_sync = None;
        }
        state.held += 1;
        while state.boot == boot && state.hold_after.is_some_and(|passed| sync > passed) {
            self.released.wait(state);
        }
        state.held -= 1;
        failing
    }
}

impl State {
    fn new_file(&mut self, path: &Path) -> u64 {
        self.next_file += 1;
        self.files.insert(self.next_file, Content::default());
        self.names.insert(path.to_owned(), self.next_file);
        self.next_file
    }

    fn alive(&mut self, handle: &Handle) -> io::Result<&mut Content> {
        if handle.boot != self.boot {
            return Err(io::Error::other("the file was open when the power went"));
        }
        self.files.get_mut(&handle.file).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

struct Handle {
    disk: Arc<Disk>,
    boot: u64,
    file: u64,
}

fn too_large<E>(_: E) -> io::Error {
    io::ErrorKind::FileTooLarge.into()
}

impl File for Handle {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        let seen = &state.alive(self)?.seen;
        let at = usize::try_from(offset).map_err(too_large)?;
        let end = at.checked_add(buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(seen.get(at..end).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        state.alive(self)?;
        state.writes += 1;
        let full = match state.fail_write {
            Some((nth, keep)) if nth == state.writes => {
                state.fail_write = None;
                Some(keep.min(bytes.len()))
            }
            _ => None,
        };
        let at = usize::try_from(offset).map_err(too_large)?;
        let content = state.alive(self)?;
        let change = Change::Write { at, bytes: bytes[..full.unwrap_or(bytes.len())].to_vec() };
        change.apply(&mut content.seen);
        content.unsynced.push(change);
        if full.is_some() { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        state.alive(self)?;
        let failing = self.disk.begin_sync(&mut state);
        let content = state.alive(self)?;
        let changes = std::mem::take(&mut content.unsynced);
        if failing {
            return Err(io::Error::other("the disk did not take the data"));
        }
        changes.iter().for_each(|change| change.apply(&mut content.durable));
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.disk.state.lock().alive(self)?.seen.len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        let content = state.alive(self)?;
        let change = Change::Length(usize::try_from(len).map_err(too_large)?);
        change.apply(&mut content.seen);
        content.unsynced.push(change);
        Ok(())
    }
}

impl FileSystem for FaultFs {
    fn create_dir(&self, _dir: &Path) -> io::Result<()> {
        // Directories are what the names of files imply.
        Ok(())
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<String>> {
        let state = self.disk.state.lock();
        let name = |path: &Path| {
            // The first part below the directory: a file's name, or a directory that has files.
            let first = path.strip_prefix(dir).ok()?.components().next()?;
            Some(first.as_os_str().to_str()?.to_owned())
        };
        let mut names: Vec<String> = state.names.keys().filter_map(|path| name(path)).collect();
        names.dedup();
        Ok(names)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let state = self.disk.state.lock();
        let file = *state.names.get(path).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(Handle { disk: self.disk.clone(), boot: state.boot, file }))
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let mut state = self.disk.state.lock();
        if state.names.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let file = state.new_file(path);
        state.unsynced_names.push((path.to_owned(), NameChange::Set(file)));
        Ok(Arc::new(Handle { disk: self.disk.clone(), boot: state.boot, file }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        let file = *state.names.get(from).ok_or(io::ErrorKind::NotFound)?;
        let change = NameChange::Renamed { to: to.to_owned(), file };
        change.apply(from, &mut state.names);
        state.unsynced_names.push((from.to_owned(), change));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        state.names.remove(path).ok_or(io::ErrorKind::NotFound)?;
        state.unsynced_names.push((path.to_owned(), NameChange::Removed));
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut state = self.disk.state.lock();
        let boot = state.boot;
        let failing = self.disk.begin_sync(&mut state);
        if boot != state.boot {
            return Err(io::Error::other("the power went"));
        }
        if failing {
            return Err(io::Error::other("the disk did not take the names"));
        }
        let state = &mut *state;
        for (path, change) in std::mem::take(&mut state.unsynced_names) {
            if path.parent() == Some(dir) {
                change.apply(&path, &mut state.durable_names);
            } else {
                state.unsynced_names.push((path, change));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn synced_bytes_survive_every_crash_and_unsynced_ones_some() {
        let (mut kept, mut lost) = (0, 0);
        for seed in 0..64 {
            let fs = FaultFs::new();
            let path = Path::new("d/a");
            let file = fs.create(path).unwrap();
            file.write_at(b"safe", 0).unwrap();
            file.sync_data().unwrap();
            fs.sync_dir(Path::new("d")).unwrap();
            file.write_at(b"unsafe", 4).unwrap();
            fs.crash(seed);
            assert!(file.size().is_err());
            let bytes = fs.bytes(path).unwrap();
            assert!(bytes.starts_with(b"safe"));
            if bytes == b"safeunsafe" { kept += 1 } else { lost += 1 }
        }
        assert!(kept > 0 && lost > 0);
    }

    #[test]
    fn a_failed_sync_loses_what_a_later_one_seems_to_save() {
        let fs = FaultFs::new();
        let file = fs.create(Path::new("d/a")).unwrap();
        fs.sync_dir(Path::new("d")).unwrap();
        file.write_at(b"gone", 0).unwrap();
        fs.fail_sync(1);
        file.sync_data().unwrap_err();
        file.sync_data().unwrap();
        assert_eq!(fs.bytes(Path::new("d/a")).unwrap(), b"gone");
        fs.crash(0);
        assert_eq!(fs.bytes(Path::new("d/a")).unwrap(), b"");
    }

    #[test]
    fn a_name_not_synced_may_be_lost() {
        let lost = (0..64).filter(|seed| {
            let fs = FaultFs::new();
            fs.create(Path::new("d/a")).unwrap().sync_data().unwrap();
            fs.crash(*seed);
            fs.paths().is_empty()
        });
        assert!((1..64).contains(&lost.count()));
    }
}
