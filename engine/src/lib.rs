//! Actors, workers, recovery and the command line of meterr.

pub mod actors;
pub mod cli;
pub mod commands;
pub mod config;
pub mod control_state;
pub mod demo;
pub mod epoch;
pub mod lifecycle;
pub mod live;
pub mod metrics;
pub mod node;
pub mod quantity;
pub mod recovery;
pub mod serve;
pub mod service;
pub mod settings;
pub mod shutdown;
pub mod snapshot;
pub mod telemetry;
pub mod verify;
pub mod views;
pub mod wire;
pub mod worker;
pub mod workload;
