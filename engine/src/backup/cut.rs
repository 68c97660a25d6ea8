//! The logs of an earlier moment, found in a backup.
//!
//! A moment is a time or a position:
//!
//! * **At a time** a log had the records whose log time is not after it. Of each shard all epochs
//!   committed then are kept, and what was acknowledged then and not yet committed is kept too: the
//!   restored engine counts it when it starts. Where the logs' clocks disagree (they are those of the
//!   servers that took the records), usage and control reach at least as far as the commits kept.
//! * **At a position** such as `3:1042,c:19` the logs named end exactly there, others where the backup
//!   ends. Of each shard the epochs are kept that contain nothing beyond.
//!
//! Either way usage and control are prefixes, and the output log is cut right behind a commit record
//! that contains no more than these. So the views of the restored engine are a recomputation of just
//! these prefixes: rows are a function of them alone.

use std::fmt;
use std::str::FromStr;

use anyhow::{Context, bail};
use meterr_connectors::backup::{BackupLog, LastCommit, LogPart, Manifest, Store};
use meterr_connectors::log::LogIdentity;
use meterr_connectors::nats::subjects::{CONTROL_STREAM, out_stream, usage_stream};
use meterr_operators::ids::{Positions, ShardId};
use meterr_operators::time::Time;

use super::source::{last_commit, seed};

/// A moment in the life of a deployment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Until {
    /// A log time.
    Time(Time),
    /// Positions.
    Positions(Positions),
}

impl FromStr for Until {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Until, &'static str> {
        const FORM: &str =
            "must be a time such as 2026-01-02T03:04:05Z or a position such as 3:1042,c:19";
        if let Ok(time) = Time::parse(text) {
            return Ok(Until::Time(time));
        }
        match text.parse::<Positions>() {
            Ok(positions) if positions != Positions::default() => Ok(Until::Positions(positions)),
            _ => Err(FORM),
        }
    }
}

impl fmt::Display for Until {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Until::Time(time) => time.fmt(f),
            Until::Positions(positions) => positions.fmt(f),
        }
    }
}

/// How far the logs of a moment reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cut {
    /// Last position of each log, in the manifest's order.
    pub ends: Vec<(LogIdentity, u64)>,
    /// The last commit kept of each shard, where there is one.
    pub commits: Vec<LastCommit>,
}

impl Cut {
    /// Ends of usage and control, as a position.
    pub fn positions(&self) -> Positions {
        let mut positions = Positions::default();
        for (identity, end) in &self.ends {
            let shard = identity.stream.strip_prefix("USAGE_").and_then(|n| n.parse().ok());
            match shard {
                Some(shard) => positions.raise(ShardId(shard), *end),
                None if identity.stream == CONTROL_STREAM => positions.control = Some(*end),
                None => {}
            }
        }
        positions
    }
}

/// One shard's logs in a backup.
struct Shard {
    id: ShardId,
    usage: BackupLog,
    out: BackupLog,
}

impl Shard {
    /// The last commit of the output log up to a position that will do.
    fn commit(
        &self,
        to: u64,
        fits: impl Fn(&LastCommit) -> bool,
    ) -> anyhow::Result<Option<LastCommit>> {
        let mut found = Ok(None);
        self.out.backwards(to, |record| {
            if !record.message.subject.ends_with(".commit") {
                return true;
            }
            match last_commit(self.id, record) {
                Ok(commit) if !fits(&commit) => true,
                other => {
                    found = other.map(Some);
                    false
                }
            }
        })?;
        found
    }
}

/// Finds the logs of a moment; without one, all that the backup has.
///
/// # Errors
/// When the backup does not have the moment, or cannot be read.
pub fn cut(store: &Store, manifest: &Manifest, until: Option<&Until>) -> anyhow::Result<Cut> {
    let part = |stream: &str| -> anyhow::Result<&LogPart> {
        manifest.log(stream).with_context(|| format!("the backup has no log {stream:?}"))
    };
    let control = BackupLog::new(store, part(CONTROL_STREAM)?);
    let mut shards = Vec::new();
    for id in (0..manifest.shards).map(ShardId) {
        let usage = BackupLog::new(store, part(&usage_stream(id))?);
        let out = BackupLog::new(store, part(&out_stream(id))?);
        shards.push(Shard { id, usage, out });
    }
    let ends = match until {
        None => whole(&shards, &control)?,
        Some(Until::Time(time)) => at_time(&shards, &control, manifest, *time)?,
        Some(Until::Positions(positions)) => at_positions(&shards, &control, positions)?,
    };
    let whole_control = control.cut(ends.control, part(CONTROL_STREAM)?.identity.clone());
    if seed(&whole_control)?.is_none() {
        match until {
            Some(until) => bail!("at {until} there was no deployment yet"),
            None => bail!("the backup holds no deployment: its control log has no seed"),
        }
    }
    let mut cut = Cut { ends: Vec::new(), commits: Vec::new() };
    for log in &manifest.logs {
        let stream = log.identity.stream.as_str();
        let of =
            |name: fn(ShardId) -> String| shards.iter().position(|shard| name(shard.id) == stream);
        let end = match (of(usage_stream), of(out_stream)) {
            (Some(shard), _) => ends.usage[shard],
            (_, Some(shard)) => ends.commits[shard].as_ref().map_or(0, |commit| commit.position),
            _ => ends.control,
        };
        cut.ends.push((log.identity.clone(), end));
    }
    cut.commits = ends.commits.into_iter().flatten().collect();
    Ok(cut)
}

/// Ends by shard.
struct Ends {
    usage: Vec<u64>,
    control: u64,
    commits: Vec<Option<LastCommit>>,
}

fn whole(shards: &[Shard], control: &BackupLog) -> anyhow::Result<Ends> {
    use meterr_connectors::log::Log;
    let commits = shards.iter().map(|shard| shard.commit(u64::MAX, |_| true));
    Ok(Ends {
        usage: shards.iter().map(|shard| shard.usage.head()).collect(),
        control: control.head(),
        commits: commits.collect::<Result<_, _>>()?,
    })
}

fn at_time(
    shards: &[Shard],
    control: &BackupLog,
    manifest: &Manifest,
    time: Time,
) -> anyhow::Result<Ends> {
    if time > manifest.begun_at {
        bail!(
            "the backup was begun at {}, so it does not have all of what came until {time}; choose a \
             later backup, or leave --until away to have all of this one",
            manifest.begun_at
        );
    }
    let mut ends = Ends { usage: vec![], control: control.position_at(time)?, commits: vec![] };
    for shard in shards {
        let commit = shard.commit(shard.out.position_at(time)?, |_| true)?;
        let (usage, control) =
            commit.as_ref().map_or((0, 0), |c| (c.usage_position, c.control_position));
        ends.usage.push(shard.usage.position_at(time)?.max(usage));
        ends.control = ends.control.max(control);
        ends.commits.push(commit);
    }
    Ok(ends)
}

fn at_positions(
    shards: &[Shard],
    control: &BackupLog,
    positions: &Positions,
) -> anyhow::Result<Ends> {
    use meterr_connectors::log::Log;
    if let Some((shard, _)) = positions.shards.iter().find(|(s, _)| s.0 as usize >= shards.len()) {
        bail!("there is no shard {shard}; the deployment has {}", shards.len());
    }
    let end = |log: &BackupLog, wanted: Option<u64>| match wanted {
        Some(wanted) if wanted > log.head() => {
            let stream = &log.identity().stream;
            bail!("the backup has log {stream:?} up to {}, not {wanted}", log.head())
        }
        wanted => Ok(wanted.unwrap_or(log.head())),
    };
    let mut ends =
        Ends { usage: vec![], control: end(control, positions.control)?, commits: vec![] };
    for shard in shards {
        let usage = end(&shard.usage, positions.of(shard.id))?;
        let control = ends.control;
        let fits = |c: &LastCommit| c.usage_position <= usage && c.control_position <= control;
        ends.usage.push(usage);
        ends.commits.push(shard.commit(u64::MAX, fits)?);
    }
    Ok(ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments() {
        let of = |text: &str| text.parse::<Until>();
        assert_eq!(of("3:1042,c:19").unwrap().to_string(), "3:1042,c:19");
        assert_eq!(of("2026-01-02T03:04:05Z").unwrap().to_string(), "2026-01-02T03:04:05Z");
        for wrong in ["", "yesterday", "3", "3:x"] {
            assert!(of(wrong).unwrap_err().contains("must be a time"), "{wrong}");
        }
    }
}
