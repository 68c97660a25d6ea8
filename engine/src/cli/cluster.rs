//! `meterr cluster`: the nodes, which shard is where, and wishes about both.

use std::time::{Duration, Instant};

use meterr_connectors::api::{Cluster, ClusterShard};
use serde_json::json;

use super::args::{ClusterCommand, ClusterDrainArgs, ClusterMoveArgs, ClusterStatusArgs, WaitArgs};
use super::client::{Client, Method, Query, path};
use super::table::{Table, count, harmless};
use super::{Console, Exit};

/// Time between two looks while waiting.
const LOOK: Duration = Duration::from_millis(250);

/// `meterr cluster …`
pub(super) fn cluster(command: &ClusterCommand, console: &mut Console) -> anyhow::Result<Exit> {
    match command {
        ClusterCommand::Status(args) => status(args, console),
        ClusterCommand::Drain(args) => drain(args, console),
        ClusterCommand::Move(args) => move_shard(args, console),
    }
}

fn status(args: &ClusterStatusArgs, console: &mut Console) -> anyhow::Result<Exit> {
    let client = Client::new(&args.client);
    let answer = client.get("/v1/cluster", &Query::new())?;
    let cluster: Cluster = client.read(&answer)?;
    if args.client.json {
        console.json(&answer)?;
    } else {
        show(&cluster, console)?;
    }
    let lost =
        |shard: &ClusterShard| matches!(shard.state.as_str(), "stopped" | "unowned" | "away");
    Ok(if cluster.shards.iter().any(lost) { Exit::Failed } else { Exit::Done })
}

fn show(cluster: &Cluster, console: &mut Console) -> anyhow::Result<()> {
    let out = &mut console.out;
    let (nodes, shards) = (cluster.nodes.len(), cluster.shards.len());
    let recommended = cluster.recommended_nodes;
    let recommended = recommended.map_or_else(String::new, |n| format!(", {n} recommended"));
    let asked = harmless(&cluster.node);
    writeln!(out, "{nodes} nodes{recommended}, {shards} shards; as {asked} sees it")?;
    if let Some(reason) = &cluster.reason {
        writeln!(out, "{}", harmless(reason))?;
    }
    writeln!(out)?;
    let mut table = Table::new(&[
        "node",
        "state",
        ">shards",
        ">lag",
        ">events/s",
        ">capacity",
        ">heard",
        "version",
        "http",
    ]);
    for node in &cluster.nodes {
        let rate = node.events_per_second.map_or_else(|| "-".to_owned(), |n| count(n as i64));
        table.row([
            node.node.clone(),
            node.state.clone(),
            node.shards.len().to_string(),
            count(i64::try_from(node.lag).unwrap_or(i64::MAX)),
            rate,
            node.capacity.to_string(),
            format!("{:.1}s", node.heard_ms as f64 / 1e3),
            node.version.clone(),
            node.http.clone(),
        ]);
    }
    table.print(out)?;
    writeln!(out)?;
    let mut table = Table::new(&[
        ">shard",
        "owner",
        "state",
        ">epoch",
        ">lag",
        "moves to",
        "moved by hand",
        "problem",
    ]);
    for shard in &cluster.shards {
        let or_none = |node: &Option<String>| node.clone().unwrap_or_else(|| "-".to_owned());
        table.row([
            shard.shard.to_string(),
            or_none(&shard.owner),
            shard.state.clone(),
            shard.epoch.to_string(),
            count(i64::try_from(shard.lag).unwrap_or(i64::MAX)),
            or_none(&shard.wanted),
            or_none(&shard.pinned),
            shard.problem.clone().unwrap_or_default(),
        ]);
    }
    table.print(out)?;
    Ok(())
}

fn drain(args: &ClusterDrainArgs, console: &mut Console) -> anyhow::Result<Exit> {
    let client = Client::new(&args.client);
    let (node, drain) = (&args.node, !args.undo);
    let place = path(&["v1", "cluster", "nodes", node, "drain"]);
    let answer = client.send_json(Method::Post, &place, &json!({"drain": drain}))?;
    let shown = harmless(node);
    let said = match drain {
        true => format!("node {shown} drains"),
        false => format!("node {shown} takes shards again"),
    };
    let left = |cluster: &Cluster| {
        let found = cluster.nodes.iter().find(|of| of.node == *node);
        match (drain, found) {
            // A node that has left gave everything away, or others took it.
            (true, None) => None,
            (true, Some(of)) if of.shards.is_empty() => None,
            (true, Some(of)) => Some(format!("{shown} still has {} shards", of.shards.len())),
            (false, Some(of)) if of.state == "draining" => Some(format!("{shown} is draining")),
            (false, _) => None,
        }
    };
    finish(&client, &args.wait, args.client.json, &answer, &said, left, console)
}

fn move_shard(args: &ClusterMoveArgs, console: &mut Console) -> anyhow::Result<Exit> {
    let client = Client::new(&args.client);
    let number = args.shard.to_string();
    let place = path(&["v1", "cluster", "shards", &number, "move"]);
    let answer = client.send_json(Method::Post, &place, &json!({"node": args.node}))?;
    let said = match &args.node {
        Some(node) => format!("shard {number} goes to {}", harmless(node)),
        None => format!("placement decides about shard {number} again"),
    };
    let left = |cluster: &Cluster| {
        let shard = cluster.shards.iter().find(|of| of.shard.0 == args.shard)?;
        let owner = shard.owner.as_deref();
        let there = match &args.node {
            Some(node) => owner == Some(node),
            None => shard.pinned.is_none() && shard.wanted.is_none() && owner.is_some(),
        };
        let owner = owner.map_or_else(|| "nobody".to_owned(), harmless);
        let state = harmless(&shard.state);
        (!there || shard.state != "live").then(|| format!("shard {number} is {state} on {owner}"))
    };
    finish(&client, &args.wait, args.client.json, &answer, &said, left, console)
}

/// Says that a wish was recorded and, if asked to, waits until nothing is `left` to do.
fn finish(
    client: &Client,
    wait: &WaitArgs,
    json: bool,
    answer: &serde_json::Value,
    said: &str,
    left: impl Fn(&Cluster) -> Option<String>,
    console: &mut Console,
) -> anyhow::Result<Exit> {
    if !wait.wait {
        match json {
            true => console.json(answer)?,
            false => writeln!(console.out, "{said}")?,
        }
        return Ok(Exit::Done);
    }
    let until = Instant::now() + wait.wait_max;
    writeln!(console.err, "{said}")?;
    let mut told = String::new();
    loop {
        let now = match client.get("/v1/cluster", &Query::new()) {
            Ok(answer) => {
                let cluster: Cluster = client.read(&answer)?;
                match left(&cluster) {
                    None => {
                        match json {
                            true => console.json(&answer)?,
                            false => writeln!(console.out, "done")?,
                        }
                        return Ok(Exit::Done);
                    }
                    Some(now) => now,
                }
            }
            // The node that is asked may be the one that is stopped, and started again.
            Err(error) if error.passing() && Instant::now() < until => error.to_string(),
            Err(error) => return Err(error.into()),
        };
        if now != told {
            writeln!(console.err, "{now}")?;
            told = now;
        }
        if Instant::now() >= until {
            writeln!(console.err, "error: not done within {:?}: {told}", wait.wait_max)?;
            return Ok(Exit::Failed);
        }
        std::thread::sleep(LOOK.min(until.saturating_duration_since(Instant::now())));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::super::testing::{Server, hang_up, reply, run};
    use super::*;

    fn node(name: &str, state: &str, shards: &[u16]) -> Value {
        json!({"node": name, "state": state, "capacity": 1.0, "http": "h:1", "version": "0.1.0",
               "heard_ms": 310, "shards": shards, "lag": 1200, "events_per_second": 51000.5})
    }

    fn shard(n: u16, owner: Option<&str>, state: &str, wanted: Option<&str>) -> Value {
        json!({"shard": n, "owner": owner, "state": state, "problem": null, "epoch": 7, "lag": 4,
               "wanted": wanted, "pinned": null})
    }

    fn cluster(nodes: Value, shards: Value) -> String {
        json!({"node": "n1", "nodes": nodes, "shards": shards, "recommended_nodes": 3,
               "reason": "much comes in"})
        .to_string()
    }

    #[test]
    fn nodes_and_shards_are_shown_and_a_lost_shard_shows_in_the_exit_code() {
        let nodes = json!([node("n1", "up", &[0]), node("n2", "draining", &[1])]);
        let moving = shard(1, Some("n2"), "live", Some("n1"));
        let server = Server::new(vec![
            reply(
                200,
                &cluster(nodes.clone(), json!([shard(0, Some("n1"), "live", None), moving])),
            ),
            reply(200, &cluster(nodes.clone(), json!([shard(0, None, "unowned", None)]))),
            reply(200, &cluster(nodes, json!([]))),
        ]);
        let url = server.url();
        let ran = run(&["cluster", "status", "--url", &url]);
        assert_eq!(
            ran.out,
            "2 nodes, 3 recommended, 2 shards; as n1 sees it\n\
             much comes in\n\
             \n\
             NODE  STATE     SHARDS    LAG  EVENTS/S  CAPACITY  HEARD  VERSION  HTTP\n\
             n1    up             1  1,200    51,000         1   0.3s  0.1.0    h:1\n\
             n2    draining       1  1,200    51,000         1   0.3s  0.1.0    h:1\n\
             \n\
             SHARD  OWNER  STATE  EPOCH  LAG  MOVES TO  MOVED BY HAND  PROBLEM\n    \
                 0  n1     live       7    4  -         -\n    \
                 1  n2     live       7    4  n1        -\n"
        );
        assert_eq!(ran.exit, Exit::Done);
        assert_eq!(run(&["cluster", "status", "--url", &url]).exit, Exit::Failed);
        let ran = run(&["cluster", "status", "--json", "--url", &url]);
        assert_eq!(serde_json::from_str::<Value>(&ran.out).unwrap()["recommended_nodes"], 3);
    }

    #[test]
    fn a_drain_is_asked_for_and_waited_for() {
        let having = |shards: &[u16]| {
            reply(200, &cluster(json!([node("n2", "draining", shards)]), json!([])))
        };
        let server = Server::new(vec![
            reply(202, r#"{"node":"n2","drain":true}"#),
            reply(202, r#"{"node":"n2","drain":true}"#),
            having(&[3, 5]),
            having(&[3, 5]),
            hang_up(),
            having(&[5]),
            having(&[]),
            reply(202, r#"{"node":"n2","drain":false}"#),
        ]);
        let url = server.url();
        assert_eq!(run(&["cluster", "drain", "n2", "--url", &url]).out, "node n2 drains\n");
        let ran = run(&["cluster", "drain", "n2", "--wait", "--url", &url]);
        assert_eq!((ran.exit, ran.out.as_str()), (Exit::Done, "done\n"), "{}", ran.err);
        let lines: Vec<&str> = ran.err.lines().collect();
        assert_eq!(lines[..2], ["node n2 drains", "n2 still has 2 shards"]);
        assert!(lines[2].starts_with("cannot reach"), "{}", ran.err);
        assert_eq!(lines[3..], ["n2 still has 1 shards"]);
        let ran = run(&["cluster", "drain", "n2", "--undo", "--json", "--url", &url]);
        assert_eq!(ran.out, "{\"drain\":false,\"node\":\"n2\"}\n");
        let requests = server.requests();
        assert_eq!(requests[0].target, "/v1/cluster/nodes/n2/drain");
        assert_eq!(requests[0].body, r#"{"drain":true}"#);
        assert_eq!(requests.last().unwrap().body, r#"{"drain":false}"#);
    }

    #[test]
    fn a_move_is_asked_for_and_waited_for() {
        let at = |owner, state| {
            reply(200, &cluster(json!([]), json!([shard(3, Some(owner), state, None)])))
        };
        let server = Server::new(vec![
            reply(202, r#"{"shard":3,"node":"n2"}"#),
            at("n1", "live"),
            at("n2", "replay"),
            at("n2", "live"),
            reply(202, r#"{"shard":3,"node":null}"#),
            reply(202, r#"{"shard":3,"node":"n2"}"#),
            at("n1", "live"),
            at("n1", "live"),
            reply(409, r#"{"detail":"node \"n3\" is draining: it takes no shard"}"#),
        ]);
        let url = server.url();
        let ran = run(&["cluster", "move", "3", "n2", "--wait", "--url", &url]);
        assert_eq!((ran.exit, ran.out.as_str()), (Exit::Done, "done\n"), "{}", ran.err);
        assert_eq!(ran.err, "shard 3 goes to n2\nshard 3 is live on n1\nshard 3 is replay on n2\n");
        let ran = run(&["cluster", "move", "3", "--auto", "--url", &url]);
        assert_eq!(ran.out, "placement decides about shard 3 again\n");
        let late = ["cluster", "move", "3", "n2", "--wait", "--wait-max", "100ms", "--url", &url];
        let ran = run(&late);
        assert_eq!(ran.exit, Exit::Failed);
        assert!(ran.err.ends_with("not done within 100ms: shard 3 is live on n1\n"), "{}", ran.err);
        let ran = run(&["cluster", "move", "3", "n3", "--url", &url]);
        assert_eq!(ran.exit, Exit::Failed);
        assert!(ran.err.contains("is draining: it takes no shard"), "{}", ran.err);
        let requests = server.requests();
        assert_eq!(requests[0].target, "/v1/cluster/shards/3/move");
        assert_eq!(requests[0].body, r#"{"node":"n2"}"#);
        assert_eq!(requests[4].body, r#"{"node":null}"#);
    }
}
