//! Actors, workers, recovery and the command line of meterr.

pub mod cli;
pub mod config;
pub mod metrics;
pub mod quantity;
pub mod settings;
pub mod shutdown;
pub mod telemetry;
