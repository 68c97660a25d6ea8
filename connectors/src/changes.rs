//! Changed rows, as output log, live messages and streams carry them.

use std::collections::BTreeMap;

use meterr_operators::event::{INPUT_METERS, METERS, Meter, OUTPUT_METERS};
use meterr_operators::ids::{Positions, ShardId};
use meterr_operators::money::Atto;
use serde::{Deserialize, Serialize};

use crate::api::{CostSplit, Figures};

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

fn one() -> u32 {
    1
}

/// Changed rows of one org.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
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
                let figures = figures_of(events, &meters, cost, costs, unpriced);
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
pub fn figures_of(
    events: i64,
    meters: &[i64; METERS],
    cost: Option<Atto>,
    [compute, storage, bandwidth]: [Atto; 3],
    unpriced_events: i64,
) -> Figures {
    let of = |meter: Meter| meters[meter as usize];
    let sum = |meters: &[Meter]| meters.iter().map(|m| of(*m)).sum();
    Figures {
        events,
        input_tokens: sum(&INPUT_METERS),
        cached_input_tokens: of(Meter::CacheRead),
        cache_write_tokens: of(Meter::CacheWrite),
        cache_write_1h_tokens: of(Meter::CacheWrite1h),
        output_tokens: sum(&OUTPUT_METERS),
        reasoning_tokens: of(Meter::Reasoning),
        audio_input_tokens: of(Meter::AudioInput),
        audio_output_tokens: of(Meter::AudioOutput),
        images: of(Meter::Images),
        searches: of(Meter::Searches),
        cost,
        costs: CostSplit {
            compute,
            storage,
            bandwidth,
            ai: cost.unwrap_or_default() - compute - storage - bandwidth,
        },
        unpriced_events,
    }
}
