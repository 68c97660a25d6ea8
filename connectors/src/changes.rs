//! Changed rows, as output log, live messages and streams carry them.

use std::collections::BTreeMap;

use bytes::Bytes;
use futures::future::BoxFuture;
use meterr_operators::event::{INPUT_METERS, METERS, Meter, OUTPUT_METERS};
use meterr_operators::format;
use meterr_operators::ids::{Positions, ShardId};
use meterr_operators::money::Atto;
use serde::{Deserialize, Serialize};

use crate::api::{CostSplit, Figures};

/// Newest format of live messages read here.
pub const LIVE_FORMAT: u32 = 1;

/// What a live message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LiveKind {
    /// Every row of the org at the epoch.
    Snapshot,
    /// The rows one commit changed.
    Change,
    /// Nothing was missed up to the epoch.
    Current,
}

/// A message of the live protocol on NATS: published to `spend.<org>` after each commit that changed
/// the org (kind `change`), and sent in answer to `meterr.query.<org>`.
///
/// The protocol: subscribe to `spend.<org>`; ask `meterr.query.<org>` (empty, or
/// `{"after":"<shard>-<epoch>"}`); take the answer, which is one snapshot, or the changes missed, or
/// `current`; then of each change drop those with `epoch` at or below the last one taken, and ask
/// again, with `after`, whenever `previous` is above it: something was missed.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct LiveMessage {
    /// What it is.
    pub kind: LiveKind,
    /// Shard of the org.
    pub shard: ShardId,
    /// Committed epoch the rows are valid at.
    pub epoch: u64,
    /// Epoch of the commit that changed this org before, 0 for none; only in changes.
    #[serde(default)]
    pub previous: Option<u64>,
    /// Positions included.
    pub as_of: Positions,
    /// The org.
    pub org: String,
    /// Number of this piece, from 0. What does not fit one message comes in pieces, each with rows of
    /// its own; it is whole when all are there.
    #[serde(default)]
    pub piece: u32,
    /// How many pieces there are.
    #[serde(default = "one")]
    pub pieces: u32,
    /// In an answer: whether more messages follow. Absent in the last one.
    #[serde(default)]
    pub more: bool,
    /// Rows by view; totals, not differences.
    #[serde(default)]
    pub views: BTreeMap<String, Vec<Row>>,
}

impl LiveMessage {
    /// Reads a message.
    ///
    /// # Errors
    /// A sentence, when it is of a newer format or none.
    pub fn read(message: &[u8]) -> Result<LiveMessage, String> {
        format::check(message, LIVE_FORMAT).map_err(|error| error.to_string())?;
        serde_json::from_slice(message).map_err(|error| error.to_string())
    }
}

fn one() -> u32 {
    1
}

/// Changed rows of one org.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OrgChanges {
    /// The org.
    pub org: String,
    /// Rows by view.
    pub views: BTreeMap<String, Vec<Row>>,
}

/// A changed row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Start of the window.
    pub window_start: Option<String>,
    /// Member of the org the row is about; for declared views a JSON array of values.
    pub key: Option<String>,
    /// The figures.
    pub figures: Figures,
}

impl<'de> Deserialize<'de> for Row {
    // By hand rather than by serde's untagged enums: those cannot read a number while serde_json
    // keeps numbers as text (`arbitrary_precision`).
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Row, D::Error> {
        struct Reader;
        impl<'de> serde::de::Visitor<'de> for Reader {
            type Value = Row;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a row of six or seven items")
            }

            fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut row: A) -> Result<Row, A::Error> {
                use serde::de::Error;
                let short = |at| A::Error::invalid_length(at, &Reader);
                let window_start = row.next_element()?.ok_or_else(|| short(0))?;
                let key = row.next_element()?.ok_or_else(|| short(1))?;
                let events = row.next_element()?.ok_or_else(|| short(2))?;
                let cost = row.next_element()?.ok_or_else(|| short(3))?;
                let unpriced = row.next_element()?.ok_or_else(|| short(4))?;
                let counts: Vec<i64> = row.next_element()?.ok_or_else(|| short(5))?;
                let costs = row.next_element()?.unwrap_or_default();
                let mut meters = [0; METERS];
                for (to, from) in meters.iter_mut().zip(counts) {
                    *to = from;
                }
                let figures = figures_within(events, &meters, cost, costs, unpriced)
                    .ok_or_else(|| A::Error::custom("the figures of a row are out of bounds"))?;
                Ok(Row { window_start, key, figures })
            }
        }
        deserializer.deserialize_seq(Reader)
    }
}

impl Serialize for Row {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Named<'a> {
            window_start: &'a Option<String>,
            key: &'a Option<String>,
            #[serde(flatten)]
            figures: &'a Figures,
        }
        let named =
            Named { window_start: &self.window_start, key: &self.key, figures: &self.figures };
        named.serialize(serializer)
    }
}

/// Figures of counts and costs.
///
/// # Panics
/// When their sums are out of bounds, which no committed figures are.
pub fn figures_of(
    events: i64,
    meters: &[i64; METERS],
    cost: Option<Atto>,
    costs: [Atto; 3],
    unpriced_events: i64,
) -> Figures {
    figures_within(events, meters, cost, costs, unpriced_events)
        .expect("bounds on what enters keep every sum inside")
}

/// The same of figures that somebody else sent; none when their sums are out of bounds.
fn figures_within(
    events: i64,
    meters: &[i64; METERS],
    cost: Option<Atto>,
    [compute, storage, bandwidth]: [Atto; 3],
    unpriced_events: i64,
) -> Option<Figures> {
    let of = |meter: Meter| meters[meter as usize];
    let sum =
        |meters: &[Meter]| meters.iter().try_fold(0_i64, |sum, meter| sum.checked_add(of(*meter)));
    let ai = [compute, storage, bandwidth]
        .iter()
        .try_fold(cost.unwrap_or_default().get(), |rest, part| rest.checked_sub(part.get()))?;
    Some(Figures {
        events,
        input_tokens: sum(&INPUT_METERS)?,
        cached_input_tokens: of(Meter::CacheRead),
        cache_write_tokens: of(Meter::CacheWrite),
        cache_write_1h_tokens: of(Meter::CacheWrite1h),
        output_tokens: sum(&OUTPUT_METERS)?,
        reasoning_tokens: of(Meter::Reasoning),
        audio_input_tokens: of(Meter::AudioInput),
        audio_output_tokens: of(Meter::AudioOutput),
        images: of(Meter::Images),
        searches: of(Meter::Searches),
        cost,
        costs: CostSplit { compute, storage, bandwidth, ai: Atto::new(ai) },
        unpriced_events,
    })
}

impl Figures {
    /// The count of each meter, in the order of [`ALL_METERS`](meterr_operators::event::ALL_METERS):
    /// the totals taken apart again.
    pub fn meters(&self) -> [i64; METERS] {
        let mut meters = [0; METERS];
        let mut set = |meter: Meter, count: i64| meters[meter as usize] = count;
        set(Meter::CacheRead, self.cached_input_tokens);
        set(Meter::CacheWrite, self.cache_write_tokens);
        set(Meter::CacheWrite1h, self.cache_write_1h_tokens);
        set(Meter::AudioInput, self.audio_input_tokens);
        set(Meter::Reasoning, self.reasoning_tokens);
        set(Meter::AudioOutput, self.audio_output_tokens);
        set(Meter::Images, self.images);
        set(Meter::Searches, self.searches);
        let parts = |of: &[Meter]| of.iter().map(|meter| meters[*meter as usize]).sum::<i64>();
        let (input, output) = (parts(&INPUT_METERS), parts(&OUTPUT_METERS));
        meters[Meter::Input as usize] = self.input_tokens - input;
        meters[Meter::Output as usize] = self.output_tokens - output;
        meters
    }
}

/// Where live messages go after a commit: the side of a transport that publishes them.
pub trait Announcer: Send + Sync + 'static {
    /// Publishes messages, each to the subscribers of its org, in order. Resolves when they are on
    /// their way; a message may be lost, which its readers notice by the next one.
    fn announce(&self, messages: Vec<(String, Bytes)>) -> BoxFuture<'static, ()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_out_of_bounds_are_refused() {
        let (most, usd) = (i64::MAX, "99999999999999999999");
        for (row, within) in [
            (format!("[null,null,{most},null,{most},[{most}]]"), true),
            (format!("[null,null,1,null,0,[{most},1]]"), false),
            (format!("[null,null,1,null,0,[0,0,0,0,-{most},-{most}]]"), false),
            (format!("[null,null,1,\"{usd}\",0,[],[\"{usd}\",\"0\",\"0\"]]"), true),
            (format!("[null,null,1,\"{usd}\",0,[],[\"-{usd}\",\"0\",\"0\"]]"), false),
        ] {
            match (serde_json::from_str::<Row>(&row), within) {
                (Ok(_), true) => {}
                (Err(error), false) => {
                    assert!(error.to_string().contains("out of bounds"), "{row}: {error}");
                }
                (read, _) => panic!("{row}: {read:?}"),
            }
        }
    }
}
