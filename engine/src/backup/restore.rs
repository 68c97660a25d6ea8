//! Restoring: a deployment made of a backup, in a place that is empty.
//!
//! Each log is copied from the backup with positions, log times and headers, by the same steps as
//! `meterr log copy`: look whether the target can take it, copy what is missing, read it back and
//! compare every record, and only then mark it as finished. One that was interrupted goes on: the
//! target's logs tell by their identity which restore began them.

use std::sync::Arc;
use std::time::Instant;

use anyhow::bail;
use meterr_connectors::backup::{BackupLog, LastCommit, Manifest, Store, restored_identity};
use meterr_connectors::copy::{self, Compared, Place};
use meterr_connectors::log::Log;
use meterr_operators::ids::Positions;
use serde::Serialize;

use super::cut::{Cut, Until, cut};
use crate::copy::{Heard, Location, Opened, Phase, counted, millis};
use crate::settings::Settings;

/// Hexadecimal digits by which a restore is known.
const RESTORE_DIGITS: usize = 16;

/// What was restored.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// The store.
    pub store: String,
    /// Name of the backup.
    pub backup: String,
    /// Where to.
    pub to: String,
    /// The moment asked for.
    pub until: Option<String>,
    /// Shards.
    pub shards: u16,
    /// Ends of usage and control.
    pub positions: Positions,
    /// The last epoch of each shard.
    pub commits: Vec<LastCommit>,
    /// Records of all logs.
    pub records: u64,
    /// Records copied now; the others were there.
    pub copied: u64,
    /// Time that took, in milliseconds.
    pub copied_ms: u64,
    /// Comparison of what was read back with the backup.
    pub compared: Compared,
}

/// Restores a backup. `replicas`: servers that keep a copy of each stream created.
///
/// # Errors
/// Why it was not restored, or not in full; running it again goes on.
pub fn restore(
    store: &Store,
    manifest: &Manifest,
    until: Option<&Until>,
    to: &Location,
    settings: &Settings,
    replicas: Option<usize>,
    heard: Heard<'_>,
) -> anyhow::Result<Report> {
    let cut = cut(store, manifest, until)?;
    if let Location::Embedded(dir) = to
        && dir.join("checkpoints").exists()
    {
        bail!(
            "{to} is not empty: it has checkpoints of another deployment; name an empty directory, or \
             move this one away"
        );
    }
    let target = Opened::at(to, settings, replicas)?;
    let restore = begun(&*target.place)?.map_or_else(random, Ok)?;
    let logs = logs(store, manifest, &cut, &restore);
    let total: u64 = logs.iter().map(|log| log.head()).sum();
    let plan =
        counted(Phase::Look, total, heard, |heard| copy::plan(&logs, &*target.place, heard))?;
    let began = Instant::now();
    counted(Phase::Copy, plan.missing, heard, |heard| copy::copy(&plan, &*target.place, heard))?;
    let copied_ms = millis(began.elapsed());
    let mut compared = Compared::default();
    counted(Phase::Compare, plan.records, heard, |heard| {
        for log in &logs {
            let stream = &log.identity().stream;
            let Some(there) = target.place.find(stream)? else {
                return Err(copy::CopyError::Missing { stream: stream.clone(), position: 1 });
            };
            copy::compare(&**log, &*there, &mut compared, heard)?;
        }
        Ok(())
    })?;
    let report = Report {
        store: store.shown(),
        backup: manifest.name(),
        to: to.to_string(),
        until: until.map(ToString::to_string),
        shards: manifest.shards,
        positions: cut.positions(),
        commits: cut.commits,
        records: plan.records,
        copied: plan.missing,
        copied_ms,
        compared,
    };
    if report.compared.differences_total == 0 {
        target.place.finish()?;
    }
    drop((plan, logs));
    target.close();
    Ok(report)
}

/// The logs of a backup as they are to be.
fn logs(store: &Store, manifest: &Manifest, cut: &Cut, restore: &str) -> Vec<Arc<dyn Log>> {
    let name = manifest.name();
    let of = |part| {
        let log = BackupLog::new(store, part);
        let end = cut.ends.iter().find(|(identity, _)| identity == log.identity());
        let to = end.map_or(0, |(_, to)| *to);
        let identity = restored_identity(log.identity(), restore, &name, to);
        Arc::new(log.cut(to, identity)) as Arc<dyn Log>
    };
    manifest.logs.iter().map(of).collect()
}

/// The restore that began what is in a place, if one did.
fn begun(place: &dyn Place) -> anyhow::Result<Option<String>> {
    for stream in place.streams()? {
        let Some(log) = place.find(&stream)? else { continue };
        let uuid = &log.identity().uuid;
        let digits = |text: &str| {
            text.len() == RESTORE_DIGITS && text.bytes().all(|b| b.is_ascii_hexdigit())
        };
        // Anything else is another deployment's, which planning refuses.
        return Ok(uuid
            .split_once('-')
            .map(|(restore, _)| restore)
            .filter(|t| digits(t))
            .map(str::to_owned));
    }
    Ok(None)
}

fn random() -> anyhow::Result<String> {
    let bytes = crate::node::random_bytes()?;
    Ok(bytes.iter().take(RESTORE_DIGITS / 2).map(|byte| format!("{byte:02x}")).collect())
}
