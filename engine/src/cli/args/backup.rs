//! Arguments of `backup`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand};

use super::ConfigArgs;
use super::values::until;
use crate::backup::cut::Until;
use crate::quantity::parse_duration;

/// `backup …`
#[derive(Debug, Clone, Subcommand)]
pub enum BackupCommand {
    /// Save all logs of a deployment, at work or not: what is new since the last backup
    Create(BackupCreateArgs),
    /// List the backups of a store
    List(BackupListArgs),
    /// Read a backup and check all of it
    Verify(BackupVerifyArgs),
    /// Make a deployment of a backup, as it was last or at an earlier moment
    Restore(BackupRestoreArgs),
    /// Delete old backups and what only they needed
    Prune(BackupPruneArgs),
}

impl BackupCommand {
    /// The store's arguments.
    pub fn store(&self) -> &BackupStoreArgs {
        match self {
            BackupCommand::Create(args) => &args.store,
            BackupCommand::List(args) => &args.store,
            BackupCommand::Verify(args) => &args.store,
            BackupCommand::Restore(args) => &args.store,
            BackupCommand::Prune(args) => &args.store,
        }
    }
}

/// Where backups are.
#[derive(Debug, Clone, Args)]
pub struct BackupStoreArgs {
    /// Store of backups (backup.store): file:///DIR, s3://BUCKET/PREFIX or nats://HOST:4222
    #[arg(long, value_name = "URL")]
    pub store: Option<String>,
    /// File with the key of an encrypted store (backup.key_file)
    #[arg(long, value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// Which configuration to use.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `backup create`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
The deployment goes on meanwhile, and need not run: a data directory is read as it is, without its \
lock; with --nats this runs on any machine that reaches the servers. Everything acknowledged before \
the command was given is in the backup, and every epoch in it is whole. Only what the store lacks is \
written. A server with backup.store set makes backups by itself, every backup.interval.

With a key, content and names are encrypted. Make one with: openssl rand -hex 32 > key
Keep a copy of it elsewhere: without it nothing can be restored.

Examples:
  meterr backup create --store file:///mnt/backups --data-dir /var/lib/meterr
  meterr backup create --store s3://acme-backups/meterr --key-file key --nats nats://10.0.0.1:4222")]
pub struct BackupCreateArgs {
    /// Where backups are.
    #[command(flatten)]
    pub store: BackupStoreArgs,
}

/// `backup list`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Shows when each backup was begun, what it holds and up to which log time. One that cannot be read is \
shown with the reason; the exit code is 4 then.

Example:
  meterr backup list --store file:///mnt/backups")]
pub struct BackupListArgs {
    /// Where backups are.
    #[command(flatten)]
    pub store: BackupStoreArgs,
}

/// `backup verify`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Reads every segment and checks that it is there and undamaged and that no record is missing. With \
--deep all views are recomputed from the backup, the slow way and as a server would when it starts, \
and every row is compared with what was published. Exit code 4 when anything is wrong. A backup made \
after some segment was lost or damaged is sound only if the deployment still has those records: run \
`backup create` again.

Examples:
  meterr backup verify --store file:///mnt/backups
  meterr backup verify 20260102T0304 --store file:///mnt/backups --deep --json")]
pub struct BackupVerifyArgs {
    /// Name of the backup or its beginning; the newest without it
    pub backup: Option<String>,
    /// Recompute and compare all views, too
    #[arg(long)]
    pub deep: bool,
    /// Where backups are.
    #[command(flatten)]
    pub store: BackupStoreArgs,
}

/// `backup restore`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
The target, a data directory or a NATS account, must be empty. Records are restored with their \
positions, log times and headers, then read back and compared; exit code 4 when anything differs. An \
interrupted restore goes on when the same command is run again.

--until restores an earlier moment, exactly. A TIME: all that was acknowledged by then, by log time, \
and all epochs committed by then. A POSITION, as answers give it in as_of, such as 3:1042,c:19: the \
logs named end there, others where the backup ends. Give the moment just before a mistake to undo it.

The restored deployment is another one: its logs have identities of their own, so that checkpoints of \
the old one cannot be taken for its own. Start it with an empty data directory (of its own, with \
--nats), never beside the old one, and run `meterr verify` first. The first start reads all of the \
logs. Subscribers that saw epochs behind the moment restored must begin with a snapshot.

Examples:
  meterr backup restore --store file:///mnt/backups --data-dir /srv/meterr
  meterr backup restore --store s3://acme-backups/meterr --nats nats://10.0.0.1:4222 --replicas 3
  meterr backup restore --store file:///mnt/backups --data-dir /srv/meterr --until 2026-01-02T03:04:05Z")]
pub struct BackupRestoreArgs {
    /// Name of the backup or its beginning; the newest without it
    pub backup: Option<String>,
    /// The moment to restore
    #[arg(long, value_name = "TIME|POSITION", value_parser = until)]
    pub until: Option<Until>,
    /// Servers that keep a copy of each stream created (nats.replicas)
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=5))]
    pub replicas: Option<u8>,
    /// Where backups are.
    #[command(flatten)]
    pub store: BackupStoreArgs,
}

/// `backup prune`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Deletes backups begun longer ago than --keep, then the segments that no backup needs. The newest backup \
is kept, however old. Does nothing while a backup is being made, and deletes no segment while there is \
a backup it cannot read. A server with backup.store set does this after each backup.

Example:
  meterr backup prune --store file:///mnt/backups --keep 30d")]
pub struct BackupPruneArgs {
    /// Age at which backups are deleted (backup.keep)
    #[arg(long, value_parser = parse_duration, value_name = "DURATION")]
    pub keep: Option<Duration>,
    /// Where backups are.
    #[command(flatten)]
    pub store: BackupStoreArgs,
}

/// `mirror`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Run once for each deployment: afterwards the servers follow by themselves. The new servers must reach the \
old ones: by a leaf node (with a JetStream domain on each side; the API is then $JS.DOMAIN.API), or by an \
import of the old account's API. Nothing else of the deployment may cross, or each region would take what \
is published in the other once it is promoted: let a leaf node's remote have deny_imports and deny_exports \
of usage.>, out.>, control, spend.> and meterr.>.

A replica may serve reads from the mirrors: meterr serve --replica --nats URL

Example:
  meterr mirror --from nats://10.0.0.1:4222 --api '$JS.old.API' --nats nats://10.1.0.1:4222")]
pub struct MirrorArgs {
    /// NATS servers of the deployment
    #[arg(long, value_name = "URL")]
    pub from: String,
    /// How the new servers reach the old ones' JetStream API
    #[arg(long, value_name = "PREFIX")]
    pub api: String,
    /// Which configuration to use; --nats names the new servers.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `promote`
#[derive(Debug, Clone, Args)]
#[command(after_help = "\
Turns the mirrors that `meterr mirror` made into streams of their own. Start nodes with --nats there \
afterwards, each with an empty data directory, and point producers and subscribers to them.

With --old the old region's streams are sealed first, for good: no producer and no node gets an \
acknowledgement there any more, and nothing is lost. To go back later, remove them and mirror the other \
way. Without it, what had not arrived is lost, and nothing prevents that producers and nodes of the old \
region go on there when it is back: seal it with --old (running this again is fine), or keep it down.

Examples:
  meterr promote --nats nats://10.1.0.1:4222 --old nats://10.0.0.1:4222
  meterr promote --nats nats://10.1.0.1:4222")]
pub struct PromoteArgs {
    /// NATS servers of the old region, if they can be reached
    #[arg(long, value_name = "URL")]
    pub old: Option<String>,
    /// Which configuration to use; --nats names the new servers.
    #[command(flatten)]
    pub config: ConfigArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}
