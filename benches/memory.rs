//! Question: how many bytes does an event of SPEND-1 take, and where?
//!
//! Each part is grown in a process of its own and measured as resident memory, so allocator overhead
//! counts: `ids` (deduplication), `names` (dictionary), `no_views`, `three`, `default` (the whole
//! shard with so many views). What the usage arrangement takes follows by subtraction; `delta` is
//! what waits for the next checkpoint (in this bench all of it). Resident memory is good to about 20
//! bytes an event: a merge under way holds its input and its output, and what is freed is given back
//! to the system when the allocator thinks fit. Views are also shown by table, and ids once more, as
//! they account for themselves, which is exact.
//!
//! ```sh
//! cargo bench --bench memory
//! ```

mod support;

use std::collections::HashMap;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use meterr_connectors::codec::decode_lines;
use meterr_operators::dataflow::UsageUpdate;
use meterr_operators::dedupe::{Dedupe, Place};
use meterr_operators::dictionary::Dictionary;
use meterr_operators::rollup::{ALL_VIEWS, ViewSet};
use support::floor::Done;
use support::measure::{bench, option, own_memory, record};
use support::operators::{KEY, Operators, THREE};
use support::spend1::{self, STEP};

#[global_allocator]
static GLOBAL: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    bench("memory", || match option("--part") {
        Some(part) => grow(&part),
        None => all(),
    })
}

/// Grows every part and subtracts.
fn all() -> Result<()> {
    spend1::path()?;
    let mut found: HashMap<String, f64> = HashMap::new();
    for part in ["ids", "names", "no_views", "three", "default"] {
        let mut command = Command::new(std::env::current_exe()?);
        let output = command.args(["--bench", "--part", part]).stderr(Stdio::inherit()).output()?;
        if !output.status.success() {
            bail!("part {part} failed");
        }
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let (name, bytes) = line.rsplit_once(' ').context("a name and bytes")?;
            found.insert(name.to_owned(), bytes.parse()?);
        }
    }
    let rest = found["no_views"] - found["ids"] - found["names"] - found["delta"];
    found.insert("usage (by subtraction)".to_owned(), rest);
    let mut names: Vec<_> = found.into_iter().collect();
    names.sort_by(|a, b| b.1.total_cmp(&a.1));
    println!("{:28} {:>12}", "part", "bytes/event");
    for (name, bytes) in names {
        println!("{name:28} {bytes:>12.1}");
        record("memory", &name, 1, "memory", bytes, "bytes/event");
    }
    Ok(())
}

/// Grows one part in this process; prints names and bytes an event.
fn grow(part: &str) -> Result<()> {
    let text = std::fs::read(spend1::path()?)?;
    let events = spend1::lines(&text) as f64;
    let steps = spend1::steps(&text, STEP);
    let before = own_memory();
    let show = |name: &str, bytes: f64| println!("{name} {}", bytes / events);
    let grown = || own_memory().saturating_sub(before) as f64;
    match part {
        "ids" => {
            let mut ids = Dedupe::default();
            for (position, step) in steps.iter().enumerate() {
                for (line, _, event) in decode_lines(step) {
                    let event = event?;
                    let place = Place { position: position as u64, line };
                    ids.admit(event.fingerprint(&KEY), 0, event.content_hash(&KEY), place);
                }
            }
            show(part, grown());
            show("ids (own account)", ids.bytes() as f64);
        }
        "names" => {
            let mut names = Dictionary::default();
            for step in steps {
                for (_, _, event) in decode_lines(step) {
                    names.number(&event?);
                }
            }
            show(part, grown());
        }
        _ => {
            let views = match part {
                "no_views" => ViewSet::of(&[]),
                "three" => ViewSet::of(&THREE),
                _ => ViewSet::DEFAULT,
            };
            let mut shard = Operators::new(views)?;
            for step in steps {
                shard.step(step, &mut Done::default())?;
            }
            show(part, grown());
            if part == "no_views" {
                show("delta", (shard.shard().delta_len() * size_of::<UsageUpdate>()) as f64);
            }
            if part == "default" {
                shard.rollup(|rollup| {
                    for view in ALL_VIEWS {
                        show(&format!("table/{}", view.name()), rollup.table(view).bytes() as f64);
                    }
                });
            }
        }
    }
    Ok(())
}
