//! The real binary from outside: what its README, its help and its API promise, over processes,
//! sockets and signals. One file a group of promises.

#![allow(clippy::unwrap_used)]

mod commands;
mod dead_letters;
mod lifecycle;
mod reading;
mod readme;
mod settings;
mod streams;
#[path = "../support/mod.rs"]
mod support;
mod workload;

use std::path::Path;

use support::Launch;

/// A server with few shards, which start faster.
pub fn launch(dir: &Path) -> Launch {
    Launch::on(dir).set("NODE__SHARDS", "4").set("NODE__WORKERS", "2")
}

/// An event of gpt-4o-mini with a million input tokens, which cost 0.15 USD.
pub fn line(id: &str, org: &str, user: &str, time: &str) -> String {
    line_of(id, org, user, time, "gpt-4o-mini")
}

/// The same of another model.
pub fn line_of(id: &str, org: &str, user: &str, time: &str, model: &str) -> String {
    format!(
        "{{\"id\":\"{id}\",\"time\":\"{time}\",\"org\":\"{org}\",\"user\":\"{user}\",\
         \"provider\":\"openai\",\"model\":\"{model}\",\"feature\":\"chat\",\
         \"input_tokens\":1000000,\"output_tokens\":0}}\n"
    )
}
