//! Random histories of commits, losses and answers against what the engine really committed.

use std::collections::{BTreeMap, VecDeque};

use meterr_operators::ids::{Positions, ShardId};
use meterr_operators::rng::Rng;

use super::*;
use crate::changes::{Row, figures_of};

const ORG: &str = "acme";

fn row(key: u64, events: i64) -> Row {
    let figures = figures_of(events, &[0; 10], None, Default::default(), 0);
    Row { window_start: None, key: Some(key.to_string()), figures }
}

fn message(kind: LiveKind, epoch: u64, previous: Option<u64>, rows: Vec<Row>) -> LiveMessage {
    LiveMessage {
        kind,
        shard: ShardId(3),
        epoch,
        previous,
        as_of: Positions::default(),
        org: ORG.to_owned(),
        piece: 0,
        pieces: 1,
        more: false,
        views: BTreeMap::from([("user_all".to_owned(), rows)]),
    }
}

/// A message cut into pieces of a row or two.
fn cut(message: LiveMessage, rng: &mut Rng) -> Vec<LiveMessage> {
    let rows = &message.views["user_all"];
    if rows.len() < 2 || rng.percent(60) {
        return vec![message];
    }
    let size = 1 + rng.below(2) as usize;
    let lists: Vec<Vec<Row>> = rows.chunks(size).map(<[Row]>::to_vec).collect();
    let pieces = lists.len() as u32;
    let piece = |(n, rows): (usize, Vec<Row>)| LiveMessage {
        piece: n as u32,
        pieces,
        views: BTreeMap::from([("user_all".to_owned(), rows)]),
        ..message.clone()
    };
    lists.into_iter().enumerate().map(piece).collect()
}

/// What was committed: epochs that changed the org, with its rows.
#[derive(Default)]
struct Engine {
    /// Epoch of the shard; other orgs move it as well.
    epoch: u64,
    changes: Vec<LiveMessage>,
}

impl Engine {
    fn commit(&mut self, rng: &mut Rng) -> LiveMessage {
        self.epoch += 1 + rng.below(3);
        let previous = self.changes.last().map_or(0, |change| change.epoch);
        let events = self.changes.len() as i64 + 1;
        let rows = (0..1 + rng.below(4)).map(|_| row(rng.below(6), events)).collect();
        let change = message(LiveKind::Change, self.epoch, Some(previous), rows);
        self.changes.push(change.clone());
        change
    }

    /// Rows by key as at an epoch.
    fn truth(&self, epoch: u64) -> BTreeMap<String, Row> {
        let mut state = BTreeMap::new();
        for change in self.changes.iter().filter(|change| change.epoch <= epoch) {
            apply(&mut state, change);
        }
        state
    }

    /// A deployment that was set up anew.
    fn anew(&mut self) {
        *self = Engine::default();
    }

    /// The answer of a node that has seen the commits up to `epoch` and can look back `window` of them.
    fn answer(
        &self,
        after: Option<StreamId>,
        epoch: u64,
        window: usize,
        rng: &mut Rng,
    ) -> Vec<LiveMessage> {
        let seen: Vec<_> = self.changes.iter().filter(|change| change.epoch <= epoch).collect();
        let mut messages = match after.filter(|after| after.epoch <= epoch) {
            Some(after) => {
                let missed: Vec<_> = seen.iter().filter(|c| c.epoch > after.epoch).collect();
                if missed.is_empty() {
                    vec![message(LiveKind::Current, epoch, None, Vec::new())]
                } else if missed.len() <= window {
                    let mut before = after.epoch;
                    let mut answer = Vec::new();
                    for change in missed {
                        let previous = Some(std::mem::replace(&mut before, change.epoch));
                        answer.extend(cut(LiveMessage { previous, ..(*change).clone() }, rng));
                    }
                    answer
                } else {
                    self.snapshot(epoch, rng)
                }
            }
            None => self.snapshot(epoch, rng),
        };
        let last = messages.len() - 1;
        for message in &mut messages[..last] {
            message.more = true;
        }
        messages
    }

    fn snapshot(&self, epoch: u64, rng: &mut Rng) -> Vec<LiveMessage> {
        let rows = self.truth(epoch).into_values().collect();
        cut(message(LiveKind::Snapshot, epoch, None, rows), rng)
    }
}

impl Engine {
    /// Epoch of the last commit of the org.
    fn last(&self) -> Option<u64> {
        self.changes.last().map(|change| change.epoch)
    }
}

fn apply(state: &mut BTreeMap<String, Row>, message: &LiveMessage) {
    for row in &message.views["user_all"] {
        state.insert(row.key.clone().unwrap(), row.clone());
    }
}

/// What a reader made of the events, checked at each of them.
#[derive(Default)]
struct Reader {
    state: BTreeMap<String, Row>,
    epoch: Option<u64>,
    reset: bool,
    changes: usize,
    snapshots: usize,
}

impl Reader {
    fn hear(&mut self, event: LiveEvent, engine: &Engine) {
        match event {
            LiveEvent::Reset => {
                assert!(self.epoch.is_some() && !self.reset);
                self.reset = true;
                return;
            }
            LiveEvent::Snapshot(snapshot) => {
                assert!(self.reset || self.epoch.is_none(), "a snapshot without a reset");
                assert!(self.epoch.is_none_or(|epoch| snapshot.epoch > epoch), "back in time");
                self.reset = false;
                self.state.clear();
                apply(&mut self.state, &snapshot);
                self.epoch = Some(snapshot.epoch);
                self.snapshots += 1;
            }
            LiveEvent::Change(change) => {
                let known = self.epoch.expect("a snapshot comes first");
                assert!(!self.reset);
                let next = engine.changes.iter().find(|c| c.epoch > known).map(|c| c.epoch);
                assert_eq!((change.piece, change.pieces, change.more), (0, 1, false));
                assert_eq!(Some(change.epoch), next, "the very next commit of the org");
                apply(&mut self.state, &change);
                self.epoch = Some(change.epoch);
                self.changes += 1;
            }
        }
        assert_eq!(self.state, engine.truth(self.epoch.unwrap()));
    }
}

/// What is between an engine and a follower.
struct World {
    rng: Rng,
    engine: Engine,
    follower: Follower,
    reader: Reader,
    todo: Vec<Output>,
    /// Percent of messages and answers that are lost.
    lossy: u32,
    /// Commits an engine can look back.
    window: usize,
    /// Live messages under way.
    live: VecDeque<LiveMessage>,
    /// Questions on their way to the engine.
    asked: VecDeque<(u64, Option<StreamId>)>,
    /// Messages of answers under way; nothing at the end of one that is lost in part.
    answers: VecDeque<(u64, Option<LiveMessage>)>,
    put_off: bool,
}

impl World {
    fn new(seed: u64) -> World {
        let mut rng = Rng::new(seed);
        let mut engine = Engine::default();
        for _ in 0..rng.below(4) {
            engine.commit(&mut rng);
        }
        // Small enough for changes not to find room now and then.
        let waiting_bytes = if rng.percent(50) { 4_000 } else { 1 << 20 };
        let limits = Limits { waiting_bytes, ..Limits::default() };
        let (follower, todo) = Follower::new(ORG, limits);
        World {
            lossy: rng.below(40) as u32,
            window: rng.below(6) as usize,
            rng,
            engine,
            follower,
            reader: Reader::default(),
            todo,
            live: VecDeque::new(),
            asked: VecDeque::new(),
            answers: VecDeque::new(),
            put_off: false,
        }
    }

    /// Does what the follower wants.
    fn act(&mut self) {
        for output in std::mem::take(&mut self.todo) {
            match output {
                Output::Ask(number, after) => {
                    assert!(after == self.follower.known() && number == self.follower.questions);
                    self.asked.push_back((number, after));
                    self.put_off = false;
                }
                Output::AskLater(_) => {
                    assert!(!self.follower.asking());
                    self.put_off = true;
                }
                Output::Event(event) => self.reader.hear(event, &self.engine),
            }
        }
        let Follower { waiting, waiting_weight, limits, .. } = &self.follower;
        assert_eq!(*waiting_weight, waiting.values().map(weight).sum::<usize>());
        assert!(*waiting_weight <= limits.waiting_bytes);
        assert!(self.follower.pieces.weight() <= limits.waiting_bytes);
        // What waits is being seen to.
        assert!(waiting.is_empty() || self.follower.asking() || self.put_off);
    }

    fn commit(&mut self) {
        let change = self.engine.commit(&mut self.rng);
        for piece in cut(change, &mut self.rng) {
            if self.rng.percent(self.lossy) {
                continue;
            }
            if self.rng.percent(5) {
                self.live.push_back(piece.clone());
            }
            self.live.push_back(piece);
            if self.rng.percent(5) {
                let (at, len) = (self.rng.below(self.live.len() as u64) as usize, self.live.len());
                self.live.swap(at, len - 1);
            }
        }
    }

    /// The engine answers the oldest question: as of now, or as a node that is behind.
    fn answer(&mut self, calm: bool) {
        let Some((number, after)) = self.asked.pop_front() else { return };
        if !calm && self.rng.percent(self.lossy) {
            return self.answers.push_back((number, None));
        }
        let behind = if !calm && self.rng.percent(20) { self.rng.below(5) } else { 0 };
        let epoch = self.engine.epoch.saturating_sub(behind);
        let answer = self.engine.answer(after, epoch, self.window, &mut self.rng);
        let whole = calm || !self.rng.percent(self.lossy / 2);
        let count = if whole { answer.len() } else { self.rng.below(answer.len() as u64) as usize };
        let mut answer = answer.into_iter().map(|message| (number, Some(message)));
        self.answers.extend(answer.by_ref().take(count));
        if !whole {
            self.answers.push_back((number, None));
        }
        // What comes later than it was waited for.
        if self.rng.percent(50) {
            self.answers.extend(answer);
        }
    }

    fn hear_answer(&mut self) {
        let input = match self.answers.pop_front() {
            Some((number, Some(message))) => Input::Answer(number, message),
            Some((number, None)) => Input::Failed(number),
            None => return,
        };
        self.todo = self.follower.on(input);
    }

    fn hear_live(&mut self) {
        if let Some(message) = self.live.pop_front() {
            self.todo = self.follower.on(Input::Live(message));
        }
    }

    fn doubt(&mut self) {
        self.put_off = false;
        self.todo = self.follower.on(Input::Doubt);
    }

    fn step(&mut self) {
        match self.rng.below(12) {
            0..=2 => self.commit(),
            3..=4 => self.answer(false),
            5..=7 => self.hear_answer(),
            // An engine that was away: what it published meanwhile is lost, its memory short.
            8 if self.rng.percent(5) => {
                self.live.clear();
                self.window = self.rng.below(2) as usize;
            }
            8 => self.doubt(),
            _ => self.hear_live(),
        }
        self.act();
    }

    /// Nothing is lost any more: what is under way arrives, and once it is quiet the follower asks.
    fn calm(&mut self, seed: u64) {
        for _ in 0..1_000 {
            self.act();
            let arrived = self.live.is_empty() && self.answers.is_empty() && self.asked.is_empty();
            match self.rng.below(3) {
                _ if arrived && (self.put_off || self.follower.known().is_none()) => self.doubt(),
                _ if arrived && self.reader.epoch >= self.engine.last() => return,
                _ if arrived => self.doubt(),
                0 => self.answer(true),
                1 => self.hear_answer(),
                _ => self.hear_live(),
            }
        }
        panic!("seed {seed}: not current in the end");
    }
}

#[test]
fn a_reader_sees_every_commit_once_whatever_is_lost() {
    let seeds = std::env::var("METERR_ORACLE_SEEDS").map_or(3_000, |text| text.parse().unwrap());
    let (mut changes, mut snapshots) = (0, 0);
    for seed in 0..seeds {
        let mut world = World::new(seed);
        world.act();
        for _ in 0..120 {
            world.step();
        }
        world.calm(seed);
        let World { reader, engine, .. } = &world;
        assert_eq!(reader.state, engine.truth(engine.epoch), "seed {seed}");
        changes += reader.changes;
        snapshots += reader.snapshots;
    }
    // Otherwise the histories show nothing.
    assert!(changes > 5 * seeds as usize && snapshots > seeds as usize, "{changes} {snapshots}");
}

/// A follower that has taken in an engine's first commits, which are the epochs told.
fn followed(rng: &mut Rng, commits: usize) -> (Engine, Follower) {
    let mut engine = Engine::default();
    for _ in 0..commits {
        engine.commit(rng);
    }
    let (mut follower, out) = Follower::new(ORG, Limits::default());
    assert_eq!(out, [Output::Ask(1, None)]);
    for answer in engine.answer(None, engine.epoch, 9, rng) {
        follower.on(Input::Answer(1, answer));
    }
    assert_eq!(follower.known().unwrap().epoch, engine.epoch);
    (engine, follower)
}

#[test]
fn without_losses_nothing_is_asked_twice() {
    let mut rng = Rng::new(1);
    let (mut engine, mut follower) = followed(&mut rng, 1);
    for _ in 0..100 {
        for piece in cut(engine.commit(&mut rng), &mut rng) {
            for output in follower.on(Input::Live(piece)) {
                assert!(matches!(output, Output::Event(LiveEvent::Change(_))), "{output:?}");
            }
        }
        assert_eq!(follower.known().unwrap().epoch, engine.epoch);
    }
}

#[test]
fn a_question_under_way_holds_up_nothing_that_is_next() {
    let mut rng = Rng::new(2);
    let (mut engine, mut follower) = followed(&mut rng, 2);
    let asked = follower.on(Input::Doubt);
    assert_eq!(asked, [Output::Ask(2, follower.known())]);
    let (before, next) = (engine.epoch, engine.commit(&mut rng));
    let out = follower.on(Input::Live(next.clone()));
    assert_eq!(out, [Output::Event(LiveEvent::Change(next.clone()))]);
    // The answer is as of before, or tells it once more: neither does harm.
    let after = Some(StreamId { shard: ShardId(3), epoch: before });
    for epoch in [before, engine.epoch] {
        let number = follower.questions;
        for message in engine.answer(after, epoch, 9, &mut rng) {
            assert_eq!(follower.on(Input::Answer(number, message)), []);
        }
        assert_eq!(follower.known().unwrap().epoch, next.epoch);
        follower.on(Input::Doubt);
    }
}

#[test]
fn a_change_nobody_knows_is_asked_about_once_and_holds_up_nothing() {
    let mut rng = Rng::new(3);
    let (mut engine, mut follower) = followed(&mut rng, 2);
    let forged = message(LiveKind::Change, u64::MAX, Some(u64::MAX - 1), vec![row(1, 1)]);
    let known = follower.known();
    assert_eq!(follower.on(Input::Live(forged.clone())), [Output::Ask(2, known)]);
    let current = message(LiveKind::Current, engine.epoch, None, Vec::new());
    let out = follower.on(Input::Answer(2, current));
    let useless = Useless::Behind { engine: engine.epoch, heard: u64::MAX };
    assert_eq!(out, [Output::AskLater(useless)]);
    // Until then nothing of the kind leads to a question, and what is next is told.
    assert_eq!(follower.on(Input::Live(forged)), []);
    let next = engine.commit(&mut rng);
    let out = follower.on(Input::Live(next.clone()));
    assert_eq!(out, [Output::Event(LiveEvent::Change(next))]);
    let asked = follower.on(Input::Doubt);
    assert_eq!(asked, [Output::Ask(3, follower.known())]);
}

#[test]
fn changes_in_the_wrong_order_are_put_right() {
    let mut rng = Rng::new(4);
    let (mut engine, mut follower) = followed(&mut rng, 1);
    let [a, b, c] = std::array::from_fn(|_| engine.commit(&mut rng));
    let known = follower.known();
    assert_eq!(follower.on(Input::Live(c.clone())), [Output::Ask(2, known)]);
    assert_eq!(follower.on(Input::Live(b.clone())), []);
    let told = follower.on(Input::Live(a.clone()));
    assert_eq!(told, [a, b, c].map(|change| Output::Event(LiveEvent::Change(change))));
}

#[test]
fn an_answer_that_is_too_long_is_not_kept() {
    let (mut follower, _) = Follower::new(ORG, Limits { answer_bytes: 50_000, waiting_bytes: 0 });
    let mut piece = message(LiveKind::Snapshot, 9, None, vec![row(1, 1); 10]);
    (piece.pieces, piece.more) = (u32::MAX, true);
    loop {
        let out = follower.on(Input::Answer(1, piece.clone()));
        piece.piece += 1;
        match &follower.question {
            Some(question) => assert!(out.is_empty() && question.weight() <= 50_000),
            None => break assert_eq!(out, [Output::AskLater(Useless::TooLong(50_000))]),
        }
    }
    assert!(piece.piece > 5);
}

#[test]
fn an_engine_that_began_anew_is_believed_in_the_end() {
    let mut rng = Rng::new(5);
    let (mut engine, mut follower) = followed(&mut rng, 20);
    let known = follower.known();
    engine.anew();
    engine.commit(&mut rng);
    let snapshot = message(LiveKind::Snapshot, engine.epoch, None, vec![row(1, 1)]);
    for _ in 1..BEHIND_MAX {
        assert_eq!(follower.on(Input::Doubt), [Output::Ask(follower.questions, known)]);
        let out = follower.on(Input::Answer(follower.questions, snapshot.clone()));
        assert!(matches!(out[..], [Output::AskLater(Useless::Behind { .. })]), "{out:?}");
    }
    follower.on(Input::Doubt);
    let out = follower.on(Input::Answer(follower.questions, snapshot.clone()));
    let told = [LiveEvent::Reset, LiveEvent::Snapshot(snapshot)].map(Output::Event);
    assert_eq!(out[..2], told);
    let next = engine.commit(&mut rng);
    let out = follower.on(Input::Live(next.clone()));
    assert_eq!(out, [Output::Event(LiveEvent::Change(next))]);
}

#[test]
fn strange_messages_do_no_harm() {
    let mut rng = Rng::new(9);
    for _ in 0..2_000 {
        let limits = Limits { answer_bytes: 5_000, waiting_bytes: 3_000 };
        let (mut follower, _) = Follower::new(ORG, limits);
        let mut put_off = false;
        for _ in 0..60 {
            let kinds = [LiveKind::Snapshot, LiveKind::Change, LiveKind::Current];
            let extreme = |rng: &mut Rng| [0, 1, 2, 5, u64::MAX][rng.below(5) as usize];
            let strange = LiveMessage {
                shard: ShardId(rng.below(2) as u16),
                piece: extreme(&mut rng) as u32,
                pieces: extreme(&mut rng) as u32,
                more: rng.percent(30),
                org: if rng.percent(10) { "other".to_owned() } else { ORG.to_owned() },
                ..message(
                    kinds[rng.below(3) as usize],
                    extreme(&mut rng),
                    rng.percent(70).then(|| extreme(&mut rng)),
                    vec![row(1, 1)],
                )
            };
            let number = follower.questions;
            let input = match rng.below(4) {
                0 => Input::Answer(number, strange),
                1 => Input::Failed(number - rng.below(2)),
                2 => Input::Doubt,
                _ => Input::Live(strange),
            };
            let doubt = matches!(input, Input::Doubt);
            let out = follower.on(input);
            let asked = out.iter().any(|output| matches!(output, Output::Ask(..)));
            assert!(!(asked && put_off) || doubt, "{out:?}");
            put_off =
                !asked && (put_off && !doubt || matches!(out.last(), Some(Output::AskLater(_))));
            assert!(follower.waiting_weight <= limits.waiting_bytes);
            assert!(follower.pieces.weight() <= limits.waiting_bytes);
            assert!(follower.question.as_ref().is_none_or(|q| q.weight() <= limits.answer_bytes));
        }
    }
}
