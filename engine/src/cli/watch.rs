//! `meterr watch`: follows an org over server-sent events and goes on after interruptions where it
//! stopped, by the id of the last event it has seen whole.

use std::time::Duration;

use serde_json::{Value, json};

use super::args::WatchArgs;
use super::client::{Client, path};
use super::sse::{Event, Events};
use super::table::{count, harmless};
use super::{ClientError, Console, Exit};

/// Wait before coming back after an interruption; doubles while nothing arrives.
const BACK_OFF_FIRST: Duration = Duration::from_millis(500);
/// Longest such wait.
const BACK_OFF_MAX: Duration = Duration::from_secs(10);

/// `meterr watch`
pub(super) fn watch(args: &WatchArgs, console: &mut Console) -> anyhow::Result<Exit> {
    follow(args, console, BACK_OFF_FIRST)
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
                        left -= u64::from(show(&event, events.last_id(), args, &client, console)?);
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

/// Prints an event; says whether it was one that counts.
fn show(
    event: &Event,
    id: Option<&str>,
    args: &WatchArgs,
    client: &Client,
    console: &mut Console,
) -> anyhow::Result<bool> {
    let data: Value = serde_json::from_str(&event.data).map_err(|error| {
        client.strange(format!("an event {:?} without JSON: {error}", event.kind))
    })?;
    let counts = matches!(event.kind.as_str(), "snapshot" | "change");
    if args.client.json {
        console.json(&json!({"event": event.kind, "id": id, "data": data}))?;
        return Ok(counts);
    }
    match event.kind.as_str() {
        "snapshot" | "change" => {
            let rows: Vec<Value> = client.list(&data, "rows")?;
            let sign = if event.kind == "snapshot" { '=' } else { '~' };
            for row in &rows {
                writeln!(console.out, "{sign} {}", line(row, client)?)?;
            }
        }
        "reset" => writeln!(console.err, "too much was missed; beginning anew")?,
        // A newer server may tell more; it is there with --json.
        _ => {}
    }
    console.out.flush()?;
    Ok(counts)
}

/// A row on one line: what it is about, then its totals.
fn line(row: &Value, client: &Client) -> Result<String, ClientError> {
    let mut labels = Vec::new();
    for name in ["view", "window", "window_start", "by", "key"] {
        match row.get(name) {
            None | Some(Value::Null) => {}
            Some(Value::String(text)) => labels.push(harmless(text)),
            Some(other) => labels.push(harmless(&other.to_string())),
        }
    }
    let events: i64 = client.read(row.get("events").unwrap_or(&Value::Null))?;
    let cost = match row.get("cost") {
        Some(Value::String(cost)) => harmless(cost),
        _ => "-".to_owned(),
    };
    let mut line = format!("{:<48}  {:>12} events  {cost} usd", labels.join(" "), count(events));
    if let Some(unpriced) = row.get("unpriced_events").and_then(Value::as_i64).filter(|n| *n != 0) {
        line.push_str(&format!("  {} unpriced", count(unpriced)));
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Server, client_args, events, hang_up, reply, run};
    use super::*;

    fn args(url: String, events: u64) -> WatchArgs {
        WatchArgs { org: "acme".into(), events: Some(events), client: client_args(url) }
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
            events("id: 3-7\nevent: snapshot\ndata: {\"rows\":[]}\n\nid: 3-8\ndata: {\"cut"),
            hang_up(),
            reply(503, r#"{"detail":"starting"}"#),
            events("id: 3-8\nevent: change\ndata: {\"rows\":[]}\n\n"),
            events(
                "id:\nevent: reset\ndata: {}\n\nid: 3-20\nevent: snapshot\ndata: {\"rows\":[]}\n\n",
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
        let data = json!({"rows": [
            {"view": "org_user_day", "window_start": "2026-01-02T00:00:00Z", "key": "u\u{1b}",
             "events": 1200, "cost": "0.0012", "unpriced_events": 3},
            {"view": "org_all", "window_start": null, "key": null, "events": 1, "cost": null},
        ]});
        let stream = format!(": hi\n\nid: 3-7\nevent: change\ndata: {data}\n\n");
        let server = Server::new(vec![events(&stream), events(&stream)]);
        let url = server.url();
        let ran = run(&["watch", "acme", "--events", "1", "--url", &url]);
        assert_eq!(ran.exit, Exit::Done, "{}", ran.err);
        assert_eq!(
            ran.out,
            "~ org_user_day 2026-01-02T00:00:00Z u\\u{1b}                1,200 events  0.0012 usd  3 \
             unpriced\n\
             ~ org_all                                                      1 events  - usd\n"
        );
        let ran = run(&["watch", "acme", "--events", "1", "--json", "--url", &url]);
        let event: Value = serde_json::from_str(&ran.out).unwrap();
        assert_eq!(event, json!({"event": "change", "id": "3-7", "data": data}));
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
