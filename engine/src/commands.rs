//! Commands that run an engine, or a part of one, inside the process.

use std::io::Write;

use anyhow::{Context, bail};
use indicatif::{ProgressBar, ProgressStyle};
use meterr_connectors::checkpoint::CheckpointStore;
use meterr_connectors::checkpoint_file::{self, Transferred};
use meterr_connectors::copy::Compared;
use meterr_connectors::embedded::DataDirLock;
use meterr_connectors::nats::connection::shown;
use meterr_connectors::sled::{SledOptions, SledStore};
use meterr_operators::ids::ShardId;
use serde_json::json;

use crate::backup;
use crate::cli::args::{
    BackupCommand, CheckpointCommand, DemoArgs, GenArgs, LogCopyArgs, MirrorArgs, PromoteArgs,
    ServeArgs, VerifyArgs,
};
use crate::cli::{Commands, Console, Exit, Table, count};
use crate::copy::{self, Location, Phase};
use crate::node::Data;
use crate::region;
use crate::settings::Settings;
use crate::verify::{self, Report};
use crate::{demo, serve, snapshot, workload};

/// The engine's commands.
pub struct Engine;

impl Commands for Engine {
    fn serve(&self, settings: Settings, args: &ServeArgs) -> anyhow::Result<Exit> {
        serve::serve(&settings, args.accept_time_jump, |running| {
            // On stdout, so that whoever started it with port 0 learns where it listens.
            println!("listening on http://{}", running.address);
        })?;
        Ok(Exit::Done)
    }

    fn demo(
        &self,
        settings: Settings,
        args: &DemoArgs,
        console: &mut Console,
    ) -> anyhow::Result<Exit> {
        demo::demo(settings, args, console)
    }

    fn verify(
        &self,
        settings: Settings,
        args: &VerifyArgs,
        console: &mut Console,
    ) -> anyhow::Result<Exit> {
        existing(&settings)?;
        let data = Data::open(&settings, true)?;
        let mut report = Report::default();
        let specs: Vec<_> = data
            .specs(&settings, true)
            .into_iter()
            .map(|(spec, _)| spec)
            .filter(|spec| args.shard.is_empty() || args.shard.contains(&spec.id.0))
            .collect();
        let progress = if console.progress && !args.json {
            ProgressBar::new(specs.len() as u64)
        } else {
            ProgressBar::hidden()
        };
        for spec in &specs {
            verify::shard(spec, &mut report)
                .with_context(|| format!("shard {} cannot be verified", spec.id))?;
            progress.inc(1);
        }
        progress.finish_and_clear();
        let same = report.differences_total == 0;
        if args.json {
            console.json(&serde_json::to_value(&report)?)?;
        } else {
            show(&report, "every row published and held", console)?;
        }
        Ok(if same { Exit::Done } else { Exit::Different })
    }

    fn checkpoint(
        &self,
        settings: Settings,
        command: &CheckpointCommand,
        console: &mut Console,
    ) -> anyhow::Result<Exit> {
        let dir = existing(&settings)?;
        let _lock = DataDirLock::acquire(dir)?;
        let options = SledOptions {
            cache_bytes: settings.checkpoint.cache_bytes,
            ..SledOptions::new(dir.join("checkpoints"), snapshot::FORMAT)
        };
        let (store, report) = SledStore::open(options)?;
        for moved in &report.moved_aside {
            writeln!(console.err, "damaged: {}, moved to {}", moved.cause, moved.to.display())?;
        }
        for lost in &report.lost {
            writeln!(console.err, "lost: {lost}")?;
        }
        match command {
            CheckpointCommand::List(args) => {
                let mut rows = Vec::new();
                for shard in chosen(&store, &args.shard)? {
                    rows.extend(store.list(shard)?);
                }
                if args.json {
                    console.json(&json!({ "checkpoints": rows }))?;
                    return Ok(Exit::Done);
                }
                if rows.is_empty() {
                    writeln!(console.out, "no checkpoints")?;
                    return Ok(Exit::Done);
                }
                let mut table = Table::new(&[
                    ">shard",
                    ">generation",
                    ">index",
                    "kind",
                    ">epoch",
                    ">usage",
                    ">control",
                    ">bytes",
                    "log time",
                ]);
                for m in rows {
                    table.row([
                        m.shard.to_string(),
                        m.generation.to_string(),
                        m.index.to_string(),
                        format!("{:?}", m.kind).to_lowercase(),
                        m.epoch.to_string(),
                        m.usage_position.to_string(),
                        m.control_position.to_string(),
                        count(m.bytes as i64),
                        // Before the first record there is no log time.
                        match m.usage_position {
                            0 => "-".to_owned(),
                            _ => m.log_time().to_string(),
                        },
                    ]);
                }
                table.print(&mut *console.out)?;
                Ok(Exit::Done)
            }
            CheckpointCommand::Verify(args) => {
                let mut rows = Vec::new();
                for shard in chosen(&store, &args.shard)? {
                    rows.extend(store.verify(shard)?);
                }
                let sound = rows.iter().all(|row| row.problem.is_none()) && !report.damaged();
                if args.json {
                    console.json(&json!({ "generations": rows, "sound": sound }))?;
                } else {
                    if rows.is_empty() {
                        writeln!(console.out, "no checkpoints")?;
                    }
                    let mut table =
                        Table::new(&[">shard", ">generation", ">sound", ">of", "problem"]);
                    for row in rows {
                        table.row([
                            row.shard.to_string(),
                            row.generation.to_string(),
                            row.sound.to_string(),
                            row.total.to_string(),
                            row.problem.unwrap_or_default(),
                        ]);
                    }
                    if !table.is_empty() {
                        table.print(&mut *console.out)?;
                    }
                }
                Ok(if sound { Exit::Done } else { Exit::Different })
            }
            CheckpointCommand::Export(args) => {
                let name = args.file.display();
                let file = std::fs::File::create_new(&args.file)
                    .with_context(|| format!("cannot create {name}"))?;
                let mut writer = std::io::BufWriter::new(file);
                let done = checkpoint_file::export(&store, ShardId(args.shard), &mut writer);
                let done = done.inspect_err(|_| {
                    // Half a file would only be refused later.
                    let _ = std::fs::remove_file(&args.file);
                })?;
                writer.into_inner().context("cannot write the file")?.sync_all()?;
                said(console, args.json, "exported", &done, &args.file)
            }
            CheckpointCommand::Import(args) => {
                let name = args.file.display();
                let file = std::fs::File::open(&args.file)
                    .with_context(|| format!("cannot open {name}"))?;
                let chain = checkpoint_file::read(std::io::BufReader::new(file))?;
                if chain.iter().any(|(manifest, _)| manifest.shard != args.shard) {
                    bail!("{name} is not of shard {}", args.shard);
                }
                let file = std::fs::File::open(&args.file)
                    .with_context(|| format!("cannot open {name}"))?;
                let done = checkpoint_file::import(
                    &store,
                    snapshot::FORMAT,
                    std::io::BufReader::new(file),
                )?;
                said(console, args.json, "imported", &done, &args.file)
            }
        }
    }

    fn backup(
        &self,
        settings: Settings,
        command: &BackupCommand,
        console: &mut Console,
    ) -> anyhow::Result<Exit> {
        backup::command::run(&settings, command, console)
    }

    fn mirror(
        &self,
        settings: Settings,
        args: &MirrorArgs,
        console: &mut Console,
    ) -> anyhow::Result<Exit> {
        let mirrored = region::mirror(&settings, &args.from, &args.api)?;
        if args.json {
            console.json(&serde_json::to_value(&mirrored)?)?;
        } else {
            let region::Mirrored { streams, made } = mirrored;
            writeln!(console.out, "{streams} streams are mirrored, {made} of them from now on")?;
        }
        Ok(Exit::Done)
    }

    fn promote(
        &self,
        settings: Settings,
        args: &PromoteArgs,
        console: &mut Console,
    ) -> anyhow::Result<Exit> {
        let promoted = region::promote(&settings, args.old.as_deref())?;
        if args.json {
            console.json(&serde_json::to_value(&promoted)?)?;
            return Ok(Exit::Done);
        }
        let region::Promoted { shards, streams, complete, uncommitted, took_ms } = promoted;
        let seconds = took_ms as f64 / 1e3;
        writeln!(
            console.out,
            "{streams} streams of {shards} shards promoted in {seconds:.1} s; {uncommitted} messages are \
             to be counted"
        )?;
        if complete {
            writeln!(console.out, "the old region is sealed, and all it had is here")?;
        } else {
            writeln!(
                console.out,
                "the old region was not sealed: keep it down, or run this again with --old when it can \
                 be reached"
            )?;
        }
        Ok(Exit::Done)
    }

    fn log_copy(
        &self,
        settings: Settings,
        args: &LogCopyArgs,
        console: &mut Console,
    ) -> anyhow::Result<Exit> {
        let bar = copy_bar(console.progress && !args.json);
        let replicas = args.replicas.map(usize::from);
        let report = copy::run(&args.from, &args.to, replicas, &settings, &mut |phase, at, of| {
            let what = match phase {
                Phase::Look => "looking",
                Phase::Copy => "copying",
                Phase::Compare => "comparing records",
                Phase::Views => "comparing views",
            };
            if at == 0 {
                bar.reset();
            }
            bar.set_message(what);
            bar.set_length(of);
            bar.set_position(at);
        });
        bar.finish_and_clear();
        let report = report?;
        if args.json {
            let mut value = serde_json::to_value(&report)?;
            value["same"] = report.same().into();
            console.json(&value)?;
        } else {
            show_copy(&report, &args.to, console)?;
        }
        Ok(if report.same() { Exit::Done } else { Exit::Different })
    }

    fn generate(&self, args: &GenArgs, console: &mut Console) -> anyhow::Result<Exit> {
        let options = workload::Options {
            events: args.events,
            seed: args.seed,
            orgs: args.orgs,
            users: args.users,
            zipf: args.zipf,
            start: args.start,
            days: args.days,
            late_ppm: args.late,
            late_hours_max: args.late_hours_max,
            duplicate_ppm: args.duplicates,
            correction_ppm: args.corrections,
            void_ppm: args.voids,
            resend_distance_max: args.resend_distance_max,
        };
        let progress = if console.progress && !args.json {
            ProgressBar::new(args.events)
        } else {
            ProgressBar::hidden()
        };
        let summary = workload::generate(&options, &args.dir, &progress)?;
        progress.finish_and_clear();
        let value = serde_json::to_value(&summary)?;
        if args.json {
            console.json(&value)?;
        } else {
            let mut table = Table::new(&["what", ">n"]);
            for (name, n) in value.as_object().into_iter().flatten().filter(|(_, n)| !n.is_object())
            {
                table.row([name.clone(), n.to_string().trim_matches('"').to_owned()]);
            }
            table.print(&mut *console.out)?;
        }
        Ok(Exit::Done)
    }
}

pub(crate) fn copy_bar(shown: bool) -> ProgressBar {
    if !shown {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{msg:18} {bar:30} {human_pos}/{human_len} {per_sec}");
    ProgressBar::new(0).with_style(style.expect("the template is a constant, a test builds it"))
}

fn show_copy(report: &copy::Report, to: &Location, console: &mut Console) -> anyhow::Result<()> {
    let n = |n: u64| count(n as i64);
    let rate = report.copied as f64 / (report.copied_ms.max(1) as f64 / 1e3);
    writeln!(
        console.out,
        "{} logs, {} records: {} copied at {} a second, {} were there",
        2 * u64::from(report.shards) + 1,
        n(report.records),
        n(report.copied),
        count(rate as i64),
        n(report.records - report.copied),
    )?;
    let Compared { records, bytes, differences_total, differences } = &report.compared;
    writeln!(
        console.out,
        "{} records with {} bytes read back and compared",
        n(*records),
        n(*bytes)
    )?;
    if *differences_total > 0 {
        writeln!(console.out, "{} differ:", n(*differences_total))?;
        for difference in differences {
            writeln!(console.out, "  {difference}")?;
        }
    }
    show(&report.views, "every row published and held, on both sides,", console)?;
    if !report.same() {
        writeln!(console.err, "the copy differs from its source: do not serve it")?;
        return Ok(());
    }
    let serve = match to {
        Location::Embedded(dir) => format!("meterr serve --data-dir {}", dir.display()),
        Location::Nats(url) => format!("meterr serve --nats {}", shown(url)),
    };
    writeln!(
        console.err,
        "source and copy are the same; go on with one of them only, the copy by: {serve}"
    )?;
    Ok(())
}

/// The data directory, which must be there: looking into one that is not would make it, and then
/// find everything in order.
fn existing(settings: &Settings) -> anyhow::Result<&std::path::Path> {
    let dir = &settings.node.data_dir;
    if !dir.is_dir() {
        bail!("there is no data directory {dir:?}; name one with --data-dir");
    }
    Ok(dir)
}

fn said(
    console: &mut Console,
    json: bool,
    what: &str,
    done: &Transferred,
    file: &std::path::Path,
) -> anyhow::Result<Exit> {
    let Transferred { shard, generation, checkpoints, bytes, usage_position, epoch } = done;
    if json {
        console.json(&json!({
            "done": what, "file": file.display().to_string(), "shard": shard,
            "generation": generation, "checkpoints": checkpoints, "bytes": bytes,
            "usage_position": usage_position, "epoch": epoch,
        }))?;
    } else {
        writeln!(
            console.out,
            "{what} generation {generation} of shard {shard}: {checkpoints} in a chain, {bytes} \
             bytes, up to usage position {usage_position} and epoch {epoch}"
        )?;
    }
    Ok(Exit::Done)
}

fn chosen(store: &SledStore, shards: &[u16]) -> anyhow::Result<Vec<ShardId>> {
    let known = store.shards()?;
    Ok(known.into_iter().filter(|s| shards.is_empty() || shards.contains(&s.0)).collect())
}

pub(crate) fn show(report: &Report, what: &str, console: &mut Console) -> anyhow::Result<()> {
    let Report { shards, messages, events, rows, differences_total, .. } = report;
    let [messages, events, rows] = [*messages, *events, *rows].map(|n| count(n as i64));
    writeln!(
        console.out,
        "{shards} shards, {messages} messages, {events} events counted, {rows} rows recomputed"
    )?;
    if *differences_total == 0 {
        writeln!(console.out, "{what} equals its recomputation")?;
        return Ok(());
    }
    writeln!(console.out, "{differences_total} rows differ:")?;
    let mut table =
        Table::new(&["shard", "account", "org", "view", "key", "window", "found", "expected"]);
    for d in &report.differences {
        let short = |figures: &Option<meterr_connectors::api::Figures>| match figures {
            None => "no row".to_owned(),
            Some(f) => format!(
                "{} events, {} usd",
                count(f.events),
                f.cost.map_or("-".to_owned(), |cost| cost.to_string())
            ),
        };
        table.row([
            d.shard.to_string(),
            d.account.to_owned(),
            d.org.clone(),
            d.view.clone(),
            d.key.clone().unwrap_or_default(),
            d.window_start.clone().unwrap_or_default(),
            short(&d.found),
            short(&d.expected),
        ]);
    }
    table.print(&mut *console.out)?;
    Ok(())
}
