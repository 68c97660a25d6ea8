//! The producer against real servers: what is acknowledged is stored once, whatever happens to the
//! server, and what cannot be stored is told.

#![allow(clippy::unwrap_used)]

#[path = "../../tests/support/nats.rs"]
mod nats;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use async_nats::jetstream::{self, Context};
use bytes::Bytes;
use futures::StreamExt;
use meterr_connectors::log::Message;
use meterr_connectors::nats::connection::{NatsSettings, connect};
use meterr_connectors::nats::producer::{
    Failure, NotSent, Producer, ProducerSettings, Sent, ShardsError, shards_of,
};
use meterr_connectors::nats::streams::Wanted;
use meterr_connectors::nats::subjects;
use meterr_operators::ids::{Positions, ShardId, shard_of};
use nats::{NatsOptions, NatsServer};

const SHARD: ShardId = ShardId(0);

fn settings(url: &str) -> NatsSettings {
    NatsSettings { url: url.to_owned(), ..NatsSettings::default() }
}

async fn context(url: &str) -> Context {
    let options = async_nats::ConnectOptions::new().request_timeout(Some(Duration::from_secs(10)));
    jetstream::new(options.connect(url).await.unwrap())
}

async fn with_shards(server: &NatsServer, shards: u16) -> Context {
    let context = context(&server.url()).await;
    for shard in 0..shards {
        let wanted = Wanted::usage(ShardId(shard), 1, None);
        context.create_stream(wanted.config("tests", None)).await.unwrap();
    }
    context
}

async fn producer(server: &NatsServer, settings_: ProducerSettings) -> Producer {
    Producer::connect(&settings(&server.url()), "tests", settings_).await.unwrap()
}

fn impatient() -> ProducerSettings {
    ProducerSettings { give_up_after: Some(Duration::from_secs(2)), ..ProducerSettings::default() }
}

fn message(shard: ShardId, payload: impl Into<Bytes>) -> Message {
    let subject = subjects::usage(shard, "@batch");
    Message { subject, headers: Vec::new(), payload: payload.into() }
}

/// How often each payload is stored.
async fn stored(context: &Context, shard: ShardId) -> BTreeMap<Bytes, u32> {
    let stream = context.get_stream(subjects::usage_stream(shard)).await.unwrap();
    let last = stream.get_info().await.unwrap().state.last_sequence;
    let mut found = BTreeMap::new();
    let consumer =
        stream.create_consumer(jetstream::consumer::pull::OrderedConfig::default()).await.unwrap();
    let mut messages = consumer.messages().await.unwrap();
    for _ in 0..last {
        let message = messages.next().await.unwrap().unwrap();
        *found.entry(message.payload.clone()).or_insert(0) += 1;
    }
    found
}

async fn refused(sent: Sent) -> NotSent {
    sent.await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn acknowledgements_say_where_messages_stand() {
    let server = NatsServer::start(NatsOptions::new());
    let context = with_shards(&server, 3).await;
    let producer = producer(&server, ProducerSettings::default()).await;
    assert_eq!(producer.shards().await, Ok(3));
    let mut token = Positions::default();
    for n in 0..10_u8 {
        for shard in [ShardId(0), ShardId(2)] {
            producer.send(shard, message(shard, vec![n])).await.await.unwrap().raise(&mut token);
        }
    }
    assert_eq!(token.to_string(), "0:10,2:10");
    let counts = producer.counts();
    assert_eq!((counts.sent, counts.acked, counts.retried, counts.failed), (20, 20, 0, 0));
    assert_eq!(stored(&context, ShardId(2)).await.len(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_killed_again_and_again_loses_and_doubles_nothing() {
    const MESSAGES: u32 = 6_000;
    let mut server = NatsServer::start(NatsOptions::new());
    let context = with_shards(&server, 1).await;
    let producer = producer(&server, ProducerSettings::default()).await;
    let sending = producer.clone();
    let sender = tokio::spawn(async move {
        let mut sent = Vec::new();
        for n in 0..MESSAGES {
            sent.push(sending.send(SHARD, message(SHARD, n.to_string())).await);
        }
        let mut positions = Vec::new();
        for sent in sent {
            positions.push(sent.await.unwrap().position);
        }
        positions
    });
    for round in 1..=3 {
        while producer.counts().acked < round * u64::from(MESSAGES) / 5 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        server.kill();
        assert!(producer.counts().acked < u64::from(MESSAGES), "killed too late to show anything");
        server.restart();
    }
    let mut positions = sender.await.unwrap();
    positions.sort_unstable();
    let dense: Vec<u64> = (1..=u64::from(MESSAGES)).collect();
    assert_eq!(positions, dense, "every acknowledgement names a position of its own");
    let found = stored(&context, SHARD).await;
    assert_eq!(found.len(), MESSAGES as usize);
    assert!(found.values().all(|times| *times == 1));
    assert!(producer.counts().retried > 0, "{:?}", producer.counts());
    assert_eq!(producer.trouble(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_server_fills_the_window_and_stores_each_message_once() {
    let server = NatsServer::start(NatsOptions::new());
    let context = with_shards(&server, 1).await;
    let settings = ProducerSettings {
        window: 8,
        ack_wait: Duration::from_millis(200),
        ..ProducerSettings::default()
    };
    let producer = producer(&server, settings).await;
    producer.send(SHARD, message(SHARD, "first")).await.await.unwrap();
    server.pause();
    let mut sent = Vec::new();
    for n in 0..8 {
        sent.push(producer.send(SHARD, message(SHARD, n.to_string())).await);
    }
    assert!(producer.full());
    let more = message(SHARD, "more");
    let mut waiting = std::pin::pin!(producer.send(SHARD, more));
    let began = Instant::now();
    // Until each was sent at least twice.
    while producer.counts().retried < 8 {
        assert!(began.elapsed() < Duration::from_secs(60));
        tokio::select! {
            _ = &mut waiting => panic!("the window has no room"),
            () = tokio::time::sleep(Duration::from_millis(5)) => {}
        }
    }
    assert_eq!(producer.trouble().as_deref(), Some("no acknowledgement in time"));
    server.resume();
    sent.push(waiting.await);
    for sent in sent {
        sent.await.unwrap();
    }
    let found = stored(&context, SHARD).await;
    assert_eq!(found.len(), 10);
    assert!(found.values().all(|times| *times == 1), "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_window_is_bounded_in_bytes_too() {
    let server = NatsServer::start(NatsOptions::new());
    with_shards(&server, 1).await;
    let settings = ProducerSettings { window_bytes: 1_000, ..ProducerSettings::default() };
    let producer = producer(&server, settings).await;
    server.pause();
    let first = producer.send(SHARD, message(SHARD, vec![1; 600])).await;
    let mut second = std::pin::pin!(producer.send(SHARD, message(SHARD, vec![2; 5_000])));
    assert!(futures::poll!(&mut second).is_pending());
    server.resume();
    first.await.unwrap();
    second.await.await.unwrap();
    assert_eq!(producer.counts().acked, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_server_is_told_and_ridden_out() {
    let full = NatsOptions::new().file_store_max(200_000);
    let mut server = NatsServer::start(full);
    let context = with_shards(&server, 1).await;
    let hurried = producer(&server, impatient()).await;
    let mut stored_before = 0;
    let error = loop {
        match hurried.send(SHARD, message(SHARD, vec![stored_before; 20_000])).await.await {
            Ok(_) => stored_before += 1,
            Err(error) => break error,
        }
    };
    assert!((5..=10).contains(&stored_before), "{stored_before}");
    assert!(!error.refused && !error.maybe_stored && error.attempts > 1, "{error:?}");
    let Some(Failure::Refused { description, .. }) = &error.failure else { panic!("{error:?}") };
    assert!(description.contains("resource") || description.contains("storage"), "{description}");

    let patient = producer(&server, ProducerSettings::default()).await;
    let waiting = patient.send(SHARD, message(SHARD, vec![255; 20_000])).await;
    let began = Instant::now();
    while patient.counts().retried < 2 {
        assert!(began.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(
        patient.trouble().unwrap().contains("the server refused it"),
        "{:?}",
        patient.trouble()
    );
    server.restart_with(NatsOptions::new());
    waiting.await.unwrap();
    assert_eq!(stored(&context, SHARD).await.len(), usize::from(stored_before) + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_user_may_not_do_is_told_at_once() {
    let users = r#"
authorization { users = [
  { user: admin, password: a }
  { user: reader, password: r, permissions: { publish: ["$JS.API.>"] } }
  { user: deaf, password: d, permissions: { publish: [">"], subscribe: ["other"] } }
  { user: writer, password: w, permissions: { publish: ["usage.>"] } }
] }"#;
    let server = NatsServer::start(NatsOptions::new().mapping(1).text(users).login("admin", "a"));
    let of = |user: &str| format!("nats://{user}@127.0.0.1:{}", server.port());
    let admin = connect(&settings(&of("admin:%61")), "tests").await.unwrap();
    let admin = jetstream::new(admin);
    let wanted = Wanted::usage(SHARD, 1, None);
    admin.create_stream(wanted.config("tests", None)).await.unwrap();
    let producer = async |user: &str| {
        let patient = ProducerSettings { ack_wait: Duration::from_secs(30), ..Default::default() };
        Producer::connect(&settings(&of(user)), "tests", patient).await.unwrap()
    };
    let reader = producer("reader:r").await;
    for _ in 0..2 {
        let error = refused(reader.send(SHARD, message(SHARD, "x")).await).await;
        assert!(error.refused && !error.maybe_stored, "{error:?}");
        let failure = error.failure.unwrap().to_string();
        assert_eq!(failure, "not permitted: this user may not publish to \"usage.0.@batch\"");
    }
    assert_eq!(reader.shards().await, Ok(1));
    // The server looks after its mapping, and names what that made of the subject.
    let acme = Message { subject: "usage.acme".to_owned(), ..message(SHARD, "x") };
    let error = refused(reader.send(SHARD, acme).await).await;
    assert!(matches!(error.failure, Some(Failure::Denied(_))), "{error:?}");
    let deaf = producer("deaf:d").await;
    for _ in 0..2 {
        let error = refused(deaf.send(SHARD, message(SHARD, "x")).await).await;
        let failure = error.failure.unwrap().to_string();
        assert!(failure.contains("may not subscribe to \"_INBOX."), "{failure}");
    }
    let writer = producer("writer:w").await;
    writer.send(SHARD, message(SHARD, "x")).await.await.unwrap();
    let ShardsError::Unknown(_) = writer.shards().await.unwrap_err() else { panic!("unknown") };
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_streams_are_told_apart_from_those_that_come() {
    let server = NatsServer::start(NatsOptions::new());
    let context = context(&server.url()).await;
    assert_eq!(shards_of(&context).await, Err(ShardsError::None));
    let producer = producer(&server, ProducerSettings::default()).await;
    // Without any stream the deployment may be about to start.
    let early = producer.send(SHARD, message(SHARD, "early")).await;
    let began = Instant::now();
    while producer.counts().retried < 3 {
        assert!(began.elapsed() < Duration::from_secs(60));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let wanted = Wanted::usage(SHARD, 1, None);
    context.create_stream(wanted.config("tests", None)).await.unwrap();
    assert_eq!(early.await.unwrap().position, 1);
    let error = refused(producer.send(ShardId(4), message(ShardId(4), "x")).await).await;
    assert_eq!(error.failure, Some(Failure::Missing("USAGE_4".to_owned())));
    assert!(error.refused && !error.maybe_stored);
    let wanted = Wanted::usage(ShardId(4), 1, None);
    context.create_stream(wanted.config("tests", None)).await.unwrap();
    let gap = shards_of(&context).await.unwrap_err();
    assert!(
        gap.to_string().starts_with("stream USAGE_1 is not there, although USAGE_4 is"),
        "{gap}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_stream_of_the_shard_takes_is_told() {
    let server = NatsServer::start(NatsOptions::new());
    with_shards(&server, 2).await;
    let producer = producer(&server, ProducerSettings::default()).await;
    // The subject of one shard with the stream of another.
    let error = refused(producer.send(ShardId(1), message(SHARD, "x")).await).await;
    assert!(matches!(error.failure, Some(Failure::Refused { error: 10060, .. })), "{error:?}");
    let large = vec![0; producer.message_bytes_max() + 1];
    let error = refused(producer.send(SHARD, message(SHARD, large)).await).await;
    assert!(matches!(error.failure, Some(Failure::TooLarge(_))), "{error:?}");
    for subject in ["usage.0.*", "usage.0.>", "usage..0", "", "usage.0.a b"] {
        let message = Message { subject: subject.to_owned(), ..message(SHARD, "x") };
        let error = refused(producer.send(SHARD, message).await).await;
        assert!(matches!(error.failure, Some(Failure::Unsendable(_))), "{subject:?}: {error:?}");
    }
    for (name, value) in [("", "x"), ("a b", "x"), ("a:b", "x"), ("a", "x\r\nb: y")] {
        let headers = vec![(name.to_owned(), value.to_owned())];
        let error = refused(producer.send(SHARD, Message { headers, ..message(SHARD, "x") }).await);
        assert!(matches!(error.await.failure, Some(Failure::Unsendable(_))), "{name:?}");
    }
    let headers = vec![("content-type".to_owned(), "application/x-ndjson".to_owned())];
    producer.send(SHARD, Message { headers, ..message(SHARD, "x") }).await.await.unwrap();
    assert_eq!(producer.counts().failed, 11);
}

#[tokio::test(flavor = "multi_thread")]
async fn finishing_ends_what_is_not_acknowledged() {
    let mut server = NatsServer::start(NatsOptions::new());
    with_shards(&server, 1).await;
    let producer = producer(&server, ProducerSettings::default()).await;
    producer.send(SHARD, message(SHARD, "x")).await.await.unwrap();
    server.kill();
    let waiting = producer.send(SHARD, message(SHARD, "y")).await;
    producer.finish_within(Duration::from_millis(50));
    let error = waiting.await.unwrap_err();
    assert!(!error.refused, "{error:?}");
    assert!(error.to_string().contains("was not acknowledged in time"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_brings_orgs_into_the_shards_of_the_vectors() {
    let text = include_str!("../../config/wire/shards.json");
    let vectors: serde_json::Value = serde_json::from_str(text).unwrap();
    let vectors = vectors["vectors"].as_array().unwrap();
    for shards in [16_u16, 64, 256] {
        let server = NatsServer::start(NatsOptions::new().mapping(shards));
        let client = async_nats::connect(server.url()).await.unwrap();
        let mut all = client.subscribe("usage.*.*").await.unwrap();
        for vector in vectors {
            let org = vector["org"].as_str().unwrap();
            client.publish(format!("usage.{org}"), Bytes::new()).await.unwrap();
            let mapped = all.next().await.unwrap().subject;
            let expected = vector[&format!("shard_of_{shards}")].as_u64().unwrap();
            assert_eq!(mapped.as_str(), format!("usage.{expected}.{org}"), "of {shards}");
            assert_eq!(u64::from(shard_of(org, shards).0), expected, "{org} of {shards}");
        }
    }
}
