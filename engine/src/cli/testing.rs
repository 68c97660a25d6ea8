//! A server of canned answers, and a console of memory, for the tests of the commands.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Cursor, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::args::{
    BackupCommand, CheckpointCommand, ClientArgs, DemoArgs, GenArgs, LogCopyArgs, MirrorArgs,
    PromoteArgs, ServeArgs, VerifyArgs,
};
use super::{Commands, Console, Exit};
use crate::settings::Settings;

/// A request as it came.
#[derive(Debug, Clone)]
pub struct Request {
    pub method: String,
    pub target: String,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

impl Request {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }
}

/// What is answered.
#[derive(Debug, Clone)]
pub struct Reply {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    hang_up: bool,
}

pub fn reply(status: u16, body: &str) -> Reply {
    let headers = vec![("content-type", "application/json".to_owned())];
    Reply { status, headers, body: body.as_bytes().to_vec(), hang_up: false }
}

/// Closes the connection instead of answering.
pub fn hang_up() -> Reply {
    Reply { hang_up: true, ..reply(0, "") }
}

/// An event stream that ends.
pub fn events(text: &str) -> Reply {
    let headers = vec![("content-type", "text/event-stream".to_owned())];
    Reply { headers, ..reply(200, text) }
}

impl Reply {
    pub fn header(mut self, name: &'static str, value: &str) -> Reply {
        self.headers.push((name, value.to_owned()));
        self
    }
}

type Answer = Box<dyn Fn(&Request) -> Reply + Send + Sync>;

/// Answers every request on a port of its own, until the process ends.
pub struct Server {
    url: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    /// Answers with these, one after the other, and with 500 when they are used up.
    pub fn new(replies: Vec<Reply>) -> Server {
        let replies = Mutex::new(VecDeque::from(replies));
        Server::answering(move |_| {
            replies.lock().pop_front().unwrap_or_else(|| reply(500, r#"{"detail":"used up"}"#))
        })
    }

    /// Answers by a function.
    pub fn answering(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (seen, answer) = (requests.clone(), Arc::new(Box::new(answer) as Answer));
        std::thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                let (seen, answer) = (seen.clone(), answer.clone());
                std::thread::spawn(move || {
                    let _ = serve(connection, &seen, &answer);
                });
            }
        });
        Server { url, requests }
    }

    pub fn url(&self) -> String {
        self.url.clone()
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().clone()
    }
}

fn serve(connection: TcpStream, seen: &Mutex<Vec<Request>>, answer: &Answer) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let mut reader = BufReader::new(connection.try_clone()?);
    let mut writer = connection;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let mut words = line.split_whitespace().map(str::to_owned);
        let (method, target) = (words.next().unwrap(), words.next().unwrap());
        let mut headers = Vec::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line)?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            headers.push((name.to_ascii_lowercase(), value.to_owned()));
        }
        let mut request = Request { method, target, headers, body: String::new() };
        let len = request.header("content-length").map_or(0, |len| len.parse().unwrap());
        let mut body = vec![0; len];
        reader.read_exact(&mut body)?;
        request.body = String::from_utf8(body).unwrap();
        let reply = answer(&request);
        seen.lock().push(request);
        if reply.hang_up {
            return Ok(());
        }
        write!(writer, "HTTP/1.1 {} X\r\ncontent-length: {}\r\n", reply.status, reply.body.len())?;
        for (name, value) in &reply.headers {
            write!(writer, "{name}: {value}\r\n")?;
        }
        writer.write_all(b"\r\n")?;
        writer.write_all(&reply.body)?;
    }
}

pub fn client_args(url: String) -> ClientArgs {
    ClientArgs { url, timeout: Duration::from_secs(10), json: false }
}

#[derive(Clone, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Write for Memory {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Memory {
    fn text(&self) -> String {
        String::from_utf8(self.0.lock().clone()).unwrap()
    }
}

/// What a command line did.
#[derive(Debug)]
pub struct Ran {
    pub exit: Exit,
    pub out: String,
    pub err: String,
}

pub fn run(args: &[&str]) -> Ran {
    run_with(args, None, &NoCommands)
}

/// With input on stdin, as if a person sat there.
pub fn run_with_input(args: &[&str], input: &str) -> Ran {
    run_with(args, Some(input), &NoCommands)
}

pub fn run_with(args: &[&str], input: Option<&str>, commands: &dyn Commands) -> Ran {
    let (out, err) = (Memory::default(), Memory::default());
    let mut console = Console {
        input: Some(Box::new(Cursor::new(input.unwrap_or("").to_owned()))),
        out: Box::new(out.clone()),
        err: Box::new(err.clone()),
        interactive: input.is_some(),
        progress: false,
    };
    let args = std::iter::once("meterr").chain(args.iter().copied()).map(Into::into);
    let exit = super::run(args, &[], &mut console, commands);
    Ran { exit, out: out.text(), err: err.text() }
}

/// An engine that must not be asked.
pub struct NoCommands;

impl Commands for NoCommands {
    fn serve(&self, _: Settings, _: &ServeArgs) -> anyhow::Result<Exit> {
        anyhow::bail!("no engine")
    }
    fn demo(&self, _: Settings, _: &DemoArgs, _: &mut Console) -> anyhow::Result<Exit> {
        anyhow::bail!("no engine")
    }
    fn verify(&self, _: Settings, _: &VerifyArgs, _: &mut Console) -> anyhow::Result<Exit> {
        anyhow::bail!("no engine")
    }
    fn checkpoint(
        &self,
        _: Settings,
        _: &CheckpointCommand,
        _: &mut Console,
    ) -> anyhow::Result<Exit> {
        anyhow::bail!("no engine")
    }
    fn backup(&self, _: Settings, _: &BackupCommand, _: &mut Console) -> anyhow::Result<Exit> {
        anyhow::bail!("no engine")
    }
    fn mirror(&self, _: Settings, _: &MirrorArgs, _: &mut Console) -> anyhow::Result<Exit> {
        anyhow::bail!("no engine")
    }
    fn promote(&self, _: Settings, _: &PromoteArgs, _: &mut Console) -> anyhow::Result<Exit> {
        anyhow::bail!("no engine")
    }
    fn log_copy(&self, _: Settings, _: &LogCopyArgs, _: &mut Console) -> anyhow::Result<Exit> {
        anyhow::bail!("no engine")
    }
    fn generate(&self, _: &GenArgs, _: &mut Console) -> anyhow::Result<Exit> {
        anyhow::bail!("no engine")
    }
}
