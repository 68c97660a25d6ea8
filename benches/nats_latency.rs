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
use support::measure::{Spreads, bench, option, process_cpu, record};
use support::nats::{MESSAGE_EVENTS, SHARDS, Stage, Sync, batches};
use support::nats_latency::{idle, offered};
use support::spend1;

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Of the orgs, every which is followed.
const NTH: usize = 10;

fn main() -> ExitCode {
    bench("nats_latency", run)
}

fn run() -> Result<()> {
    let rounds: usize = option("--rounds").map_or(Ok(3), |n| n.parse())?;
    let events: usize = option("--events").map_or(Ok(2_000), |n| n.parse())?;
    let rate: f64 = option("--rate").map_or(Ok(50_000.0), |n| n.parse())?;
    let seconds: f64 = option("--seconds").map_or(Ok(10.0), |n| n.parse())?;
    let wanted = |name: &str, option: Option<String>| option.is_none_or(|o| name.ends_with(&o));
    let mut spreads = Spreads::new("nats_latency");
    for sync in Sync::BOTH.into_iter().filter(|sync| wanted(sync.name(), option("--sync"))) {
        let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
        let stage = || Stage::new(Path::new(env!("CARGO_BIN_EXE_meterr")), parent, sync);
        for round in 1..=rounds {
            if wanted("idle", option("--case")) {
                one_at_a_time(&mut spreads, &stage()?, sync, round, events)?;
            }
            if wanted("offered", option("--case")) {
                at_a_rate(&mut spreads, &stage()?, sync, round, rate, seconds)?;
            }
        }
    }
    spreads.medians();
    Ok(())
}

fn one_at_a_time(
    spreads: &mut Spreads,
    stage: &Stage,
    sync: Sync,
    round: usize,
    events: usize,
) -> Result<()> {
    let server = stage.serve()?;
    let latencies = idle(stage, events)?;
    server.stop()?;
    for (case, all) in [
        ("idle", &latencies.view),
        ("idle ack", &latencies.acknowledged),
        ("idle fsync", &latencies.fsync),
    ] {
        spreads.show(&format!("{case}, {}", sync.name()), round, all);
    }
    Ok(())
}

fn at_a_rate(
    spreads: &mut Spreads,
    stage: &Stage,
    sync: Sync,
    round: usize,
    rate: f64,
    seconds: f64,
) -> Result<()> {
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
    let case = format!("{:.0} K/s, {}", rate / 1e3, sync.name());
    spreads.show(&case, round, &offered.view);
    spreads.show(&format!("late, {case}"), round, &offered.late);
    let events = spend1::lines(text) as f64;
    let case = case.replace(',', "");
    for (metric, value, unit) in [
        ("engine_cpu", (after[0] - before[0]) * 1e6 / events, "us/event"),
        ("nats_cpu", (after[1] - before[1]) * 1e6 / events, "us/event"),
        ("clients_cpu", (after[2] - before[2]) * 1e6 / events, "us/event"),
        ("followed", offered.view.len() as f64, "events"),
        ("changes", offered.changes as f64, "messages"),
    ] {
        println!("  {metric:24} {value:>12.3} {unit}");
        record("nats_latency", &case, round, metric, value, unit);
    }
    Ok(())
}
