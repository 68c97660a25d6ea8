//! The OpenAPI 3.1 document of this surface, compiled in. Tests hold it against the table of routes,
//! the kinds of problems and our own types.

/// The document, as served at `GET /openapi.json`.
pub const DOCUMENT: &str = include_str!("openapi.json");
