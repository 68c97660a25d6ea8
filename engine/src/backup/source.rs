//! What a backup of a deployment at work is to hold.
//!
//! The ends of the output logs first, then those of usage and control: see
//! [`meterr_connectors::backup`] for why that is a consistent cut.
//!
//! A data directory is read without its lock and without touching it, so whether a server has it open
//! does not matter; each of its logs stays for us as it was when it was opened, and the order of opening
//! is the order of the cut.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, bail};
use futures::executor::block_on;
use meterr_connectors::backup::{About, LastCommit, Wanted};
use meterr_connectors::copy::Place;
use meterr_connectors::embedded::{EmbeddedOptions, EmbeddedPlace, ReadOnlyFs};
use meterr_connectors::log::Log;
use meterr_connectors::nats::import::JetStreamPlace;
use meterr_connectors::nats::subjects::{CONTROL_STREAM, out_stream, usage_stream};
use meterr_operators::control::Seed;
use meterr_operators::ids::ShardId;

use crate::control_state::ControlState;
use crate::copy::Location;
use crate::live::Logs;
use crate::nats::Nats;
use crate::node::now;
use crate::records::{control_changes, parse_commit};
use crate::settings::Settings;

/// Version of this binary.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Logs with the ends that a backup has of them.
pub struct Ends {
    /// The logs: usage and output of each shard, the control log last.
    pub wanted: Vec<Wanted>,
    /// What the manifest says beside them.
    pub about: About,
}

/// A deployment, open for reading. Fields are dropped in order: logs before their server.
pub struct Source {
    /// What a backup is to hold.
    pub ends: Ends,
    _nats: Option<Nats>,
}

impl Source {
    /// Opens the deployment that the settings name.
    ///
    /// # Errors
    /// When there is none or it cannot be read.
    pub fn open(location: &Location, settings: &Settings) -> anyhow::Result<Source> {
        match location {
            Location::Embedded(dir) => {
                let place = || looked_at(dir, settings);
                if !dir.is_dir() {
                    bail!("there is no data directory {dir:?}; name one with --data-dir");
                }
                if place().unfinished()? {
                    bail!("{location} holds a copy or a restore that was not finished");
                }
                // Of its own: a log stays as it was when it was opened.
                let seed = seed_of(&place(), location)?;
                let ends = ends(seed.shards, &|stream| found(&place, stream, location), location)?;
                Ok(Source { ends, _nats: None })
            }
            Location::Nats(_) => {
                let wanted = settings.nats.clone().context("nats.url is empty")?;
                let nats = Nats::connect(&wanted)?;
                let place = || JetStreamPlace::new(nats.connections().clone(), 1, None);
                let seed = seed_of(&place(), location)?;
                let ends = ends(seed.shards, &|stream| found(&place, stream, location), location)?;
                Ok(Source { ends, _nats: Some(nats) })
            }
        }
    }
}

/// A data directory, only looked at.
fn looked_at(dir: &Path, settings: &Settings) -> EmbeddedPlace {
    let options = EmbeddedOptions {
        segment_bytes: settings.log.segment_bytes,
        tail_bytes: 64 * 1024,
        ..EmbeddedOptions::default()
    };
    EmbeddedPlace::new(dir, options, Arc::new(ReadOnlyFs))
}

fn found<P: Place>(
    place: &dyn Fn() -> P,
    stream: &str,
    location: &Location,
) -> anyhow::Result<Arc<dyn Log>> {
    let found = place().find(stream)?;
    found.with_context(|| format!("{location} has no log {stream:?}; serve it once"))
}

/// The seed record of a deployment.
fn seed_of(place: &dyn Place, location: &Location) -> anyhow::Result<Seed> {
    let control = place.find(CONTROL_STREAM)?;
    let control = control.with_context(|| {
        format!("{location} holds no deployment: it has no log {CONTROL_STREAM:?}")
    })?;
    seed(&*control)?.with_context(|| {
        format!("{location} holds no deployment that was ever served: its control log has no seed")
    })
}

/// The seed record in a control log.
///
/// # Errors
/// When the log cannot be read.
pub fn seed(control: &dyn Log) -> anyhow::Result<Option<Seed>> {
    let mut state = ControlState::default();
    for (position, change) in control_changes(control, 1, None)? {
        state.apply(position, &change).map_err(anyhow::Error::msg)?;
    }
    Ok(state.seed)
}

/// The ends of logs that this process has open.
///
/// # Errors
/// When one cannot be read.
pub fn ends_of(logs: &[Logs], shown: &Location) -> anyhow::Result<Ends> {
    let open = |stream: &str| {
        let of = |logs: &Logs| [logs.out.clone(), logs.usage.clone(), logs.control.clone()];
        let found = logs.iter().flat_map(of).find(|log| log.identity().stream == stream);
        found.with_context(|| format!("log {stream:?} is not open"))
    };
    ends(u16::try_from(logs.len())?, &open, shown)
}

fn ends(
    shards: u16,
    open: &dyn Fn(&str) -> anyhow::Result<Arc<dyn Log>>,
    shown: &Location,
) -> anyhow::Result<Ends> {
    let now = now();
    let mut outs = Vec::new();
    for shard in (0..shards).map(ShardId) {
        let out = open(&out_stream(shard))?;
        block_on(out.refresh())?;
        let commit = match block_on(out.last_commit())? {
            Some(record) => Some(last_commit(shard, &record)?),
            None => None,
        };
        outs.push((shard, out, commit));
    }
    let mut wanted = Vec::new();
    let mut commits = Vec::new();
    let mut control_least = 0;
    for (shard, out, commit) in outs {
        let usage = open(&usage_stream(shard))?;
        block_on(usage.refresh())?;
        let least = commit.as_ref().map_or(0, |commit| commit.usage_position);
        control_least =
            control_least.max(commit.as_ref().map_or(0, |commit| commit.control_position));
        reaches(&*usage, least)?;
        wanted.push(Wanted { to: usage.head(), log: usage });
        wanted.push(Wanted { to: commit.as_ref().map_or(0, |commit| commit.position), log: out });
        commits.extend(commit);
    }
    let control = open(CONTROL_STREAM)?;
    block_on(control.refresh())?;
    reaches(&*control, control_least)?;
    wanted.push(Wanted { to: control.head(), log: control });
    let (source, version) = (shown.to_string(), VERSION.to_owned());
    Ok(Ends { wanted, about: About { now, source, version, shards, commits } })
}

/// A log that ends before what was committed from it was rolled back; nothing good comes of saving it
/// over older backups.
fn reaches(log: &dyn Log, least: u64) -> anyhow::Result<()> {
    let (head, stream) = (log.head(), &log.identity().stream);
    if head < least {
        bail!(
            "log {stream:?} ends at {head}, but {least} was committed already: an older state of it \
             was put underneath"
        );
    }
    Ok(())
}

/// A commit record as a manifest has it.
///
/// # Errors
/// When it cannot be read.
pub fn last_commit(
    shard: ShardId,
    record: &meterr_connectors::log::Record,
) -> anyhow::Result<LastCommit> {
    let commit = parse_commit(record)?;
    Ok(LastCommit {
        shard,
        position: record.position,
        epoch: commit.epoch,
        usage_position: commit.usage_position,
        control_position: commit.control_position,
        log_time: commit.log_time,
        token: commit.token,
    })
}
