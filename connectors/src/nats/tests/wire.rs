//! The golden requests of `config/wire`, asked over a real server: the replies are the golden ones.

use serde_json::json;

#[path = "../../../../tests/support/wire.rs"]
pub(super) mod golden;

use super::service::World;
use crate::api::SpendRow;
use crate::fake::{Fake, figures};
use crate::nats::endpoints::ENDPOINTS;

fn rows(key: &str) -> Vec<SpendRow> {
    vec![SpendRow {
        window_start: Some("2026-01-02T00:00:00+01:00".to_owned()),
        key: Some(key.to_owned()),
        figures: figures(),
    }]
}

#[test]
fn golden_requests_get_golden_replies() {
    let world = World::new();
    let fake = Fake { shards: 16, home: 15, ..Fake::default() };
    let node = world.node_with(super::service::settings(), fake);
    let mut used = Vec::new();
    for endpoint in ENDPOINTS.iter().filter(|endpoint| !endpoint.of_node()) {
        *node.fake.rows.lock() = match endpoint.name {
            "view" => rows(&json!(["search", "gpt-4o"]).to_string()),
            _ => rows("gpt-4o"),
        };
        let request = format!("requests/{}.json", endpoint.name);
        let body = match endpoint.members {
            [] => Vec::new(),
            members => {
                used.push(request.clone());
                let golden = golden::json(&request);
                // Of the members all that can stand together; pages have cursors of their own.
                let given = golden.as_object().unwrap().keys();
                assert!(given.clone().all(|name| members.contains(&name.as_str())), "{request}");
                golden::read(&request)
            }
        };
        let subject = endpoint.address.replace("{org}", "acme");
        let reply = world.ask(&subject, body);
        reply.ok();
        if endpoint.name == "live" {
            golden::check("live/current.json", reply.payload());
            continue;
        }
        let name = format!("replies/{}.json", endpoint.name);
        golden::check_json(&name, reply.payload());
        used.push(name);
    }
    // A refusal, as a message.
    let reply = world.ask("meterr.query.acme.spend", r#"{"window":"week"}"#);
    reply.problem(400, "parameter");
    golden::check_json("replies/problem.json", reply.payload());
    used.push("replies/problem.json".to_owned());
    let files = golden::names().into_iter();
    let files: Vec<String> = files.filter(|name| name.starts_with("re")).collect();
    used.sort();
    assert_eq!(used, files, "each golden request and reply is asked and answered");
}
