//! Life cycle of the database: begin, check at opening, open anew after an error, and rewrite into a
//! fresh directory when the present one is damaged or has grown.

use std::fs;
use std::path::Path;

use meterr_operators::ids::{SHARDS_MAX, ShardId};

use super::directory::{
    Fail, aside, beside, close_database, guard, open_database, remove, size_of, sync_database,
    sync_dir, sync_parent,
};
use super::ledger::{Ledger, Tip};
use super::tree::{self, Slots};
use super::{Compacted, LostCheckpoint, MovedAside, OpenReport, SledOptions};
use crate::checkpoint::CheckpointError;
use crate::checkpoint_record::{by_generation, newer_of};

/// Whether the open database may be used.
#[derive(Debug)]
pub(super) enum Health {
    /// It may.
    Good,
    /// sled met an error it will not forget: close it and open it anew.
    Reopen(String),
    /// Its files cannot be trusted: keep what verifies in a fresh directory.
    Rebuild(String),
}

pub(super) struct State {
    pub options: SledOptions,
    pub db: Option<sled::Db>,
    pub health: Health,
    pub ledger: Ledger,
    /// What was found and done since the caller asked last.
    pub report: OpenReport,
}

/// Says in a [`CheckpointError`] what was tried.
pub(super) fn failed(what: impl Into<String>, fail: Fail, dir: &Path) -> CheckpointError {
    match fail {
        Fail::Refused(error) => error,
        Fail::Locked => CheckpointError::Locked { dir: dir.display().to_string() },
        fail => CheckpointError::Store { what: what.into(), cause: fail.cause() },
    }
}

impl State {
    /// The directory's state at opening.
    pub fn start(options: SledOptions) -> Result<State, CheckpointError> {
        let mut state = State {
            options,
            db: None,
            health: Health::Good,
            ledger: Ledger::default(),
            report: OpenReport::default(),
        };
        state.begin()?;
        Ok(state)
    }

    /// Makes the database usable, if it is not.
    pub fn heal(&mut self) -> Result<(), CheckpointError> {
        match std::mem::replace(&mut self.health, Health::Good) {
            Health::Good if self.db.is_some() => Ok(()),
            Health::Good => self.begin(),
            Health::Reopen(cause) => {
                if let Some(db) = self.db.take()
                    && !close_database(db)
                {
                    self.report.problems.push(format!(
                        "sled does not let go of its file after an error ({cause}); when it stays \
                         locked, restart the process"
                    ));
                }
                self.begin()
            }
            Health::Rebuild(cause) if self.db.is_some() => {
                self.rebuild(Some(&cause)).map_err(|fail| {
                    if self.db.is_some() {
                        self.health = Health::Rebuild(cause);
                    }
                    let what = "checkpoints cannot be rewritten into a fresh directory";
                    failed(what, fail, &self.options.dir)
                })
            }
            Health::Rebuild(_) => self.begin(),
        }
    }

    /// Opens the directory, creating it or moving a damaged one aside, and checks that what was
    /// acknowledged is there.
    fn begin(&mut self) -> Result<(), CheckpointError> {
        let dir = self.options.dir.clone();
        self.try_begin().map_err(|fail| {
            // Half begun is not begun: the next call starts over.
            if let Some(db) = self.db.take() {
                close_database(db);
            }
            failed(format!("opening {dir:?}"), fail, &dir)
        })
    }

    fn try_begin(&mut self) -> Result<(), Fail> {
        let dir = self.options.dir.clone();
        self.clear_leftovers()?;
        if !dir.exists() {
            self.create()?;
            self.report.created = true;
        }
        let ledger = Ledger::read(&dir);
        let mut damage = None;
        let mut fresh = false;
        match open_database(&dir, self.options.cache_bytes) {
            Ok(db) => match guard(|| tree::check_schema(&db)) {
                Ok(()) => self.db = Some(db),
                Err(Fail::Damaged(cause)) => {
                    self.db = Some(db);
                    damage = Some(cause);
                }
                Err(fail) => {
                    close_database(db);
                    return Err(fail);
                }
            },
            Err(Fail::Damaged(cause)) => {
                let to = aside(&dir);
                fs::rename(&dir, &to)?;
                sync_parent(&dir)?;
                self.create()?;
                self.db = Some(open_database(&dir, self.options.cache_bytes)?);
                self.report.moved_aside.push(MovedAside { to, cause });
                fresh = true;
            }
            Err(fail) => return Err(fail),
        }
        match ledger {
            Ok(ledger) => {
                let lost = self.lost(&ledger);
                self.report.lost.extend(&lost);
                // sled noticed nothing and gave an older state: nothing in the file is trusted
                // without a check.
                if let Some(first) = lost.first().filter(|_| !fresh) {
                    damage = damage.or_else(|| Some(format!("{first} is missing")));
                }
                self.ledger = if fresh { Ledger::default() } else { ledger };
            }
            // What was acknowledged is not known any more: report that and go by what is there.
            Err(cause) => {
                self.report.problems.push(cause);
                match self.tips() {
                    Ok(tips) => self.ledger = tips,
                    Err(fail) => damage = damage.or_else(|| Some(fail.cause())),
                }
                self.ledger.write(&dir)?;
            }
        }
        if damage.is_none() {
            match self.with(tree::remove_orphans) {
                Err(Fail::Damaged(cause)) => damage = Some(cause),
                // It only takes space.
                Err(fail) => self.report.problems.push(fail.cause()),
                Ok(()) => {}
            }
        }
        match damage {
            Some(cause) => self.rebuild(Some(&cause)),
            None => self.compact_if_grown(),
        }
    }

    /// Removes what a rewrite left that did not end, or ends it.
    fn clear_leftovers(&self) -> Result<(), Fail> {
        let dir = &self.options.dir;
        remove(&beside(dir, "building"))?;
        let ready = beside(dir, "ready");
        if dir.exists() {
            // The old one is still in its place and may have been written to since.
            remove(&ready)?;
            remove(&beside(dir, "old"))?;
        } else if ready.exists() {
            fs::rename(&ready, dir)?;
            sync_parent(dir)?;
            remove(&beside(dir, "old"))?;
        }
        Ok(())
    }

    /// Creates an empty database, complete or not at all.
    fn create(&self) -> Result<(), Fail> {
        let building = beside(&self.options.dir, "building");
        let db = self.build(&building)?;
        finish(db, &Ledger::default(), &building)?;
        fs::rename(&building, &self.options.dir)?;
        Ok(sync_parent(&self.options.dir)?)
    }

    fn build(&self, building: &Path) -> Result<sled::Db, Fail> {
        remove(building)?;
        if let Some(parent) = building.parent() {
            fs::create_dir_all(parent)?;
        }
        let db = open_database(building, self.options.cache_bytes)?;
        guard(|| tree::put_schema(&db))?;
        Ok(db)
    }

    /// Runs something on the open database; a panic of sled becomes an error.
    pub fn with<T>(&self, run: impl FnOnce(&sled::Db) -> Result<T, Fail>) -> Result<T, Fail> {
        let Some(db) = &self.db else {
            return Err(Fail::Io("the database is not open".to_owned()));
        };
        guard(|| run(db))
    }

    /// The newest readable manifest of each shard.
    fn tips(&self) -> Result<Ledger, Fail> {
        let mut ledger = Ledger::default();
        for shard in self.with(tree::shards)? {
            let slots = self.with(|db| tree::slots(db, shard.0))?;
            if let Some(tip) = tip_of(&slots) {
                ledger.tips.insert(shard.0, tip);
            }
        }
        Ok(ledger)
    }

    /// Acknowledged checkpoints that are not there.
    fn lost(&self, ledger: &Ledger) -> Vec<LostCheckpoint> {
        let there = |shard: u16, tip: &Tip| {
            // A shard that cannot be read counts as lost here; what verifies of it is kept later.
            self.with(|db| tree::slots(db, shard)).is_ok_and(|slots| has(&slots, tip))
        };
        let lost = ledger.tips.iter().filter(|(shard, tip)| !there(**shard, tip));
        lost.map(|(shard, tip)| LostCheckpoint {
            shard: ShardId(*shard),
            generation: tip.generation,
            index: tip.index,
        })
        .collect()
    }

    /// Keeps what verifies in a fresh directory and puts that into the place of the present one,
    /// which is moved aside when there is a `cause` or anything did not verify, and removed when
    /// this is a mere compaction.
    ///
    /// A crash leaves the old directory in place, or neither and `ready`, which the next opening
    /// puts in place.
    ///
    /// # Errors
    /// When the fresh directory cannot be written; the present one is then untouched, unless the
    /// last renames failed, in which case nothing is open.
    pub fn rebuild(&mut self, cause: Option<&str>) -> Result<(), Fail> {
        let dir = self.options.dir.clone();
        let (building, ready) = (beside(&dir, "building"), beside(&dir, "ready"));
        let new = self.build(&building)?;
        let mut ledger = Ledger::default();
        let mut problems = Vec::new();
        for shard in 0..SHARDS_MAX {
            match self.salvage(&new, shard, &mut problems) {
                Ok(Some(tip)) => {
                    ledger.tips.insert(shard, tip);
                }
                Ok(None) => {}
                Err(fail) => {
                    close_database(new);
                    remove(&building)?;
                    return Err(fail);
                }
            }
        }
        finish(new, &ledger, &building)?;
        remove(&ready)?;
        fs::rename(&building, &ready)?;
        sync_parent(&dir)?;

        // From here on the old database is closed, whether or not the rest succeeds.
        if let Some(db) = self.db.take()
            && !close_database(db)
        {
            self.report.problems.push("sled did not let go of the old database".to_owned());
        }
        let cause = cause.map(str::to_owned).or_else(|| problems.first().cloned());
        self.report.problems.append(&mut problems);
        let to = if cause.is_some() { aside(&dir) } else { beside(&dir, "old") };
        fs::rename(&dir, &to)?;
        fs::rename(&ready, &dir)?;
        sync_parent(&dir)?;
        match cause {
            Some(cause) => self.report.moved_aside.push(MovedAside { to, cause }),
            None => remove(&to)?,
        }
        self.db = Some(open_database(&dir, self.options.cache_bytes)?);
        self.ledger = ledger;
        Ok(())
    }

    /// Copies what verifies of a shard. Returns the newest checkpoint copied. An error means that
    /// the new database cannot be written; what cannot be read goes to `problems`.
    fn salvage(
        &self,
        new: &sled::Db,
        shard: u16,
        problems: &mut Vec<String>,
    ) -> Result<Option<Tip>, Fail> {
        let slots = match self.with(|db| tree::slots(db, shard)) {
            Ok(slots) => slots,
            Err(fail) => {
                problems.push(format!("shard {shard}: {}", fail.cause()));
                return Ok(None);
            }
        };
        let mut tip = None;
        for (generation, slots) in by_generation(&slots) {
            let mut written = Ok(());
            let copied = self.with(|db| {
                if newer_of(slots).is_some() {
                    // This version cannot read it, so it is kept as it is for the newer one.
                    tree::copy_raw(db, shard, generation, |key, value| {
                        if written.is_ok() {
                            written = guard(|| Ok(new.insert(key, value).map(drop)?));
                        }
                    })?;
                    return Ok(None);
                }
                // Chunks of a newer format verify by their hash like any other.
                let sound = tree::walk_generation(db, slots, u16::MAX, |stored, chunks| {
                    if written.is_ok() {
                        written = guard(|| tree::put_checkpoint(new, &stored.record, &chunks));
                    }
                    let index = stored.record.manifest.index;
                    tip = Some(Tip { generation, index, hash: stored.hash });
                })?;
                Ok(sound.problem)
            });
            written?;
            let problem = copied.unwrap_or_else(|fail| Some(fail.cause()));
            if let Some(problem) = problem {
                problems.push(format!("shard {shard}, generation {generation}: {problem}"));
            }
        }
        Ok(tip)
    }

    /// Rewrites the directory when it takes much more than what it holds. sled reclaims space by
    /// and by; this is for when it does not keep up. When it fails the present one stays in use.
    pub fn compact_if_grown(&mut self) -> Result<(), Fail> {
        let compacted = self.try_compact();
        match compacted {
            Err(fail) if self.db.is_some() => {
                self.report.problems.push(format!("compaction: {}", fail.cause()));
                Ok(())
            }
            compacted => compacted,
        }
    }

    fn try_compact(&mut self) -> Result<(), Fail> {
        let before = size_of(&self.options.dir)?;
        if before <= self.options.compact_floor_bytes {
            return Ok(());
        }
        let live = self.with(tree::live_bytes)?;
        let limit = live.saturating_mul(u64::from(self.options.compact_factor));
        if before <= limit.saturating_add(self.options.compact_floor_bytes) {
            return Ok(());
        }
        self.rebuild(None)?;
        let after = size_of(&self.options.dir)?;
        self.report.compacted = Some(Compacted { before, after });
        Ok(())
    }
}

/// Makes a directory that was built durable and closes it.
fn finish(db: sled::Db, ledger: &Ledger, dir: &Path) -> Result<(), Fail> {
    guard(|| sync_database(&db, dir))?;
    ledger.write(dir)?;
    if !close_database(db) {
        return Err(Fail::Io(format!("sled does not let go of {dir:?}")));
    }
    // sled writes a last time while it closes.
    fs::OpenOptions::new().read(true).open(dir.join("db"))?.sync_all()?;
    Ok(sync_dir(dir)?)
}

fn tip_of(slots: &Slots) -> Option<Tip> {
    let (place, stored) = slots.iter().rev().find_map(|(at, slot)| Some((at, slot.sound()?)))?;
    Some(Tip { generation: place.0, index: place.1, hash: stored.hash })
}

/// Whether a shard still has its acknowledged tip, or a newer one.
fn has(slots: &Slots, tip: &Tip) -> bool {
    let at = (tip.generation, tip.index);
    let newest = slots.iter().rev().find(|(_, slot)| slot.sound().is_some());
    newest.is_some_and(|(place, slot)| {
        *place > at || (*place == at && slot.sound().is_some_and(|stored| stored.hash == tip.hash))
    })
}
