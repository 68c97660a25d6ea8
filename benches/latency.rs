//! Question: how long after an event is sent does a subscriber have the new figures, on an idle
//! system, and how much of that is waiting for the disk?
//!
//! Data: 2,000 events of one org, one at a time, to the real binary over loopback; one subscriber to
//! the org's stream. Two syncs in a row are in every figure: of the usage log before the answer, of
//! the output log before the change is shown. `fsync` is one such sync of a file of the bench's own, in
//! between. All of it is wall time: on a machine that others use, p99 and max are theirs.
//!
//! ```sh
//! cargo bench --bench latency
//! ```

mod support;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use support::latency::measure;
use support::measure::{bench, option, percentile, record};
use support::server::Server;

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    bench("latency", run)
}

fn run() -> Result<()> {
    let events: usize = option("--events").map_or(Ok(2_000), |n| n.parse())?;
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let server = Server::start(Path::new(env!("CARGO_BIN_EXE_meterr")), directory.path())?;
    let latencies = measure(&server, directory.path(), events)?;
    server.stop()?;
    println!("{:24} {:>9} {:>9} {:>9} {:>9}", "ms", "p50", "p90", "p99", "max");
    for (case, all) in [
        ("event_to_subscriber", &latencies.view),
        ("event_to_answer", &latencies.acknowledged),
        ("fsync", &latencies.fsync),
    ] {
        let at = [50.0, 90.0, 99.0, 100.0].map(|percent| percentile(all, percent));
        println!("{case:24} {:>9.3} {:>9.3} {:>9.3} {:>9.3}", at[0], at[1], at[2], at[3]);
        for (name, value) in ["p50", "p90", "p99", "max"].into_iter().zip(at) {
            record("latency", case, 1, name, value, "ms");
        }
    }
    let syncs = 2.0 * percentile(&latencies.fsync, 50.0) / percentile(&latencies.view, 50.0);
    println!("two syncs are {:.0} % of the median to the subscriber", syncs * 100.0);
    Ok(())
}
