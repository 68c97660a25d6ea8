//! NATS JetStream as log, and core NATS for everything live.
//!
//! | file | what |
//! |---|---|
//! | [`connection`] | settings, TLS and credentials; a connection that comes back |
//! | [`subjects`] | names of streams and subjects, one place for all of them |
//! | [`streams`] | how streams must be set, and what is wrong with one that is not |
//! | [`log`] | a stream as [`Log`](crate::log::Log); `tail` follows it, `record` translates |
//! | [`announce`] | live changes after each commit |
//! | [`service`] | questions, answered as a micro-service; [`endpoints`] is their table |
//! | [`asyncapi`] | the document that describes all subjects |
//! | [`mapping`] | whether the server brings `usage.<org>` into the right shard |
//!
//! Types of the client library stay in here.

pub mod announce;
pub mod asyncapi;
pub mod connection;
pub mod endpoints;
pub mod log;
pub mod mapping;
mod read;
mod record;
pub mod service;
pub mod streams;
pub mod subjects;
mod tail;
#[cfg(test)]
mod tests;
mod write;
