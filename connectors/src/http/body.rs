//! Reading request bodies inside bounds: bytes on the wire, bytes after decompression, bytes held by
//! all requests together, and time.
//!
//! Bodies are decompressed here rather than by the framework, since a chunk of 64 KiB can stand for
//! 60 MiB and more: a limit looked at after each chunk is no limit. What is decompressed is checked
//! every 64 KiB, and the thread is shared with other requests every 256 KiB.

use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use actix_web::http::header;
use actix_web::{HttpRequest, web};
use futures::StreamExt;

use super::HttpSettings;
use super::problem::{Kind, Problem};

/// Work done on a thread before others get their turn, in bytes: one to three milliseconds.
pub(super) const TURN_BYTES: usize = 256 * 1024;

/// Largest window of a zstd frame, as a power of two: 8 MiB, what RFC 8878 asks decoders to support.
/// The window is allocated before any output is seen, so it needs a bound of its own.
const ZSTD_WINDOW_LOG_MAX: u32 = 23;

/// Memory that bodies of all requests may hold together.
#[derive(Debug)]
pub(super) struct Budget {
    used: AtomicUsize,
    max: usize,
}

impl Budget {
    pub fn new(max: usize) -> Arc<Budget> {
        Arc::new(Budget { used: AtomicUsize::new(0), max })
    }

    /// Begins a request that holds nothing yet.
    pub fn hold(self: &Arc<Budget>) -> Held {
        Held { budget: self.clone(), bytes: 0 }
    }
}

/// A request's part of the [`Budget`], given back when dropped.
#[derive(Debug)]
pub(super) struct Held {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Held {
    /// Takes `bytes` more.
    ///
    /// # Errors
    /// When requests together would hold too much. Waiting instead could deadlock: every request
    /// would hold a part and wait for the rest.
    pub fn grow(&mut self, bytes: usize) -> Result<(), Problem> {
        let taken = self.budget.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(bytes).filter(|used| *used <= self.budget.max)
        });
        if taken.is_err() {
            return Err(Problem::new(
                Kind::Unavailable,
                "too many bodies are being worked on at once; try again",
            ));
        }
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Coding {
    Identity,
    Gzip,
    Zstd,
}

/// The whole body, decompressed.
pub(super) async fn read(
    request: &HttpRequest,
    payload: web::Payload,
    settings: &HttpSettings,
    held: &mut Held,
) -> Result<Vec<u8>, Problem> {
    let coding = coding(request)?;
    let raw = tokio::time::timeout(
        settings.request_timeout,
        received(request, payload, settings.body_bytes_max, held),
    )
    .await
    .map_err(|_| {
        Problem::new(
            Kind::SlowRequest,
            format!("the body was not complete within {:?}", settings.request_timeout),
        )
        .header("connection", "close")
    })??;
    if raw.is_empty() {
        return Ok(raw);
    }
    match coding {
        Coding::Identity => Ok(raw),
        Coding::Gzip => {
            let reader = flate2::bufread::MultiGzDecoder::new(raw.as_slice());
            inflated(reader, "gzip", settings.body_bytes_max, held).await
        }
        Coding::Zstd => {
            let mut reader = zstd::stream::read::Decoder::with_buffer(raw.as_slice())
                .map_err(|error| damaged("zstd", &error))?;
            reader.window_log_max(ZSTD_WINDOW_LOG_MAX).map_err(|error| damaged("zstd", &error))?;
            inflated(reader, "zstd", settings.body_bytes_max, held).await
        }
    }
}

/// The whole body of a request that may only be JSON.
pub(super) async fn json(
    request: &HttpRequest,
    payload: web::Payload,
    settings: &HttpSettings,
    held: &mut Held,
) -> Result<Vec<u8>, Problem> {
    media_type(request, &["application/json"])?;
    read(request, payload, settings, held).await
}

/// The request's media type without parameters, in lower case; refused when it is not `allowed`.
/// A body without one is taken for what the route expects.
pub(super) fn media_type(
    request: &HttpRequest,
    allowed: &[&str],
) -> Result<Option<String>, Problem> {
    let Some(value) = request.headers().get(header::CONTENT_TYPE) else { return Ok(None) };
    let text = value.to_str().unwrap_or("");
    let essence = text.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    if allowed.contains(&essence.as_str()) {
        return Ok(Some(essence));
    }
    let excerpt = meterr_operators::event::excerpt(text);
    Err(Problem::new(
        Kind::MediaType,
        format!("content-type {excerpt:?} is not read here; send one of {}", allowed.join(", ")),
    )
    .member("allowed", allowed.to_vec()))
}

fn coding(request: &HttpRequest) -> Result<Coding, Problem> {
    let mut values = request.headers().get_all(header::CONTENT_ENCODING);
    let (first, second) = (values.next(), values.next());
    let text = match (first, second) {
        (None, _) => return Ok(Coding::Identity),
        (Some(value), None) => value.to_str().unwrap_or("").trim().to_ascii_lowercase(),
        (Some(_), Some(_)) => "several".to_owned(),
    };
    match text.as_str() {
        "" | "identity" => Ok(Coding::Identity),
        "gzip" | "x-gzip" => Ok(Coding::Gzip),
        "zstd" => Ok(Coding::Zstd),
        _ => {
            let excerpt = meterr_operators::event::excerpt(&text);
            Err(Problem::new(
                Kind::MediaType,
                format!("content-encoding {excerpt:?} is not read here; send gzip, zstd or none"),
            )
            .member("allowed", vec!["gzip", "zstd", "identity"])
            .header("accept-encoding", "gzip, zstd"))
        }
    }
}

fn over(max: usize) -> Problem {
    Problem::too_large(format!("the body is larger than the limit of {max} bytes"), max)
}

async fn received(
    request: &HttpRequest,
    mut payload: web::Payload,
    max: usize,
    held: &mut Held,
) -> Result<Vec<u8>, Problem> {
    let told = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.parse::<u64>().ok())
        .unwrap_or(0);
    if told > max as u64 {
        return Err(over(max));
    }
    // What a client says it will send is no reason to set memory aside for it.
    let mut body = Vec::with_capacity((told as usize).min(TURN_BYTES));
    while let Some(chunk) = payload.next().await {
        let chunk = chunk
            .map_err(|error| Problem::new(Kind::Body, format!("the body broke off: {error}")))?;
        if body.len() + chunk.len() > max {
            return Err(over(max));
        }
        held.grow(chunk.len())?;
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

async fn inflated(
    mut reader: impl Read,
    coding: &str,
    max: usize,
    held: &mut Held,
) -> Result<Vec<u8>, Problem> {
    let mut chunk = vec![0; 64 * 1024];
    let mut body = Vec::new();
    let mut turn = 0;
    loop {
        let n = match reader.read(&mut chunk) {
            Ok(0) => return Ok(body),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(damaged(coding, &error)),
        };
        if body.len() + n > max {
            return Err(Problem::too_large(
                format!("the body is larger than the limit of {max} bytes once decompressed"),
                max,
            ));
        }
        held.grow(n)?;
        body.extend_from_slice(&chunk[..n]);
        turn += n;
        if turn >= TURN_BYTES {
            turn = 0;
            tokio::task::yield_now().await;
        }
    }
}

fn damaged(coding: &str, error: &io::Error) -> Problem {
    Problem::new(Kind::Body, format!("the body does not decompress as {coding}: {error}"))
}
