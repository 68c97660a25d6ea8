//! Answers: collected message by message, then taken in as a whole or not at all.

use super::pieces::{Pieces, weight};
use super::{BEHIND_MAX, Follower, LiveEvent, Output, Useless};
use crate::api::StreamId;
use crate::changes::{LiveKind, LiveMessage};

/// A question under way, and its answer so far.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) number: u64,
    after: Option<StreamId>,
    /// Epoch of the first change that waited when it was asked: a useful answer comes as far.
    gap: Option<u64>,
    found: Vec<LiveMessage>,
    pieces: Pieces,
    /// What all messages so far weigh.
    weight: usize,
}

impl Question {
    pub(super) fn new(number: u64, after: Option<StreamId>, gap: Option<u64>) -> Question {
        Question { number, after, gap, found: Vec::new(), pieces: Pieces::default(), weight: 0 }
    }

    #[cfg(test)]
    pub(super) fn weight(&self) -> usize {
        self.weight
    }

    fn take(&mut self, message: LiveMessage, org: &str, bytes_max: usize) -> Result<(), Useless> {
        if message.org != org {
            return Err(Useless::Strange("it is about another org"));
        }
        self.weight = self.weight.saturating_add(weight(&message));
        if self.weight > bytes_max {
            return Err(Useless::TooLong(bytes_max));
        }
        let more = message.more;
        let taken = self.pieces.take(message, usize::MAX);
        self.found.extend(taken.whole);
        match taken.lost || (!more && !self.pieces.is_empty()) {
            true => Err(Useless::Strange("a piece is missing")),
            false => Ok(()),
        }
    }
}

impl Follower {
    /// Takes the next message of an answer.
    pub(super) fn answer(
        &mut self,
        mut question: Question,
        message: LiveMessage,
        out: &mut Vec<Output>,
    ) {
        let more = message.more;
        let gap = question.gap;
        match question.take(message, &self.org, self.limits.answer_bytes) {
            Ok(()) if more => {
                self.question = Some(question);
                return;
            }
            taken => {
                if let Err(why) = taken.and_then(|()| self.whole_answer(question, out)) {
                    return self.put_off(why, out);
                }
            }
        }
        self.behind = 0;
        self.tell_waiting(out);
        let engine = self.known.map_or(0, |known| known.epoch);
        match gap {
            Some(heard) if heard > engine && !self.waiting.is_empty() => {
                // By the time it is asked again, the engine has what waits here, or never had it.
                self.forget_waiting();
                self.put_off(Useless::Behind { engine, heard }, out);
            }
            _ if self.doubt || !self.waiting.is_empty() => self.ask(out),
            _ => {}
        }
    }

    fn whole_answer(&mut self, question: Question, out: &mut Vec<Output>) -> Result<(), Useless> {
        let Question { after, mut found, .. } = question;
        let single = found.len() == 1;
        match (found.first().map(|first| first.kind), after) {
            (Some(LiveKind::Change), Some(after)) => self.missed(after, found, out),
            (Some(LiveKind::Current), Some(after)) if single => {
                let of = StreamId { shard: found[0].shard, epoch: found[0].epoch };
                if of.shard != after.shard {
                    return Err(Useless::Strange("the org is in another shard"));
                }
                if of.epoch < after.epoch {
                    return Err(Useless::Behind { engine: of.epoch, heard: after.epoch });
                }
                // Meanwhile the reader may know more.
                if self.known.is_some_and(|known| known.epoch < of.epoch) {
                    self.known = Some(of);
                }
                Ok(())
            }
            (Some(LiveKind::Snapshot), after) if single => match found.pop() {
                Some(snapshot) => self.snapshot(after, snapshot, out),
                None => Err(Useless::Strange("it is empty")),
            },
            _ => Err(Useless::Strange("it answers another question")),
        }
    }

    fn snapshot(
        &mut self,
        after: Option<StreamId>,
        snapshot: LiveMessage,
        out: &mut Vec<Output>,
    ) -> Result<(), Useless> {
        let of = StreamId { shard: snapshot.shard, epoch: snapshot.epoch };
        let newer = |than: StreamId| of.shard != than.shard || of.epoch > than.epoch;
        if let Some(after) = after.filter(|after| !newer(*after) && of != *after) {
            self.behind = self.behind.saturating_add(1);
            if self.behind < BEHIND_MAX || self.known != Some(after) {
                return Err(Useless::Behind { engine: of.epoch, heard: after.epoch });
            }
            // It began anew, and nothing that was heard before counts.
            self.forget_waiting();
            self.pieces.clear();
        } else if self.known.is_some_and(|known| !newer(known)) {
            return Ok(());
        }
        if self.known.replace(of).is_some() {
            out.push(Output::Event(LiveEvent::Reset));
        }
        out.push(Output::Event(LiveEvent::Snapshot(snapshot)));
        Ok(())
    }

    /// The changes after `after`. Some of them may have been told meanwhile.
    fn missed(
        &mut self,
        after: StreamId,
        found: Vec<LiveMessage>,
        out: &mut Vec<Output>,
    ) -> Result<(), Useless> {
        let mut last = after.epoch;
        let mut told = Vec::new();
        for change in found {
            if change.kind != LiveKind::Change || change.shard != after.shard {
                return Err(Useless::Strange("changes and something else"));
            }
            if change.epoch <= last {
                continue;
            }
            if change.previous.is_none_or(|before| before > last) {
                return Err(Useless::Strange("a change is missing"));
            }
            last = change.epoch;
            if !self.knows(&change) {
                told.push(change);
            }
        }
        for change in told {
            self.tell(change, out);
        }
        Ok(())
    }
}
