//! CPU seconds, memory and machine, as Linux tells them; results as text for people and as CSV.
//!
//! CPU seconds rather than wall time wherever one thread does the work: on a machine that others use
//! too, wall time measures the others.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result};

/// Clock ticks a second of `/proc/*/stat`: fixed at 100 for user space on every Linux architecture
/// this builds for.
const TICKS: f64 = 100.0;

/// CPU seconds of the calling thread.
pub fn thread_cpu() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos: f64 = text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0.0);
    // Kernels without schedstats say 0; ticks are coarse, but true.
    if nanos > 0.0 { nanos / 1e9 } else { stat_cpu("/proc/thread-self/stat").unwrap_or(0.0) }
}

/// CPU seconds of a process, all its threads together, user and system.
pub fn process_cpu(pid: u32) -> Result<f64> {
    stat_cpu(&format!("/proc/{pid}/stat"))
}

fn stat_cpu(path: &str) -> Result<f64> {
    let text = std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?;
    // The second field is the command in parentheses and may hold blanks.
    let rest = text.rsplit_once(") ").context("a stat line names its command")?.1;
    let field = |n: usize| rest.split(' ').nth(n).and_then(|n| n.parse::<f64>().ok());
    let (user, system) = field(11).zip(field(12)).context("a stat line has times")?;
    Ok((user + system) / TICKS)
}

/// What the threads of a name have used so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct Threads {
    /// CPU seconds.
    pub cpu: f64,
    /// Seconds in which they could have run, but others had the cores.
    pub waited: f64,
}

/// The running threads of a process whose name begins so, added up.
///
/// # Errors
/// When there is no such process.
pub fn threads(pid: u32, name: &str) -> Result<Threads> {
    let mut all = Threads::default();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let thread = thread?.path();
        // A thread may end while it is looked at.
        let read = |file| std::fs::read_to_string(thread.join(file)).unwrap_or_default();
        if read("comm").starts_with(name) {
            let text = read("schedstat");
            let mut nanos = text.split(' ').map(|n| n.parse::<f64>().unwrap_or(0.0) / 1e9);
            all.cpu += nanos.next().unwrap_or(0.0);
            all.waited += nanos.next().unwrap_or(0.0);
        }
    }
    Ok(all)
}

/// A line of `/proc/PID/status` in bytes: `VmRSS` (now) or `VmHWM` (at most so far).
pub fn memory(pid: u32, what: &str) -> Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find(|line| line.starts_with(what)).context("status has memory")?;
    let kib = line.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok());
    Ok(kib.context("memory is a number")? * 1024)
}

/// Resident bytes of this process.
pub fn own_memory() -> u64 {
    memory(std::process::id(), "VmRSS").unwrap_or(0)
}

/// Bytes of the files below a directory, as allocated on disk.
pub fn disk_usage(directory: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut bytes = 0;
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        // A file may go away while it is looked at: the server is at work.
        let Ok(about) = entry.metadata() else { continue };
        bytes += if about.is_dir() { disk_usage(&entry.path())? } else { about.blocks() * 512 };
    }
    Ok(bytes)
}

/// Wall and CPU time of the calling thread since [`Watch::start`].
pub struct Watch {
    wall: Instant,
    cpu: f64,
}

impl Watch {
    /// Starts.
    pub fn start() -> Watch {
        Watch { cpu: thread_cpu(), wall: Instant::now() }
    }

    /// Wall seconds and CPU seconds.
    pub fn stop(&self) -> (f64, f64) {
        (self.wall.elapsed().as_secs_f64(), thread_cpu() - self.cpu)
    }
}

/// The middle of some numbers; of an even count, the lower of the two.
pub fn median(numbers: &[f64]) -> f64 {
    percentile(numbers, 50.0)
}

/// The number that `percent` of the numbers do not exceed.
pub fn percentile(numbers: &[f64], percent: f64) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// How milliseconds are spread, case by case and round by round.
pub struct Spreads {
    bench: &'static str,
    /// p50, p90, p99 and the most, of each round.
    cases: Vec<(String, Vec<[f64; 4]>)>,
}

impl Spreads {
    /// Prints what the columns are.
    pub fn new(bench: &'static str) -> Spreads {
        println!("{:30} round {:>9} {:>9} {:>9} {:>9}", "ms", "p50", "p90", "p99", "max");
        Spreads { bench, cases: Vec::new() }
    }

    /// Prints and records a round of a case.
    pub fn show(&mut self, case: &str, round: usize, all: &[f64]) {
        let at = [50.0, 90.0, 99.0, 100.0].map(|percent| percentile(all, percent));
        Spreads::line(case, &round.to_string(), at);
        let same = self.cases.iter_mut().find(|(name, _)| name == case);
        match same {
            Some((_, rounds)) => rounds.push(at),
            None => self.cases.push((case.to_owned(), vec![at])),
        }
        let case = case.replace(',', "");
        for (name, value) in ["p50", "p90", "p99", "max"].into_iter().zip(at) {
            record(self.bench, &case, round, name, value, "ms");
        }
    }

    /// Prints the medians over the rounds of each case.
    pub fn medians(&self) {
        println!("medians of the rounds:");
        for (case, rounds) in &self.cases {
            let at =
                [0, 1, 2, 3].map(|n| median(&rounds.iter().map(|at| at[n]).collect::<Vec<_>>()));
            Spreads::line(case, "", at);
        }
    }

    fn line(case: &str, round: &str, at: [f64; 4]) {
        println!(
            "{case:30} {round:>5} {:>9.3} {:>9.3} {:>9.3} {:>9.3}",
            at[0], at[1], at[2], at[3]
        );
    }
}

/// Appends a result to the file named by `METERR_BENCH_CSV`, if it is set.
pub fn record(bench: &str, case: &str, round: usize, metric: &str, value: f64, unit: &str) {
    let Some(path) = std::env::var_os("METERR_BENCH_CSV") else { return };
    let line = format!("{bench},{case},{round},{metric},{value},{unit}\n");
    let file = OpenOptions::new().create(true).append(true).open(&path);
    if let Err(error) = file.and_then(|mut file| file.write_all(line.as_bytes())) {
        eprintln!("cannot write {}: {error}", path.display());
    }
}

/// Runs a bench if cargo asks for it, which it does not in `cargo test --benches`; tells its failure.
pub fn bench(name: &str, run: impl FnOnce() -> Result<()>) -> ExitCode {
    if !std::env::args().any(|argument| argument == "--bench") {
        println!("run by `cargo bench --bench {name}`");
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

/// The value of `--name value`, when given.
pub fn option(name: &str) -> Option<String> {
    let mut arguments = std::env::args();
    arguments.find(|argument| argument == name)?;
    arguments.next()
}

/// Whether `--name` is given.
pub fn flag(name: &str) -> bool {
    std::env::args().any(|argument| argument == name)
}
