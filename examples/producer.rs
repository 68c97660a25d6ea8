//! What it shows: publishing usage events to meterr over NATS from a program of your own, with nothing
//! but async-nats: lines of one org go together, every message is sent again under its id until it is
//! acknowledged, and many are under way at once. `meterr publish --nats URL` does the same with more
//! care (limits in bytes, refusals told apart); `meterr_connectors::nats::producer` is its core.
//!
//! Run: `cargo run --release --example producer -- --nats nats://127.0.0.1:4222 < events.ndjson`.
//! It needs a server: `nats-server -c config/nats-server.conf` and `meterr serve --nats nats://127.0.0.1:4222`.

use std::collections::BTreeMap;
use std::io::BufRead;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::publish::PublishAck;
use async_nats::jetstream::{self, ErrorCode};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};

const LINES: usize = 100;
const WINDOW: usize = 256;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1).skip_while(|argument| argument != "--nats");
    let url = arguments.nth(1).unwrap_or_else(|| "nats://127.0.0.1:4222".to_owned());
    let context = jetstream::new(async_nats::connect(url).await?);
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let run = format!("{:x}-{:x}", std::process::id(), since.as_nanos());
    let sending = batches()?.into_iter().enumerate().map(|(number, (org, lines))| {
        let (context, id) = (context.clone(), format!("{run}-{number}"));
        async move {
            let ack =
                deliver(&context, &format!("usage.{org}"), &id, lines.join("\n").into()).await?;
            anyhow::Ok((lines.len(), ack))
        }
    });
    let (events, positions) = stream::iter(sending)
        .buffer_unordered(WINDOW)
        .try_fold((0, BTreeMap::new()), async |(events, mut positions), (lines, ack)| {
            let position = positions.entry(ack.stream).or_insert(0);
            *position = ack.sequence.max(*position);
            Ok((events + lines, positions))
        })
        .await?;
    // Queries of meterr wait for such a position: `meterr query acme --min-position 3:7`.
    let token: Vec<String> = positions
        .iter()
        .map(|(stream, sequence)| format!("{}:{sequence}", stream.trim_start_matches("USAGE_")))
        .collect();
    println!("{}", serde_json::json!({"events": events, "position": token.join(",")}));
    Ok(())
}

/// Lines of stdin by org, up to [`LINES`] together.
fn batches() -> anyhow::Result<Vec<(String, Vec<String>)>> {
    let (mut full, mut open) = (Vec::new(), BTreeMap::<String, Vec<String>>::new());
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let event: serde_json::Value = serde_json::from_str(&line)?;
        let org = event["org"].as_str().context("an event without an org")?;
        let lines = open.entry(org.to_owned()).or_default();
        lines.push(line);
        if lines.len() == LINES {
            full.push((org.to_owned(), std::mem::take(lines)));
        }
    }
    full.extend(open.into_iter().filter(|(_, lines)| !lines.is_empty()));
    Ok(full)
}

/// Sends one message until a stream has it.
async fn deliver(
    context: &jetstream::Context,
    subject: &str,
    id: &str,
    payload: Bytes,
) -> anyhow::Result<PublishAck> {
    let mut wait = Duration::from_millis(50);
    loop {
        let message = PublishMessage::build().payload(payload.clone()).message_id(id);
        let answer = async { context.send_publish(subject.to_owned(), message).await?.await };
        let error = match answer.await {
            Ok(ack) => return Ok(ack),
            Err(error) => error,
        };
        let refused = std::error::Error::source(&error)
            .and_then(|cause| cause.downcast_ref::<jetstream::Error>());
        let stays = match refused {
            // Busy, full or without a leader passes. What is wrong with the message stays.
            Some(refused) => {
                refused.code() < 500
                    && refused.code() != 429
                    && refused.error_code() != ErrorCode::STREAM_DUPLICATE_MESSAGE_CONFLICT
            }
            // No answer, no stream at the moment, no connection: it may be stored or not.
            None => error.kind() == PublishErrorKind::MaxPayloadExceeded,
        };
        if stays {
            return Err(error.into());
        }
        tokio::time::sleep(wait).await;
        wait = (2 * wait).min(Duration::from_secs(2));
    }
}
