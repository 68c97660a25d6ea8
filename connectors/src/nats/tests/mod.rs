//! Tests of the NATS surface against a real server.

mod asyncapi;
mod blobs;
mod questions;
#[path = "../../../../tests/support/nats.rs"]
pub(super) mod server;
mod service;
mod wire;
