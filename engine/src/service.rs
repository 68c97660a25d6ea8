//! What the node answers to every surface: the engine's side of [`Api`].
//!
//! What is asked of a shard is a value (`questions`), and `asking` finds who answers it. Dead letters,
//! what followers missed, and following itself have files of their own.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use meterr_connectors::api::{
    Api, ApiError, ApiResult, AsOf, Cluster, DeadLetter, DeadLetterQuery, Drain, Move, OrgEffect,
    PriceEffect, ShardBatch, ShardOutcome, ShardStatus, SpendAnswer, SpendQuery, StreamEvent,
    StreamId, TopQuery, TopRow, UnpricedRow, ViewDeclaration,
};
use meterr_connectors::log::{LogError, Message};
use meterr_operators::control::{ControlChange, PricesChange, TimeZoneChange, ViewRemoved};
use meterr_operators::ids::{Positions, ShardId, shard_of};
use meterr_operators::price_book::{PriceEntry, check_entries};

use crate::asking::strange;
use crate::node::NodeShared;
use crate::questions::{Answered, ShardAnswer, ShardQuestion};
use crate::views;

/// Orgs listed in a price effect.
const EFFECT_ORGS_MAX: usize = 100;

/// The engine as surfaces see it.
#[derive(Clone)]
pub struct Service {
    pub(crate) shared: Arc<NodeShared>,
}

impl Service {
    /// A view on a node.
    pub fn new(shared: Arc<NodeShared>) -> Service {
        Service { shared }
    }

    pub(crate) fn all_shards(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..self.shared.logs.len() as u16).map(ShardId)
    }

    pub(crate) fn home(&self, org: &str) -> ShardId {
        shard_of(org, self.shared.logs.len() as u16)
    }

    /// Appends a control change once `check` finds it in order with what the log says.
    pub(crate) async fn change(
        &self,
        change: ControlChange,
        check: impl Fn(&crate::control_state::ControlState) -> ApiResult<()>,
    ) -> ApiResult<Positions> {
        let bytes = change.to_bytes();
        ControlChange::parse(&bytes).map_err(ApiError::Invalid)?;
        let lock = self.shared.control_lock.lock().await;
        let log = &self.shared.logs[0].control;
        let until = tokio::time::Instant::now() + self.shared.min_position_timeout;
        let mut head = log.head();
        let appended = loop {
            // What was appended before must be seen, or two changes could pass the same check.
            let mut seen = self.shared.control_seen.subscribe();
            let known = tokio::time::timeout_at(until, seen.wait_for(|at| *at >= head)).await;
            let Ok(Ok(known)) = known.map(|known| known.map(|at| *at)) else {
                return Err(ApiError::Unavailable(
                    "the control log is behind; try again".to_owned(),
                ));
            };
            check(&self.shared.control.read())?;
            match log.append_at(vec![Message::new("control", bytes.clone())], known).await {
                Ok(appended) => break appended,
                // Another node changed something in between.
                Err(LogError::Conflict { actual, .. }) => head = actual,
                Err(error) => return Err(ApiError::Unavailable(error.to_string())),
            }
        };
        drop(lock);
        Ok(Positions { control: Some(appended.last), ..Positions::default() })
    }

    async fn spend_of(&self, query: SpendQuery) -> ApiResult<SpendAnswer> {
        let shard = self.home(&query.org);
        let position = query.min_position.clone();
        let Answered { answer, as_of, .. } =
            self.ask(shard, ShardQuestion::Spend(query), position.as_ref()).await?;
        let ShardAnswer::Spend(rows) = answer else { return Err(strange(shard)) };
        Ok(SpendAnswer { rows, as_of })
    }

    async fn view_rows_of(&self, name: String, query: SpendQuery) -> ApiResult<SpendAnswer> {
        let shard = self.home(&query.org);
        let position = query.min_position.clone();
        let question = ShardQuestion::ViewRows { name: name.clone(), query };
        let Answered { answer, as_of, .. } = self.ask(shard, question, position.as_ref()).await?;
        let ShardAnswer::ViewRows(rows) = answer else { return Err(strange(shard)) };
        let missing = || ApiError::NotFound(format!("there is no declared view {name:?}"));
        Ok(SpendAnswer { rows: rows.ok_or_else(missing)?.0, as_of })
    }

    async fn unpriced_of(
        &self,
        org: String,
        position: Option<Positions>,
    ) -> ApiResult<(Vec<UnpricedRow>, AsOf)> {
        let shard = self.home(&org);
        let Answered { answer, as_of, .. } =
            self.ask(shard, ShardQuestion::Unpriced { org }, position.as_ref()).await?;
        let ShardAnswer::Unpriced(rows) = answer else { return Err(strange(shard)) };
        Ok((rows, as_of))
    }

    async fn top_of(&self, query: TopQuery) -> ApiResult<(Vec<TopRow>, AsOf)> {
        let (n, position) = (query.n, query.min_position.clone());
        // Users of one org live in one shard, everything else may be anywhere.
        let only = query.org.as_deref().map(|org| self.home(org));
        let question = ShardQuestion::Top(query);
        let (answers, as_of) = match only {
            Some(shard) => {
                let answered = self.ask(shard, question, position.as_ref()).await?;
                (vec![answered.answer], answered.as_of)
            }
            None => self.ask_all(question, position.as_ref()).await?,
        };
        let mut shares = Vec::new();
        for answer in answers {
            let ShardAnswer::Top(share) = answer else {
                return Err(strange(only.unwrap_or(ShardId(0))));
            };
            shares.push(share);
        }
        Ok((views::merge_top(shares, n), as_of))
    }

    async fn preview(&self, entries: Vec<PriceEntry>) -> ApiResult<PriceEffect> {
        check_prices(&entries)?;
        let diff = self.shared.control.read().book.diff(&entries);
        let diff = diff.map_err(|errors| ApiError::Invalid(join(&errors)))?;
        let (answers, as_of) = self.ask_all(ShardQuestion::Preview { entries }, None).await?;
        let mut orgs: Vec<OrgEffect> = Vec::new();
        for answer in answers {
            let ShardAnswer::Preview(effect) = answer else { return Err(strange(ShardId(0))) };
            orgs.extend(effect.map_err(ApiError::Invalid)?);
        }
        let change =
            |effect: &OrgEffect| (effect.cost_after - effect.cost_before).get().unsigned_abs();
        orgs.sort_by(|a, b| change(b).cmp(&change(a)).then_with(|| a.org.cmp(&b.org)));
        let mut total = PriceEffect {
            entries_changed: diff.new.len() + diff.changed.len(),
            orgs: orgs.len(),
            as_of: as_of.as_of,
            ..PriceEffect::default()
        };
        for effect in &orgs {
            total.events += effect.events;
            total.cost_before += effect.cost_before;
            total.cost_after += effect.cost_after;
        }
        orgs.truncate(EFFECT_ORGS_MAX);
        total.by_org = orgs;
        Ok(total)
    }
}

fn join<E: std::fmt::Display>(errors: &[E]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn check_prices(entries: &[PriceEntry]) -> ApiResult<()> {
    if entries.is_empty() {
        return Err(ApiError::Invalid("prices must not be empty".to_owned()));
    }
    check_entries(entries).map_err(|errors| ApiError::Invalid(join(&errors)))
}

fn boxed<T>(future: impl Future<Output = T> + Send + 'static) -> BoxFuture<'static, T> {
    future.boxed()
}

impl Api for Service {
    fn shards(&self) -> u16 {
        self.shared.logs.len() as u16
    }

    fn publish(&self, batches: Vec<ShardBatch>) -> BoxFuture<'static, Vec<ShardOutcome>> {
        let appends = batches.into_iter().map(|batch| {
            let shard = batch.shard;
            let append = match *self.shared.draining.borrow() {
                true => Err("the node is draining".to_owned()),
                false => Ok(self.shared.logs[usize::from(shard.0)]
                    .usage
                    .append(vec![Message::new(batch.subject, batch.payload)])),
            };
            async move {
                let result = match append {
                    Ok(append) => append.await.map(|a| a.last).map_err(|e| e.to_string()),
                    Err(refused) => Err(refused),
                };
                ShardOutcome { shard, result }
            }
        });
        futures::future::join_all(appends.collect::<Vec<_>>()).boxed()
    }

    fn spend(&self, query: SpendQuery) -> BoxFuture<'static, ApiResult<SpendAnswer>> {
        let service = self.clone();
        boxed(async move { service.spend_of(query).await })
    }

    fn top(&self, query: TopQuery) -> BoxFuture<'static, ApiResult<(Vec<TopRow>, AsOf)>> {
        let service = self.clone();
        boxed(async move { service.top_of(query).await })
    }

    fn unpriced(
        &self,
        org: String,
        min_position: Option<Positions>,
    ) -> BoxFuture<'static, ApiResult<(Vec<UnpricedRow>, AsOf)>> {
        let service = self.clone();
        boxed(async move { service.unpriced_of(org, min_position).await })
    }

    fn dead_letters(
        &self,
        query: DeadLetterQuery,
    ) -> BoxFuture<'static, ApiResult<Vec<DeadLetter>>> {
        let service = self.clone();
        boxed(async move { service.letters(query).await })
    }

    fn dead_letter(&self, id: String) -> BoxFuture<'static, ApiResult<DeadLetter>> {
        let service = self.clone();
        boxed(async move { service.letter(&id).await })
    }

    fn replay_dead_letter(
        &self,
        id: String,
        mended: Option<Bytes>,
    ) -> BoxFuture<'static, ApiResult<Positions>> {
        let service = self.clone();
        boxed(async move { service.replay(id, mended).await })
    }

    fn prices(
        &self,
        model: Option<String>,
    ) -> BoxFuture<'static, ApiResult<(Vec<PriceEntry>, Positions)>> {
        let control = self.shared.control.read();
        let entries = control.book.entries(model.as_deref());
        let position = Positions { control: Some(control.position), ..Positions::default() };
        boxed(async move { Ok((entries, position)) })
    }

    fn set_prices(&self, entries: Vec<PriceEntry>) -> BoxFuture<'static, ApiResult<Positions>> {
        let service = self.clone();
        boxed(async move {
            check_prices(&entries)?;
            let change = ControlChange::Prices(PricesChange { prices: entries });
            service.change(change, |_| Ok(())).await
        })
    }

    fn preview_prices(
        &self,
        entries: Vec<PriceEntry>,
    ) -> BoxFuture<'static, ApiResult<PriceEffect>> {
        let service = self.clone();
        boxed(async move { service.preview(entries).await })
    }

    fn time_zone(&self, org: String) -> BoxFuture<'static, ApiResult<String>> {
        let zone = self.shared.control.read().time_zones.get(&org).cloned();
        boxed(async move { Ok(zone.unwrap_or_else(|| "UTC".to_owned())) })
    }

    fn set_time_zone(
        &self,
        org: String,
        time_zone: String,
    ) -> BoxFuture<'static, ApiResult<Positions>> {
        let service = self.clone();
        let change = ControlChange::TimeZone(TimeZoneChange { org, time_zone });
        boxed(async move { service.change(change, |_| Ok(())).await })
    }

    fn views(&self) -> BoxFuture<'static, ApiResult<Vec<ViewDeclaration>>> {
        let views = self.shared.control.read().views.values().cloned().collect();
        boxed(async move { Ok(views) })
    }

    fn declare_view(&self, view: ViewDeclaration) -> BoxFuture<'static, ApiResult<Positions>> {
        let service = self.clone();
        boxed(async move {
            let built_in =
                meterr_operators::rollup::ALL_VIEWS.iter().any(|v| v.name() == view.name);
            if built_in {
                return Err(ApiError::Invalid(format!("view {:?} is built in", view.name)));
            }
            let declared = crate::node::declared(&view).map_err(ApiError::Invalid)?;
            service.change(ControlChange::View(declared), |_| Ok(())).await
        })
    }

    fn remove_view(&self, name: String) -> BoxFuture<'static, ApiResult<Positions>> {
        let service = self.clone();
        boxed(async move {
            let known = name.clone();
            let change = ControlChange::ViewRemoved(ViewRemoved { name });
            let check = move |control: &crate::control_state::ControlState| {
                if control.views.contains_key(&known) {
                    return Ok(());
                }
                Err(ApiError::NotFound(format!("there is no declared view {known:?}")))
            };
            service.change(change, check).await
        })
    }

    fn view_rows(
        &self,
        name: String,
        query: SpendQuery,
    ) -> BoxFuture<'static, ApiResult<SpendAnswer>> {
        let service = self.clone();
        boxed(async move { service.view_rows_of(name, query).await })
    }

    fn follow(
        &self,
        org: String,
        after: Option<StreamId>,
    ) -> BoxFuture<'static, ApiResult<BoxStream<'static, StreamEvent>>> {
        let service = self.clone();
        boxed(async move { service.follow_org(org, after).await })
    }

    fn catch_up(
        &self,
        org: String,
        after: Option<StreamId>,
    ) -> BoxFuture<'static, ApiResult<Vec<Bytes>>> {
        let service = self.clone();
        boxed(async move { service.missed(org, after).await })
    }

    fn status(&self) -> BoxFuture<'static, Vec<ShardStatus>> {
        let service = self.clone();
        boxed(async move { service.cluster_status().await })
    }

    fn cluster(&self) -> BoxFuture<'static, ApiResult<Cluster>> {
        let service = self.clone();
        boxed(async move { Ok(service.show_cluster().await) })
    }

    fn drain(&self, drain: Drain) -> BoxFuture<'static, ApiResult<()>> {
        let service = self.clone();
        boxed(async move { service.drain_node(drain).await })
    }

    fn move_shard(&self, to: Move) -> BoxFuture<'static, ApiResult<()>> {
        let service = self.clone();
        boxed(async move { service.move_to(to).await })
    }

    fn metrics(&self) -> String {
        self.shared.metrics.render()
    }
}
