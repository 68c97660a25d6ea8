//! The protocol of NATS by hand, in the clear or inside TLS: the server answers a PING after everything
//! before it, so what was refused is known by then.

#![allow(dead_code, clippy::unwrap_used)] // each test program uses a part of it

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longest time anything may take before the test fails instead of hanging.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a connection goes through.
pub trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

/// A connection.
pub struct Wire {
    reader: BufReader<Box<dyn Stream>>,
    /// What the server said of itself.
    pub info: Value,
}

/// Connects to a port and hears the server's greeting, which is in the clear always.
pub fn dial(port: u16) -> std::io::Result<(TcpStream, Value)> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    // Not a byte more: what follows may be TLS.
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    let line = String::from_utf8(line).unwrap();
    Ok((stream, serde_json::from_str(line.strip_prefix("INFO ").unwrap()).unwrap()))
}

impl Wire {
    /// Says who connects. Nothing is sent after it: bytes that reach a closed connection have it reset,
    /// and what the server said last is lost with it.
    pub fn greet(stream: Box<dyn Stream>, info: Value, login: Option<(&str, &str)>) -> Wire {
        let mut wire = Wire { reader: BufReader::new(stream), info };
        let mut connect = json!({ "verbose": false, "lang": "tests", "version": "0" });
        if let Some((user, password)) = login {
            connect["user"] = user.into();
            connect["pass"] = password.into();
        }
        wire.send(&format!("CONNECT {connect}\r\n"));
        wire
    }

    /// The connection, which the server must have taken.
    pub fn taken(mut self) -> Wire {
        // As every client does. What stood in the same packet as this would not be mapped yet.
        let (messages, errors) = self.heard();
        assert!(messages.is_empty() && errors.is_empty(), "{errors:?}");
        self
    }

    /// What the server says next.
    pub fn line(&mut self) -> String {
        self.try_line().unwrap()
    }

    /// What the server says next, empty when it hung up.
    pub fn try_line(&mut self) -> std::io::Result<String> {
        let mut line = String::new();
        self.reader.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    /// Sends commands.
    pub fn send(&mut self, text: &str) {
        let stream = self.reader.get_mut();
        stream.write_all(text.as_bytes()).unwrap();
        stream.flush().unwrap();
    }

    /// What came up to the answer to a PING: messages with their subjects and payloads, and errors.
    pub fn heard(&mut self) -> (Vec<(String, String)>, Vec<String>) {
        self.send("PING\r\n");
        let (mut messages, mut errors) = (Vec::new(), Vec::new());
        loop {
            let line = self.line();
            match line.split(' ').next().unwrap() {
                "PONG" => return (messages, errors),
                "PING" => self.send("PONG\r\n"),
                "MSG" => {
                    let mut words = line.split(' ');
                    let subject = words.nth(1).unwrap().to_owned();
                    let length: usize = words.next_back().unwrap().parse().unwrap();
                    let mut payload = vec![0; length + 2];
                    self.reader.read_exact(&mut payload).unwrap();
                    payload.truncate(length);
                    messages.push((subject, String::from_utf8(payload).unwrap()));
                }
                "-ERR" => errors.push(line),
                "INFO" => {}
                "" => panic!("the server went away: {errors:?}"),
                _ => panic!("the server said {line:?}"),
            }
        }
    }

    /// The next message's payload; nothing may be refused before it.
    pub fn message(&mut self) -> String {
        self.message_within(PATIENCE).expect("a message")
    }

    /// The next message's payload, if one comes in time.
    fn message_within(&mut self, patience: Duration) -> Option<String> {
        let began = Instant::now();
        while began.elapsed() < patience {
            let (messages, errors) = self.heard();
            assert!(errors.is_empty(), "{errors:?}");
            if let Some((_, payload)) = messages.into_iter().next() {
                return Some(payload);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    }

    /// Asks until there is an answer: a server learns of what others listen to, and of leaders, a moment
    /// after they have told theirs, and what is asked before that is answered by nobody. More than one
    /// answer may come then, the later ones after this returned.
    pub fn ask(&mut self, subject: &str, inbox: &str, body: &str) -> String {
        let length = body.len();
        self.send(&format!("SUB {inbox} 1\r\n"));
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            self.send(&format!("PUB {subject} {inbox} {length}\r\n{body}\r\n"));
            if let Some(answer) = self.message_within(Duration::from_secs(1)) {
                self.send("UNSUB 1\r\n");
                return answer;
            }
        }
        panic!("{subject}: no answer within {PATIENCE:?}");
    }

    /// Whether a command is not refused.
    fn may(&mut self, command: &str) -> bool {
        self.send(command);
        let (_, errors) = self.heard();
        assert!(errors.iter().all(|e| e.contains("Permissions Violation")), "{errors:?}");
        errors.is_empty()
    }

    /// Whether publishing there is not refused.
    pub fn may_publish(&mut self, subject: &str) -> bool {
        self.may(&format!("PUB {subject} 0\r\n\r\n"))
    }

    /// Whether subscribing to it is not refused.
    pub fn may_subscribe(&mut self, subject: &str) -> bool {
        self.may(&format!("SUB {subject} 7\r\nUNSUB 7\r\n"))
    }
}
