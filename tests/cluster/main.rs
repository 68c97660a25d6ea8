//! The promise on many nodes: every acknowledged event is in the views, once, whoever is killed, frozen,
//! cut off or moved, on three servers with three replicas of everything.
//!
//! Three to four nodes share the shards. Publishers send to NATS with the plain client all the trouble
//! the promise names, an administrator changes prices and time zones over HTTP of any node, and in random
//! order nodes are killed (`kill -9`; some come back without their directory or with a damaged one), frozen
//! or cut off until others have taken their shards, slowed down, stopped in order, added and taken away,
//! shards are moved and nodes drained by an operator, and servers are killed or frozen, all at once too.
//!
//! Watchers follow `spend.<org>` on one connection through all of it, some with the plain client, some
//! with our subscriber type: they must have seen every commit of their org once and in order, as the
//! output logs have them. A durable reader of each output log believes parts only by their commit, and
//! checks tokens, epochs, positions and hashes: no epoch twice, none missing, no commit of an owner that
//! was taken over. In the end all views of every node are compared with the model, which knows only what
//! was acknowledged, everything is sent once more, which must change nothing, and `meterr verify` must
//! agree.
//!
//! `METERR_CLUSTER_ROUNDS` sets the rounds (8 by default; thousands are fine), `METERR_CLUSTER_SEED`
//! repeats what was sent and done, as far as the machine repeats itself.

#![allow(clippy::unwrap_used)]

#[path = "../crash/administrator.rs"]
mod administrator;
#[path = "../nats_crash/follower.rs"]
mod follower;
#[path = "../crash/model.rs"]
mod model;
#[path = "../support/nats.rs"]
mod nats;
mod nodes;
mod proxy;
#[path = "../nats_crash/publisher.rs"]
mod publisher;
#[path = "../nats_crash/reader.rs"]
mod reader;
mod rounds;
#[path = "../nats_crash/seen.rs"]
mod seen;
#[path = "../crash/stage.rs"]
mod stage;
#[path = "../support/mod.rs"]
mod support;
#[path = "../nats_crash/table.rs"]
mod table;
#[path = "../crash/trouble.rs"]
mod trouble;
#[path = "../nats_crash/watcher.rs"]
mod watcher;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use meterr_operators::ids::shard_of;
use meterr_operators::rng::Rng;
use support::number_from_env;

use follower::Goals;
use model::ORGS;
use nats::{Cluster, NatsOptions};
use publisher::Sent;
use rounds::{Rounds, SERVERS};
use stage::Stage;

/// Shards of the deployment.
const SHARDS: u16 = 6;

/// A plain client that waits for the server and comes back by itself.
async fn connect(url: &str) -> async_nats::Client {
    let addresses: Vec<async_nats::ServerAddr> =
        url.split(',').map(|address| address.parse().unwrap()).collect();
    async_nats::ConnectOptions::new()
        .retry_on_initial_connect()
        .reconnect_delay_callback(|_| Duration::from_millis(10))
        .request_timeout(Some(Duration::from_secs(1)))
        .connect(addresses)
        .await
        .unwrap()
}

/// Runs on a thread and a runtime of its own.
fn task<T: Send + 'static, F: Future<Output = T>>(
    work: impl FnOnce() -> F + Send + 'static,
) -> JoinHandle<T> {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(work())
    })
}

#[test]
fn every_acknowledged_event_counts_once_whoever_dies() {
    let rounds = number_from_env("METERR_CLUSTER_ROUNDS", 8);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let seed = number_from_env("METERR_CLUSTER_SEED", now.as_millis() as u64);
    println!("METERR_CLUSTER_SEED={seed} METERR_CLUSTER_ROUNDS={rounds}");
    let rng = Rng::stream(seed, 1_000);
    let servers = Cluster::start_with(SERVERS, &NatsOptions::new().mapping(SHARDS));
    let url = servers.url();
    let stage = Arc::new(Stage::default());
    let sent = Arc::new(Mutex::new(Sent::default()));
    let mut rounds = Rounds::new(servers, rng, stage.clone(), sent.clone(), rounds);
    // The first nodes create the streams.
    rounds.begin();

    let publishers: Vec<_> = (0..3)
        .map(|n| {
            let (url, stage, sent) = (url.clone(), stage.clone(), sent.clone());
            task(move || async move { publisher::publish(n, seed, &url, &stage, &sent).await })
        })
        .collect();
    let changes = Arc::new(Mutex::new(model::Model::default()));
    let administrator = {
        let (stage, changes) = (stage.clone(), changes.clone());
        std::thread::spawn(move || administrator::administer(seed, &stage, &changes))
    };
    let watchers: Vec<_> = ORGS
        .iter()
        .map(|org| {
            let (url, stage) = (url.clone(), stage.clone());
            task(move || async move { watcher::watch(org, &url, &stage).await })
        })
        .collect();
    let goals = Arc::new(Goals::default());
    let followers: Vec<_> = ORGS
        .iter()
        .map(|org| {
            let (url, goals) = (url.clone(), goals.clone());
            task(move || async move { follower::follow(org, &url, &goals).await })
        })
        .collect();
    let readers: Vec<_> = (0..SHARDS)
        .map(|shard| {
            let (url, stage) = (url.clone(), stage.clone());
            task(move || async move { reader::read(shard, &url, &stage).await })
        })
        .collect();

    rounds.run();
    stage.closing.store(true, Ordering::SeqCst);
    publishers.into_iter().for_each(|publisher| publisher.join().unwrap());
    let changed = administrator.join().unwrap();
    let changes = Arc::into_inner(changes).unwrap().into_inner().unwrap();
    let (model, position, lines) = {
        let mut sent = sent.lock().unwrap();
        sent.model.prices = changes.prices;
        sent.model.zones = changes.zones;
        println!(
            "{} lines, {} messages sent again, {} of them known to the server, {changed} changes of \
             prices and zones; {}",
            sent.lines,
            sent.repeated,
            sent.known,
            rounds.told()
        );
        (std::mem::take(&mut sent.model), sent.position(), sent.lines)
    };
    assert!(lines > 20 * rounds.number && changed > 0, "too little happened: {lines} lines");
    let nodes = rounds.end();
    let engine = |n: usize| nodes[n].server.as_ref().unwrap();
    let position = format!("{position},{}", control_position(engine(0)));
    for n in 0..nodes.len() {
        model.check(engine(n), &position);
    }

    // Everything once more: nothing may change.
    let again = Arc::new(Mutex::new(Sent::default()));
    let everything: Vec<_> =
        model.events.iter().map(|((_, id), version)| (id.clone(), version.clone())).collect();
    {
        let (url, again) = (url.clone(), again.clone());
        task(move || async move { publisher::repeat(&url, &everything, &again).await })
            .join()
            .unwrap();
    }
    let position = again.lock().unwrap().position();
    for n in 0..nodes.len() {
        model.check(engine(n), &position);
    }

    stage.over.store(true, Ordering::SeqCst);
    let believed: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
    let last = |(org, epochs): (&String, &Vec<u64>)| (org.clone(), *epochs.last().unwrap());
    let all = believed.iter().flat_map(|believed| &believed.epochs).map(last).collect();
    *goals.lock().unwrap() = Some(all);
    for ((watcher, follower), org) in watchers.into_iter().zip(followers).zip(ORGS) {
        let (watcher, follower) = (watcher.join().unwrap(), follower.join().unwrap());
        let of = url.clone();
        let snapshot = task(move || async move { watcher::snapshot(&of, org).await });
        let snapshot = snapshot.join().unwrap();
        let believed = &believed[usize::from(shard_of(org, SHARDS).0)];
        println!(
            "{org}: {} changes, {} of them live, {} questions; its shard: {} commits, {} take-overs, {} \
             parts without a commit",
            watcher.seen.epochs.len(),
            watcher.live,
            watcher.asked,
            believed.commits,
            believed.seals,
            believed.disbelieved
        );
        watcher.seen.check("watcher", &snapshot, believed);
        follower.check("follower", &snapshot, believed);
        assert!(watcher.live > 0 && watcher.asked > 0, "{org}: one way was never used");
    }
    let report = rounds.verified();
    assert_eq!(report["events"], model.events_counted(), "{report}");
}

/// Position of the last change of prices or zones.
fn control_position(engine: &support::Server) -> String {
    let prices = engine.get("/v1/prices?model=none").expect(200);
    prices["as_of"].as_str().unwrap().to_owned()
}
