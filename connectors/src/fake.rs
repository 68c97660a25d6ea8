//! An engine that answers from what a test put into it and writes down what it was asked.

use std::collections::{HashSet, VecDeque};

use bytes::Bytes;
use futures::FutureExt;
use futures::future::{self, BoxFuture};
use futures::stream::BoxStream;
use meterr_operators::event::Reason;
use meterr_operators::ids::{Positions, ShardId};
use meterr_operators::money::Atto;
use meterr_operators::price_book::PriceEntry;
use meterr_operators::time::Time;
use parking_lot::Mutex;
use tokio::sync::watch;

use crate::api::*;

pub(crate) struct Fake {
    /// Shards of the deployment, and the one that answers are about.
    pub shards: u16,
    pub home: u16,
    pub asked: Mutex<Vec<String>>,
    pub published: Mutex<Vec<ShardBatch>>,
    /// Shards whose writes fail.
    pub failing: Mutex<HashSet<ShardId>>,
    /// Shards whose writes never end.
    pub hanging: Mutex<HashSet<ShardId>>,
    /// Whether writes wait for the gate.
    pub slow_publish: Mutex<bool>,
    pub rows: Mutex<Vec<SpendRow>>,
    /// Usage and control position of every shard.
    pub reached: watch::Sender<u64>,
    /// Answers that include a position wait for it, and then for this.
    pub gate: watch::Sender<bool>,
    pub error: Mutex<Option<ApiError>>,
    pub panics: Mutex<bool>,
    pub state: Mutex<String>,
    pub streams: Mutex<VecDeque<BoxStream<'static, StreamEvent>>>,
    /// The answer to what was missed.
    pub missed: Mutex<Vec<Bytes>>,
    /// Questions with this in them are never answered.
    pub stuck: Mutex<Option<String>>,
    /// Questions with this in them are answered once released.
    pub held: Mutex<Option<String>>,
    pub release: watch::Sender<bool>,
}

impl Default for Fake {
    fn default() -> Self {
        Fake {
            shards: SHARDS,
            home: 3,
            asked: Mutex::default(),
            published: Mutex::default(),
            failing: Mutex::default(),
            hanging: Mutex::default(),
            slow_publish: Mutex::default(),
            rows: Mutex::new(rows(1)),
            reached: watch::Sender::new(7),
            gate: watch::Sender::new(true),
            error: Mutex::default(),
            panics: Mutex::default(),
            state: Mutex::new("live".to_owned()),
            streams: Mutex::default(),
            missed: Mutex::new(vec![Bytes::from_static(CURRENT)]),
            stuck: Mutex::default(),
            held: Mutex::default(),
            release: watch::Sender::new(false),
        }
    }
}

pub(crate) const SHARDS: u16 = 4;

/// A live message as the engine writes it.
const CURRENT: &[u8] = include_bytes!("../../config/wire/live/current.json").trim_ascii_end();

/// Figures with something in every member.
pub(crate) fn figures() -> Figures {
    Figures {
        events: 3,
        input_tokens: 1_122,
        cached_input_tokens: 360,
        cache_write_tokens: 64,
        cache_write_1h_tokens: 32,
        output_tokens: 132,
        reasoning_tokens: 40,
        audio_input_tokens: 10,
        audio_output_tokens: 5,
        images: 1,
        searches: 2,
        cost: Some(Atto::new(1_237_500_000_000_000)),
        costs: CostSplit { ai: Atto::new(1_237_500_000_000_000), ..CostSplit::default() },
        unpriced_events: 0,
    }
}

fn at(text: &str) -> Time {
    Time::parse(text).unwrap()
}

pub(crate) fn rows(n: usize) -> Vec<SpendRow> {
    (0..n)
        .map(|n| SpendRow {
            window_start: Some("2026-01-02T00:00:00+01:00".to_owned()),
            key: Some(format!("u-{n}")),
            figures: Figures { events: 1, cost: Some(Atto::usd(3)), ..Figures::default() },
        })
        .collect()
}

fn price() -> PriceEntry {
    let text = r#"{"provider":"openai","model":"gpt-4o","effective_from":"2026-01-15T00:00:00Z","input":"2.5","cached_input":"1.25","output":"10"}"#;
    serde_json::from_str(text).unwrap()
}

fn changed() -> Positions {
    "c:19".parse().unwrap()
}

impl Fake {
    /// What was asked last.
    pub fn last(&self) -> String {
        self.asked.lock().last().cloned().unwrap_or_default()
    }

    fn answer<T: Send + 'static>(
        &self,
        asked: String,
        position: Option<Positions>,
        answer: T,
    ) -> BoxFuture<'static, ApiResult<T>> {
        let stuck = self.stuck.lock().as_ref().is_some_and(|stuck| asked.contains(stuck));
        let held = self.held.lock().as_ref().is_some_and(|held| asked.contains(held));
        let mut release = self.release.subscribe();
        self.asked.lock().push(asked);
        if stuck {
            return future::pending().boxed();
        }
        assert!(!*self.panics.lock(), "the test asked for a panic");
        if let Some(error) = self.error.lock().clone() {
            return future::ready(Err(error)).boxed();
        }
        let (mut reached, mut gate) = (self.reached.subscribe(), self.gate.subscribe());
        async move {
            if held {
                let _ = release.wait_for(|released| *released).await;
            }
            if let Some(position) = position {
                let most = position.shards.iter().map(|(_, p)| *p).chain(position.control).max();
                let _ = reached.wait_for(|reached| *reached >= most.unwrap_or(0)).await;
                let _ = gate.wait_for(|open| *open).await;
            }
            Ok(answer)
        }
        .boxed()
    }

    fn as_of(&self) -> AsOf {
        let reached = *self.reached.borrow();
        let home = self.home;
        AsOf {
            as_of: format!("{home}:{reached}").parse().unwrap(),
            epochs: vec![(ShardId(home), reached)],
            staleness_ms: None,
        }
    }
}

impl Api for Fake {
    fn shards(&self) -> u16 {
        self.shards
    }

    fn publish(&self, batches: Vec<ShardBatch>) -> BoxFuture<'static, Vec<ShardOutcome>> {
        let (failing, hanging) = (self.failing.lock(), self.hanging.lock());
        let hangs = batches.iter().any(|batch| hanging.contains(&batch.shard));
        let outcome = |batch: &ShardBatch| ShardOutcome {
            shard: batch.shard,
            result: match failing.contains(&batch.shard) {
                true => Err("disk full".to_owned()),
                false => Ok(100 + u64::from(batch.shard.0)),
            },
        };
        let outcomes = batches.iter().map(outcome).collect();
        self.published.lock().extend(batches);
        let mut gate = self.slow_publish.lock().then(|| self.gate.subscribe());
        async move {
            if hangs {
                future::pending::<()>().await;
            }
            if let Some(gate) = &mut gate {
                let _ = gate.wait_for(|open| *open).await;
            }
            outcomes
        }
        .boxed()
    }

    fn spend(&self, query: SpendQuery) -> BoxFuture<'static, ApiResult<SpendAnswer>> {
        let answer = SpendAnswer { rows: self.rows.lock().clone(), as_of: self.as_of() };
        self.answer(format!("{query:?}"), query.min_position, answer)
    }

    fn top(&self, query: TopQuery) -> BoxFuture<'static, ApiResult<(Vec<TopRow>, AsOf)>> {
        let row =
            TopRow { org: Some("acme".to_owned()), key: "acme".to_owned(), figures: figures() };
        self.answer(format!("{query:?}"), query.min_position, (vec![row], self.as_of()))
    }

    fn unpriced(
        &self,
        org: String,
        min_position: Option<Positions>,
    ) -> BoxFuture<'static, ApiResult<(Vec<UnpricedRow>, AsOf)>> {
        let row = UnpricedRow {
            provider: "openai".to_owned(),
            model: "gpt-x".to_owned(),
            tier: "standard".to_owned(),
            min_input_tokens: 0,
            lacking: vec!["input".to_owned()],
            first: at("2026-01-02T03:00:00Z"),
            last: at("2026-01-02T09:45:00Z"),
            events: 1,
        };
        self.answer(format!("unpriced {org}"), min_position, (vec![row], self.as_of()))
    }

    fn dead_letters(
        &self,
        query: DeadLetterQuery,
    ) -> BoxFuture<'static, ApiResult<Vec<DeadLetter>>> {
        let home = self.home;
        let letter = |n| DeadLetter {
            id: format!("{home}-7-{n}"),
            subject: format!("usage.{home}.@batch"),
            position: 7,
            line: n + 1,
            reason: Reason::TooLate,
            detail: "too late".to_owned(),
            raw: None,
            raw_base64: None,
            truncated: false,
            replayed: None,
        };
        let letters = (0..5_u32).take(query.limit).map(letter).collect();
        self.answer(format!("{query:?}"), None, letters)
    }

    fn dead_letter(&self, id: String) -> BoxFuture<'static, ApiResult<DeadLetter>> {
        let letter = DeadLetter {
            id: id.clone(),
            subject: format!("usage.{}.@batch", self.home),
            position: 7,
            line: 1,
            reason: Reason::Malformed,
            detail: "not JSON".to_owned(),
            raw: Some("{".to_owned()),
            raw_base64: None,
            truncated: false,
            replayed: None,
        };
        self.answer(format!("dead letter {id}"), None, letter)
    }

    fn replay_dead_letter(
        &self,
        id: String,
        mended: Option<Bytes>,
    ) -> BoxFuture<'static, ApiResult<Positions>> {
        self.answer(
            format!("replay {id} {mended:?}"),
            None,
            format!("{}:8", self.home).parse().unwrap(),
        )
    }

    fn prices(
        &self,
        model: Option<String>,
    ) -> BoxFuture<'static, ApiResult<(Vec<PriceEntry>, Positions)>> {
        self.answer(format!("prices {model:?}"), None, (vec![price()], changed()))
    }

    fn set_prices(&self, entries: Vec<PriceEntry>) -> BoxFuture<'static, ApiResult<Positions>> {
        self.answer(format!("set {} prices", entries.len()), None, changed())
    }

    fn preview_prices(
        &self,
        entries: Vec<PriceEntry>,
    ) -> BoxFuture<'static, ApiResult<PriceEffect>> {
        let by_org = OrgEffect {
            org: "acme".to_owned(),
            events: 3,
            cost_before: Atto::new(1_237_500_000_000_000),
            cost_after: Atto::new(1_485_000_000_000_000),
        };
        let effect = PriceEffect {
            entries_changed: entries.len(),
            orgs: 1,
            events: by_org.events,
            cost_before: by_org.cost_before,
            cost_after: by_org.cost_after,
            by_org: vec![by_org],
            as_of: format!("{}:118,c:19", self.home).parse().unwrap(),
        };
        self.answer(format!("preview {} prices", entries.len()), None, effect)
    }

    fn time_zone(&self, org: String) -> BoxFuture<'static, ApiResult<String>> {
        self.answer(format!("time zone of {org}"), None, "UTC".to_owned())
    }

    fn set_time_zone(
        &self,
        org: String,
        time_zone: String,
    ) -> BoxFuture<'static, ApiResult<Positions>> {
        self.answer(format!("time zone of {org} is {time_zone}"), None, changed())
    }

    fn views(&self) -> BoxFuture<'static, ApiResult<Vec<ViewDeclaration>>> {
        let view = ViewDeclaration {
            name: "by_team".to_owned(),
            by: vec!["tag:team".to_owned()],
            window: Window::Day,
        };
        self.answer("views".to_owned(), None, vec![view])
    }

    fn declare_view(&self, view: ViewDeclaration) -> BoxFuture<'static, ApiResult<Positions>> {
        self.answer(format!("declare {}", view.name), None, changed())
    }

    fn remove_view(&self, name: String) -> BoxFuture<'static, ApiResult<Positions>> {
        self.answer(format!("remove {name}"), None, changed())
    }

    fn view_rows(
        &self,
        name: String,
        query: SpendQuery,
    ) -> BoxFuture<'static, ApiResult<SpendAnswer>> {
        let answer = SpendAnswer { rows: self.rows.lock().clone(), as_of: self.as_of() };
        self.answer(format!("view {name} {query:?}"), query.min_position, answer)
    }

    fn follow(
        &self,
        org: String,
        after: Option<StreamId>,
    ) -> BoxFuture<'static, ApiResult<BoxStream<'static, StreamEvent>>> {
        let stream = self.streams.lock().pop_front();
        let stream = stream.unwrap_or_else(|| Box::pin(futures::stream::pending()));
        self.answer(format!("follow {org} {after:?}"), None, stream)
    }

    fn catch_up(
        &self,
        org: String,
        after: Option<StreamId>,
    ) -> BoxFuture<'static, ApiResult<Vec<Bytes>>> {
        let missed = self.missed.lock().clone();
        self.answer(format!("catch_up {org} {after:?}"), None, missed)
    }

    fn status(&self) -> BoxFuture<'static, Vec<ShardStatus>> {
        let reached = *self.reached.borrow();
        let state = self.state.lock().clone();
        let status = |shard| ShardStatus {
            shard: ShardId(shard),
            state: state.clone(),
            problem: None,
            epoch: reached,
            usage_position: reached,
            usage_head: reached,
            control_position: reached,
            owner: None,
            here: None,
            elsewhere: false,
        };
        future::ready((0..self.shards).map(status).collect()).boxed()
    }

    fn cluster(&self) -> BoxFuture<'static, ApiResult<Cluster>> {
        let node = ClusterNode {
            node: "n1".to_owned(),
            state: "up".to_owned(),
            capacity: 1.5,
            http: "10.0.0.1:8080".to_owned(),
            version: "0.1.0".to_owned(),
            heard_ms: 310,
            shards: vec![ShardId(self.home)],
            lag: 4,
            events_per_second: Some(51_000.5),
        };
        let shard = ClusterShard {
            shard: ShardId(self.home),
            owner: Some("n1".to_owned()),
            state: "live".to_owned(),
            problem: None,
            epoch: 7,
            lag: 4,
            wanted: Some("n2".to_owned()),
            pinned: None,
        };
        let cluster = Cluster {
            node: "n1".to_owned(),
            nodes: vec![node],
            shards: vec![shard],
            recommended_nodes: Some(2),
            reason: Some("up to 68000.5 events/s expected within 4 h".to_owned()),
            predicted_events_per_second: Some(68_000.5),
            service_rate_events_per_second: Some(51_000.5),
        };
        self.answer("cluster".to_owned(), None, cluster)
    }

    fn drain(&self, drain: Drain) -> BoxFuture<'static, ApiResult<()>> {
        self.answer(format!("{drain:?}"), None, ())
    }

    fn move_shard(&self, to: Move) -> BoxFuture<'static, ApiResult<()>> {
        self.answer(format!("{to:?}"), None, ())
    }

    fn metrics(&self) -> String {
        "meterr_events_total 1\n".to_owned()
    }
}
