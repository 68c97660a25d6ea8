//! Random histories of commits, losses and answers against what the engine really committed.

use std::collections::BTreeMap;

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
                assert_eq!(Some(change.epoch), next, "the very next commit of the org");
                apply(&mut self.state, &change);
                self.epoch = Some(change.epoch);
                self.changes += 1;
            }
        }
        assert_eq!(self.state, engine.truth(self.epoch.unwrap()));
    }
}

fn history(seed: u64) -> (usize, usize) {
    let mut rng = Rng::new(seed);
    let mut engine = Engine::default();
    let mut reader = Reader::default();
    for _ in 0..rng.below(4) {
        engine.commit(&mut rng);
    }
    let (mut follower, mut todo) = Follower::new(ORG);
    let window = rng.below(6) as usize;
    let (lossy, steps) = (rng.below(40) as u32, 60);
    // Messages under way, in order; questions under way; questions put off.
    let mut live: VecDeque<LiveMessage> = VecDeque::new();
    let mut asked: VecDeque<(u64, Option<StreamId>)> = VecDeque::new();
    let mut later = false;
    for step in 0.. {
        let calm = step >= steps;
        for output in std::mem::take(&mut todo) {
            match output {
                Output::Ask(number, after) => asked.push_back((number, after)),
                Output::AskLater => later = true,
                Output::Event(event) => reader.hear(event, &engine),
            }
        }
        assert!(asked.len() <= 1 || !calm);
        let due = calm && live.is_empty() && asked.is_empty() && !later;
        if due && reader.epoch == Some(engine.epoch) {
            break;
        }
        assert!(step < steps + 200, "seed {seed}: not current in the end");
        match rng.below(6) {
            0 | 1 if !calm => {
                let change = engine.commit(&mut rng);
                for piece in cut(change, &mut rng) {
                    if rng.percent(lossy) {
                        continue;
                    }
                    if rng.percent(5) {
                        live.push_back(piece.clone());
                    }
                    live.push_back(piece);
                    if rng.percent(5) {
                        let (at, len) = (rng.below(live.len() as u64) as usize, live.len());
                        live.swap(at, len - 1);
                    }
                }
            }
            2 => {
                if let Some((number, after)) = asked.pop_front() {
                    if !calm && rng.percent(lossy) {
                        todo = follower.on(Input::Failed(number));
                        continue;
                    }
                    // Some nodes are behind.
                    let behind = if !calm && rng.percent(20) { rng.below(5) } else { 0 };
                    let epoch = engine.epoch.saturating_sub(behind);
                    let answer = engine.answer(after, epoch, window, &mut rng);
                    let cut_short = !calm && rng.percent(lossy / 2);
                    let count = if cut_short { answer.len() - 1 } else { answer.len() };
                    for message in answer.into_iter().take(count) {
                        todo.extend(follower.on(Input::Answer(number, message)));
                        // Live messages come in between.
                        if let Some(message) = live.pop_front() {
                            todo.extend(follower.on(Input::Live(message)));
                        }
                    }
                    if cut_short {
                        todo.extend(follower.on(Input::Failed(number)));
                    }
                }
            }
            3 => {
                later = false;
                todo = follower.on(Input::Doubt);
            }
            _ => {
                if let Some(message) = live.pop_front() {
                    todo = follower.on(Input::Live(message));
                }
            }
        }
    }
    assert_eq!(reader.state, engine.truth(engine.epoch));
    (reader.changes, reader.snapshots)
}

#[test]
fn a_reader_sees_every_commit_once_whatever_is_lost() {
    let seeds = std::env::var("METERR_ORACLE_SEEDS").map_or(3_000, |text| text.parse().unwrap());
    let (mut changes, mut snapshots) = (0, 0);
    for seed in 0..seeds {
        let (more_changes, more_snapshots) = history(seed);
        changes += more_changes;
        snapshots += more_snapshots;
    }
    // Otherwise the histories show nothing.
    assert!(changes > 4 * seeds as usize && snapshots > seeds as usize, "{changes} {snapshots}");
}

#[test]
fn without_losses_nothing_is_asked_twice() {
    let mut rng = Rng::new(1);
    let mut engine = Engine::default();
    engine.commit(&mut rng);
    let (mut follower, out) = Follower::new(ORG);
    assert_eq!(out, [Output::Ask(1, None)]);
    for answer in engine.answer(None, engine.epoch, 9, &mut rng) {
        follower.on(Input::Answer(1, answer));
    }
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
fn strange_messages_do_no_harm() {
    let mut rng = Rng::new(9);
    for _ in 0..2_000 {
        let (mut follower, _) = Follower::new(ORG);
        for _ in 0..30 {
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
            match rng.below(4) {
                0 => follower.on(Input::Answer(number, strange)),
                1 => follower.on(Input::Failed(rng.below(3))),
                2 => follower.on(Input::Doubt),
                _ => follower.on(Input::Live(strange)),
            };
            assert!(follower.waiting.len() <= WAITING_MAX);
        }
    }
}
