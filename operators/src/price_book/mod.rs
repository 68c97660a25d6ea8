//! The price book: what a unit of each meter cost, by provider, model, tier, context class, org and
//! event time.
//!
//! # Resolution
//! An entry belongs to a *key* (provider, model, tier, `min_input_tokens`, org). It is in force from
//! its `effective_from` (left out: from the beginning) until the next `effective_from` of the same
//! key. An entry without any price is a *withdrawal*: while it is in force its key counts as having
//! no entry, so that the fall-backs below apply again.
//!
//! What a request of some org, tier and context class costs at an instant is decided by one entry:
//! 1. first among the overrides of the request's org, then, if none of them decides, among the
//!    entries without an org;
//! 2. inside each of the two: first among entries of the request's tier, then among those of tier
//!    `standard`;
//! 3. inside each of these: of the entries in force whose `min_input_tokens` is at most the lower
//!    bound of the request's context class, the one with the largest.
//!
//! Prices the chosen entry leaves out come from the same entry, never from another one:
//! `cached_input` and `cache_write` cost as `input`, `cache_write_1h` as `cache_write`, `reasoning`
//! as `output`, `audio_input` as `input`, `audio_output` as `output`. What then still lacks a price
//! is unpriced, never free.
//!
//! # Knowledge
//! An entry with the key and the `effective_from` of an earlier one replaces it: the price was wrong
//! and is corrected, for history too. The book keeps the control position each entry came by, for
//! listing. It is a pure function of the sequence of lists applied.
//!
//! # Bounds
//! [`TOKEN_PRICE_MAX`] and [`PIECE_PRICE_MAX`] are what the sums of [`crate::money`] are proved safe
//! for. Boundaries between slots are refused, so that a slot of usage never has two prices.

mod book;
mod diff;
mod entry;

pub use book::{PriceBook, Prices, RateKey, Timeline};
pub use diff::{EntryChange, PriceChange, PriceDiff};
pub use entry::{
    EntryError, PIECE_PRICE_MAX, PRICE_FIELDS, Price, PriceEntry, PriceList, TOKEN_PRICE_MAX,
    check_entries,
};
