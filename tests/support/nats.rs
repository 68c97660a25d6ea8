//! Real NATS servers for tests, one or a cluster, each with a store and a port of its own, ended by
//! process id when dropped, also by a test that panics.
//!
//! The binary is the one `METERR_NATS_SERVER` names, one on the `PATH` that is new enough, or the one
//! `tests/nats-server` put under `target/tools`. Without one a test fails; it is never skipped.
//!
//! A port is reserved by a locked file, in a range from which the system takes none for outgoing
//! connections: while a server is down, nobody else can take its port, not even a client that knocks
//! at it. Started means that JetStream has answered a request, with a leader where there are several.

#![allow(dead_code, clippy::unwrap_used)] // each test program uses a part of it

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use serde_json::Value;
use tempfile::TempDir;

/// Longest time anything of a server may take before the test fails instead of hanging.
const PATIENCE: Duration = Duration::from_secs(60);
/// Below what Linux takes for outgoing connections (32768 and up).
const PORTS: std::ops::Range<u64> = 10_000..30_000;

/// How to run a server.
#[derive(Debug, Clone, Default)]
pub struct NatsOptions {
    sync_always: bool,
    shards: Option<u16>,
    file_store_max: Option<u64>,
    text: String,
    config: Option<String>,
    login: Option<(String, String)>,
    cluster: String,
    directory: Option<PathBuf>,
}

impl NatsOptions {
    /// A server as it is without any configuration: every two minutes a sync, and no mapping.
    pub fn new() -> NatsOptions {
        NatsOptions::default()
    }

    /// Each message is synced before it is acknowledged.
    pub fn sync_always(mut self) -> NatsOptions {
        self.sync_always = true;
        self
    }

    /// `usage.<org>` is mapped to `usage.<shard>.<org>`, with so many shards.
    pub fn mapping(mut self, shards: u16) -> NatsOptions {
        self.shards = Some(shards);
        self
    }

    /// Streams may hold so many bytes; beyond them the server refuses messages.
    pub fn file_store_max(mut self, bytes: u64) -> NatsOptions {
        self.file_store_max = Some(bytes);
        self
    }

    /// More lines for the server's configuration.
    pub fn text(mut self, text: &str) -> NatsOptions {
        self.text.push_str(text);
        self.text.push('\n');
        self
    }

    /// Runs with this configuration alone; only address, port and `store_dir` are
    /// replaced, and `text` is added.
    pub fn config(mut self, text: &str) -> NatsOptions {
        self.config = Some(text.to_owned());
        self
    }

    /// Who asks whether the server is up, where it wants to know.
    pub fn login(mut self, user: &str, password: &str) -> NatsOptions {
        self.login = Some((user.to_owned(), password.to_owned()));
        self
    }

    /// Keeps everything below this directory instead of the system's for temporary files, which may
    /// be memory.
    pub fn directory(mut self, directory: &Path) -> NatsOptions {
        self.directory = Some(directory.to_owned());
        self
    }

    fn file(&self, store: &Path) -> String {
        let store = format!("  store_dir: {store:?}\n");
        if let Some(config) = &self.config {
            let lines = config.split_inclusive('\n');
            let replaced = |line| {
                let own = str::trim_start(line).starts_with("store_dir:");
                if own { store.as_str() } else { line }
            };
            let config: String = lines.map(replaced).collect();
            return format!("{config}\n{}", self.text);
        }
        let mut text = String::new();
        let mut jetstream = store;
        if self.sync_always {
            jetstream.push_str("  sync_interval: always\n");
        }
        if let Some(bytes) = self.file_store_max {
            jetstream.push_str(&format!("  max_file_store: {bytes}\n"));
        }
        text.push_str(&format!("jetstream {{\n{jetstream}}}\n"));
        if let Some(shards) = self.shards {
            let to = format!("usage.{{{{partition({shards},1)}}}}.{{{{wildcard(1)}}}}");
            text.push_str(&format!("mappings = {{ \"usage.*\": \"{to}\" }}\n"));
        }
        text.push_str(&self.cluster);
        text.push_str(&self.text);
        text
    }
}

/// A port nobody else of us gets, as long as this lives.
pub struct Port {
    /// The port.
    pub number: u16,
    _lock: File,
}

impl Port {
    /// Reserves one.
    pub fn reserve() -> Port {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let seed = since.as_nanos() as u64 ^ u64::from(std::process::id()) << 32;
        let dir = std::env::temp_dir().join("meterr-test-ports");
        std::fs::create_dir_all(&dir).unwrap();
        for _ in 0..1_000 {
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            let mixed = (seed.wrapping_add(n)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            let number = (PORTS.start + mixed % (PORTS.end - PORTS.start)) as u16;
            let Ok(lock) = File::create(dir.join(number.to_string())) else { continue };
            if lock.try_lock().is_ok() && TcpListener::bind(("127.0.0.1", number)).is_ok() {
                return Port { number, _lock: lock };
            }
        }
        panic!("no port of {PORTS:?} is free");
    }
}

/// A server of one's own.
pub struct NatsServer {
    options: NatsOptions,
    port: Port,
    dir: TempDir,
    child: Option<Child>,
}

impl NatsServer {
    /// Starts a server on an empty store; returns once JetStream answers.
    pub fn start(options: NatsOptions) -> NatsServer {
        for _ in 0..20 {
            let mut server = NatsServer::new(options.clone());
            server.spawn();
            match server.until_answering() {
                Ok(()) => return server,
                // Of someone who does not reserve.
                Err(log) if log.contains("address already in use") => {}
                Err(log) => panic!("nats-server did not start: {log}"),
            }
        }
        panic!("every port tried was taken");
    }

    fn new(options: NatsOptions) -> NatsServer {
        let mut builder = tempfile::Builder::new();
        let builder = builder.prefix("meterr-nats-");
        let dir = match &options.directory {
            Some(directory) => builder.tempdir_in(directory),
            None => builder.tempdir(),
        };
        let dir = dir.unwrap();
        NatsServer { options, port: Port::reserve(), dir, child: None }
    }

    /// `nats://127.0.0.1:port`.
    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port.number)
    }

    /// Port for clients; the same after a restart.
    pub fn port(&self) -> u16 {
        self.port.number
    }

    /// Where streams are kept; the same after a restart.
    pub fn store_dir(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    /// Process id. Panics when it does not run.
    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("the server runs").id()
    }

    /// Whether it was started and neither killed nor stopped.
    pub fn runs(&self) -> bool {
        self.child.is_some()
    }

    /// What it logged, over all its starts.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.dir.path().join("log")).unwrap_or_default())
            .into_owned()
    }

    /// `kill -9`; returns once it is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// An orderly stop; returns once it is gone.
    pub fn stop(&mut self) {
        let Some(mut child) = self.child.take() else { return };
        signal(child.id(), "TERM");
        let began = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if began.elapsed() > PATIENCE {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("nats-server did not stop: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Starts it again on the same store and port, after `kill` or `stop`; kills it before when it
    /// runs. Returns once JetStream answers.
    pub fn restart(&mut self) {
        self.kill();
        self.spawn();
        if let Err(log) = self.until_answering() {
            panic!("nats-server did not start again: {log}");
        }
    }

    /// Starts it again like [`NatsServer::restart`] without waiting, for when it needs others to answer.
    pub fn begin(&mut self) {
        self.kill();
        self.spawn();
    }

    /// The same with other options, such as another limit.
    pub fn restart_with(&mut self, options: NatsOptions) {
        self.kill();
        self.options = NatsOptions { cluster: self.options.cluster.clone(), ..options };
        self.restart();
    }

    /// Freezes it: connections stay open, and nothing is answered.
    pub fn pause(&self) {
        signal(self.pid(), "STOP");
    }

    /// Goes on after `pause`.
    pub fn resume(&self) {
        signal(self.pid(), "CONT");
    }

    /// Starts without waiting.
    fn spawn(&mut self) {
        let config = self.dir.path().join("nats.conf");
        std::fs::write(&config, self.options.file(&self.store_dir())).unwrap();
        let log = File::options().create(true).append(true).open(self.dir.path().join("log"));
        let child = Command::new(binary())
            .arg("--config")
            .arg(config)
            .args(["--addr", "127.0.0.1", "--port", &self.port.number.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log.unwrap())
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    /// Waits until JetStream answers without an error; when the server is gone, its log.
    fn until_answering(&mut self) -> Result<(), String> {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            if self.child.as_mut().expect("just started").try_wait().unwrap().is_some() {
                self.child = None;
                return Err(self.log());
            }
            match self.request("$JS.API.INFO", "") {
                Some(answer) if answer["error"].is_null() => return Ok(()),
                _ => std::thread::sleep(Duration::from_millis(2)),
            }
        }
        Err(format!("no answer after {PATIENCE:?}: {}", self.log()))
    }

    /// Asks once, on a connection of its own; nothing when there is no answer within a second.
    pub fn request(&self, subject: &str, body: &str) -> Option<Value> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port.number)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(1))).ok()?;
        let mut connect = serde_json::json!({ "verbose": false, "lang": "tests", "version": "0" });
        if let Some((user, password)) = &self.options.login {
            connect["user"] = user.as_str().into();
            connect["pass"] = password.as_str().into();
        }
        let reply = "_INBOX.tests.probe";
        let length = body.len();
        let sent = format!(
            "CONNECT {connect}\r\nSUB {reply} 1\r\nPUB {subject} {reply} {length}\r\n{body}\r\n"
        );
        stream.write_all(sent.as_bytes()).ok()?;
        let mut reader = BufReader::new(stream);
        loop {
            let mut line = String::new();
            if reader.read_line(&mut line).ok()? == 0 {
                return None;
            }
            if line.starts_with("MSG ") {
                let length = line.split_whitespace().last()?.parse().ok()?;
                let mut payload = vec![0; length];
                reader.read_exact(&mut payload).ok()?;
                return serde_json::from_slice(&payload).ok();
            }
            if line.starts_with("PING") {
                reader.get_mut().write_all(b"PONG\r\n").ok()?;
            } else if line.starts_with("-ERR") {
                return None;
            }
        }
    }
}

impl Drop for NatsServer {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // SIGKILL ends a frozen process as well.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Servers that know each other; streams may have as many replicas.
pub struct Cluster {
    servers: Vec<NatsServer>,
    /// Ports by which they talk to each other.
    _routes: Vec<Port>,
}

impl Cluster {
    /// Starts so many servers (3 or 5 make sense); returns once a stream with that many replicas can
    /// be made.
    pub fn start(servers: usize) -> Cluster {
        Cluster::start_with(servers, &NatsOptions::new())
    }

    /// The same with options for every server.
    pub fn start_with(servers: usize, options: &NatsOptions) -> Cluster {
        let routes: Vec<Port> = (0..servers).map(|_| Port::reserve()).collect();
        let urls: Vec<String> =
            routes.iter().map(|port| format!("nats://127.0.0.1:{}", port.number)).collect();
        let servers = routes.iter().enumerate().map(|(n, route)| {
            let mut options = options.clone();
            options.cluster = format!(
                "server_name: n{n}\ncluster {{\n  name: tests\n  no_advertise: true\n  listen: \"127.0.0.1:{}\"\n  \
                 routes: [{}]\n}}\n",
                route.number,
                urls.join(", ")
            );
            let mut server = NatsServer::new(options);
            server.spawn();
            server
        });
        let servers = servers.collect();
        let mut cluster = Cluster { servers, _routes: routes };
        for server in &mut cluster.servers {
            if let Err(log) = server.until_answering() {
                panic!("a server of the cluster did not start: {log}");
            }
        }
        cluster.until_complete();
        cluster
    }

    /// Addresses of all servers, separated by commas.
    pub fn url(&self) -> String {
        self.servers.iter().map(NatsServer::url).collect::<Vec<_>>().join(",")
    }

    /// One of the servers.
    pub fn server(&mut self, n: usize) -> &mut NatsServer {
        &mut self.servers[n]
    }

    /// Which server leads a stream; waits until one does.
    pub fn leader(&self, stream: &str) -> usize {
        self.until(&format!("{stream} has a leader"), |server| {
            let info = server.request(&format!("$JS.API.STREAM.INFO.{stream}"), "")?;
            info["cluster"]["leader"].as_str()?.strip_prefix('n')?.parse().ok()
        })
    }

    /// Waits until every server takes part: a stream with a replica on each can be made.
    pub fn until_complete(&self) {
        let replicas = self.servers.len();
        let stream = serde_json::json!({
            "name": "TESTS_PROBE", "subjects": ["tests.probe"], "storage": "memory",
            "retention": "limits", "discard": "old", "num_replicas": replicas, "max_consumers": -1,
            "max_msgs": -1, "max_bytes": -1, "max_age": 0,
        });
        let done = |answer: Value| answer["error"].is_null().then_some(());
        self.until("every server takes part", |server| {
            done(server.request("$JS.API.STREAM.CREATE.TESTS_PROBE", &stream.to_string())?)
        });
        self.until("the probe is gone", |server| {
            let answer = server.request("$JS.API.STREAM.DELETE.TESTS_PROBE", "")?;
            done(answer.clone()).or_else(|| (answer["error"]["err_code"] == 10059).then_some(()))
        });
    }

    fn until<T>(&self, what: &str, mut ask: impl FnMut(&NatsServer) -> Option<T>) -> T {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            for server in self.servers.iter().filter(|server| server.runs()) {
                if let Some(found) = ask(server) {
                    return found;
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let logs: Vec<String> = self.servers.iter().map(NatsServer::log).collect();
        panic!("{what}: not after {PATIENCE:?}: {}", logs.join("\n"));
    }
}

/// The binary, found once.
pub fn binary() -> &'static Path {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    FOUND.get_or_init(|| {
        if let Some(named) = std::env::var_os("METERR_NATS_SERVER") {
            let named = PathBuf::from(named);
            assert!(new_enough(&named), "METERR_NATS_SERVER={named:?} is no nats-server >= 2.11");
            return named;
        }
        let on_path = std::env::var_os("PATH").unwrap_or_default();
        let on_path = std::env::split_paths(&on_path).map(|dir| dir.join("nats-server"));
        // Of the root package, or of one beside it.
        let here = Path::new(env!("CARGO_MANIFEST_DIR"));
        let tools = here.ancestors().take(2).map(|dir| dir.join("target/tools"));
        let tools = tools.filter_map(|dir| std::fs::read_dir(dir).ok()).flatten();
        let tools = tools.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| {
            path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"nats-server"))
        });
        on_path.chain(tools).find(|path| new_enough(path)).unwrap_or_else(|| {
            panic!(
                "these tests need nats-server 2.11 or newer. `tests/nats-server` gets one; or put it \
                 on the PATH, or name it by METERR_NATS_SERVER"
            )
        })
    })
}

fn new_enough(path: &Path) -> bool {
    let Ok(said) = Command::new(path).arg("--version").stdin(Stdio::null()).output() else {
        return false;
    };
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let version = said.rsplit('v').next().unwrap_or_default();
    let mut numbers = version.split('.').map_while(|number| number.trim().parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(2), Some(11))
}

fn signal(pid: u32, name: &str) {
    let status = Command::new("bash").args(["-c", &format!("kill -{name} {pid}")]).status();
    assert!(status.unwrap().success(), "cannot send {name} to {pid}");
}
