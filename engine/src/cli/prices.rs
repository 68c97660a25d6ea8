//! `meterr prices`: shows the price book and changes it, never without showing first what the change
//! does.
//!
//! Every change goes the same way: read, compare with what is in force, let the server work out the
//! effect on spend, ask, send. Only entries that differ are sent, so that importing a map of
//! thousands of models twice logs nothing the second time.

use std::path::Path;

use anyhow::Context;
use meterr_connectors::api::PriceEffect;
use meterr_connectors::price_import::{self, litellm};
use meterr_operators::price_book::{
    PRICE_FIELDS, PriceBook, PriceChange, PriceDiff, PriceEntry, PriceList, check_entries,
};
use meterr_operators::time::Time;
use serde_json::{Value, json};

use super::args::{PricesCommand, PricesListArgs, PricesSetArgs};
use super::client::{Client, Method, Query};
use super::table::{Table, busy_positions, count};
use super::{ClientError, Console, Exit, UsageError};

/// Rows of the comparison shown to people.
const ROWS_SHOWN: usize = 40;

/// `meterr prices …`
pub(super) fn prices(command: &PricesCommand, console: &mut Console) -> anyhow::Result<Exit> {
    match command {
        PricesCommand::List(args) => list(args, console),
        PricesCommand::Import(args) => {
            let entries = read(&args.file, args.effective_from, console)?;
            let ask = if args.yes { Ask::No } else { Ask::Yes };
            change(&Client::new(&args.client), entries, ask, args.client.json, console)
        }
        PricesCommand::Preview(args) => {
            let entries = read(&args.file, args.effective_from, console)?;
            change(&Client::new(&args.client), entries, Ask::Stop, args.client.json, console)
        }
        PricesCommand::Set(args) => {
            let ask = if args.yes { Ask::No } else { Ask::Yes };
            let entry = entry(args)?;
            change(&Client::new(&args.client), vec![entry], ask, args.client.json, console)
        }
    }
}

/// What happens between showing a change and making it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ask {
    /// Ask.
    Yes,
    /// Go on.
    No,
    /// Stop.
    Stop,
}

fn list(args: &PricesListArgs, console: &mut Console) -> anyhow::Result<Exit> {
    let client = Client::new(&args.client);
    let question: Query = args.model.iter().map(|model| ("model", model.clone())).collect();
    let answer = client.get("/v1/prices", &question)?;
    if args.client.json {
        console.json(&answer)?;
        return Ok(Exit::Done);
    }
    let entries: Vec<PriceEntry> = client.list(&answer, "prices")?;
    if entries.is_empty() {
        match &args.model {
            Some(model) => writeln!(console.out, "no price of model {model:?}")?,
            None => writeln!(console.out, "the price book is empty")?,
        }
        return Ok(Exit::Done);
    }
    let used = |at: &usize| entries.iter().any(|entry| entry.written()[*at].is_some());
    let fields: Vec<usize> = (0..PRICE_FIELDS.len()).filter(used).collect();
    let mut columns: Vec<String> = KEY_COLUMNS.iter().map(|column| (*column).to_owned()).collect();
    columns.extend(fields.iter().map(|at| format!(">{}", PRICE_FIELDS[*at].replace('_', " "))));
    let mut table = Table::new(&columns.iter().map(String::as_str).collect::<Vec<_>>());
    for entry in &entries {
        let written = serde_json::to_value(entry)?;
        let price = |at: &usize| match written.get(PRICE_FIELDS[*at]).and_then(Value::as_str) {
            Some(price) => price.to_owned(),
            None if entry.withdraws() => "withdrawn".to_owned(),
            None => "-".to_owned(),
        };
        table.row(key(entry).into_iter().chain(fields.iter().map(price)));
    }
    table.print(&mut console.out)?;
    writeln!(console.out, "usd per million tokens; images and searches per piece")?;
    Ok(Exit::Done)
}

const KEY_COLUMNS: [&str; 6] = ["provider", "model", "tier", ">above", "org", "from"];

/// The columns that say what an entry is for.
fn key(entry: &PriceEntry) -> [String; 6] {
    [
        entry.provider.clone(),
        entry.model.clone(),
        entry.tier.name().to_owned(),
        entry.min_input_tokens.to_string(),
        entry.org.clone().unwrap_or_else(|| "-".to_owned()),
        entry.effective_from.map_or_else(|| "beginning".to_owned(), |from| from.to_string()),
    ]
}

/// Reads a price book: ours in TOML or JSON, or LiteLLM's map. What could not be carried over is
/// told on stderr.
fn read(
    path: &Path,
    effective_from: Option<Time>,
    console: &mut Console,
) -> anyhow::Result<Vec<PriceEntry>> {
    let bytes = console.read(path, litellm::BYTES_MAX as u64)?;
    let named = || format!("{} is no price book", path.display());
    let json = bytes.trim_ascii_start().first() == Some(&b'{');
    let toml_name = path.extension().is_some_and(|extension| extension == "toml");
    let mut entries = if toml_name || !json {
        let text = std::str::from_utf8(&bytes).with_context(named)?;
        price_import::read_toml(text).with_context(named)?
    } else {
        /// A book of ours has a list under "prices"; in LiteLLM's map every value is a model.
        #[derive(serde::Deserialize)]
        struct Probe<'a> {
            #[serde(borrow)]
            prices: Option<&'a serde_json::value::RawValue>,
        }
        let probe: Probe<'_> = serde_json::from_slice(&bytes).with_context(named)?;
        match probe.prices {
            Some(list) if list.get().starts_with('[') => {
                serde_json::from_slice::<PriceList>(&bytes).with_context(named)?.prices
            }
            _ => imported(&bytes, effective_from, console).with_context(named)?,
        }
    };
    for entry in &mut entries {
        entry.effective_from = entry.effective_from.or(effective_from);
    }
    anyhow::ensure!(!entries.is_empty(), "{} holds no prices", path.display());
    checked(&entries)?;
    Ok(entries)
}

fn imported(
    json: &[u8],
    stamp: Option<Time>,
    console: &mut Console,
) -> anyhow::Result<Vec<PriceEntry>> {
    let import = litellm::import(json, stamp)?;
    let err = &mut console.err;
    writeln!(err, "{} entries read", count(import.entries.len() as i64))?;
    if !import.skipped.is_empty() {
        let first: Vec<&str> = import.skipped.iter().take(3).map(|s| s.key.as_str()).collect();
        let n = count(import.skipped.len() as i64);
        writeln!(err, "{n} models have no price that can be taken over ({}, …)", first.join(", "))?;
    }
    for (field, unmapped) in &import.unmapped {
        let (models, examples) = (count(unmapped.models as i64), unmapped.examples.join(", "));
        writeln!(err, "not taken over: {field} of {models} models ({examples})")?;
    }
    for rounded in &import.rounded {
        let price_import::Rounded { key, field, text } = rounded;
        writeln!(err, "rounded to 18 decimals: {field} of {key}, {text}")?;
    }
    Ok(import.entries)
}

fn checked(entries: &[PriceEntry]) -> anyhow::Result<()> {
    check_entries(entries).map_err(|errors| {
        let shown: Vec<String> = errors.iter().take(10).map(ToString::to_string).collect();
        let more = errors.len().saturating_sub(shown.len());
        let more = if more > 0 { format!("; and {more} more") } else { String::new() };
        UsageError(format!("{}{more}", shown.join("; "))).into()
    })
}

/// The entry that `prices set` describes.
fn entry(args: &PricesSetArgs) -> anyhow::Result<PriceEntry> {
    let prices = [
        ("input", &args.input),
        ("cached_input", &args.cached_input),
        ("cache_write", &args.cache_write),
        ("cache_write_1h", &args.cache_write_1h),
        ("output", &args.output),
        ("reasoning", &args.reasoning),
        ("audio_input", &args.audio_input),
        ("audio_output", &args.audio_output),
        ("image", &args.image),
        ("search", &args.search),
    ];
    let mut written = json!({
        "provider": args.provider,
        "model": args.model,
        "tier": args.tier,
        "min_input_tokens": args.min_input_tokens,
        "org": args.org,
    });
    for (field, price) in prices {
        if let Some(price) = price {
            written[field] = price.as_str().into();
        }
    }
    if let Some(from) = args.effective_from {
        written["effective_from"] = from.to_string().into();
    }
    let entry: PriceEntry =
        serde_json::from_value(written).map_err(|error| UsageError(error.to_string()))?;
    if entry.withdraws() && !args.withdraw {
        let what =
            "no price is given; name one, such as --input 0.15, or end the price with --withdraw";
        return Err(UsageError(what.to_owned()).into());
    }
    checked(std::slice::from_ref(&entry))?;
    Ok(entry)
}

/// Compares, shows, asks, and sends.
fn change(
    client: &Client,
    entries: Vec<PriceEntry>,
    ask: Ask,
    json: bool,
    console: &mut Console,
) -> anyhow::Result<Exit> {
    if ask == Ask::Yes && (json || !console.interactive) {
        let what = "there is nobody to ask; pass --yes to change prices without asking, or use \
                    \"meterr prices preview\"";
        return Err(UsageError(what.to_owned()).into());
    }
    let diff = compared(client, &entries)?;
    let differing: Vec<&PriceEntry> =
        diff.new.iter().chain(diff.changed.iter().map(|change| &change.entry)).collect();
    let body = json!({"prices": differing});
    let effect = match differing.is_empty() {
        true => None,
        false => Some(client.send_json(Method::Post, "/v1/prices/preview", &body)?),
    };
    if !json {
        show(&diff, console)?;
        if let Some(effect) = &effect {
            show_effect(&client.read(effect)?, console)?;
        }
    }
    let go_on = effect.is_some()
        && match ask {
            Ask::No => true,
            Ask::Stop => false,
            Ask::Yes => console.confirmed("change these prices?")?,
        };
    let position = match go_on {
        true => client.send_json(Method::Post, "/v1/prices", &body)?["position"].take(),
        false => Value::Null,
    };
    if json {
        console.json(&json!({
            "new": diff.new.len(),
            "changed": diff.changed.len(),
            "same": diff.same,
            "effect": effect,
            "position": position,
        }))?;
    } else if let Some(position) = position.as_str() {
        writeln!(console.out, "prices changed at position {position}")?;
    } else if effect.is_some() && ask == Ask::Yes {
        writeln!(console.err, "nothing was changed")?;
    }
    Ok(Exit::Done)
}

/// What differs from the price book in force.
fn compared(client: &Client, entries: &[PriceEntry]) -> anyhow::Result<PriceDiff> {
    let answer = client.get("/v1/prices", &Query::new())?;
    let in_force: Vec<PriceEntry> = client.list(&answer, "prices")?;
    let mut book = PriceBook::new();
    let odd = || -> ClientError { client.strange("a price book that breaks its own rules".into()) };
    // Positions do not matter to a comparison.
    book.apply(&in_force, 0).map_err(|_| odd())?;
    book.diff(entries).map_err(|errors| {
        let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
        UsageError(texts.join("; ")).into()
    })
}

fn show(diff: &PriceDiff, console: &mut Console) -> anyhow::Result<()> {
    let (new, changed) = (diff.new.len(), diff.changed.len());
    let mut columns = vec![""];
    columns.extend(KEY_COLUMNS);
    columns.push("prices");
    let mut table = Table::new(&columns);
    let changes = diff.changed.iter().map(|change| {
        let prices: Vec<String> = change.changes.iter().map(price_change).collect();
        ("changed", &change.entry, prices.join(", "))
    });
    let additions = diff.new.iter().map(|entry| {
        let written = serde_json::to_value(entry).unwrap_or_default();
        let prices = PRICE_FIELDS.iter().filter_map(|field| {
            Some(format!("{} {}", field.replace('_', " "), written.get(field)?.as_str()?))
        });
        ("new", entry, prices.collect::<Vec<_>>().join(", "))
    });
    for (sign, entry, prices) in changes.chain(additions).take(ROWS_SHOWN) {
        let cells = std::iter::once(sign.to_owned()).chain(key(entry));
        table.row(cells.chain(std::iter::once(prices)));
    }
    if !table.is_empty() {
        table.print(&mut console.out)?;
    }
    let hidden = (new + changed).saturating_sub(table.len());
    if hidden > 0 {
        writeln!(console.out, "… and {} more", count(hidden as i64))?;
    }
    let [new, changed, same] = [new, changed, diff.same].map(|n| count(n as i64));
    writeln!(console.out, "{new} new, {changed} changed, {same} already in force")?;
    Ok(())
}

/// A price that changes, as `input 2.5 → 3 (+20.00%)`.
fn price_change(change: &PriceChange) -> String {
    let per_piece = matches!(change.field, "image" | "search");
    let shown = |price: Option<meterr_operators::price_book::Price>| match price {
        None => "none".to_owned(),
        Some(price) if per_piece => price.get().to_string(),
        Some(price) => price.to_per_million(),
    };
    let percent = match change.basis_points {
        None => String::new(),
        Some(points) => {
            let sign = if points < 0 { '-' } else { '+' };
            let points = points.unsigned_abs();
            format!(" ({sign}{}.{:02}%)", points / 100, points % 100)
        }
    };
    let field = change.field.replace('_', " ");
    format!("{field} {} → {}{percent}", shown(change.old), shown(change.new))
}

fn show_effect(effect: &PriceEffect, console: &mut Console) -> anyhow::Result<()> {
    let out = &mut console.out;
    if effect.orgs == 0 {
        let as_of = busy_positions(effect.as_of.clone());
        writeln!(out, "no usage so far changes its cost (as of {as_of})")?;
        return Ok(());
    }
    let mut table = Table::new(&["org", ">events", ">cost before", ">cost after", ">difference"]);
    for row in &effect.by_org {
        table.row([
            row.org.clone(),
            count(row.events),
            row.cost_before.to_string(),
            row.cost_after.to_string(),
            (row.cost_after - row.cost_before).to_string(),
        ]);
    }
    if effect.by_org.len() > 1 || effect.by_org.len() < effect.orgs {
        table.row([
            format!("all {}", effect.orgs),
            count(effect.events),
            effect.cost_before.to_string(),
            effect.cost_after.to_string(),
            (effect.cost_after - effect.cost_before).to_string(),
        ]);
    }
    table.print(out)?;
    writeln!(out, "cost in usd, as of {}", busy_positions(effect.as_of.clone()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use meterr_connectors::api::OrgEffect;
    use meterr_operators::money::Atto;

    use super::super::testing::{Reply, Request, Server, reply, run, run_with_input};
    use super::*;

    fn effect() -> PriceEffect {
        PriceEffect {
            entries_changed: 1,
            orgs: 1,
            events: 1_200,
            cost_before: Atto::usd(3),
            cost_after: Atto::usd(2),
            by_org: vec![OrgEffect {
                org: "acme".into(),
                events: 1_200,
                cost_before: Atto::usd(3),
                cost_after: Atto::usd(2),
            }],
            as_of: "3:7,c:18".parse().unwrap(),
        }
    }

    /// A server whose book has one price.
    fn answer(request: &Request) -> Reply {
        let book = json!({"as_of": "c:18", "prices": [
            {"provider": "openai", "model": "gpt-4o", "input": "2.5", "output": "10"},
        ]});
        match (request.method.as_str(), request.target.as_str()) {
            ("GET", "/v1/prices") => reply(200, &book.to_string()),
            ("POST", "/v1/prices/preview") => reply(200, &json!(effect()).to_string()),
            ("POST", "/v1/prices") => reply(202, r#"{"position":"c:19"}"#),
            _ => reply(404, "{}"),
        }
    }

    fn posted(server: &Server) -> Vec<(String, Value)> {
        let requests = server.requests().into_iter().filter(|r| r.method == "POST");
        requests.map(|r| (r.target, serde_json::from_str(&r.body).unwrap())).collect()
    }

    #[test]
    fn a_change_is_shown_and_asked_about_before_it_is_made() {
        let server = Server::answering(answer);
        let url = server.url();
        let set =
            ["prices", "set", "openai", "gpt-4o", "--input", "2", "--output", "10", "--url", &url];
        let ran = run_with_input(&set, "n\n");
        assert_eq!(ran.exit, Exit::Done);
        assert!(ran.out.contains("input 2.5 → 2 (-20.00%)"), "{}", ran.out);
        assert!(
            ran.out.contains("acme   1,200            3           2          -1\n"),
            "{}",
            ran.out
        );
        assert!(ran.out.contains("0 new, 1 changed, 0 already in force\n"), "{}", ran.out);
        assert_eq!(ran.err, "change these prices? [y/N] nothing was changed\n");
        assert!(posted(&server).iter().all(|(target, _)| target == "/v1/prices/preview"));

        let ran = run_with_input(&set, "y\n");
        assert!(ran.out.ends_with("prices changed at position c:19\n"), "{}", ran.out);
        let (target, body) = posted(&server).pop().unwrap();
        let entry = json!({"provider": "openai", "model": "gpt-4o", "input": "2", "output": "10"});
        assert_eq!((target.as_str(), body), ("/v1/prices", json!({"prices": [entry]})));
    }

    #[test]
    fn only_what_differs_is_sent() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("book.toml");
        std::fs::write(
            &file,
            "[[prices]]\nprovider = \"openai\"\nmodel = \"gpt-4o\"\ninput = \"2.5\"\noutput = \"10\"\n\
             [[prices]]\nprovider = \"openai\"\nmodel = \"new\"\ninput = \"1\"\n",
        )
        .unwrap();
        let server = Server::answering(answer);
        let (file, url) = (file.to_str().unwrap(), server.url());
        let ran = run(&[
            "prices",
            "import",
            file,
            "--effective-from",
            "2026-01-15",
            "--yes",
            "--json",
            "--url",
            &url,
        ]);
        assert_eq!(ran.exit, Exit::Done, "{}", ran.err);
        let told: Value = serde_json::from_str(&ran.out).unwrap();
        assert_eq!(told["position"], "c:19");
        assert_eq!([&told["new"], &told["changed"], &told["same"]], [1, 0, 1]);
        assert_eq!(told["effect"]["events"], 1_200);
        let (_, body) = posted(&server).pop().unwrap();
        assert_eq!(
            body,
            json!({"prices": [{"provider": "openai", "model": "new", "input": "1",
                               "effective_from": "2026-01-15T00:00:00Z"}]})
        );
    }

    #[test]
    fn what_is_in_force_already_changes_nothing() {
        let server = Server::answering(answer);
        let book =
            r#"{"prices":[{"provider":"openai","model":"gpt-4o","input":"2.5","output":"10"}]}"#;
        let ran = run_with_input(&["prices", "preview", "-", "--url", &server.url()], book);
        assert_eq!(
            (ran.exit, ran.out.as_str()),
            (Exit::Done, "0 new, 0 changed, 1 already in force\n")
        );
        assert!(posted(&server).is_empty());
    }

    #[test]
    fn litellms_map_is_recognised() {
        let map = r#"{"sample_spec":{}, "gpt-4o":{"litellm_provider":"openai","mode":"chat",
            "input_cost_per_token":2.5e-06,"output_cost_per_token":1e-05}}"#;
        let server = Server::answering(answer);
        let ran = run_with_input(&["prices", "preview", "-", "--url", &server.url()], map);
        assert_eq!(ran.exit, Exit::Done, "{}", ran.err);
        assert!(ran.err.starts_with("1 entries read\n"), "{}", ran.err);
        assert_eq!(ran.out, "0 new, 0 changed, 1 already in force\n");
    }

    #[test]
    fn nobody_is_asked_where_nobody_is() {
        let server = Server::answering(answer);
        let url = server.url();
        let ran = run(&["prices", "set", "p", "m", "--input", "1", "--url", &url]);
        assert_eq!(ran.exit, Exit::Usage);
        assert!(ran.err.contains("pass --yes"), "{}", ran.err);
        assert!(server.requests().is_empty());
    }

    #[test]
    fn wrong_prices_are_refused_before_anything_is_sent() {
        let server = Server::answering(answer);
        let url = server.url();
        for (args, expected) in [
            (vec!["p", "m"], "no price is given; name one"),
            (vec!["p", "m", "--input", "cheap"], "\"cheap\" is not a decimal number"),
            (vec!["p", "m", "--input", "2000001"], "2000001"),
            (vec!["p", "m", "--input", "1", "--min-input-tokens", "5"], "min_input_tokens"),
            (
                vec!["p", "m", "--input", "1", "--effective-from", "2026-01-01T00:01:00Z"],
                "effective_from",
            ),
        ] {
            let mut line = vec!["prices", "set", "--yes", "--url", &url];
            line.extend(args);
            let ran = run(&line);
            assert_eq!(ran.exit, Exit::Usage, "{line:?}");
            assert!(ran.err.contains(expected), "{line:?}: {}", ran.err);
        }
        assert!(server.requests().is_empty());
    }

    #[test]
    fn the_book_is_listed_with_the_prices_it_has() {
        let server = Server::answering(answer);
        let ran = run(&["prices", "list", "--url", &server.url()]);
        assert_eq!(
            ran.out,
            "PROVIDER  MODEL   TIER      ABOVE  ORG  FROM       INPUT  OUTPUT\n\
             openai    gpt-4o  standard      0  -    beginning    2.5      10\n\
             usd per million tokens; images and searches per piece\n"
        );
    }

    #[test]
    fn a_file_that_is_no_price_book_is_named() {
        let ran = run_with_input(&["prices", "preview", "-"], "hello");
        assert_eq!(ran.exit, Exit::Failed);
        assert!(ran.err.starts_with("error: - is no price book: "), "{}", ran.err);
    }
}
