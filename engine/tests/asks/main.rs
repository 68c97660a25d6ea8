//! Questions about shards that are on other nodes: two services over the same logs, a fake of the
//! questions between nodes, and faults on the way.

#![allow(clippy::unwrap_used)]

mod forwarding;
mod nodes;
mod streams;
