//! The dataflow of one shard; the only file that sees a timely scope.
//!
//! ```text
//! usage ──► arrange ──► Price ──► Roll up ──► views
//! control ────────────────┘
//! ```
//!
//! A delta query. New usage is multiplied by the price table on its way through; the arrangement of
//! all usage is consulted only when a price, an org's time zone or a declared view changes, and then
//! only where it is concerned. The views add up what comes (see [`crate::rollup`]).
//!
//! Invariant: everything in the arrangement has been multiplied by the table as it stands and is in
//! every view. The driver keeps it by working in *ticks*: it hands in either usage or one control
//! change, steps until the tick is complete, and only then goes on. Nothing is read in between.
//!
//! Both compaction frontiers of every handle follow each tick, so the arrangement holds one update
//! a row, not one an epoch.

use std::cell::RefCell;
use std::rc::Rc;

use differential_dataflow::difference::{IsZero, Monoid, Multiply, Semigroup};
use differential_dataflow::input::InputSession;
use differential_dataflow::operators::arrange::TraceAgent;
use differential_dataflow::operators::arrange::arrangement::arrange_core;
use differential_dataflow::trace::cursor::cursor_list;
use differential_dataflow::trace::implementations::{KeyBatcher, KeySpine};
use differential_dataflow::trace::{Cursor, Navigable, TraceReader};
use timely::container::CapacityContainerBuilder;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::generic::Operator;
use timely::dataflow::operators::probe::Handle as ProbeHandle;
use timely::dataflow::operators::{Input, Probe};
use timely::dataflow::{InputHandle, Stream};
use timely::progress::Antichain;
use timely::progress::frontier::AntichainRef;
use timely::worker::Worker;

use crate::dictionary::{Dictionary, NONE};
use crate::price_book::PriceBook;
use crate::rollup::{Priced, Rollup, ViewSet};
use crate::time::Slot;
use crate::usage::{PriceVector, Usage};
use crate::window::Zone;

/// Key of a usage row: who used what at which rate in which slot. 16 bytes, ordered so that the rows
/// of a rate lie together by time.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    bincode::Encode,
    bincode::Decode,
)]
pub struct UsageKey {
    /// Rate number.
    pub rate: u32,
    /// Slot.
    pub slot: u32,
    /// User number.
    pub user: u32,
    /// Label number.
    pub label: u32,
}

/// A difference of the usage collection.
pub type UsageUpdate = (UsageKey, Usage);

type UsageSpine = KeySpine<UsageKey, u64, Usage>;
type Prices = Rc<[(Slot, PriceVector)]>;
type Builder<T> = CapacityContainerBuilder<Vec<T>>;

/// A price that changed for one rate in an interval of event time.
#[derive(Debug, Clone)]
pub struct Repricing {
    /// Rate number.
    pub rate: u32,
    /// First slot concerned.
    pub from: Slot,
    /// First slot no longer concerned.
    pub to: Slot,
    /// New price minus old price.
    pub delta: PriceVector,
}

#[derive(Debug, Clone)]
enum Change {
    Reprice(Rc<Vec<Repricing>>),
    Rezone { org: u32, old: u32, new: u32 },
    Fill { view: u32 },
}

/// What operators and driver share. Borrowed only inside a step, or between steps.
#[derive(Debug)]
pub struct Shared {
    /// Names and numbers.
    pub names: Dictionary,
    /// The price book in force.
    pub book: PriceBook,
    /// Views.
    pub rollup: Rollup,
    /// Zones in use; 0 is UTC.
    pub zones: Vec<Zone>,
    /// Zone by org number; shorter than the orgs where the rest has UTC.
    org_zones: Vec<u32>,
    /// Zone by org name, for orgs that have no number yet.
    pub zone_names: std::collections::BTreeMap<String, u32>,
    /// Price pieces by rate number, filled when first used.
    prices: Vec<Option<Prices>>,
}

impl Shared {
    /// The zone of an org, as an index of `zones`.
    pub fn zone_of(&self, org: u32) -> u32 {
        self.org_zones.get(org as usize).copied().unwrap_or(0)
    }

    /// The prices of a rate over event time.
    pub fn prices_of(&mut self, rate: u32) -> Prices {
        if self.prices.len() <= rate as usize {
            self.prices.resize(rate as usize + 1, None);
        }
        if let Some(prices) = &self.prices[rate as usize] {
            return prices.clone();
        }
        let prices = self.resolve(&self.book, rate);
        self.prices[rate as usize] = Some(prices.clone());
        prices
    }

    /// The prices of a rate by another book.
    pub fn resolve(&self, book: &PriceBook, rate: u32) -> Prices {
        let known = &self.names.names().rates[rate as usize];
        if known.reported {
            return Rc::new([(Slot::MIN, PriceVector::of(None, 0, true))]);
        }
        let timeline = book.timeline(&self.names.rate_key(known));
        let mut pieces: Vec<(Slot, PriceVector)> = Vec::with_capacity(timeline.len());
        for (from, prices) in timeline {
            let vector = PriceVector::of(prices.as_ref(), known.uses, false);
            if pieces.last().is_none_or(|(_, last)| *last != vector) {
                pieces.push((from, vector));
            }
        }
        pieces.into()
    }

    /// Gives an org that just got a number the zone set for its name before.
    fn zone_new_orgs(&mut self) {
        let orgs = &self.names.names().orgs;
        for org in &orgs[self.org_zones.len()..] {
            self.org_zones.push(self.zone_names.get(&**org).copied().unwrap_or(0));
        }
    }
}

/// The price in force in a slot.
#[inline]
pub fn price_at(pieces: &[(Slot, PriceVector)], slot: Slot) -> &PriceVector {
    // Most usage is newest: look at the last piece first.
    let last = &pieces[pieces.len() - 1];
    if last.0 <= slot {
        return &last.1;
    }
    let next = pieces.partition_point(|(from, _)| *from <= slot);
    &pieces[next.max(1) - 1].1
}

/// Differences between two piecewise prices, as intervals.
pub fn price_changes(
    rate: u32,
    old: &[(Slot, PriceVector)],
    new: &[(Slot, PriceVector)],
) -> Vec<Repricing> {
    let mut starts: Vec<Slot> = old.iter().chain(new).map(|(from, _)| *from).collect();
    starts.sort_unstable();
    starts.dedup();
    let mut changes = Vec::new();
    for (at, from) in starts.iter().enumerate() {
        let (before, after) = (price_at(old, *from), price_at(new, *from));
        if before != after {
            let to = starts.get(at + 1).copied().unwrap_or(Slot(u32::MAX));
            changes.push(Repricing { rate, from: *from, to, delta: after.minus(before) });
        }
    }
    changes
}

/// The dataflow of one shard on a single-threaded worker.
pub struct Flow {
    index: usize,
    tick: u64,
    usage: InputSession<u64, (UsageKey, ()), Usage>,
    control: InputHandle<u64, Builder<Change>>,
    probe: ProbeHandle<u64>,
    trace: TraceAgent<UsageSpine>,
    shared: Rc<RefCell<Shared>>,
}

impl std::fmt::Debug for Flow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Flow").field("index", &self.index).field("tick", &self.tick).finish()
    }
}

impl Flow {
    /// Builds the dataflow.
    pub fn new(worker: &mut Worker, views: ViewSet) -> Flow {
        let index = worker.next_dataflow_index();
        let shared = Rc::new(RefCell::new(Shared {
            names: Dictionary::default(),
            book: PriceBook::new(),
            rollup: Rollup::new(views),
            zones: vec![Zone::utc()],
            org_zones: Vec::new(),
            zone_names: Default::default(),
            prices: Vec::new(),
        }));
        let mut usage = InputSession::new();
        let mut control = InputHandle::new();
        let mut probe = ProbeHandle::new();
        let trace = worker.dataflow::<u64, _, _>(|scope| {
            let changes = scope.input_from(&mut control);
            let arranged = arrange_core::<_, _, KeyBatcher<UsageKey, u64, Usage>, UsageSpine>(
                usage.to_collection(scope).inner,
                Pipeline,
                "Arrange: Usage",
                KeyBatcher::new,
            );
            let trace = arranged.trace.clone();
            let priced = price(arranged, changes, shared.clone());
            roll_up(priced, shared.clone(), &mut probe);
            trace
        });
        let mut flow = Flow { index, tick: 0, usage, control, probe, trace, shared };
        flow.finish_tick(worker);
        flow
    }

    /// What operators and driver share.
    pub fn shared(&self) -> &Rc<RefCell<Shared>> {
        &self.shared
    }

    /// Adds usage differences and brings the views up to date.
    pub fn add_usage(
        &mut self,
        worker: &mut Worker,
        updates: impl IntoIterator<Item = UsageUpdate>,
    ) {
        self.shared.borrow_mut().zone_new_orgs();
        for (key, usage) in updates {
            self.usage.update((key, ()), usage);
        }
        self.finish_tick(worker);
    }

    /// Makes another price book the one in force, of which `touched` models differ. Returns the number
    /// of changed (rate, interval) pairs.
    pub fn set_book(
        &mut self,
        worker: &mut Worker,
        book: PriceBook,
        touched: &[(String, String)],
    ) -> usize {
        let changes = self.repricings(&book, touched);
        let mut shared = self.shared.borrow_mut();
        shared.book = book;
        let rates: std::collections::BTreeSet<u32> = changes.iter().map(|c| c.rate).collect();
        for rate in rates {
            // Resolved anew by the new book at its next use.
            shared.prices[rate as usize] = None;
        }
        drop(shared);
        let n = changes.len();
        if n > 0 {
            self.change(worker, Change::Reprice(Rc::new(changes)));
        }
        n
    }

    /// What another book would change.
    pub fn repricings(&self, book: &PriceBook, touched: &[(String, String)]) -> Vec<Repricing> {
        let mut shared = self.shared.borrow_mut();
        let mut concerned = std::collections::BTreeSet::new();
        for (provider, model) in touched {
            let symbols = (shared.names.symbol_of(provider), shared.names.symbol_of(model));
            if let (Some(provider), Some(model)) = symbols {
                concerned.insert((provider, model));
            }
        }
        let mut changes = Vec::new();
        for rate in 0..shared.names.names().rates.len() as u32 {
            let known = &shared.names.names().rates[rate as usize];
            if known.reported || !concerned.contains(&(known.provider, known.model)) {
                continue;
            }
            let old = shared.prices_of(rate);
            let new = shared.resolve(book, rate);
            changes.extend(price_changes(rate, &old, &new));
        }
        changes
    }

    /// Sets the time zone of an org. Returns the org's number and the zone it had, if it has rows and
    /// another zone now.
    ///
    /// # Errors
    /// When the database has no such zone; nothing is changed then.
    pub fn set_zone(
        &mut self,
        worker: &mut Worker,
        org: &str,
        name: &str,
    ) -> Result<Option<(u32, u32)>, String> {
        let mut shared = self.shared.borrow_mut();
        let new = match shared.zones.iter().position(|zone| zone.name() == name) {
            Some(known) => known as u32,
            None => {
                shared.zones.push(Zone::by_name(name)?);
                shared.zones.len() as u32 - 1
            }
        };
        // Before the new zone is known by name: orgs restored without any usage have theirs to come.
        shared.zone_new_orgs();
        shared.zone_names.insert(org.to_owned(), new);
        let Some(number) = shared.names.org(org) else { return Ok(None) };
        let old = std::mem::replace(&mut shared.org_zones[number as usize], new);
        drop(shared);
        if old == new {
            return Ok(None);
        }
        self.change(worker, Change::Rezone { org: number, old, new });
        Ok(Some((number, old)))
    }

    /// Declares a view and fills it from all usage. Returns the one of the same name it replaces.
    pub fn declare_view(
        &mut self,
        worker: &mut Worker,
        view: crate::rollup::Declared,
    ) -> Option<crate::rollup::Declared> {
        let replaced = self.remove_view(&view.name);
        let mut shared = self.shared.borrow_mut();
        shared.rollup.declared.push(Some(view));
        let view = shared.rollup.declared.len() as u32 - 1;
        drop(shared);
        self.change(worker, Change::Fill { view });
        replaced
    }

    /// Removes a declared view, if there is one.
    pub fn remove_view(&mut self, name: &str) -> Option<crate::rollup::Declared> {
        let mut shared = self.shared.borrow_mut();
        let views = &mut shared.rollup.declared;
        let found = views.iter_mut().find(|view| view.as_ref().is_some_and(|v| v.name == name));
        found.and_then(Option::take)
    }

    /// Visits usage rows with `rates` and slots in `from..to`, in no promised order of rates.
    pub fn visit(
        &mut self,
        rates: impl IntoIterator<Item = u32>,
        from: Slot,
        to: Slot,
        mut visit: impl FnMut(&UsageKey, &Usage),
    ) {
        let everything = Antichain::new();
        let batches = self.trace.batches_through(everything.borrow());
        let batches = batches.expect("the whole of a trace is always a clean cut");
        let (mut cursor, storage) = cursor_list(batches);
        for rate in rates {
            cursor.rewind_keys(&storage);
            seek(&mut cursor, &storage, rate, from, to, &mut visit);
        }
    }

    /// Visits all usage rows in the order of their keys.
    pub fn visit_all(&mut self, mut visit: impl FnMut(&UsageKey, &Usage)) {
        let everything = Antichain::new();
        let batches = self.trace.batches_through(everything.borrow());
        let batches = batches.expect("the whole of a trace is always a clean cut");
        let (mut cursor, storage) = cursor_list(batches);
        while let Some(key) = cursor.get_key(&storage) {
            let key = *key;
            let mut usage = Usage::zero();
            while cursor.val_valid(&storage) {
                cursor.map_times(&storage, |_, diff| usage.plus_equals(diff));
                cursor.step_val(&storage);
            }
            if !usage.is_zero() {
                visit(&key, &usage);
            }
            cursor.step_key(&storage);
        }
    }

    fn change(&mut self, worker: &mut Worker, change: Change) {
        self.shared.borrow_mut().zone_new_orgs();
        self.control.send(change);
        self.finish_tick(worker);
    }

    fn finish_tick(&mut self, worker: &mut Worker) {
        self.tick += 1;
        let tick = self.tick;
        self.usage.advance_to(tick);
        self.usage.flush();
        self.control.advance_to(tick);
        worker.step_while(|| self.probe.less_than(&tick));
        self.shared.borrow_mut().rollup.flush();
        self.trace.set_logical_compaction(AntichainRef::new(&[tick]));
        self.trace.set_physical_compaction(AntichainRef::new(&[tick]));
    }

    /// Takes the dataflow down.
    pub fn close(self, worker: &mut Worker) {
        let index = self.index;
        drop(self);
        worker.drop_dataflow(index);
    }
}

/// Visits the rows of one rate between two slots. Rows are consolidated over time first, since an
/// arrangement not yet merged may hold a row and its retraction apart.
fn seek<C>(
    cursor: &mut C,
    storage: &C::Storage,
    rate: u32,
    from: Slot,
    to: Slot,
    visit: &mut impl FnMut(&UsageKey, &Usage),
) where
    C: for<'a> Cursor<Key<'a> = &'a UsageKey, DiffGat<'a> = &'a Usage>,
{
    let first = UsageKey { rate, slot: from.0, user: 0, label: 0 };
    cursor.seek_key(storage, &first);
    while let Some(key) = cursor.get_key(storage) {
        if key.rate != rate || key.slot >= to.0 {
            break;
        }
        let key = *key;
        let mut usage = Usage::zero();
        while cursor.val_valid(storage) {
            cursor.map_times(storage, |_, diff| usage.plus_equals(diff));
            cursor.step_val(storage);
        }
        if !usage.is_zero() {
            visit(&key, &usage);
        }
        cursor.step_key(storage);
    }
}

type Usages<'scope> =
    differential_dataflow::operators::arrange::Arranged<'scope, TraceAgent<UsageSpine>>;

/// Usage × price. New usage meets the table; a change of the table meets all usage it concerns.
fn price<'scope>(
    usage: Usages<'scope>,
    changes: Stream<'scope, u64, Vec<Change>>,
    shared: Rc<RefCell<Shared>>,
) -> Stream<'scope, u64, Vec<Priced>> {
    let mut trace = usage.trace;
    usage.stream.binary_frontier::<_, Builder<Priced>, _, _, _, _>(
        changes,
        Pipeline,
        Pipeline,
        "Price",
        move |_capability, _info| {
            let mut upper = Antichain::from_elem(0_u64);
            move |(usages, _), (changes, frontier), output| {
                usages.for_each(|capability, spans| {
                    let capability = capability.retain_stamp(0);
                    let mut session = output.session(&capability);
                    let shared = &mut *shared.borrow_mut();
                    for span in spans.drain(..) {
                        upper.clone_from(span.upper());
                        let Some(batch) = span.inner else { continue };
                        let mut rate = NONE;
                        let mut zone = 0;
                        let mut prices: Prices = Rc::new([]);
                        let mut cursor = batch.cursor();
                        while let Some(key) = cursor.get_key(&batch) {
                            if key.rate != rate {
                                rate = key.rate;
                                prices = shared.prices_of(rate);
                                zone =
                                    shared.zone_of(shared.names.names().rates[rate as usize].org);
                            }
                            let slot = Slot(key.slot);
                            let price = price_at(&prices, slot);
                            cursor.map_times(&batch, |_, usage| {
                                let spend = usage.multiply(price);
                                let (user, label) = (key.user, key.label);
                                session.give(Priced {
                                    rate,
                                    slot,
                                    user,
                                    label,
                                    zone,
                                    only: NONE,
                                    spend,
                                });
                            });
                            cursor.step_key(&batch);
                        }
                    }
                });
                trace.advance_upper(&mut upper);
                changes.for_each(|capability, list| {
                    let capability = capability.retain_stamp(0);
                    let mut session = output.session(&capability);
                    let batches = trace.batches_through(upper.borrow());
                    let batches = batches.expect("the upper end of the last batch is a clean cut");
                    let (mut cursor, storage) = cursor_list(batches);
                    let shared = &mut *shared.borrow_mut();
                    for change in list.drain(..) {
                        apply(change, shared, &mut cursor, &storage, |priced| session.give(priced));
                    }
                });
                trace.set_logical_compaction(frontier.frontier());
                trace.set_physical_compaction(upper.borrow());
            }
        },
    )
}

/// What a control change adds to the views, by the rows of usage it concerns.
fn apply<C>(
    change: Change,
    shared: &mut Shared,
    cursor: &mut C,
    storage: &C::Storage,
    mut give: impl FnMut(Priced),
) where
    C: for<'a> Cursor<Key<'a> = &'a UsageKey, DiffGat<'a> = &'a Usage>,
{
    match change {
        Change::Reprice(changes) => {
            for Repricing { rate, from, to, delta } in &*changes {
                let zone = shared.zone_of(shared.names.names().rates[*rate as usize].org);
                cursor.rewind_keys(storage);
                seek(cursor, storage, *rate, *from, *to, &mut |key, usage| {
                    let priced = priced(key, zone, NONE, usage, delta);
                    // A price of meters the row does not use: it would be reported as changed.
                    if !priced.spend.is_nothing() {
                        give(priced);
                    }
                });
            }
        }
        Change::Rezone { org, old, new } => {
            for rate in shared.names.members(org).rates.clone() {
                let prices = shared.prices_of(rate);
                cursor.rewind_keys(storage);
                seek(cursor, storage, rate, Slot::MIN, Slot(u32::MAX), &mut |key, usage| {
                    let after = priced(key, new, NONE, usage, price_at(&prices, Slot(key.slot)));
                    let mut before = after.clone();
                    before.zone = old;
                    before.spend = before.spend.negated();
                    give(before);
                    give(after);
                });
            }
        }
        Change::Fill { view } => {
            for rate in 0..shared.names.names().rates.len() as u32 {
                let prices = shared.prices_of(rate);
                let zone = shared.zone_of(shared.names.names().rates[rate as usize].org);
                cursor.rewind_keys(storage);
                seek(cursor, storage, rate, Slot::MIN, Slot(u32::MAX), &mut |key, usage| {
                    give(priced(key, zone, view, usage, price_at(&prices, Slot(key.slot))));
                });
            }
        }
    }
}

fn priced(key: &UsageKey, zone: u32, only: u32, usage: &Usage, price: &PriceVector) -> Priced {
    let UsageKey { rate, slot, user, label } = *key;
    Priced { rate, slot: Slot(slot), user, label, zone, only, spend: usage.multiply(price) }
}

/// Adds priced differences to the views.
fn roll_up<'scope>(
    priced: Stream<'scope, u64, Vec<Priced>>,
    shared: Rc<RefCell<Shared>>,
    probe: &mut ProbeHandle<u64>,
) {
    let done: Stream<'scope, u64, Vec<()>> =
        priced.unary::<Builder<()>, _, _, _>(Pipeline, "Roll up", move |_capability, _info| {
            move |input, _output| {
                input.for_each(|_capability, batch| {
                    let shared = &mut *shared.borrow_mut();
                    for priced in batch.drain(..) {
                        shared.rollup.add(&shared.names, &shared.zones, &priced);
                    }
                });
            }
        });
    done.probe_with(probe);
}
