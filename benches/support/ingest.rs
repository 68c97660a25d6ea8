//! Events into the real binary over HTTP, until they are in the committed views.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use meterr_operators::ids::Positions;
use meterr_operators::money::Atto;
use meterr_operators::price_book::PriceList;

use super::http::Client;
use super::measure::{disk_usage, memory, process_cpu};
use super::server::{Server, position};
use super::spend1::{Figures, Rows, Views, halved};

/// How to send.
#[derive(Debug, Clone, Copy)]
pub struct Sending {
    /// Connections, each with one request under way.
    pub connections: usize,
    /// Bytes of a request.
    pub bytes: usize,
}

/// What it took.
#[derive(Debug, Default)]
pub struct Loaded {
    /// Lines sent.
    pub lines: usize,
    /// Seconds until the last was acknowledged as durable.
    pub acknowledged: f64,
    /// Seconds until all were in committed views.
    pub committed: f64,
    /// CPU seconds of the server.
    pub server_cpu: f64,
    /// CPU seconds of this client.
    pub client_cpu: f64,
    /// Resident bytes of the server.
    pub memory: u64,
    /// Most of them so far.
    pub memory_peak: u64,
    /// Bytes on disk.
    pub disk: u64,
}

/// Sends everything and waits until it is committed.
///
/// # Errors
/// When a line is refused or the server fails.
pub fn load(server: &Server, directory: &Path, text: &[u8], how: Sending) -> Result<Loaded> {
    let requests = requests(text, how.bytes);
    let next = AtomicUsize::new(0);
    let own = std::process::id();
    let cpu = (process_cpu(server.pid())?, process_cpu(own)?);
    let started = Instant::now();
    let sent: Result<Vec<(usize, Positions)>> = thread::scope(|scope| {
        let senders: Vec<_> =
            (0..how.connections).map(|_| scope.spawn(|| send(server, &requests, &next))).collect();
        let joined = senders.into_iter().map(|sender| sender.join());
        joined.map(|sent| sent.map_err(|_| anyhow!("a sender panicked"))?).collect()
    });
    let sent = sent?;
    let acknowledged = started.elapsed().as_secs_f64();
    let mut all = Positions::default();
    for (shard, position) in sent.iter().flat_map(|(_, positions)| &positions.shards) {
        all.raise(*shard, *position);
    }
    server.wait_for(&mut Client::connect(server.address)?, &all)?;
    Ok(Loaded {
        lines: sent.iter().map(|(lines, _)| lines).sum(),
        acknowledged,
        committed: started.elapsed().as_secs_f64(),
        server_cpu: process_cpu(server.pid())? - cpu.0,
        client_cpu: process_cpu(own)? - cpu.1,
        memory: memory(server.pid(), "VmRSS")?,
        memory_peak: memory(server.pid(), "VmHWM")?,
        disk: disk_usage(&directory.join("data"))?,
    })
}

/// The text in pieces of whole lines.
fn requests(text: &[u8], bytes: usize) -> Vec<&[u8]> {
    let mut requests = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let limit = rest.len().min(bytes);
        let end = match memchr::memrchr(b'\n', &rest[..limit]) {
            Some(end) => end + 1,
            None => rest.len(),
        };
        let (request, after) = rest.split_at(end);
        requests.push(request);
        rest = after;
    }
    requests
}

/// One connection: sends requests as long as there are any. Lines sent and where they stand.
fn send(server: &Server, requests: &[&[u8]], next: &AtomicUsize) -> Result<(usize, Positions)> {
    let mut client = Client::connect(server.address)?;
    let mut lines = 0;
    let mut positions = Positions::default();
    while let Some(request) = requests.get(next.fetch_add(1, Ordering::Relaxed)) {
        let answer = client.json("POST", "/v1/events", request)?;
        if answer["rejected_total"].as_u64() != Some(0) {
            bail!("lines were refused: {}", answer["rejected"]);
        }
        let accepted = answer["accepted"].as_u64().context("how many were accepted")?;
        lines += accepted as usize;
        for (shard, at) in position(&answer)?.shards {
            positions.raise(shard, at);
        }
    }
    Ok((lines, positions))
}

/// Compares the months of every org with what they must be.
///
/// # Errors
/// Names the first org and month that differ.
pub fn check(server: &Server, expected: &Rows) -> Result<()> {
    check_view(server, expected, "month", None)
}

/// Compares the three views of SPEND-1 with what they must be.
///
/// # Errors
/// Names the first row that differs.
pub fn check_views(server: &Server, expected: &Views) -> Result<()> {
    check_view(server, &expected.org_month, "month", None)?;
    check_view(server, &expected.user_month, "month", Some("user"))?;
    check_view(server, &expected.org_model_day, "day", Some("model"))
}

fn check_view(server: &Server, expected: &Rows, window: &str, by: Option<&str>) -> Result<()> {
    let mut client = Client::connect(server.address)?;
    let mut orgs: Vec<&str> = expected.keys().filter_map(|key| key.split('|').next()).collect();
    orgs.sort_unstable();
    orgs.dedup();
    let mut seen = 0;
    for org in orgs {
        let path =
            format!("/v1/orgs/{org}/spend?window={window}&by={}&limit=1000", by.unwrap_or("none"));
        let mut cursor = String::new();
        loop {
            let answer = client.json("GET", &format!("{path}{cursor}"), b"")?;
            seen += compare(org, window, &answer, expected)?;
            match answer["next_cursor"].as_str() {
                Some(next) => cursor = format!("&cursor={next}"),
                None => break,
            }
        }
    }
    if seen != expected.len() {
        bail!("{seen} rows instead of {}", expected.len());
    }
    Ok(())
}

/// Compares the rows of an answer about an org with what they must be; returns how many there are.
///
/// # Errors
/// Names the first row that differs.
pub fn compare(
    org: &str,
    window: &str,
    answer: &serde_json::Value,
    expected: &Rows,
) -> Result<usize> {
    // `2026-01` or `2026-01-31`.
    let digits = if window == "month" { 7 } else { 10 };
    let rows = answer["rows"].as_array().context("an answer has rows")?;
    for row in rows {
        let start = row["window_start"].as_str().and_then(|start| start.get(..digits));
        let start = start.context("a row has its window")?;
        let key = match row["key"].as_str() {
            Some(key) => format!("{org}|{key}|{start}"),
            None => format!("{org}|{start}"),
        };
        let wanted = expected.get(&key).with_context(|| format!("{key} should not be"))?;
        if !same(row, wanted) {
            bail!("{key} is {row}, but should be {wanted:?}");
        }
    }
    Ok(rows.len())
}

fn same(row: &serde_json::Value, wanted: &Figures) -> bool {
    let count = |name: &str| row[name].as_i64();
    let cost = row["cost"].as_str().and_then(|cost| Atto::parse(cost).ok());
    count("events") == Some(wanted.events)
        && count("input_tokens") == Some(wanted.input)
        && count("cached_input_tokens") == Some(wanted.cached)
        && count("output_tokens") == Some(wanted.output)
        && cost.is_some_and(|(cost, _)| cost.get() == wanted.cost)
}

/// Halves a price in retrospect; seconds until every shard's views have it.
///
/// # Errors
/// When the server refuses.
pub fn reprice(server: &Server) -> Result<f64> {
    let body = serde_json::to_vec(&PriceList { prices: vec![halved()] })?;
    let mut client = Client::connect(server.address)?;
    let started = Instant::now();
    let answer = client.json("POST", "/v1/prices", &body)?;
    server.wait_for(&mut client, &position(&answer)?)?;
    Ok(started.elapsed().as_secs_f64())
}
