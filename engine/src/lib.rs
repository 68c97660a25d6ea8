//! engine

pub mod workload;
