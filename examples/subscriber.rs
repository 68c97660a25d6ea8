//! Follows the spend of an org on NATS: the whole of it first, then what each commit changed.
//!
//! This needs a server, and a `meterr serve --nats …` on it:
//!
//! ```sh
//! cargo run --example subscriber -- nats://127.0.0.1:4222 acme
//! ```
//!
//! With a number as third argument it stops after so many events.

use futures::StreamExt;
use meterr_connectors::changes::LiveMessage;
use meterr_connectors::nats::connection::NatsSettings;
use meterr_connectors::nats::subscriber::{LiveEvent, Subscriber};

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let mut args = std::env::args().skip(1);
    let url = args.next().unwrap_or_else(|| "nats://127.0.0.1:4222".to_owned());
    let org = args.next().unwrap_or_else(|| "acme".to_owned());
    let mut left: u64 = args.next().map_or(Ok(u64::MAX), |text| text.parse())?;

    let settings = NatsSettings { url, ..NatsSettings::default() };
    let mut events = Subscriber::connect(&settings).await?.follow(&org).await?;
    while left > 0
        && let Some(event) = events.next().await
    {
        match event {
            LiveEvent::Snapshot(message) => show("is", &message),
            LiveEvent::Change(message) => show("changed", &message),
            LiveEvent::Reset => println!("too much was missed; beginning anew"),
            // Nothing is lost: it goes on where it stopped.
            LiveEvent::Interrupted(why) => {
                eprintln!("waiting: {why}");
                continue;
            }
        }
        left -= 1;
    }
    Ok(())
}

/// Prints what an org has spent by month. Figures are totals, so the newest one counts.
fn show(what: &str, message: &LiveMessage) {
    for row in message.views.get("org_month").into_iter().flatten() {
        let month = row.window_start.as_deref().unwrap_or("all time");
        let cost = row.figures.cost.map_or("not priced".to_owned(), |cost| format!("{cost} usd"));
        println!("{} {what}: {month} {} events {cost}", message.org, row.figures.events);
    }
}
