//! The subscriber type that programs in Rust use, in the same surroundings as the plain client.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::time::Duration;

use futures::StreamExt;
use meterr_connectors::nats::connection::NatsSettings;
use meterr_connectors::nats::subscriber::{LiveEvent, Subscriber};
use tokio::time::{sleep, timeout};

use crate::seen::Seen;

/// Up to which epoch each org's followers must get before they may end; set once nothing more comes.
pub type Goals = Mutex<Option<BTreeMap<String, u64>>>;

/// Follows an org until everything has come.
pub async fn follow(org: &str, url: &str, goals: &Goals) -> Seen {
    let settings = NatsSettings { url: url.to_owned(), ..NatsSettings::default() };
    let subscriber = loop {
        match Subscriber::connect(&settings).await {
            Ok(subscriber) => break subscriber,
            // The server is being killed; who connects first must see it up.
            Err(_) => sleep(Duration::from_millis(10)).await,
        }
    };
    let mut events = subscriber.follow(org).await.unwrap();
    let mut seen = Seen::new(org);
    let mut begun = false;
    loop {
        let reached = |goals: &BTreeMap<String, u64>| begun && seen.last() >= goals[org];
        if goals.lock().unwrap().as_ref().is_some_and(reached) {
            return seen;
        }
        let Ok(event) = timeout(Duration::from_millis(50), events.next()).await else { continue };
        match event.expect("a subscription does not end by itself") {
            LiveEvent::Snapshot(all) => {
                assert!(!begun, "{org}: a second snapshot, behind {}", seen.last());
                begun = true;
                seen.began = all.epoch;
                seen.table.apply(&all.views);
            }
            LiveEvent::Change(change) => {
                assert!(begun && change.epoch > seen.last(), "{org}: {change:?}");
                seen.change(change.epoch, &change.views);
            }
            LiveEvent::Reset => panic!("{org}: too much was missed behind {}", seen.last()),
            LiveEvent::Interrupted(_) => {}
        }
    }
}
