//! Whether the server maps `usage.<org>` to `usage.<shard>.<org>`, and by the right number of shards.
//!
//! The test publishes to subjects of names that no org can have and listens where they come out. The
//! messages ask to be stored in a stream that does not exist, so no stream takes them.

use std::time::Duration;

use async_nats::{Client, HeaderMap};
use futures::StreamExt;
use meterr_operators::ids::{ShardId, shard_of};
use tokio::time::{Instant, timeout_at};

/// Names tried. With the wrong number of shards some of them come out elsewhere.
const PROBES: usize = 16;
/// Time for all of them.
const ANSWER: Duration = Duration::from_secs(2);

/// What the server does with `usage.<org>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mapping {
    /// It comes out in its shard.
    Right,
    /// It comes out nowhere: producers must publish `usage.<shard>.<org>` themselves.
    Missing,
    /// It comes out in another shard.
    Wrong {
        /// A name.
        name: String,
        /// Its shard.
        expected: ShardId,
        /// Where it came out.
        found: String,
    },
}

/// The lines that make the mapping, for the server's configuration.
pub fn fix(shards: u16) -> String {
    format!(
        "mappings = {{ \"usage.*\": \"usage.{{{{partition({shards},1)}}}}.{{{{wildcard(1)}}}}\" }}"
    )
}

/// Tries it.
///
/// # Errors
/// When the connection does not let us publish and listen.
pub async fn probe(
    client: &Client,
    shards: u16,
    nonce: &str,
) -> Result<Mapping, async_nats::Error> {
    let names: Vec<String> = (0..PROBES).map(|n| format!("@probe-{nonce}-{n}")).collect();
    let mut came_out = Vec::with_capacity(PROBES);
    for name in &names {
        came_out.push(client.subscribe(format!("usage.*.{name}")).await?);
    }
    let mut headers = HeaderMap::new();
    headers.insert(async_nats::header::NATS_EXPECTED_STREAM, "meterr-probe-is-not-stored");
    for name in &names {
        client
            .publish_with_headers(format!("usage.{name}"), headers.clone(), Default::default())
            .await?;
    }
    client.flush().await?;
    let until = Instant::now() + ANSWER;
    let mut result = Mapping::Missing;
    for (name, answers) in names.iter().zip(&mut came_out) {
        let expected = shard_of(name, shards);
        let Ok(Some(message)) = timeout_at(until, answers.next()).await else {
            return Ok(result);
        };
        let found = message.subject.split('.').nth(1).unwrap_or_default().to_owned();
        if found != expected.to_string() {
            return Ok(Mapping::Wrong { name: name.clone(), expected, found });
        }
        result = Mapping::Right;
    }
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fix_is_a_line_of_the_servers_configuration() {
        assert_eq!(
            fix(16),
            r#"mappings = { "usage.*": "usage.{{partition(16,1)}}.{{wildcard(1)}}" }"#
        );
    }
}
