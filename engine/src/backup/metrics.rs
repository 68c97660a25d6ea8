//! What backups on a schedule measure.

use std::time::Duration;

use meterr_connectors::backup::{Made, Pruned};
use meterr_operators::time::Time;
use metrics::{Counter, Gauge, Unit, counter, describe_counter, describe_gauge, gauge};

const NEWEST: &str = "meterr_backup_newest_timestamp_seconds";
const SECONDS: &str = "meterr_backup_duration_seconds";
const BYTES: &str = "meterr_backup_bytes";
const WRITTEN_TOTAL: &str = "meterr_backup_written_bytes_total";
const MADE_TOTAL: &str = "meterr_backup_made_total";
const FAILURES_TOTAL: &str = "meterr_backup_failures_total";
const PRUNED_TOTAL: &str = "meterr_backup_pruned_total";

/// Handles.
pub(super) struct BackupMetrics {
    newest: Gauge,
    seconds: Gauge,
    bytes: Gauge,
    written: Counter,
    made: Counter,
    failures: Counter,
    pruned: Counter,
}

impl BackupMetrics {
    pub(super) fn new() -> BackupMetrics {
        describe_gauge!(
            NEWEST,
            Unit::Seconds,
            "when the newest backup of this deployment was begun, in seconds since 1970; 0: none"
        );
        describe_gauge!(SECONDS, Unit::Seconds, "time that the last backup took");
        describe_gauge!(BYTES, Unit::Bytes, "size of the last backup before compression");
        describe_counter!(WRITTEN_TOTAL, Unit::Bytes, "bytes written to the store of backups");
        describe_counter!(MADE_TOTAL, Unit::Count, "backups made by this node");
        describe_counter!(FAILURES_TOTAL, Unit::Count, "backups or clean-ups that failed");
        describe_counter!(PRUNED_TOTAL, Unit::Count, "old backups deleted");
        BackupMetrics {
            newest: gauge!(NEWEST),
            seconds: gauge!(SECONDS),
            bytes: gauge!(BYTES),
            written: counter!(WRITTEN_TOTAL),
            made: counter!(MADE_TOTAL),
            failures: counter!(FAILURES_TOTAL),
            pruned: counter!(PRUNED_TOTAL),
        }
    }

    /// When the newest backup in the store was begun.
    pub(super) fn newest(&self, begun: Time) {
        self.newest.set(begun.0 as f64 / 1e6);
    }

    /// A backup was made.
    pub(super) fn made(&self, made: &Made, took: Duration) {
        self.newest(made.manifest.begun_at);
        self.seconds.set(took.as_secs_f64());
        self.bytes.set(made.manifest.bytes() as f64);
        self.written.increment(made.bytes_written);
        self.made.increment(1);
    }

    /// Something failed.
    pub(super) fn failed(&self) {
        self.failures.increment(1);
    }

    /// The store was cleaned up.
    pub(super) fn pruned(&self, pruned: &Pruned) {
        self.pruned.increment(pruned.backups.len() as u64);
    }
}
