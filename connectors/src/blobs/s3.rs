//! Objects in a bucket of an S3-compatible store, below a prefix.
//!
//! One request an object, which the store takes as a whole or not at all. The library repeats
//! requests that failed for a reason that passes, for at most half a minute.

use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::{StreamExt, TryStreamExt};
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{ClientOptions, Error, ObjectStore, ObjectStoreExt, PutPayload, RetryConfig};
use std::sync::Arc;

use super::{BLOB_LEN_MAX, BLOBS_MAX, Blob, BlobError, Blobs, check, check_name, problem_of_name};

/// Longest time a request is repeated.
const RETRIES: Duration = Duration::from_secs(30);
/// Longest time of one request: the largest object at 1 MiB/s and more.
const REQUEST: Duration = Duration::from_secs(90);

/// A bucket as store.
#[derive(Clone)]
pub struct S3Blobs {
    store: Arc<AmazonS3>,
    prefix: Arc<str>,
    shown: Arc<str>,
}

impl S3Blobs {
    /// Opens `bucket/prefix` with what the environment says of credentials, region and endpoint. Asks
    /// nothing.
    ///
    /// # Errors
    /// When bucket or prefix are no names, or the settings do not fit.
    pub fn open(place: &str) -> Result<S3Blobs, BlobError> {
        S3Blobs::with(place, AmazonS3Builder::from_env())
    }

    fn with(place: &str, builder: AmazonS3Builder) -> Result<S3Blobs, BlobError> {
        // A secret does not belong there; should one be there, it is not shown.
        let hidden = place.rsplit_once('@').map_or(place, |(_, place)| place);
        let shown = format!("s3://{hidden}");
        let place = place.strip_suffix('/').unwrap_or(place);
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        if problem_of_name(bucket).is_some() {
            return Err(BlobError::new(
                &shown,
                "the bucket needs a name of letters, digits, '-', '.'",
            ));
        }
        if !prefix.is_empty() {
            check_name(&shown, prefix)?;
        }
        // The library takes whatever provider the process has; without one it would panic. Another
        // part of the process may have been faster, which is as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let retry = RetryConfig { retry_timeout: RETRIES, ..RetryConfig::default() };
        let mut options = ClientOptions::new().with_timeout(REQUEST);
        let allowed = std::env::var("AWS_ALLOW_HTTP").is_ok_and(|value| value == "true");
        if allowed || cfg!(test) {
            options = options.with_allow_http(true);
        }
        let builder = builder.with_bucket_name(bucket).with_retry(retry);
        let store = builder.with_client_options(options).build();
        let store = Arc::new(store.map_err(|error| BlobError::new(&shown, error))?);
        let prefix = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
        Ok(S3Blobs { store, prefix: prefix.into(), shown: shown.into() })
    }

    fn failed(&self, name: &str, error: &Error) -> BlobError {
        let cause = std::error::Error::source(error).map(|cause| format!(": {cause}"));
        BlobError::new(&self.shown, format!("{name}: {error}{}", cause.unwrap_or_default()))
    }

    /// Where an object is. The name was checked, so that nothing of it is encoded.
    fn place(&self, name: &str) -> Path {
        Path::from(format!("{}{name}", self.prefix))
    }
}

impl Blobs for S3Blobs {
    fn shown(&self) -> String {
        self.shown.to_string()
    }

    fn put(&self, name: &str, bytes: Bytes) -> BoxFuture<'static, Result<(), BlobError>> {
        let (blobs, name) = (self.clone(), name.to_owned());
        Box::pin(async move {
            check(&blobs.shown, &name, &bytes)?;
            let put = blobs.store.put(&blobs.place(&name), PutPayload::from_bytes(bytes)).await;
            put.map(drop).map_err(|error| blobs.failed(&name, &error))
        })
    }

    fn get(&self, name: &str) -> BoxFuture<'static, Result<Option<Bytes>, BlobError>> {
        let (blobs, name) = (self.clone(), name.to_owned());
        Box::pin(async move {
            check_name(&blobs.shown, &name)?;
            let found = match blobs.store.get(&blobs.place(&name)).await {
                Err(Error::NotFound { .. }) => return Ok(None),
                found => found.map_err(|error| blobs.failed(&name, &error))?,
            };
            if found.meta.size > BLOB_LEN_MAX as u64 {
                let what = format!("{name}: it has more than {BLOB_LEN_MAX} bytes");
                return Err(BlobError::new(&blobs.shown, what));
            }
            let mut bytes = Vec::with_capacity(found.meta.size as usize);
            let mut pieces = found.into_stream();
            while let Some(piece) = pieces.next().await {
                bytes.extend_from_slice(&piece.map_err(|error| blobs.failed(&name, &error))?);
                if bytes.len() > BLOB_LEN_MAX {
                    let what = format!("{name}: more bytes came than were said");
                    return Err(BlobError::new(&blobs.shown, what));
                }
            }
            Ok(Some(bytes.into()))
        })
    }

    fn list(&self, prefix: &str) -> BoxFuture<'static, Result<Vec<Blob>, BlobError>> {
        let (blobs, prefix) = (self.clone(), prefix.to_owned());
        Box::pin(async move {
            // The library lists whole parts; the rest of the prefix is compared here.
            let whole = prefix.rsplit_once('/').map_or("", |(whole, _)| whole);
            if !whole.is_empty() {
                check_name(&blobs.shown, whole)?;
            }
            let from = blobs.place(whole);
            let mut listed = blobs.store.list(Some(&from));
            let mut found = Vec::new();
            while let Some(object) =
                listed.try_next().await.map_err(|error| blobs.failed(&prefix, &error))?
            {
                let path: &str = object.location.as_ref();
                let Some(name) = path.strip_prefix(&*blobs.prefix) else { continue };
                if !name.starts_with(&prefix) || problem_of_name(name).is_some() {
                    continue;
                }
                if found.len() >= BLOBS_MAX {
                    let what = format!("{prefix}: more than {BLOBS_MAX} objects");
                    return Err(BlobError::new(&blobs.shown, what));
                }
                found.push(Blob { name: name.to_owned(), bytes: object.size });
            }
            found.sort_by(|a: &Blob, b: &Blob| a.name.cmp(&b.name));
            Ok(found)
        })
    }

    fn delete(&self, name: &str) -> BoxFuture<'static, Result<(), BlobError>> {
        let (blobs, name) = (self.clone(), name.to_owned());
        Box::pin(async move {
            check_name(&blobs.shown, &name)?;
            match blobs.store.delete(&blobs.place(&name)).await {
                Ok(()) | Err(Error::NotFound { .. }) => Ok(()),
                Err(error) => Err(blobs.failed(&name, &error)),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    //! Against a server of a few lines that knows the four requests made here, not whether they are
    //! signed rightly.

    use std::collections::BTreeMap;

    use actix_web::http::Method;
    use actix_web::{App, HttpRequest, HttpResponse, HttpServer, web};
    use parking_lot::Mutex;

    use super::*;
    use crate::blobs::testing::conforms;

    type Objects = Mutex<BTreeMap<String, Bytes>>;

    /// Of a listing, only few at once.
    const PAGE: usize = 3;

    fn query(request: &HttpRequest, name: &str) -> Option<String> {
        let query = web::Query::<BTreeMap<String, String>>::from_query(request.query_string());
        query.unwrap().get(name).cloned()
    }

    async fn serve(request: HttpRequest, body: Bytes, objects: web::Data<Objects>) -> HttpResponse {
        let signed = request.headers().get("authorization").unwrap().to_str().unwrap();
        assert!(signed.starts_with("AWS4-HMAC-SHA256 Credential=key/"), "{signed}");
        let mut objects = objects.lock();
        let key =
            request.path().strip_prefix("/bucket").unwrap().trim_start_matches('/').to_owned();
        match *request.method() {
            Method::PUT => {
                objects.insert(key, body);
                HttpResponse::Ok().insert_header(("ETag", "\"x\"")).finish()
            }
            Method::DELETE => {
                objects.remove(&key);
                HttpResponse::NoContent().finish()
            }
            Method::POST => {
                let text = String::from_utf8(body.to_vec()).unwrap();
                let mut deleted = String::new();
                for part in text.split("<Key>").skip(1) {
                    let key = part.split('<').next().unwrap();
                    objects.remove(key);
                    deleted.push_str(&format!("<Deleted><Key>{key}</Key></Deleted>"));
                }
                HttpResponse::Ok()
                    .content_type("application/xml")
                    .body(format!("<DeleteResult>{deleted}</DeleteResult>"))
            }
            Method::GET if key.is_empty() => {
                let prefix = query(&request, "prefix").unwrap_or_default();
                let after = query(&request, "continuation-token").unwrap_or_default();
                let matching: Vec<_> = objects
                    .iter()
                    .filter(|(key, _)| key.starts_with(&prefix) && **key > after)
                    .collect();
                let entry = |(key, bytes): &(&String, &Bytes)| {
                    let size = bytes.len();
                    format!(
                        "<Contents><Key>{key}</Key><Size>{size}</Size><ETag>\"x\"</ETag>\
                         <LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                    )
                };
                let entries: String = matching.iter().take(PAGE).map(entry).collect();
                let next = matching.get(PAGE - 1).filter(|_| matching.len() > PAGE);
                let next = next.map_or_else(String::new, |(key, _)| {
                    format!("<NextContinuationToken>{key}</NextContinuationToken>")
                });
                let truncated = !next.is_empty();
                HttpResponse::Ok().content_type("application/xml").body(format!(
                    "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>{truncated}</IsTruncated>\
                     {next}{entries}</ListBucketResult>"
                ))
            }
            _ => match objects.get(&key) {
                Some(bytes) => HttpResponse::Ok()
                    .insert_header(("ETag", "\"x\""))
                    .insert_header(("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT"))
                    .body(bytes.clone()),
                None => HttpResponse::NotFound().body("<Error><Code>NoSuchKey</Code></Error>"),
            },
        }
    }

    #[actix_web::test]
    async fn it_keeps_the_rules_of_a_store() {
        let objects = web::Data::new(Objects::default());
        let shared = objects.clone();
        let server = HttpServer::new(move || {
            let limit = web::PayloadConfig::new(BLOB_LEN_MAX + 1);
            App::new().app_data(shared.clone()).app_data(limit).default_service(web::to(serve))
        });
        let server = server.workers(1).disable_signals().bind(("127.0.0.1", 0)).unwrap();
        let port = server.addrs()[0].port();
        let server = server.run();
        let handle = server.handle();
        actix_web::rt::spawn(server);
        let builder = || {
            AmazonS3Builder::new()
                .with_endpoint(format!("http://127.0.0.1:{port}"))
                .with_access_key_id("key")
                .with_secret_access_key("secret")
        };
        let blobs = S3Blobs::with("bucket/some/prefix/", builder()).unwrap();
        objects.lock().insert("some/prefixes/no".to_owned(), Bytes::new());
        conforms(&blobs).await;
        assert_eq!(objects.lock().keys().collect::<Vec<_>>(), ["some/prefixes/no"]);
        conforms(&S3Blobs::with("bucket", builder()).unwrap()).await;
        handle.stop(false).await;
    }
}
