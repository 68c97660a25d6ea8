//! Actors, workers, recovery and the command line of meterr.

pub mod config;
pub mod epoch;
pub mod live;
pub mod metrics;
pub mod quantity;
pub mod recovery;
pub mod settings;
pub mod shutdown;
pub mod snapshot;
pub mod telemetry;
pub mod views;
pub mod wire;
pub mod worker;
pub mod workload;
