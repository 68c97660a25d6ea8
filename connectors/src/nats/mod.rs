//! NATS JetStream as log, and core NATS for everything live.
//!
//! | file | what |
//! |---|---|
//! | [`connection`] | settings, TLS and credentials; a connection that comes back |
//! | [`subjects`] | names of streams and subjects, one place for all of them |
//! | [`streams`] | how streams must be set, and what is wrong with one that is not |
//! | [`log`] | a stream as [`Log`](crate::log::Log); `tail` follows it, `record` translates |
//! | [`announce`] | live changes after each commit |
//! | [`mapping`] | whether the server brings `usage.<org>` into the right shard |
//!
//! Types of the client library stay in here.

pub mod announce;
pub mod connection;
pub mod log;
pub mod mapping;
mod read;
mod record;
pub mod streams;
pub mod subjects;
mod tail;
mod write;
