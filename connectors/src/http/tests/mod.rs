//! Tests against a bound server, over raw sockets: what a client sees, to the byte.

mod events;
mod limits;
mod openapi;
mod reading;
mod stop;
mod streams;

use std::borrow::Cow;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use meterr_operators::event::{Event, EventFields, Reason, Rejection};
use meterr_operators::time::Time;
use serde_json::Value;
use serde_json::value::RawValue;

use super::{Decoders, HttpSettings, ServerHandle, SplitResult, serve};
pub(super) use crate::fake::{self, Fake};

/// A small decoder: objects with `id`, `org` and optionally `user`; everything else is malformed.
pub(super) fn decoders() -> Decoders {
    fn decode(line: &[u8]) -> Result<Event<'_>, Rejection> {
        #[derive(serde::Deserialize)]
        struct Line<'a> {
            id: Cow<'a, str>,
            org: Cow<'a, str>,
        }
        let line: Line<'_> = serde_json::from_slice(line)
            .map_err(|error| Rejection::new(Reason::Malformed, error.to_string()))?;
        Event::new(EventFields {
            id: line.id,
            org: line.org,
            user: "u".into(),
            provider: "p".into(),
            model: "m".into(),
            time: Time(1),
            ..EventFields::default()
        })
    }
    fn split<'a>(media_type: Option<&str>, body: &'a [u8]) -> SplitResult<'a> {
        let malformed =
            |error: serde_json::Error| Rejection::new(Reason::Malformed, error.to_string());
        if media_type == Some("application/json") && body.starts_with(b"[") {
            let values: Vec<&RawValue> = serde_json::from_slice(body).map_err(malformed)?;
            let bytes = values.into_iter().map(|value| Cow::Borrowed(value.get().as_bytes()));
            return Ok((1..).zip(bytes).collect());
        }
        Ok(vec![(1, Cow::Borrowed(body))])
    }
    Decoders { split, decode }
}

/// A server that stops when dropped.
pub(super) struct Running {
    pub address: SocketAddr,
    pub handle: ServerHandle,
    pub fake: Arc<Fake>,
    thread: Option<std::thread::JoinHandle<std::io::Result<()>>>,
}

pub(super) fn small() -> HttpSettings {
    HttpSettings {
        address: SocketAddr::from(([127, 0, 0, 1], 0)),
        workers: 1,
        shutdown_timeout: Duration::from_secs(5),
        ..HttpSettings::default()
    }
}

pub(super) fn run(settings: HttpSettings) -> Running {
    run_with(settings, Fake::default())
}

pub(super) fn run_with(settings: HttpSettings, fake: Fake) -> Running {
    let fake = Arc::new(fake);
    let api = fake.clone();
    let (tell, told) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        actix_web::rt::System::new().block_on(async move {
            let (handle, address, server) = serve(settings, api, decoders())?;
            tell.send((handle, address)).expect("the test waits for it");
            server.await
        })
    });
    let (handle, address) = told.recv().expect("the server must start");
    Running { address, handle, fake, thread: Some(thread) }
}

impl Running {
    /// Stops the server and waits until it is gone.
    pub fn stop(&mut self) {
        if let Some(thread) = self.thread.take() {
            futures::executor::block_on(self.handle.stop());
            thread.join().unwrap().unwrap();
        }
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        // A test that waits in vain fails instead of hanging.
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Sends bytes as they are and reads one answer.
    pub fn raw(&self, bytes: &[u8]) -> Reply {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        Reply::read(&mut stream)
    }

    pub fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        self.raw(&request(method, path, headers, body))
    }

    pub fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], b"")
    }

    pub fn post(&self, path: &str, media_type: &str, body: &[u8]) -> Reply {
        self.send("POST", path, &[("content-type", media_type)], body)
    }

    pub fn ndjson(&self, body: &[u8]) -> Reply {
        self.post("/v1/events", "application/x-ndjson", body)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.stop();
        }
    }
}

pub(super) fn request(method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
    let mut bytes = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\n").into_bytes();
    for (name, value) in headers {
        bytes.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
    }
    if !body.is_empty() || method != "GET" {
        bytes.extend_from_slice(format!("content-length: {}\r\n", body.len()).as_bytes());
    }
    bytes.extend_from_slice(b"\r\n");
    bytes.extend_from_slice(body);
    bytes
}

/// An answer.
#[derive(Debug)]
pub(super) struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    /// Reads the head of an answer, byte by byte so that nothing of the body is taken.
    pub fn head(stream: &mut impl Read) -> Reply {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).unwrap_or_else(|error| {
                panic!("{error} after {:?}", String::from_utf8_lossy(&head))
            });
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        let mut lines = head.lines();
        let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let headers = lines
            .filter_map(|line| line.split_once(": "))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.to_owned()))
            .collect();
        Reply { status, headers, body: Vec::new() }
    }

    pub fn read(stream: &mut impl Read) -> Reply {
        let mut reply = Reply::head(stream);
        if let Some(length) = reply.header("content-length") {
            reply.body = vec![0; length.parse().unwrap()];
            stream.read_exact(&mut reply.body).unwrap();
        } else if reply.header("transfer-encoding").is_some() {
            while let Some(chunk) = chunk(stream) {
                reply.body.extend_from_slice(&chunk);
            }
        }
        reply
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {:?}", String::from_utf8_lossy(&self.body)))
    }

    /// The answer as JSON, which must have this status.
    #[track_caller]
    pub fn ok(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", String::from_utf8_lossy(&self.body));
        self.json()
    }

    /// The answer as a problem of this status and kind.
    #[track_caller]
    pub fn problem(&self, status: u16, kind: &str) -> Value {
        let problem = self.ok(status);
        assert_eq!(self.header("content-type"), Some("application/problem+json"));
        assert_eq!(problem["type"], format!("/problems/{kind}"), "{problem}");
        assert_eq!(problem["status"], status);
        assert!(problem["detail"].as_str().is_some_and(|detail| !detail.is_empty()));
        problem
    }
}

/// One chunk of a chunked body; none at its end.
pub(super) fn chunk(stream: &mut impl Read) -> Option<Vec<u8>> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        line.push(byte[0]);
    }
    let length = usize::from_str_radix(std::str::from_utf8(&line).unwrap().trim(), 16).unwrap();
    let mut data = vec![0; length + 2];
    stream.read_exact(&mut data).unwrap();
    data.truncate(length);
    (length > 0).then_some(data)
}
