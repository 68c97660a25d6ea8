//! `meterr query`, `top` and `unpriced`: questions that are answered by a table.

use meterr_connectors::api::{Figures, UnpricedRow};
use meterr_operators::time::Time;
use serde_json::Value;

use super::args::{QueryArgs, TopArgs, TopByArg, UnpricedArgs, WindowArg};
use super::client::{Client, Query, path};
use super::table::{self, Table, busy_positions, count, harmless};
use super::{ClientError, Console, Exit};

/// Most rows the server gives in one page.
const PAGE_ROWS_MAX: u32 = 10_000;

/// `meterr query`
pub(super) fn query(args: &QueryArgs, console: &mut Console) -> anyhow::Result<Exit> {
    let client = Client::new(&args.client);
    let mut segments = vec!["v1", "orgs", &args.org];
    if let Some(user) = &args.user {
        segments.extend(["users", user]);
    }
    segments.push("spend");
    let path = path(&segments);

    let mut question: Query =
        vec![("window", args.window.name().to_owned()), ("by", args.by.clone())];
    let times = [("from", &args.from), ("to", &args.to)];
    question.extend(times.iter().filter_map(|(name, t)| t.map(|t: Time| (*name, t.to_string()))));
    if let Some(position) = &args.min_position {
        question.push(("min_position", position.to_string()));
    }

    // All pages show the same moment, so together they are one answer.
    let mut rows: Vec<Value> = Vec::new();
    let mut cursor: Option<String> = None;
    let mut answer;
    loop {
        let wanted = args.limit - rows.len() as u32;
        let mut page_question = question.clone();
        page_question.push(("limit", wanted.min(PAGE_ROWS_MAX).to_string()));
        page_question.extend(cursor.map(|cursor| ("cursor", cursor)));
        answer = client.get(&path, &page_question)?;
        let Some(Value::Array(page)) = answer.get_mut("rows").map(Value::take) else {
            return Err(client.strange("no list \"rows\" in the answer".to_owned()).into());
        };
        let empty = page.is_empty();
        rows.extend(page.into_iter().take(wanted as usize));
        cursor = answer.get("next_cursor").and_then(Value::as_str).map(str::to_owned);
        if cursor.is_none() || empty || rows.len() as u32 >= args.limit {
            break;
        }
    }
    if args.client.json {
        answer["rows"] = Value::Array(rows);
        console.json(&answer)?;
        return Ok(Exit::Done);
    }

    let window = args.window;
    let grouped = args.by != "none";
    let figures = rows
        .iter()
        .map(|row| {
            let mut labels = vec![window_shown(text(row, "window_start"), window)];
            if grouped {
                labels.push(key_shown(text(row, "key").unwrap_or("")));
            }
            Ok((labels, client.read::<Figures>(row)?))
        })
        .collect::<Result<Vec<_>, ClientError>>()?;
    let by = args.by.strip_prefix("tag:").unwrap_or(&args.by);
    let labels: &[&str] = if grouped { &[window.name(), by] } else { &[window.name()] };
    if figures.is_empty() {
        writeln!(console.out, "no spend in these windows")?;
    } else {
        table::figures(labels, &figures).print(&mut console.out)?;
    }
    if cursor.is_some() {
        writeln!(console.err, "there are more rows; raise --limit, or narrow --from and --to")?;
    }
    unpriced_hint(&figures, Some(&args.org), console)?;
    as_of(&answer, console)?;
    Ok(Exit::Done)
}

/// `meterr top`
pub(super) fn top(args: &TopArgs, console: &mut Console) -> anyhow::Result<Exit> {
    let client = Client::new(&args.client);
    let mut question: Query = vec![
        ("by", args.by.name().to_owned()),
        ("window", args.window.name().to_owned()),
        ("n", args.n.to_string()),
    ];
    question.extend(args.at.map(|at| ("at", at.to_string())));
    question.extend(args.org.clone().map(|org| ("org", org)));
    question.extend(args.min_position.as_ref().map(|p| ("min_position", p.to_string())));
    let answer = client.get("/v1/top", &question)?;
    if args.client.json {
        console.json(&answer)?;
        return Ok(Exit::Done);
    }
    let users = args.by == TopByArg::User;
    let rows: Vec<Value> = client.list(&answer, "rows")?;
    let figures = rows
        .iter()
        .map(|row| {
            let mut labels = vec![key_shown(text(row, "key").unwrap_or(""))];
            if users {
                labels.insert(0, text(row, "org").unwrap_or("").to_owned());
            }
            Ok((labels, client.read::<Figures>(row)?))
        })
        .collect::<Result<Vec<_>, ClientError>>()?;
    let labels: &[&str] = if users { &["org", "user"] } else { &[args.by.name()] };
    if figures.is_empty() {
        let of = match args.at {
            _ if args.window == WindowArg::All => "so far".to_owned(),
            None => {
                let this = match args.window {
                    WindowArg::Hour => "in this hour",
                    WindowArg::Day => "today",
                    WindowArg::Month | WindowArg::All => "in this month",
                };
                format!("{this}; --at DATE shows another, --window all everything")
            }
            Some(at) => format!("in the {} of {at}", args.window.name()),
        };
        writeln!(console.out, "no spend {of}")?;
    } else {
        table::figures(labels, &figures).print(&mut console.out)?;
    }
    unpriced_hint(&figures, None, console)?;
    as_of(&answer, console)?;
    Ok(Exit::Done)
}

/// `meterr unpriced`
pub(super) fn unpriced(args: &UnpricedArgs, console: &mut Console) -> anyhow::Result<Exit> {
    let client = Client::new(&args.client);
    let answer = client.get(&path(&["v1", "orgs", &args.org, "unpriced"]), &Query::new())?;
    if args.client.json {
        console.json(&answer)?;
        return Ok(Exit::Done);
    }
    let rows: Vec<UnpricedRow> = client.list(&answer, "rows")?;
    if rows.is_empty() {
        writeln!(console.out, "everything is priced")?;
    } else {
        let mut table = Table::new(&[
            "provider",
            "model",
            "tier",
            ">above tokens",
            "lacking",
            "first",
            "last",
            ">events",
        ]);
        for row in rows {
            table.row([
                row.provider,
                row.model,
                row.tier,
                row.min_input_tokens.to_string(),
                row.lacking.join(", "),
                row.first.to_string(),
                row.last.to_string(),
                count(row.events),
            ]);
        }
        table.print(&mut console.out)?;
    }
    as_of(&answer, console)?;
    Ok(Exit::Done)
}

fn text<'a>(row: &'a Value, name: &str) -> Option<&'a str> {
    row.get(name)?.as_str()
}

/// The beginning of a window as people name it.
pub(super) fn window_shown(start: Option<&str>, window: WindowArg) -> String {
    let Some(start) = start else { return "all".to_owned() };
    let shown = match window {
        WindowArg::Month => start.get(..7),
        WindowArg::Day => start.get(..10),
        WindowArg::Hour | WindowArg::All => None,
    };
    shown.unwrap_or(start).to_owned()
}

/// A key; events without the feature or tag have the empty one.
pub(super) fn key_shown(key: &str) -> String {
    if key.is_empty() { "(none)".to_owned() } else { key.to_owned() }
}

fn unpriced_hint(
    rows: &[(Vec<String>, Figures)],
    org: Option<&str>,
    console: &mut Console,
) -> anyhow::Result<()> {
    let events: i64 = rows.iter().fold(0, |sum, (_, f)| sum.saturating_add(f.unpriced_events));
    if events > 0 {
        let are = if events == 1 { "event is" } else { "events are" };
        let (events, org) = (count(events), org.unwrap_or("ORG"));
        writeln!(
            console.err,
            "{events} {are} not in the cost, for lack of a price: meterr unpriced {org}"
        )?;
    }
    Ok(())
}

/// Says up to where the answer counts, in the form `--min-position` takes.
fn as_of(answer: &Value, console: &mut Console) -> anyhow::Result<()> {
    if let Some(position) = answer.get("as_of").and_then(Value::as_str) {
        let shown = position.parse().map_or_else(|_| harmless(position), busy_positions);
        writeln!(console.out, "as of {shown}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use meterr_connectors::api::{SpendRow, TopRow};
    use meterr_operators::money::Atto;
    use serde_json::json;

    use super::super::testing::{Server, reply, run};
    use super::*;

    fn row(window_start: &str, key: Option<&str>, events: i64) -> Value {
        let figures = Figures { events, cost: Some(Atto::usd(events)), ..Figures::default() };
        let window_start = Some(window_start.to_owned());
        serde_json::to_value(SpendRow { window_start, key: key.map(str::to_owned), figures })
            .unwrap()
    }

    fn page(rows: &[Value], next_cursor: Option<&str>) -> String {
        json!({"rows": rows, "next_cursor": next_cursor, "as_of": "3:7,c:1", "epochs": [[3, 9]]})
            .to_string()
    }

    #[test]
    fn the_answer_becomes_a_table() {
        let rows = [
            row("2026-01-02T00:00:00+01:00", Some("chat"), 5),
            row("2026-01-03T00:00:00+01:00", Some(""), 1_000),
        ];
        let server = Server::new(vec![reply(200, &page(&rows, None))]);
        let ran = run(&[
            "query",
            "acme",
            "--by",
            "feature",
            "--from",
            "2026-01-02",
            "--min-position",
            "3:7",
            "--url",
            &server.url(),
        ]);
        assert_eq!(ran.exit, Exit::Done, "{}", ran.err);
        assert_eq!(
            ran.out,
            "DAY         FEATURE  EVENTS  INPUT  OUTPUT  COST USD\n\
             2026-01-02  chat          5      0       0         5\n\
             2026-01-03  (none)    1,000      0       0      1000\n\
             as of 3:7,c:1\n"
        );
        assert_eq!(
            server.requests()[0].target,
            "/v1/orgs/acme/spend?window=day&by=feature&from=2026-01-02T00%3A00%3A00Z\
             &min_position=3%3A7&limit=1000"
        );
    }

    #[test]
    fn pages_become_one_answer() {
        let rows: Vec<Value> =
            (1..=3).map(|n| row(&format!("2026-01-0{n}T00:00:00Z"), None, n)).collect();
        let server = Server::new(vec![
            reply(200, &page(&rows[..2], Some("abc.2"))),
            reply(200, &page(&rows[2..], Some("abc.3"))),
        ]);
        let ran = run(&[
            "query",
            "acme",
            "--user",
            "u 1",
            "--limit",
            "3",
            "--json",
            "--url",
            &server.url(),
        ]);
        let answer: Value = serde_json::from_str(&ran.out).unwrap();
        assert_eq!(answer["rows"], json!(rows));
        assert_eq!(answer["next_cursor"], "abc.3", "there is more, and where");
        let second = &server.requests()[1].target;
        assert!(second.starts_with("/v1/orgs/acme/users/u%201/spend?"), "{second}");
        assert!(second.ends_with("&limit=1&cursor=abc.2"), "{second}");
    }

    #[test]
    fn unpriced_usage_is_pointed_out() {
        let figures = Figures { events: 3, unpriced_events: 3, ..Figures::default() };
        let row = TopRow { org: Some("acme".into()), key: "u\u{1b}".into(), figures };
        let server = Server::new(vec![reply(
            200,
            &json!({"rows": [row], "as_of": "0:1", "epochs": []}).to_string(),
        )]);
        let ran = run(&["top", "--by", "user", "--url", &server.url()]);
        assert!(ran.out.contains("acme  u\\u{1b}"), "{}", ran.out);
        assert!(ran.out.contains("UNPRICED  COST USD\n"), "{}", ran.out);
        assert!(ran.err.starts_with("3 events are not in the cost, for lack of a price"));
        assert_eq!(server.requests()[0].target, "/v1/top?by=user&window=day&n=10");
    }

    #[test]
    fn no_rows_are_said_to_be_none_and_idle_shards_are_left_out() {
        let answer = json!({"rows": [], "as_of": "0:0,1:7,2:0,c:3", "epochs": []}).to_string();
        let server = Server::new((0..4).map(|_| reply(200, &answer)).collect());
        let url = server.url();
        let ran = run(&["query", "acme", "--url", &url]);
        assert_eq!(ran.out, "no spend in these windows\nas of 1:7,c:3\n");
        let ran = run(&["top", "--url", &url]);
        assert_eq!(
            ran.out,
            "no spend today; --at DATE shows another, --window all everything\nas of 1:7,c:3\n"
        );
        let ran = run(&["top", "--at", "2026-01-02", "--url", &url]);
        assert!(
            ran.out.starts_with("no spend in the day of 2026-01-02T00:00:00Z\n"),
            "{}",
            ran.out
        );
        let ran = run(&["top", "--window", "all", "--url", &url]);
        assert!(ran.out.starts_with("no spend so far\n"), "{}", ran.out);
    }

    #[test]
    fn what_lacks_a_price_is_listed() {
        let row = json!({"provider": "p", "model": "m", "tier": "standard", "min_input_tokens": 0,
            "lacking": ["input", "output"], "first": "2026-01-02T03:00:00Z",
            "last": "2026-01-02T03:15:00Z", "events": 7});
        let answer = json!({"rows": [row], "as_of": "0:1", "epochs": []}).to_string();
        let empty = json!({"rows": [], "as_of": "0:1", "epochs": []}).to_string();
        let server = Server::new(vec![reply(200, &answer), reply(200, &empty)]);
        let ran = run(&["unpriced", "acme", "--url", &server.url()]);
        assert!(ran.out.contains("input, output  2026-01-02T03:00:00Z"), "{}", ran.out);
        let ran = run(&["unpriced", "acme", "--url", &server.url()]);
        assert_eq!(ran.out, "everything is priced\nas of 0:1\n");
    }

    #[test]
    fn another_servers_answer_is_recognised() {
        let server = Server::new(vec![reply(200, "[]"), reply(404, r#"{"detail":"no such org"}"#)]);
        let ran = run(&["query", "acme", "--url", &server.url()]);
        assert_eq!(ran.exit, Exit::Failed);
        assert!(ran.err.contains("does not answer like a meterr server"), "{}", ran.err);
        let ran = run(&["query", "acme", "--url", &server.url()]);
        assert_eq!(ran.err, "error: the server refused with status 404: no such org\n");
    }
}
