//! A connection to NATS that comes back by itself, with TLS and credentials.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_nats::{Client, ConnectOptions, Event, ServerAddr};
use parking_lot::RwLock;

use super::renewal;

/// Oldest server that does what is needed here.
const SERVER_MIN: (i64, i64, i64) = (2, 11, 0);

/// Time a server may take to send back a message of no content before it is taken to be frozen.
const ECHO: Duration = Duration::from_secs(1);

/// Where and how to connect.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct NatsSettings {
    /// Servers, separated by commas: `nats://host:4222`, `tls://host:4222`. User and password, or a
    /// token, may stand in a URL.
    pub url: String,
    /// Credentials file (JWT and key), as `nsc` writes them.
    pub credentials: Option<PathBuf>,
    /// Certificate authority of the servers, PEM.
    pub ca: Option<PathBuf>,
    /// Client certificate and key, PEM.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// First part of reply subjects; `_INBOX` when absent. Permissions may ask for one.
    pub inbox_prefix: Option<String>,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// An address that is none.
    #[error("{url:?} is no address of a NATS server such as nats://127.0.0.1:4222: {why}")]
    Address {
        /// The address, without what may be a password.
        url: String,
        /// What is wrong.
        why: String,
    },
    /// The credentials cannot be read.
    #[error("credentials {path:?} cannot be read: {source}")]
    Credentials {
        /// The file.
        path: PathBuf,
        /// The failure.
        #[source]
        source: std::io::Error,
    },
    /// No server answers, or none lets us in.
    #[error("cannot connect to NATS at {url}: {why}")]
    Refused {
        /// The addresses, without passwords.
        url: String,
        /// The failure.
        why: String,
    },
    /// The server is too old.
    #[error("the NATS server at {url} is version {version}; 2.11 or newer is needed")]
    Old {
        /// The addresses, without passwords.
        url: String,
        /// Its version.
        version: String,
    },
}

/// The addresses without user, password and token, for messages.
pub fn shown(url: &str) -> String {
    let one = |address: &str| match address.rsplit_once('@') {
        Some((before, host)) => {
            let scheme = before.split_once("://").map_or("", |(scheme, _)| scheme);
            if scheme.is_empty() { host.to_owned() } else { format!("{scheme}://{host}") }
        }
        None => address.to_owned(),
    };
    url.split(',').map(|address| one(address.trim())).collect::<Vec<_>>().join(",")
}

/// Connects, and stays connected: after an interruption the client tries all servers again, for ever,
/// at most 2 s apart. `name` is shown in the server's list of connections.
///
/// # Errors
/// When no server answers now: a wrong address should show at once.
pub async fn connect(settings: &NatsSettings, name: &str) -> Result<Client, ConnectError> {
    connect_and_hear(settings, name, |_| ()).await
}

/// The same, with someone who hears what happens to the connection: losses, refusals.
///
/// # Errors
/// As [`connect`].
pub(super) async fn connect_and_hear(
    settings: &NatsSettings,
    name: &str,
    hear: impl Fn(&Event) + Send + Sync + 'static,
) -> Result<Client, ConnectError> {
    let hear = Arc::new(hear);
    let url = shown(&settings.url);
    let servers = settings
        .url
        .split(',')
        .map(|address| address.trim().parse::<ServerAddr>())
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| ConnectError::Address { url: url.clone(), why: error.to_string() })?;
    let options = match settings.credentials.clone() {
        None => ConnectOptions::new(),
        Some(path) => {
            // A wrong file should show at once.
            renewal::sign(&path, b"")
                .map_err(|source| ConnectError::Credentials { path: path.clone(), source })?;
            ConnectOptions::with_auth_callback(move |nonce| renewal::signed(path.clone(), nonce))
        }
    };
    let mut options = options
        .name(name)
        .connection_timeout(Duration::from_secs(5))
        .ping_interval(Duration::from_secs(5))
        .request_timeout(Some(Duration::from_secs(5)))
        .reconnect_delay_callback(|attempts| {
            Duration::from_millis((50 << attempts.min(6)).min(2_000) as u64)
        })
        .event_callback(move |event| {
            let hear = hear.clone();
            async move {
                heard(&event);
                hear(&event);
            }
        });
    // The client knows user and password of an address, but does not show them to the server.
    if let Some(login) = servers.iter().find(|server| server.has_user_pass()) {
        let user = decoded(login.username().unwrap_or_default());
        options = match login.password() {
            Some(password) => options.user_and_password(user, decoded(password)),
            None => options.token(user),
        };
    }
    if let Some(path) = &settings.ca {
        options = options.add_root_certificates(path.clone()).require_tls(true);
    }
    if let Some((certificate, key)) = &settings.certificate {
        options = options.add_client_certificate(certificate.clone(), key.clone());
    }
    if let Some(prefix) = &settings.inbox_prefix {
        options = options.custom_inbox_prefix(prefix);
    }
    let client = options.connect(servers).await.map_err(|error| ConnectError::Refused {
        url: url.clone(),
        why: match std::error::Error::source(&error) {
            Some(cause) => format!("{error}: {cause}"),
            None => error.to_string(),
        },
    })?;
    let (major, minor, patch) = SERVER_MIN;
    if !client.is_server_compatible(major, minor, patch) {
        return Err(ConnectError::Old { url, version: client.server_info().version });
    }
    Ok(client)
}

/// A connection that is made anew when its client dies. The client dies (its task panics) of a message
/// with a carriage return in a header, and anybody who may publish can send one.
pub struct Line {
    settings: NatsSettings,
    name: String,
    client: RwLock<Client>,
    /// Connections of clients that died.
    before: AtomicU64,
    reviving: tokio::sync::Mutex<()>,
}

impl Line {
    /// Connects.
    ///
    /// # Errors
    /// As [`connect`].
    pub async fn connect(settings: &NatsSettings, name: &str) -> Result<Line, ConnectError> {
        let client = RwLock::new(connect(settings, name).await?);
        let (settings, name) = (settings.clone(), name.to_owned());
        let (before, reviving) = (AtomicU64::new(0), tokio::sync::Mutex::new(()));
        Ok(Line { settings, name, client, before, reviving })
    }

    /// The client as it is now.
    pub fn client(&self) -> Client {
        self.client.read().clone()
    }

    /// Connections made so far.
    pub fn connects(&self) -> u64 {
        let now = self.client.read().statistics().connects.load(Ordering::Relaxed);
        self.before.load(Ordering::Relaxed) + now
    }

    /// Whether the connection stands.
    pub fn connected(&self) -> bool {
        self.client.read().connection_state() == async_nats::connection::State::Connected
    }

    /// Looks whether the server answers at all, and leaves it for another when it does not: a frozen one
    /// keeps its connections open, and the client by itself takes two missed pings to notice. To be
    /// called when an answer did not come in time; one call at a time does something.
    pub async fn probe(&self) {
        let Ok(_one) = self.reviving.try_lock() else { return };
        let client = self.client();
        if !echoes(&client, ECHO).await && self.connected() {
            tracing::warn!(connection = self.name, "the NATS server does not answer; leaving it");
            // A dead client is for `revive`.
            let _ = tokio::time::timeout(ECHO, client.force_reconnect()).await;
        }
    }

    /// Replaces a client that is dead; says whether it was. One that only waits for a server is not.
    pub async fn revive(&self) -> bool {
        let _one = self.reviving.lock().await;
        let client = self.client();
        // Only a dead client refuses at once.
        let asked = tokio::time::timeout(Duration::from_secs(2), client.flush()).await;
        if !matches!(asked, Ok(Err(_))) {
            return false;
        }
        tracing::error!(connection = self.name, "the NATS client died; connecting anew");
        match connect(&self.settings, &self.name).await {
            Ok(anew) => {
                let connects = client.statistics().connects.load(Ordering::Relaxed);
                self.before.fetch_add(connects, Ordering::Relaxed);
                *self.client.write() = anew;
            }
            Err(error) => tracing::warn!(%error, "no connection"),
        }
        true
    }
}

/// Waits until the server has read what was sent before; false when it does not answer in time.
pub(super) async fn echoes(client: &Client, patience: Duration) -> bool {
    let inbox = client.new_inbox();
    let echo = async {
        let mut echo = client.subscribe(inbox.clone()).await.ok()?;
        client.publish(inbox, bytes::Bytes::new()).await.ok()?;
        futures::StreamExt::next(&mut echo).await
    };
    tokio::time::timeout(patience, echo).await.ok().flatten().is_some()
}

/// Undoes the percent encoding of a part of an address. What is no encoding stays as it is.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let digit = |at: usize| char::from(*tail.get(at)?).to_digit(16);
        let code = digit(0).zip(digit(1)).and_then(|(a, b)| u8::try_from(a * 16 + b).ok());
        match (first, code) {
            (b'%', Some(code)) => {
                bytes.push(code);
                rest = &tail[2..];
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn heard(event: &Event) {
    match event {
        Event::Connected => tracing::info!("connected to NATS"),
        Event::Disconnected => tracing::warn!("connection to NATS lost; coming back"),
        Event::SlowConsumer(subscription) => {
            tracing::warn!(subscription, "messages were dropped: the reader was too slow");
        }
        Event::LameDuckMode => tracing::info!("NATS server goes down soon; moving to another"),
        Event::ServerError(error) => tracing::warn!(%error, "NATS server"),
        Event::ClientError(error) => tracing::warn!(%error, "NATS client"),
        Event::Draining | Event::Closed => tracing::debug!(%event, "NATS connection"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_not_shown() {
        assert_eq!(shown("nats://u:p@a:4222, tls://b:1"), "nats://a:4222,tls://b:1");
        assert_eq!(shown("token@c:4222"), "c:4222");
    }

    #[test]
    fn passwords_may_hold_any_character() {
        assert_eq!(decoded("p%40ss%2fw%C3%B6rd"), "p@ss/wörd");
        assert_eq!(decoded("100%"), "100%");
        assert_eq!(decoded("%zz%4"), "%zz%4");
        assert_eq!(decoded("%ff"), "\u{fffd}");
    }

    #[test]
    fn a_wrong_address_and_a_silent_one_are_told_apart() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let of = |url: &str| {
            let settings = NatsSettings { url: url.to_owned(), ..NatsSettings::default() };
            runtime.block_on(connect(&settings, "test")).unwrap_err()
        };
        assert!(matches!(of("nats://u:secret@"), ConnectError::Address { .. }));
        // The discard port: nobody listens there.
        let error = of("nats://u:secret@127.0.0.1:9");
        assert!(matches!(error, ConnectError::Refused { .. }));
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}
