//! `meterr mirror` and `meterr promote`: a second region that follows, and takes over.
//!
//! All streams of a deployment are mirrored to other servers. Mirrors follow one by one, so at any
//! moment the output log may be ahead of what its commits contain. Promoting therefore waits until usage
//! and control reach what the last commits name, makes the output logs its own first (they stand still
//! from then on), waits again, and then does the same to usage and control, the control log last: as long
//! as one stream is a mirror no node begins.
//!
//! With the old region in reach (`--old`) its streams are sealed before: nobody, producer or node, gets
//! an acknowledgement there any more, whatever token it has, and once the mirrors have caught up nothing
//! is missing. Without it what the mirrors had not received is lost, and nothing keeps producers and nodes
//! of the old region from going on there once it is back, as a deployment that parted ways.

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use futures::executor::block_on;
use meterr_connectors::log::Log;
use meterr_connectors::nats::import::{streams, wanted};
use meterr_connectors::nats::log::JetStreamLog;
use meterr_connectors::nats::region;
use meterr_connectors::nats::subjects::{CONTROL_STREAM, out_stream, usage_stream};
use meterr_operators::ids::ShardId;
use serde::Serialize;

use crate::backup::source::{last_commit, seed};
use crate::copy::millis;
use crate::nats::Nats;
use crate::settings::Settings;

/// How long mirrors may take to catch up.
const PATIENCE: Duration = Duration::from_secs(60);
/// Time between looks.
const LOOK: Duration = Duration::from_millis(100);

/// What was mirrored.
#[derive(Debug, Clone, Serialize)]
pub struct Mirrored {
    /// Streams of the deployment.
    pub streams: usize,
    /// Mirrors made now.
    pub made: usize,
}

/// What was promoted.
#[derive(Debug, Clone, Serialize)]
pub struct Promoted {
    /// Shards of the deployment.
    pub shards: u16,
    /// Streams that were mirrors.
    pub streams: usize,
    /// Whether the old region's streams were sealed and all they had is here.
    pub complete: bool,
    /// Usage positions that no commit contains yet; a node counts them when it starts.
    pub uncommitted: u64,
    /// Time it took, in milliseconds.
    pub took_ms: u64,
}

/// Connects to servers with the settings' credentials.
fn connect(url: &str, settings: &Settings) -> anyhow::Result<Nats> {
    let mut nats = settings.nats.clone().context("nats.url is empty; give --nats")?;
    nats.connection.url = url.to_owned();
    Ok(Nats::connect(&nats)?)
}

fn url(settings: &Settings) -> anyhow::Result<String> {
    let nats = settings.nats.as_ref().context("nats.url is empty; give --nats")?;
    Ok(nats.connection.url.clone())
}

/// Creates mirrors of all streams of a deployment.
///
/// # Errors
/// When either side cannot be used.
pub fn mirror(settings: &Settings, from: &str, api: &str) -> anyhow::Result<Mirrored> {
    let (old, new) = (connect(from, settings)?, connect(&url(settings)?, settings)?);
    let replicas = settings.nats.as_ref().map_or(1, |nats| nats.replicas);
    let names = old.runtime().block_on(streams(old.connections()))?;
    if !names.iter().any(|name| name == CONTROL_STREAM) {
        bail!("{} holds no deployment: it has no stream {CONTROL_STREAM:?}", old.shown());
    }
    let mut made = 0;
    for name in &names {
        let found = old.runtime().block_on(region::find(old.connections(), name))?;
        let found = found.with_context(|| format!("stream {name:?} vanished"))?;
        let config = region::mirror_of(&found.config, api, replicas);
        made += usize::from(new.runtime().block_on(region::mirror(new.connections(), &config))?);
    }
    Ok(Mirrored { streams: names.len(), made })
}

/// The new region's streams.
struct Region {
    nats: Nats,
    shards: u16,
}

impl Region {
    fn open(nats: Nats) -> anyhow::Result<Region> {
        let region = Region { nats, shards: 0 };
        let control = region.log(CONTROL_STREAM)?;
        let seed = seed(&control)?;
        let shards = seed.context("the control log has no seed yet; nothing was done")?.shards;
        Ok(Region { shards, ..region })
    }

    fn names(&self) -> Vec<String> {
        let of = |name: fn(ShardId) -> String| (0..self.shards).map(ShardId).map(name);
        let all = of(out_stream).chain(of(usage_stream));
        all.chain([CONTROL_STREAM.to_owned()]).collect()
    }

    fn log(&self, stream: &str) -> anyhow::Result<JetStreamLog> {
        let wanted = wanted(stream, 1, None)?.or_mirror();
        let connections = self.nats.connections();
        Ok(self.nats.runtime().block_on(JetStreamLog::open(connections, &wanted, None))?)
    }

    /// What is missing for the logs to be a deployment: what commits name and usage or control lack.
    /// Also how much usage no commit contains.
    fn lacking(&self) -> anyhow::Result<(Vec<String>, u64)> {
        let (mut lacking, mut uncommitted) = (Vec::new(), 0);
        let control = self.log(CONTROL_STREAM)?.head();
        for shard in (0..self.shards).map(ShardId) {
            let out = self.log(&out_stream(shard))?;
            let commit = match block_on(out.last_commit())? {
                Some(record) => Some(last_commit(shard, &record)?),
                None => None,
            };
            let of = commit.map_or((0, 0), |c| (c.usage_position, c.control_position));
            let usage = self.log(&usage_stream(shard))?.head();
            for (what, has, needs) in [("usage", usage, of.0), ("control", control, of.1)] {
                if has < needs {
                    lacking.push(format!(
                        "shard {shard}: {what} up to {needs} was committed, {has} has arrived"
                    ));
                }
            }
            uncommitted += usage.saturating_sub(of.0);
        }
        Ok((lacking, uncommitted))
    }

    fn complete(&self) -> anyhow::Result<u64> {
        let until = Instant::now() + PATIENCE;
        loop {
            let (lacking, uncommitted) = self.lacking()?;
            if lacking.is_empty() {
                return Ok(uncommitted);
            }
            if Instant::now() >= until {
                bail!(
                    "the mirrors do not fit together:\n  {}\nif the old region is lost, restore the \
                     newest backup instead; if it is in reach, give it with --old",
                    lacking.join("\n  ")
                );
            }
            std::thread::sleep(LOOK);
        }
    }

    fn promote(&self, stream: &str) -> anyhow::Result<bool> {
        let wanted = wanted(stream, 1, None)?;
        let promoted = region::promote(self.nats.connections(), &wanted);
        Ok(self.nats.runtime().block_on(promoted)?)
    }
}

/// Makes the mirrors the deployment's own streams; seals those of the old region first, if given.
///
/// # Errors
/// When the mirrors do not fit together (nothing was promoted then), or a server cannot be used; running
/// it again goes on.
pub fn promote(settings: &Settings, old: Option<&str>) -> anyhow::Result<Promoted> {
    let began = Instant::now();
    let region = Region::open(connect(&url(settings)?, settings)?)?;
    let names = region.names();
    if let Some(url) = old {
        seal(&region, &connect(url, settings)?, &names)?;
    }
    region.complete()?;
    let mut promoted = 0;
    let outs = usize::from(region.shards);
    for stream in &names[..outs] {
        promoted += usize::from(region.promote(stream)?);
    }
    // They stand still now; what they name may have grown since it was looked at.
    let uncommitted = region.complete()?;
    for stream in &names[outs..] {
        promoted += usize::from(region.promote(stream)?);
    }
    Ok(Promoted {
        shards: region.shards,
        streams: promoted,
        complete: old.is_some(),
        uncommitted,
        took_ms: millis(began.elapsed()),
    })
}

/// Seals the old region's streams and waits until all they have is here. Usage first: what was
/// acknowledged until then may still be committed there.
fn seal(region: &Region, old: &Nats, names: &[String]) -> anyhow::Result<()> {
    let mut heads = Vec::new();
    for stream in names.iter().rev() {
        heads.push((stream, old.runtime().block_on(region::seal(old.connections(), stream))?));
    }
    let until = Instant::now() + PATIENCE;
    for (stream, head) in heads {
        loop {
            let has = region.log(stream)?.head();
            if has >= head {
                break;
            }
            if Instant::now() >= until {
                bail!(
                    "the mirror of {stream} has {has} of {head} records; the old region is sealed, \
                     nothing was promoted; run this again when the mirrors have caught up"
                );
            }
            std::thread::sleep(LOOK);
        }
    }
    Ok(())
}
