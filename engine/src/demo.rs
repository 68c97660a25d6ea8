//! `meterr demo`: the whole engine on one machine, fed with a real trace.
//!
//! Replays the requests of a public LLM inference trace (see `examples/data/README.md`) as those of
//! three orgs, their users and models, through the real path: HTTP, log, dataflow, commits. The data
//! directory is temporary. The trace holds sizes and times only; orgs, users, models and features are
//! given to its requests by a fixed rule, so that every run ends in the same figures.

use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Context;
use meterr_connectors::api::{Api, ShardBatch, SpendQuery, TopBy, TopQuery, TopRow, Window};
use meterr_operators::ids::{Positions, shard_of};
use meterr_operators::rng::Rng;
use meterr_operators::time::{SECOND, Time};
use serde_json::json;

use crate::cli::args::DemoArgs;
use crate::cli::{Console, Exit, Table, count};
use crate::node::now;
use crate::serve::{self, Running};
use crate::settings::Settings;

/// The trace: time, context tokens, generated tokens.
const TRACE: &str = include_str!("../../examples/data/azure_llm_conv_2023.csv");

const ORGS: [(&str, usize); 3] = [("acme", 12), ("globex", 7), ("initech", 3)];
const MODELS: [(&str, &str); 5] = [
    ("openai", "gpt-4o-mini"),
    ("openai", "gpt-4o"),
    ("anthropic", "claude-sonnet-4-5"),
    ("google", "gemini-2.5-flash"),
    ("deepseek", "deepseek-chat"),
];
const FEATURES: [&str; 4] = ["chat", "search", "agent", "summarize"];

struct Request {
    /// Microseconds after the first request.
    after: i64,
    org: &'static str,
    /// The event without its time.
    head: String,
    tail: String,
}

impl Request {
    fn line(&self, start: Time) -> String {
        let time = Time(start.0 + self.after);
        format!("{}\"time\":\"{time}\"{}\n", self.head, self.tail)
    }
}

fn requests() -> anyhow::Result<Vec<Request>> {
    let mut rng = Rng::new(2023);
    let mut first = None;
    let mut requests = Vec::new();
    for (n, line) in TRACE.trim_start_matches('\u{feff}').lines().skip(1).enumerate() {
        let mut columns = line.split(',');
        let mut column =
            || columns.next().with_context(|| format!("line {} of the trace is short", n + 2));
        let (time, input, output) = (column()?, column()?, column()?);
        let time = Time::parse(&format!("{}Z", time.trim()))
            .map_err(|what| anyhow::anyhow!("line {} of the trace: {what}", n + 2))?;
        let first = *first.get_or_insert(time);
        let (org, users) = ORGS[[0, 0, 0, 1, 1, 2][rng.below(6) as usize]];
        // Small numbers are likelier: some users ask far more than others.
        let user = rng.below(users as u64).min(rng.below(users as u64));
        let (provider, model) = MODELS[rng.below(5).min(rng.below(5)) as usize];
        let feature = FEATURES[rng.below(4) as usize];
        let input: u64 = input.trim().parse().context("context tokens of the trace")?;
        let cached = if rng.percent(30) { input * rng.below(90) / 100 } else { 0 };
        requests.push(Request {
            after: time.0 - first.0,
            org,
            head: format!("{{\"id\":\"azure-{n}\","),
            tail: format!(
                ",\"org\":\"{org}\",\"user\":\"u-{user}\",\"provider\":\"{provider}\",\"model\":\"{model}\",\
                 \"feature\":\"{feature}\",\"input_tokens\":{input},\"cached_input_tokens\":{cached},\
                 \"output_tokens\":{}}}",
                output.trim()
            ),
        });
    }
    Ok(requests)
}

/// A directory that is removed when done with.
struct TemporaryDir(PathBuf);

impl TemporaryDir {
    fn new() -> anyhow::Result<TemporaryDir> {
        let name = format!("meterr-demo-{}-{}", std::process::id(), now().0);
        let dir = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(TemporaryDir(dir))
    }
}

impl Drop for TemporaryDir {
    fn drop(&mut self) {
        // Left behind at worst; the system's temporary directory is cleaned by itself.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs the demo.
///
/// # Errors
/// When the engine cannot start.
pub fn demo(
    mut settings: Settings,
    args: &DemoArgs,
    console: &mut Console,
) -> anyhow::Result<Exit> {
    let dir = TemporaryDir::new()?;
    settings.node.data_dir = dir.0.clone();
    if args.http.is_none() {
        settings.http.address.set_port(0);
    }
    let (sender, ready) = std::sync::mpsc::sync_channel(1);
    let server = std::thread::Builder::new().name("demo-node".to_owned()).spawn(move || {
        // The receiver waits until it has this or the thread ends.
        serve::serve(&settings, false, move |running| drop(sender.send(running)))
    })?;
    let result = match ready.recv() {
        Ok(running) => {
            let result = drive(&running, args, console);
            running.stop.drain();
            result
        }
        // The thread ended before: its own error says why.
        Err(_) => Ok(Exit::Failed),
    };
    let ended = server.join().map_err(|_| anyhow::anyhow!("the node's thread panicked"))?;
    ended.context("the engine did not run")?;
    drop(dir);
    result
}

fn drive(running: &Running, args: &DemoArgs, console: &mut Console) -> anyhow::Result<Exit> {
    let requests = requests()?;
    // Replayed so that the last request is now: the trace covers about an hour.
    let length = requests.last().map_or(0, |request| request.after);
    let start = if args.once {
        // Always the same windows, so that the figures can be compared.
        Time::parse("2023-11-16T18:00:00Z").map_err(anyhow::Error::msg)?
    } else {
        Time(now().0 - length)
    };
    let paced = !args.once && args.speed > 0.0;
    let live = console.progress && !args.json;
    if !args.json {
        writeln!(
            console.err,
            "replaying {} requests of the Azure LLM inference trace; live figures at \
             http://{}/v1/top?by=org&window=all",
            count(requests.len() as i64),
            running.address
        )?;
    }
    let began = Instant::now();
    let mut sent = 0;
    let mut position = Positions::default();
    let mut shown = Instant::now();
    let mut lines_shown = 0;
    while sent < requests.len() && !*running.shared.draining.borrow() {
        let due = if paced {
            let trace_now = (began.elapsed().as_secs_f64() * args.speed * SECOND as f64) as i64;
            requests.partition_point(|request| request.after <= trace_now)
        } else {
            requests.len().min(sent + 2_000)
        };
        if due > sent {
            publish(running, &requests[sent..due], start, &mut position)?;
            sent = due;
        }
        if live && shown.elapsed() >= Duration::from_millis(250) {
            lines_shown = draw(running, &position, sent, requests.len(), lines_shown, console)?;
            shown = Instant::now();
        }
        if paced {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
    // Until it is committed, not only durable.
    running
        .shared
        .runtime
        .block_on(running.service.top(everything(&position)))
        .context("the events did not reach the views")?;
    let took = began.elapsed();
    if live {
        draw(running, &position, sent, requests.len(), lines_shown, console)?;
    }
    summary(running, &position, sent, took, args, console)?;
    Ok(Exit::Done)
}

fn publish(
    running: &Running,
    requests: &[Request],
    start: Time,
    position: &mut Positions,
) -> anyhow::Result<()> {
    let shards = running.service.shards();
    let mut batches: std::collections::BTreeMap<_, ShardBatch> = std::collections::BTreeMap::new();
    for request in requests {
        let shard = shard_of(request.org, shards);
        let batch = batches.entry(shard).or_insert_with(|| ShardBatch {
            shard,
            subject: format!("usage.{shard}.@batch"),
            payload: Default::default(),
            lines: Vec::new(),
        });
        let mut payload = Vec::from(std::mem::take(&mut batch.payload));
        payload.extend_from_slice(request.line(start).as_bytes());
        batch.payload = payload.into();
    }
    for outcome in
        running.shared.runtime.block_on(running.service.publish(batches.into_values().collect()))
    {
        let at =
            outcome.result.map_err(anyhow::Error::msg).context("the log did not take events")?;
        position.raise(outcome.shard, at);
    }
    Ok(())
}

fn everything(position: &Positions) -> TopQuery {
    TopQuery {
        by: TopBy::Org,
        window: Window::All,
        at: None,
        n: 1,
        org: None,
        min_position: Some(position.clone()),
    }
}

fn top(
    running: &Running,
    by: TopBy,
    n: usize,
    position: &Positions,
) -> anyhow::Result<Vec<TopRow>> {
    let query = TopQuery { by, n, ..everything(position) };
    Ok(running.shared.runtime.block_on(running.service.top(query))?.0)
}

fn tables(running: &Running, position: &Positions) -> anyhow::Result<Vec<u8>> {
    let mut out = Vec::new();
    for (title, by, n) in
        [("org", TopBy::Org, 3), ("user", TopBy::User, 6), ("model", TopBy::Model, 5)]
    {
        let mut table =
            Table::new(&[title, ">events", ">input", ">cached", ">output", ">cost usd"]);
        for row in top(running, by, n, position)? {
            let name = match (&row.org, by) {
                (Some(org), TopBy::User) => format!("{org}/{}", row.key),
                _ => row.key.clone(),
            };
            let f = row.figures;
            table.row([
                name,
                count(f.events),
                count(f.input_tokens),
                count(f.cached_input_tokens),
                count(f.output_tokens),
                f.cost.map_or("-".to_owned(), |cost| cost.to_string()),
            ]);
        }
        if !out.is_empty() {
            out.push(b'\n');
        }
        table.print(&mut out)?;
    }
    out.push(b'\n');
    Ok(out)
}

/// Draws the tables over the ones drawn before; returns how many lines they take.
fn draw(
    running: &Running,
    position: &Positions,
    sent: usize,
    of: usize,
    over: usize,
    console: &mut Console,
) -> anyhow::Result<usize> {
    let mut text = String::from_utf8(tables(running, position)?)?;
    text.push_str(&format!("{sent} of {of} requests, as of {position}\n"));
    if over > 0 {
        // Up over the last drawing, and clear to the end of the screen.
        write!(console.err, "\x1b[{over}A\x1b[J")?;
    }
    write!(console.err, "{text}")?;
    console.err.flush()?;
    Ok(text.lines().count())
}

fn summary(
    running: &Running,
    position: &Positions,
    sent: usize,
    took: Duration,
    args: &DemoArgs,
    console: &mut Console,
) -> anyhow::Result<()> {
    let orgs = top(running, TopBy::Org, 100, position)?;
    if args.json {
        let mut days = serde_json::Map::new();
        for org in &orgs {
            let query = SpendQuery {
                org: org.key.clone(),
                user: None,
                window: Window::Day,
                from: None,
                to: None,
                by: meterr_connectors::api::GroupBy::None,
                min_position: None,
            };
            let answer = running.shared.runtime.block_on(running.service.spend(query))?;
            days.insert(org.key.clone(), serde_json::to_value(answer.rows)?);
        }
        let value = json!({
            "events": sent,
            "as_of": position,
            "orgs": orgs,
            "users": top(running, TopBy::User, 1_000, position)?,
            "models": top(running, TopBy::Model, 1_000, position)?,
            "features": top(running, TopBy::Feature, 1_000, position)?,
            "org_days": days,
        });
        console.json(&value)?;
        return Ok(());
    }
    let total: meterr_operators::money::Atto = orgs.iter().filter_map(|org| org.figures.cost).sum();
    if args.once || !console.progress {
        console.out.write_all(&tables(running, position)?)?;
    }
    writeln!(
        console.out,
        "{} events in {:.2} s, durable and in every view; {total} USD in all",
        count(sent as i64),
        took.as_secs_f64()
    )?;
    Ok(())
}
