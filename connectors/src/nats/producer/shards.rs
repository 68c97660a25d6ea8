//! How many shards a deployment has, by its streams.

use std::time::Duration;

use async_nats::jetstream::Context;
use meterr_operators::ids::{SHARDS_MAX, ShardId};
use serde::{Deserialize, Serialize};

use super::decision::short;
use crate::nats::subjects;

/// Pages of names read: more streams than that take `usage.>` in no deployment of ours.
const PAGES_MAX: usize = 16;
/// Time for the answer to each question.
const ANSWER: Duration = Duration::from_secs(5);

/// Why the number of shards is not known.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShardsError {
    /// There is no deployment on this server.
    #[error(
        "no USAGE streams on this server: start `meterr serve --nats URL` once, which creates them, \
         and check that this is the right server and account"
    )]
    None,
    /// Streams are missing between others.
    #[error(
        "stream {missing} is not there, although {highest} is; start `meterr serve`, which creates it"
    )]
    Gap {
        /// The first that is missing.
        missing: String,
        /// The one with the highest number.
        highest: String,
    },
    /// The server does not say.
    #[error(
        "the server does not list its streams: {0}; this user must be allowed to publish to \
         \"$JS.API.STREAM.NAMES\""
    )]
    Unknown(String),
}

/// Number of shards of the deployment on this server: its streams `USAGE_0`, `USAGE_1`, …
///
/// # Errors
/// When there are none, some are missing, or the server does not say.
pub async fn shards_of(context: &Context) -> Result<u16, ShardsError> {
    count(&usage_shards(context).await.map_err(ShardsError::Unknown)?)
}

/// Shards whose usage streams are there, ascending.
pub(super) async fn usage_shards(context: &Context) -> Result<Vec<ShardId>, String> {
    #[derive(Serialize)]
    struct Request {
        subject: &'static str,
        offset: usize,
    }
    #[derive(Deserialize)]
    struct Page {
        #[serde(default)]
        total: usize,
        streams: Option<Vec<String>>,
        error: Option<ApiError>,
    }
    #[derive(Deserialize)]
    struct ApiError {
        #[serde(default)]
        description: String,
    }
    let mut shards = Vec::new();
    let mut offset = 0;
    for _ in 0..PAGES_MAX {
        let request = Request { subject: "usage.>", offset };
        let asking = context.request("STREAM.NAMES", &request);
        let page: Page = match tokio::time::timeout(ANSWER, asking).await {
            Ok(answer) => answer.map_err(|error| short(&error.to_string()))?,
            Err(_) => return Err(format!("no answer within {ANSWER:?}")),
        };
        if let Some(ApiError { description }) = page.error {
            return Err(short(&description));
        }
        let names = page.streams.unwrap_or_default();
        offset += names.len();
        shards.extend(names.iter().filter_map(|name| shard(name)));
        if names.is_empty() || offset >= page.total {
            break;
        }
    }
    shards.sort_unstable();
    shards.dedup();
    Ok(shards)
}

/// The shard whose usage stream has this name.
fn shard(name: &str) -> Option<ShardId> {
    let number: u16 = name.strip_prefix("USAGE_")?.parse().ok()?;
    let shard = ShardId(number);
    // No `USAGE_07`.
    (number < SHARDS_MAX && subjects::usage_stream(shard) == name).then_some(shard)
}

fn count(shards: &[ShardId]) -> Result<u16, ShardsError> {
    let Some(highest) = shards.last() else { return Err(ShardsError::None) };
    match (0..).map(ShardId).zip(shards).find(|(expected, found)| expected != *found) {
        Some((missing, _)) => Err(ShardsError::Gap {
            missing: subjects::usage_stream(missing),
            highest: subjects::usage_stream(*highest),
        }),
        None => Ok(highest.0 + 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_as_they_are_made() {
        for shard_id in [0, 7, 255] {
            assert_eq!(shard(&format!("USAGE_{shard_id}")), Some(ShardId(shard_id)));
        }
        for other in ["USAGE_07", "USAGE_", "USAGE_256", "USAGE_-1", "USAGE_+1", "usage_1", "OUT_1"]
        {
            assert_eq!(shard(other), None, "{other}");
        }
    }

    #[test]
    fn shards_are_counted_when_none_is_missing() {
        let of = |numbers: &[u16]| count(&numbers.iter().copied().map(ShardId).collect::<Vec<_>>());
        assert_eq!(of(&[0]), Ok(1));
        assert_eq!(of(&(0..256).collect::<Vec<_>>()), Ok(256));
        assert_eq!(of(&[]), Err(ShardsError::None));
        let gap = |missing: &str, highest: &str| {
            Err(ShardsError::Gap { missing: missing.to_owned(), highest: highest.to_owned() })
        };
        assert_eq!(of(&[0, 1, 3]), gap("USAGE_2", "USAGE_3"));
        assert_eq!(of(&[1]), gap("USAGE_0", "USAGE_1"));
    }
}
