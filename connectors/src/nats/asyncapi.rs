//! The AsyncAPI 3.0 document of everything on NATS, compiled in. Tests hold it against the table of
//! questions, the subjects, the golden messages of `config/wire` and the OpenAPI document.

/// The document, as served at `GET /asyncapi.json`.
pub const DOCUMENT: &str = include_str!("../../../config/asyncapi.json");
