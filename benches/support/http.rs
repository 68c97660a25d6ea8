//! The least HTTP/1.1 client that does the job: one kept connection, plain sockets, no dependency
//! whose cost would count as ours.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// A kept connection.
pub struct Client {
    address: SocketAddr,
    reader: BufReader<TcpStream>,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn connect(address: SocketAddr) -> Result<Client> {
        let stream = TcpStream::connect(address)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(120)))?;
        Ok(Client { address, reader: BufReader::with_capacity(64 * 1024, stream) })
    }

    /// Sends a request without waiting for its answer.
    ///
    /// # Errors
    /// When the connection is gone.
    pub fn send(&mut self, method: &str, path: &str, body: &[u8]) -> Result<()> {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\ncontent-type: {}\r\ncontent-length: {}\r\n\r\n",
            self.address,
            if body.first() == Some(&b'{') && body.ends_with(b"]}") {
                "application/json"
            } else {
                "application/x-ndjson"
            },
            body.len()
        );
        let stream = self.reader.get_mut();
        if body.len() < 16 * 1024 {
            // One packet rather than two.
            let mut whole = head.into_bytes();
            whole.extend_from_slice(body);
            stream.write_all(&whole)?;
        } else {
            stream.write_all(head.as_bytes())?;
            stream.write_all(body)?;
        }
        Ok(())
    }

    /// Reads an answer: status and body.
    ///
    /// # Errors
    /// When the connection is gone or the answer is not in a form this client knows.
    pub fn receive(&mut self) -> Result<(u16, Vec<u8>)> {
        let (status, length) = self.head()?;
        let mut body = Vec::new();
        match length {
            Some(length) => {
                body.resize(length, 0);
                self.reader.read_exact(&mut body)?;
            }
            None => while self.chunk(&mut body)? {},
        }
        Ok((status, body))
    }

    /// Asks and expects success; the answer as JSON.
    ///
    /// # Errors
    /// When it fails, with what the server says.
    pub fn json(&mut self, method: &str, path: &str, body: &[u8]) -> Result<Value> {
        self.send(method, path, body)?;
        let (status, answer) = self.receive()?;
        let text = String::from_utf8_lossy(&answer);
        if !(200..300).contains(&status) {
            bail!("{method} {path}: {status} {text}");
        }
        serde_json::from_str(&text).with_context(|| format!("{method} {path}: {text}"))
    }

    /// Reads status line and headers; the length of the body, or none when it comes in chunks.
    fn head(&mut self) -> Result<(u16, Option<usize>)> {
        let mut line = String::new();
        self.line(&mut line)?;
        let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status = status.with_context(|| format!("{line:?} is no status line"))?;
        let mut length = None;
        loop {
            self.line(&mut line)?;
            let Some((name, value)) = line.split_once(':') else { break };
            if name.eq_ignore_ascii_case("content-length") {
                length = Some(value.trim().parse()?);
            }
        }
        Ok((status, length))
    }

    fn line(&mut self, line: &mut String) -> Result<()> {
        line.clear();
        if self.reader.read_line(line)? == 0 {
            bail!("the server closed the connection");
        }
        line.truncate(line.trim_end().len());
        Ok(())
    }

    /// Appends the next chunk; whether there may be more.
    fn chunk(&mut self, to: &mut Vec<u8>) -> Result<bool> {
        let mut line = String::new();
        self.line(&mut line)?;
        let len = usize::from_str_radix(&line, 16).with_context(|| format!("{line:?}: length"))?;
        let start = to.len();
        to.resize(start + len, 0);
        self.reader.read_exact(&mut to[start..])?;
        self.line(&mut line)?;
        Ok(len > 0)
    }
}

/// A subscription to server-sent events.
pub struct Subscription {
    client: Client,
    bytes: Vec<u8>,
}

impl Subscription {
    /// Subscribes.
    ///
    /// # Errors
    /// When the server refuses.
    pub fn open(address: SocketAddr, path: &str) -> Result<Subscription> {
        let mut client = Client::connect(address)?;
        client.send("GET", path, b"")?;
        let (status, _) = client.head()?;
        if status != 200 {
            bail!("GET {path}: {status}");
        }
        Ok(Subscription { client, bytes: Vec::new() })
    }

    /// The next event of that name, as text; others are passed over.
    ///
    /// # Errors
    /// When the stream ends.
    pub fn next(&mut self, name: &str) -> Result<String> {
        let wanted = format!("event: {name}\n");
        loop {
            if let Some(end) = self.bytes.windows(2).position(|two| two == b"\n\n") {
                let event: Vec<u8> = self.bytes.drain(..end + 2).collect();
                let event = String::from_utf8(event)?;
                if event.contains(&wanted) {
                    return Ok(event);
                }
            } else if !self.client.chunk(&mut self.bytes)? {
                bail!("the stream ended");
            }
        }
    }
}
