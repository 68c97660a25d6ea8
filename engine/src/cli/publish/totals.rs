//! The books of a publish: what was accepted, what was rejected, and how it is told.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::time::Duration;

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use meterr_operators::ids::Positions;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::cli::Console;
use crate::cli::args::PublishArgs;
use crate::cli::table::{count, harmless};

/// Rejected lines shown to people. All are counted, and written to `--rejected-to`.
const REJECTED_SHOWN: usize = 20;
/// Rejected lines listed with `--json`.
const REJECTED_LISTED: usize = 10_000;

/// A line that was refused. In an answer `line` counts in the request, in our books in the file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectedLine {
    pub line: u64,
    pub reason: String,
    pub detail: String,
}

/// The books.
pub struct Totals {
    pub accepted: u64,
    rejected: Vec<RejectedLine>,
    pub rejected_total: u64,
    pub position: Positions,
    /// Lines read that are not known to be durable, where that is known.
    pub unsent: Option<u64>,
    /// Messages sent again, where that is known.
    pub retries: u64,
    rejected_to: Option<BufWriter<File>>,
    pub bar: ProgressBar,
}

impl Totals {
    /// Empty books; creates the file for rejected lines.
    pub fn new(args: &PublishArgs, console: &Console, len: Option<u64>) -> anyhow::Result<Totals> {
        let rejected_to = match &args.rejected_to {
            Some(path) => {
                let failed = || format!("cannot create {}", path.display());
                Some(BufWriter::new(File::create(path).with_context(failed)?))
            }
            None => None,
        };
        Ok(Totals {
            accepted: 0,
            rejected: Vec::new(),
            rejected_total: 0,
            position: Positions::default(),
            unsent: None,
            retries: 0,
            rejected_to,
            bar: bar(console.progress, len),
        })
    }

    /// So many events are durable; so many bytes are dealt with.
    pub fn accept(&mut self, events: u64, bytes: u64) {
        self.accepted += events;
        let rate = rate(self.accepted, self.bar.elapsed());
        let message = format!("{} events, {rate} events/s", count(self.accepted as i64));
        self.bar.set_message(message);
        self.bar.inc(bytes);
    }

    /// A line was rejected; keeps its bytes (with their line end) where asked to.
    pub fn reject(&mut self, line: RejectedLine, bytes: Option<&[u8]>) -> anyhow::Result<()> {
        if let (Some(file), Some(bytes)) = (&mut self.rejected_to, bytes) {
            file.write_all(bytes).context("cannot write the rejected lines")?;
        }
        self.rejected_total += 1;
        if self.rejected.len() < REJECTED_LISTED {
            self.rejected.push(line);
        }
        Ok(())
    }

    /// Ends the progress bar and prints the books.
    pub fn finish(
        &mut self,
        args: &PublishArgs,
        took: Duration,
        console: &mut Console,
    ) -> anyhow::Result<()> {
        self.bar.finish_and_clear();
        if let Some(file) = &mut self.rejected_to {
            file.flush().context("cannot write the rejected lines")?;
        }
        report(self, args.client.json, took, console)
    }
}

fn bar(progress: bool, len: Option<u64>) -> ProgressBar {
    if !progress {
        return ProgressBar::hidden();
    }
    let (bar, template) = match len {
        Some(len) => (ProgressBar::new(len), "{bar:30} {bytes}/{total_bytes} {msg}, {eta} left"),
        None => (ProgressBar::no_length(), "{spinner} {bytes} {msg}"),
    };
    let style = ProgressStyle::with_template(template);
    bar.set_style(style.expect("the templates are constants, a test builds both"));
    bar
}

/// Events a second, for people.
fn rate(events: u64, took: Duration) -> String {
    count((events as f64 / took.as_secs_f64().max(1e-3)) as i64)
}

fn report(
    totals: &Totals,
    json: bool,
    took: Duration,
    console: &mut Console,
) -> anyhow::Result<()> {
    let mut rejected = totals.rejected.clone();
    rejected.sort_unstable_by_key(|line| line.line);
    if json {
        let mut books = json!({
            "accepted": totals.accepted,
            "rejected": rejected,
            "rejected_total": totals.rejected_total,
            "position": totals.position,
        });
        if let Some(unsent) = totals.unsent {
            books["unsent"] = unsent.into();
            books["retries"] = totals.retries.into();
        }
        console.json(&books)?;
        return Ok(());
    }
    for line in rejected.iter().take(REJECTED_SHOWN) {
        let RejectedLine { line, reason, detail } = line;
        writeln!(console.err, "line {line}: {reason}: {}", harmless(detail))?;
    }
    let hidden = totals.rejected_total.saturating_sub(REJECTED_SHOWN as u64);
    if hidden > 0 {
        let hidden = count(hidden as i64);
        writeln!(console.err, "… and {hidden} more; --rejected-to FILE keeps them all")?;
    }
    let (accepted, rejected) = (count(totals.accepted as i64), count(totals.rejected_total as i64));
    writeln!(
        console.out,
        "{accepted} accepted, {rejected} rejected, {} events/s",
        rate(totals.accepted, took)
    )?;
    if totals.accepted > 0 {
        writeln!(console.out, "position {}", totals.position)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_can_be_drawn() {
        bar(true, None).finish_and_clear();
        bar(true, Some(5)).finish_and_clear();
    }
}
