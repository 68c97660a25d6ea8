//! Commands on what the control log holds beside prices (time zones, declared views), and the state
//! of the shards.

use meterr_connectors::api::{ShardStatus, ViewDeclaration};
use serde_json::{Value, json};

use super::args::{StatusArgs, TimeZoneCommand, ViewsCommand};
use super::client::{Client, Method, Query, path};
use super::table::{Table, harmless};
use super::{Console, Exit};

/// `meterr time-zone …`
pub(super) fn time_zone(command: &TimeZoneCommand, console: &mut Console) -> anyhow::Result<Exit> {
    match command {
        TimeZoneCommand::Get(args) => {
            let client = Client::new(&args.client);
            let answer = client.get(&zone_path(&args.org), &Query::new())?;
            if args.client.json {
                console.json(&answer)?;
                return Ok(Exit::Done);
            }
            let zone: String = client.read(answer.get("time_zone").unwrap_or(&Value::Null))?;
            writeln!(console.out, "{}", harmless(&zone))?;
            Ok(Exit::Done)
        }
        TimeZoneCommand::Set(args) => {
            let client = Client::new(&args.client);
            let body = json!({"time_zone": args.time_zone});
            let answer = client.send_json(Method::Put, &zone_path(&args.org), &body)?;
            changed(&answer, args.client.json, "time zone changed", console)
        }
    }
}

fn zone_path(org: &str) -> String {
    path(&["v1", "orgs", org, "time-zone"])
}

/// `meterr views …`
pub(super) fn views(command: &ViewsCommand, console: &mut Console) -> anyhow::Result<Exit> {
    match command {
        ViewsCommand::List(args) => {
            let client = Client::new(&args.client);
            let answer = client.get("/v1/views", &Query::new())?;
            if args.client.json {
                console.json(&answer)?;
                return Ok(Exit::Done);
            }
            let views: Vec<ViewDeclaration> = client.list(&answer, "views")?;
            if views.is_empty() {
                writeln!(console.out, "no declared views")?;
                return Ok(Exit::Done);
            }
            let mut table = Table::new(&["name", "by", "window"]);
            for view in views {
                let window = serde_json::to_value(view.window)?;
                let window = window.as_str().unwrap_or_default().to_owned();
                table.row([view.name, view.by.join(", "), window]);
            }
            table.print(&mut console.out)?;
            Ok(Exit::Done)
        }
        ViewsCommand::Declare(args) => {
            let client = Client::new(&args.client);
            let body = json!({"name": args.name, "by": args.by, "window": args.window.name()});
            let answer = client.send_json(Method::Post, "/v1/views", &body)?;
            changed(&answer, args.client.json, "view declared", console)
        }
        ViewsCommand::Remove(args) => {
            let client = Client::new(&args.client);
            let answer = client.delete(&path(&["v1", "views", &args.name]))?;
            changed(&answer, args.client.json, "view removed", console)
        }
    }
}

/// `meterr status`
pub(super) fn status(args: &StatusArgs, console: &mut Console) -> anyhow::Result<Exit> {
    let client = Client::new(&args.client);
    let answer = client.get("/v1/shards", &Query::new())?;
    let shards: Vec<ShardStatus> = client.list(&answer, "shards")?;
    if args.client.json {
        console.json(&answer)?;
    } else {
        // Nobody needs to be told that the only node owns every shard.
        let several = shards.iter().any(|shard| shard.owner.is_some() || shard.elsewhere);
        let owner: &[&str] = if several { &["owner"] } else { &[] };
        let columns = [">epoch", ">position", ">head", ">lag", ">control", "problem"];
        let mut table = Table::new(&[&[">shard", "state"], owner, &columns].concat());
        for shard in &shards {
            let owner = several.then(|| shard.owner.clone().unwrap_or_else(|| "-".to_owned()));
            let first = [shard.shard.to_string(), shard.state.clone()].into_iter().chain(owner);
            table.row(first.chain([
                shard.epoch.to_string(),
                shard.usage_position.to_string(),
                shard.usage_head.to_string(),
                shard.usage_head.saturating_sub(shard.usage_position).to_string(),
                shard.control_position.to_string(),
                shard.problem.clone().unwrap_or_default(),
            ]));
        }
        table.print(&mut console.out)?;
    }
    let stopped = shards.iter().any(|shard| shard.state == "stopped");
    Ok(if stopped { Exit::Failed } else { Exit::Done })
}

/// Prints where a change stands in the log.
pub(super) fn changed(
    answer: &Value,
    json: bool,
    what: &str,
    console: &mut Console,
) -> anyhow::Result<Exit> {
    if json {
        console.json(answer)?;
        return Ok(Exit::Done);
    }
    match answer.get("position").and_then(Value::as_str) {
        Some(position) => writeln!(console.out, "{what} at position {}", harmless(position))?,
        None => writeln!(console.out, "{what}")?,
    }
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Server, reply, run};
    use super::*;

    #[test]
    fn time_zones_are_shown_and_changed() {
        let server = Server::new(vec![
            reply(200, r#"{"time_zone":"Europe/Berlin"}"#),
            reply(202, r#"{"position":"c:4"}"#),
        ]);
        let url = server.url();
        assert_eq!(run(&["time-zone", "get", "acme", "--url", &url]).out, "Europe/Berlin\n");
        let ran = run(&["time-zone", "set", "acme", "Asia/Tokyo", "--url", &url]);
        assert_eq!(ran.out, "time zone changed at position c:4\n");
        let request = &server.requests()[1];
        assert_eq!(
            (request.method.as_str(), request.target.as_str()),
            ("PUT", "/v1/orgs/acme/time-zone")
        );
        assert_eq!(request.body, r#"{"time_zone":"Asia/Tokyo"}"#);
    }

    #[test]
    fn views_are_declared_listed_and_removed() {
        let view = json!({"name": "v", "by": ["user", "tag:team"], "window": "hour"});
        let server = Server::new(vec![
            reply(202, r#"{"position":"c:4"}"#),
            reply(200, &json!({"views": [view]}).to_string()),
            reply(202, r#"{"position":"c:5"}"#),
        ]);
        let url = server.url();
        let ran = run(&[
            "views",
            "declare",
            "v",
            "--by",
            "user,tag:team",
            "--window",
            "hour",
            "--url",
            &url,
        ]);
        assert_eq!(ran.out, "view declared at position c:4\n", "{}", ran.err);
        let ran = run(&["views", "list", "--url", &url]);
        assert_eq!(ran.out, "NAME  BY              WINDOW\nv     user, tag:team  hour\n");
        run(&["views", "remove", "v", "--url", &url]);
        let requests = server.requests();
        assert_eq!(serde_json::from_str::<Value>(&requests[0].body).unwrap(), view);
        assert_eq!(requests[2].method, "DELETE");
        assert_eq!(requests[2].target, "/v1/views/v");
    }

    #[test]
    fn a_stopped_shard_shows_in_the_exit_code() {
        let shard = |state: &str, problem: Option<&str>| {
            json!({"shard": 3, "state": state, "problem": problem, "epoch": 9, "usage_position": 5,
                   "usage_head": 7, "control_position": 1})
        };
        let of = |shards: Value| reply(200, &json!({"shards": shards}).to_string());
        let server = Server::new(vec![
            of(json!([shard("live", None)])),
            of(json!([shard("stopped", Some("log is damaged"))])),
        ]);
        let ran = run(&["status", "--url", &server.url()]);
        assert_eq!(ran.exit, Exit::Done);
        assert_eq!(
            ran.out,
            "SHARD  STATE  EPOCH  POSITION  HEAD  LAG  CONTROL  PROBLEM\n    3  live       9         5     7    2        1\n"
        );
        let ran = run(&["status", "--url", &server.url()]);
        assert_eq!(ran.exit, Exit::Failed);
        assert!(ran.out.contains("log is damaged"));
    }
}
