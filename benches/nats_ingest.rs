//! Question: how fast do events get from JetStream through the whole binary into committed views, when
//! they wait there and when they are published beside, and what does it cost in engine and server?
//!
//! Data: SPEND-1 (see `support/spend1.rs`) in messages of 100 events of one shard to
//! `usage.<shard>.@batch`, 16 shards, default views, checkpoints on; a publisher with 256 messages not
//! yet acknowledged. NATS server, binary and publisher share the machine. `drain`: everything is
//! published, then the binary starts; time counts from its start until the last commit. `live`: the
//! binary waits; time counts from the first message until the last commit. Both with a server that
//! syncs every two minutes (`sync default`) and one that syncs each message before it acknowledges it
//! (`sync always`); commits are messages too. After each, all rows of SPEND-1's three views are
//! compared by value; a difference fails the run.
//!
//! ```sh
//! cargo bench --bench nats_ingest                    # 3 rounds
//! cargo bench --bench nats_ingest -- --rounds 1 --sync always --case live
//! ```

mod support;

use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};
use support::http::Client;
use support::ingest::check_views;
use support::measure::{bench, median, memory, option, process_cpu, record, threads};
use support::nats::{Batch, MESSAGE_EVENTS, SHARDS, Stage, Sync, WINDOW, batches};
use support::server::Server;
use support::spend1::{self, Views};

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    bench("nats_ingest", run)
}

/// What a round measured.
type Figures = Vec<(&'static str, f64, &'static str)>;

fn run() -> Result<()> {
    let rounds: usize = option("--rounds").map_or(Ok(3), |n| n.parse())?;
    let path = spend1::path()?;
    let expected = Views::expected(&path)?;
    let messages = batches(&std::fs::read(&path)?, SHARDS, MESSAGE_EVENTS)?;
    let wanted = |name: &str, option: Option<String>| option.is_none_or(|o| name.ends_with(&o));
    type Case = fn(&Stage, &[Batch]) -> Result<Figures>;
    let cases: [(&str, Case); 2] = [("drain", drain), ("live", live)];
    for (case, measure) in cases.into_iter().filter(|case| wanted(case.0, option("--case"))) {
        for sync in Sync::BOTH.into_iter().filter(|sync| wanted(sync.name(), option("--sync"))) {
            let mut rates = Vec::new();
            for round in 1..=rounds {
                let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
                let stage = Stage::new(Path::new(env!("CARGO_BIN_EXE_meterr")), parent, sync)?;
                let figures = measure(&stage, &messages)?;
                let server = stage.serve()?;
                check_views(&server, &expected).context("the views")?;
                server.stop()?;
                println!("{case}, {}, round {round}: every row OK", sync.name());
                for (metric, value, unit) in figures {
                    println!("  {metric:24} {value:>12.3} {unit}");
                    record(
                        "nats_ingest",
                        &format!("{case} {}", sync.name()),
                        round,
                        metric,
                        value,
                        unit,
                    );
                    if metric == "rate" {
                        rates.push(value);
                    }
                }
            }
            println!("{case}, {}: median {:.0} events/s", sync.name(), median(&rates));
        }
    }
    Ok(())
}

fn drain(stage: &Stage, messages: &[Batch]) -> Result<Figures> {
    let events: usize = messages.iter().map(|message| message.events).sum();
    let started = Instant::now();
    let positions = stage.publish(messages, WINDOW)?;
    let published = started.elapsed().as_secs_f64();
    let nats_cpu = process_cpu(stage.nats.pid())?;
    let started = Instant::now();
    let server = stage.serve()?;
    server.wait_for(&mut Client::connect(server.address)?, &positions)?;
    let wall = started.elapsed().as_secs_f64();
    // From its start: all of it went into this.
    let engine = process_cpu(server.pid())?;
    let nats = process_cpu(stage.nats.pid())? - nats_cpu;
    let by_thread = by_thread(&server, engine, events as f64)?;
    let memory = memory(server.pid(), "VmHWM")?;
    let ready = server.ready.as_secs_f64();
    server.stop()?;
    let events = events as f64;
    let mut figures = vec![
        ("rate", events / wall, "events/s"),
        ("wall", wall, "s"),
        ("ready", ready, "s"),
        ("engine_cpu", engine * 1e6 / events, "us/event"),
        ("nats_cpu", nats * 1e6 / events, "us/event"),
        ("engine_memory_peak", memory as f64 / events, "bytes/event"),
        ("published_before", events / published, "events/s"),
    ];
    figures.extend(by_thread);
    Ok(figures)
}

/// Which threads of the engine used its CPU seconds, and how long the dataflows waited for a core.
fn by_thread(server: &Server, cpu: f64, events: f64) -> Result<Figures> {
    let of = |name| threads(server.pid(), name);
    let (dataflows, nats) = (of("meterr-worker")?, of("meterr-nats")?);
    let rest = cpu - dataflows.cpu - nats.cpu;
    let each = |seconds: f64| seconds * 1e6 / events;
    Ok(vec![
        ("cpu_dataflows", each(dataflows.cpu), "us/event"),
        ("cpu_nats_client", each(nats.cpu), "us/event"),
        ("cpu_checkpoints_rest", each(rest), "us/event"),
        ("dataflows_without_core", dataflows.waited, "s"),
    ])
}

fn live(stage: &Stage, messages: &[Batch]) -> Result<Figures> {
    let events: usize = messages.iter().map(|message| message.events).sum();
    let server = stage.serve()?;
    let own = std::process::id();
    let cpu = || {
        let of = |pid| process_cpu(pid);
        Ok::<_, anyhow::Error>([of(server.pid())?, of(stage.nats.pid())?, of(own)?])
    };
    let before = cpu()?;
    let started = Instant::now();
    let positions = stage.publish(messages, WINDOW)?;
    let published = started.elapsed().as_secs_f64();
    server.wait_for(&mut Client::connect(server.address)?, &positions)?;
    let wall = started.elapsed().as_secs_f64();
    let after = cpu()?;
    let events = events as f64;
    let by_thread = by_thread(&server, after[0], events)?;
    server.stop()?;
    let cost = |n: usize| (after[n] - before[n]) * 1e6 / events;
    let mut figures = vec![
        ("rate", events / wall, "events/s"),
        ("wall", wall, "s"),
        ("rate_published", events / published, "events/s"),
        ("engine_cpu", cost(0), "us/event"),
        ("nats_cpu", cost(1), "us/event"),
        ("publisher_cpu", cost(2), "us/event"),
    ];
    figures.extend(by_thread);
    Ok(figures)
}
