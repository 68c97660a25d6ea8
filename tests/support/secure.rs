//! Three NATS servers from `config/nats-cluster.conf` as it stands, with certificates of the test's own:
//! only addresses, ports, paths and the number of shards are replaced; passwords come from the
//! environment, as they are meant to.

#![allow(dead_code, clippy::unwrap_used)] // each test program uses a part of it

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::nats::{Port, binary};
use super::protocol::{Wire, dial};

const FILE: &str = "config/nats-cluster.conf";
/// Longest time anything may take before the test fails instead of hanging.
const PATIENCE: Duration = Duration::from_secs(60);
/// Everybody the file knows.
pub const USERS: [&str; 6] =
    ["node", "acme-producer", "acme-subscriber", "gateway", "administrator", "monitor"];

/// The file.
pub fn file() -> String {
    std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(FILE)).unwrap()
}

/// Password of a user.
pub fn password(user: &str) -> String {
    format!("the-password-of-{user}")
}

/// Replies to a user begin with this.
pub fn inbox(user: &str) -> String {
    match user {
        "node" => "_INBOX".to_owned(),
        "gateway" | "administrator" | "monitor" => format!("_INBOX.@{user}"),
        _ => format!("_INBOX.{user}"),
    }
}

/// An authority that signs certificates into a directory.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    dir: PathBuf,
    /// Its own certificate, PEM.
    pub file: PathBuf,
}

impl Authority {
    /// Makes one; its certificate is `<name>-ca.pem`.
    pub fn new(dir: &Path, name: &str) -> Authority {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, format!("authority of {name}"));
        let key = KeyPair::generate().unwrap();
        let file = dir.join(format!("{name}-ca.pem"));
        std::fs::write(&file, params.self_signed(&key).unwrap().pem()).unwrap();
        Authority { issuer: Issuer::new(params, key), dir: dir.to_owned(), file }
    }

    /// Signs a certificate for this machine: `<name>.pem` and `<name>-key.pem`.
    pub fn sign(&self, name: &str) -> Identity {
        let names = ["localhost".to_owned(), "127.0.0.1".to_owned()];
        let mut params = CertificateParams::new(names).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let signed = params.signed_by(&key, &self.issuer).unwrap();
        let identity = Identity {
            certificate: self.dir.join(format!("{name}.pem")),
            key: self.dir.join(format!("{name}-key.pem")),
        };
        std::fs::write(&identity.certificate, signed.pem()).unwrap();
        std::fs::write(&identity.key, key.serialize_pem()).unwrap();
        identity
    }
}

/// A certificate and its key, PEM.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The certificate.
    pub certificate: PathBuf,
    /// The key.
    pub key: PathBuf,
}

/// The three servers.
pub struct Secure {
    dir: TempDir,
    children: Vec<Child>,
    /// Ports for clients.
    pub clients: Vec<Port>,
    /// Ports for routes.
    pub routes: Vec<Port>,
    /// Who signed the servers' certificates for clients.
    pub servers: Authority,
    /// A client's certificate that they take.
    pub client: Identity,
    /// The certificate they show each other.
    pub route: Identity,
    /// The authority of the routes.
    pub routes_ca: PathBuf,
}

impl Secure {
    /// Starts them with so many shards; returns once a stream can have a copy on each.
    pub fn start(shards: u16) -> Secure {
        let dir = tempfile::Builder::new().prefix("meterr-secure-").tempdir().unwrap();
        let pem = dir.path().join("pem");
        std::fs::create_dir(&pem).unwrap();
        let [servers, clients, routes] =
            ["servers", "clients", "routes"].map(|name| Authority::new(&pem, name));
        servers.sign("server");
        let mut secure = Secure {
            children: Vec::new(),
            clients: (0..3).map(|_| Port::reserve()).collect(),
            routes: (0..3).map(|_| Port::reserve()).collect(),
            client: clients.sign("client"),
            route: routes.sign("route"),
            routes_ca: routes.file.clone(),
            servers,
            dir,
        };
        for n in 0..3 {
            let child = secure.spawn(n, shards);
            secure.children.push(child);
        }
        secure.until_complete();
        secure
    }

    /// The file for one of them.
    fn config(&self, n: usize, shards: u16) -> String {
        let mut text = file();
        let mut replace = |from: &str, to: &str| {
            assert!(text.contains(from), "{from:?} is not in {FILE}");
            text = text.replace(from, to);
        };
        replace("\"0.0.0.0:4222\"", &format!("\"127.0.0.1:{}\"", self.clients[n].number));
        replace("\"0.0.0.0:6222\"", &format!("\"127.0.0.1:{}\"", self.routes[n].number));
        replace("\"127.0.0.1:8222\"", "\"127.0.0.1:-1\"");
        replace("/etc/nats/", &format!("{}/pem/", self.dir.path().display()));
        replace("/var/lib/nats", &self.dir.path().join(format!("store-{n}")).to_string_lossy());
        replace("partition(16,1)", &format!("partition({shards},1)"));
        // As many tests at once may hold up a handshake.
        replace("timeout: 5", "timeout: 60");
        for (n, port) in self.routes.iter().enumerate() {
            let name = format!("nats-{}.example.internal:6222", n + 1);
            replace(&name, &format!("127.0.0.1:{}", port.number));
        }
        text
    }

    fn spawn(&self, n: usize, shards: u16) -> Child {
        let config = self.dir.path().join(format!("nats-{n}.conf"));
        std::fs::write(&config, self.config(n, shards)).unwrap();
        let mut command = Command::new(binary());
        command.arg("--config").arg(config).env("METERR_NATS_NAME", format!("nats-{n}"));
        for user in USERS {
            let variable = format!("METERR_{}_PASSWORD", user.to_uppercase().replace('-', "_"));
            command.env(variable, password(user));
        }
        let log = File::options().create(true).append(true).open(self.log_file(n)).unwrap();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap()
    }

    fn log_file(&self, n: usize) -> PathBuf {
        self.dir.path().join(format!("log-{n}"))
    }

    /// What they logged.
    pub fn logs(&self) -> String {
        (0..3).map(|n| std::fs::read_to_string(self.log_file(n)).unwrap_or_default()).collect()
    }

    /// Addresses of all for a user.
    pub fn url(&self, user: &str) -> String {
        let one =
            |port: &Port| format!("tls://{user}:{}@localhost:{}", password(user), port.number);
        self.clients.iter().map(one).collect::<Vec<_>>().join(",")
    }

    /// A connection as a user whom the server takes.
    pub fn open(&self, user: &str) -> Wire {
        self.open_at(0, user)
    }

    /// The same to one of the three.
    pub fn open_at(&self, n: usize, user: &str) -> Wire {
        self.try_open(n, user).unwrap()
    }

    fn try_open(&self, n: usize, user: &str) -> std::io::Result<Wire> {
        let (stream, info) = dial(self.clients[n].number)?;
        let stream = tls(stream, &self.servers.file, Some(&self.client));
        Ok(Wire::greet(Box::new(stream), info, Some((user, &password(user)))).taken())
    }

    /// Waits until a stream with a copy on each can be made.
    fn until_complete(&mut self) {
        let stream = json!({
            "name": "TESTS_PROBE", "subjects": ["control"], "storage": "memory",
            "retention": "limits", "discard": "old", "num_replicas": 3, "max_consumers": -1,
            "max_msgs": -1, "max_bytes": -1, "max_age": 0,
        });
        let stream = stream.to_string();
        self.until("a stream on all three", "$JS.API.STREAM.CREATE.TESTS_PROBE", &stream);
        self.until("it is gone", "$JS.API.STREAM.DELETE.TESTS_PROBE", "");
    }

    fn until(&mut self, what: &str, subject: &str, body: &str) {
        let began = Instant::now();
        let mut last = String::new();
        while began.elapsed() < PATIENCE {
            for child in &mut self.children {
                if let Some(status) = child.try_wait().unwrap() {
                    panic!("a server ended, {status}: {}", self.logs());
                }
            }
            match self.try_open(0, "node") {
                Ok(mut wire) => {
                    wire.send("SUB _INBOX.tests 1\r\n");
                    wire.send(&format!("PUB {subject} _INBOX.tests {}\r\n{body}\r\n", body.len()));
                    let asked = Instant::now();
                    while asked.elapsed() < Duration::from_secs(1) {
                        let (messages, errors) = wire.heard();
                        assert!(errors.is_empty(), "{errors:?}");
                        if let Some((_, answer)) = messages.into_iter().next() {
                            let answer: Value = serde_json::from_str(&answer).unwrap_or_default();
                            // Or it is gone already.
                            if answer["error"].is_null() || answer["error"]["err_code"] == 10059 {
                                return;
                            }
                            last = answer.to_string();
                            break;
                        }
                        std::thread::sleep(Duration::from_millis(10));
                    }
                }
                Err(error) => last = error.to_string(),
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        panic!("{what}: not after {PATIENCE:?}: {last}: {}", self.logs());
    }
}

impl Drop for Secure {
    fn drop(&mut self) {
        for child in &mut self.children {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// TLS on a connection; who is at its other end must be signed by `ca`. Refusals show when it is used.
pub fn tls(
    stream: std::net::TcpStream,
    ca: &Path,
    identity: Option<&Identity>,
) -> StreamOwned<ClientConnection, std::net::TcpStream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(ca).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match identity {
        Some(Identity { certificate, key }) => config
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_file(certificate).unwrap()],
                PrivateKeyDer::from_pem_file(key).unwrap(),
            )
            .unwrap(),
        None => config.with_no_client_auth(),
    };
    let name = ServerName::try_from("localhost").unwrap();
    StreamOwned::new(ClientConnection::new(Arc::new(config), name).unwrap(), stream)
}
