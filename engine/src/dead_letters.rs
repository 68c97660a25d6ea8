//! Dead letters: which epochs have some is asked of the shard, what they say is read from its output
//! log, which every node can.

use bytes::Bytes;
use meterr_connectors::api::{ApiError, ApiResult, DeadLetter, DeadLetterQuery};
use meterr_connectors::log::Message;
use meterr_operators::control::{ControlChange, DeadLetterReplayed};
use meterr_operators::ids::{Positions, ShardId};

use crate::asking::strange;
use crate::catch_up::{epoch_of, first_of_epoch};
use crate::node::now;
use crate::questions::{ShardAnswer, ShardQuestion};
use crate::records::READ_BYTES;
use crate::service::Service;
use crate::wire::Part;

impl Service {
    pub(crate) async fn letters(&self, query: DeadLetterQuery) -> ApiResult<Vec<DeadLetter>> {
        let before = query.before.as_deref().map(letter_id).transpose()?;
        let mut found: Vec<DeadLetter> = Vec::new();
        let shards: Vec<ShardId> =
            self.all_shards().filter(|s| query.shard.is_none_or(|only| only == *s)).collect();
        for shard in shards {
            // Newest shard first is no order in time; ids order within a shard, shards one by one.
            if before.is_some_and(|(of, ..)| shard < of) {
                continue;
            }
            let answered = self.ask(shard, ShardQuestion::DeadEpochs, None).await?;
            self.readable(shard, answered.commit).await?;
            let ShardAnswer::DeadEpochs(epochs) = answered.answer else {
                return Err(strange(shard));
            };
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
                let part =
                    Part::read(&record.message.payload).map_err(|error| unreadable(&error))?;
                if part.part == 0 {
                    // A new attempt: what came before it was never committed.
                    letters.clear();
                }
                letters.extend(part.dead_letters);
            }
        }
    }

    pub(crate) async fn letter(&self, id: &str) -> ApiResult<DeadLetter> {
        let (shard, epoch, n) = letter_id(id)?;
        let missing = || ApiError::NotFound(format!("there is no dead letter {id:?}"));
        if usize::from(shard.0) >= self.shared.logs.len() {
            return Err(missing());
        }
        let answered = self.ask(shard, ShardQuestion::Progress, None).await?;
        if epoch > answered.epoch {
            return Err(missing());
        }
        self.readable(shard, answered.commit).await?;
        let letters = self.letters_of(shard, epoch).await?;
        let mut letter = letters.into_iter().nth(n).ok_or_else(missing)?;
        letter.replayed = self.shared.control.read().replayed.get(id).copied();
        Ok(letter)
    }

    pub(crate) async fn replay(&self, id: String, mended: Option<Bytes>) -> ApiResult<Positions> {
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
