//! The views of a backup, recomputed from its logs and compared with what it says was published.

use std::sync::Arc;

use anyhow::Context;
use meterr_connectors::backup::{BackupLog, Manifest, Store};
use meterr_connectors::log::Log;

use crate::copy::Deployment;
use crate::settings::Settings;
use crate::verify::{self, Report};

/// Recomputes all views, the slow way and as a node would at its start. `heard` is told of each shard.
///
/// # Errors
/// When the backup cannot be read.
pub fn verify(
    store: &Store,
    manifest: &Manifest,
    settings: &Settings,
    heard: &mut dyn FnMut(u64),
) -> anyhow::Result<Report> {
    let find = |stream: &str| {
        let part = manifest.log(stream);
        Ok(part.map(|part| Arc::new(BackupLog::new(store, part)) as Arc<dyn Log>))
    };
    let deployment = Deployment::of(&find, &format!("backup {}", manifest.name()))?;
    let mut report = Report::default();
    for shard in 0..deployment.shards() {
        verify::shard(&deployment.spec(shard, settings), &mut report)
            .with_context(|| format!("the views of shard {shard} cannot be recomputed"))?;
        heard(1);
    }
    Ok(report)
}
