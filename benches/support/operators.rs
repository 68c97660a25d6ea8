//! The operators alone on one thread: decode, deduplicate, number, price, roll up. No log, no
//! server, no commit.

use anyhow::{Result, anyhow};
use meterr_connectors::codec::decode_lines;
use meterr_operators::control::{ControlChange, PricesChange};
use meterr_operators::dedupe::Place;
use meterr_operators::event::{Event, HashKey};
use meterr_operators::ids::ShardId;
use meterr_operators::price_book::PriceEntry;
use meterr_operators::rollup::{ALL_VIEWS, Rollup, View, ViewSet};
use meterr_operators::shard::{History, Incoming, Shard};
use meterr_operators::time::Time;
use meterr_operators::usage::Spend;
use timely::worker::Worker;

use super::floor::Done;
use super::spend1::{Figures, Views, day_text, month_text, prices};

/// The three views of SPEND-1.
pub const THREE: [View; 3] = [View::UserMonth, View::OrgMonth, View::ModelDay];

/// Key of the hashes; any.
pub const KEY: HashKey = HashKey(*b"a key for benche");

/// Log time of every message: behind all events of ten repetitions, so that none is refused and no id
/// forgotten.
pub const LOG_TIME: &str = "2028-01-01T00:00:00Z";

/// A shard that owns every org, on a worker of its own.
pub struct Operators {
    worker: Worker,
    shard: Shard,
    position: u64,
    control: u64,
    log_time: Time,
}

/// SPEND-1 has no corrections.
/// Steps between two checkpoints' deltas: as many events as the default of `checkpoint.events_max`
/// allows.
const CHECKPOINT_STEPS: u64 = 10;

struct NoHistory;

impl History for NoHistory {
    fn event_at(&mut self, place: Place) -> Result<Event<'static>, String> {
        Err(format!("nothing was to be corrected, yet {place:?} is asked for"))
    }
}

impl Operators {
    /// An empty shard with the price book of SPEND-1.
    ///
    /// # Errors
    /// When the prices do not apply.
    pub fn new(views: ViewSet) -> Result<Operators> {
        let mut worker = meterr_engine::worker::timely_worker();
        let mut shard = Shard::new(&mut worker, ShardId(0), 1, KEY, views);
        // As the engine does, which takes checkpoints.
        shard.want_deltas();
        let log_time = Time::parse(LOG_TIME).map_err(|why| anyhow!(why))?;
        let mut operators = Operators { worker, shard, position: 0, control: 0, log_time };
        operators.set_prices(prices())?;
        Ok(operators)
    }

    /// Takes in the lines of a step as one message and closes the epoch.
    ///
    /// # Errors
    /// When the shard stops, or a line is refused.
    pub fn step(&mut self, text: &[u8], done: &mut Done) -> Result<()> {
        self.position += 1;
        let message = Incoming {
            position: self.position,
            time: self.log_time,
            subject: "usage.0.@batch",
            lines: decode_lines(text),
        };
        self.shard.message(message, &mut NoHistory)?;
        let (_, dead) = self.shard.close_epoch(&mut self.worker, self.position);
        if let Some(dead) = dead.first() {
            return Err(anyhow!("line {} is refused: {}", dead.place.line, dead.rejection));
        }
        self.output(done);
        // A checkpoint takes what changed and lets go of it; without that its list would grow with the
        // whole run.
        if self.position.is_multiple_of(CHECKPOINT_STEPS) {
            drop(self.shard.take_delta());
        }
        Ok(())
    }

    /// Puts prices in force. Views follow before it returns.
    ///
    /// # Errors
    /// When they do not apply.
    pub fn set_prices(&mut self, prices: Vec<PriceEntry>) -> Result<()> {
        self.control += 1;
        let change = ControlChange::Prices(PricesChange { prices });
        self.shard.control(&mut self.worker, self.control, &change)?;
        Ok(())
    }

    /// Looks at every changed row and begins a new list of changes.
    pub fn output(&mut self, done: &mut Done) {
        let rollup = &mut self.shard.flow().shared().borrow_mut().rollup;
        for view in ALL_VIEWS {
            for (_, _, spend) in rollup.table(view).changes() {
                done.row(spend.events, spend.cost.get());
            }
        }
        rollup.clear_changes();
    }

    /// Takes what waits for the next checkpoint, and lets it go.
    pub fn checkpoint(&mut self) {
        drop(self.shard.take_delta());
    }

    /// The shard.
    pub fn shard(&self) -> &Shard {
        &self.shard
    }

    /// Reads the views.
    pub fn rollup<T>(&self, read: impl FnOnce(&Rollup) -> T) -> T {
        read(&self.shard.flow().shared().borrow().rollup)
    }

    /// The three views of SPEND-1, by name.
    pub fn views(&self) -> Views {
        let shared = self.shard.flow().shared().borrow();
        let (names, rollup) = (&shared.names, &shared.rollup);
        let all = names.names();
        let mut views = Views::default();
        for (user, month, spend) in rollup.table(View::UserMonth).rows() {
            let user = &all.users[user as usize];
            let key = format!("{}|{}|{}", names.org_name(user.org), user.name, month_text(month));
            views.user_month.insert(key, figures(spend));
        }
        for (pair, day, spend) in rollup.table(View::ModelDay).rows() {
            let pair = &all.org_models[pair as usize];
            let (org, model) = (names.org_name(pair.org), names.symbol(pair.name));
            let key = format!("{org}|{model}|{}", day_text(day));
            views.org_model_day.insert(key, figures(spend));
        }
        for (org, month, spend) in rollup.table(View::OrgMonth).rows() {
            let key = format!("{}|{}", names.org_name(org), month_text(month));
            views.org_month.insert(key, figures(spend));
        }
        views
    }

    /// Sum over users = org = sum over models = sum over features.
    ///
    /// # Errors
    /// Names what differs.
    pub fn check_sums(&self) -> Result<()> {
        let shared = self.shard.flow().shared().borrow();
        shared.rollup.check_sums(&shared.names).map_err(|why| anyhow!(why))
    }
}

fn figures(spend: &Spend) -> Figures {
    Figures {
        events: spend.events,
        input: spend.input + spend.cache_read,
        cached: spend.cache_read,
        output: spend.output,
        cost: spend.cost.get(),
    }
}
