//! What the control log says, for the surfaces: price book, time zones, declared views. Shards keep
//! their own; this one answers questions that need no shard.

use std::collections::BTreeMap;

use meterr_connectors::api::{ViewDeclaration, Window};
use meterr_operators::control::{ControlChange, Seed, WindowSize};
use meterr_operators::price_book::PriceBook;
use meterr_operators::time::Time;

/// The state after a prefix of the control log.
#[derive(Debug, Default)]
pub struct ControlState {
    /// Position of the last record taken in.
    pub position: u64,
    /// What is fixed for the deployment.
    pub seed: Option<Seed>,
    /// Prices.
    pub book: PriceBook,
    /// Time zones by org.
    pub time_zones: BTreeMap<String, String>,
    /// Declared views by name.
    pub views: BTreeMap<String, ViewDeclaration>,
    /// Dead letters published again.
    pub replayed: BTreeMap<String, Time>,
}

impl ControlState {
    /// Takes in a record.
    ///
    /// # Errors
    /// When a price list is not acceptable, which what writes the log checks before.
    pub fn apply(&mut self, position: u64, change: &ControlChange) -> Result<(), String> {
        match change {
            ControlChange::Prices(change) => {
                self.book.apply(&change.prices, position).map_err(|errors| {
                    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
                })?;
            }
            ControlChange::TimeZone(change) => {
                self.time_zones.insert(change.org.clone(), change.time_zone.clone());
            }
            ControlChange::View(view) => {
                let declaration = ViewDeclaration {
                    name: view.name.clone(),
                    by: view.by.iter().map(ToString::to_string).collect(),
                    window: window(view.window),
                };
                self.views.insert(view.name.clone(), declaration);
            }
            ControlChange::ViewRemoved(view) => {
                self.views.remove(&view.name);
            }
            ControlChange::DeadLetterReplayed(replayed) => {
                self.replayed.insert(replayed.id.clone(), replayed.time);
            }
            ControlChange::Seed(seed) => {
                self.seed.get_or_insert_with(|| seed.clone());
            }
            ControlChange::Horizon(_) => {}
        }
        self.position = position;
        Ok(())
    }
}

fn window(size: WindowSize) -> Window {
    match size {
        WindowSize::Hour => Window::Hour,
        WindowSize::Day => Window::Day,
        WindowSize::Month => Window::Month,
        WindowSize::All => Window::All,
    }
}
