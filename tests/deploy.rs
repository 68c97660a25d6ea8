//! `config/deploy/`: what it says of meterr is so. Names, ports, paths, settings and metrics are those of
//! the binary, and what refers to something else in these files finds it.

#![allow(clippy::unwrap_used)]

#[path = "support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use meterr_engine::{metrics, serve};
use serde_json::Value;
use support::{meterr, ran};

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config/deploy").join(name)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(path(name)).unwrap()
}

/// The documents of a file.
fn documents(name: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(&text(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// The only object of a kind (and name, where there are several).
fn object(name: &str, kind: &str, called: &str) -> Value {
    let mut found = documents(name)
        .into_iter()
        .filter(|it| it["kind"] == kind && it["metadata"]["name"] == called);
    let object = found.next().unwrap_or_else(|| panic!("no {kind} {called} in {name}"));
    assert!(found.next().is_none(), "two {kind} {called} in {name}");
    object
}

fn pod() -> Value {
    stateful_set()["spec"]["template"].clone()
}

fn stateful_set() -> Value {
    object("kubernetes/meterr.yaml", "StatefulSet", "meterr")
}

fn container() -> Value {
    let containers = pod()["spec"]["containers"].clone();
    assert_eq!(containers.as_array().unwrap().len(), 1);
    containers[0].clone()
}

fn list<'a>(value: &'a Value, member: &str) -> &'a [Value] {
    value[member].as_array().unwrap_or_else(|| panic!("no list {member} in {value}"))
}

/// Settings of the container; those from elsewhere have the place as their value.
fn environment() -> BTreeMap<String, String> {
    let of = |variable: &Value| {
        let from = &variable["valueFrom"];
        let from = from["secretKeyRef"]["key"].as_str().or(from["fieldRef"]["fieldPath"].as_str());
        let value = variable["value"].as_str().or(from).unwrap();
        (variable["name"].as_str().unwrap().to_owned(), value.to_owned())
    };
    list(&container(), "env").iter().map(of).collect()
}

/// The binary takes these settings.
fn taken(environment: &BTreeMap<String, String>) {
    let output = meterr(&["config", "check"]).envs(environment).output().unwrap();
    let (code, _, err) = ran(&output);
    assert_eq!(code, 0, "{environment:?}: {err}");
}

#[test]
fn kustomize_finds_every_file_and_each_object_has_a_name() {
    let kustomization = &documents("kubernetes/kustomization.yaml")[0];
    let files: Vec<&str> =
        list(kustomization, "resources").iter().map(|file| file.as_str().unwrap()).collect();
    assert_eq!(files, ["meterr.yaml", "autoscaler.yaml"]);
    for file in files {
        for object in documents(&format!("kubernetes/{file}")) {
            assert!(object["apiVersion"].is_string() && object["kind"].is_string(), "{object}");
            assert!(object["metadata"]["name"].as_str().unwrap().starts_with("meterr"), "{object}");
            assert_eq!(object["metadata"]["labels"]["app.kubernetes.io/name"], "meterr");
        }
    }
}

#[test]
fn whatever_selects_pods_selects_those_of_the_stateful_set() {
    let labels = pod()["metadata"]["labels"].clone();
    let file = "kubernetes/meterr.yaml";
    for service in ["meterr", "meterr-nodes"] {
        assert_eq!(object(file, "Service", service)["spec"]["selector"], labels);
    }
    let [set, budget, policy] = [
        stateful_set(),
        object(file, "PodDisruptionBudget", "meterr"),
        object(file, "NetworkPolicy", "meterr"),
    ];
    assert_eq!(set["spec"]["selector"]["matchLabels"], labels);
    assert_eq!(budget["spec"]["selector"]["matchLabels"], labels);
    assert_eq!(budget["spec"]["maxUnavailable"], 1);
    assert_eq!(policy["spec"]["podSelector"]["matchLabels"], labels);
    let spread = pod()["spec"]["topologySpreadConstraints"][0].clone();
    assert_eq!(spread["labelSelector"]["matchLabels"], labels);
    let account = object(file, "ServiceAccount", "meterr");
    assert_eq!(account["metadata"]["name"], pod()["spec"]["serviceAccountName"]);
}

#[test]
fn pods_have_names_that_stay() {
    let name = stateful_set()["spec"]["serviceName"].as_str().unwrap().to_owned();
    let service = object("kubernetes/meterr.yaml", "Service", &name);
    assert_eq!(service["spec"]["clusterIP"], "None");
    assert_eq!(service["spec"]["publishNotReadyAddresses"], true);
}

#[test]
fn ports_and_paths_are_those_of_the_binary() {
    let container = container();
    let address = &environment()["METERR__HTTP__ADDRESS"];
    let port: u64 = address.rsplit(':').next().unwrap().parse().unwrap();
    assert_eq!(container["ports"][0]["containerPort"], port);
    assert_eq!(container["ports"][0]["name"], "http");
    for service in ["meterr", "meterr-nodes"] {
        let service = object("kubernetes/meterr.yaml", "Service", service);
        assert_eq!(service["spec"]["ports"][0]["port"], port);
        assert_eq!(service["spec"]["ports"][0]["targetPort"], "http");
    }
    let policy = object("kubernetes/meterr.yaml", "NetworkPolicy", "meterr");
    assert_eq!(policy["spec"]["ingress"][0]["ports"][0]["port"], "http");
    assert!(!list(&policy["spec"]["ingress"][0], "from").is_empty(), "open to everybody");

    let annotations = pod()["metadata"]["annotations"].clone();
    assert_eq!(annotations["prometheus.io/port"], port.to_string());
    let paths = meterr_paths();
    let mut used = vec![annotations["prometheus.io/path"].as_str().unwrap().to_owned()];
    for (probe, expected) in
        [("livenessProbe", "/healthz"), ("startupProbe", "/healthz"), ("readinessProbe", "/readyz")]
    {
        let get = &container[probe]["httpGet"];
        assert_eq!((&get["path"], &get["port"]), (&expected.into(), &"http".into()), "{probe}");
        used.push(expected.to_owned());
    }
    for path in used {
        assert!(paths.contains(&path), "{path} is none of {paths:?}");
    }
}

/// Paths of the binary's HTTP.
fn meterr_paths() -> Vec<String> {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("connectors/src/http/openapi.json");
    let document: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    document["paths"].as_object().unwrap().keys().cloned().collect()
}

#[test]
fn the_container_s_settings_are_taken_and_its_files_are_there() {
    let environment = environment();
    let mut given = environment.clone();
    given.insert("METERR__NATS__URL".to_owned(), "tls://node:p@nats-1:4222".to_owned());
    // A node has the name of its pod.
    let name = given.insert("METERR__CLUSTER__NODE".to_owned(), "meterr-0".to_owned());
    assert_eq!(name.as_deref(), Some("metadata.name"));
    taken(&given);
    // HTTP is open only where a policy stands before it.
    assert_eq!(environment["METERR__HTTP__ALLOW_NON_LOOPBACK"], "true");
    let mut closed = given.clone();
    closed.remove("METERR__HTTP__ALLOW_NON_LOOPBACK");
    let output = meterr(&["config", "check"]).envs(&closed).output().unwrap();
    assert_eq!(output.status.code(), Some(2));

    let (container, pod) = (container(), pod());
    assert_eq!(container["args"], serde_json::json!(["serve"]));
    let mounts: BTreeMap<&str, &str> = list(&container, "volumeMounts")
        .iter()
        .map(|mount| (mount["name"].as_str().unwrap(), mount["mountPath"].as_str().unwrap()))
        .collect();
    let claim = &stateful_set()["spec"]["volumeClaimTemplates"][0];
    assert_eq!(claim["metadata"]["name"], "data");
    assert_eq!(mounts["data"], environment["METERR__NODE__DATA_DIR"]);
    let volume = &list(&pod["spec"], "volumes")[0];
    assert_eq!(volume["name"], "nats");
    let items = list(&volume["secret"], "items");
    for key in ["CA", "CERTIFICATE", "KEY"] {
        let file = environment[&format!("METERR__NATS__{key}")].strip_prefix(mounts["nats"]);
        let file = file.unwrap().trim_start_matches('/');
        assert!(items.iter().any(|item| item["path"] == file), "{key}: {file}");
    }
    let secret = &list(&container, "env").iter().find(|it| it["name"] == "METERR__NATS__URL");
    let secret = &secret.unwrap()["valueFrom"]["secretKeyRef"]["name"];
    assert_eq!(&volume["secret"]["secretName"], secret);
}

#[test]
fn a_drain_has_time_before_a_kill() {
    let handing_over = setting("cluster.drain_max").trim_matches(['"', 's']).parse::<u64>();
    let drain = serve::DRAIN_MAX.as_secs() + handing_over.unwrap();
    let wait = container()["lifecycle"]["preStop"]["sleep"]["seconds"].as_u64().unwrap();
    let grace = pod()["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap();
    assert!(grace > wait + drain, "{grace} s for {wait} s and {drain} s");
    let stop: u64 = unit("TimeoutStopSec")[0].parse().unwrap();
    assert!(stop > drain, "{stop} s for {drain} s");
    assert_eq!(unit("KillSignal"), ["SIGTERM"]);
}

#[test]
fn the_autoscaler_goes_by_a_metric_that_is_there() {
    let autoscaler =
        object("kubernetes/autoscaler.yaml", "HorizontalPodAutoscaler", "meterr")["spec"].clone();
    let set = stateful_set();
    let target = &autoscaler["scaleTargetRef"];
    assert_eq!(
        (&target["apiVersion"], &target["kind"], &target["name"]),
        (&set["apiVersion"], &set["kind"], &set["metadata"]["name"])
    );
    let metric = &autoscaler["metrics"][0]["pods"]["metric"]["name"];
    assert_eq!(metric, metrics::LAG_RECORDS);
    let number = |member: &str| autoscaler[member].as_u64().unwrap();
    assert!(number("minReplicas") <= set["spec"]["replicas"].as_u64().unwrap());
    let shards: u64 = setting("node.shards").parse().unwrap();
    assert_eq!(number("maxReplicas"), shards, "as many nodes as shards are of use");

    let rules = documents("kubernetes/prometheus-adapter.yaml")[0]["rules"].clone();
    let rule = &list(&rules, "custom")[0];
    assert_eq!(rule["name"]["as"], *metric);
    assert_eq!(rule["name"]["matches"], format!("^{}$", metrics::LAG_RECORDS));
    let series = format!("{}{{namespace!=\"\",pod!=\"\"}}", metrics::LAG_RECORDS);
    assert_eq!(rule["seriesQuery"], series);
    for resource in ["namespace", "pod"] {
        assert_eq!(rule["resources"]["overrides"][resource]["resource"], resource);
    }
    let external = &autoscaler["metrics"][1]["external"];
    let rule_external = &list(&rules, "external")[0];
    let name = metrics::RECOMMENDED_NODES;
    assert_eq!(
        (&external["metric"]["name"], &rule_external["name"]["as"]),
        (&name.into(), &name.into())
    );
    assert_eq!(rule_external["name"]["matches"], format!("^{name}$"));
    assert_eq!(rule_external["seriesQuery"], format!("{name}{{namespace!=\"\"}}"));
    // So the autoscaler takes the number as it is.
    assert_eq!(external["target"]["averageValue"], "1");
    assert!(rule_external["metricsQuery"].as_str().unwrap().starts_with("max("));
    // Shards are added up: each is a series of its own.
    let shown = metrics::Metrics::new(true);
    shown.shard(meterr_operators::ids::ShardId(3));
    assert!(shown.render().contains(&format!("{}{{shard=\"3\"}}", metrics::LAG_RECORDS)));
    assert!(rule["metricsQuery"].as_str().unwrap().starts_with("sum("));
    assert!(shown.render().contains(&format!("\n{name} ")));
}

/// A setting as it is without a file.
fn setting(key: &str) -> String {
    let settings = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/meterr.toml");
    let (section, key) = key.split_once('.').unwrap();
    let text = std::fs::read_to_string(settings).unwrap();
    let (_, section) = text.split_once(&format!("\n[{section}]\n")).unwrap();
    let line = section.lines().find_map(|line| line.strip_prefix(&format!("{key} = "))).unwrap();
    line.to_owned()
}

/// Values of a key in the unit; those behind a `#` do not count.
fn unit(key: &str) -> Vec<String> {
    let text = text("meterr.service");
    let values = text.lines().filter_map(|line| line.strip_prefix(key)?.strip_prefix('='));
    values.map(str::to_owned).collect()
}

#[test]
fn the_unit_starts_the_binary_with_settings_it_takes() {
    for line in text("meterr.service").lines() {
        let section = line.starts_with('[') && line.ends_with(']');
        let known = line.is_empty() || line.starts_with('#') || section || line.contains('=');
        assert!(known, "{line:?} is no line of a unit");
    }
    let start = unit("ExecStart");
    let (binary, args) = start[0].split_once(' ').unwrap();
    assert!(binary.ends_with("/meterr"));
    let args: Vec<&str> = args.split(' ').chain(["--help"]).collect();
    let (code, _, err) = ran(&meterr(&args).output().unwrap());
    assert_eq!(code, 0, "{args:?}: {err}");

    let (state, data) = (unit("StateDirectory"), "METERR__NODE__DATA_DIR");
    assert_eq!(state, ["meterr"]);
    let mut environment = BTreeMap::new();
    // Those that are commented out are for a node on NATS; they must be taken as well.
    let lines = text("meterr.service");
    let lines = lines.lines().map(|line| line.trim_start_matches('#'));
    for setting in lines.filter_map(|line| line.strip_prefix("Environment=")) {
        for setting in setting.split(' ') {
            let (key, value) = setting.split_once('=').unwrap();
            environment.insert(
                key.to_owned(),
                value.replace("%S", "/var/lib").replace("%d", "/d").replace("%l", "m"),
            );
        }
    }
    assert_eq!(environment[data], "/var/lib/meterr");
    taken(&environment);
    environment.insert("METERR__NATS__URL".to_owned(), "tls://node:p@nats-1:4222".to_owned());
    taken(&environment);
}

#[test]
fn the_unit_gives_the_service_no_more_than_it_needs() {
    for key in [
        "DynamicUser",
        "NoNewPrivileges",
        "PrivateTmp",
        "PrivateDevices",
        "ProtectHome",
        "ProtectKernelModules",
        "ProtectKernelTunables",
        "ProtectControlGroups",
        "RestrictNamespaces",
        "RestrictSUIDSGID",
        "LockPersonality",
        "MemoryDenyWriteExecute",
    ] {
        assert_eq!(unit(key), ["yes"], "{key}");
    }
    assert_eq!(unit("ProtectSystem"), ["strict"]);
    assert_eq!(unit("CapabilityBoundingSet"), [""]);
    assert_eq!(unit("UMask"), ["0077"]);
    // Wrong settings are not tried again and again.
    assert_eq!(unit("RestartPreventExitStatus"), ["2"]);
    let wrong = meterr(&["serve"]).env("METERR__NODE__SHARDS", "0").output().unwrap();
    assert_eq!(wrong.status.code(), Some(2));
}
