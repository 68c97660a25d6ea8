//! What a subscriber of one org saw, and what it must have seen.

use std::collections::BTreeMap;

use meterr_connectors::changes::Row;

use crate::reader::Believed;
use crate::table::Table;

/// What a subscriber saw.
#[derive(Debug, Default)]
pub struct Seen {
    /// The org.
    pub org: String,
    /// Epoch of the snapshot it began with.
    pub began: u64,
    /// Epochs of the changes taken, in order.
    pub epochs: Vec<u64>,
    /// Snapshot and changes added up.
    pub table: Table,
}

impl Seen {
    /// Nothing yet.
    pub fn new(org: &str) -> Seen {
        Seen { org: org.to_owned(), ..Seen::default() }
    }

    /// Epoch up to which everything was seen.
    pub fn last(&self) -> u64 {
        self.epochs.last().copied().unwrap_or(self.began)
    }

    /// Takes in a change.
    pub fn change(&mut self, epoch: u64, views: &BTreeMap<String, Vec<Row>>) {
        if self.last() != epoch || self.epochs.is_empty() {
            self.epochs.push(epoch);
        }
        self.table.apply(views);
    }

    /// Each commit of the org once and in order, as the output log has them, and figures that are the
    /// final ones.
    pub fn check(&self, who: &str, snapshot: &Table, believed: &Believed) {
        let who = format!("{who} of {}", self.org);
        let committed: Vec<u64> = believed.epochs[&self.org]
            .iter()
            .copied()
            .filter(|epoch| *epoch > self.began)
            .collect();
        let first = self.epochs.iter().zip(&committed).find(|(seen, committed)| seen != committed);
        assert_eq!(first, None, "{who}: seen and committed differ");
        assert_eq!(self.epochs.len(), committed.len(), "{who}: commits behind the last one seen");
        assert!(!snapshot.is_empty());
        self.table.same_as(snapshot, &format!("{who}: seen and asked for"));
        believed.tables[&self.org].same_as(snapshot, &format!("{who}: read and asked for"));
    }
}
