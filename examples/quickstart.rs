//! What it shows: meterr as a library. A node in a temporary directory takes one event, answers what
//! it cost, takes its correction, and answers anew: the figure is replaced, not added to.
//!
//! Run: `cargo run --release --example quickstart`. Nothing needs to be up.

use std::sync::mpsc;
use std::thread;

use anyhow::Context;
use meterr_connectors::api::{Api, GroupBy, ShardBatch, SpendQuery, Window};
use meterr_engine::config::{self, Sources};
use meterr_engine::serve::{Running, serve};
use meterr_operators::ids::{Positions, shard_of};

const EVENT: &str = r#"{"id":"r-1","time":"2026-01-02T03:04:05Z","org":"acme","user":"ada","provider":"openai","model":"gpt-4o","input_tokens":374,"cached_input_tokens":120,"output_tokens":44}"#;
/// The same id with a higher revision takes the earlier one's place, whatever else it changes.
const CORRECTION: &str = r#"{"id":"r-1","revision":1,"time":"2026-01-02T03:04:05Z","org":"acme","user":"ada","provider":"openai","model":"gpt-4o","input_tokens":374,"cached_input_tokens":120,"output_tokens":80}"#;

fn main() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let mut settings = config::load(&Sources::default())?.settings;
    settings.node.data_dir = dir.path().join("data");
    settings.http.address.set_port(0);

    let (sender, ready) = mpsc::sync_channel(1);
    let node = thread::spawn(move || {
        // `serve` runs the node in its thread and hands out a handle once it listens.
        serve(&settings, false, move |running| drop(sender.send(running)))
    });
    let running = ready.recv().context("the node did not start")?;

    let position = publish(&running, EVENT)?;
    println!("one event:      {}", spend(&running, position)?);
    let position = publish(&running, CORRECTION)?;
    println!("its correction: {}", spend(&running, position)?);
    let position = publish(&running, CORRECTION)?;
    println!("sent twice:     {}", spend(&running, position)?);

    running.stop.drain();
    node.join().map_err(|_| anyhow::anyhow!("the node panicked"))??;
    Ok(())
}

/// Appends an event to its org's shard; the position says where it became durable.
fn publish(running: &Running, event: &str) -> anyhow::Result<Positions> {
    let shard = shard_of("acme", running.service.shards());
    let batch = ShardBatch {
        shard,
        subject: format!("usage.{shard}.@batch"),
        payload: format!("{event}\n").into(),
        lines: vec![1],
    };
    let outcomes = running.shared.runtime.block_on(running.service.publish(vec![batch]));
    let outcome = outcomes.into_iter().next().context("no outcome")?;
    let mut position = Positions::default();
    position.raise(shard, outcome.result.map_err(anyhow::Error::msg)?);
    Ok(position)
}

/// Spend of acme on that day, once `position` is included.
fn spend(running: &Running, position: Positions) -> anyhow::Result<String> {
    let query = SpendQuery {
        org: "acme".to_owned(),
        user: None,
        window: Window::Day,
        from: None,
        to: None,
        by: GroupBy::None,
        min_position: Some(position),
    };
    let answer = running.shared.runtime.block_on(running.service.spend(query))?;
    let row = answer.rows.first().context("no rows")?;
    let cost = row.figures.cost.context("no price")?;
    Ok(format!(
        "{} event, {} output tokens, {cost} USD",
        row.figures.events, row.figures.output_tokens
    ))
}
