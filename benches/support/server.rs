//! The real binary, started on a directory and a free port.

use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use meterr_operators::ids::Positions;
use meterr_operators::price_book::PriceList;

use super::http::Client;
use super::spend1::prices;

/// Longest wait for a server to be ready or gone.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running server; killed when dropped.
pub struct Server {
    child: Child,
    /// Where it listens.
    pub address: SocketAddr,
    /// From its start until it said to be ready.
    pub ready: Duration,
}

impl Server {
    /// Starts the binary on a data directory and waits until it is ready. A new one begins with the
    /// price book of SPEND-1.
    ///
    /// # Errors
    /// When it does not get ready; the message has what it printed.
    pub fn start(binary: &Path, directory: &Path) -> Result<Server> {
        Server::start_with(binary, directory, &[])
    }

    /// The same with more arguments of `serve`.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub fn start_with(binary: &Path, directory: &Path, arguments: &[&str]) -> Result<Server> {
        let prices = write_prices(directory)?;
        let printed = directory.join("server.log");
        let log = File::create(&printed)?;
        // Free now; nobody else here asks for ports of this range at random.
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let started = Instant::now();
        let child = Command::new(binary)
            .args(["serve", "--http", &address.to_string(), "--data-dir"])
            .arg(directory.join("data"))
            .args(arguments)
            .env("METERR__SEED__PRICES", prices)
            .env("METERR__HTTP__REQUEST_TIMEOUT", "120s")
            .env("METERR__HTTP__MIN_POSITION_TIMEOUT", "120s")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {}", binary.display()))?;
        let mut server = Server { child, address, ready: Duration::ZERO };
        loop {
            if let Ok(mut client) = Client::connect(address)
                && client.send("GET", "/readyz", b"").is_ok()
                && let Ok((200, _)) = client.receive()
            {
                server.ready = started.elapsed();
                return Ok(server);
            }
            let ended = server.child.try_wait()?;
            if ended.is_some() || started.elapsed() > PATIENCE {
                let printed = std::fs::read_to_string(&printed).unwrap_or_default();
                bail!("the server does not get ready ({ended:?}): {printed}");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until every shard has committed `positions`.
    ///
    /// # Errors
    /// When it takes too long.
    pub fn wait_for(&self, client: &mut Client, positions: &Positions) -> Result<()> {
        client.json("GET", &format!("/v1/top?n=1&min_position={positions}"), b"").map(drop)
    }

    /// Kills it, as a crash would.
    ///
    /// # Errors
    /// When it is gone already.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Asks it to stop; how long it took.
    ///
    /// # Errors
    /// When it does not end, or not well.
    pub fn stop(mut self) -> Result<Duration> {
        let asked = Instant::now();
        let told = Command::new("kill").args(["-TERM", &self.pid().to_string()]).status()?;
        if !told.success() {
            bail!("kill -TERM: {told}");
        }
        loop {
            if let Some(status) = self.child.try_wait()? {
                return ended_well(status).map(|()| asked.elapsed());
            }
            if asked.elapsed() > PATIENCE {
                bail!("the server does not stop");
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn ended_well(status: ExitStatus) -> Result<()> {
    if status.success() { Ok(()) } else { bail!("the server ended with {status}") }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Gone already when it was killed or stopped.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write_prices(directory: &Path) -> Result<PathBuf> {
    let path = directory.join("prices.json");
    std::fs::write(&path, serde_json::to_vec(&PriceList { prices: prices() })?)?;
    Ok(path)
}

/// The position of an answer to a change.
///
/// # Errors
/// When there is none.
pub fn position(answer: &serde_json::Value) -> Result<Positions> {
    let text = answer["position"].as_str().context("an answer to a change has a position")?;
    text.parse().map_err(|why| anyhow::anyhow!("position {text:?}: {why}"))
}
