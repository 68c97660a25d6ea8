//! Backups that a server makes by itself.
//!
//! A thread looks now and then whether a backup is due: the store knows when the newest one of this
//! deployment was begun, so restarts and changes of node do not matter. In a cluster a node first takes
//! the lock `backup.lock` of the registry, by compare-and-set with a time after which it counts no
//! longer, so that only one makes a backup; that only saves work, since a store takes two at once.
//! After each backup the store is cleaned up. What fails is logged, counted and tried again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use meterr_connectors::backup::{self, BackupError, Made, Pruned, Store};
use meterr_connectors::cluster::Registry;
use meterr_operators::time::Time;
use parking_lot::{Condvar, Mutex};

use super::lock::Lock;
use super::metrics::BackupMetrics;
use super::source::ends_of;
use super::{before, location, store};
use crate::copy::Location;
use crate::live::Logs;
use crate::metrics::Metrics;
use crate::node::now;
use crate::settings::Settings;

/// Longest time between looks whether a backup is due.
const LOOK_MAX: Duration = Duration::from_secs(60);
/// Time until a backup that failed is tried again.
const RETRY: Duration = Duration::from_secs(60);

/// The registry of a cluster, and this node's name in it.
pub type Cluster = (Arc<dyn Registry>, String);

/// Backups being made on a schedule.
pub struct Job {
    stopping: Arc<Stopping>,
    thread: std::thread::JoinHandle<()>,
}

#[derive(Default)]
struct Stopping {
    asked: AtomicBool,
    lock: Mutex<()>,
    told: Condvar,
}

impl Stopping {
    /// Waits so long, or until asked to stop; says whether to go on.
    fn wait(&self, wait: Duration) -> bool {
        let mut guard = self.lock.lock();
        let until = Instant::now() + wait;
        while !self.asked.load(Ordering::SeqCst) {
            if self.told.wait_until(&mut guard, until).timed_out() {
                break;
            }
        }
        !self.asked.load(Ordering::SeqCst)
    }
}

impl Job {
    /// Makes backups as the settings say, until stopped; `None` when they name no store. A replica
    /// makes none. Blocks on nothing.
    ///
    /// # Errors
    /// When the store's address or the key is wrong, or there is no thread.
    pub fn start(
        settings: &Settings,
        logs: Vec<Logs>,
        cluster: Option<Cluster>,
        metrics: &Metrics,
        runtime: tokio::runtime::Handle,
    ) -> anyhow::Result<Option<Job>> {
        if settings.backup.store.is_none() || settings.cluster.replica {
            return Ok(None);
        }
        let stopping = Arc::<Stopping>::default();
        let work = Work {
            store: store(settings)?,
            logs,
            location: location(settings),
            cluster,
            interval: settings.backup.interval,
            keep: settings.backup.keep,
            metrics: metrics.made(BackupMetrics::new),
            stopping: stopping.clone(),
        };
        let run = move || {
            // What the registry does needs one.
            let _runtime = runtime.enter();
            work.run();
        };
        let thread = std::thread::Builder::new().name("backup".to_owned()).spawn(run)?;
        Ok(Some(Job { stopping, thread }))
    }

    /// Ends it. A backup that is being made is broken off; what it wrote is used by the next one.
    pub fn stop(self) {
        self.stopping.asked.store(true, Ordering::SeqCst);
        {
            let _guard = self.stopping.lock.lock();
            self.stopping.told.notify_all();
        }
        if self.thread.join().is_err() {
            tracing::error!("the thread that makes backups panicked");
        }
    }
}

struct Work {
    store: Store,
    logs: Vec<Logs>,
    location: Location,
    cluster: Option<Cluster>,
    interval: Duration,
    keep: Duration,
    metrics: BackupMetrics,
    stopping: Arc<Stopping>,
}

impl Work {
    fn run(self) {
        let mut wait = Duration::ZERO;
        while self.stopping.wait(wait) {
            wait = match self.look() {
                Ok(wait) => wait,
                Err(_) if self.stopping.asked.load(Ordering::SeqCst) => return,
                Err(error) => {
                    self.metrics.failed();
                    let store = self.store.shown();
                    tracing::error!(store, "no backup was made: {error:#}; trying again");
                    RETRY
                }
            };
        }
    }

    /// Makes a backup if one is due; says when to look again.
    fn look(&self) -> anyhow::Result<Duration> {
        if let Some(wait) = self.wait()? {
            return Ok(wait);
        }
        let lock = match &self.cluster {
            None => None,
            Some((registry, node)) => match Lock::take(registry, node, now())? {
                Some(lock) => Some(lock),
                // Another node is at it.
                None => return Ok(LOOK_MAX.min(self.interval)),
            },
        };
        // Another node may have made one while this one waited for the lock.
        let done = match self.wait()? {
            Some(wait) => Ok(wait),
            None => self.back_up(lock.as_ref()),
        };
        if let Some(lock) = lock {
            lock.release();
        }
        done
    }

    /// How long until a backup is due; `None`: it is.
    fn wait(&self) -> anyhow::Result<Option<Duration>> {
        let control = self.logs.first().map(|logs| logs.control.identity().clone());
        let mut newest = None;
        for name in self.store.names()?.iter().rev() {
            match self.store.manifest(name) {
                Ok(manifest)
                    if manifest.logs.iter().any(|log| Some(&log.identity) == control.as_ref()) =>
                {
                    newest = Some(manifest.begun_at);
                    break;
                }
                Err(error @ BackupError::Blob(_)) => return Err(error.into()),
                // Another deployment's, or one that cannot be read: of no help.
                Ok(_) | Err(_) => {}
            }
        }
        if let Some(newest) = newest {
            self.metrics.newest(newest);
        }
        Ok(due(now(), newest, self.interval).map(|wait| wait.min(LOOK_MAX)))
    }

    fn back_up(&self, lock: Option<&Lock>) -> anyhow::Result<Duration> {
        let began = Instant::now();
        let ends = ends_of(&self.logs, &self.location)?;
        let mut heard = |_| {
            if let Some(lock) = lock {
                lock.renew(now());
            }
        };
        let stop = &self.stopping.asked;
        let made = backup::create(&self.store, &ends.wanted, &ends.about, stop, &mut heard)?;
        let took = began.elapsed();
        self.metrics.made(&made, took);
        let Made { manifest, bytes_written, segments_written, .. } = &made;
        let (backup, records) = (manifest.name(), manifest.records());
        let (segments, bytes, seconds) = (*segments_written, *bytes_written, took.as_secs_f64());
        tracing::info!(backup, records, segments, bytes, seconds, "backup made");
        let now = now();
        let pruned = backup::prune(&self.store, before(now, self.keep), now)?;
        self.metrics.pruned(&pruned);
        match &pruned {
            Pruned { stopped: Some(why), .. } => {
                tracing::warn!(why, "old backups were not cleaned up, or not all");
            }
            Pruned { backups, segments, bytes, .. } if !backups.is_empty() => {
                let backups = backups.len();
                tracing::info!(backups, segments, bytes, "old backups deleted");
            }
            Pruned { .. } => {}
        }
        Ok(LOOK_MAX.min(self.interval))
    }
}

/// How long until the next backup is due; `None`: it is. One that seems to be of the future, by a
/// clock that was wrong, does not count.
fn due(now: Time, newest: Option<Time>, interval: Duration) -> Option<Duration> {
    let age = now.0.checked_sub(newest?.0).and_then(|age| u64::try_from(age).ok())?;
    interval.checked_sub(Duration::from_micros(age)).filter(|wait| !wait.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_is_due_when_the_newest_is_old_enough() {
        let hour = Duration::from_secs(3600);
        let at = |seconds: i64| Time(1_800_000_000_000_000 + seconds * 1_000_000);
        assert_eq!(due(at(0), None, hour), None);
        assert_eq!(due(at(0), Some(at(-3599)), hour), Some(Duration::from_secs(1)));
        assert_eq!(due(at(0), Some(at(-3600)), hour), None);
        assert_eq!(due(at(0), Some(at(-9999)), hour), None);
        assert_eq!(due(at(0), Some(at(5)), hour), None);
        assert_eq!(due(at(0), Some(Time(i64::MIN)), hour), None);
    }

    #[test]
    fn waiting_ends_when_asked() {
        let stopping = Arc::<Stopping>::default();
        assert!(stopping.wait(Duration::from_millis(1)));
        let waiting = stopping.clone();
        let thread = std::thread::spawn(move || waiting.wait(Duration::from_secs(3600)));
        stopping.asked.store(true, Ordering::SeqCst);
        while !thread.is_finished() {
            let _guard = stopping.lock.lock();
            stopping.told.notify_all();
        }
        assert!(!thread.join().unwrap());
    }
}
