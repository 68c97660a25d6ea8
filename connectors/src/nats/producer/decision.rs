//! What a producer does about a failure. Pure.

use std::time::Duration;

use serde::Deserialize;

use crate::nats::subjects;
use meterr_operators::ids::ShardId;

/// Wait before the first repetition; doubles with each further one.
const BACK_OFF_FIRST: Duration = Duration::from_millis(50);
/// Longest wait between attempts.
const BACK_OFF_MAX: Duration = Duration::from_secs(2);
/// Longest wait for an acknowledgement, reached by doubling.
const ACK_WAIT_MAX: Duration = Duration::from_secs(30);
/// Bytes of a server's sentence that are kept.
const SENTENCE_MAX: usize = 300;

/// Why an attempt to send a message did not end in an acknowledgement.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// Nobody answered in time.
    #[error("no acknowledgement in time")]
    Silent,
    /// The connection went away while the answer was awaited.
    #[error("the connection was lost before the acknowledgement came")]
    Lost,
    /// There is no connection, so nothing was sent.
    #[error("there is no connection to the server")]
    Away,
    /// No stream takes the subject at the moment: none is there, or it has no leader.
    #[error("no stream takes the subject at the moment")]
    NoStream,
    /// The server refused it.
    #[error("the server refused it: {description} (code {code}, error {error})")]
    Refused {
        /// Status, as in HTTP.
        code: u64,
        /// JetStream's error code.
        error: u64,
        /// The server's words.
        description: String,
    },
    /// The answer is none that a stream gives.
    #[error("the answer is no acknowledgement: {0}")]
    Strange(String),
    /// The message is larger than the server takes.
    #[error("the message is larger than the server takes: {0}")]
    TooLarge(String),
    /// The user of this connection may not do it.
    #[error("not permitted: {0}")]
    Denied(String),
    /// The shard's stream is not there, although those of other shards are.
    #[error(
        "stream {0} is not there, although those of other shards are; start meterr serve, which creates it"
    )]
    Missing(String),
    /// The message cannot be sent at all.
    #[error("the message cannot be sent: {0}")]
    Unsendable(String),
}

/// What follows from a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhatNow {
    /// The message was not stored; it is sent again.
    Retry,
    /// It may have been stored; it is sent again under the same id, by which a stream tells.
    Ambiguous,
    /// Sending it again leads nowhere.
    GiveUp,
}

/// Error codes of JetStream, <https://github.com/nats-io/nats-server/blob/v2.14.0/server/errors.json>.
mod code {
    pub const ACCOUNT_RESOURCES_EXCEEDED: u64 = 10002;
    pub const JETSTREAM_NOT_ENABLED_FOR_ACCOUNT: u64 = 10039;
    pub const DUPLICATE_IN_PROCESS: u64 = 10158;
}

/// What to do about a failure.
pub fn what_now(failure: &Failure) -> WhatNow {
    match failure {
        Failure::Silent | Failure::Lost | Failure::Strange(_) => WhatNow::Ambiguous,
        Failure::Away | Failure::NoStream => WhatNow::Retry,
        Failure::TooLarge(_)
        | Failure::Denied(_)
        | Failure::Missing(_)
        | Failure::Unsendable(_) => WhatNow::GiveUp,
        Failure::Refused { code, error, .. } => match (*code, *error) {
            // A copy sent before is on its way into the stream.
            (_, code::DUPLICATE_IN_PROCESS) => WhatNow::Ambiguous,
            // Full, although its status blames the request.
            (_, code::ACCOUNT_RESOURCES_EXCEEDED) => WhatNow::Retry,
            (_, code::JETSTREAM_NOT_ENABLED_FOR_ACCOUNT) => WhatNow::GiveUp,
            // Busy: 408 and 429. Full, without a leader, or damaged: 5xx. That may pass.
            (408 | 429 | 500.., _) => WhatNow::Retry,
            // Another stream took it, it is too large, the stream is sealed.
            _ => WhatNow::GiveUp,
        },
    }
}

/// Wait after attempt `attempt` (from 1): doubling up to 2 s. `random` in `0..=1` spreads it over the
/// upper half, so that producers do not come back all at once.
pub fn back_off(attempt: u32, random: f64) -> Duration {
    let whole = BACK_OFF_FIRST * (1 << attempt.saturating_sub(1).min(10));
    whole.min(BACK_OFF_MAX).mul_f64(0.5 + random.clamp(0.0, 1.0) / 2.0)
}

/// How long an acknowledgement is awaited after so many silences: a slow server must not be given
/// ever more copies to read.
pub fn ack_wait(first: Duration, silences: u32) -> Duration {
    first.saturating_mul(1 << silences.min(10)).min(ACK_WAIT_MAX.max(first))
}

/// An acknowledgement: the message is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acked {
    /// The shard.
    pub shard: ShardId,
    /// Its position in the shard's log.
    pub position: u64,
    /// Whether an earlier attempt had stored it already.
    pub duplicate: bool,
}

/// Reads the answer of a stream.
///
/// # Errors
/// When it is no acknowledgement of the shard's stream.
pub fn read_answer(shard: ShardId, payload: &[u8]) -> Result<Acked, Failure> {
    #[derive(Deserialize)]
    struct Answer {
        stream: Option<String>,
        seq: Option<u64>,
        #[serde(default)]
        duplicate: bool,
        error: Option<ApiError>,
    }
    #[derive(Deserialize)]
    struct ApiError {
        #[serde(default)]
        code: u64,
        #[serde(default)]
        err_code: u64,
        #[serde(default)]
        description: String,
    }
    let strange = |what: &str| Err(Failure::Strange(short(what)));
    let answer: Answer = match serde_json::from_slice(payload) {
        Ok(answer) => answer,
        Err(error) => return strange(&error.to_string()),
    };
    if let Some(ApiError { code, err_code, description }) = answer.error {
        return Err(Failure::Refused { code, error: err_code, description: short(&description) });
    }
    match (answer.stream, answer.seq) {
        (Some(stream), Some(position))
            if position > 0 && stream == subjects::usage_stream(shard) =>
        {
            Ok(Acked { shard, position, duplicate: answer.duplicate })
        }
        (Some(stream), _) => strange(&format!("it comes from stream {stream:?}")),
        _ => strange("neither stream nor sequence"),
    }
}

/// The beginning of a text that came from outside.
pub(super) fn short(text: &str) -> String {
    let mut end = text.len().min(SENTENCE_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text[..end].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(code: u64, error: u64) -> Failure {
        Failure::Refused { code, error, description: String::new() }
    }

    #[test]
    fn what_may_pass_is_sent_again_and_what_stays_is_told() {
        let text = String::new;
        let table = [
            (Failure::Silent, WhatNow::Ambiguous),
            (Failure::Lost, WhatNow::Ambiguous),
            (Failure::Strange(text()), WhatNow::Ambiguous),
            (Failure::Away, WhatNow::Retry),
            (Failure::NoStream, WhatNow::Retry),
            (Failure::TooLarge(text()), WhatNow::GiveUp),
            (Failure::Denied(text()), WhatNow::GiveUp),
            (Failure::Missing(text()), WhatNow::GiveUp),
            (Failure::Unsendable(text()), WhatNow::GiveUp),
            // Duplicate in process.
            (refused(409, 10158), WhatNow::Ambiguous),
            (refused(503, 10158), WhatNow::Ambiguous),
            // Too many requests.
            (refused(429, 10167), WhatNow::Retry),
            // Insufficient resources, of the account, the server, the stream.
            (refused(400, 10002), WhatNow::Retry),
            (refused(503, 10023), WhatNow::Retry),
            (refused(500, 10047), WhatNow::Retry),
            (refused(503, 10077), WhatNow::Retry),
            // No leader, cluster not available.
            (refused(503, 10008), WhatNow::Retry),
            (refused(500, 10118), WhatNow::Retry),
            // Larger than the stream takes.
            (refused(400, 10054), WhatNow::GiveUp),
            (refused(400, 10097), WhatNow::GiveUp),
            // Another stream than expected; sealed; JetStream not for this account.
            (refused(400, 10060), WhatNow::GiveUp),
            (refused(400, 10109), WhatNow::GiveUp),
            (refused(503, 10039), WhatNow::GiveUp),
            // Codes to come.
            (refused(400, 99_999), WhatNow::GiveUp),
            (refused(500, 99_999), WhatNow::Retry),
            (refused(0, 0), WhatNow::GiveUp),
        ];
        for (failure, expected) in table {
            assert_eq!(what_now(&failure), expected, "{failure:?}");
        }
    }

    #[test]
    fn waits_double_and_end() {
        assert_eq!(back_off(1, 1.0), BACK_OFF_FIRST);
        for attempt in 1..50 {
            for random in [-1.0, 0.0, 0.5, 1.0, 2.0] {
                let wait = back_off(attempt, random);
                let whole = BACK_OFF_FIRST * (1 << (attempt - 1).min(10));
                let whole = whole.min(BACK_OFF_MAX);
                assert!(whole / 2 <= wait && wait <= whole, "{attempt} {random}: {wait:?}");
            }
        }
        let first = Duration::from_secs(5);
        let waits: Vec<u64> = (0..5).map(|n| ack_wait(first, n).as_secs()).collect();
        assert_eq!(waits, [5, 10, 20, 30, 30]);
        assert_eq!(ack_wait(Duration::from_secs(60), 9).as_secs(), 60);
    }

    #[test]
    fn an_acknowledgement_names_the_stream_and_a_sequence() {
        let of = |text: &str| read_answer(ShardId(3), text.as_bytes());
        let acked = |duplicate| Ok(Acked { shard: ShardId(3), position: 7, duplicate });
        assert_eq!(of(r#"{"stream":"USAGE_3","seq":7}"#), acked(false));
        assert_eq!(
            of(r#"{"stream":"USAGE_3","seq":7,"domain":"hub","duplicate":true}"#),
            acked(true)
        );
        assert_eq!(
            of(
                r#"{"error":{"code":503,"err_code":10077,"description":"maximum bytes exceeded"},"stream":"USAGE_3","seq":0}"#
            ),
            Err(Failure::Refused {
                code: 503,
                error: 10077,
                description: "maximum bytes exceeded".to_owned()
            })
        );
        for strange in [
            "",
            "{}",
            "[1]",
            r#"{"stream":"USAGE_4","seq":7}"#,
            r#"{"stream":"USAGE_3","seq":0}"#,
            r#"{"stream":"USAGE_3"}"#,
            r#"{"stream":"USAGE_3","seq":-1}"#,
        ] {
            assert!(matches!(of(strange), Err(Failure::Strange(_))), "{strange}");
        }
    }

    #[test]
    fn sentences_from_outside_are_bounded() {
        let long = "é".repeat(1_000);
        assert_eq!(short(&long).len(), SENTENCE_MAX);
        let answer = format!(r#"{{"error":{{"description":"{long}"}}}}"#);
        let Err(Failure::Refused { description, .. }) = read_answer(ShardId(0), answer.as_bytes())
        else {
            panic!("refused");
        };
        assert_eq!(description.len(), SENTENCE_MAX);
    }
}
