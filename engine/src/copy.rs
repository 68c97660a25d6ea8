//! `meterr log copy`: moves a deployment between the embedded log and NATS, or to another directory or
//! server, with positions, times and identities.
//!
//! 1. Look: both places are opened, the target must be empty or hold the beginning of this very
//!    deployment, and must be able to take every record. Nothing is written.
//! 2. Copy what is missing: usage and output of each shard, the control log last.
//! 3. Read both sides back and compare every record.
//! 4. Recompute every view from either side, the slow way and as a node would at its start, and
//!    compare every row with the other side's.
//! 5. Only if all are the same the target is marked as finished.
//!
//! The source must stand still: a data directory is locked, and where others could write, the ends of
//! its logs are looked at again after each step. It is left as it was.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use meterr_connectors::checkpoint_memory::MemoryCheckpointStore;
use meterr_connectors::copy::{self, Compared, Place, Plan};
use meterr_connectors::embedded::{DataDirLock, EmbeddedOptions, EmbeddedPlace, RealFs};
use meterr_connectors::log::Log;
use meterr_connectors::nats::connection::shown;
use meterr_connectors::nats::import::JetStreamPlace;
use meterr_connectors::nats::subjects::{CONTROL_STREAM, out_stream, usage_stream};
use meterr_operators::control::Seed;
use meterr_operators::ids::ShardId;
use meterr_operators::rollup::ViewSet;
use serde::Serialize;
use tokio::sync::watch;

use crate::control_state::ControlState;
use crate::live::{Logs, Progress, ShardSpec};
use crate::nats::Nats;
use crate::records::control_changes;
use crate::settings::Settings;
use crate::snapshot;
use crate::verify;

/// Where the logs of a deployment are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// A data directory.
    Embedded(PathBuf),
    /// NATS servers.
    Nats(String),
}

impl FromStr for Location {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Location, &'static str> {
        match text.split_once(':') {
            Some(("embedded", dir)) if !dir.is_empty() => Ok(Location::Embedded(dir.into())),
            Some(("nats" | "tls", rest)) if rest.starts_with("//") && rest.len() > 2 => {
                Ok(Location::Nats(text.to_owned()))
            }
            Some(("nats", url)) if !matches!(url, "" | "//") => Ok(Location::Nats(url.to_owned())),
            _ => Err("must be embedded:DIR or nats:URL, such as nats://127.0.0.1:4222"),
        }
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Location::Embedded(dir) => write!(f, "embedded:{}", dir.display()),
            Location::Nats(url) => write!(f, "nats:{}", shown(url)),
        }
    }
}

/// What a copy is busy with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Looking through the source.
    Look,
    /// Copying records.
    Copy,
    /// Comparing records.
    Compare,
    /// Comparing views, shard by shard.
    Views,
}

/// Told of what goes on: the phase, work done in it so far, and all of it (0 while not known).
pub type Heard<'a> = &'a mut dyn FnMut(Phase, u64, u64);

/// What was copied and how it compares.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Source.
    pub from: String,
    /// Target.
    pub to: String,
    /// Shards.
    pub shards: u16,
    /// Records of all logs.
    pub records: u64,
    /// Records copied now; the others were there.
    pub copied: u64,
    /// Time that took, in milliseconds.
    pub copied_ms: u64,
    /// Comparison of all records.
    pub compared: Compared,
    /// Comparison of all views.
    pub views: verify::Report,
}

impl Report {
    /// Whether source and target are the same in everything.
    pub fn same(&self) -> bool {
        self.compared.differences_total == 0 && self.views.differences_total == 0
    }
}

/// A place with what keeps it open. Fields are dropped in order: the place before its server, and the
/// lock last.
pub(crate) struct Opened {
    pub(crate) place: Box<dyn Place>,
    nats: Option<Nats>,
    _lock: Option<DataDirLock>,
}

impl Opened {
    /// Opens a place; one that is not there is made.
    pub(crate) fn at(
        location: &Location,
        settings: &Settings,
        replicas: Option<usize>,
    ) -> anyhow::Result<Opened> {
        match location {
            Location::Embedded(dir) => {
                let lock = DataDirLock::acquire(dir)?;
                let options = EmbeddedOptions {
                    segment_bytes: settings.log.segment_bytes,
                    tail_bytes: 64 * 1024,
                    ..EmbeddedOptions::default()
                };
                let place = EmbeddedPlace::new(dir, options, Arc::new(RealFs));
                Ok(Opened { place: Box::new(place), nats: None, _lock: Some(lock) })
            }
            Location::Nats(url) => {
                let mut wanted = settings.nats.clone().context("nats.url is empty")?;
                wanted.connection.url.clone_from(url);
                let nats = Nats::connect(&wanted)?;
                let replicas = replicas.unwrap_or(wanted.replicas);
                let connections = nats.connections().clone();
                let place = JetStreamPlace::new(connections, replicas, wanted.stream_bytes_max);
                Ok(Opened { place: Box::new(place), nats: Some(nats), _lock: None })
            }
        }
    }

    /// Lets go of it.
    pub(crate) fn close(self) {
        drop(self.place);
        if let Some(nats) = self.nats {
            nats.close();
        }
    }
}

/// The logs of a deployment, found in a place.
pub(crate) struct Deployment {
    seed: Seed,
    shards: Vec<Logs>,
}

/// Finds a log by its name.
type Find<'a> = &'a dyn Fn(&str) -> anyhow::Result<Option<Arc<dyn Log>>>;

impl Deployment {
    fn find(place: &dyn Place, location: &Location) -> anyhow::Result<Deployment> {
        Deployment::of(&|stream| Ok(place.find(stream)?), &location.to_string())
    }

    /// The deployment whose logs are found so; `location` is what messages call it.
    pub(crate) fn of(find: Find<'_>, location: &str) -> anyhow::Result<Deployment> {
        let Some(control) = find(CONTROL_STREAM)? else {
            bail!("{location} holds no deployment: it has no log {CONTROL_STREAM:?}");
        };
        let mut state = ControlState::default();
        for (position, change) in control_changes(&*control, 1, None)? {
            state.apply(position, &change).map_err(anyhow::Error::msg)?;
        }
        let seed = state.seed.with_context(|| {
            format!(
                "{location} holds no deployment that was ever served: its control log has no seed"
            )
        })?;
        let find = |stream: String| {
            let found = find(&stream)?;
            found.with_context(|| format!("{location} has no log {stream:?}; serve it once"))
        };
        let shard = |shard| {
            let (usage, out) = (find(usage_stream(shard))?, find(out_stream(shard))?);
            anyhow::Ok(Logs { usage, control: control.clone(), out })
        };
        let shards = (0..seed.shards).map(ShardId).map(shard).collect::<Result<_, _>>()?;
        Ok(Deployment { seed, shards })
    }

    /// All logs in the order they are copied: the control log, which makes it a deployment, last.
    fn logs(&self) -> Vec<Arc<dyn Log>> {
        let of_shard = |logs: &Logs| [logs.usage.clone(), logs.out.clone()];
        let control = self.shards.first().map(|logs| logs.control.clone());
        self.shards.iter().flat_map(of_shard).chain(control).collect()
    }

    /// How many shards it has.
    pub(crate) fn shards(&self) -> usize {
        self.shards.len()
    }

    /// A shard as it is rebuilt from its logs alone.
    pub(crate) fn spec(&self, shard: usize, settings: &Settings) -> ShardSpec {
        ShardSpec {
            id: ShardId(shard as u16),
            shards: self.seed.shards,
            key: self.seed.hash_key,
            logs: self.shards[shard].clone(),
            checkpoints: Arc::new(MemoryCheckpointStore::new(snapshot::FORMAT)),
            views: ViewSet::DEFAULT,
            limits: (&settings.epoch).into(),
            checkpointing: (&settings.checkpoint).into(),
            // Whoever served it has agreed to its jumps.
            time_jump_max: i64::MAX,
            progress: watch::Sender::new(Progress::default()),
            announcer: None,
            shared_checkpoints: false,
        }
    }
}

/// Copies a deployment and compares everything.
///
/// # Errors
/// Why it was not copied, or not in full; running it again goes on.
pub fn run(
    from: &Location,
    to: &Location,
    replicas: Option<usize>,
    settings: &Settings,
    heard: Heard<'_>,
) -> anyhow::Result<Report> {
    if let Location::Embedded(dir) = from
        && !dir.is_dir()
    {
        // Opening it would make it.
        bail!("there is no data directory {dir:?}");
    }
    let source = Opened::at(from, settings, Some(1))?;
    let deployment = Deployment::find(&*source.place, from)?;
    if source.place.unfinished()? {
        bail!(
            "{from} is itself a copy that was not finished; finish it first, by the command that began \
             it"
        );
    }
    let target = Opened::at(to, settings, replicas)?;
    let logs = deployment.logs();
    let total: u64 = logs.iter().map(|log| log.head()).sum();
    let plan =
        counted(Phase::Look, total, heard, |heard| copy::plan(&logs, &*target.place, heard))?;
    let began = Instant::now();
    counted(Phase::Copy, plan.missing, heard, |heard| copy::copy(&plan, &*target.place, heard))?;
    let took = began.elapsed();
    let copied = Deployment::find(&*target.place, to)?;
    let (compared, views) = compare(&plan, &deployment, &copied, settings, heard)?;
    copy::stands_still(&plan)?;
    let report = Report {
        from: from.to_string(),
        to: to.to_string(),
        shards: deployment.seed.shards,
        records: plan.records,
        copied: plan.missing,
        copied_ms: millis(took),
        compared,
        views,
    };
    if report.same() {
        target.place.finish()?;
    }
    drop((plan, logs, deployment, copied));
    source.close();
    target.close();
    Ok(report)
}

pub(crate) fn millis(took: Duration) -> u64 {
    u64::try_from(took.as_millis()).unwrap_or(u64::MAX)
}

/// Runs a step that tells of more work done, and tells of the sum.
pub(crate) fn counted<T>(
    phase: Phase,
    total: u64,
    heard: &mut dyn FnMut(Phase, u64, u64),
    step: impl FnOnce(copy::Heard<'_>) -> Result<T, copy::CopyError>,
) -> Result<T, copy::CopyError> {
    let mut done = 0;
    heard(phase, 0, total);
    step(&mut |more| {
        done += more;
        heard(phase, done, total);
    })
}

/// Every record, then every row of every view.
fn compare(
    plan: &Plan,
    source: &Deployment,
    copied: &Deployment,
    settings: &Settings,
    heard: Heard<'_>,
) -> anyhow::Result<(Compared, verify::Report)> {
    let mut compared = Compared::default();
    counted(Phase::Compare, plan.records, heard, |heard| {
        for (step, log) in plan.steps.iter().zip(copied.logs()) {
            copy::compare(&*step.source, &*log, &mut compared, heard)?;
        }
        Ok(())
    })?;
    let mut views = verify::Report::default();
    let shards = source.shards.len();
    for shard in 0..shards {
        heard(Phase::Views, shard as u64, shards as u64);
        let (source, copied) = (source.spec(shard, settings), copied.spec(shard, settings));
        verify::copied(&source, &copied, &mut views)
            .with_context(|| format!("the views of shard {shard} cannot be compared"))?;
    }
    Ok((compared, views))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations() {
        let of = |text: &str| text.parse::<Location>();
        assert_eq!(of("embedded:/a:b"), Ok(Location::Embedded("/a:b".into())));
        for (text, url) in [
            ("nats:127.0.0.1:4222", "127.0.0.1:4222"),
            ("nats:nats://a:1,nats://b:2", "nats://a:1,nats://b:2"),
            ("nats:tls://a:1", "tls://a:1"),
            ("nats://a:1", "nats://a:1"),
            ("tls://a:1", "tls://a:1"),
        ] {
            assert_eq!(of(text), Ok(Location::Nats(url.to_owned())), "{text}");
        }
        for text in ["", "embedded:", "nats:", "nats://", "/a", "http://a", "tls:a"] {
            assert!(of(text).is_err(), "{text}");
        }
        let shown = of("nats:nats://me:secret@a:1").unwrap().to_string();
        assert_eq!(shown, "nats:nats://a:1");
    }
}
