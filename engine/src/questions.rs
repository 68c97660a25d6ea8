//! What is asked of a shard and what it answers, as values: a question may be answered by another node.
//!
//! On the way between nodes both are JSON with a `format`. A node refuses a newer format than its own
//! and says so, which shows in a rolling upgrade that was stopped half-way; members it does not know
//! are passed over. Rows go as arrays, as in the output log: their figures are checked when they are
//! read, since nothing that comes from outside may make a sum overflow.

use std::time::Duration;

use meterr_connectors::api::{
    AsOf, OrgEffect, ShardStatus, SpendQuery, SpendRow, TopQuery, UnpricedRow,
};
use meterr_connectors::changes::OrgChanges;
use meterr_operators::ids::{Positions, SHARDS_MAX, ShardId};
use meterr_operators::money::Atto;
use meterr_operators::price_book::PriceEntry;
use meterr_operators::usage::Spend;
use serde::{Deserialize, Serialize};

use crate::live::LiveShard;
use crate::views;

/// Version of what nodes say to each other.
pub const FORMAT: u32 = 1;
/// Bytes of a question or an answer at most.
pub const BYTES_MAX: usize = 64 * 1024 * 1024;

/// A question to a shard.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShardQuestion {
    /// How far it is.
    Progress,
    /// Spend of an org or user.
    Spend(SpendQuery),
    /// Rows of a declared view.
    ViewRows {
        /// The view.
        name: String,
        /// Org and range.
        query: SpendQuery,
    },
    /// Its share of a top list.
    Top(TopQuery),
    /// Usage of an org that lacks a price.
    Unpriced {
        /// The org.
        org: String,
    },
    /// What new prices would change.
    Preview {
        /// The prices.
        entries: Vec<PriceEntry>,
    },
    /// Epochs with dead letters.
    DeadEpochs,
    /// When an org changed last.
    ChangedAt {
        /// The org.
        org: String,
    },
    /// All rows of an org.
    Rows {
        /// The org.
        org: String,
    },
}

/// What a shard answers: the variant of the question's name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ShardAnswer {
    /// Only how far it is, which comes with every answer.
    Progress,
    /// Rows by window, then key.
    Spend(#[serde(with = "spend_rows")] Vec<SpendRow>),
    /// Rows; nothing when there is no such view.
    ViewRows(Option<ViewRows>),
    /// Org, name and spend of each row that may be among the first.
    Top(Vec<(Option<String>, String, Spend)>),
    /// What lacks a price.
    Unpriced(Vec<UnpricedRow>),
    /// The effect by org, or what is wrong with the prices.
    Preview(Result<Vec<OrgEffect>, String>),
    /// Epoch and number of dead letters, ascending.
    DeadEpochs(Vec<(u64, u32)>),
    /// Epoch of the last commit that changed the org, 0 for none; nothing when it is not known.
    ChangedAt(Option<u64>),
    /// The rows by view.
    Rows(#[serde(with = "org_changes")] OrgChanges),
}

/// Rows of a declared view.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ViewRows(#[serde(with = "spend_rows")] pub Vec<SpendRow>);

/// An answer and the committed state it was given from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered {
    /// The answer.
    pub answer: ShardAnswer,
    /// What it counts up to.
    pub as_of: AsOf,
    /// Committed epoch.
    pub epoch: u64,
    /// Position of its commit record.
    pub commit: u64,
}

/// Answers from what is committed. Called between commits.
pub fn answer(live: &mut LiveShard, question: &ShardQuestion) -> Answered {
    let answer = match question {
        ShardQuestion::Progress => ShardAnswer::Progress,
        ShardQuestion::Spend(query) => ShardAnswer::Spend(views::spend(live.shard(), query)),
        ShardQuestion::ViewRows { name, query } => {
            ShardAnswer::ViewRows(views::declared(live.shard(), name, query).map(ViewRows))
        }
        ShardQuestion::Top(query) => {
            ShardAnswer::Top(views::foremost(views::top(live.shard(), query), query))
        }
        ShardQuestion::Unpriced { org } => {
            ShardAnswer::Unpriced(views::unpriced(live.shard(), org))
        }
        ShardQuestion::Preview { entries } => {
            ShardAnswer::Preview(views::preview(live.shard(), entries))
        }
        ShardQuestion::DeadEpochs => ShardAnswer::DeadEpochs(live.shard().dead_epochs().to_vec()),
        ShardQuestion::ChangedAt { org } => ShardAnswer::ChangedAt(live.epoch_of(org)),
        ShardQuestion::Rows { org } => ShardAnswer::Rows(live.rows(org)),
    };
    let progress = live.progress();
    Answered { answer, as_of: live.as_of(), epoch: progress.epoch, commit: progress.commit }
}

impl Answered {
    /// Whether its figures can be added up over all shards of a deployment.
    pub fn in_bounds(&self) -> bool {
        let shards = i64::from(SHARDS_MAX);
        let count = |n: i64| n.unsigned_abs() <= (i64::MAX / shards).unsigned_abs();
        let cost = |cost: Atto| cost.get().unsigned_abs() <= (i128::MAX / 4).unsigned_abs() / 256;
        match &self.answer {
            ShardAnswer::Top(rows) => rows.iter().all(|(_, _, spend)| {
                let rest = spend.rest.as_deref();
                count(spend.events)
                    && spend.meters().into_iter().all(count)
                    && cost(spend.cost)
                    && rest.is_none_or(|rest| {
                        count(rest.unpriced) && rest.other_costs.into_iter().all(cost)
                    })
            }),
            ShardAnswer::Preview(Ok(effects)) => effects.iter().all(|effect| {
                // Orgs are added up too, and there may be many.
                let most = i64::MAX / shards / effects.len().max(1) as i64;
                effect.events.unsigned_abs() <= most.unsigned_abs()
                    && [effect.cost_before, effect.cost_after].into_iter().all(|of| {
                        cost(of)
                            && of
                                .get()
                                .checked_mul(effects.len() as i128)
                                .map(Atto::new)
                                .is_some_and(cost)
                    })
            }),
            _ => true,
        }
    }
}

/// Positions that must be committed before a shard answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wanted {
    /// Of its usage log.
    pub usage: u64,
    /// Of the control log.
    pub control: u64,
}

impl Wanted {
    /// What `positions` want of a shard.
    pub fn of(positions: Option<&Positions>, shard: ShardId) -> Wanted {
        let Some(positions) = positions else { return Wanted::default() };
        let usage = positions.of(shard).unwrap_or(0);
        Wanted { usage, control: positions.control.unwrap_or(0) }
    }

    /// Whether `progress` has reached them.
    pub fn reached(self, progress: &crate::live::Progress) -> bool {
        progress.usage >= self.usage && progress.control >= self.control
    }
}

/// What one node asks another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeQuestion {
    /// Something of a shard, from what the node has of it: it does not ask further nodes.
    Shard {
        /// The shard.
        shard: ShardId,
        /// What must be committed first.
        wanted: Wanted,
        /// Longest wait for that, in milliseconds.
        wait_ms: u64,
        /// The question.
        question: Box<ShardQuestion>,
    },
    /// State of the shards that are on the node.
    Status,
}

/// What a node says to another's question.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NodeAnswer {
    /// Of a shard.
    Shard(Answered),
    /// Of the node.
    Status(Vec<ShardStatus>),
    /// It does not answer.
    Refused(Refusal),
}

/// Why a node does not answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// The shard is not here, or not in a state to answer.
    NotHere {
        /// What it is here.
        why: String,
    },
    /// The positions wanted were not reached in time.
    Late {
        /// What was.
        current: Positions,
    },
    /// The question cannot be read.
    Unreadable {
        /// Why.
        why: String,
    },
}

/// With its version, as it goes over the wire.
#[derive(Serialize, Deserialize)]
struct Framed<T> {
    format: u32,
    body: T,
}

/// Writes a question or an answer.
///
/// # Errors
/// A sentence, when it is too large.
pub fn encode<T: Serialize>(body: &T) -> Result<bytes::Bytes, String> {
    let bytes = serde_json::to_vec(&Framed { format: FORMAT, body })
        .map_err(|error| format!("it cannot be written as JSON: {error}"))?;
    if bytes.len() > BYTES_MAX {
        return Err(format!("it has {} bytes, nodes send at most {BYTES_MAX}", bytes.len()));
    }
    Ok(bytes.into())
}

/// Reads a question or an answer.
///
/// # Errors
/// A sentence saying why it cannot be read.
pub fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    #[derive(Deserialize)]
    struct Version {
        format: u32,
    }
    if bytes.len() > BYTES_MAX {
        return Err(format!("it has {} bytes, nodes read at most {BYTES_MAX}", bytes.len()));
    }
    let unreadable = |error: serde_json::Error| format!("it is not of the form expected: {error}");
    let Version { format } = serde_json::from_slice(bytes).map_err(unreadable)?;
    if format > FORMAT {
        return Err(format!(
            "it is in format {format}, and this version of meterr reads up to {FORMAT}; bring all \
             nodes to the newer version"
        ));
    }
    let framed: Framed<T> = serde_json::from_slice(bytes).map_err(unreadable)?;
    Ok(framed.body)
}

/// Milliseconds, as questions carry durations.
pub fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Rows as arrays.
mod spend_rows {
    use meterr_connectors::api::SpendRow;
    use meterr_connectors::changes::Row;
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::announce::AsArray;

    pub fn serialize<S: Serializer>(rows: &[SpendRow], serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeSeq;
        let mut list = serializer.serialize_seq(Some(rows.len()))?;
        for row in rows {
            let (window_start, key) = (row.window_start.clone(), row.key.clone());
            list.serialize_element(&AsArray(&Row { window_start, key, figures: row.figures }))?;
        }
        list.end()
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<SpendRow>, D::Error> {
        let rows = Vec::<Row>::deserialize(from)?.into_iter();
        let row = |Row { window_start, key, figures }| SpendRow { window_start, key, figures };
        Ok(rows.map(row).collect())
    }
}

/// Rows by view, as arrays.
mod org_changes {
    use std::collections::BTreeMap;

    use meterr_connectors::changes::{OrgChanges, Row};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    use crate::announce::AsArray;

    #[derive(Serialize, Deserialize)]
    struct Wire<V> {
        org: String,
        views: BTreeMap<String, Vec<V>>,
    }

    pub fn serialize<S: Serializer>(rows: &OrgChanges, serializer: S) -> Result<S::Ok, S::Error> {
        let mut views = BTreeMap::new();
        for (view, rows) in &rows.views {
            views.insert(view.clone(), rows.iter().map(AsArray).collect::<Vec<_>>());
        }
        Wire { org: rows.org.clone(), views }.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<OrgChanges, D::Error> {
        let Wire::<Row> { org, views } = Wire::deserialize(from)?;
        Ok(OrgChanges { org, views })
    }
}

#[cfg(test)]
mod tests {
    use meterr_connectors::changes::{Row, figures_of};
    use meterr_operators::event::METERS;
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn spend_row()(
            start in proptest::option::of("[0-9]{4}"),
            key in proptest::option::of("[a-z\"\\\\é]{0,9}"),
            events in -2_i64..9,
            meters in proptest::array::uniform10(0_i64..5),
            cost in proptest::option::of(0_i128..9),
            costs in proptest::array::uniform3(0_i128..2),
            unpriced in 0_i64..3,
        ) -> SpendRow {
            let meters: [i64; METERS] = meters;
            let costs = costs.map(Atto::new);
            let figures = figures_of(events, &meters, cost.map(Atto::new), costs, unpriced);
            SpendRow { window_start: start, key, figures }
        }
    }

    proptest! {
        #[test]
        fn answers_read_as_they_were_written(
            rows in proptest::collection::vec(spend_row(), 0..9),
            kind in 0_u8..4,
        ) {
            let answer = match kind {
                0 => ShardAnswer::Spend(rows),
                1 => ShardAnswer::ViewRows(Some(ViewRows(rows))),
                2 => ShardAnswer::Rows(OrgChanges {
                    org: "acme".to_owned(),
                    views: [("user_day".to_owned(), rows.into_iter().map(|row| {
                        let SpendRow { window_start, key, figures } = row;
                        Row { window_start, key, figures }
                    }).collect())].into(),
                }),
                _ => ShardAnswer::ViewRows(None),
            };
            let as_of = AsOf {
                as_of: "3:118,c:19".parse().unwrap(),
                epochs: vec![(ShardId(3), 17)],
                staleness_ms: Some(4),
            };
            let answered = NodeAnswer::Shard(Answered { answer, as_of, epoch: 17, commit: 40 });
            prop_assert_eq!(decode::<NodeAnswer>(&encode(&answered).unwrap()), Ok(answered));
        }

        #[test]
        fn no_bytes_make_a_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(decode::<NodeAnswer>(&bytes).is_err());
            prop_assert!(decode::<NodeQuestion>(&bytes).is_err());
        }
    }

    #[test]
    fn questions_read_as_they_were_written() {
        use meterr_connectors::api::{GroupBy, TopBy, Window};
        let spend = SpendQuery {
            org: "acme".to_owned(),
            user: Some("u-1".to_owned()),
            window: Window::Day,
            from: meterr_operators::time::Time::parse("2026-01-02T03:00:00Z").ok(),
            to: None,
            by: GroupBy::Tag("team".to_owned()),
            min_position: Some("3:7,c:1".parse().unwrap()),
        };
        let top = TopQuery {
            by: TopBy::Model,
            window: Window::All,
            at: None,
            n: 10,
            org: None,
            min_position: None,
        };
        let entry: PriceEntry = serde_json::from_str(
            r#"{"provider":"openai","model":"gpt-4o","input":"2.5","output":"10"}"#,
        )
        .unwrap();
        let org = "acme".to_owned();
        for question in [
            ShardQuestion::Progress,
            ShardQuestion::Spend(spend.clone()),
            ShardQuestion::ViewRows { name: "v".to_owned(), query: spend },
            ShardQuestion::Top(top),
            ShardQuestion::Unpriced { org: org.clone() },
            ShardQuestion::Preview { entries: vec![entry] },
            ShardQuestion::DeadEpochs,
            ShardQuestion::ChangedAt { org: org.clone() },
            ShardQuestion::Rows { org },
        ] {
            let wanted = Wanted { usage: 7, control: 1 };
            let asked = NodeQuestion::Shard {
                shard: ShardId(3),
                wanted,
                wait_ms: 5,
                question: Box::new(question),
            };
            assert_eq!(decode(&encode(&asked).unwrap()), Ok(asked));
        }
    }

    #[test]
    fn a_newer_format_is_refused_beside_the_present_one() {
        let read = |format: u32| {
            decode::<NodeQuestion>(
                format!("{{\"format\":{format},\"body\":\"status\"}}").as_bytes(),
            )
        };
        assert_eq!(read(FORMAT), Ok(NodeQuestion::Status));
        let error = read(FORMAT + 1).unwrap_err();
        assert!(error.contains("format 2") && error.contains("up to 1"), "{error}");
    }

    #[test]
    fn figures_that_cannot_be_added_up_are_seen() {
        let answered = |spend: Spend| Answered {
            answer: ShardAnswer::Top(vec![(None, "m".to_owned(), spend)]),
            as_of: AsOf::default(),
            epoch: 0,
            commit: 0,
        };
        assert!(answered(Spend { events: 1 << 40, ..Spend::default() }).in_bounds());
        assert!(!answered(Spend { events: i64::MAX / 2, ..Spend::default() }).in_bounds());
        assert!(!answered(Spend { input: i64::MIN, ..Spend::default() }).in_bounds());
        let cost = Atto::new(i128::MAX / 100);
        assert!(!answered(Spend { cost, ..Spend::default() }).in_bounds());
    }
}
