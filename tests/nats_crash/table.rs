//! What a reader knows of an org: rows by view, window and key.

use std::collections::BTreeMap;

use meterr_connectors::api::Figures;
use meterr_connectors::changes::Row;
use meterr_operators::money::Atto;

/// The rows of an org that are not nothing.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Table(BTreeMap<(String, Option<String>, Option<String>), Figures>);

impl Table {
    /// Takes in changed rows. Figures are totals, so they replace; a row of nothing is gone.
    pub fn apply(&mut self, views: &BTreeMap<String, Vec<Row>>) {
        for (view, rows) in views {
            for row in rows {
                let key = (view.clone(), row.window_start.clone(), row.key.clone());
                if nothing(&row.figures) {
                    self.0.remove(&key);
                } else {
                    self.0.insert(key, row.figures);
                }
            }
        }
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Fails with the first row that differs.
    pub fn same_as(&self, other: &Table, what: &str) {
        for (key, figures) in &self.0 {
            assert_eq!(Some(figures), other.0.get(key), "{what}: {key:?}");
        }
        let more = other.0.iter().find(|(key, _)| !self.0.contains_key(*key));
        assert_eq!(more, None, "{what}");
    }
}

fn nothing(figures: &Figures) -> bool {
    let cost = figures.cost == Some(Atto::ZERO);
    cost && *figures == Figures { cost: figures.cost, ..Figures::default() }
}
