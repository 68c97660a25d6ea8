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
#[path = "../nats_crash/company.rs"]
mod company;
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

use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use meterr_operators::rng::Rng;
use support::number_from_env;

use company::{Company, connect};
use nats::{Cluster, NatsOptions};
use publisher::Sent;
use rounds::{Rounds, SERVERS};
use stage::Stage;

/// Shards of the deployment.
const SHARDS: u16 = 6;

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

    let company = Company::begin(&url, seed, &stage, &sent);
    rounds.run();
    let (least, told) = (20 * rounds.number, rounds.told());
    let counted = company.finish(&rounds.end(), least, &told);
    let report = rounds.verified();
    assert_eq!(report["events"], counted, "{report}");
}

/// Position of the last change of prices or zones.
fn control_position(engine: &support::Server) -> String {
    let prices = engine.get("/v1/prices?model=none").expect(200);
    prices["as_of"].as_str().unwrap().to_owned()
}
