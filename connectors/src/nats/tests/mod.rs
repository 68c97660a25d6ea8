//! Tests of the NATS surface against a real server.

mod asyncapi;
#[path = "../../../../tests/support/nats.rs"]
pub(super) mod server;
mod service;
mod wire;
