//! What it shows: a producer over HTTP that does not know whether its requests arrived, and so sends
//! everything twice. The second pass changes no figure, since an event counts once by its id.
//!
//! Run: `cargo run --release --example replay`. Starts a node of its own; with a URL behind `--`, it
//! sends to that server instead. The requests are those of `examples/data/`.

use std::sync::mpsc;
use std::thread;

use anyhow::Context;
use meterr_engine::config::{self, Sources};
use meterr_engine::serve::serve;
use serde_json::Value;

const TRACE: &str = include_str!("data/azure_llm_conv_2023.csv");
/// Events a request: enough to make the cost of a request and its fsync small.
const BATCH_EVENTS: usize = 1_000;

fn main() -> anyhow::Result<()> {
    if let Some(url) = std::env::args().nth(1) {
        return replay_twice(&url);
    }
    let dir = tempfile::tempdir()?;
    let mut settings = config::load(&Sources::default())?.settings;
    settings.node.data_dir = dir.path().join("data");
    settings.http.address.set_port(0);
    let (sender, ready) = mpsc::sync_channel(1);
    let node =
        thread::spawn(move || serve(&settings, false, move |running| drop(sender.send(running))));
    let running = ready.recv().context("the node did not start")?;
    let result = replay_twice(&format!("http://{}", running.address));
    running.stop.drain();
    node.join().map_err(|_| anyhow::anyhow!("the node panicked"))??;
    result
}

fn replay_twice(url: &str) -> anyhow::Result<()> {
    let events = events()?;
    for pass in ["first", "second"] {
        let mut position = String::new();
        for batch in events.chunks(BATCH_EVENTS) {
            let answer: Value = ureq::post(format!("{url}/v1/events"))
                .content_type("application/x-ndjson")
                .send(&batch.concat())?
                .body_mut()
                .read_to_string()?
                .parse()?;
            // All go to one org and so to one shard: the last position includes the others.
            position = answer["position"].as_str().context("no position")?.to_owned();
        }
        let url = format!("{url}/v1/orgs/replay/spend?window=all&min_position={position}");
        let answer: Value = ureq::get(url).call()?.body_mut().read_to_string()?.parse()?;
        let row = &answer["rows"][0];
        let text = |value: &Value| value.as_str().unwrap_or("none").to_owned();
        let (cost, as_of) = (text(&row["cost"]), text(&answer["as_of"]));
        println!("{pass} pass: {} events, {cost} USD, as of {as_of}", row["events"]);
    }
    Ok(())
}

fn events() -> anyhow::Result<Vec<String>> {
    let lines = TRACE.lines().skip(1).enumerate();
    lines
        .map(|(n, line)| {
            let [time, input, output] = line.split(',').collect::<Vec<_>>()[..] else {
                anyhow::bail!("line {} has not three columns", n + 2);
            };
            let time = time.replacen(' ', "T", 1);
            Ok(format!(
                "{{\"id\":\"azure-{n}\",\"time\":\"{time}Z\",\"org\":\"replay\",\"user\":\"u-{}\",\
                 \"provider\":\"openai\",\"model\":\"gpt-4o-mini\",\"input_tokens\":{input},\
                 \"output_tokens\":{output}}}\n",
                n % 100
            ))
        })
        .collect()
}
