//! What the benches share: the workload, the program they compare with, and how to measure.
//!
//! `tests/bench_checks.rs` includes this module too and runs each bench's check on a small workload,
//! so that no bench can rot unseen.

#![allow(dead_code, reason = "every bench uses a part of it")]

pub mod floor;
pub mod http;
pub mod ingest;
pub mod latency;
pub mod measure;
pub mod nats;
pub mod nats_latency;
pub mod nats_queries;
#[path = "../../tests/support/nats.rs"]
pub mod nats_server;
pub mod operators;
pub mod server;
pub mod spend1;
