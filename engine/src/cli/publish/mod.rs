//! `meterr publish`: sends a file of events, or a pipe, over HTTP or to the usage streams of JetStream.

mod groups;
mod http;
mod lines;
mod nats;
mod totals;

use super::args::PublishArgs;
use super::{Console, Exit};

/// Said whenever something may be missing.
const NOT_EVERY_LINE: &str = "not every line was sent; it is safe to publish the whole file again";

/// `meterr publish`
pub(super) fn publish(args: &PublishArgs, console: &mut Console) -> anyhow::Result<Exit> {
    match args.nats.settings() {
        Some(server) => nats::publish(args, &server, console),
        None => http::publish(args, console),
    }
}
