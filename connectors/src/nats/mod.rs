//! NATS JetStream as log, and core NATS for everything live.
//!
//! | file | what |
//! |---|---|
//! | [`connection`] | settings, TLS and credentials; a connection that comes back |
//! | [`subjects`] | names of streams and subjects, one place for all of them |
//!
//! Types of the client library stay in here.

pub mod connection;
pub mod subjects;
