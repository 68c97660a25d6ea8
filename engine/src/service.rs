//! What the node answers to every surface: the engine's side of [`Api`].

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use futures::FutureExt;
use futures::future::BoxFuture;
use futures::stream::{BoxStream, StreamExt};
use meterr_connectors::api::{
    Api, ApiError, ApiResult, AsOf, DeadLetter, DeadLetterQuery, OrgEffect, PriceEffect,
    ShardBatch, ShardOutcome, ShardStatus, SpendAnswer, SpendQuery, StreamEvent, StreamId,
    TopQuery, TopRow, UnpricedRow, ViewDeclaration,
};
use meterr_connectors::changes::{LiveKind, OrgChanges};
use meterr_connectors::log::{Log, LogError, Message, Record};
use meterr_operators::control::{
    ControlChange, DeadLetterReplayed, PricesChange, TimeZoneChange, ViewRemoved,
};
use meterr_operators::ids::{Positions, ShardId, shard_of};
use meterr_operators::price_book::{PriceEntry, check_entries};
use tokio::sync::{mpsc, oneshot};

use crate::announce;
use crate::live::LiveShard;
use crate::node::{NodeShared, now};
use crate::records::{READ_BYTES, followed, own_parts};
use crate::views;
use crate::wire::{Commit, Part, stream_body};
use crate::worker::Command;

/// Changes a follower may be behind before it is let go.
const FOLLOWER_BACKLOG: usize = 256;
/// Bytes of output log read for a resuming follower; older ones get a snapshot.
const RESUME_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Orgs listed in a price effect.
const EFFECT_ORGS_MAX: usize = 100;

/// The engine as surfaces see it.
#[derive(Clone)]
pub struct Service {
    shared: Arc<NodeShared>,
}

impl Service {
    /// A view on a node.
    pub fn new(shared: Arc<NodeShared>) -> Service {
        Service { shared }
    }

    fn all_shards(&self) -> impl Iterator<Item = ShardId> + use<> {
        (0..self.shared.logs.len() as u16).map(ShardId)
    }

    fn home(&self, org: &str) -> ShardId {
        shard_of(org, self.shared.logs.len() as u16)
    }

    /// Runs something on a shard between commits.
    async fn ask<T: Send + 'static>(
        &self,
        shard: ShardId,
        run: impl FnOnce(&mut LiveShard) -> T + Send + 'static,
    ) -> ApiResult<T> {
        let (answer, asked) = oneshot::channel();
        let query = Box::new(move |live: &mut LiveShard| {
            // Whoever asked may have gone.
            drop(answer.send(run(live)));
        });
        self.shared.tell(shard, Command::Query(shard, query)).await;
        asked.await.map_err(|_| self.not_live(shard))
    }

    fn not_live(&self, shard: ShardId) -> ApiError {
        let (state, problem) = self.shared.states[usize::from(shard.0)].lock().clone();
        let problem = problem.map(|problem| format!(": {problem}")).unwrap_or_default();
        ApiError::Unavailable(format!("shard {shard} is in state {:?}{problem}", state.name()))
    }

    /// Waits until the shards named in `positions` (or `only` one of them) have committed them.
    async fn wait(&self, positions: Option<&Positions>, only: Option<ShardId>) -> ApiResult<()> {
        let Some(positions) = positions else { return Ok(()) };
        let until = tokio::time::Instant::now() + self.shared.min_position_timeout;
        let concerned = |shard: &ShardId| only.is_none_or(|only| only == *shard);
        let mut waits: Vec<(ShardId, u64, u64)> = Vec::new();
        let control = positions.control.unwrap_or(0);
        for shard in self.all_shards().filter(concerned) {
            waits.push((shard, positions.of(shard).unwrap_or(0), control));
        }
        let beyond =
            positions.shards.iter().find(|(s, _)| usize::from(s.0) >= self.shared.logs.len());
        if let Some((shard, _)) = beyond {
            return Err(ApiError::Invalid(format!(
                "position names shard {shard}, which there is not"
            )));
        }
        for (shard, usage, control) in waits {
            let mut progress = self.shared.progress[usize::from(shard.0)].clone();
            let reached = progress.wait_for(|p| p.usage >= usage && p.control >= control);
            let reached = tokio::time::timeout_at(until, reached).await;
            if !matches!(reached, Ok(Ok(_))) {
                return Err(ApiError::Timeout { current: self.current(only) });
            }
        }
        Ok(())
    }

    fn current(&self, only: Option<ShardId>) -> Positions {
        let mut current = Positions::default();
        for shard in self.all_shards().filter(|shard| only.is_none_or(|only| only == *shard)) {
            let progress = *self.shared.progress[usize::from(shard.0)].borrow();
            current.raise(shard, progress.usage);
            current.control =
                Some(current.control.map_or(progress.control, |c| c.min(progress.control)));
        }
        current
    }

    /// Appends a control change once `check` finds it in order with what the log says.
    async fn change(
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
        self.wait(query.min_position.as_ref(), Some(shard)).await?;
        self.ask(shard, move |live| {
            let rows = views::spend(live.shard(), &query);
            SpendAnswer { rows, as_of: live.as_of() }
        })
        .await
    }

    /// Asks every shard and joins what answers count up to.
    async fn ask_all<T: Send + 'static>(
        &self,
        run: impl Fn(&mut LiveShard) -> T + Clone + Send + 'static,
    ) -> ApiResult<(Vec<T>, AsOf)> {
        let asked = self.all_shards().map(|shard| {
            let run = run.clone();
            self.ask(shard, move |live| (run(live), live.as_of()))
        });
        let answers = futures::future::try_join_all(asked).await?;
        let mut as_of = AsOf::default();
        let mut results = Vec::new();
        for (result, of) in answers {
            for (shard, position) in of.as_of.shards {
                as_of.as_of.raise(shard, position);
            }
            let control = of.as_of.control.unwrap_or(0);
            let known = as_of.as_of.control.map_or(control, |known| known.min(control));
            as_of.as_of.control = Some(known);
            as_of.epochs.extend(of.epochs);
            results.push(result);
        }
        Ok((results, as_of))
    }

    async fn top_of(&self, query: TopQuery) -> ApiResult<(Vec<TopRow>, AsOf)> {
        let only = query.org.as_deref().map(|org| self.home(org));
        self.wait(query.min_position.as_ref(), only).await?;
        let n = query.n;
        // Users of one org live in one shard, everything else may be anywhere.
        let (shares, as_of) = match only {
            Some(shard) => {
                let ask =
                    move |live: &mut LiveShard| (views::top(live.shard(), &query), live.as_of());
                let (share, as_of) = self.ask(shard, ask).await?;
                (vec![share], as_of)
            }
            None => self.ask_all(move |live| views::top(live.shard(), &query)).await?,
        };
        Ok((views::merge_top(shares, n), as_of))
    }

    async fn preview(&self, entries: Vec<PriceEntry>) -> ApiResult<PriceEffect> {
        check_prices(&entries)?;
        let diff = self.shared.control.read().book.diff(&entries);
        let diff = diff.map_err(|errors| ApiError::Invalid(join(&errors)))?;
        let entries = Arc::new(entries);
        let (effects, as_of) =
            self.ask_all(move |live| views::preview(live.shard(), &entries)).await?;
        let mut orgs: Vec<OrgEffect> = Vec::new();
        for effect in effects {
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

    async fn letters(&self, query: DeadLetterQuery) -> ApiResult<Vec<DeadLetter>> {
        let before = query.before.as_deref().map(letter_id).transpose()?;
        let mut found: Vec<DeadLetter> = Vec::new();
        let shards: Vec<ShardId> =
            self.all_shards().filter(|s| query.shard.is_none_or(|only| only == *s)).collect();
        for shard in shards {
            // Newest shard first is no order in time; ids order within a shard, shards one by one.
            if before.is_some_and(|(of, ..)| shard < of) {
                continue;
            }
            let epochs = self.ask(shard, |live| live.shard().dead_epochs().to_vec()).await?;
            for (epoch, _) in epochs.into_iter().rev() {
                if found.len() >= query.limit {
                    break;
                }
                if before.is_some_and(|(of, at, _)| of == shard && epoch > at) {
                    continue;
                }
                let mut letters = self.letters_of(shard, epoch).await?;
                letters.reverse();
                for mut letter in letters {
                    let (_, at, n) = letter_id(&letter.id)?;
                    if before.is_some_and(|(of, e, m)| of == shard && (at, n) >= (e, m)) {
                        continue;
                    }
                    if query.reason.is_none_or(|reason| reason == letter.reason) {
                        (letter.raw, letter.raw_base64) = (None, None);
                        found.push(letter);
                    }
                }
            }
        }
        found.truncate(query.limit);
        let control = self.shared.control.read();
        for letter in &mut found {
            letter.replayed = control.replayed.get(&letter.id).copied();
        }
        Ok(found)
    }

    /// The dead letters of one committed epoch.
    async fn letters_of(&self, shard: ShardId, epoch: u64) -> ApiResult<Vec<DeadLetter>> {
        let out = self.shared.logs[usize::from(shard.0)].out.clone();
        let unreadable = |error: &dyn std::fmt::Display| {
            ApiError::Unavailable(format!(
                "the output log of shard {shard} cannot be read: {error}"
            ))
        };
        let mut at = first_of_epoch(&*out, epoch).await.map_err(|error| unreadable(&error))?;
        let mut letters = Vec::new();
        loop {
            let records = out.read(at, READ_BYTES).await.map_err(|error| unreadable(&error))?;
            let Some(last) = records.last() else { return Ok(letters) };
            at = last.position + 1;
            for record in &records {
                if epoch_of(record) != Some(epoch) {
                    return Ok(letters);
                }
                if record.message.subject.ends_with(".commit") {
                    return Ok(letters);
                }
                let part: Part = serde_json::from_slice(&record.message.payload)
                    .map_err(|error| unreadable(&error))?;
                if part.part == 0 {
                    // A new attempt: what came before it was never committed.
                    letters.clear();
                }
                letters.extend(part.dead_letters);
            }
        }
    }

    async fn letter(&self, id: &str) -> ApiResult<DeadLetter> {
        let (shard, epoch, n) = letter_id(id)?;
        let missing = || ApiError::NotFound(format!("there is no dead letter {id:?}"));
        if usize::from(shard.0) >= self.shared.logs.len() {
            return Err(missing());
        }
        let committed = self.shared.progress[usize::from(shard.0)].borrow().epoch;
        if epoch > committed {
            return Err(missing());
        }
        let letters = self.letters_of(shard, epoch).await?;
        let mut letter = letters.into_iter().nth(n).ok_or_else(missing)?;
        letter.replayed = self.shared.control.read().replayed.get(id).copied();
        Ok(letter)
    }

    async fn replay(&self, id: String, mended: Option<Bytes>) -> ApiResult<Positions> {
        let letter = self.letter(&id).await?;
        let line = match (mended, letter.raw) {
            (Some(mended), _) => mended,
            (None, Some(_)) if letter.truncated => {
                return Err(ApiError::Invalid(
                    "the line was longer than what is kept; send the mended line".to_owned(),
                ));
            }
            (None, Some(raw)) => raw.into(),
            (None, None) => {
                return Err(ApiError::Invalid(
                    "the line is not UTF-8; send the mended line".to_owned(),
                ));
            }
        };
        let event = meterr_connectors::codec::decode_line(&line).map_err(|rejection| {
            ApiError::Invalid(format!("the line is still refused: {rejection}"))
        })?;
        let shard = self.home(&event.org);
        let mut payload = Vec::new();
        meterr_connectors::codec::encode_native(&event, &mut payload);
        let backfill = if letter.subject.ends_with(".@backfill") { "@backfill" } else { "@batch" };
        let message = Message::new(format!("usage.{shard}.{backfill}"), payload);
        let usage = &self.shared.logs[usize::from(shard.0)].usage;
        let appended = usage.append(vec![message]).await;
        let appended = appended.map_err(|error| ApiError::Unavailable(error.to_string()))?;
        let replayed = DeadLetterReplayed { id, time: now() };
        let mut positions =
            self.change(ControlChange::DeadLetterReplayed(replayed), |_| Ok(())).await?;
        positions.raise(shard, appended.last);
        Ok(positions)
    }

    /// Follows an org. Registered first, then the past is read, so nothing falls between.
    async fn follow_org(
        &self,
        org: String,
        after: Option<StreamId>,
    ) -> ApiResult<BoxStream<'static, StreamEvent>> {
        let shard = self.home(&org);
        let (sender, receiver) = mpsc::channel(FOLLOWER_BACKLOG);
        let name = org.clone();
        let resume = after.filter(|after| after.shard == shard);
        let (snapshot, progress) = self
            .ask(shard, move |live| {
                live.follow(&name, sender);
                let known = resume.is_some_and(|after| after.epoch <= live.progress().epoch);
                let snapshot = (!known).then(|| live.snapshot(&name));
                (snapshot, live.progress())
            })
            .await?;
        let mut first: Vec<StreamEvent> = Vec::new();
        match (snapshot, resume) {
            (Some(snapshot), _) => {
                if after.is_some() {
                    first.push(StreamEvent::Reset);
                }
                first.push(snapshot);
            }
            (None, Some(resume)) => {
                match self.changes_since(shard, &org, resume.epoch, progress.epoch).await {
                    Some(changes) => first.extend(changes.iter().map(|change| {
                        let Change { epoch, as_of, rows } = change;
                        let body = stream_body(shard, *epoch, as_of, rows);
                        StreamEvent::Change { shard, epoch: *epoch, body }
                    })),
                    None => {
                        // Too much to read again: begin anew. The snapshot may be newer than changes
                        // already queued; those are dropped below.
                        let name = org.clone();
                        first.push(StreamEvent::Reset);
                        first.push(self.ask(shard, move |live| live.snapshot(&name)).await?);
                    }
                }
            }
            (None, None) => {}
        }
        let seen = first.iter().filter_map(epoch_of_event).max().unwrap_or(progress.epoch);
        let rest = futures::stream::unfold(receiver, |mut receiver| async move {
            receiver.recv().await.map(|event| (event, receiver))
        });
        let rest = rest.filter(move |event| {
            futures::future::ready(epoch_of_event(event).is_none_or(|epoch| epoch > seen))
        });
        // A drain ends streams from the surface's side, which can say good-bye; the engine only lets go
        // of a follower with its shard.
        Ok(futures::stream::iter(first).chain(rest).boxed())
    }

    /// The messages of an answer to a reader of an org's live changes.
    async fn missed(&self, org: String, after: Option<StreamId>) -> ApiResult<Vec<Bytes>> {
        let shard = self.home(&org);
        let after = after.filter(|after| after.shard == shard).map(|after| after.epoch);
        let name = org.clone();
        let (last, progress, as_of) = self
            .ask(shard, move |live| (live.epoch_of(&name), live.progress(), live.as_of().as_of))
            .await?;
        if let Some(after) = after.filter(|after| *after <= progress.epoch) {
            if last.is_some_and(|last| last <= after) {
                return Ok(vec![announce::current(shard, progress.epoch, &as_of, &org)]);
            }
            if let Some(changes) = self.changes_since(shard, &org, after, progress.epoch).await {
                let mut previous = after;
                let mut messages = Vec::new();
                for Change { epoch, as_of, rows } in &changes {
                    let before = Some(std::mem::replace(&mut previous, *epoch));
                    let kind = LiveKind::Change;
                    messages.extend(announce::rows(kind, shard, *epoch, before, as_of, rows));
                }
                if messages.is_empty() {
                    messages.push(announce::current(shard, progress.epoch, &as_of, &org));
                }
                return Ok(announce::answer(messages));
            }
        }
        let name = org.clone();
        let (rows, progress, as_of) = self
            .ask(shard, move |live| (live.rows(&name), live.progress(), live.as_of().as_of))
            .await?;
        let kind = LiveKind::Snapshot;
        Ok(announce::answer(announce::rows(kind, shard, progress.epoch, None, &as_of, &rows)))
    }

    /// Changes of an org in the epochs after `from`, up to `to`; `None` when that is too much to read.
    async fn changes_since(
        &self,
        shard: ShardId,
        org: &str,
        from: u64,
        to: u64,
    ) -> Option<Vec<Change>> {
        if from >= to {
            return Some(Vec::new());
        }
        let out = self.shared.logs[usize::from(shard.0)].out.clone();
        let mut at = first_of_epoch(&*out, from + 1).await.ok()?;
        let mut found = Vec::new();
        let mut parts: Vec<Record> = Vec::new();
        let mut bytes = 0;
        loop {
            let records = out.read(at, READ_BYTES).await.ok()?;
            // The log ends before the epoch that was committed: it cannot be believed.
            let last = records.last()?;
            at = last.position + 1;
            for record in records {
                bytes += record.message.payload.len();
                if bytes > RESUME_BYTES_MAX {
                    return None;
                }
                if !record.message.subject.ends_with(".commit") {
                    parts.push(record);
                    continue;
                }
                let commit: Commit = serde_json::from_slice(&record.message.payload).ok()?;
                if commit.seal || commit.epoch <= from {
                    parts.clear();
                    continue;
                }
                if commit.epoch > to {
                    return Some(found);
                }
                let mut merged: Option<OrgChanges> = None;
                for part in own_parts(&parts, &commit, record.position).ok()? {
                    for changes in followed(&part.message.payload, |name| name == org) {
                        match &mut merged {
                            None => merged = Some(changes),
                            Some(merged) => {
                                for (view, rows) in changes.views {
                                    merged.views.entry(view).or_default().extend(rows);
                                }
                            }
                        }
                    }
                }
                parts.clear();
                if let Some(rows) = merged {
                    let mut as_of = Positions {
                        control: Some(commit.control_position),
                        ..Positions::default()
                    };
                    as_of.raise(shard, commit.usage_position);
                    found.push(Change { epoch: commit.epoch, as_of, rows });
                }
                if commit.epoch == to {
                    return Some(found);
                }
            }
        }
    }
}

/// What one commit changed of an org.
struct Change {
    epoch: u64,
    as_of: Positions,
    rows: OrgChanges,
}

fn epoch_of_event(event: &StreamEvent) -> Option<u64> {
    match event {
        StreamEvent::Snapshot { epoch, .. } | StreamEvent::Change { epoch, .. } => Some(*epoch),
        StreamEvent::Reset => None,
    }
}

/// The epoch a record of an output log belongs to: every body begins with it.
fn epoch_of(record: &Record) -> Option<u64> {
    let rest = record.message.payload.strip_prefix(b"{\"epoch\":")?;
    let digits = rest.iter().take_while(|b| b.is_ascii_digit()).count();
    std::str::from_utf8(&rest[..digits]).ok()?.parse().ok()
}

/// First position of an epoch in an output log. Epochs never fall there, so halving finds it.
async fn first_of_epoch(out: &dyn Log, epoch: u64) -> Result<u64, String> {
    let (mut low, mut high) = (out.first(), out.head() + 1);
    while low < high {
        let middle = low + (high - low) / 2;
        let records = out.read(middle, 1).await.map_err(|error| error.to_string())?;
        let record = records.first().ok_or("a position below the head is missing")?;
        let of = epoch_of(record).ok_or("a record without an epoch")?;
        if of < epoch { low = middle + 1 } else { high = middle }
    }
    Ok(low)
}

fn letter_id(id: &str) -> ApiResult<(ShardId, u64, usize)> {
    let parse = || -> Option<(ShardId, u64, usize)> {
        let mut parts = id.splitn(3, '-');
        let shard = parts.next()?.parse().ok()?;
        let epoch = parts.next()?.parse().ok()?;
        let n = parts.next()?.parse().ok()?;
        Some((ShardId(shard), epoch, n))
    };
    parse().ok_or_else(|| {
        ApiError::Invalid(format!(
            "{:?} is no dead letter id such as \"3-17-0\"",
            meterr_operators::event::excerpt(id)
        ))
    })
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
        boxed(async move {
            let shard = service.home(&org);
            service.wait(min_position.as_ref(), Some(shard)).await?;
            service
                .ask(shard, move |live| (views::unpriced(live.shard(), &org), live.as_of()))
                .await
        })
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
        boxed(async move {
            let shard = service.home(&query.org);
            service.wait(query.min_position.as_ref(), Some(shard)).await?;
            let known = name.clone();
            let rows = service
                .ask(shard, move |live| {
                    let as_of = live.as_of();
                    views::declared(live.shard(), &name, &query)
                        .map(|rows| SpendAnswer { rows, as_of })
                })
                .await?;
            rows.ok_or_else(|| ApiError::NotFound(format!("there is no declared view {known:?}")))
        })
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
        let status = self.shared.status();
        boxed(async move { status })
    }

    fn metrics(&self) -> String {
        self.shared.metrics.render()
    }
}
