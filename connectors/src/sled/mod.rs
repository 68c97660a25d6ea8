//! Checkpoints in sled: one database with one tree per node, for all shards of the node.
//!
//! sled alone does not keep what it was given when power fails, may panic on a damaged file, may
//! open one in an older state without a word, and never forgets an error. So:
//!
//! * **Write.** chunks → sled's flush → fsync of `db` → manifest → flush → fsync → ledger (fsync,
//!   rename, fsync of the directory); only then `Ok`. A crash before the manifest is durable leaves
//!   chunks that nothing stands for, removed at the next opening. A crash after it leaves a
//!   checkpoint that was not acknowledged but is whole, and is believed.
//! * **Belief.** A checkpoint is believed when its frame, the hash of its chunks and its link to the
//!   checkpoint before it are right, up to its base ([`crate::checkpoint_record`]). No state that was
//!   not written as such can pass, whatever sled returns.
//! * **Loss is noticed.** The ledger names the last acknowledged checkpoint of each shard. What it
//!   names and sled no longer has is reported ([`OpenReport::lost`]).
//! * **Damage.** When sled cannot open the directory it is renamed to `<dir>.damaged-<time>` and an
//!   empty one begun. When it opens but anything read from it does not verify, what does verify is
//!   copied into a fresh directory first. Nothing damaged is ever deleted, and nothing is repaired
//!   in place.
//! * **Errors stick.** sled answers a failed write with the same error for ever. The call that met
//!   it fails; the next call opens the database anew by itself. After a failed fsync or a panic the
//!   files are not trusted: the next call keeps what verifies in a fresh directory.
//! * **Panics** of sled become errors. That needs unwinding: a panic hook that aborts must spare
//!   panics inside this module ([`in_sled`] tells), or a damaged file ends the process each time.
//! * **Space.** sled's files are rewritten into a fresh directory when they take more than
//!   [`SledOptions::compact_factor`] times what they hold, at opening and after pruning.
//!
//! The life cycle of the directory: `<dir>.building` is being written and worth nothing;
//! `<dir>.ready` is complete and used when `<dir>` is missing; `<dir>.old` is about to be deleted.
//! `<dir>.lock` is locked while a process has the store open. Not for network file systems, whose
//! locks and renames give no such promises.
//!
//! All calls block and exclude each other: one writer at a time also keeps sled's pages small, see
//! [`layout`].

mod directory;
pub mod layout;
mod ledger;
mod state;
mod tree;

#[cfg(test)]
mod tests;

use std::fmt;
use std::fs;
use std::path::PathBuf;

use bytes::Bytes;
use meterr_operators::ids::ShardId;
use parking_lot::Mutex;

use self::directory::{Fail, beside, close_database, sync_database};
use self::ledger::Tip;
use self::state::{Health, State, failed};
use crate::checkpoint::{Chain, CheckpointError, CheckpointStore, Manifest, Notice, Verified};
use crate::checkpoint_record::{
    Place, Record, by_generation, link_of, newer_of, problem_of, refused,
};

pub use self::directory::in_sled;

/// Where and how checkpoints are kept.
#[derive(Debug, Clone)]
pub struct SledOptions {
    /// The directory; its parent is created. Files beside it begin with its name.
    pub dir: PathBuf,
    /// Newest format of chunks that the caller reads.
    pub format_known: u16,
    /// sled's cache, in bytes.
    pub cache_bytes: u64,
    /// The directory is rewritten when it takes more than so many times the bytes it holds …
    pub compact_factor: u32,
    /// … and this much more, in bytes.
    pub compact_floor_bytes: u64,
}

impl SledOptions {
    /// The defaults: 64 MiB of cache, rewritten above 4 times the content and 64 MiB.
    pub fn new(dir: impl Into<PathBuf>, format_known: u16) -> Self {
        SledOptions {
            dir: dir.into(),
            format_known,
            cache_bytes: 64 << 20,
            compact_factor: 4,
            compact_floor_bytes: 64 << 20,
        }
    }
}

/// What was found and done on the way; for the caller to log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// The directory was not there and was created.
    pub created: bool,
    /// Damaged directories that were moved aside. They are never deleted.
    pub moved_aside: Vec<MovedAside>,
    /// Acknowledged checkpoints that are no longer there. Shards go on from an older checkpoint or
    /// from the log.
    pub lost: Vec<LostCheckpoint>,
    /// The directory was rewritten because it had grown.
    pub compacted: Option<Compacted>,
    /// What else was wrong, as sentences.
    pub problems: Vec<String>,
}

impl OpenReport {
    /// All of it as sentences, for a log.
    pub fn notices(&self) -> Vec<String> {
        let moved = self.moved_aside.iter().map(|moved| {
            format!("damaged ({}); moved aside to {}", moved.cause, moved.to.display())
        });
        let lost = self.lost.iter().map(|lost| format!("{lost} is lost; an earlier one serves"));
        moved.chain(lost).chain(self.problems.iter().cloned()).collect()
    }

    /// Whether anything was damaged or lost.
    pub fn damaged(&self) -> bool {
        !(self.moved_aside.is_empty() && self.lost.is_empty() && self.problems.is_empty())
    }
}

/// A damaged directory that was moved aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MovedAside {
    /// Where it is now.
    pub to: PathBuf,
    /// What was wrong.
    pub cause: String,
}

/// An acknowledged checkpoint that is no longer there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LostCheckpoint {
    /// Its shard.
    pub shard: ShardId,
    /// Its generation.
    pub generation: u64,
    /// Its index in the generation.
    pub index: u32,
}

impl fmt::Display for LostCheckpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LostCheckpoint { shard, generation, index } = self;
        write!(f, "checkpoint {index} of generation {generation} of shard {shard}")
    }
}

/// Bytes on disk before and after a rewrite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compacted {
    /// Before.
    pub before: u64,
    /// After.
    pub after: u64,
}

/// A [`CheckpointStore`] in sled.
pub struct SledStore {
    state: Mutex<State>,
    /// Held until the database is closed.
    _lock: fs::File,
    #[cfg(test)]
    hook: Mutex<Option<tests::Hook>>,
}

impl SledStore {
    /// Opens or creates the store.
    ///
    /// # Errors
    /// [`CheckpointError::Locked`] when another process has it open, [`CheckpointError::Newer`] when
    /// a newer version wrote it, and [`CheckpointError::Store`] when the machine does not let it be
    /// opened (access, space). Damage is no error: it is reported, and the store is usable.
    pub fn open(options: SledOptions) -> Result<(SledStore, OpenReport), CheckpointError> {
        let dir = options.dir.clone();
        let failed_io =
            |error: std::io::Error| failed(format!("opening {dir:?}"), error.into(), &dir);
        if dir.file_name().is_none() {
            return Err(CheckpointError::Store {
                what: format!("opening {dir:?}"),
                cause: "the directory needs a name of its own".to_owned(),
            });
        }
        if let Some(parent) = dir.parent() {
            fs::create_dir_all(parent).map_err(failed_io)?;
        }
        let mut lock = fs::OpenOptions::new();
        let lock = lock.create(true).truncate(false).write(true).open(beside(&dir, "lock"));
        let lock = lock.map_err(failed_io)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(failed("", Fail::Locked, &dir)),
            Err(fs::TryLockError::Error(error)) => return Err(failed("", error.into(), &dir)),
        }
        let mut state = State::start(options)?;
        let report = std::mem::take(&mut state.report);
        let store = SledStore {
            state: Mutex::new(state),
            _lock: lock,
            #[cfg(test)]
            hook: Mutex::new(None),
        };
        Ok((store, report))
    }

    /// What was found and done since opening or the last call of this, for the caller to log and
    /// count after each operation.
    pub fn take_report(&self) -> OpenReport {
        std::mem::take(&mut self.state.lock().report)
    }

    /// Bytes of the directory on disk.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn disk_bytes(&self) -> Result<u64, CheckpointError> {
        let dir = self.state.lock().options.dir.clone();
        directory::size_of(&dir)
            .map_err(|error| failed(format!("size of {dir:?}"), error.into(), &dir))
    }

    /// Runs a write; sled is opened anew, or its files are rewritten, before the next call when it
    /// fails.
    fn change<T>(
        &self,
        what: impl FnOnce() -> String,
        run: impl FnOnce(&mut State) -> Result<T, Fail>,
    ) -> Result<T, CheckpointError> {
        let mut state = self.state.lock();
        state.heal()?;
        run(&mut state).map_err(|fail| {
            match &fail {
                Fail::Refused(_) => {}
                Fail::Damaged(cause) => state.health = Health::Rebuild(cause.clone()),
                Fail::Io(cause) => state.health = Health::Reopen(cause.clone()),
                Fail::Locked => state.health = Health::Reopen("locked".to_owned()),
            }
            let what = format!("{}; the next call opens it anew", what());
            failed(what, fail, &state.options.dir)
        })
    }

    /// Runs a read. Reading changes nothing, so an error only says that the files are damaged.
    fn read<T>(
        &self,
        what: impl FnOnce() -> String,
        run: impl Fn(&sled::Db) -> Result<T, Fail>,
    ) -> Result<T, CheckpointError> {
        let mut state = self.state.lock();
        state.heal()?;
        let first = match state.with(&run) {
            Err(Fail::Io(cause) | Fail::Damaged(cause)) => cause,
            result => return result.map_err(|fail| failed("", fail, &state.options.dir)),
        };
        state.health = Health::Rebuild(first);
        state.heal()?;
        state.with(&run).map_err(|fail| failed(what(), fail, &state.options.dir))
    }

    /// A place where tests look, copy, fail or panic.
    #[cfg(test)]
    fn step(&self, name: &str) -> Result<(), Fail> {
        let hook = self.hook.lock().clone();
        hook.map_or(Ok(()), |hook| hook(name))
    }

    #[cfg(not(test))]
    #[allow(clippy::unused_self, clippy::unnecessary_wraps)]
    fn step(&self, _name: &str) -> Result<(), Fail> {
        Ok(())
    }

    fn try_write(&self, state: &mut State, m: &Manifest, chunks: &[Bytes]) -> Result<(), Fail> {
        let dir = state.options.dir.clone();
        let place: Place = (m.generation, m.index);
        let (previous, replaced) = state.with(|db| {
            let slots = tree::slots(db, m.shard)?;
            let replaced = slots.iter().any(|(at, _)| *at >= place);
            Ok((link_of(&slots, m)?, replaced))
        })?;
        if replaced {
            // First the ledger: what is removed now must not be reported as lost after a crash.
            match place.1.checked_sub(1) {
                Some(index) => {
                    let tip = Tip { generation: place.0, index, hash: previous };
                    state.ledger.tips.insert(m.shard, tip);
                }
                None => drop(state.ledger.tips.remove(&m.shard)),
            }
            state.ledger.write(&dir)?;
        }
        let hash = state.with(|db| {
            if replaced {
                let (from, end) =
                    (layout::manifest_key(m.shard, place), layout::manifests_end(m.shard));
                tree::remove_manifests(db, from, end)?;
                db.flush()?;
            }
            let (from, end) =
                (layout::chunks_from(m.shard, place), layout::shard_chunks_end(m.shard));
            tree::remove(db, &from, &end)?;
            self.step("chunks")?;
            tree::put_chunks(db, m.shard, place, chunks)?;
            self.step("chunks written")?;
            sync_database(db, &dir)?;
            self.step("chunks synced")?;
            let hash = tree::put_manifest(db, &Record { manifest: m.clone(), previous })?;
            self.step("manifest written")?;
            sync_database(db, &dir)?;
            self.step("manifest synced")?;
            Ok(hash)
        })?;
        let before = state.ledger.clone();
        state.ledger.tips.insert(m.shard, Tip { generation: place.0, index: place.1, hash });
        if let Err(error) = state.ledger.write(&dir) {
            state.ledger = before;
            return Err(error.into());
        }
        Ok(())
    }
}

impl Drop for SledStore {
    fn drop(&mut self) {
        if let Some(db) = self.state.get_mut().db.take() {
            close_database(db);
        }
    }
}

impl CheckpointStore for SledStore {
    fn take_notices(&self) -> Vec<Notice> {
        self.take_report().notices().into_iter().map(Notice::Lost).collect()
    }

    fn write(&self, manifest: &Manifest, chunks: &[Bytes]) -> Result<(), CheckpointError> {
        if let Some(problem) = problem_of(manifest, chunks) {
            return Err(refused(problem));
        }
        let Manifest { shard, generation, index, .. } = manifest;
        let what = || {
            format!("checkpoint {index} of generation {generation} of shard {shard} not written")
        };
        self.change(what, |state| self.try_write(state, manifest, chunks))
    }

    fn list(&self, shard: ShardId) -> Result<Vec<Manifest>, CheckpointError> {
        let what = || format!("manifests of shard {shard} cannot be read");
        let slots = self.read(what, |db| tree::slots(db, shard.0))?;
        if let Some((found, known)) = newer_of(&slots) {
            return Err(CheckpointError::Newer { found, known });
        }
        let sound = slots.iter().filter_map(|(_, slot)| slot.sound());
        Ok(sound.map(|stored| stored.record.manifest.clone()).collect())
    }

    fn shards(&self) -> Result<Vec<ShardId>, CheckpointError> {
        self.read(|| "shards cannot be read".to_owned(), tree::shards)
    }

    fn load(&self, shard: ShardId, before: Option<u64>) -> Result<Option<Chain>, CheckpointError> {
        let known = self.state.lock().options.format_known;
        let what = || format!("checkpoint of shard {shard} cannot be read");
        let loaded = self.read(what, |db| {
            let slots = tree::slots(db, shard.0)?;
            let (mut newer, mut problems) = (None, Vec::new());
            for (generation, slots) in by_generation(&slots).rev() {
                if before.is_some_and(|before| generation >= before) {
                    continue;
                }
                let walked = directory::guard(|| {
                    tree::walk_generation(db, slots, known, |stored, chunks| {
                        (stored.record.manifest.clone(), chunks)
                    })
                });
                let sound = match walked {
                    Ok(sound) => sound,
                    Err(fail) => {
                        let cause = fail.cause();
                        problems.push(format!("shard {shard}, generation {generation}: {cause}"));
                        continue;
                    }
                };
                if let Some(problem) = sound.problem.filter(|_| sound.newer.is_none()) {
                    problems.push(format!("shard {shard}, generation {generation}: {problem}"));
                }
                if !sound.parts.is_empty() {
                    return Ok((Some(sound.parts), None, problems));
                }
                newer = newer.or(sound.newer);
            }
            Ok((None, newer, problems))
        });
        let (chain, newer, problems) = loaded?;
        if let Some(problem) = problems.first() {
            // What was read is sound, and stays so; the files are not, so that the next call rewrites
            // what is. The chain ends for good where it ends in the answer.
            self.state.lock().health = Health::Rebuild(problem.clone());
        }
        match (chain, newer) {
            (None, Some((found, known))) => Err(CheckpointError::Newer { found, known }),
            (chain, _) => Ok(chain),
        }
    }

    fn verify(&self, shard: ShardId) -> Result<Vec<Verified>, CheckpointError> {
        let known = self.state.lock().options.format_known;
        let what = || format!("checkpoints of shard {shard} cannot be read");
        self.read(what, |db| {
            let slots = tree::slots(db, shard.0)?;
            let verified = by_generation(&slots).map(|(generation, slots)| {
                let walked =
                    directory::guard(|| tree::walk_generation(db, slots, known, |_, _| ()));
                match walked {
                    Ok(sound) => sound.verified(shard.0, generation),
                    Err(fail) => Verified {
                        shard: shard.0,
                        generation,
                        sound: 0,
                        total: slots.len() as u32,
                        problem: Some(fail.cause()),
                    },
                }
            });
            Ok(verified.collect())
        })
    }

    fn prune(&self, shard: ShardId, keep: usize) -> Result<(), CheckpointError> {
        let what = || format!("old checkpoints of shard {shard} not removed");
        self.change(what, |state| {
            let known = state.options.format_known;
            state.with(|db| {
                let slots = tree::slots(db, shard.0)?;
                let generations: Vec<_> = by_generation(&slots).collect();
                let mut kept = 0;
                let mut oldest_kept = None;
                // The oldest need not be verified: there is nothing older to delete.
                for (generation, slots) in generations.iter().skip(1).rev() {
                    let sound = tree::walk_generation(db, slots, known, |_, _| ())?;
                    kept += usize::from(sound.problem.is_none());
                    if kept >= keep.max(1) {
                        oldest_kept = Some(*generation);
                        break;
                    }
                }
                let Some(oldest_kept) = oldest_kept else { return Ok(()) };
                let end: Place = (oldest_kept, 0);
                let from = layout::manifests_from(shard.0, (0, 0));
                if tree::remove_manifests(db, from, layout::manifest_key(shard.0, end))? {
                    // A crash must not leave manifests whose chunks are gone.
                    self.step("manifests removed")?;
                    db.flush()?;
                }
                let from = layout::chunks_from(shard.0, (0, 0));
                tree::remove(db, &from, &layout::chunks_from(shard.0, end))?;
                self.step("chunks removed")?;
                Ok(db.flush().map(drop)?)
            })?;
            state.compact_if_grown()
        })
    }
}
