//! The reader's side of the live protocol as a pure state machine: messages in, questions and events
//! out. See [`LiveMessage`] for the protocol.
//!
//! What it promises to whoever takes its events: first a snapshot, then the changes of every commit of
//! the org, each once and in order; where too much was missed a [`LiveEvent::Reset`] and a snapshot
//! again. Messages may be lost, doubled, late or out of order, and answers may come from a node that is
//! behind or not come at all.
//!
//! How: a change names the commit of the org before it, so it can be told as soon as that one is
//! known, whether or not a question is under way. Others wait, within [`Limits`], for what is missing.
//! One question is under way at a time; what comes in answer to an older one is dropped. After an
//! answer that was of no use the next question comes later, so that no message, however strange, and
//! no node that is behind is asked about in a tight loop.
//!
//! An engine whose epochs have gone back, by a deployment that was set up anew, says less than the
//! reader knows. That may also be a node that is behind, so it is believed only when
//! [`BEHIND_MAX`] answers in a row say so: then a `Reset` and a snapshot follow.

use std::collections::BTreeMap;
use std::fmt;

use crate::api::StreamId;
use crate::changes::{LiveKind, LiveMessage};

mod answer;
mod pieces;
#[cfg(test)]
mod tests;

use answer::Question;
pub(in crate::nats) use pieces::weight;
use pieces::{Pieces, Taken};

/// So many answers in a row that know less than the reader mean that the engine began anew.
pub const BEHIND_MAX: u32 = 10;

/// What a follower keeps at most, in bytes of memory, roughly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Of one answer: a snapshot is every row of the org. 1 GiB unless set.
    pub answer_bytes: usize,
    /// Of changes that wait for others, and of one that is not whole yet. Beyond them they are
    /// dropped and asked for. 64 MiB unless set.
    pub waiting_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { answer_bytes: 1 << 30, waiting_bytes: 64 << 20 }
    }
}

/// What happens to a follower.
#[derive(Debug, Clone)]
pub enum Input {
    /// A message came by `spend.<org>`.
    Live(LiveMessage),
    /// A message came in answer to this question.
    Answer(u64, LiveMessage),
    /// This question gets no answer, or none that can be read.
    Failed(u64),
    /// Something may have been missed: the connection was lost, messages were dropped, it has been
    /// quiet for long, or the time of [`Output::AskLater`] has come.
    Doubt,
}

/// What a follower wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Ask the engine what came after; everything when `None`. Answers come back with the number. The
    /// question before, if one is under way, is given up.
    Ask(u64, Option<StreamId>),
    /// Wait a little, then say [`Input::Doubt`]: the last question was of no use.
    AskLater(Useless),
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

/// Why a question was of no use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Useless {
    /// No answer.
    Failed,
    /// The engine has not come as far as this epoch, which was heard of before it was asked.
    Behind {
        /// Epoch of the answer.
        engine: u64,
        /// Epoch heard of.
        heard: u64,
    },
    /// The answer takes more memory than [`Limits::answer_bytes`].
    TooLong(usize),
    /// The answer is none to this question.
    Strange(&'static str),
}

impl fmt::Display for Useless {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Useless::Failed => write!(f, "no answer"),
            Useless::Behind { engine, heard } => {
                write!(f, "the engine answers as of epoch {engine}, before {heard}")
            }
            Useless::TooLong(max) => write!(
                f,
                "the answer takes more than {max} bytes of memory: raise the limit of an answer"
            ),
            Useless::Strange(what) => write!(f, "the answer makes no sense: {what}"),
        }
    }
}

/// A follower of one org.
#[derive(Debug)]
pub struct Follower {
    org: String,
    limits: Limits,
    /// What the reader knows.
    known: Option<StreamId>,
    question: Option<Question>,
    /// Questions asked so far.
    questions: u64,
    /// Whether to ask once more when the question under way is over.
    doubt: bool,
    /// The next question has to wait for [`Input::Doubt`].
    later: bool,
    /// Whole changes that cannot be told yet, since something before them is missing, by epoch.
    waiting: BTreeMap<u64, LiveMessage>,
    waiting_weight: usize,
    /// A change of which not all pieces are here.
    pieces: Pieces,
    /// Answers in a row that knew less than the reader.
    behind: u32,
}

impl Follower {
    /// A follower that knows nothing; its first output is to ask.
    pub fn new(org: &str, limits: Limits) -> (Follower, Vec<Output>) {
        let mut follower = Follower {
            org: org.to_owned(),
            limits,
            known: None,
            question: None,
            questions: 0,
            doubt: false,
            later: false,
            waiting: BTreeMap::new(),
            waiting_weight: 0,
            pieces: Pieces::default(),
            behind: 0,
        };
        let mut out = Vec::new();
        follower.ask(&mut out);
        (follower, out)
    }

    /// What the reader knows: shard and epoch of the last event told, or a later one up to which
    /// nothing changed.
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
            Input::Answer(number, message) => {
                if let Some(question) = self.question.take_if(|asked| asked.number == number) {
                    self.answer(question, message, &mut out);
                }
            }
            Input::Failed(number) => {
                if self.question.take_if(|asked| asked.number == number).is_some() {
                    self.put_off(Useless::Failed, &mut out);
                }
            }
            Input::Doubt => {
                self.later = false;
                self.doubted(&mut out);
            }
        }
        out
    }

    fn ask(&mut self, out: &mut Vec<Output>) {
        self.questions += 1;
        (self.doubt, self.later) = (false, false);
        let gap = self.waiting.first_key_value().map(|(epoch, _)| *epoch);
        self.question = Some(Question::new(self.questions, self.known, gap));
        out.push(Output::Ask(self.questions, self.known));
    }

    /// Something is missing that no message to come may show: asks, or does when it is time to.
    fn doubted(&mut self, out: &mut Vec<Output>) {
        if self.asking() {
            self.doubt = true;
        } else if !self.later {
            self.ask(out);
        }
    }

    /// The last question was of no use. What is asked later is everything that is missing by then.
    fn put_off(&mut self, why: Useless, out: &mut Vec<Output>) {
        (self.doubt, self.later) = (false, true);
        out.push(Output::AskLater(why));
    }

    fn live(&mut self, message: LiveMessage, out: &mut Vec<Output>) {
        // Of a change that is known already no piece is needed.
        if message.org != self.org || message.kind != LiveKind::Change || self.knows(&message) {
            return;
        }
        let Taken { whole, lost } = self.pieces.take(message, self.limits.waiting_bytes);
        if let Some(change) = whole {
            self.change(change, out);
        }
        if lost {
            self.doubted(out);
        }
    }

    /// Whether a change is included in what the reader knows.
    fn knows(&self, change: &LiveMessage) -> bool {
        self.known.is_some_and(|known| known.shard == change.shard && change.epoch <= known.epoch)
    }

    /// Whether a change is the next one. One that does not say what was before it is not.
    fn next(&self, change: &LiveMessage) -> bool {
        let follows = |known: StreamId| {
            known.shard == change.shard
                && known.epoch < change.epoch
                && change.previous.is_some_and(|before| before <= known.epoch)
        };
        self.known.is_some_and(follows)
    }

    /// Tells a change, or keeps it until what is missing before it is there.
    fn change(&mut self, change: LiveMessage, out: &mut Vec<Output>) {
        if self.next(&change) {
            self.tell(change, out);
            self.tell_waiting(out);
            return;
        }
        if self.waiting.contains_key(&change.epoch) {
            return;
        }
        let more = self.waiting_weight.saturating_add(weight(&change));
        if more > self.limits.waiting_bytes {
            self.forget_waiting();
        } else {
            self.waiting_weight = more;
            self.waiting.insert(change.epoch, change);
        }
        // A question under way is looked at again when it is over: it may bring what is missing.
        if self.known.is_some() && !self.asking() {
            self.doubted(out);
        }
    }

    fn tell(&mut self, change: LiveMessage, out: &mut Vec<Output>) {
        self.known = Some(StreamId { shard: change.shard, epoch: change.epoch });
        out.push(Output::Event(LiveEvent::Change(change)));
    }

    /// Tells the changes that can be told by now, and drops those that are known.
    fn tell_waiting(&mut self, out: &mut Vec<Output>) {
        while let Some((_, change)) = self.waiting.first_key_value() {
            let elsewhere = self.known.is_some_and(|known| known.shard != change.shard);
            let (over, next) = (elsewhere || self.knows(change), self.next(change));
            if !over && !next {
                return;
            }
            let Some((_, change)) = self.waiting.pop_first() else { return };
            self.waiting_weight = self.waiting_weight.saturating_sub(weight(&change));
            if next {
                self.tell(change, out);
            }
        }
    }

    fn forget_waiting(&mut self) {
        self.waiting.clear();
        self.waiting_weight = 0;
        // Once a question is over, what was forgotten has to be asked for.
        self.doubt = true;
    }
}
