//! One event at a time, from the request until a subscriber has read the change.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result, bail};
use meterr_operators::time::Time;

use super::http::{Client, Subscription};
use super::server::Server;

/// The org that is followed.
pub const ORG: &str = "acme";

/// Milliseconds, one number an event.
#[derive(Debug, Default)]
pub struct Latencies {
    /// From before the request is written until the change is read.
    pub view: Vec<f64>,
    /// From before the request is written until its answer is read, in requests of their own.
    pub acknowledged: Vec<f64>,
    /// What `fdatasync` of an append of 200 bytes takes in the same directory, in between.
    pub fsync: Vec<f64>,
}

/// Measures; `events` are sent for each of the two.
///
/// # Errors
/// When the server fails, or shows another number of events than were sent.
pub fn measure(server: &Server, directory: &Path, events: usize) -> Result<Latencies> {
    let mut latencies = Latencies::default();
    let mut probe = Probe::new(directory)?;
    let mut subscription = Subscription::open(server.address, &format!("/v1/orgs/{ORG}/stream"))?;
    subscription.next("snapshot")?;
    let mut client = Client::connect(server.address)?;
    let mut last = String::new();
    for n in 0..events {
        let line = event(&format!("view-{n}"));
        let sent = Instant::now();
        client.send("POST", "/v1/events", &line)?;
        last = subscription.next("change")?;
        latencies.view.push(sent.elapsed().as_secs_f64() * 1e3);
        answered(&mut client)?;
        // In between, since what the disk does changes from minute to minute.
        latencies.fsync.push(probe.sync()?);
    }
    let wanted = format!("\"events\":{events},");
    if !last.contains(&wanted) {
        bail!("the last change does not say {wanted} {last}");
    }
    for n in 0..events {
        let line = event(&format!("answer-{n}"));
        let sent = Instant::now();
        client.send("POST", "/v1/events", &line)?;
        answered(&mut client)?;
        latencies.acknowledged.push(sent.elapsed().as_secs_f64() * 1e3);
        // So that the next one finds the system idle again.
        subscription.next("change")?;
    }
    Ok(latencies)
}

fn answered(client: &mut Client) -> Result<()> {
    let (status, body) = client.receive()?;
    if status != 202 {
        bail!("{status}: {}", String::from_utf8_lossy(&body));
    }
    Ok(())
}

/// One event of the org that is followed, as a line.
pub fn event(id: &str) -> Vec<u8> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let time = Time(now.as_micros() as i64);
    format!(
        "{{\"id\":\"{id}\",\"time\":\"{time}\",\"org\":\"{ORG}\",\"user\":\"u-1\",\
         \"provider\":\"openai\",\"model\":\"gpt-4o\",\"feature\":\"chat\",\"input_tokens\":374,\
         \"cached_input_tokens\":120,\"output_tokens\":44}}\n"
    )
    .into_bytes()
}

/// A file of its own in the same directory, to see what syncing costs there.
pub struct Probe(File);

impl Probe {
    /// Makes the file.
    ///
    /// # Errors
    /// When it cannot.
    pub fn new(directory: &Path) -> Result<Probe> {
        let path = directory.join("fsync-probe");
        let file = OpenOptions::new().create(true).append(true).open(path);
        Ok(Probe(file.context("a file to try syncing on")?))
    }

    /// Appends and syncs; milliseconds of the sync.
    ///
    /// # Errors
    /// When it cannot.
    pub fn sync(&mut self) -> Result<f64> {
        self.0.write_all(&[b'x'; 200])?;
        let started = Instant::now();
        self.0.sync_data()?;
        Ok(started.elapsed().as_secs_f64() * 1e3)
    }
}
