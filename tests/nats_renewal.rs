//! Credentials and certificates that are replaced under an engine at work: it goes on, with the old
//! ones expired and the server's certificates by another authority.

#![allow(clippy::unwrap_used)]

#[path = "support/nats.rs"]
mod nats;
#[path = "support/secure.rs"]
mod secure;
mod support;

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use nkeys::KeyPair;
use secure::{Authority, Identity};
use serde_json::{Value, json};
use support::busy::{event, lines, settled};
use support::{Launch, Server};

#[path = "support/protocol.rs"]
mod protocol;

/// Seconds that the first credentials are good for.
const EXPIRES: u64 = 30;

fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

/// A signed token, as NATS wants it.
fn token(signer: &KeyPair, subject: &KeyPair, expires: Option<u64>, nats: Value) -> String {
    let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let header = json!({"typ": "JWT", "alg": "ed25519-nkey"});
    let mut claims = json!({
        "jti": subject.public_key(), "iat": seconds(), "iss": signer.public_key(),
        "sub": subject.public_key(), "name": "test", "nats": nats,
    });
    if let Some(expires) = expires {
        claims["exp"] = expires.into();
    }
    let text = format!("{}.{}", part(&header), part(&claims));
    let signature = signer.sign(text.as_bytes()).unwrap();
    format!("{text}.{}", URL_SAFE_NO_PAD.encode(signature))
}

fn account(operator: &KeyPair, account: &KeyPair, storage: i64) -> String {
    let limits = json!({
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": true,
        "conn": -1, "leaf": -1, "mem_storage": storage, "disk_storage": storage,
        "streams": -1, "consumer": -1,
    });
    let nats = json!({"type": "account", "version": 2, "limits": limits});
    token(operator, account, None, nats)
}

/// Writes a credentials file in one step.
fn credentials(path: &Path, account: &KeyPair, expires: Option<u64>) {
    let user = KeyPair::new_user();
    let nats = json!({
        "type": "user", "version": 2, "pub": {}, "sub": {}, "subs": -1, "data": -1, "payload": -1,
    });
    let token = token(account, &user, expires, nats);
    let seed = user.seed().unwrap();
    replace(
        path,
        &format!(
            "-----BEGIN NATS USER JWT-----\n{token}\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
        ),
    );
}

fn replace(path: &Path, text: &str) {
    let part = path.with_extension("part");
    std::fs::write(&part, text).unwrap();
    std::fs::rename(&part, path).unwrap();
}

/// A server with accounts by an operator, and TLS both ways.
struct Guarded {
    dir: PathBuf,
    port: nats::Port,
    accounts: String,
    child: Option<Child>,
}

impl Guarded {
    fn start(&mut self, authority: &Authority, own: &Identity) {
        self.stop();
        let text = format!(
            "listen: 127.0.0.1:{}\nlog_file: {:?}\njetstream {{ store_dir: {:?} }}\n{}\n\
             tls {{ cert_file: {:?}, key_file: {:?}, ca_file: {:?}, verify: true }}\n",
            self.port.number,
            self.dir.join("log"),
            self.dir.join("store"),
            self.accounts,
            own.certificate,
            own.key,
            authority.file,
        );
        let file = self.dir.join("server.conf");
        std::fs::write(&file, text).unwrap();
        let mut command = Command::new(nats::binary());
        command.arg("-c").arg(file).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(command.spawn().unwrap());
        let until = std::time::Instant::now() + support::PATIENCE;
        while TcpStream::connect(("127.0.0.1", self.port.number)).is_err() {
            assert!(std::time::Instant::now() < until, "{}", self.log());
            std::thread::yield_now();
        }
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.stop();
    }
}

fn reconnects(server: &Server) -> u64 {
    let text = server.get("/metrics").text;
    let line = text.lines().find_map(|line| line.strip_prefix("meterr_nats_reconnects_total "));
    line.map_or(0, |value| value.parse().unwrap())
}

#[test]
fn an_engine_goes_on_while_credentials_and_certificates_are_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let [first, second] = ["first", "second"].map(|name| Authority::new(dir.path(), name));
    let (operator, system, deployment) =
        (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account());
    let of_operator = token(&operator, &operator, None, json!({"type": "operator", "version": 2}));
    let preload = [(&system, 0), (&deployment, -1)]
        .map(|(of, storage)| format!("{}: {}\n", of.public_key(), account(&operator, of, storage)));
    let accounts = format!(
        "operator: {of_operator}\nsystem_account: {}\nresolver: MEMORY\nresolver_preload: {{\n{}}}\n",
        system.public_key(),
        preload.concat(),
    );
    let (dir_of_server, port) = (at("server"), nats::Port::reserve());
    std::fs::create_dir(&dir_of_server).unwrap();
    let mut nats = Guarded { dir: dir_of_server, port, accounts, child: None };
    nats.start(&first, &first.sign("server-1"));

    let (creds, ca, certificate, key) = (at("creds"), at("ca"), at("certificate"), at("key"));
    let expires = seconds() + EXPIRES;
    credentials(&creds, &deployment, Some(expires));
    let own = first.sign("engine-1");
    for (from, to) in [(&first.file, &ca), (&own.certificate, &certificate), (&own.key, &key)] {
        std::fs::copy(from, to).unwrap();
    }
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let server = Launch::on(&at("data"))
        .set("NODE__SHARDS", "2")
        .set("NATS__URL", &format!("tls://127.0.0.1:{}", nats.port.number))
        .set("NATS__CREDENTIALS", &text(&creds))
        .set("NATS__CA", &text(&ca))
        .set("NATS__CERTIFICATE", &text(&certificate))
        .set("NATS__KEY", &text(&key))
        .start();
    let mut events = 0;
    let mut publish = || {
        server.publish(&lines(&(events..events + 20).map(event).collect::<Vec<_>>()));
        events += 20;
    };
    publish();
    assert_eq!(reconnects(&server), 0);

    // Credentials that do not work change nothing, and are named.
    replace(&creds, "none");
    server
        .until("the wrong file is noticed", || server.log().contains("do not work").then_some(()));
    assert_eq!(reconnects(&server), 0);
    publish();
    // New ones are taken up before the old ones expire.
    credentials(&creds, &deployment, None);
    server.until("the connections are made anew", || (reconnects(&server) >= 2).then_some(()));
    publish();
    server.until("the old credentials have expired", || (seconds() > expires + 1).then_some(()));
    publish();
    settled(&server);

    // Certificates of another authority: put in place first, then the server changes over.
    let own = second.sign("engine-2");
    let both = [&first.file, &second.file].map(|file| std::fs::read_to_string(file).unwrap());
    replace(&ca, &both.concat());
    replace(&key, &std::fs::read_to_string(&own.key).unwrap());
    replace(&certificate, &std::fs::read_to_string(&own.certificate).unwrap());
    server.until("the server's refusal is noticed", || {
        (server.log().matches("do not work").count() >= 2).then_some(())
    });
    publish();
    nats.start(&second, &second.sign("server-2"));
    publish();
    settled(&server);
    let counted: u64 = support::busy::ORGS
        .iter()
        .flat_map(|org| server.rows(&format!("/v1/orgs/{org}/spend?window=all")))
        .map(|row| row["events"].as_u64().unwrap())
        .sum();
    assert_eq!(counted, events as u64);
    server.stop();
}
