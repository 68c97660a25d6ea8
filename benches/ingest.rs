//! Question: how fast do events get through the whole binary into committed views, what does it cost,
//! and how long do a restart and a retroactive price change take?
//!
//! Data: SPEND-1 (see `support/spend1.rs`) over loopback in requests of 1 MB on 4 kept connections,
//! default views, checkpoints on, every acknowledgement after an fsync. Server and client share the
//! machine. Then: price of `gpt-4o-mini` halved in retrospect; SIGKILL and restart; clean stop and
//! restart. After each, the months of all orgs are compared by value; a difference fails the run.
//!
//! ```sh
//! cargo bench --bench ingest                    # 3 rounds
//! cargo bench --bench ingest -- --rounds 1 --keep DIR
//! ```

mod support;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use support::floor::{Done, Floor};
use support::ingest::{Sending, check, load, reprice};
use support::measure::{bench, memory, option, record};
use support::server::Server;
use support::spend1::{self, Views};

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The binary that is measured.
const BINARY: &str = env!("CARGO_BIN_EXE_meterr");

fn main() -> ExitCode {
    bench("ingest", run)
}

fn run() -> Result<()> {
    let rounds: usize = option("--rounds").map_or(Ok(3), |n| n.parse())?;
    let path = spend1::path()?;
    let text = std::fs::read(&path)?;
    let expected = Views::expected(&path)?;
    let mut floor = Floor::new(Some(spend1::REPRICED_DAY));
    floor.step(&text, &mut Done::default())?;
    let repriced = floor.views();
    drop(floor);
    for n in 1..=rounds {
        match option("--keep") {
            Some(directory) => {
                let directory = Path::new(&directory);
                std::fs::create_dir_all(directory)?;
                round(n, directory, &text, &expected, &repriced)?;
            }
            None => {
                // Not /tmp, which may be memory: an fsync there would measure nothing.
                let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
                round(n, directory.path(), &text, &expected, &repriced)?;
            }
        }
    }
    Ok(())
}

fn round(
    round: usize,
    directory: &Path,
    text: &[u8],
    expected: &Views,
    repriced: &Views,
) -> Result<()> {
    let binary = Path::new(BINARY);
    let server = Server::start(binary, directory)?;
    let fresh = server.ready.as_secs_f64();
    let before = memory(server.pid(), "VmRSS")?;
    let how = Sending { connections: 4, bytes: 1_000_000 };
    let loaded = load(&server, directory, text, how)?;
    check(&server, &expected.org_month).context("after loading")?;
    let reprice = reprice(&server)?;
    check(&server, &repriced.org_month).context("after the price change")?;
    server.kill()?;
    let server = Server::start(binary, directory)?;
    let after_kill = server.ready.as_secs_f64();
    check(&server, &repriced.org_month).context("after a kill")?;
    let stop = server.stop()?.as_secs_f64();
    let server = Server::start(binary, directory)?;
    let after_stop = server.ready.as_secs_f64();
    check(&server, &repriced.org_month).context("after a clean stop")?;
    let memory_restarted = memory(server.pid(), "VmRSS")?;
    server.stop()?;
    let events = loaded.lines as f64;
    println!("round {round}: {} lines, every check OK", loaded.lines);
    for (metric, value, unit) in [
        ("rate_acknowledged", events / loaded.acknowledged, "events/s"),
        ("rate_committed", events / loaded.committed, "events/s"),
        ("wall_committed", loaded.committed, "s"),
        ("server_cpu", loaded.server_cpu * 1e6 / events, "us/event"),
        ("client_cpu", loaded.client_cpu * 1e6 / events, "us/event"),
        ("memory", (loaded.memory - before) as f64 / events, "bytes/event"),
        ("memory_peak", (loaded.memory_peak - before) as f64 / events, "bytes/event"),
        ("memory_restarted", memory_restarted as f64 / events, "bytes/event"),
        ("disk", loaded.disk as f64 / events, "bytes/event"),
        ("reprice", reprice, "s"),
        ("ready_new", fresh, "s"),
        ("ready_after_kill", after_kill, "s"),
        ("clean_stop", stop, "s"),
        ("ready_after_clean_stop", after_stop, "s"),
    ] {
        println!("  {metric:24} {value:>12.3} {unit}");
        record("ingest", "default", round, metric, value, unit);
    }
    Ok(())
}
