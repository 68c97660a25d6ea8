//! The edges of meterr: logs, checkpoints, wire formats, HTTP. Small traits, one implementation
//! per module; third-party types stay inside their module.

pub mod api;
pub mod backup;
pub mod blob_checkpoints;
pub mod blobs;
pub mod changes;
pub mod checkpoint;
pub mod checkpoint_file;
pub mod checkpoint_memory;
pub mod checkpoint_record;
#[cfg(test)]
mod checkpoint_testing;
pub mod cluster;
pub mod cluster_memory;
pub mod codec;
pub mod copy;
pub mod embedded;
#[cfg(test)]
mod fake;
pub mod frame;
pub mod http;
pub mod layered_checkpoints;
pub mod log;
pub mod memory;
pub mod nats;
pub mod org_state;
pub mod price_import;
pub mod requests;
#[cfg(test)]
mod schema;
pub mod sled;
