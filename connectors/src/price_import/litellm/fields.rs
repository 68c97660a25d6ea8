//! The fields of one model, and which of them have been carried over.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use meterr_operators::price_book::Price;
use serde_json::{Map, Value};

/// Reads prices and remembers which fields it read, so that the rest can be reported.
pub(super) struct Fields<'a> {
    map: &'a Map<String, Value>,
    carried: RefCell<BTreeSet<String>>,
    rounded: RefCell<BTreeMap<String, String>>,
    extra: RefCell<BTreeSet<String>>,
}

impl<'a> Fields<'a> {
    pub(super) fn new(map: &'a Map<String, Value>) -> Fields<'a> {
        Fields {
            map,
            carried: RefCell::default(),
            rounded: RefCell::default(),
            extra: RefCell::default(),
        }
    }

    /// A price, which then counts as carried over. What is no number does not: it is reported like
    /// a field nobody reads.
    pub(super) fn price(&self, field: &str) -> Option<Price> {
        let price = self.read(field, self.map.get(field)?)?;
        self.carried(field);
        Some(price)
    }

    /// A price inside another field, such as one tier of a table.
    pub(super) fn inner(&self, field: &str, map: &Map<String, Value>, name: &str) -> Option<Price> {
        self.read(&format!("{field}.{name}"), map.get(name)?)
    }

    fn read(&self, field: &str, value: &Value) -> Option<Price> {
        let text = match value {
            // `arbitrary_precision` keeps the digits as they stand in the file.
            Value::Number(number) => number.to_string(),
            Value::String(text) => text.clone(),
            _ => return None,
        };
        let price = Price::per_unit(&text).ok()?;
        if price.rounded() {
            self.rounded.borrow_mut().insert(field.to_owned(), text);
        }
        Some(price)
    }

    /// Whether the field has a value.
    pub(super) fn has(&self, field: &str) -> bool {
        self.map.get(field).is_some_and(|value| !value.is_null())
    }

    pub(super) fn value(&self, field: &str) -> Option<&'a Value> {
        self.map.get(field).filter(|value| !value.is_null())
    }

    /// Whether two fields have values and state the same.
    pub(super) fn same(&self, field: &str, other: &str) -> bool {
        self.has(field) && self.value(field) == self.value(other)
    }

    /// Marks a field as carried over.
    pub(super) fn carried(&self, field: &str) {
        if !self.carried.borrow().contains(field) {
            self.carried.borrow_mut().insert(field.to_owned());
        }
    }

    /// Reports something inside a field that was not carried over.
    pub(super) fn unmapped(&self, name: String) {
        self.extra.borrow_mut().insert(name);
    }

    /// Rounded prices (field, text), and names of the fields that speak of money and were not
    /// carried over.
    pub(super) fn report(self) -> (BTreeMap<String, String>, BTreeSet<String>) {
        let carried = self.carried.into_inner();
        let mut unmapped = self.extra.into_inner();
        for (field, value) in self.map {
            if !value.is_null() && !carried.contains(field) && of_money(field) {
                unmapped.insert(field.clone());
            }
        }
        (self.rounded.into_inner(), unmapped)
    }
}

/// Whether a field states a price or a rule of pricing. By parts of the name, so that a field the
/// map gains tomorrow is reported and not missed.
fn of_money(field: &str) -> bool {
    const PARTS: [&str; 8] = [
        "cost",
        "price",
        "pricing",
        "uplift",
        "multiplier",
        "billing",
        "free_requests",
        "provider_specific_entry",
    ];
    PARTS.iter().any(|part| field.contains(part))
}
