//! Actors, workers, recovery and the command line of meterr: what turns the pure shard of
//! `meterr_operators` and the edges of `meterr_connectors` into a server.
//!
//! A batch travels [`service`] (publish) → usage log → reader of [`actors`] → [`worker`] → [`live`]
//! (an epoch: control changes, then usage) → output log, as [`wire`] writes it → committed: queries
//! ([`views`]), followers, checkpoint ([`snapshot`]).
//!
//! Decisions are pure functions ([`epoch`], [`lifecycle`], [`recovery`]), so that they can be tested
//! without threads and disks; what executes them holds no rules. No pricing or aggregation happens in
//! this crate.
//!
//! Reading order: [`node`] and [`serve`] (start and stop), [`worker`], [`live`], [`recovery`],
//! [`service`]; then [`cli`] and what its commands need ([`config`] and [`settings`], [`demo`],
//! [`mod@verify`], [`copy`], [`backup`], [`workload`]).

pub mod actors;
pub mod announce;
pub mod answering;
pub mod asking;
pub mod backup;
pub mod catch_up;
pub mod cli;
pub mod cluster;
pub mod commands;
pub mod config;
pub mod control_state;
pub mod copy;
pub mod dead_letters;
pub mod demo;
pub mod epoch;
pub mod following;
pub mod lifecycle;
pub mod live;
pub mod metrics;
pub mod nats;
pub mod node;
pub mod ownership;
pub mod quantity;
pub mod questions;
pub mod readers;
pub mod records;
pub mod recovery;
pub mod region;
pub mod serve;
pub mod service;
pub mod settings;
pub mod shutdown;
pub mod snapshot;
pub mod status;
pub mod steering;
pub mod tails;
pub mod telemetry;
pub mod verify;
pub mod views;
pub mod wire;
pub mod worker;
pub mod workload;
