//! Backup and recovery of a deployment: what `meterr backup` does, and the schedule inside a server.
//!
//! * `source` finds out what a backup is to hold, on a deployment at work.
//! * `cut` finds the logs of an earlier moment in a backup.
//! * `restore` makes a deployment of a backup.
//! * `job` makes backups on a schedule inside a server.
//! * `deep` recomputes the views of a backup and compares them with what it says was published.
//!
//! How a backup is kept stands in [`meterr_connectors::backup`].
//!
//! **A restored deployment is another one.** Its logs get identities of their own: the old deployment,
//! if it still is somewhere, may have gone on behind the end of the backup, and the restored one goes
//! on from there in its own way, so the same position can hold different records. A checkpoint of the
//! old one is therefore refused by the restored one with an alarm, and the other way round; a restored
//! node begins with an empty checkpoint store and rebuilds its state from the logs. A backup of the
//! restored one shares the segments, since these hold no identity.

pub(crate) mod command;
pub mod cut;
pub mod deep;
pub mod job;
mod lock;
mod metrics;
mod place;
pub mod restore;
pub mod source;

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use meterr_connectors::backup::{Key, Store};
use meterr_operators::time::Time;

use crate::copy::Location;
use crate::settings::Settings;

/// Most bytes of a key file.
const KEY_LEN_MAX: u64 = 1024;

/// The store that the settings name.
///
/// # Errors
/// When none is named, or it or its key cannot be used.
pub fn store(settings: &Settings) -> anyhow::Result<Store> {
    let backup = &settings.backup;
    let url = backup.store.as_deref().context(
        "no backup store is named; give --store, or set backup.store in the configuration",
    )?;
    let key = backup.key_file.as_deref().map(key).transpose()?;
    Ok(Store::new(place::blobs(url, settings)?, key))
}

fn key(path: &Path) -> anyhow::Result<Key> {
    use std::io::Read;
    let failed = || format!("cannot read the key {}", path.display());
    let mut text = String::new();
    let file = std::fs::File::open(path).with_context(failed)?;
    file.take(KEY_LEN_MAX).read_to_string(&mut text).with_context(failed)?;
    Key::parse(&text).with_context(|| format!("{} does not hold a key", path.display()))
}

/// Where the settings say that the deployment is.
pub fn location(settings: &Settings) -> Location {
    match &settings.nats {
        Some(nats) => Location::Nats(nats.connection.url.clone()),
        None => Location::Embedded(settings.node.data_dir.clone()),
    }
}

/// The time so long before.
pub(crate) fn before(now: Time, age: Duration) -> Time {
    Time(now.0.saturating_sub(i64::try_from(age.as_micros()).unwrap_or(i64::MAX)))
}
