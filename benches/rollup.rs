//! Question: what does an event cost in the operators alone, JSON included, and how far is that from
//! a program written by hand for the one job?
//!
//! Data: SPEND-1 (see `support/spend1.rs`), epochs of 10,000 lines, one shard, one thread, the file in
//! memory. Cases: `three` (SPEND-1's three views), `default` (all ten), `floor` (the program by hand,
//! three views, nothing durable, no price change). Each round is a process of its own, rounds of the
//! cases alternate, and CPU seconds of the working thread count: on a machine that others use, only
//! ratios within one run mean anything. Every case's views are compared with the expected files by
//! value, also after the price of `gpt-4o-mini` was halved in retrospect; a difference fails the run.
//!
//! ```sh
//! cargo bench --bench rollup                       # 3 rounds
//! cargo bench --bench rollup -- --rounds 5
//! cargo bench --bench rollup -- --repetitions 10   # ten times the data: does the rate hold?
//! ```

mod support;

use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use meterr_operators::rollup::ViewSet;
use support::floor::{Done, Floor};
use support::measure::{Watch, bench, flag, median, memory, option, own_memory, record};
use support::operators::{Operators, THREE};
use support::spend1::{self, STEP, Views};

// That of the binary.
#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    bench("rollup", || match option("--case") {
        Some(case) => round(&case),
        None => all(),
    })
}

/// Runs the rounds and sums up.
fn all() -> Result<()> {
    let repetitions: usize = option("--repetitions").map_or(Ok(1), |n| n.parse())?;
    let rounds: usize = option("--rounds").map_or(Ok(3), |n| n.parse())?;
    spend1::path()?;
    let cases = ["floor", "three", "default"];
    let mut costs = [const { Vec::new() }; 3];
    println!(
        "{:8} {:>5} {:>9} {:>9} {:>9} {:>8} {:>10} {:>10} {:>9}  checked",
        "case",
        "round",
        "CPU us/ev",
        "wall s",
        "ev/s wall",
        "B/event",
        "changed",
        "reprice s",
        "repriced"
    );
    for round in 1..=rounds {
        for (case, costs) in cases.iter().zip(&mut costs) {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["--bench", "--case", case, "--round", &round.to_string()]);
            command.args(["--repetitions", &repetitions.to_string()]);
            // The views of each case are the same in every round; once is enough.
            if round > 1 {
                command.arg("--unchecked");
            }
            let output = command.stderr(std::process::Stdio::inherit()).output()?;
            let text = String::from_utf8_lossy(&output.stdout);
            print!("{text}");
            if !output.status.success() {
                bail!("case {case} failed");
            }
            let cost = text.lines().last().and_then(|line| line.split_whitespace().nth(2));
            costs.push(cost.and_then(|cost| cost.parse::<f64>().ok()).context("no figures")?);
        }
    }
    let [floor, three, default] = costs.map(|costs| median(&costs));
    println!(
        "medians: floor {floor:.2}, three {three:.2} ({:.2} of the floor), default {default:.2} us CPU an event",
        three / floor
    );
    for (case, cost) in cases.iter().zip([floor, three, default]) {
        record("rollup", &named(case, repetitions), 0, "cpu_median", cost, "us/event");
    }
    Ok(())
}

/// The name of a case in the results.
fn named(case: &str, repetitions: usize) -> String {
    if repetitions > 1 { format!("{case}-x{repetitions}") } else { case.to_owned() }
}

/// One case of the two programs.
enum Program {
    Floor(Box<Floor>),
    Ours(Box<Operators>),
}

impl Program {
    fn step(&mut self, text: &[u8], done: &mut Done) -> Result<()> {
        match self {
            Program::Floor(floor) => floor.step(text, done),
            Program::Ours(ours) => ours.step(text, done),
        }
    }
}

/// One round of one case, in this process.
fn round(case: &str) -> Result<()> {
    let round: usize = option("--round").map_or(Ok(1), |n| n.parse())?;
    let repetitions: usize = option("--repetitions").map_or(Ok(1), |n| n.parse())?;
    let path = spend1::path()?;
    let text = std::fs::read(&path)?;
    let lines = spend1::lines(&text);
    let mut program = match case {
        "floor" => Program::Floor(Box::new(Floor::new(None))),
        "three" => Program::Ours(Box::new(Operators::new(ViewSet::of(&THREE))?)),
        "default" => Program::Ours(Box::new(Operators::new(ViewSet::DEFAULT)?)),
        _ => bail!("case {case:?} is none of floor, three, default"),
    };
    let before = own_memory();
    let mut done = Done::default();
    let (mut wall, mut cpu) = (0.0, 0.0);
    for repetition in 0..repetitions {
        // Made before the clock runs; the first is the file as it is.
        let moved =
            if repetition > 0 { spend1::repetition(&text, repetition)? } else { Vec::new() };
        let steps = spend1::steps(if repetition > 0 { &moved } else { &text }, STEP);
        let watch = Watch::start();
        for step in steps {
            program.step(step, &mut done)?;
        }
        let (w, c) = watch.stop();
        wall += w;
        cpu += c;
        if repetitions > 1
            && let Program::Ours(ours) = &mut program
        {
            // The engine does this at a million events. What it costs is part of `ingest`.
            ours.checkpoint();
        }
        if repetitions > 1 {
            let rate = c * 1e6 / lines as f64;
            println!(
                "{case:8} part {:>2} of {repetitions}: {rate:.2} us CPU an event",
                repetition + 1
            );
            record("rollup", &named(case, repetitions), repetition, "cpu", rate, "us/event");
        }
    }
    let events = lines * repetitions;
    let grown = own_memory().saturating_sub(before) as f64 / events as f64;
    let mut reprice = (f64::NAN, Done::default());
    let mut checked = "-";
    if let Program::Ours(ours) = &mut program {
        let unchecked = flag("--unchecked") || repetitions > 1;
        if !unchecked {
            ours.views().check(&Views::expected(&path)?).context("loaded views")?;
            ours.check_sums()?;
        }
        let watch = Watch::start();
        ours.set_prices(vec![spend1::halved()])?;
        ours.output(&mut reprice.1);
        reprice.0 = watch.stop().0;
        if !unchecked {
            ours.views().check(&repriced(&text)?).context("repriced views")?;
            ours.check_sums()?;
            checked = "OK";
        }
    } else if let Program::Floor(floor) = &program
        && !flag("--unchecked")
        && repetitions == 1
    {
        floor.views().check(&Views::expected(&path)?).context("views of the floor")?;
        checked = "OK";
    }
    let name = named(case, repetitions);
    let peak = memory(std::process::id(), "VmHWM")? as f64;
    for (metric, value, unit) in [
        ("cpu", cpu * 1e6 / events as f64, "us/event"),
        ("wall", wall, "s"),
        ("rate", events as f64 / wall, "events/s"),
        ("memory", grown, "bytes/event"),
        ("memory_peak", peak, "bytes"),
        ("changed", done.changed as f64, "rows"),
        ("checksum", (done.checksum >> 11) as f64, "upper 53 bits"),
        ("reprice_wall", reprice.0, "s"),
        ("reprice_changed", reprice.1.changed as f64, "rows"),
    ] {
        if !value.is_nan() {
            record("rollup", &name, round, metric, value, unit);
        }
    }
    let repriced_in = if reprice.0.is_nan() { "-".to_owned() } else { format!("{:.3}", reprice.0) };
    println!(
        "{case:8} {round:>5} {:>9.3} {wall:>9.2} {:>9.0} {grown:>8.0} {:>10} {repriced_in:>10} {:>9}  {checked}",
        cpu * 1e6 / events as f64,
        events as f64 / wall,
        done.changed,
        reprice.1.changed
    );
    Ok(())
}

/// What the views must be after the price change, recomputed from all events by the other program.
fn repriced(text: &[u8]) -> Result<Views> {
    let mut floor = Floor::new(Some(spend1::REPRICED_DAY));
    floor.step(text, &mut Done::default())?;
    Ok(floor.views())
}
