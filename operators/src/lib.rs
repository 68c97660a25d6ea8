//! The pure core of meterr: values in, deltas out. No files, sockets, clocks, environment, async,
//! actors or logging.
//!
//! What it computes: spend per org, user, model and feature by hour, day and month, as sums of
//! differences, from usage events and a price book that may change in retrospect. Its invariant: the
//! views equal [`mod@reference`]'s recomputation from scratch, whatever duplicates, late events,
//! corrections, voids and price changes came.
//!
//! Reading order: [`money`], [`time`], [`ids`], [`event`] (what comes in), [`dedupe`] (each event
//! counts once), [`dictionary`] (names → numbers), [`usage`] (the differences), [`price_book`],
//! [`window`], [`rollup`] (the views), [`dataflow`] (all of it together), [`shard`] (one shard with
//! its log position), [`control`] (what changes results besides usage), [`mod@reference`] (the oracle).

pub mod control;
pub mod dataflow;
pub mod dedupe;
pub mod dictionary;
pub mod event;
pub mod format;
pub mod histories;
pub mod ids;
pub mod money;
pub mod price_book;
pub mod reference;
pub mod rng;
pub mod rollup;
pub mod shard;
pub mod time;
pub mod usage;
pub mod window;
