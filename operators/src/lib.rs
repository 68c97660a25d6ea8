//! The pure core of meterr: values in, deltas out. No files, sockets, clocks, environment, async,
//! actors or logging.

pub mod control;
pub mod event;
pub mod histories;
pub mod ids;
pub mod money;
pub mod price_book;
pub mod reference;
pub mod rng;
pub mod time;
