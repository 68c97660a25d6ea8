//! The servers tests start: they keep their store and port, freeze, fill up, lead, and end.

#![allow(clippy::unwrap_used)]

#[path = "support/nats.rs"]
mod nats;

use std::path::Path;
use std::time::Duration;

use async_nats::jetstream::{self, stream};
use nats::{Cluster, NatsOptions, NatsServer};

async fn context(url: &str) -> jetstream::Context {
    let options = async_nats::ConnectOptions::new().request_timeout(Some(Duration::from_secs(2)));
    let servers: Vec<_> = url.split(',').map(|url| url.to_owned()).collect();
    let mut context = jetstream::new(options.connect(servers).await.unwrap());
    context.set_timeout(Duration::from_secs(2));
    context
}

fn numbers(replicas: usize) -> stream::Config {
    stream::Config {
        name: "NUMBERS".to_owned(),
        subjects: vec!["numbers".to_owned()],
        num_replicas: replicas,
        ..stream::Config::default()
    }
}

/// Publishes until it is acknowledged, whatever happens to servers meanwhile.
async fn insist(context: &jetstream::Context, payload: Vec<u8>) -> u64 {
    let payload = bytes::Bytes::from(payload);
    for _ in 0..200 {
        if let Ok(waiting) = context.publish("numbers", payload.clone()).await
            && let Ok(ack) = waiting.await
        {
            return ack.sequence;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("never acknowledged");
}

fn lives(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_keeps_its_store_and_port_through_kill_and_stop() {
    let mut server = NatsServer::start(NatsOptions::new().sync_always());
    let url = server.url();
    let context = context(&url).await;
    context.create_stream(numbers(1)).await.unwrap();
    assert_eq!(insist(&context, b"1".to_vec()).await, 1);
    let pid = server.pid();
    server.kill();
    assert!(!lives(pid) && !server.runs());
    server.restart();
    assert_eq!(server.url(), url);
    assert_eq!(insist(&context, b"2".to_vec()).await, 2);
    server.stop();
    server.restart();
    assert_eq!(insist(&context, b"3".to_vec()).await, 3);
    assert!(server.store_dir().join("jetstream").exists());
    let pid = server.pid();
    drop(server);
    assert!(!lives(pid));
}

#[test]
fn a_frozen_server_does_not_answer_and_goes_on_later() {
    let server = NatsServer::start(NatsOptions::new());
    server.pause();
    assert_eq!(server.request("$JS.API.INFO", ""), None);
    server.resume();
    let answer = server.request("$JS.API.INFO", "").unwrap();
    assert_eq!(answer["streams"], 0, "{answer}");
    // Frozen when the test is over: it must end all the same.
    server.pause();
    let pid = server.pid();
    drop(server);
    assert!(!lives(pid));
}

#[test]
fn a_server_ends_with_a_test_that_panics() {
    let mut pid = 0;
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let server = NatsServer::start(NatsOptions::new());
        pid = server.pid();
        assert!(!lives(pid), "as a failing test does");
    }));
    assert!(outcome.is_err());
    assert!(pid > 0 && !lives(pid));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_small_server_is_full_soon_and_takes_more_when_it_has_grown() {
    let small = NatsOptions::new().file_store_max(1 << 20);
    let mut server = NatsServer::start(small.clone());
    let context = context(&server.url()).await;
    context.create_stream(numbers(1)).await.unwrap();
    let mut taken = 0;
    let refused = loop {
        match context.publish("numbers", vec![0; 100_000].into()).await.unwrap().await {
            Ok(_) => taken += 1,
            Err(error) => break error,
        }
        assert!(taken < 20, "it takes everything");
    };
    assert!(refused.to_string().contains("insufficient"), "{refused}");
    assert!(taken >= 5, "only {taken}");
    server.restart_with(small.file_store_max(1 << 24));
    assert_eq!(insist(&context, vec![0; 100_000]).await, taken + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_mapping_is_there_when_asked_for() {
    for (options, expected) in
        [(NatsOptions::new(), "usage.acme"), (NatsOptions::new().mapping(16), "usage.15.acme")]
    {
        let server = NatsServer::start(options);
        let context = context(&server.url()).await;
        let config = stream::Config {
            name: "ALL".to_owned(),
            subjects: vec!["usage.>".to_owned()],
            ..stream::Config::default()
        };
        let stream = context.create_stream(config).await.unwrap();
        context.publish("usage.acme", "".into()).await.unwrap().await.unwrap();
        assert_eq!(stream.get_raw_message(1).await.unwrap().subject.as_str(), expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_loses_its_leader_and_nothing_else() {
    let mut cluster = Cluster::start(3);
    let context = context(&cluster.url()).await;
    context.create_stream(numbers(3)).await.unwrap();
    assert_eq!(insist(&context, b"1".to_vec()).await, 1);
    let leader = cluster.leader("NUMBERS");
    cluster.server(leader).kill();
    assert!(insist(&context, b"2".to_vec()).await >= 2);
    let next = cluster.leader("NUMBERS");
    assert_ne!(next, leader);
    cluster.server(leader).restart();
    cluster.until_complete();
    // By its number what came before is there. (A stream's state is no proof: between two leaders
    // the server says it has no messages.)
    assert!(insist(&context, b"3".to_vec()).await >= 3);
}
