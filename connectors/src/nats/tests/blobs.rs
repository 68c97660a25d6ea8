//! An object store of NATS as any other store, and what is special about it.

use async_nats::jetstream;
use bytes::Bytes;

use super::server::{Cluster, NatsOptions, NatsServer};
use crate::blobs::testing::{bytes, conforms};
use crate::blobs::{BLOB_LEN_MAX, Blobs};
use crate::nats::blobs::{NatsBlobs, STREAM};
use crate::nats::connection::{NatsSettings, connect};

fn settings(url: String) -> NatsSettings {
    NatsSettings { url, ..NatsSettings::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_keeps_the_rules_of_a_store() {
    let mut server = NatsServer::start(NatsOptions::new());
    let blobs = NatsBlobs::connect(&settings(server.url()), 1).await.unwrap();
    conforms(&blobs).await;
    // Nothing but what says that objects were deleted is left.
    let client = connect(&settings(server.url()), "test").await.unwrap();
    let mut stream = jetstream::new(client).get_stream(STREAM).await.unwrap();
    assert_eq!(stream.info().await.unwrap().state.messages, 5);

    // The largest there may be, and through a restart.
    let large = bytes(BLOB_LEN_MAX, 3);
    blobs.put("a/large", large.clone()).await.unwrap();
    server.restart();
    let found = loop {
        match blobs.get("a/large").await {
            Ok(found) => break found,
            Err(error) => assert!(error.to_string().contains("a/large"), "{error}"),
        }
    };
    assert!(found == Some(large));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damaged_objects_are_errors_and_the_same_again_is_no_work() {
    let server = NatsServer::start(NatsOptions::new());
    let blobs = NatsBlobs::connect(&settings(server.url()), 1).await.unwrap();
    let one = bytes(1_500_000, 1);
    blobs.put("a", one.clone()).await.unwrap();
    let client = connect(&settings(server.url()), "test").await.unwrap();
    let stream = jetstream::new(client.clone()).get_stream(STREAM).await.unwrap();
    let last = async || stream.get_info().await.unwrap().state.last_sequence;
    let before = last().await;
    blobs.put("a", one).await.unwrap();
    assert_eq!(last().await, before);

    // A chunk more than there should be; then one less.
    let first = stream.get_raw_message(1).await.unwrap();
    client.request(first.subject.clone(), Bytes::from_static(b"x")).await.unwrap();
    let error = blobs.get("a").await.unwrap_err();
    assert!(error.to_string().contains("digest"), "{error}");
    for sequence in [before + 1, 2] {
        assert!(stream.delete_message(sequence).await.unwrap());
    }
    let error = blobs.get("a").await.unwrap_err();
    assert!(error.to_string().contains("digest"), "{error}");
    // Written anew it is whole.
    let two = bytes(900_000, 2);
    blobs.put("a", two.clone()).await.unwrap();
    assert!(blobs.get("a").await.unwrap() == Some(two));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_is_killed_and_the_store_goes_on() {
    let mut cluster = Cluster::start(3);
    let blobs = NatsBlobs::connect(&settings(cluster.url()), 3).await.unwrap();
    let one = bytes(3 << 20, 1);
    blobs.put("a", one.clone()).await.unwrap();
    let leader = cluster.leader(STREAM);
    cluster.server(leader).kill();
    let two = bytes(3 << 20, 2);
    // An error says what it was; it is for the caller to try again.
    while blobs.put("b", two.clone()).await.is_err() {}
    let got = async |name: &str| loop {
        if let Ok(found) = blobs.get(name).await {
            break found;
        }
    };
    assert!(got("a").await == Some(one));
    assert!(got("b").await == Some(two));
}
