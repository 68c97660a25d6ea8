//! The edges of meterr: logs, checkpoints, wire formats, HTTP. Small traits, one implementation
//! per module; third-party types stay inside their module.

pub mod api;
pub mod checkpoint;
pub mod http;
pub mod log;
