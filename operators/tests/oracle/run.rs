//! Histories through shards on worker threads, and through the oracle.

use std::collections::BTreeMap;
use std::time::Duration;

use differential_dataflow::difference::Multiply;
use meterr_operators::control::ControlChange;
use meterr_operators::dataflow::price_at;
use meterr_operators::dedupe::Place;
use meterr_operators::event::{Event, HashKey};
use meterr_operators::histories::{Step, UsageMessage};
use meterr_operators::ids::ShardId;
use meterr_operators::reference::{Reference, Refused};
use meterr_operators::rollup::{View, ViewSet};
use meterr_operators::shard::{History, Incoming, Shard};
use meterr_operators::time::Slot;
use meterr_operators::usage::Spend;
use timely::WorkerConfig;
use timely::communication::Allocator;
use timely::communication::allocator::thread::Thread;
use timely::worker::Worker;

use crate::show::{Changes, Rows, Shown, declared_of, differ, expected, rows_differ, rows_of};

const KEY: HashKey = HashKey(*b"key of the tests");

/// What lies between two boundaries. Control changes come first.
#[derive(Debug, Clone, Default)]
pub struct Epoch {
    pub control: Vec<(u64, ControlChange)>,
    pub messages: Vec<UsageMessage>,
}

/// Cuts a history at its boundaries; empty epochs are left out.
pub fn epochs(steps: &[Step]) -> Vec<Epoch> {
    let mut epochs = vec![Epoch::default()];
    let mut position = 0;
    for step in steps {
        let epoch = epochs.last_mut().unwrap();
        match step {
            Step::Message(message) => epoch.messages.push(message.clone()),
            Step::Control(change) => {
                position += 1;
                epoch.control.push((position, change.clone()));
            }
            Step::Boundary => epochs.push(Epoch::default()),
        }
    }
    epochs.retain(|epoch| !epoch.control.is_empty() || !epoch.messages.is_empty());
    epochs
}

/// What every shard must show at the end of each epoch.
pub fn oracle(epochs: &[Epoch], shards: u16) -> Vec<BTreeMap<ShardId, Shown>> {
    let mut reference = Reference::new(shards);
    let end_of = |epoch: &Epoch| {
        epoch.control.iter().for_each(|(_, change)| reference.control(change));
        for m in &epoch.messages {
            reference.message(m.shard, m.position, m.time, &m.subject, &m.decoded());
        }
        expected(&reference, shards)
    };
    epochs.iter().map(end_of).collect()
}

/// As the engine builds it.
pub fn timely_worker() -> Worker {
    let mut config = WorkerConfig::default();
    let merging = differential_dataflow::Config::default().idle_merge_effort(Some(1000));
    differential_dataflow::configure(&mut config, &merging);
    let config = config.idle_spin(Duration::ZERO);
    Worker::new(config, Allocator::Thread(Thread::default()), Some(std::time::Instant::now()))
}

/// The log of a shard, as far as it has been read.
#[derive(Debug, Default)]
struct Log(BTreeMap<u64, UsageMessage>);

impl History for Log {
    fn event_at(&mut self, place: Place) -> Result<Event<'static>, String> {
        let message = self.0.get(&place.position).ok_or("no such position yet")?;
        let line = message.lines.get(place.line as usize - 1).ok_or("no such line")?;
        line.event.clone().map_err(|rejection| rejection.to_string())
    }
}

/// What one epoch did in one shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    pub shown: Shown,
    pub changes: Changes,
    /// Dead letters of this epoch.
    pub dead: Vec<Refused>,
}

impl Outcome {
    /// The first differences, or nothing when all is equal.
    pub fn differences(&self, expected: &Outcome) -> Option<String> {
        let shown = self.shown.differences(&expected.shown);
        shown
            .or_else(|| {
                rows_differ(&self.changes, &expected.changes).map(|d| format!("changes: {d}"))
            })
            .or_else(|| differ("dead letters of the epoch", &self.dead, &expected.dead))
    }
}

/// A shard with its log.
#[derive(Debug)]
pub struct Hosted {
    pub shard: Shard,
    log: Log,
    dead: Vec<Refused>,
    /// Rows as a reader has them who only ever heard of changes.
    heard: Rows,
}

impl Hosted {
    pub fn open(worker: &mut Worker, id: ShardId, shards: u16) -> Hosted {
        let mut shard = Shard::new(worker, id, shards, KEY, ViewSet::DEFAULT);
        // Shortened histories jump; what a jump does is another test's matter.
        shard.allow_time_jump(i64::MAX);
        shard.want_deltas();
        Hosted { shard, log: Log::default(), dead: Vec::new(), heard: Rows::new() }
    }

    /// Puts another shard on the same log, with what was heard up to its state.
    pub fn replace(&mut self, shard: Shard, at: &Outcome) -> Shard {
        self.dead.clone_from(&at.shown.dead);
        self.heard.clone_from(&at.shown.rows);
        std::mem::replace(&mut self.shard, shard)
    }

    pub fn control(
        &mut self,
        worker: &mut Worker,
        changes: &[(u64, ControlChange)],
    ) -> Result<(), String> {
        for (position, change) in changes {
            let view = match change {
                ControlChange::View(view) => Some(&view.name),
                ControlChange::ViewRemoved(view) => Some(&view.name),
                _ => None,
            };
            if let Some(view) = view.map(|name| format!("declared {name}")) {
                self.heard.retain(|(name, ..), _| *name != view);
            }
            self.shard.control(worker, *position, change).map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    pub fn message(&mut self, message: &UsageMessage) -> Result<(), String> {
        self.log.0.insert(message.position, message.clone());
        let lines = (1..).zip(&message.lines);
        let incoming = Incoming {
            position: message.position,
            time: message.time,
            subject: &message.subject,
            lines: lines.map(|(n, line)| (n, line.text.as_bytes(), line.event.clone())),
        };
        self.shard.message(incoming, &mut self.log).map_err(|e| e.to_string())
    }

    pub fn messages(&mut self, epoch: &Epoch) -> Result<u64, String> {
        let id = self.shard.id();
        let mut lines = 0;
        for message in epoch.messages.iter().filter(|m| m.shard == id) {
            self.message(message)?;
            lines += message.lines.len() as u64;
        }
        Ok(lines)
    }

    /// Closes an epoch that took in so many lines, and checks what holds in every shard.
    pub fn close_epoch(
        &mut self,
        worker: &mut Worker,
        number: u64,
        lines: u64,
    ) -> Result<Outcome, String> {
        let (counts, letters) = self.shard.close_epoch(worker, number);
        let all = counts.counted + counts.repeated + letters.len() as u64;
        if (counts.lines, all) != (lines, lines) {
            return Err(format!("{counts:?} and {} dead of {lines} lines", letters.len()));
        }
        let mut dead: Vec<Refused> = Vec::new();
        for letter in letters {
            let message = &self.log.0[&letter.place.position];
            let text = &message.lines[letter.place.line as usize - 1].text;
            if (letter.subject, letter.raw) != (message.subject.clone(), text.clone().into_bytes())
            {
                return Err(format!("dead letter of {:?} does not hold {text:?}", letter.place));
            }
            dead.push((letter.place.position, letter.place.line, letter.rejection.reason));
        }
        self.dead.extend(&dead);
        let (rows, changes) = rows_of(&self.shard);
        for (name, figures) in &changes {
            match figures {
                Some(figures) => self.heard.insert(name.clone(), *figures),
                None => self.heard.remove(name),
            };
        }
        if let Some(difference) = rows_differ(&self.heard, &rows) {
            return Err(format!("changes do not add up to the views: {difference}"));
        }
        let mut shared = self.shard.flow().shared().borrow_mut();
        shared.rollup.clear_changes();
        shared.rollup.check_sums(&shared.names)?;
        drop(shared);
        self.check_usage()?;
        let declared = declared_of(&self.shard);
        let ids = self.shard.dedupe().len();
        let shown = Shown { rows, declared, ids, dead: self.dead.clone() };
        Ok(Outcome { shown, changes, dead })
    }
}

impl Hosted {
    /// The arrangement of usage, which answers groupings that no view has, priced anew is what the
    /// views show, by either way of reading it.
    fn check_usage(&mut self) -> Result<(), String> {
        let (mut all, mut by_rate) = (Vec::new(), Vec::new());
        let flow = self.shard.flow_mut();
        flow.visit_all(|key, usage| all.push((*key, usage.clone())));
        let rates = flow.shared().borrow().names.names().rates.len() as u32;
        flow.visit(0..rates, Slot::MIN, Slot::END, |key, usage| {
            by_rate.push((*key, usage.clone()))
        });
        differ("usage by rate", &by_rate, &all).map_or(Ok(()), Err)?;
        let mut shared = flow.shared().borrow_mut();
        let mut sums: BTreeMap<u32, Spend> = BTreeMap::new();
        for (key, usage) in &all {
            let prices = shared.prices_of(key.rate);
            let spend = usage.multiply(price_at(&prices, Slot(key.slot)));
            let org = shared.names.names().rates[key.rate as usize].org;
            sums.entry(org).or_default().add(&spend);
        }
        let shown = shared.rollup.table(View::OrgAll).rows();
        let shown: BTreeMap<u32, Spend> = shown.map(|(org, _, s)| (org, s.clone())).collect();
        differ("usage priced anew", &sums, &shown).map_or(Ok(()), Err)
    }
}

/// Outcomes by shard, one an epoch.
pub type Outcomes = BTreeMap<ShardId, Vec<Outcome>>;

/// Runs shards as dataflows of one worker.
pub fn run_on_one(epochs: &[Epoch], ids: &[ShardId], shards: u16) -> Result<Outcomes, String> {
    let mut worker = timely_worker();
    let mut hosted: Vec<Hosted> =
        ids.iter().map(|id| Hosted::open(&mut worker, *id, shards)).collect();
    let mut outcomes: Outcomes = ids.iter().map(|id| (*id, Vec::new())).collect();
    for (number, epoch) in (1..).zip(epochs) {
        // Side by side, as on a busy thread.
        let mut lines = Vec::new();
        for shard in &mut hosted {
            shard.control(&mut worker, &epoch.control)?;
            lines.push(shard.messages(epoch)?);
        }
        for (shard, lines) in hosted.iter_mut().zip(lines) {
            let outcome = shard.close_epoch(&mut worker, number, lines)?;
            outcomes.get_mut(&shard.shard.id()).unwrap().push(outcome);
        }
    }
    for shard in hosted {
        shard.shard.close(&mut worker);
    }
    Ok(outcomes)
}

/// Runs all shards on a number of threads, each with a worker of its own.
pub fn run(epochs: &[Epoch], shards: u16, threads: u16) -> Result<Outcomes, String> {
    let ids_of = |thread: u16| (0..shards).filter(move |s| s % threads == thread).map(ShardId);
    let parts: Vec<Result<Outcomes, String>> = std::thread::scope(|scope| {
        let start = |thread: u16| {
            let ids: Vec<ShardId> = ids_of(thread).collect();
            scope.spawn(move || run_on_one(epochs, &ids, shards))
        };
        let started: Vec<_> = (0..threads).map(start).collect();
        started.into_iter().map(|thread| thread.join().map_err(panic_text)?).collect()
    });
    let mut all = Outcomes::new();
    for part in parts {
        all.extend(part?);
    }
    Ok(all)
}

/// Runs all shards on this thread.
pub fn run_here(steps: &[Step], shards: u16) -> Result<Outcomes, String> {
    let ids: Vec<ShardId> = (0..shards).map(ShardId).collect();
    run_on_one(&epochs(steps), &ids, shards)
}

/// What a panic said.
pub fn panic_text(panic: Box<dyn std::any::Any + Send>) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    format!("panic: {}", text.unwrap_or_default())
}
