//! The real binary, as a user runs it: started with a data directory of its own on a free port,
//! asked over HTTP, stopped by signals, killed when dropped.
//!
//! Nothing here waits for a fixed time: a server is ready when `/readyz` says so, and a position is
//! counted when `min_position` returns.

#![allow(dead_code, clippy::unwrap_used)] // each test program uses a part of it

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;

pub mod busy;
pub mod golden;
pub mod money;
pub mod sse;

/// The binary under test.
pub const METERR: &str = env!("CARGO_BIN_EXE_meterr");
/// Longest time anything may take before the test fails instead of hanging.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A command of the binary with nothing of the caller's environment in its settings.
pub fn meterr(args: &[&str]) -> Command {
    let mut command = Command::new(METERR);
    command.args(args).stdin(Stdio::null());
    for (key, _) in std::env::vars().filter(|(key, _)| key.starts_with("METERR")) {
        command.env_remove(key);
    }
    command
}

/// Runs a command of the binary to its end.
pub fn run(args: &[&str]) -> Output {
    meterr(args).output().unwrap()
}

/// Exit code and both outputs of a command.
pub fn ran(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// Runs a command that must succeed, and reads the JSON it prints.
pub fn run_json(args: &[&str]) -> Value {
    let (code, out, err) = ran(&run(args));
    assert_eq!(code, 0, "meterr {args:?}: {err}");
    serde_json::from_str(&out).unwrap_or_else(|e| panic!("meterr {args:?}: {e}: {out}"))
}

/// How to start a server.
#[derive(Debug, Clone)]
pub struct Launch {
    dir: PathBuf,
    environment: Vec<(String, String)>,
    arguments: Vec<String>,
    file_kib_max: Option<u64>,
}

impl Launch {
    /// A server on this data directory.
    pub fn on(dir: &Path) -> Launch {
        Launch {
            dir: dir.to_owned(),
            environment: Vec::new(),
            arguments: Vec::new(),
            file_kib_max: None,
        }
    }

    /// Sets a setting, such as `("CHECKPOINT__INTERVAL", "1s")`.
    pub fn set(mut self, key: &str, value: &str) -> Launch {
        self.environment.push((format!("METERR__{key}"), value.to_owned()));
        self
    }

    /// Adds an argument.
    pub fn argument(mut self, argument: &str) -> Launch {
        self.arguments.push(argument.to_owned());
        self
    }

    /// Lets no file of the server grow beyond this size: to a log that is a full disk, and it needs
    /// no rights of its own.
    pub fn files_at_most_kib(mut self, kib: u64) -> Launch {
        self.file_kib_max = Some(kib);
        self
    }

    fn command(&self) -> Command {
        let mut command = match self.file_kib_max {
            None => meterr(&[]),
            Some(kib) => {
                let mut shell = Command::new("bash");
                // A write beyond the limit fails with EFBIG once its signal is ignored, which exec
                // hands on.
                let script = format!("trap '' XFSZ; ulimit -f {kib}; exec \"$@\"");
                shell.args(["-c", &script, "meterr", METERR]);
                shell
            }
        };
        command.args(["serve", "--http", "127.0.0.1:0", "--data-dir"]).arg(&self.dir);
        command.args(&self.arguments);
        command.envs(self.environment.iter().map(|(k, v)| (k.as_str(), v.as_str())));
        command
    }

    /// Starts it; returns once it listens, or with its exit and messages when it does not come to
    /// that.
    pub fn spawn(&self) -> Result<Server, (ExitStatus, String)> {
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut child = self
            .command()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log.reopen().unwrap())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        match lines.next() {
            Some(Ok(line)) => {
                let url = line.strip_prefix("listening on ").unwrap_or_else(|| panic!("{line:?}"));
                Ok(Server { url: url.to_owned(), child, log, agent: agent() })
            }
            _ => {
                let status = child.wait().unwrap();
                Err((status, std::fs::read_to_string(log.path()).unwrap()))
            }
        }
    }

    /// Runs another command on the same directory with the same settings.
    pub fn run(&self, args: &[&str]) -> Output {
        let mut command = meterr(args);
        command.arg("--data-dir").arg(&self.dir);
        command.envs(self.environment.iter().map(|(k, v)| (k.as_str(), v.as_str())));
        command.output().unwrap()
    }

    /// Verifies the directory of a stopped server, which must be right; returns the report.
    pub fn verified(&self) -> Value {
        let (code, out, err) = ran(&self.run(&["verify", "--json"]));
        assert_eq!(code, 0, "{out}{err}");
        let report: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(report["differences_total"], 0, "{report}");
        report
    }

    /// Starts it and waits until every shard is live.
    pub fn start(&self) -> Server {
        let server = self.spawn().unwrap_or_else(|(status, log)| panic!("{status}: {log}"));
        server.until_ready();
        server
    }
}

/// A client without the proxies of its surroundings.
pub fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .proxy(None)
        .timeout_global(Some(PATIENCE))
        .build()
        .new_agent()
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// Status.
    pub status: u16,
    /// Media type.
    pub media_type: String,
    /// Body.
    pub text: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|e| panic!("{e}: {}", self.text))
    }

    /// The body as JSON of an answer that must have this status.
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text);
        self.json()
    }
}

/// A running server.
pub struct Server {
    /// `http://127.0.0.1:port`.
    pub url: String,
    child: Child,
    log: tempfile::NamedTempFile,
    agent: ureq::Agent,
}

/// Asks any server.
pub fn ask(
    agent: &ureq::Agent,
    method: &str,
    url: &str,
    media_type: &str,
    body: &[u8],
) -> anyhow::Result<Answer> {
    let request = ureq::http::Request::builder().method(method).uri(url);
    let mut response = match method {
        "GET" | "DELETE" => agent.run(request.body(())?)?,
        _ => agent.run(request.header("content-type", media_type).body(body)?)?,
    };
    let text = response.body_mut().with_config().limit(1 << 30).read_to_string()?;
    let media_type = response.body().mime_type().unwrap_or_default().to_owned();
    Ok(Answer { status: response.status().as_u16(), media_type, text })
}

impl Server {
    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.log.path()).unwrap()
    }

    /// Waits until every shard is live.
    pub fn until_ready(&self) {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            match self.try_get("/readyz") {
                Ok(answer) if answer.status == 200 => return,
                _ => std::thread::sleep(Duration::from_millis(2)),
            }
        }
        panic!("not ready after {PATIENCE:?}: {}", self.log());
    }

    /// Sends JSON, whatever comes of it.
    pub fn try_post(&self, path: &str, body: &str) -> anyhow::Result<Answer> {
        let url = format!("{}{path}", self.url);
        ask(&self.agent, "POST", &url, "application/json", body.as_bytes())
    }

    /// Waits for a condition on the server.
    pub fn until<T>(&self, what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            if let Some(found) = condition() {
                return found;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("{what}: not after {PATIENCE:?}: {}", self.log());
    }

    /// GET, when the server may be gone.
    pub fn try_get(&self, path: &str) -> anyhow::Result<Answer> {
        ask(&self.agent, "GET", &format!("{}{path}", self.url), "", b"")
    }

    /// GET.
    pub fn get(&self, path: &str) -> Answer {
        self.try_get(path).unwrap_or_else(|e| panic!("GET {path}: {e:#}: {}", self.log()))
    }

    /// Sends a body.
    pub fn send(&self, method: &str, path: &str, media_type: &str, body: &[u8]) -> Answer {
        ask(&self.agent, method, &format!("{}{path}", self.url), media_type, body)
            .unwrap_or_else(|e| panic!("{method} {path}: {e:#}: {}", self.log()))
    }

    /// Sends JSON.
    pub fn json(&self, method: &str, path: &str, body: &Value) -> Answer {
        self.send(method, path, "application/json", body.to_string().as_bytes())
    }

    /// Publishes lines that must all be taken; returns the position.
    pub fn publish(&self, lines: &str) -> String {
        let answer = self.send("POST", "/v1/events", "application/x-ndjson", lines.as_bytes());
        let value = answer.expect(202);
        assert_eq!(value["rejected_total"], 0, "{value}");
        value["position"].as_str().unwrap().to_owned()
    }

    /// All rows of a question, page by page.
    pub fn rows(&self, path: &str) -> Vec<Value> {
        let mut rows = Vec::new();
        let mut next = String::new();
        loop {
            let answer = self.get(&format!("{path}{next}")).expect(200);
            rows.extend(answer["rows"].as_array().unwrap().iter().cloned());
            match answer["next_cursor"].as_str() {
                // The path has its window and so on in it, which pages take from the cursor alone.
                Some(cursor) => next = format!("&cursor={cursor}"),
                None => return rows,
            }
        }
    }

    /// Sends a signal such as `TERM`.
    pub fn signal(&self, name: &str) {
        signal(self.pid(), name).unwrap();
    }

    /// `kill -9`.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for its end.
    pub fn ended(&mut self) -> ExitStatus {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        panic!("still running after {PATIENCE:?}: {}", self.log());
    }

    /// SIGTERM; the exit must be clean.
    pub fn stop(mut self) -> String {
        self.signal("TERM");
        let status = self.ended();
        assert_eq!(status.code(), Some(0), "{}", self.log());
        self.log()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Gone already in most tests; this is for those that failed.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Sends a signal to one process.
pub fn signal(pid: u32, name: &str) -> anyhow::Result<()> {
    let status = Command::new("bash").args(["-c", &format!("kill -{name} {pid}")]).status()?;
    if !status.success() {
        bail!("cannot send {name} to {pid}");
    }
    Ok(())
}

/// Copies a directory.
pub fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), &target).unwrap();
        }
    }
}

/// Every file below a directory, in order.
pub fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut entries: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() {
            files.extend(files_below(&path));
        } else {
            files.push(path);
        }
    }
    files
}

/// A number of the environment, or a default.
pub fn number_from_env(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text.parse().with_context(|| format!("{name}={text:?}")).unwrap(),
        Err(_) => default,
    }
}

/// Reads a whole file as text.
pub fn read(path: &Path) -> String {
    let mut text = String::new();
    let file = std::fs::File::open(path);
    file.and_then(|mut file| file.read_to_string(&mut text))
        .unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    text
}
