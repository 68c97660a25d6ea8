//! What a reader of an org's live changes lacks, and the ids it resumes by.

use bytes::Bytes;
use meterr_operators::ids::ShardId;

use super::Desk;
use super::parameters::Parameters;
use super::problem::{Kind, Problem};
use crate::api::StreamId;

/// Parameters of [`Desk::catch_up`].
pub(crate) const CATCH_UP: &[&str] = &["after"];
/// What an id to resume by looks like.
pub(crate) const STREAM_ID_FORM: &str = "<shard>-<epoch>, such as 3-1042";

impl Desk {
    /// The messages of an answer, in order, at least one.
    pub async fn catch_up(
        &self,
        org: String,
        parameters: &Parameters,
    ) -> Result<Vec<Bytes>, Problem> {
        let after = match parameters.text("after") {
            None => None,
            Some(text) => Some(
                stream_id(text).ok_or_else(|| Problem::parameter("after", text, STREAM_ID_FORM))?,
            ),
        };
        let messages = self.plain(self.api.catch_up(org, after)).await?;
        match messages.is_empty() {
            true => Err(Problem::new(Kind::Internal, "the engine gave an answer without messages")),
            false => Ok(messages),
        }
    }
}

/// Reads `<shard>-<epoch>`.
pub(crate) fn stream_id(text: &str) -> Option<StreamId> {
    let (shard, epoch) = text.split_once('-')?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if !digits(shard) || !digits(epoch) {
        return None;
    }
    Some(StreamId { shard: ShardId(shard.parse().ok()?), epoch: epoch.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_two_numbers() {
        assert_eq!(stream_id("3-1042"), Some(StreamId { shard: ShardId(3), epoch: 1042 }));
        for wrong in ["", "3", "-", "3-", "-1", "+3-1", "3--1", "65536-1", "3-18446744073709551616"]
        {
            assert_eq!(stream_id(wrong), None, "{wrong:?}");
        }
    }
}
