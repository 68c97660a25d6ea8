//! The configuration as written: the compiled-in `config/meterr.toml`, then the user's file, then
//! `METERR__SECTION__KEY`, then flags, each laid over the one before.
//!
//! A key that is unknown or has a value of the wrong kind becomes a [`Problem`] and leaves the value
//! below it standing, so that [`crate::settings`] can go on and report everything that is wrong at
//! once. Nothing here knows what values mean; ranges are checked there.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::settings::Settings;

/// The file with every key, its default and what it means.
pub const DEFAULTS: &str = include_str!("../../config/meterr.toml");

/// What an environment variable that sets a key begins with.
pub const ENVIRONMENT_PREFIX: &str = "METERR__";

/// Largest configuration file read, in bytes.
const FILE_LEN_MAX: u64 = 4 << 20;

/// Sections whose keys are names of the user's choice, each with a text as value.
const OPEN_SECTIONS: [&str; 1] = ["seed.time_zones"];

/// The configuration exactly as written, with every key present.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "every key is documented in config/meterr.toml, once")]
pub struct RawConfig {
    pub node: RawNode,
    pub http: RawHttp,
    pub log: RawLog,
    pub nats: RawNats,
    pub cluster: RawCluster,
    pub epoch: RawEpoch,
    pub checkpoint: RawCheckpoint,
    pub backup: RawBackup,
    pub seed: RawSeed,
    pub views: RawViews,
    pub telemetry: RawTelemetry,
    pub metrics: RawMetrics,
}

/// `[node]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "every key is documented in config/meterr.toml, once")]
pub struct RawNode {
    pub data_dir: String,
    pub workers: i64,
    pub shards: i64,
}

/// `[http]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "every key is documented in config/meterr.toml, once")]
pub struct RawHttp {
    pub address: String,
    pub allow_non_loopback: bool,
    pub body_bytes_max: String,
    pub lines_max: i64,
    pub request_timeout: String,
    pub min_position_timeout: String,
    pub sse_subscribers_max: i64,
}

/// `[log]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "every key is documented in config/meterr.toml, once")]
pub struct RawLog {
    pub segment_bytes: String,
    pub time_jump_max: String,
}

/// `[nats]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "every key is documented in config/meterr.toml, once")]
pub struct RawNats {
    pub url: String,
    pub credentials: String,
    pub ca: String,
    pub certificate: String,
    pub key: String,
    pub replicas: i64,
    pub stream_bytes_max: String,
    pub mapping: String,
}

/// `[cluster]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "every key is documented in config/meterr.toml, once")]
pub struct RawCluster {
    pub node: String,
    pub capacity: f64,
    pub replica: bool,
    pub standbys: i64,
    pub lease: String,
    pub settle: String,
    pub drain_max: String,
}

/// `[epoch]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "every key is documented in config/meterr.toml, once")]
pub struct RawEpoch {
    pub events_max: i64,
    pub age_max: String,
    pub age_max_loaded: String,
}

/// `[checkpoint]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "every key is documented in config/meterr.toml, once")]
pub struct RawCheckpoint {
    pub interval: String,
    pub events_max: i64,
    pub base_ratio: f64,
    pub keep: i64,
    pub cache_bytes: String,
}

/// `[backup]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "every key is documented in config/meterr.toml, once")]
pub struct RawBackup {
    pub store: String,
    pub key_file: String,
    pub interval: String,
    pub keep: String,
}

/// `[seed]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "every key is documented in config/meterr.toml, once")]
pub struct RawSeed {
    pub prices: String,
    pub horizon: String,
    pub time_zones: BTreeMap<String, String>,
}

/// `[views]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "every key is documented in config/meterr.toml, once")]
pub struct RawViews {
    pub declare: Vec<Table>,
}

/// `[telemetry]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "every key is documented in config/meterr.toml, once")]
pub struct RawTelemetry {
    pub log: String,
    pub format: String,
}

/// `[metrics]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "every key is documented in config/meterr.toml, once")]
pub struct RawMetrics {
    pub enabled: bool,
}

/// Where a value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// `config/meterr.toml`, compiled in.
    Default,
    /// The user's file.
    File(PathBuf),
    /// An environment variable, by name.
    Environment(String),
    /// A flag of the command line, such as `--http`.
    Flag(&'static str),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File(path) => write!(f, "{}", path.display()),
            Origin::Environment(name) => f.write_str(name),
            Origin::Flag(name) => f.write_str(name),
        }
    }
}

/// One thing wrong with the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The key, such as `node.shards`.
    pub key: String,
    /// The value as written; empty when the key itself is the problem.
    pub value: String,
    /// Where it was written.
    pub origin: Origin,
    /// What it must be.
    pub expected: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Problem { key, value, origin, expected } = self;
        match value.is_empty() {
            true => write!(f, "{key} (from {origin}) {expected}"),
            false => write!(f, "{key} = {value} (from {origin}) {expected}"),
        }
    }
}

/// Why there are no settings.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {} cannot be read", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not TOML.
    #[error("configuration {} is not valid TOML", .path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// Values are wrong: all of them.
    #[error("{}", list(.0))]
    Invalid(Vec<Problem>),
}

fn list(problems: &[Problem]) -> String {
    let mut text = match problems.len() {
        1 => "1 setting is wrong:".to_owned(),
        n => format!("{n} settings are wrong:"),
    };
    for problem in problems {
        text.push_str("\n  ");
        text.push_str(&problem.to_string());
    }
    text
}

/// What is laid over the defaults.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The user's file.
    pub file: Option<PathBuf>,
    /// Environment variables; only those with [`ENVIRONMENT_PREFIX`] are looked at.
    pub environment: Vec<(String, String)>,
    /// Flags of the command line: flag, key, value.
    pub flags: Vec<(&'static str, &'static str, Value)>,
}

/// A configuration that was checked.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What the rest of the engine sees.
    pub settings: Settings,
    /// What was written, merged.
    pub raw: RawConfig,
    /// Where each value that is not the default comes from, by key.
    pub origins: BTreeMap<String, Origin>,
}

/// Reads, merges and checks.
///
/// # Errors
/// When the file cannot be read or parsed, or with *all* problems when values are wrong.
pub fn load(sources: &Sources) -> Result<Loaded, ConfigError> {
    let mut merge = Merge {
        merged: parse(DEFAULTS)
            .expect("the compiled-in defaults are valid TOML, a test reads them"),
        origins: BTreeMap::new(),
        problems: Vec::new(),
    };
    if let Some(path) = &sources.file {
        let text = read(path)?;
        let table = parse(&text).map_err(|source| ConfigError::Syntax {
            path: path.clone(),
            source: Box::new(source),
        })?;
        merge.table("", table, &Origin::File(path.clone()));
    }
    for (name, text) in &sources.environment {
        merge.variable(name, text);
    }
    for (flag, key, value) in &sources.flags {
        merge.set(key, value.clone(), &Origin::Flag(flag));
    }
    let Merge { merged, origins, mut problems } = merge;
    let raw: RawConfig = Value::Table(merged)
        .try_into()
        .expect("merging keeps every key of the defaults with a value of its kind");
    let settings = Settings::check(&raw, &origins, &mut problems);
    if problems.is_empty() {
        Ok(Loaded { settings, raw, origins })
    } else {
        Err(ConfigError::Invalid(problems))
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut text = String::new();
    file.take(FILE_LEN_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > FILE_LEN_MAX {
        return Err(failed(std::io::Error::other("it is larger than 4 MiB")));
    }
    Ok(text)
}

fn parse(text: &str) -> Result<Table, toml::de::Error> {
    toml::from_str(text)
}

/// The values so far, which always have every key of the defaults with a value of its kind.
struct Merge {
    merged: Table,
    origins: BTreeMap<String, Origin>,
    problems: Vec<Problem>,
}

impl Merge {
    /// Lays a whole table over the section `path` (empty: the root).
    fn table(&mut self, path: &str, table: Table, origin: &Origin) {
        for (name, value) in table {
            let key = if path.is_empty() { name } else { format!("{path}.{name}") };
            let section = find(&mut self.merged, &key).is_some_and(|v| v.is_table());
            match value {
                Value::Table(inner) if section => self.table(&key, inner, origin),
                value => self.set(&key, value, origin),
            }
        }
    }

    /// Sets one key, or notes why not.
    fn set(&mut self, key: &str, value: Value, origin: &Origin) {
        let problem = |value: &Value, expected: String| Problem {
            key: key.to_owned(),
            value: if value.is_table() { String::new() } else { value.to_string() },
            origin: origin.clone(),
            expected,
        };
        let open = OPEN_SECTIONS.iter().find_map(|section| {
            key.strip_prefix(section)?.strip_prefix('.').map(|name| (*section, name))
        });
        if let Some((section, name)) = open {
            match (value, find(&mut self.merged, section)) {
                (value @ Value::String(_), Some(Value::Table(table))) => {
                    table.insert(name.to_owned(), value);
                    self.origins.insert(key.to_owned(), origin.clone());
                }
                (value, _) => self.problems.push(problem(&value, "must be text".to_owned())),
            }
            return;
        }
        let Some(present) = find(&mut self.merged, key) else {
            let expected = unknown(&mut self.merged, key);
            self.problems.push(Problem { value: String::new(), ..problem(&value, expected) });
            return;
        };
        let value = match (&*present, value) {
            (Value::Float(_), Value::Integer(n)) => Value::Float(n as f64),
            (_, value) => value,
        };
        if std::mem::discriminant(present) != std::mem::discriminant(&value) {
            let expected = kind(present);
            self.problems.push(problem(&value, expected));
            return;
        }
        if let Value::Array(items) = &value
            && let Some(item) = items.iter().find(|item| !item.is_table())
        {
            let expected = format!("must hold tables, as in [[{key}]]");
            self.problems.push(problem(item, expected));
            return;
        }
        *present = value;
        self.origins.insert(key.to_owned(), origin.clone());
    }

    /// Takes an environment variable, if it is meant for us.
    fn variable(&mut self, name: &str, text: &str) {
        let Some(path) = name.strip_prefix(ENVIRONMENT_PREFIX) else { return };
        let lower = path.to_ascii_lowercase().replace("__", ".");
        // Names in an open section are the user's: an org may have capitals, and underscores.
        let open = OPEN_SECTIONS.iter().find_map(|section| {
            let written = format!("{}__", section.replace('.', "__"));
            let (head, name) = path.split_at_checked(written.len())?;
            head.eq_ignore_ascii_case(&written).then(|| format!("{section}.{name}"))
        });
        let key = open.unwrap_or(lower);
        let origin = Origin::Environment(name.to_owned());
        let wrong = |expected: &str| Problem {
            key: key.clone(),
            value: format!("{text:?}"),
            origin: origin.clone(),
            expected: format!("must be {expected}"),
        };
        // What text means depends on the kind of value that stands there.
        let value = match find(&mut self.merged, &key) {
            Some(Value::Integer(_)) => {
                text.trim().parse().map(Value::Integer).map_err(|_| wrong("a whole number"))
            }
            Some(Value::Float(_)) => {
                text.trim().parse().map(Value::Float).map_err(|_| wrong("a number"))
            }
            Some(Value::Boolean(_)) => {
                text.trim().parse().map(Value::Boolean).map_err(|_| wrong("true or false"))
            }
            Some(Value::Array(_) | Value::Table(_)) => {
                toml::from_str::<Table>(&format!("v = {text}"))
                    .ok()
                    .and_then(|mut table| table.remove("v"))
                    .ok_or_else(|| wrong("a value as in the configuration file, on one line"))
            }
            _ => Ok(Value::String(text.to_owned())),
        };
        match value {
            Ok(Value::Table(table)) => self.table(&key, table, &origin),
            Ok(value) => self.set(&key, value, &origin),
            Err(problem) => self.problems.push(problem),
        }
    }
}

/// The value at a dotted key.
fn find<'a>(table: &'a mut Table, key: &str) -> Option<&'a mut Value> {
    match key.split_once('.') {
        None => table.get_mut(key),
        Some((section, rest)) => find(table.get_mut(section)?.as_table_mut()?, rest),
    }
}

/// What to say of an unknown key: what there is beside it.
fn unknown(root: &mut Table, key: &str) -> String {
    let names = |table: &Table| table.keys().cloned().collect::<Vec<_>>().join(", ");
    match key.rsplit_once('.') {
        Some((section, _)) => match find(root, section) {
            Some(Value::Table(table)) => {
                format!("is not a setting; [{section}] has {}", names(table))
            }
            _ => format!("is not a setting; the sections are {}", names(root)),
        },
        None => format!("is not a setting; the sections are {}", names(root)),
    }
}

/// What kind of value belongs where `present` stands.
fn kind(present: &Value) -> String {
    match present {
        Value::String(text) => format!("must be text such as {text:?}"),
        Value::Integer(_) => "must be a whole number".to_owned(),
        Value::Float(_) => "must be a number".to_owned(),
        Value::Boolean(_) => "must be true or false".to_owned(),
        Value::Array(_) => "must be a list of tables".to_owned(),
        Value::Table(_) | Value::Datetime(_) => "must be a section with keys of its own".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(sources: &Sources) -> Vec<String> {
        match load(sources) {
            Err(ConfigError::Invalid(problems)) => {
                problems.iter().map(Problem::to_string).collect()
            }
            other => panic!("expected problems, got {other:?}"),
        }
    }

    fn environment(pairs: &[(&str, &str)]) -> Sources {
        let environment =
            pairs.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned())).collect();
        Sources { environment, ..Sources::default() }
    }

    fn with_file(text: &str) -> (tempfile::TempDir, Sources) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meterr.toml");
        std::fs::write(&path, text).unwrap();
        (dir, Sources { file: Some(path), ..Sources::default() })
    }

    #[test]
    fn later_sources_win_key_by_key() {
        let (_dir, mut sources) =
            with_file("[node]\nshards = 4\nworkers = 2\n[epoch]\nage_max = \"5ms\"\n");
        sources.environment =
            vec![("METERR__NODE__SHARDS".into(), "8".into()), ("METERR_URL".into(), "x".into())];
        sources.flags = vec![("--data-dir", "node.data_dir", Value::String("/d".into()))];
        let loaded = load(&sources).unwrap();
        assert_eq!((loaded.raw.node.shards, loaded.raw.node.workers), (8, 2));
        assert_eq!(loaded.raw.epoch.age_max, "5ms");
        assert_eq!(loaded.raw.epoch.events_max, 10_000, "untouched keys keep their default");
        assert_eq!(loaded.raw.node.data_dir, "/d");
        let origin = |key: &str| loaded.origins.get(key).map(ToString::to_string);
        assert_eq!(origin("node.shards").as_deref(), Some("METERR__NODE__SHARDS"));
        assert_eq!(origin("node.data_dir").as_deref(), Some("--data-dir"));
        assert_eq!(origin("epoch.events_max"), None);
    }

    #[test]
    fn the_environment_sets_values_of_every_kind() {
        let loaded = load(&environment(&[
            ("METERR__NODE__DATA_DIR", "12"),
            ("METERR__CHECKPOINT__BASE_RATIO", "1"),
            ("METERR__METRICS__ENABLED", "false"),
            ("METERR__SEED__TIME_ZONES__Acme_Inc", "Europe/Berlin"),
            ("METERR__VIEWS__DECLARE", r#"[{name = "v", by = ["user"], window = "day"}]"#),
        ]))
        .unwrap();
        assert_eq!(loaded.raw.node.data_dir, "12", "text stays text");
        assert_eq!(loaded.raw.checkpoint.base_ratio, 1.0);
        assert!(!loaded.raw.metrics.enabled);
        assert_eq!(loaded.raw.seed.time_zones["Acme_Inc"], "Europe/Berlin");
        assert_eq!(loaded.settings.views.declare[0].name, "v");
    }

    #[test]
    fn problems_of_form_and_of_range_come_together() {
        let (_dir, mut sources) = with_file(
            "nodes = 1\n[node]\nshards = 0\nsharts = 3\nworkers = \"two\"\n\
             [epoch]\nage_max = 20\n[http]\naddress = \"0.0.0.0:80\"\n[views]\ndeclare = [1]\n",
        );
        sources.environment = vec![("METERR__HTTP__LINES_MAX".into(), "many".into())];
        let path = sources.file.as_ref().unwrap().display().to_string();
        let problems: Vec<String> =
            problems(&sources).into_iter().map(|p| p.replace(&path, "FILE")).collect();
        assert_eq!(
            problems,
            [
                "epoch.age_max = 20 (from FILE) must be text such as \"20ms\"",
                "node.sharts (from FILE) is not a setting; [node] has data_dir, shards, workers",
                "node.workers = \"two\" (from FILE) must be a whole number",
                "nodes (from FILE) is not a setting; the sections are backup, checkpoint, cluster, \
                 epoch, http, log, metrics, nats, node, seed, telemetry, views",
                "views.declare = 1 (from FILE) must hold tables, as in [[views.declare]]",
                "http.lines_max = \"many\" (from METERR__HTTP__LINES_MAX) must be a whole number",
                "node.shards = 0 (from FILE) must be 1 to 256",
                "http.address = \"0.0.0.0:80\" (from FILE) must be a loopback address with a port, \
                 such as \"127.0.0.1:8080\"; there are no access keys yet, so set \
                 http.allow_non_loopback = true only behind a guard of your own",
            ]
        );
        let shown = load(&sources).unwrap_err().to_string();
        assert!(shown.starts_with("8 settings are wrong:\n  epoch.age_max"), "{shown}");
    }

    #[test]
    fn a_section_is_not_a_value_and_a_value_is_not_a_section() {
        let (_dir, sources) =
            with_file("node = 3\n[epoch.age_max]\nx = 1\n[seed.time_zones]\na = 1\n");
        let path = sources.file.as_ref().unwrap().display().to_string();
        let problems = problems(&sources);
        assert_eq!(problems.len(), 3);
        assert!(
            problems.contains(&format!(
                "node = 3 (from {path}) must be a section with keys of its own"
            ))
        );
        assert!(
            problems
                .contains(&format!("epoch.age_max (from {path}) must be text such as \"20ms\""))
        );
        assert!(problems.contains(&format!("seed.time_zones.a = 1 (from {path}) must be text")));
    }

    #[test]
    fn what_cannot_be_read_says_which_file() {
        let sources = Sources { file: Some("/no/such.toml".into()), ..Sources::default() };
        assert_eq!(
            load(&sources).unwrap_err().to_string(),
            "configuration /no/such.toml cannot be read"
        );
        let (_dir, sources) = with_file("[node\n");
        assert!(load(&sources).unwrap_err().to_string().ends_with("is not valid TOML"));
    }

    #[test]
    fn every_file_in_config_loads() {
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config");
        let examples = std::fs::read_dir(config.join("examples")).unwrap();
        let mut files: Vec<PathBuf> = examples.map(|entry| entry.unwrap().path()).collect();
        assert!(files.len() >= 3, "{files:?}");
        files.push(config.join("meterr.toml"));
        for file in files {
            let sources = Sources { file: Some(file.clone()), ..Sources::default() };
            if let Err(error) = load(&sources) {
                panic!("{}: {error}", file.display());
            }
        }
    }
}
