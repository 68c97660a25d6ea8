//! Checked settings: the only form the rest of the engine may see.
//!
//! [`Settings::check`] looks at every value and reports everything that is wrong, each with key,
//! value, origin and allowed range. What is allowed is stated once, here; a test holds the comments
//! of `config/meterr.toml` to it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use meterr_connectors::api::ViewDeclaration;
use meterr_connectors::nats::connection::NatsSettings;
use meterr_operators::ids::{SHARDS_MAX, org_valid};
use toml::Table;
use tracing_subscriber::EnvFilter;

use crate::config::{self, Origin, Problem, RawConfig, Sources};
use crate::quantity::{parse_duration, parse_size, show_size};

/// Everything that can be set. What keys mean stands in `config/meterr.toml`.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// `[node]`
    pub node: Node,
    /// `[http]`
    pub http: Http,
    /// `[log]`
    pub log: Log,
    /// `[nats]`; none with the embedded log.
    pub nats: Option<Nats>,
    /// `[cluster]`
    pub cluster: Cluster,
    /// `[epoch]`
    pub epoch: Epoch,
    /// `[checkpoint]`
    pub checkpoint: Checkpoint,
    /// `[backup]`
    pub backup: Backup,
    /// `[seed]`
    pub seed: Seed,
    /// `[views]`
    pub views: Views,
    /// `[telemetry]`
    pub telemetry: Telemetry,
    /// `[metrics]`
    pub metrics: Metrics,
}

/// Where the node keeps its data and how it spreads its work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// Directory of logs and checkpoints.
    pub data_dir: PathBuf,
    /// Threads that run dataflows: at least 1, at most `shards`; one per core where 0 was written.
    pub workers: usize,
    /// Number of shards, 1 to 256.
    pub shards: u16,
}

/// The HTTP surface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Http {
    /// Where it listens.
    pub address: SocketAddr,
    /// Largest request body, before and after decompression.
    pub body_bytes_max: usize,
    /// Most events in one request.
    pub lines_max: usize,
    /// Longest time a request may take.
    pub request_timeout: Duration,
    /// Longest wait for `min_position`.
    pub min_position_timeout: Duration,
    /// Live streams open at once.
    pub sse_subscribers_max: usize,
}

/// The embedded log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    /// Size at which a new file begins.
    pub segment_bytes: u64,
    /// Jump of log time that stops a shard.
    pub time_jump_max: Duration,
}

/// NATS JetStream as log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nats {
    /// Where and how to connect.
    pub connection: NatsSettings,
    /// Servers that keep a copy of each stream.
    pub replicas: usize,
    /// Bytes a stream may hold when it is created; none for no limit.
    pub stream_bytes_max: Option<i64>,
    /// What to do when the server does not map subjects to shards.
    pub mapping: MappingWanted,
}

/// What to do when the server does not map subjects to shards.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MappingWanted {
    /// Say so, and go on.
    Warn,
    /// Do not start.
    Require,
    /// Do not look.
    Off,
}

/// This node among others.
#[derive(Debug, Clone, PartialEq)]
pub struct Cluster {
    /// Its name; none for one that is kept in the data directory.
    pub node: Option<String>,
    /// Its capacity weight.
    pub capacity: f64,
    /// Whether it follows every shard and owns none.
    pub replica: bool,
    /// Nodes that stand by for each shard.
    pub standbys: usize,
    /// Time after which a node that is not heard is taken to be dead.
    pub lease: Duration,
    /// Time for which the nodes must be the same before shards move to even out load.
    pub settle: Duration,
    /// Longest wait for others to take its shards when it stops.
    pub drain_max: Duration,
}

/// When an epoch closes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Epoch {
    /// At this many events.
    pub events_max: usize,
    /// At this age while the shard keeps up.
    pub age_max: Duration,
    /// At this age under load; not below `age_max`.
    pub age_max_loaded: Duration,
}

/// When a checkpoint is written and what is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Checkpoint {
    /// Time between two checkpoints of a shard.
    pub interval: Duration,
    /// Events since the last one that call for one earlier.
    pub events_max: u64,
    /// Size of the deltas, as share of the base, that calls for a new base.
    pub base_ratio: f64,
    /// Generations kept that verify.
    pub keep: usize,
    /// Cache of the store.
    pub cache_bytes: u64,
}

/// Backups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    /// Where they are kept; none: a server makes none.
    pub store: Option<String>,
    /// File that holds the key of an encrypted store.
    pub key_file: Option<PathBuf>,
    /// Time between two backups that a server makes.
    pub interval: Duration,
    /// Age at which backups are deleted; the newest stays.
    pub keep: Duration,
}

/// What the control log begins with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seed {
    /// Price book; none means the one that comes with meterr.
    pub prices: Option<PathBuf>,
    /// How long event ids are remembered, in log time.
    pub horizon: Duration,
    /// IANA time zone by org.
    pub time_zones: BTreeMap<String, String>,
}

/// Views kept live beside the built-in ones, to begin with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Views {
    /// Their declarations; names are unique.
    pub declare: Vec<ViewDeclaration>,
}

/// The log on stderr.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Telemetry {
    /// Level or directives, as `tracing_subscriber::EnvFilter` reads them.
    pub log: String,
    /// Form.
    pub format: Format,
}

/// Form of the log on stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Lines for people.
    Human,
    /// One JSON object a line.
    Json,
}

/// Prometheus metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metrics {
    /// Whether anything is measured.
    pub enabled: bool,
}

/// Whether a node may have this name: it is part of subjects and keys.
pub fn node_name_valid(name: &str) -> bool {
    let fits = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'-';
    (1..=64).contains(&name.len()) && name.bytes().all(fits)
}

impl Default for Settings {
    fn default() -> Settings {
        config::load(&Sources::default())
            .expect("the compiled-in defaults are within their ranges, a test checks them")
            .settings
    }
}

impl Settings {
    /// Checks every value and adds what is wrong to `problems`. The settings may be used only when
    /// there are none: a wrong value is replaced by something harmless so that checking can go on.
    pub fn check(
        raw: &RawConfig,
        origins: &BTreeMap<String, Origin>,
        problems: &mut Vec<Problem>,
    ) -> Settings {
        let mut check = Check { origins, problems, allowed: BTreeMap::new() };
        check.settings(raw)
    }
}

/// The state of a check. `allowed` collects what each key may be, whether or not it was wrong.
struct Check<'a> {
    origins: &'a BTreeMap<String, Origin>,
    problems: &'a mut Vec<Problem>,
    allowed: BTreeMap<&'static str, String>,
}

impl Check<'_> {
    fn settings(&mut self, raw: &RawConfig) -> Settings {
        Settings {
            node: self.node(raw),
            http: self.http(raw),
            log: Log {
                segment_bytes: self.size(
                    "log.segment_bytes",
                    &raw.log.segment_bytes,
                    1 << 20..=16 << 30,
                ),
                time_jump_max: self.duration(
                    "log.time_jump_max",
                    &raw.log.time_jump_max,
                    "1m",
                    "365d",
                ),
            },
            nats: self.nats(raw),
            cluster: self.cluster(raw),
            epoch: self.epoch(raw),
            checkpoint: self.checkpoint(raw),
            backup: self.backup(raw),
            seed: self.seed(raw),
            views: self.views(raw),
            telemetry: self.telemetry(raw),
            metrics: Metrics { enabled: self.flag("metrics.enabled", raw.metrics.enabled) },
        }
    }

    fn node(&mut self, raw: &RawConfig) -> Node {
        self.allow("node.data_dir", "a path");
        if raw.node.data_dir.is_empty() {
            self.wrong("node.data_dir", "\"\"", "a path");
        }
        let shards = self.number("node.shards", raw.node.shards, 1..=SHARDS_MAX as i64);
        let workers = match self.number("node.workers", raw.node.workers, 0..=256) {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        Node {
            data_dir: PathBuf::from(&raw.node.data_dir),
            workers: workers.min(shards),
            shards: shards as u16,
        }
    }

    fn http(&mut self, raw: &RawConfig) -> Http {
        const ADDRESS: &str = "a loopback address with a port, such as \"127.0.0.1:8080\"";
        let http = &raw.http;
        self.allow("http.address", ADDRESS);
        let open = self.flag("http.allow_non_loopback", http.allow_non_loopback);
        let address = match http.address.parse::<SocketAddr>() {
            Ok(address) if open || address.ip().is_loopback() => address,
            Ok(address) => {
                self.wrong(
                    "http.address",
                    &format!("{:?}", http.address),
                    &format!(
                        "{ADDRESS}; there are no access keys yet, so set http.allow_non_loopback = \
                         true only behind a guard of your own"
                    ),
                );
                address
            }
            Err(_) => {
                self.wrong("http.address", &format!("{:?}", http.address), ADDRESS);
                SocketAddr::from(([127, 0, 0, 1], 8080))
            }
        };
        let request_timeout =
            self.duration("http.request_timeout", &http.request_timeout, "1s", "10m");
        let min_position_timeout =
            self.duration("http.min_position_timeout", &http.min_position_timeout, "1ms", "10m");
        if min_position_timeout > request_timeout {
            self.wrong(
                "http.min_position_timeout",
                &format!("{:?}", http.min_position_timeout),
                &format!("at most http.request_timeout, which is {:?}", http.request_timeout),
            );
        }
        Http {
            address,
            body_bytes_max: self.size(
                "http.body_bytes_max",
                &http.body_bytes_max,
                1 << 10..=1 << 30,
            ) as usize,
            lines_max: self.number("http.lines_max", http.lines_max, 1..=1_000_000),
            request_timeout,
            min_position_timeout,
            sse_subscribers_max: self.number(
                "http.sse_subscribers_max",
                http.sse_subscribers_max,
                1..=1_000_000,
            ),
        }
    }

    fn nats(&mut self, raw: &RawConfig) -> Option<Nats> {
        const PATH: &str = "a path, or \"\"";
        const MAPPING: &str = "\"warn\", \"require\" or \"off\"";
        self.allow("nats.url", "addresses, or \"\"");
        for key in ["nats.credentials", "nats.ca", "nats.certificate", "nats.key"] {
            self.allow(key, PATH);
        }
        let nats = &raw.nats;
        let path = |text: &str| (!text.is_empty()).then(|| PathBuf::from(text));
        let certificate = match (path(&nats.certificate), path(&nats.key)) {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            (Some(_), None) => {
                self.wrong("nats.key", "\"\"", "a path, since nats.certificate is set");
                None
            }
            (None, Some(_)) => {
                self.wrong("nats.certificate", "\"\"", "a path, since nats.key is set");
                None
            }
        };
        self.allow("nats.mapping", MAPPING);
        let mapping = match nats.mapping.as_str() {
            "warn" => MappingWanted::Warn,
            "require" => MappingWanted::Require,
            "off" => MappingWanted::Off,
            other => {
                self.wrong("nats.mapping", &format!("{other:?}"), MAPPING);
                MappingWanted::Warn
            }
        };
        let replicas = self.number("nats.replicas", nats.replicas, 1..=5);
        let bytes = self.size("nats.stream_bytes_max", &nats.stream_bytes_max, 0..=1 << 50);
        (!nats.url.is_empty()).then(|| Nats {
            connection: NatsSettings {
                url: nats.url.clone(),
                credentials: path(&nats.credentials),
                ca: path(&nats.ca),
                certificate,
                inbox_prefix: None,
            },
            replicas,
            stream_bytes_max: (bytes > 0).then_some(bytes as i64),
            mapping,
        })
    }

    fn cluster(&mut self, raw: &RawConfig) -> Cluster {
        const NAME: &str = "1 to 64 of A-Z, a-z, 0-9, _ and -, or \"\"";
        const CAPACITY: RangeInclusive<f64> = 0.1..=100.0;
        let cluster = &raw.cluster;
        self.allow("cluster.node", NAME);
        let node = (!cluster.node.is_empty()).then(|| cluster.node.clone());
        if node.as_deref().is_some_and(|name| !node_name_valid(name)) {
            self.wrong("cluster.node", &format!("{:?}", cluster.node), NAME);
        }
        let capacity = format!("{} to {}", CAPACITY.start(), CAPACITY.end());
        self.allow("cluster.capacity", &capacity);
        if !CAPACITY.contains(&cluster.capacity) {
            self.wrong("cluster.capacity", &cluster.capacity.to_string(), &capacity);
        }
        Cluster {
            node,
            capacity: cluster.capacity,
            replica: self.flag("cluster.replica", cluster.replica),
            standbys: self.number("cluster.standbys", cluster.standbys, 0..=4),
            lease: self.duration("cluster.lease", &cluster.lease, "1s", "5m"),
            settle: self.duration("cluster.settle", &cluster.settle, "0s", "1h"),
            drain_max: self.duration("cluster.drain_max", &cluster.drain_max, "0s", "1h"),
        }
    }

    fn epoch(&mut self, raw: &RawConfig) -> Epoch {
        let age_max = self.duration("epoch.age_max", &raw.epoch.age_max, "1ms", "10s");
        let loaded = &raw.epoch.age_max_loaded;
        let age_max_loaded = self.duration("epoch.age_max_loaded", loaded, "1ms", "60s");
        if age_max_loaded < age_max {
            self.wrong(
                "epoch.age_max_loaded",
                &format!("{loaded:?}"),
                &format!("at least epoch.age_max, which is {:?}", raw.epoch.age_max),
            );
        }
        Epoch {
            events_max: self.number("epoch.events_max", raw.epoch.events_max, 1..=1_000_000),
            age_max,
            age_max_loaded,
        }
    }

    fn checkpoint(&mut self, raw: &RawConfig) -> Checkpoint {
        let checkpoint = &raw.checkpoint;
        const RATIO: RangeInclusive<f64> = 0.05..=10.0;
        let allowed = format!("{} to {}", RATIO.start(), RATIO.end());
        if !RATIO.contains(&checkpoint.base_ratio) {
            self.wrong("checkpoint.base_ratio", &checkpoint.base_ratio.to_string(), &allowed);
        }
        self.allow("checkpoint.base_ratio", &allowed);
        Checkpoint {
            interval: self.duration("checkpoint.interval", &checkpoint.interval, "1s", "1d"),
            events_max: self.number(
                "checkpoint.events_max",
                checkpoint.events_max,
                1_000..=1_000_000_000,
            ) as u64,
            base_ratio: checkpoint.base_ratio,
            keep: self.number("checkpoint.keep", checkpoint.keep, 2..=100),
            cache_bytes: self.size(
                "checkpoint.cache_bytes",
                &checkpoint.cache_bytes,
                1 << 20..=64 << 30,
            ),
        }
    }

    fn backup(&mut self, raw: &RawConfig) -> Backup {
        let backup = &raw.backup;
        self.allow("backup.store", "an address, or \"\"");
        self.allow("backup.key_file", "a path, or \"\"");
        let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let interval = self.duration("backup.interval", &backup.interval, "1m", "365d");
        let keep = self.duration("backup.keep", &backup.keep, "1h", "36500d");
        if keep < interval {
            self.wrong(
                "backup.keep",
                &format!("{:?}", backup.keep),
                &format!("at least backup.interval, which is {:?}", backup.interval),
            );
        }
        Backup {
            store: text(&backup.store),
            key_file: text(&backup.key_file).map(PathBuf::from),
            interval,
            keep,
        }
    }

    fn seed(&mut self, raw: &RawConfig) -> Seed {
        self.allow("seed.prices", "a path, or \"\"");
        self.allow("seed.time_zones", "IANA time zone names");
        for (org, zone) in &raw.seed.time_zones {
            let key = format!("seed.time_zones.{org}");
            if !org_valid(org) {
                self.wrong(&key, "", "named after an org: 1 to 128 of A-Z, a-z, 0-9, _ and -");
            }
            if jiff::tz::TimeZone::get(zone).is_err() {
                self.wrong(
                    &key,
                    &format!("{zone:?}"),
                    "an IANA time zone name such as \"Europe/Berlin\"",
                );
            }
        }
        Seed {
            prices: (!raw.seed.prices.is_empty()).then(|| PathBuf::from(&raw.seed.prices)),
            horizon: self.duration("seed.horizon", &raw.seed.horizon, "1h", "3650d"),
            time_zones: raw.seed.time_zones.clone(),
        }
    }

    fn views(&mut self, raw: &RawConfig) -> Views {
        self.allow("views.declare", "views with name, by and window");
        let mut declare: Vec<ViewDeclaration> = Vec::new();
        for (at, table) in raw.views.declare.iter().enumerate() {
            let name = match table.get("name").and_then(|name| name.as_str()) {
                Some(name) => format!("views.declare {name:?}"),
                None => format!("views.declare number {}", at + 1),
            };
            match view(table) {
                Ok(view) if declare.iter().any(|other| other.name == view.name) => {
                    self.problem(&name, "views.declare", "", "is declared twice".to_owned());
                }
                Ok(view) => declare.push(view),
                Err(what) => self.problem(&name, "views.declare", "", what),
            }
        }
        Views { declare }
    }

    fn telemetry(&mut self, raw: &RawConfig) -> Telemetry {
        let log = raw.telemetry.log.clone();
        const LOG: &str = "error, warn, info, debug, trace, or directives of these";
        self.allow("telemetry.log", LOG);
        if log.is_empty() || EnvFilter::builder().parse(&log).is_err() {
            self.wrong("telemetry.log", &format!("{log:?}"), LOG);
        }
        const FORMAT: &str = "\"human\" or \"json\"";
        self.allow("telemetry.format", FORMAT);
        let format = match raw.telemetry.format.as_str() {
            "human" => Format::Human,
            "json" => Format::Json,
            other => {
                self.wrong("telemetry.format", &format!("{other:?}"), FORMAT);
                Format::Human
            }
        };
        Telemetry { log, format }
    }

    fn flag(&mut self, key: &'static str, value: bool) -> bool {
        self.allow(key, "true or false");
        value
    }

    fn number(&mut self, key: &'static str, value: i64, range: RangeInclusive<i64>) -> usize {
        let allowed = format!("{} to {}", range.start(), range.end());
        if !range.contains(&value) {
            self.wrong(key, &value.to_string(), &allowed);
        }
        self.allow(key, &allowed);
        value.clamp(*range.start(), *range.end()) as usize
    }

    fn duration(&mut self, key: &'static str, text: &str, least: &str, most: &str) -> Duration {
        let bound = |text| parse_duration(text).expect("bounds are written in this file");
        let (least_duration, most_duration) = (bound(least), bound(most));
        self.allow(key, &format!("{least} to {most}"));
        match parse_duration(text) {
            Ok(duration) => {
                if !(least_duration..=most_duration).contains(&duration) {
                    self.wrong(key, &format!("{text:?}"), &format!("{least} to {most}"));
                }
                duration
            }
            Err(form) => {
                self.wrong(key, &format!("{text:?}"), &format!("{form}, from {least} to {most}"));
                least_duration
            }
        }
    }

    fn size(&mut self, key: &'static str, text: &str, range: RangeInclusive<u64>) -> u64 {
        let allowed = format!("{} to {}", show_size(*range.start()), show_size(*range.end()));
        self.allow(key, &allowed);
        match parse_size(text) {
            Ok(size) => {
                if !range.contains(&size) {
                    self.wrong(key, &format!("{text:?}"), &allowed);
                }
                size
            }
            Err(form) => {
                let (least, most) = (show_size(*range.start()), show_size(*range.end()));
                self.wrong(key, &format!("{text:?}"), &format!("{form}, from {least} to {most}"));
                *range.start()
            }
        }
    }

    fn allow(&mut self, key: &'static str, allowed: &str) {
        self.allowed.insert(key, allowed.to_owned());
    }

    fn wrong(&mut self, key: &str, value: &str, allowed: &str) {
        self.problem(key, key, value, format!("must be {allowed}"));
    }

    fn problem(&mut self, shown: &str, key: &str, value: &str, expected: String) {
        self.problems.push(Problem {
            key: shown.to_owned(),
            value: value.to_owned(),
            origin: self.origins.get(key).cloned().unwrap_or(Origin::Default),
            expected,
        });
    }
}

/// Reads one `[[views.declare]]`.
fn view(table: &Table) -> Result<ViewDeclaration, String> {
    let view: ViewDeclaration = table
        .clone()
        .try_into()
        .map_err(|error: toml::de::Error| format!("is wrong: {}", error.message()))?;
    let name_valid = (1..=64).contains(&view.name.len())
        && view.name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_');
    if !name_valid {
        return Err("must be named with 1 to 64 of a-z, 0-9 and _".to_owned());
    }
    let known = |by: &str| {
        matches!(by, "user" | "model" | "provider" | "feature")
            || by.strip_prefix("tag:").is_some_and(|tag| !tag.is_empty())
    };
    if let Some(by) = view.by.iter().find(|by| !known(by)) {
        return Err(format!(
            "groups by {by:?}; it must be user, model, provider, feature or tag:NAME"
        ));
    }
    let mut unique = view.by.clone();
    unique.sort_unstable();
    unique.dedup();
    if !(1..=4).contains(&view.by.len()) || unique.len() != view.by.len() {
        return Err("must group by 1 to 4 different dimensions".to_owned());
    }
    Ok(view)
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Format::Human => "human",
            Format::Json => "json",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw() -> RawConfig {
        config::load(&Sources::default()).unwrap().raw
    }

    fn problems(change: impl FnOnce(&mut RawConfig)) -> Vec<String> {
        let mut raw = raw();
        change(&mut raw);
        let mut problems = Vec::new();
        Settings::check(&raw, &BTreeMap::new(), &mut problems);
        problems.iter().map(|p| p.to_string().replace(" (from default)", "")).collect()
    }

    #[test]
    fn defaults_are_those_of_the_design() {
        let settings = Settings::default();
        assert_eq!(settings.node.shards, 16);
        assert!((1..=16).contains(&settings.node.workers));
        assert_eq!(settings.http.address, SocketAddr::from(([127, 0, 0, 1], 8080)));
        assert_eq!(
            settings.epoch,
            Epoch {
                events_max: 10_000,
                age_max: Duration::from_millis(20),
                age_max_loaded: Duration::from_millis(250),
            }
        );
        assert_eq!(settings.log.time_jump_max, Duration::from_secs(24 * 3600));
        assert_eq!(settings.seed.horizon, Duration::from_secs(35 * 86_400));
        assert_eq!(settings.seed.prices, None);
        assert_eq!(
            settings.checkpoint,
            Checkpoint {
                interval: Duration::from_secs(30),
                events_max: 100_000,
                base_ratio: 0.5,
                keep: 2,
                cache_bytes: 64 << 20,
            }
        );
        assert_eq!(settings.telemetry, Telemetry { log: "info".into(), format: Format::Human });
    }

    #[test]
    fn the_file_states_what_the_code_allows() {
        let mut problems = Vec::new();
        let mut check =
            Check { origins: &BTreeMap::new(), problems: &mut problems, allowed: BTreeMap::new() };
        check.settings(&raw());
        let mut allowed = check.allowed;
        let mut section = String::new();
        let mut comment = Vec::new();
        for line in config::DEFAULTS.lines() {
            let key = match line.split_once(" = ") {
                _ if line.starts_with('#') => {
                    comment.push(line.trim_start_matches(['#', ' ']));
                    continue;
                }
                None if line.starts_with('[') => {
                    section = line.trim_matches(['[', ']']).to_owned();
                    // An open section is documented above its header, like a key.
                    section.clone()
                }
                Some((name, _)) => format!("{section}.{name}"),
                None => {
                    comment.clear();
                    continue;
                }
            };
            if let Some(allowed) = allowed.remove(key.as_str()) {
                let stated = format!("Allowed: {allowed}.");
                assert!(
                    comment.last() == Some(&stated.as_str()) && comment.len() > 1,
                    "{key} must be explained in config/meterr.toml, ending in {stated:?}"
                );
            } else {
                assert!(line.starts_with('['), "{key} states no allowed values in settings.rs");
            }
            comment.clear();
        }
        assert!(allowed.is_empty(), "missing in config/meterr.toml: {allowed:?}");
        assert!(problems.is_empty(), "{problems:?}");
    }

    #[test]
    fn each_value_out_of_range_is_named_with_its_range() {
        let problems = problems(|raw| {
            raw.node.workers = -1;
            raw.node.shards = 257;
            raw.node.data_dir = String::new();
            raw.http.address = "localhost:8080".into();
            raw.http.body_bytes_max = "2GiB".into();
            raw.http.request_timeout = "30".into();
            raw.log.segment_bytes = "64MB".into();
            raw.epoch.age_max = "0ms".into();
            raw.checkpoint.base_ratio = f64::NAN;
            raw.checkpoint.keep = 1;
            raw.seed.horizon = "1m".into();
            raw.telemetry.log = "meterr=loud".into();
            raw.telemetry.format = "xml".into();
        });
        assert_eq!(
            problems,
            [
                "node.data_dir = \"\" must be a path",
                "node.shards = 257 must be 1 to 256",
                "node.workers = -1 must be 0 to 256",
                "http.address = \"localhost:8080\" must be a loopback address with a port, such as \
                 \"127.0.0.1:8080\"",
                "http.request_timeout = \"30\" must be a whole number with the unit ms, s, m, h or \
                 d, such as \"30s\", from 1s to 10m",
                "http.min_position_timeout = \"30s\" must be at most http.request_timeout, which is \
                 \"30\"",
                "http.body_bytes_max = \"2GiB\" must be 1KiB to 1GiB",
                "log.segment_bytes = \"64MB\" must be a whole number with the unit B, KiB, MiB, GiB \
                 or TiB, such as \"64MiB\", from 1MiB to 16GiB",
                "epoch.age_max = \"0ms\" must be 1ms to 10s",
                "checkpoint.base_ratio = NaN must be 0.05 to 10",
                "checkpoint.keep = 1 must be 2 to 100",
                "seed.horizon = \"1m\" must be 1h to 3650d",
                "telemetry.log = \"meterr=loud\" must be error, warn, info, debug, trace, or \
                 directives of these",
                "telemetry.format = \"xml\" must be \"human\" or \"json\"",
            ]
        );
    }

    #[test]
    fn values_that_contradict_each_other_are_refused() {
        assert_eq!(
            problems(|raw| {
                raw.epoch.age_max = "1s".into();
                raw.http.min_position_timeout = "1m".into();
            }),
            [
                "http.min_position_timeout = \"1m\" must be at most http.request_timeout, which is \
                 \"30s\"",
                "epoch.age_max_loaded = \"250ms\" must be at least epoch.age_max, which is \"1s\"",
            ]
        );
    }

    #[test]
    fn other_machines_are_let_in_only_on_request() {
        let open = |allow| {
            move |raw: &mut RawConfig| {
                raw.http.address = "[::]:8080".into();
                raw.http.allow_non_loopback = allow;
            }
        };
        assert_eq!(problems(open(true)), Vec::<String>::new());
        assert_eq!(problems(open(false)).len(), 1);
    }

    #[test]
    fn seeds_are_checked_one_by_one() {
        let declared = |text: &str| {
            let mut table: Table = toml::from_str(text).unwrap();
            let list = table.remove("d").unwrap();
            list.as_array().unwrap().iter().map(|v| v.as_table().unwrap().clone()).collect()
        };
        let problems = problems(|raw| {
            raw.seed.time_zones.insert("acme".into(), "Europe/Berlin".into());
            raw.seed.time_zones.insert("a.b".into(), "Mars/Olympus".into());
            raw.views.declare = declared(
                r#"d = [
                    { name = "ok", by = ["user", "tag:team"], window = "month" },
                    { name = "ok", by = ["user"], window = "day" },
                    { name = "Bad", by = ["user"], window = "day" },
                    { name = "week", by = ["user"], window = "week" },
                    { name = "by", by = ["org"], window = "day" },
                    { name = "twice", by = ["user", "user"], window = "day" },
                    { by = ["user"], window = "day" },
                ]"#,
            );
        });
        assert_eq!(problems.len(), 8, "{problems:#?}");
        assert!(problems[0].starts_with("seed.time_zones.a.b must be named after an org"));
        assert!(problems[1].starts_with("seed.time_zones.a.b = \"Mars/Olympus\" must be an IANA"));
        assert_eq!(problems[2], "views.declare \"ok\" is declared twice");
        assert_eq!(
            problems[3],
            "views.declare \"Bad\" must be named with 1 to 64 of a-z, 0-9 and _"
        );
        assert!(problems[4].starts_with("views.declare \"week\" is wrong: unknown variant `week`"));
        assert!(problems[5].contains("groups by \"org\""), "{}", problems[5]);
        assert!(problems[6].ends_with("must group by 1 to 4 different dimensions"));
        assert!(problems[7].starts_with("views.declare number 7 is wrong: missing field `name`"));
    }
}
