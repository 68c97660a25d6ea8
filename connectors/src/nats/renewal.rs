//! Credentials and certificates that are replaced while the process runs.
//!
//! Whenever the client connects it reads the files anew: certificates by itself, credentials by
//! [`sign`]. So a connection that ends, because a server restarts or because credentials expired, comes
//! back with what the files hold then. So that this is not first tried when it is needed, [`watch`] looks
//! at the files: when their content has changed and stayed the same for one look, a connection of its
//! own is tried with them, and only if that works the connections at work are made anew. What was on its
//! way is sent again, as after every interruption. If it does not work they stay as they are, and the
//! log says why.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_nats::{Auth, AuthError, Client};

use super::connection::{ConnectError, Line, NatsSettings, connect};

/// Time between looks at the files.
const LOOK: Duration = Duration::from_secs(2);

/// The token and the seed in a credentials file.
///
/// # Errors
/// What is missing.
pub(super) fn parse(text: &str) -> Result<(&str, &str), &'static str> {
    let block = |what: &str| {
        let (_, rest) = text.split_once(what)?;
        let (_, rest) = rest.split_once('\n')?;
        let line = rest.lines().next()?.trim();
        (!line.is_empty() && !line.starts_with('-')).then_some(line)
    };
    let token = block("BEGIN NATS USER JWT").ok_or("it has no user JWT")?;
    let seed = block("BEGIN USER NKEY SEED").ok_or("it has no nkey seed")?;
    Ok((token, seed))
}

/// Proves to a server who we are, with what the file holds now.
///
/// # Errors
/// When it cannot be read or is no credentials file.
pub(super) fn sign(path: &Path, nonce: &[u8]) -> std::io::Result<Auth> {
    let invalid = |what: String| std::io::Error::new(std::io::ErrorKind::InvalidData, what);
    let text = std::fs::read_to_string(path)?;
    let (token, seed) = parse(&text).map_err(|what| invalid(what.to_owned()))?;
    let pair = nkeys::KeyPair::from_seed(seed).map_err(|error| invalid(error.to_string()))?;
    let signature = pair.sign(nonce).map_err(|error| invalid(error.to_string()))?;
    let mut auth = Auth::new();
    auth.jwt = Some(token.to_owned());
    auth.signature = Some(signature);
    Ok(auth)
}

/// The same for the client, which logs the error and tries again.
pub(super) async fn signed(path: PathBuf, nonce: Vec<u8>) -> Result<Auth, AuthError> {
    sign(&path, &nonce).map_err(AuthError::new)
}

/// A hash of all files; a file that cannot be read counts as empty.
fn content(files: &[PathBuf]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    for file in files {
        let bytes = std::fs::read(file).unwrap_or_default();
        hasher.update(&(bytes.len() as u64).to_le_bytes()).update(&bytes);
    }
    hasher.finalize()
}

/// What to do after a look at the files.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    Nothing,
    /// They changed, and nobody is writing to them any more.
    Renew,
}

/// Two hashes: of what the connections were made with, and of the last look.
#[derive(Debug)]
struct Seen {
    used: blake3::Hash,
    last: blake3::Hash,
}

impl Seen {
    fn look(&mut self, now: blake3::Hash) -> Next {
        let still = now == self.last;
        self.last = now;
        if !still || now == self.used {
            return Next::Nothing;
        }
        // Tried once, whatever comes of it.
        self.used = now;
        Next::Renew
    }
}

/// Keeps connections up to date with the files that the settings name, for as long as the runtime runs.
pub(super) fn watch(settings: &NatsSettings, input: Arc<Line>, output: Client) {
    let NatsSettings { credentials, ca, certificate, .. } = settings;
    let pair = certificate.iter().flat_map(|(certificate, key)| [certificate, key]);
    let files: Vec<PathBuf> = credentials.iter().chain(ca).chain(pair).cloned().collect();
    if files.is_empty() {
        return;
    }
    let settings = settings.clone();
    let first = content(&files);
    tokio::spawn(async move {
        let mut seen = Seen { used: first, last: first };
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            look.tick().await;
            let read = files.clone();
            let Ok(now) = tokio::task::spawn_blocking(move || content(&read)).await else { return };
            if seen.look(now) == Next::Renew {
                match renew(&settings, [input.client(), output.clone()]).await {
                    Ok(()) => tracing::info!("credentials or certificates changed; reconnecting"),
                    Err(error) => tracing::error!(
                        %error,
                        "credentials or certificates changed, but do not work; connections stay as \
                         they are until they end"
                    ),
                }
            }
        }
    });
}

async fn renew(settings: &NatsSettings, clients: [Client; 2]) -> Result<(), ConnectError> {
    let tried = connect(settings, "meterr renewal").await?;
    drop(tried);
    for client in clients {
        // A client that is dead is made anew by whoever uses it.
        let _ = client.force_reconnect().await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "-----BEGIN NATS USER JWT-----\neyJ0.abc-_.x\n------END NATS USER JWT------\n\n\
        ***** IMPORTANT *****\n\n-----BEGIN USER NKEY SEED-----\n\
        SUAIO3FHUX5PNV2LQIIP7TZ3N4L7TX3W53MQGEIVYFIGA635OZCKEYHFLM\n------END USER NKEY SEED------\n";

    #[test]
    fn a_credentials_file_is_read_and_any_other_refused() {
        let (token, seed) = parse(FILE).unwrap();
        assert_eq!((token, seed.len()), ("eyJ0.abc-_.x", 58));
        assert_eq!(parse(&FILE.replace('\n', "\r\n")).unwrap(), (token, seed));
        assert_eq!(parse(""), Err("it has no user JWT"));
        assert_eq!(parse(FILE.split_at(120).0), Err("it has no nkey seed"));
        assert_eq!(parse("BEGIN NATS USER JWT\n---"), Err("it has no user JWT"));
    }

    #[test]
    fn each_connection_signs_with_what_the_file_holds() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("creds");
        assert!(sign(&path, b"nonce").is_err());
        std::fs::write(&path, FILE).unwrap();
        let auth = sign(&path, b"nonce").unwrap();
        assert_eq!(auth.jwt.as_deref(), Some("eyJ0.abc-_.x"));
        std::fs::write(&path, FILE.replace("eyJ0", "eyJ1")).unwrap();
        assert_eq!(sign(&path, b"nonce").unwrap().jwt.as_deref(), Some("eyJ1.abc-_.x"));
        std::fs::write(&path, FILE.replace("SUAIO", "XXXXX")).unwrap();
        assert!(sign(&path, b"nonce").is_err());
    }

    #[test]
    fn a_change_counts_once_and_when_it_has_settled() {
        let [a, b, c] = [b"a", b"b", b"c"].map(|text| blake3::hash(text));
        let mut seen = Seen { used: a, last: a };
        let mut next = |now| seen.look(now);
        assert_eq!([next(a), next(b), next(c)], [Next::Nothing, Next::Nothing, Next::Nothing]);
        assert_eq!([next(c), next(c)], [Next::Renew, Next::Nothing]);
        assert_eq!([next(a), next(c), next(c)], [Next::Nothing, Next::Nothing, Next::Nothing]);
    }
}
