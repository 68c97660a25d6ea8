//! `meterr watch`: follows an org over server-sent events, or over NATS, and goes on after
//! interruptions where it stopped, by the id of the last event it has seen whole.

use std::time::Duration;

use anyhow::Context;
use futures::StreamExt;
use meterr_connectors::api::SpendRow as Row;
use meterr_connectors::changes::LiveMessage;
use meterr_connectors::nats::connection::NatsSettings;
use meterr_connectors::nats::subscriber::{LiveEvent, Subscriber};
use serde_json::{Value, json};

use super::args::{WatchArgs, WindowArg};
use super::client::{Client, path};
use super::query::{key_shown, window_shown};
use super::sse::{Event, Events};
use super::table::{busy_positions, cost, count, harmless};
use super::{Console, Exit};

/// Wait before coming back after an interruption; doubles while nothing arrives.
const BACK_OFF_FIRST: Duration = Duration::from_millis(500);
/// Longest such wait.
const BACK_OFF_MAX: Duration = Duration::from_secs(10);

/// `meterr watch`
pub(super) fn watch(args: &WatchArgs, console: &mut Console) -> anyhow::Result<Exit> {
    match args.nats.settings() {
        Some(server) => follow_nats(args, &server, console),
        None => follow(args, console, BACK_OFF_FIRST),
    }
}

/// Follows over NATS until enough was seen, or Ctrl-C.
fn follow_nats(
    args: &WatchArgs,
    server: &NatsSettings,
    console: &mut Console,
) -> anyhow::Result<Exit> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime.block_on(async {
        tokio::select! {
            // Events are printed whole: nothing is waited for in between.
            seen = print_events(args, server, console) => seen.map(|()| Exit::Done),
            stopped = tokio::signal::ctrl_c() => {
                stopped.context("cannot listen for Ctrl-C")?;
                Ok(Exit::Interrupted)
            }
        }
    })
}

/// Prints events as they come; the protocol is the subscriber's concern.
async fn print_events(
    args: &WatchArgs,
    server: &NatsSettings,
    console: &mut Console,
) -> anyhow::Result<()> {
    let client = Client::new(&args.client);
    let mut events = Subscriber::connect(server).await?.follow(&args.org).await?;
    let mut left = args.events.unwrap_or(u64::MAX);
    while left > 0 {
        let Some(event) = events.next().await else {
            anyhow::bail!("the connection to NATS was closed");
        };
        let (kind, message) = match event {
            LiveEvent::Snapshot(message) => ("snapshot", message),
            LiveEvent::Change(message) => ("change", message),
            LiveEvent::Reset => {
                show("reset", None, &json!({}), args, &client, console)?;
                continue;
            }
            LiveEvent::Interrupted(why) => {
                writeln!(console.err, "interrupted, coming back: {}", harmless(&why))?;
                continue;
            }
        };
        show(kind, Some(&id(&message)), &body(&message), args, &client, console)?;
        left -= 1;
    }
    Ok(())
}

/// The id that the same event has in a stream over HTTP.
fn id(message: &LiveMessage) -> String {
    format!("{}-{}", message.shard, message.epoch)
}

/// The body that the same event has in a stream over HTTP.
fn body(message: &LiveMessage) -> Value {
    let LiveMessage { shard, epoch, as_of, org, views, .. } = message;
    json!({"shard": shard, "epoch": epoch, "as_of": as_of, "org": org, "views": views})
}

fn follow(
    args: &WatchArgs,
    console: &mut Console,
    back_off_first: Duration,
) -> anyhow::Result<Exit> {
    let client = Client::new(&args.client);
    let path = path(&["v1", "orgs", &args.org, "stream"]);
    let mut last_id: Option<String> = None;
    let mut left = args.events.unwrap_or(u64::MAX);
    let mut back_off = back_off_first;
    let mut connected = false;
    while left > 0 {
        let body = match client.stream(&path, last_id.as_deref()) {
            Ok(body) => Some(body),
            // Only a server that was there before is waited for.
            Err(error) if connected && error.passing() => {
                interrupted(&error, console)?;
                None
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(body) = body {
            connected = true;
            let mut events = Events::new(body, last_id.take());
            while left > 0 {
                match events.next() {
                    Ok(Some(event)) => {
                        back_off = back_off_first;
                        let data = data(&event, &client)?;
                        show(&event.kind, events.last_id(), &data, args, &client, console)?;
                        left -= u64::from(counts(&event.kind));
                    }
                    Ok(None) => break,
                    Err(error) => {
                        interrupted(&error, console)?;
                        break;
                    }
                }
            }
            last_id = events.last_id().map(str::to_owned);
        }
        if left > 0 {
            std::thread::sleep(back_off);
            back_off = (back_off * 2).min(BACK_OFF_MAX);
        }
    }
    Ok(Exit::Done)
}

fn interrupted(error: &dyn std::error::Error, console: &mut Console) -> std::io::Result<()> {
    writeln!(console.err, "interrupted, coming back: {}", harmless(&error.to_string()))
}

fn data(event: &Event, client: &Client) -> anyhow::Result<Value> {
    let data = serde_json::from_str(&event.data);
    Ok(data.map_err(|error| {
        client.strange(format!("an event {:?} without JSON: {error}", event.kind))
    })?)
}

/// Whether an event is one of those that `--events` counts.
fn counts(kind: &str) -> bool {
    matches!(kind, "snapshot" | "change")
}

/// Prints an event.
fn show(
    kind: &str,
    id: Option<&str>,
    data: &Value,
    args: &WatchArgs,
    client: &Client,
    console: &mut Console,
) -> anyhow::Result<()> {
    if args.client.json {
        console.json(&json!({"event": kind, "id": id, "data": data}))?;
        return Ok(console.out.flush()?);
    }
    match kind {
        "snapshot" | "change" => print_rows(kind, data, client, console)?,
        "reset" => writeln!(console.err, "too much was missed; beginning anew")?,
        // A newer server may tell more; it is there with --json.
        _ => {}
    }
    Ok(console.out.flush()?)
}

/// Prints the rows of a snapshot or change under a line that says which commit it shows.
fn print_rows(
    kind: &str,
    data: &Value,
    client: &Client,
    console: &mut Console,
) -> anyhow::Result<()> {
    let Some(views) = data.get("views").and_then(Value::as_object) else {
        return Err(client.strange("no \"views\" in an event".to_owned()).into());
    };
    let as_of = data.get("as_of").and_then(Value::as_str).unwrap_or("?");
    let as_of = as_of.parse().map_or_else(|_| harmless(as_of), busy_positions);
    writeln!(console.out, "{kind} as of {as_of}")?;
    let mut lines = 0;
    for view in views.keys() {
        let rows: Vec<Row> = client.list(&data["views"], view)?;
        for row in &rows {
            writeln!(console.out, "  {}", line(view, row))?;
        }
        lines += rows.len();
    }
    if lines == 0 {
        writeln!(console.out, "  no spend yet")?;
    }
    Ok(())
}

/// A row on one line: what it is about, then its totals. Columns are of fixed width, since what
/// comes next is not known.
fn line(view: &str, row: &Row) -> String {
    let start = row.window_start.as_deref();
    let window = match BUILT_IN.iter().find(|(name, _)| *name == view) {
        Some((_, window)) => window_shown(start, *window),
        None => start.unwrap_or("all").to_owned(),
    };
    let key = row.key.as_deref().map(key_shown).unwrap_or_default();
    let (view, window, key) = (harmless(view), harmless(&window), harmless(&key));
    let mut line = format!("{view:<14} {window:<20} {key:<24} ");
    if row.figures.events == 0 {
        line.push_str("nothing any more");
        return line;
    }
    let (events, s) = (count(row.figures.events), if row.figures.events == 1 { ' ' } else { 's' });
    line.push_str(&format!("{events:>11} event{s}  {} usd", cost(row.figures.cost)));
    if row.figures.unpriced_events != 0 {
        line.push_str(&format!("  {} unpriced", count(row.figures.unpriced_events)));
    }
    line
}

/// Views whose windows have short names; those of declared views are shown as they come.
const BUILT_IN: [(&str, WindowArg); 10] = [
    ("org_hour", WindowArg::Hour),
    ("org_day", WindowArg::Day),
    ("org_month", WindowArg::Month),
    ("org_all", WindowArg::All),
    ("user_day", WindowArg::Day),
    ("user_month", WindowArg::Month),
    ("model_day", WindowArg::Day),
    ("model_month", WindowArg::Month),
    ("feature_day", WindowArg::Day),
    ("feature_month", WindowArg::Month),
];

#[cfg(test)]
mod tests {
    use meterr_connectors::api::Figures;
    use meterr_operators::money::Atto;

    use super::super::args::NatsArgs;
    use super::super::testing::{Server, client_args, events, hang_up, reply, run};
    use super::*;

    fn args(url: String, events: u64) -> WatchArgs {
        WatchArgs {
            org: "acme".into(),
            events: Some(events),
            client: client_args(url),
            nats: NatsArgs::default(),
        }
    }

    fn quickly(args: &WatchArgs) -> anyhow::Result<Exit> {
        let mut console = Console {
            input: None,
            out: Box::new(std::io::sink()),
            err: Box::new(std::io::sink()),
            interactive: false,
            progress: false,
        };
        follow(args, &mut console, Duration::from_millis(1))
    }

    #[test]
    fn an_interruption_is_made_good_from_the_last_whole_event() {
        let server = Server::new(vec![
            events("id: 3-7\nevent: snapshot\ndata: {\"views\":{}}\n\nid: 3-8\ndata: {\"cut"),
            hang_up(),
            reply(503, r#"{"detail":"starting"}"#),
            events("id: 3-8\nevent: change\ndata: {\"views\":{}}\n\n"),
            events(
                "id:\nevent: reset\ndata: {}\n\nid: 3-20\nevent: snapshot\ndata: {\"views\":{}}\n\n",
            ),
        ]);
        assert_eq!(quickly(&args(server.url(), 3)).unwrap(), Exit::Done);
        let ids: Vec<_> = server
            .requests()
            .iter()
            .map(|request| request.header("last-event-id").map(str::to_owned))
            .collect();
        let after = |id: &str| Some(id.to_owned());
        assert_eq!(ids, [None, after("3-7"), after("3-7"), after("3-7"), after("3-8")]);
        assert_eq!(server.requests()[0].target, "/v1/orgs/acme/stream");
    }

    #[test]
    fn rows_are_lines_and_json_is_an_event_a_line() {
        let row = |window_start: Option<&str>, key: Option<&str>, events, unpriced_events| {
            let priced = (events > unpriced_events).then_some(Atto::usd(3));
            let figures = Figures { events, cost: priced, unpriced_events, ..Figures::default() };
            let (window_start, key) = (window_start.map(str::to_owned), key.map(str::to_owned));
            Row { window_start, key, figures }
        };
        let midnight = Some("2026-01-02T00:00:00+01:00");
        let data = json!({"shard": 3, "epoch": 7, "as_of": "3:9,c:1", "org": "acme", "views": {
            "org_all": [row(None, None, 1, 1)],
            "team": [row(midnight, Some("[\"u\",\"x\"]"), 2, 0)],
            "user_day": [row(midnight, Some("u\u{1b}"), 1_200, 3), row(midnight, Some(""), 0, 0)],
        }});
        let stream = format!(": hi\n\nid: 3-7\nevent: change\ndata: {data}\n\n");
        let server = Server::new(vec![events(&stream), events(&stream)]);
        let url = server.url();
        let ran = run(&["watch", "acme", "--events", "1", "--url", &url]);
        assert_eq!(ran.exit, Exit::Done, "{}", ran.err);
        let expected = [
            "change as of 3:9,c:1",
            "  org_all        all                                                     1 event   - usd  1 unpriced",
            "  team           2026-01-02T00:00:00+01:00 [\"u\",\"x\"]                          2 events  3 usd",
            "  user_day       2026-01-02           u\\u{1b}                        1,200 events  3 usd  3 unpriced",
            "  user_day       2026-01-02           (none)                   nothing any more",
        ];
        assert_eq!(ran.out.lines().collect::<Vec<_>>(), expected);
        let ran = run(&["watch", "acme", "--events", "1", "--json", "--url", &url]);
        let event: Value = serde_json::from_str(&ran.out).unwrap();
        assert_eq!(event, json!({"event": "change", "id": "3-7", "data": data}));
    }

    #[test]
    fn an_org_without_spend_says_so_and_another_form_is_recognised() {
        let server = Server::new(vec![
            events(
                "id: 3-7\nevent: snapshot\ndata: {\"as_of\":\"3:0,c:1\",\"views\":{\"org_all\":[]}}\n\n",
            ),
            events("id: 3-7\nevent: snapshot\ndata: {\"rows\":[]}\n\n"),
        ]);
        let ran = run(&["watch", "acme", "--events", "1", "--url", &server.url()]);
        assert_eq!(ran.out, "snapshot as of c:1\n  no spend yet\n");
        let ran = run(&["watch", "acme", "--events", "1", "--url", &server.url()]);
        assert!(ran.err.contains("no \"views\" in an event"), "{}", ran.err);
    }

    #[test]
    fn a_first_refusal_is_final() {
        let server = Server::new(vec![reply(503, r#"{"detail":"all 5 streams are taken"}"#)]);
        let error = quickly(&args(server.url(), 1)).unwrap_err();
        assert!(error.to_string().contains("all 5 streams are taken"));
        let server = Server::new(vec![reply(200, "{}")]);
        let error = quickly(&args(server.url(), 1)).unwrap_err();
        assert!(error.to_string().contains("not an event stream"), "{error}");
    }
}
