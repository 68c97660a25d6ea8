//! NATS JetStream as log, and core NATS for everything live.
//!
//! | file | what |
//! |---|---|
//! | [`connection`] | settings, TLS and credentials; a connection that comes back |
//! | [`subjects`] | names of streams and subjects, one place for all of them |
//! | [`streams`] | how streams must be set, and what is wrong with one that is not |
//! | [`log`] | a stream as [`Log`](crate::log::Log); `tail` follows it, `record` translates |
//! | [`announce`] | live changes after each commit |
//! | [`import`] | an account as a place to copy logs from and to |
//! | [`follow`] | the reader's side of the live protocol, pure; [`subscriber`] does what it says, `asking` asks |
//! | [`service`] | questions, answered as a micro-service; [`endpoints`] is their table |
//! | [`asyncapi`] | the document that describes all subjects |
//! | [`mapping`] | whether the server brings `usage.<org>` into the right shard |
//! | [`registry`] | a bucket as [`Registry`](crate::cluster::Registry); `bucket` says how it must be set |
//! | [`peers`] | questions from node to node; `pieces` cuts and joins their answers |
//! | [`blobs`] | an object store as [`Blobs`](crate::blobs::Blobs) |
//! | [`region`] | a second region's mirrors, and their promotion; `renewal` takes new credentials up |
//! | [`producer`] | messages to usage streams, repeated until they are acknowledged |
//!
//! Types of the client library stay in here.

pub mod announce;
mod asking;
pub mod asyncapi;
pub mod blobs;
mod bucket;
pub mod connection;
pub mod endpoints;
pub mod follow;
pub mod import;
pub mod log;
pub mod mapping;
pub mod peers;
mod pieces;
mod places;
pub mod producer;
mod read;
mod record;
pub mod region;
pub mod registry;
mod registry_entry;
mod registry_read;
mod renewal;
pub mod service;
pub mod streams;
pub mod subjects;
pub mod subscriber;
mod tail;
#[cfg(test)]
mod tests;
mod write;
