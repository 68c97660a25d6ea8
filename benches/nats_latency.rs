//! Question: how long after an event is published does a subscriber on core NATS have the new figures,
//! on an idle system and at 50,000 events a second?
//!
//! Data: `idle`: 2,000 events of one org, one at a time, to `usage.<org>` (the server maps it to its
//! shard); one subscriber to `spend.<org>`. `ack` is JetStream's acknowledgement, `fsync` one sync of a
//! file of the bench's own in between. `offered`: SPEND-1 in messages of 100 events of one shard, each
//! at its moment of a fixed schedule whatever became of the ones before; latency counts from that
//! moment, once an event, for every tenth of the 1,000 orgs. `late` is how late messages left the
//! publisher. Both with a server that syncs every two minutes (`sync default`) and one that syncs each
//! message before it acknowledges it (`sync always`); a commit is at least two messages. NATS server,
//! binary, publisher and subscribers share the machine: p99 and max are also that of others.
//!
//! ```sh
//! cargo bench --bench nats_latency
//! cargo bench --bench nats_latency -- --case offered --sync always --rate 100000 --seconds 5
//! ```

mod support;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use support::floor::{Done, Floor};
use support::http::Client;
use support::ingest::check_views;
use support::measure::{asked_for, option, percentile, process_cpu, record};
use support::nats::{MESSAGE_EVENTS, SHARDS, Stage, Sync, batches};
use support::nats_latency::{idle, offered};
use support::spend1;

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Of the orgs, every which is followed.
const NTH: usize = 10;

fn main() -> ExitCode {
    if !asked_for() {
        println!("run by `cargo bench --bench nats_latency`");
        return ExitCode::SUCCESS;
    }
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("FAIL: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let events: usize = option("--events").map_or(Ok(2_000), |n| n.parse())?;
    let rate: f64 = option("--rate").map_or(Ok(50_000.0), |n| n.parse())?;
    let seconds: f64 = option("--seconds").map_or(Ok(10.0), |n| n.parse())?;
    let wanted = |name: &str, option: Option<String>| option.is_none_or(|o| name.ends_with(&o));
    println!("{:32} {:>9} {:>9} {:>9} {:>9}", "ms", "p50", "p90", "p99", "max");
    for sync in Sync::BOTH.into_iter().filter(|sync| wanted(sync.name(), option("--sync"))) {
        let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let stage = || Stage::new(Path::new(env!("CARGO_BIN_EXE_meterr")), parent, sync);
        if wanted("idle", option("--case")) {
            one_at_a_time(&stage()?, sync, events)?;
        }
        if wanted("offered", option("--case")) {
            at_a_rate(&stage()?, sync, rate, seconds)?;
        }
    }
    Ok(())
}

fn show(case: &str, sync: Sync, all: &[f64]) {
    let case = format!("{case}, {}", sync.name());
    let at = [50.0, 90.0, 99.0, 100.0].map(|percent| percentile(all, percent));
    println!("{case:32} {:>9.3} {:>9.3} {:>9.3} {:>9.3}", at[0], at[1], at[2], at[3]);
    let case = case.replace(',', "");
    for (name, value) in ["p50", "p90", "p99", "max"].into_iter().zip(at) {
        record("nats_latency", &case, 1, name, value, "ms");
    }
}

fn one_at_a_time(stage: &Stage, sync: Sync, events: usize) -> Result<()> {
    let server = stage.serve()?;
    let latencies = idle(stage, events)?;
    server.stop()?;
    show("idle", sync, &latencies.view);
    show("idle ack", sync, &latencies.acknowledged);
    show("idle fsync", sync, &latencies.fsync);
    Ok(())
}

fn at_a_rate(stage: &Stage, sync: Sync, rate: f64, seconds: f64) -> Result<()> {
    let text = std::fs::read(spend1::path()?)?;
    let text = spend1::first_lines(&text, (rate * seconds) as usize);
    let messages = batches(text, SHARDS, MESSAGE_EVENTS)?;
    let mut floor = Floor::new(None);
    floor.step(text, &mut Done::default())?;
    let expected = floor.views();
    drop(floor);
    let server = stage.serve()?;
    let own = std::process::id();
    let cpu = || {
        let of = |pid| process_cpu(pid);
        Ok::<_, anyhow::Error>([of(server.pid())?, of(stage.nats.pid())?, of(own)?])
    };
    let before = cpu()?;
    let offered = offered(stage, &messages, rate, NTH)?;
    let after = cpu()?;
    server.wait_for(&mut Client::connect(server.address)?, &offered.positions)?;
    check_views(&server, &expected).context("the views")?;
    server.stop()?;
    let case = format!("{:.0} K/s", rate / 1e3);
    show(&case, sync, &offered.view);
    show(&format!("{case} late"), sync, &offered.late);
    let events = spend1::lines(text) as f64;
    let cost = |n: usize| (after[n] - before[n]) * 1e6 / events;
    println!(
        "{case}, {}: {} events followed in {} changes; us CPU an event: engine {:.1}, nats {:.1}, \
         publisher and subscribers {:.1}; every row OK",
        sync.name(),
        offered.view.len(),
        offered.changes,
        cost(0),
        cost(1),
        cost(2)
    );
    Ok(())
}
