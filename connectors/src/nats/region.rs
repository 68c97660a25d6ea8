//! A second region: streams mirrored to other servers, and made the deployment's own there.
//!
//! A mirror has the records of its origin at the same sequences and times, and can be read, not written.
//! Since server 2.12 an update that takes the mirror setting away makes it a stream of its own, with all
//! it has; nothing is copied.

use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::stream::{Config, External, Source};
use tokio::time::Instant;

use super::log::{BackOff, Connections, PATIENCE, unavailable};
use super::streams::Wanted;
use super::write::told;
use crate::log::{LogError, LogResult};

/// A stream as it is at a server.
#[derive(Debug, Clone)]
pub struct Found {
    /// Its configuration.
    pub config: Config,
    /// Its last sequence.
    pub head: u64,
}

/// Looks at a stream.
///
/// # Errors
/// [`LogError::Unavailable`] when the server does not tell.
pub async fn find(connections: &Connections, stream: &str) -> LogResult<Option<Found>> {
    let context = connections.output();
    let until = Instant::now() + PATIENCE;
    let mut wait = BackOff::new();
    loop {
        match context.get_stream(stream).await {
            Ok(found) => {
                let info = found.cached_info();
                let (config, head) = (info.config.clone(), info.state.last_sequence);
                return Ok(Some(Found { config, head }));
            }
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(cause)
                    if cause.error_code() == ErrorCode::STREAM_NOT_FOUND =>
                {
                    return Ok(None);
                }
                _ if Instant::now() >= until => {
                    return Err(unavailable(stream, "cannot look at it", &told(&error)));
                }
                _ => wait.wait().await,
            },
        }
    }
}

async fn update(connections: &Connections, config: Config) -> LogResult<()> {
    let context = connections.output();
    let until = Instant::now() + PATIENCE;
    let mut wait = BackOff::new();
    loop {
        match context.update_stream(config.clone()).await {
            Ok(_) => return Ok(()),
            Err(error) if Instant::now() >= until => {
                return Err(unavailable(&config.name, "cannot change it", &told(&error)));
            }
            Err(_) => wait.wait().await,
        }
    }
}

/// The configuration of a mirror of a stream, which is reached by way of `api`, such as
/// `$JS.old.API` (the origin's domain by a leaf node) or the prefix of an import of its API. Identity and
/// all else that must be as it was is the origin's.
pub fn mirror_of(origin: &Config, api: &str, replicas: usize) -> Config {
    let external = External { api_prefix: api.to_owned(), delivery_prefix: None };
    let source =
        Source { name: origin.name.clone(), external: Some(external), ..Source::default() };
    Config {
        subjects: Vec::new(),
        mirror: Some(source),
        num_replicas: replicas,
        duplicate_window: std::time::Duration::ZERO,
        placement: None,
        sealed: false,
        ..origin.clone()
    }
}

/// Creates a mirror, if it is not there.
///
/// # Errors
/// When there is another stream of that name, or the server refuses.
pub async fn mirror(connections: &Connections, config: &Config) -> LogResult<bool> {
    if let Some(found) = find(connections, &config.name).await? {
        if found.config.mirror.is_some() && found.config.metadata_of() == config.metadata_of() {
            return Ok(false);
        }
        let what = "there is another stream of that name; nothing was done to it".to_owned();
        return Err(LogError::Changed { stream: config.name.clone(), what });
    }
    let created = connections.output().create_stream(config).await;
    created.map(|_| true).map_err(|error| LogError::Format {
        stream: config.name.clone(),
        what: format!("the mirror cannot be created: {}", told(&error)),
    })
}

/// The identity in a configuration.
trait MetadataOf {
    fn metadata_of(&self) -> Option<&String>;
}

impl MetadataOf for Config {
    fn metadata_of(&self) -> Option<&String> {
        self.metadata.get(super::streams::IDENTITY_KEY)
    }
}

/// Makes a mirror the deployment's own stream. Says whether it was a mirror.
///
/// # Errors
/// When the stream is not there, or the server does not do it.
pub async fn promote(connections: &Connections, wanted: &Wanted) -> LogResult<bool> {
    let stream = wanted.stream.clone();
    let absent = |what: &str| LogError::Changed { stream: stream.clone(), what: what.to_owned() };
    let found = find(connections, &stream).await?.ok_or_else(|| absent("it is not there"))?;
    if found.config.mirror.is_none() {
        return Ok(false);
    }
    let own = Config {
        mirror: None,
        mirror_direct: false,
        subjects: vec![wanted.subject.clone()],
        duplicate_window: std::time::Duration::from_secs(120),
        ..found.config
    };
    update(connections, own).await?;
    match find(connections, &stream).await? {
        Some(now) if now.config.mirror.is_none() => Ok(true),
        _ => Err(absent(
            "the server did not take its mirror setting away; 2.12 or newer is needed for that",
        )),
    }
}

/// Lets nobody write to a stream any more, for good; returns its last sequence.
///
/// # Errors
/// When the stream is not there, or the server does not do it.
pub async fn seal(connections: &Connections, stream: &str) -> LogResult<u64> {
    let absent = || LogError::Changed { stream: stream.to_owned(), what: "it is not there".into() };
    let found = find(connections, stream).await?.ok_or_else(absent)?;
    if !found.config.sealed {
        update(connections, Config { sealed: true, ..found.config }).await?;
    }
    Ok(find(connections, stream).await?.ok_or_else(absent)?.head)
}
