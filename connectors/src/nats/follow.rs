//! The reader's side of the live protocol as a pure state machine: messages in, questions and events
//! out. See [`LiveMessage`] for the protocol.
//!
//! What it promises to whoever takes its events: first a snapshot, then the changes of every commit of
//! the org, each once and in order; where too much was missed a [`LiveEvent::Reset`] and a snapshot
//! again. Messages may be lost, doubled, late or out of order, and answers may come from a node that is
//! behind or not come at all.

use std::collections::VecDeque;

use crate::api::StreamId;
use crate::changes::{LiveKind, LiveMessage};

/// Changes kept while a question is under way. More of them are dropped and asked for.
const WAITING_MAX: usize = 1_024;

/// What happens to a follower.
#[derive(Debug, Clone)]
pub enum Input {
    /// A message came by `spend.<org>`.
    Live(LiveMessage),
    /// A message came in answer to this question.
    Answer(u64, LiveMessage),
    /// This question gets no answer, or none that can be read.
    Failed(u64),
    /// Something may have been missed: the connection was lost, or it has been quiet for long.
    Doubt,
}

/// What a follower wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Ask the engine what came after; everything when `None`. Answers come back with the number.
    Ask(u64, Option<StreamId>),
    /// Wait a little, then say [`Input::Doubt`]: the last question was of no use.
    AskLater,
    /// Tell the reader.
    Event(LiveEvent),
}

/// What a reader hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LiveEvent {
    /// Every row of the org at an epoch.
    Snapshot(LiveMessage),
    /// The rows one commit changed.
    Change(LiveMessage),
    /// Too much was missed; a snapshot follows.
    Reset,
}

/// A follower of one org.
#[derive(Debug)]
pub struct Follower {
    org: String,
    /// What the reader knows.
    known: Option<StreamId>,
    /// The question under way, and what came of its answer.
    question: Option<(u64, Vec<LiveMessage>)>,
    questions: u64,
    /// Whether to ask once more when the question under way is over.
    doubt: bool,
    /// Whole changes that cannot be told yet, since something before them may be missing.
    waiting: VecDeque<LiveMessage>,
    /// A change of which not all pieces are here.
    pieces: Vec<LiveMessage>,
}

impl Follower {
    /// A follower that knows nothing; its first output is to ask.
    pub fn new(org: &str) -> (Follower, Vec<Output>) {
        let mut follower = Follower {
            org: org.to_owned(),
            known: None,
            question: None,
            questions: 0,
            doubt: false,
            waiting: VecDeque::new(),
            pieces: Vec::new(),
        };
        let mut out = Vec::new();
        follower.ask(&mut out);
        (follower, out)
    }

    /// What the reader knows: shard and epoch of the last event told.
    pub fn known(&self) -> Option<StreamId> {
        self.known
    }

    /// Whether a question is under way.
    pub fn asking(&self) -> bool {
        self.question.is_some()
    }

    /// Takes in what happened.
    pub fn on(&mut self, input: Input) -> Vec<Output> {
        let mut out = Vec::new();
        match input {
            Input::Live(message) => self.live(message, &mut out),
            Input::Answer(number, message) => self.answer(number, message, &mut out),
            Input::Failed(number) => {
                if self.question.as_ref().is_some_and(|(asked, _)| *asked == number) {
                    self.question = None;
                    self.doubt = false;
                    out.push(Output::AskLater);
                }
            }
            Input::Doubt if self.asking() => self.doubt = true,
            Input::Doubt => self.ask(&mut out),
        }
        out
    }

    fn ask(&mut self, out: &mut Vec<Output>) {
        self.questions += 1;
        self.question = Some((self.questions, Vec::new()));
        self.doubt = false;
        out.push(Output::Ask(self.questions, self.known));
    }

    fn live(&mut self, message: LiveMessage, out: &mut Vec<Output>) {
        if message.org != self.org || message.kind != LiveKind::Change {
            return;
        }
        // Of a change that is known already no piece is needed.
        if self.known.is_some_and(|known| message.epoch <= known.epoch) {
            return;
        }
        if self.pieces.last().is_some_and(|last| !follows(last, &message)) {
            self.pieces.clear();
            self.doubted(out);
        }
        if self.pieces.is_empty() && message.piece != 0 {
            return self.doubted(out);
        }
        self.pieces.push(message);
        if let Some(change) = whole(&mut self.pieces) {
            self.change(change, out);
        }
    }

    /// Something is missing that no message to come will show.
    fn doubted(&mut self, out: &mut Vec<Output>) {
        if self.asking() {
            self.doubt = true;
        } else {
            self.ask(out);
        }
    }

    /// Tells a change if nothing before it is missing.
    fn change(&mut self, change: LiveMessage, out: &mut Vec<Output>) {
        let Some(known) = self.known.filter(|_| self.waiting.is_empty() && !self.asking()) else {
            return self.keep(change, out);
        };
        if change.epoch <= known.epoch {
            return;
        }
        // A change that does not say what was before it may have missed anything.
        if change.shard != known.shard || change.previous.is_none_or(|before| before > known.epoch)
        {
            return self.keep(change, out);
        }
        self.known = Some(StreamId { epoch: change.epoch, ..known });
        out.push(Output::Event(LiveEvent::Change(change)));
    }

    fn keep(&mut self, change: LiveMessage, out: &mut Vec<Output>) {
        if self.waiting.len() == WAITING_MAX {
            self.waiting.clear();
            self.doubt = true;
        }
        self.waiting.push_back(change);
        if !self.asking() {
            self.ask(out);
        }
    }

    fn answer(&mut self, number: u64, message: LiveMessage, out: &mut Vec<Output>) {
        let Some((asked, messages)) = &mut self.question else { return };
        if *asked != number {
            return;
        }
        let more = message.more;
        messages.push(message);
        if more {
            return;
        }
        let messages = std::mem::take(messages);
        self.question = None;
        if !self.take_answer(messages, out) {
            self.doubt = false;
            out.push(Output::AskLater);
            return;
        }
        for change in std::mem::take(&mut self.waiting) {
            self.change(change, out);
        }
        if self.doubt && !self.asking() {
            self.ask(out);
        }
    }

    /// Takes in a whole answer; false when it is of no use.
    fn take_answer(&mut self, messages: Vec<LiveMessage>, out: &mut Vec<Output>) -> bool {
        if messages.iter().any(|message| message.org != self.org) {
            return false;
        }
        let mut found = Vec::new();
        let mut pieces: Vec<LiveMessage> = Vec::new();
        for message in messages {
            let begins = pieces.is_empty() && message.piece == 0;
            if !begins && !pieces.last().is_some_and(|last| follows(last, &message)) {
                return false;
            }
            pieces.push(message);
            found.extend(whole(&mut pieces));
        }
        if !pieces.is_empty() {
            return false;
        }
        let Some(first) = found.first() else { return false };
        // A node that is behind knows less than the reader.
        let of = StreamId { shard: first.shard, epoch: first.epoch };
        let behind = |known: &StreamId| known.shard == of.shard && of.epoch < known.epoch;
        match (first.kind, self.known) {
            (LiveKind::Current, Some(known)) => {
                if behind(&known) || known.shard != of.shard {
                    return false;
                }
                self.known = Some(of);
                true
            }
            (LiveKind::Snapshot, known) => {
                if known.as_ref().is_some_and(behind) {
                    return false;
                }
                if known == Some(of) {
                    return true;
                }
                if known.is_some() {
                    out.push(Output::Event(LiveEvent::Reset));
                }
                self.known = Some(of);
                out.extend(found.drain(..1).map(|m| Output::Event(LiveEvent::Snapshot(m))));
                true
            }
            (LiveKind::Change, Some(mut known)) => {
                let mut told = Vec::new();
                for change in found {
                    if change.kind != LiveKind::Change || change.shard != known.shard {
                        return false;
                    }
                    if change.epoch <= known.epoch {
                        continue;
                    }
                    if change.previous.is_none_or(|before| before > known.epoch) {
                        return false;
                    }
                    known.epoch = change.epoch;
                    told.push(Output::Event(LiveEvent::Change(change)));
                }
                self.known = Some(known);
                out.extend(told);
                true
            }
            (LiveKind::Current | LiveKind::Change, None) => false,
        }
    }
}

/// Whether a piece is the next one after another.
fn follows(last: &LiveMessage, next: &LiveMessage) -> bool {
    (next.kind, next.shard, next.epoch, next.pieces)
        == (last.kind, last.shard, last.epoch, last.pieces)
        && last.piece.checked_add(1) == Some(next.piece)
}

/// The whole of the pieces, if the last one is there.
fn whole(pieces: &mut Vec<LiveMessage>) -> Option<LiveMessage> {
    let last = pieces.last()?;
    if last.piece.saturating_add(1) < last.pieces {
        return None;
    }
    let mut pieces = std::mem::take(pieces).into_iter();
    let mut whole = pieces.next()?;
    for piece in pieces {
        for (view, rows) in piece.views {
            whole.views.entry(view).or_default().extend(rows);
        }
    }
    (whole.piece, whole.pieces, whole.more) = (0, 1, false);
    Some(whole)
}

#[cfg(test)]
#[path = "follow_tests.rs"]
mod tests;
