//! The OpenAPI document, held against the routes, the parameters, the types and live answers.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::super::problem::KINDS;
use super::super::routes::ROUTES;
use super::super::{Accepted, OPENAPI};
use super::*;
use crate::api::*;
use crate::schema::{followed, references, valid};

fn document() -> Value {
    serde_json::from_str(OPENAPI).expect("the document is JSON")
}

struct Operation<'a> {
    method: String,
    path: &'a str,
    value: &'a Value,
    parameters: Vec<&'a Value>,
}

fn operations(document: &Value) -> Vec<Operation<'_>> {
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, value) in item.as_object().unwrap() {
            let parameters = value.get("parameters").and_then(Value::as_array);
            let parameters =
                parameters.into_iter().flatten().map(|p| followed(document, p)).collect();
            operations.push(Operation { method: method.to_uppercase(), path, value, parameters });
        }
    }
    operations
}

impl Operation<'_> {
    /// Names of the parameters in `place`.
    fn names(&self, place: &str) -> BTreeSet<&str> {
        let here = self.parameters.iter().filter(|parameter| parameter["in"] == place);
        here.map(|parameter| parameter["name"].as_str().unwrap()).collect()
    }

    /// The path with every parameter's example in it.
    fn example_path(&self) -> String {
        let mut path = self.path.to_owned();
        for parameter in self.parameters.iter().filter(|parameter| parameter["in"] == "path") {
            let name = format!("{{{}}}", parameter["name"].as_str().unwrap());
            path = path.replace(&name, parameter["example"].as_str().unwrap());
        }
        path
    }

    /// Media type and example of the request's body.
    fn example_body(&self) -> Option<(&str, Vec<u8>)> {
        let content = self.value.pointer("/requestBody/content")?.as_object()?;
        let (media_type, body) = content.iter().next()?;
        let bytes = match &body["example"] {
            Value::String(text) => text.clone().into_bytes(),
            example => example.to_string().into_bytes(),
        };
        Some((media_type, bytes))
    }
}

#[test]
fn routes_and_document_are_the_same_set() {
    let document = document();
    let documented: BTreeSet<(String, String)> =
        operations(&document).iter().map(|o| (o.method.clone(), o.path.to_owned())).collect();
    let registered: BTreeSet<(String, String)> =
        ROUTES.iter().map(|e| (e.method.to_string(), e.path.to_owned())).collect();
    assert_eq!(documented, registered);
    assert!(document["openapi"].as_str().unwrap().starts_with("3.1."));
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn every_reference_resolves_and_every_component_is_used() {
    let document = document();
    let mut found = BTreeSet::new();
    references(&document, &mut found);
    let mut components = BTreeSet::new();
    for (group, entries) in document["components"].as_object().unwrap() {
        for name in entries.as_object().unwrap().keys() {
            components.insert(format!("#/components/{group}/{name}"));
        }
    }
    let found: BTreeSet<String> = found.into_iter().map(str::to_owned).collect();
    assert_eq!(found, components);
}

#[test]
fn operations_have_names_path_parameters_and_a_way_to_fail() {
    let document = document();
    let operations = operations(&document);
    let names: BTreeSet<_> = operations.iter().map(|o| o.value["operationId"].as_str()).collect();
    assert_eq!(names.len(), operations.len());
    for operation in &operations {
        let in_path: BTreeSet<&str> = operation
            .path
            .split('/')
            .filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
            .collect();
        assert_eq!(operation.names("path"), in_path, "{}", operation.path);
        let responses = operation.value["responses"].as_object().unwrap();
        assert!(responses.contains_key("default") && responses.contains_key("400"));
    }
}

#[test]
fn every_kind_of_problem_is_documented_where_its_status_is() {
    let document = document();
    let types: Vec<String> =
        KINDS.iter().map(|(_, name, ..)| format!("/problems/{name}")).collect();
    assert_eq!(
        document["components"]["schemas"]["Problem"]["properties"]["type"]["enum"],
        json!(types)
    );
    let mut texts: BTreeMap<String, String> = BTreeMap::new();
    for operation in operations(&document) {
        for (status, response) in operation.value["responses"].as_object().unwrap() {
            let description = followed(&document, response)["description"].as_str().unwrap();
            texts.entry(status.clone()).or_default().push_str(description);
        }
    }
    for (_, name, status, ..) in KINDS {
        let of_status = texts.get(&status.to_string()).map_or("", String::as_str);
        let anywhere = [of_status, texts["default"].as_str()].concat();
        assert!(anywhere.contains(name), "{name} ({status})");
    }
}

/// An unknown parameter is refused with the list of the known ones: the code's own word on what a
/// route takes.
#[test]
fn documented_parameters_are_those_the_routes_take() {
    let server = run(small());
    let document = document();
    for operation in operations(&document) {
        let path = format!("{}?zz=1", operation.example_path());
        let problem = server.send(&operation.method, &path, &[], b"").problem(400, "parameter");
        let allowed = problem["allowed"].as_str().unwrap();
        let known: BTreeSet<&str> = allowed
            .strip_prefix("one of ")
            .map(|known| known.split(", ").collect())
            .unwrap_or_default();
        assert_eq!(operation.names("query"), known, "{} {}", operation.method, operation.path);
    }
}

/// Each documented request, with its parameters' examples one by one and its body's example, is
/// answered with a documented status and a body that its schema describes.
#[test]
fn live_answers_are_as_documented() {
    let server = run(small());
    let document = document();
    for operation in operations(&document) {
        let path = operation.example_path();
        // A cursor must be one of the server's own; `reading.rs` has those.
        let queries = operation
            .parameters
            .iter()
            .filter(|parameter| parameter["in"] == "query" && parameter["name"] != "cursor")
            .map(|parameter| match &parameter["example"] {
                Value::String(text) => format!("?{}={text}", parameter["name"].as_str().unwrap()),
                example => format!("?{}={example}", parameter["name"].as_str().unwrap()),
            });
        for query in [String::new()].into_iter().chain(queries) {
            // Not with by=org, which is the default.
            let query = match (operation.path, query.as_str()) {
                ("/v1/top", "?org=acme") => format!("{query}&by=user"),
                _ => query,
            };
            let headers: Vec<(&str, &str)> = vec![];
            let (media_type, body) = operation.example_body().unwrap_or(("", Vec::new()));
            let headers = match media_type {
                "" => headers,
                media_type => vec![("content-type", media_type)],
            };
            let path = format!("{path}{query}");
            let mut stream = server.connect();
            stream.write_all(&request(&operation.method, &path, &headers, &body)).unwrap();
            let mut reply = Reply::head(&mut stream);
            let responses = operation.value["responses"].as_object().unwrap();
            let success = responses.keys().find(|status| status.starts_with('2')).unwrap();
            assert_eq!(&reply.status.to_string(), success, "{} {path}", operation.method);
            let content = responses[success]["content"].as_object().unwrap();
            let (media_type, described) = content.iter().next().unwrap();
            let sent = reply.header("content-type").unwrap();
            assert!(sent.starts_with(media_type.as_str()), "{path}: {sent}");
            if media_type == "application/json" {
                let length: usize = reply.header("content-length").unwrap().parse().unwrap();
                reply.body = vec![0; length];
                stream.read_exact(&mut reply.body).unwrap();
                let place = format!("{} {path}", operation.method);
                valid(&document, &described["schema"], &reply.json(), &place);
            }
        }
    }
}

#[test]
fn examples_are_as_their_schemas_say() {
    let document = document();
    let mut checked = 0;
    for operation in operations(&document) {
        for parameter in operation.parameters.iter().filter(|p| p.get("example").is_some()) {
            valid(&document, &parameter["schema"], &parameter["example"], operation.path);
        }
        let body = operation.value.get("requestBody");
        let responses = operation.value["responses"].as_object().unwrap();
        for holder in responses.values().chain(body) {
            let content = followed(&document, holder)["content"].as_object().unwrap();
            for media in content.values().filter(|media| media.get("example").is_some()) {
                valid(&document, &media["schema"], &media["example"], operation.path);
                checked += 1;
            }
        }
    }
    assert!(checked > 30, "{checked}");
}

/// Reads an example into one of our types and shows it again: nothing in it is unknown to the type,
/// nothing of the type is missing in it.
#[track_caller]
fn same<T: Serialize + DeserializeOwned>(example: &Value) {
    let value: T = serde_json::from_value(example.clone())
        .unwrap_or_else(|error| panic!("{error} in {example}"));
    assert_eq!(&serde_json::to_value(&value).unwrap(), example);
}

#[test]
fn examples_are_our_types() {
    fn each<T: Serialize + DeserializeOwned>(list: &Value) {
        let list = list.as_array().unwrap();
        assert!(!list.is_empty());
        list.iter().for_each(same::<T>);
    }
    fn as_of(example: &Value) {
        same::<AsOf>(&json!({"as_of": example["as_of"], "epochs": example["epochs"]}));
    }
    let document = document();
    for operation in operations(&document) {
        for (status, response) in operation.value["responses"].as_object().unwrap() {
            let Some(media) = response.pointer("/content/application~1json") else { continue };
            let Some(name) = media["schema"]["$ref"].as_str() else { continue };
            let example = &media["example"];
            assert!(status.starts_with('2'));
            match name.rsplit('/').next().unwrap() {
                "Accepted" => same::<Accepted>(example),
                "SpendPage" => {
                    each::<SpendRow>(&example["rows"]);
                    as_of(example);
                }
                "TopRows" => {
                    each::<TopRow>(&example["rows"]);
                    as_of(example);
                }
                "UnpricedRows" => {
                    each::<UnpricedRow>(&example["rows"]);
                    as_of(example);
                }
                "DeadLetter" => same::<DeadLetter>(example),
                "DeadLetters" => each::<DeadLetter>(&example["rows"]),
                "PriceBook" => {
                    let entries = example["prices"].clone();
                    serde_json::from_value::<Vec<meterr_operators::price_book::PriceEntry>>(
                        entries,
                    )
                    .unwrap();
                }
                "PriceEffect" => same::<PriceEffect>(example),
                "Views" => each::<ViewDeclaration>(&example["views"]),
                "Cluster" => same::<Cluster>(example),
                "Drain" => same::<Drain>(example),
                "Move" => same::<Move>(example),
                "Shards" | "Ready" => each::<ShardStatus>(&example["shards"]),
                "Changed" => {
                    same::<meterr_operators::ids::Positions>(&example["position"]);
                }
                // Forms of this surface alone; `live_answers_are_as_documented` sees them.
                "TimeZone" | "Health" | "ProblemKind" => {}
                other => panic!("{other} is not checked"),
            }
        }
    }
}
