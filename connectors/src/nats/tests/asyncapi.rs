//! The AsyncAPI document, held against the subjects, the questions, the golden messages, the OpenAPI
//! document and the rules of AsyncAPI 3.0.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::wire::golden;
use crate::http::OPENAPI;
use crate::nats::asyncapi::DOCUMENT;
use crate::nats::endpoints::ENDPOINTS;
use crate::nats::subjects::ADDRESSES;
use crate::schema::{followed, references, valid};

fn document() -> Value {
    serde_json::from_str(DOCUMENT).expect("the document is JSON")
}

fn members(value: &Value) -> impl Iterator<Item = (&str, &Value)> {
    value.as_object().into_iter().flatten().map(|(name, value)| (name.as_str(), value))
}

fn items(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn target(reference: &Value) -> &str {
    reference["$ref"].as_str().expect("a reference")
}

#[test]
fn addresses_are_those_of_the_code() {
    let document = document();
    let channels = members(&document["channels"]);
    let documented: BTreeSet<&str> =
        channels.filter_map(|(_, channel)| channel["address"].as_str()).collect();
    let endpoints = ENDPOINTS.iter().map(|endpoint| endpoint.address);
    let served: BTreeSet<&str> = ADDRESSES.into_iter().chain(endpoints).collect();
    assert_eq!(documented, served);
    assert_eq!(members(&document["channels"]).count(), served.len() + 1, "and the inbox");
    assert_eq!(document["channels"]["inbox"]["address"], Value::Null);
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn every_reference_resolves_and_every_component_is_used() {
    let document = document();
    let mut found = BTreeSet::new();
    references(&document, &mut found);
    for target in &found {
        let pointer = target.strip_prefix('#').expect("a place in this document");
        assert!(document.pointer(pointer).is_some(), "{target}");
    }
    for (group, entries) in members(&document["components"]) {
        for (name, _) in members(entries) {
            let place = format!("#/components/{group}/{name}");
            assert!(found.contains(place.as_str()), "{place} is not used");
        }
    }
}

/// Which members the objects of AsyncAPI 3.0 may have, as far as the document uses them; those with
/// an asterisk they must have.
#[test]
fn objects_are_those_of_asyncapi() {
    #[track_caller]
    fn object(value: &Value, allowed: &str) {
        let allowed: Vec<&str> = allowed.split_whitespace().collect();
        for (name, _) in members(value) {
            let known = allowed.iter().any(|known| known.trim_end_matches('*') == name);
            assert!(known, "{name:?} in {value}");
        }
        for needed in allowed.iter().filter_map(|name| name.strip_suffix('*')) {
            assert!(value.get(needed).is_some(), "no {needed:?} in {value}");
        }
    }
    let key = |name: &str| name.bytes().all(|b| b.is_ascii_alphanumeric() || b"_-".contains(&b));
    let document = document();
    object(&document, "asyncapi* info* defaultContentType servers channels operations components");
    assert_eq!(document["asyncapi"], "3.0.0");
    object(&document["info"], "title* version* description license");
    object(&document["info"]["license"], "name* url");
    for (_, server) in members(&document["servers"]) {
        object(server, "host* protocol* description");
    }
    object(&document["components"], "messages schemas parameters");
    for (_, entries) in members(&document["components"]) {
        assert!(members(entries).all(|(name, _)| key(name)));
    }
    for (_, parameter) in members(&document["components"]["parameters"]) {
        object(parameter, "description examples");
    }
    for (name, message) in members(&document["components"]["messages"]) {
        object(message, "name* title* summary contentType headers payload examples");
        assert_eq!(message["name"], name);
        items(&message["examples"]).for_each(|example| object(example, "name* headers payload*"));
    }
    for (name, channel) in members(&document["channels"]) {
        assert!(key(name));
        object(channel, "address* title* description parameters messages*");
        let address = channel["address"].as_str().unwrap_or_default();
        let named: BTreeSet<&str> = address
            .split('.')
            .filter_map(|token| token.strip_prefix('{')?.strip_suffix('}'))
            .collect();
        let described: BTreeSet<&str> =
            members(&channel["parameters"]).map(|(name, _)| name).collect();
        assert_eq!(named, described, "{address}");
        for (name, message) in members(&channel["messages"]) {
            assert_eq!(target(message), format!("#/components/messages/{name}"));
        }
    }
    let mut used = BTreeSet::new();
    for (name, operation) in members(&document["operations"]) {
        assert!(key(name));
        object(operation, "action* channel* title description messages* reply bindings");
        assert!(["send", "receive"].contains(&operation["action"].as_str().unwrap()));
        if let Some(reply) = operation.get("reply") {
            object(reply, "channel* messages*");
        }
        for side in [Some(operation), operation.get("reply")].into_iter().flatten() {
            let channel = target(&side["channel"]);
            assert!(channel.starts_with("#/channels/"), "{channel}");
            for message in items(&side["messages"]) {
                let message = target(message);
                assert!(message.starts_with(&format!("{channel}/messages/")), "{message}");
                used.insert(message.to_owned());
            }
        }
    }
    for (channel, described) in members(&document["channels"]) {
        for (message, _) in members(&described["messages"]) {
            let place = format!("#/channels/{channel}/messages/{message}");
            assert!(used.contains(&place), "no operation has {place}");
        }
    }
}

#[test]
fn questions_are_described_as_they_are_read() {
    let document = document();
    for endpoint in &ENDPOINTS {
        let channels = members(&document["channels"]);
        let mut at = channels.filter(|(_, channel)| channel["address"] == endpoint.address);
        let (channel, described) = at.next().expect("every address is described");
        let place = format!("#/channels/{channel}");
        let operations = members(&document["operations"]).map(|(_, operation)| operation);
        let operations: Vec<_> =
            operations.filter(|operation| target(&operation["channel"]) == place).collect();
        let [operation] = operations.as_slice() else { panic!("one operation for {place}") };
        assert_eq!(operation["action"], "receive");
        assert_eq!(operation["bindings"], json!({"nats": {"queue": "q"}}));
        let replies: Vec<&str> = items(&operation["reply"]["messages"]).map(target).collect();
        assert!(replies.len() >= 2 && replies.contains(&"#/channels/inbox/messages/problem"));
        let messages: Vec<&Value> = members(&described["messages"]).map(|(_, m)| m).collect();
        let [request] = messages.as_slice() else { panic!("one request for {place}") };
        let request = followed(&document, request);
        let schema = followed(&document, &request["payload"]);
        let properties: BTreeSet<&str> =
            members(&schema["properties"]).map(|(name, _)| name).collect();
        let read: BTreeSet<&str> = endpoint.members.iter().copied().collect();
        assert_eq!(properties, read, "{}", endpoint.address);
        assert_eq!(schema["additionalProperties"], false);
    }
}

#[test]
fn golden_messages_are_the_examples() {
    let document = document();
    let mut shown = Vec::new();
    for (_, message) in members(&document["components"]["messages"]) {
        for example in items(&message["examples"]) {
            let name = example["name"].as_str().unwrap();
            shown.push(name.to_owned());
            let mut payload = example["payload"].clone();
            if name.ends_with(".ndjson") {
                let lines = String::from_utf8(golden::read(name)).unwrap();
                assert_eq!(payload.as_str().map(str::trim_end), Some(lines.as_str()), "{name}");
                for line in lines.lines() {
                    let event = serde_json::from_str(line).unwrap();
                    let schema = json!({"$ref": "#/components/schemas/Event"});
                    valid(&document, &schema, &event, name);
                }
            } else if example.get("headers").is_some() && name.starts_with("events/") {
                payload = json!({"headers": example["headers"], "data": payload});
                assert_eq!(payload, golden::json(name), "{name}");
            } else {
                assert_eq!(payload, golden::json(name), "{name}");
            }
            valid(&document, &message["payload"], &example["payload"], name);
            match (message.get("headers"), example.get("headers")) {
                (Some(schema), Some(headers)) => valid(&document, schema, headers, name),
                (None, None) => {}
                _ => panic!("{name}: headers are described where they are shown"),
            }
        }
    }
    shown.sort();
    assert_eq!(shown, golden::names(), "each golden message is shown once");
}

#[test]
fn what_both_surfaces_have_is_described_alike() {
    let (document, openapi) = (document(), serde_json::from_str::<Value>(OPENAPI).unwrap());
    let mut same = 0;
    for (name, schema) in members(&document["components"]["schemas"]) {
        if let Some(of_http) = openapi["components"]["schemas"].get(name) {
            assert_eq!(schema, of_http, "{name}");
            same += 1;
        }
    }
    assert!(same >= 20, "{same}");
}
