//! Question: how long do questions to the micro-service on NATS take at 10,000 a second, while events
//! come in?
//!
//! Data: the first 800,000 lines of SPEND-1 are there. Then the next ones are published at 20,000
//! events a second, in messages of 100 of one shard, and `meterr.query.<org>.spend` is asked of one of
//! the 1,000 orgs after the other, `{"window":"month"}` (`months`) or the days of one month
//! (`days`). Each question has its moment of a fixed schedule whatever became of the ones before, and
//! latency counts from it; `late` is how late questions left. A question waits for the commit under way
//! in its shard, if there is one. Both with a server that syncs every two minutes (`sync default`) and
//! one that syncs each message before it acknowledges it (`sync always`). Afterwards the months of all
//! orgs are asked for and compared by value; a difference fails the run. A question refused since too
//! many are under way counts as one that takes for ever. NATS server, binary, asker and publisher share
//! the machine: p99 and max are also that of others.
//!
//! ```sh
//! cargo bench --bench nats_queries
//! cargo bench --bench nats_queries -- --rate 20000 --beside 50000 --seconds 4 --rounds 1
//! ```

mod support;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use support::floor::{Done, Floor};
use support::http::Client;
use support::measure::{Spreads, bench, option, process_cpu, record};
use support::nats::{MESSAGE_EVENTS, SHARDS, Stage, Sync, WINDOW, batches};
use support::nats_queries::{check, offered};
use support::spend1;

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Lines that are there before.
const BEFORE: usize = 800_000;

/// Questions by name.
const QUESTIONS: [(&str, &str); 2] = [
    ("months", r#"{"window":"month"}"#),
    ("days", r#"{"window":"day","from":"2026-01-01T00:00:00Z","to":"2026-02-01T00:00:00Z"}"#),
];

fn main() -> ExitCode {
    bench("nats_queries", run)
}

fn run() -> Result<()> {
    let rounds: usize = option("--rounds").map_or(Ok(3), |n| n.parse())?;
    let rate: f64 = option("--rate").map_or(Ok(10_000.0), |n| n.parse())?;
    let beside: f64 = option("--beside").map_or(Ok(20_000.0), |n| n.parse())?;
    let seconds: f64 = option("--seconds").map_or(Ok(5.0), |n| n.parse())?;
    let text = std::fs::read(spend1::path()?)?;
    let before = spend1::first_lines(&text, BEFORE);
    let after = spend1::first_lines(&text[before.len()..], (beside * seconds) as usize);
    let mut floor = Floor::new(None);
    floor.step(before, &mut Done::default())?;
    floor.step(after, &mut Done::default())?;
    let expected = floor.views().org_month;
    drop(floor);
    let mut orgs: Vec<String> =
        expected.keys().filter_map(|key| key.split('|').next()).map(str::to_owned).collect();
    orgs.sort_unstable();
    orgs.dedup();
    let before = batches(before, SHARDS, MESSAGE_EVENTS)?;
    let after = batches(after, SHARDS, MESSAGE_EVENTS)?;
    let wanted = |name: &str, option: Option<String>| option.is_none_or(|o| name.ends_with(&o));
    let mut spreads = Spreads::new("nats_queries");
    for sync in Sync::BOTH.into_iter().filter(|sync| wanted(sync.name(), option("--sync"))) {
        for (name, question) in QUESTIONS.into_iter().filter(|q| wanted(q.0, option("--case"))) {
            for round in 1..=rounds {
                let parent = Path::new(env!("CARGO_TARGET_TMPDIR"));
                let stage = Stage::new(Path::new(env!("CARGO_BIN_EXE_meterr")), parent, sync)?;
                let server = stage.serve()?;
                let there = stage.publish(&before, WINDOW)?;
                server.wait_for(&mut Client::connect(server.address)?, &there)?;
                let cpu = || {
                    Ok::<_, anyhow::Error>((
                        process_cpu(server.pid())?,
                        process_cpu(stage.nats.pid())?,
                    ))
                };
                let was = cpu()?;
                let asked = offered(&stage, &orgs, question, rate, &after, beside)?;
                let is = cpu()?;
                server.wait_for(&mut Client::connect(server.address)?, &asked.positions)?;
                check(&stage, &orgs, &expected).context("the months")?;
                server.stop()?;
                let case = format!("{name}, {}", sync.name());
                spreads.show(&case, round, &asked.answer);
                spreads.show(&format!("{name} late, {}", sync.name()), round, &asked.late);
                let answers = asked.answer.len() as f64;
                for (metric, value, unit) in [
                    ("refused", asked.refused as f64, "questions"),
                    ("answer_size", asked.bytes as f64 / answers, "bytes"),
                    ("engine_cpu", (is.0 - was.0) * 1e6 / answers, "us/answer"),
                    ("nats_cpu", (is.1 - was.1) * 1e6 / answers, "us/answer"),
                ] {
                    println!("  {metric:24} {value:>12.3} {unit}");
                    record("nats_queries", &case, round, metric, value, unit);
                }
            }
        }
    }
    spreads.medians();
    Ok(())
}
