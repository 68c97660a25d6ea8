//! `meterr backup`: runs one command and says what came of it.

use std::io::Write;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

use indicatif::ProgressBar;
use meterr_connectors::backup::{self, BackupError, Listed, Made, Manifest, Store, Verified};
use serde_json::{Value, json};

use super::restore::{self, Report};
use super::source::Source;
use super::{deep, location, store};
use crate::cli::args::{
    BackupCommand, BackupCreateArgs, BackupListArgs, BackupPruneArgs, BackupRestoreArgs,
    BackupVerifyArgs,
};
use crate::cli::{Console, Exit, Table, count};
use crate::commands::{copy_bar, show};
use crate::copy::{Phase, millis};
use crate::node::now;
use crate::settings::Settings;

/// Runs a command.
pub(crate) fn run(
    settings: &Settings,
    command: &BackupCommand,
    console: &mut Console,
) -> anyhow::Result<Exit> {
    let store = store(settings)?;
    match command {
        BackupCommand::Create(args) => create(settings, &store, args, console),
        BackupCommand::List(args) => list(&store, args, console),
        BackupCommand::Verify(args) => verify(settings, &store, args, console),
        BackupCommand::Restore(args) => restore(settings, &store, args, console),
        BackupCommand::Prune(args) => prune(settings, &store, args, console),
    }
}

fn bar(console: &Console, json: bool, what: &'static str, len: u64) -> ProgressBar {
    let bar = copy_bar(console.progress && !json);
    bar.set_message(what);
    bar.set_length(len);
    bar
}

fn create(
    settings: &Settings,
    store: &Store,
    args: &BackupCreateArgs,
    console: &mut Console,
) -> anyhow::Result<Exit> {
    let began = Instant::now();
    let source = Source::open(&location(settings), settings)?;
    let wanted = &source.ends.wanted;
    let records = wanted.iter().map(|wanted| wanted.to).sum();
    let never = AtomicBool::new(false);
    let bar = bar(console, args.store.json, "saving", records);
    let made = backup::create(store, wanted, &source.ends.about, &never, &mut |n| bar.inc(n));
    bar.finish_and_clear();
    let made = made?;
    let took = began.elapsed();
    let Made { manifest, segments_written, bytes_written, records_read, bytes_read } = &made;
    if args.store.json {
        console.json(&json!({
            "backup": manifest.name(),
            "store": store.shown(),
            "begun_at": manifest.begun_at,
            "records": manifest.records(),
            "bytes": manifest.bytes(),
            "records_read": records_read,
            "bytes_read": bytes_read,
            "segments_written": segments_written,
            "bytes_written": bytes_written,
            "took_ms": millis(took),
        }))?;
        return Ok(Exit::Done);
    }
    writeln!(
        console.out,
        "backup {} in {}: {} records, {}",
        manifest.name(),
        store.shown(),
        count(manifest.records() as i64),
        size(manifest.bytes())
    )?;
    writeln!(
        console.out,
        "read {} records, {}; wrote {segments_written} segments, {}; took {:.1} s",
        count(*records_read as i64),
        size(*bytes_read),
        size(*bytes_written),
        took.as_secs_f64()
    )?;
    Ok(Exit::Done)
}

fn list(store: &Store, args: &BackupListArgs, console: &mut Console) -> anyhow::Result<Exit> {
    let listed = store.list()?;
    let sound = listed.iter().all(|listed| listed.manifest.is_ok());
    let exit = if sound { Exit::Done } else { Exit::Different };
    if args.store.json {
        let rows: Vec<Value> = listed.iter().map(shown).collect();
        console.json(&json!({ "store": store.shown(), "backups": rows }))?;
        return Ok(exit);
    }
    if listed.is_empty() {
        writeln!(console.out, "no backups in {}", store.shown())?;
        return Ok(exit);
    }
    let mut table =
        Table::new(&["backup", "log time", ">shards", ">records", ">bytes", "of", "problem"]);
    for Listed { name, manifest } in listed {
        match manifest {
            Ok(manifest) => table.row([
                name,
                last_time(&manifest).unwrap_or_else(|| "-".to_owned()),
                manifest.shards.to_string(),
                count(manifest.records() as i64),
                size(manifest.bytes()),
                manifest.source,
                String::new(),
            ]),
            Err(error) => {
                let none = || "-".to_owned();
                table.row([name, none(), none(), none(), none(), none(), error.to_string()]);
            }
        }
    }
    table.print(&mut *console.out)?;
    Ok(exit)
}

/// The latest log time of any log.
fn last_time(manifest: &Manifest) -> Option<String> {
    manifest.segments().map(|(_, part)| part.time).max().map(|time| time.to_string())
}

fn shown(listed: &Listed) -> Value {
    match &listed.manifest {
        Ok(manifest) => json!({
            "backup": listed.name,
            "begun_at": manifest.begun_at,
            "log_time": last_time(manifest),
            "source": manifest.source,
            "version": manifest.version,
            "shards": manifest.shards,
            "records": manifest.records(),
            "bytes": manifest.bytes(),
            "commits": manifest.commits,
        }),
        Err(error) => json!({ "backup": listed.name, "problem": error.to_string() }),
    }
}

fn verify(
    settings: &Settings,
    store: &Store,
    args: &BackupVerifyArgs,
    console: &mut Console,
) -> anyhow::Result<Exit> {
    let json = args.store.json;
    let manifest = match store.find(args.backup.as_deref()) {
        Ok(manifest) => manifest,
        // That is what was asked.
        Err(error @ BackupError::Damaged { .. }) if !json => {
            writeln!(console.out, "{error}")?;
            return Ok(Exit::Different);
        }
        Err(error) => return Err(error.into()),
    };
    let progress = bar(console, json, "reading", manifest.records());
    let verified = store.verify(&manifest, &mut |n| progress.inc(n));
    progress.finish_and_clear();
    let verified = verified?;
    let mut views = None;
    if args.deep && verified.problems.is_empty() {
        let progress = bar(console, json, "recomputing views", manifest.shards.into());
        let report = deep::verify(store, &manifest, settings, &mut |n| progress.inc(n));
        progress.finish_and_clear();
        views = Some(report?);
    }
    let same = views.as_ref().is_none_or(|views| views.differences_total == 0);
    let sound = verified.problems.is_empty() && same;
    if json {
        let Verified { segments, records, bytes, problems } = &verified;
        console.json(&json!({
            "backup": manifest.name(),
            "sound": sound,
            "segments": segments,
            "records": records,
            "bytes": bytes,
            "problems": problems,
            "views": views,
        }))?;
    } else {
        writeln!(
            console.out,
            "backup {}: {} segments, {} records, {}",
            manifest.name(),
            verified.segments,
            count(verified.records as i64),
            size(verified.bytes)
        )?;
        for problem in &verified.problems {
            writeln!(console.out, "  {problem}")?;
        }
        match (&views, verified.problems.is_empty()) {
            (Some(views), _) => show(views, "every row published and recomputed", console)?,
            (None, true) => writeln!(console.out, "every segment is there and undamaged")?,
            (None, false) => {}
        }
    }
    Ok(if sound { Exit::Done } else { Exit::Different })
}

fn restore(
    settings: &Settings,
    store: &Store,
    args: &BackupRestoreArgs,
    console: &mut Console,
) -> anyhow::Result<Exit> {
    let manifest = store.find(args.backup.as_deref())?;
    let progress = bar(console, args.store.json, "", 0);
    let replicas = args.replicas.map(usize::from);
    let to = location(settings);
    let mut heard = |phase, at, of| {
        if at == 0 {
            progress.reset();
        }
        progress.set_message(match phase {
            Phase::Look => "looking",
            Phase::Copy => "restoring",
            Phase::Compare => "comparing records",
            Phase::Views => "comparing views",
        });
        progress.set_length(of);
        progress.set_position(at);
    };
    let until = args.until.as_ref();
    let report = restore::restore(store, &manifest, until, &to, settings, replicas, &mut heard);
    progress.finish_and_clear();
    let report = report?;
    let same = report.compared.differences_total == 0;
    if args.store.json {
        let mut value = serde_json::to_value(&report)?;
        value["same"] = same.into();
        console.json(&value)?;
    } else {
        say(&report, console)?;
    }
    Ok(if same { Exit::Done } else { Exit::Different })
}

fn say(report: &Report, console: &mut Console) -> anyhow::Result<()> {
    let Report { backup, to, shards, positions, records, copied, copied_ms, compared, .. } = report;
    let until = report.until.as_ref().map_or(String::new(), |until| format!(" until {until}"));
    writeln!(
        console.out,
        "restored backup {backup}{until} to {to}: {shards} shards at {positions}"
    )?;
    writeln!(
        console.out,
        "{} records, {} of them now in {:.1} s; {} read back and compared",
        count(*records as i64),
        count(*copied as i64),
        *copied_ms as f64 / 1e3,
        size(compared.bytes)
    )?;
    if compared.differences_total == 0 {
        writeln!(
            console.out,
            "every record is the same; check the views with `meterr verify`, then serve it with an \
             empty data directory of its own"
        )?;
        return Ok(());
    }
    writeln!(console.out, "{} differences:", compared.differences_total)?;
    for difference in &compared.differences {
        writeln!(console.out, "  {difference}")?;
    }
    Ok(())
}

fn prune(
    settings: &Settings,
    store: &Store,
    args: &BackupPruneArgs,
    console: &mut Console,
) -> anyhow::Result<Exit> {
    let now = now();
    let keep = args.keep.unwrap_or(settings.backup.keep);
    let pruned = backup::prune(store, super::before(now, keep), now)?;
    let exit = if pruned.stopped.is_none() { Exit::Done } else { Exit::Failed };
    if args.store.json {
        console.json(&serde_json::to_value(&pruned)?)?;
        return Ok(exit);
    }
    let (backups, segments) = (pruned.backups.len(), pruned.segments);
    let bytes = size(pruned.bytes);
    writeln!(console.out, "deleted {backups} backups, {segments} segments, {bytes}")?;
    if let Some(why) = &pruned.stopped {
        writeln!(console.out, "stopped: {why}")?;
    }
    Ok(exit)
}

fn size(bytes: u64) -> String {
    format!("{} bytes", count(bytes as i64))
}
