//! The promise over NATS: every acknowledged event is in the views, once, whoever is killed or frozen.
//!
//! Publishers send to NATS with the plain client all the trouble the promise names, an administrator
//! changes prices and time zones over HTTP, and in random order the engine is killed (`kill -9`), the
//! server is killed, both are, also while the engine starts, the server is frozen for a moment, and the
//! engine is frozen until another one, with a data directory of its own, has taken its shards over; when
//! it thaws, its commits must be refused and its shards stop. Directories are used in turns, so
//! checkpoints are also old.
//!
//! Watchers follow `spend.<org>` on one connection through all of it, some with the plain client, some
//! with our subscriber type: they must have seen every commit of their org once and in order, as the
//! output logs have them. A durable reader of each output log
//! believes parts only by their commit, and checks tokens, epochs, positions and hashes. In the end all
//! views are compared with the model, which knows only what was acknowledged, everything is sent once
//! more, which must change nothing, and `meterr verify` must agree.
//!
//! `METERR_CRASH_ROUNDS` sets the rounds (50 by default; thousands are fine), `METERR_CRASH_SEED`
//! repeats what was sent and done, as far as the machine repeats itself.

#![allow(clippy::unwrap_used)]

#[path = "../crash/administrator.rs"]
mod administrator;
mod company;
mod follower;
#[path = "../crash/model.rs"]
mod model;
#[path = "../support/nats.rs"]
mod nats;
mod publisher;
mod reader;
mod rounds;
mod seen;
#[path = "../crash/stage.rs"]
mod stage;
#[path = "../support/mod.rs"]
mod support;
mod table;
#[path = "../crash/trouble.rs"]
mod trouble;
mod watcher;

use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use meterr_operators::rng::Rng;
use support::number_from_env;

use company::{Company, connect};
use nats::{NatsOptions, NatsServer};
use publisher::Sent;
use rounds::Rounds;
use stage::Stage;

/// Shards of the deployment. Each has at least one of the orgs.
const SHARDS: u16 = 4;

#[test]
fn every_acknowledged_event_counts_once_whoever_dies() {
    let rounds = number_from_env("METERR_CRASH_ROUNDS", 50);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let seed = number_from_env("METERR_CRASH_SEED", now.as_millis() as u64);
    println!("METERR_CRASH_SEED={seed} METERR_CRASH_ROUNDS={rounds}");
    let mut rng = Rng::stream(seed, 1_000);
    let mut options = NatsOptions::new().mapping(SHARDS);
    if rng.percent(50) {
        options = options.sync_always();
    }
    let server = NatsServer::start(options);
    let url = server.url();
    let stage = Arc::new(Stage::default());
    let sent = Arc::new(Mutex::new(Sent::default()));
    let mut rounds = Rounds::new(server, rng, stage.clone(), sent.clone(), rounds);
    // The first engine creates the streams.
    rounds.begin();

    let company = Company::begin(&url, seed, &stage, &sent);
    rounds.run();
    let engine = rounds.end();
    let counted = company.finish(&[&engine], 20 * rounds.number, &rounds.told());
    engine.stop();
    let report = rounds.verified();
    assert_eq!(report["events"], counted, "{report}");
}

/// Position of the last change of prices or zones.
fn control_position(engine: &support::Server) -> String {
    let prices = engine.get("/v1/prices?model=none").expect(200);
    prices["as_of"].as_str().unwrap().to_owned()
}
