//! Tests of the NATS surface against a real server.

#[path = "../../../../tests/support/nats.rs"]
pub(super) mod server;
mod service;
