//! What every request passes, whatever its route.
//!
//! * A server on the loopback interface answers only to names of this machine, and a change asked
//!   for by a web page is taken only from a page of this server. Without keys, nothing else would
//!   keep any site a developer visits from publishing events (a form or `fetch` may send `text/plain`
//!   anywhere) or, by pointing a name of its own at 127.0.0.1, from reading spend.
//! * A panic in a handler is this request's 500, not a connection that vanishes.
//! * Whatever refusal the framework words by itself becomes a problem document.

use std::net::IpAddr;
use std::panic::AssertUnwindSafe;

use actix_web::body::{BoxBody, MessageBody};
use actix_web::dev::{ServiceRequest, ServiceResponse};
use actix_web::http::{Method, header};
use actix_web::middleware::Next;
use actix_web::{Error, HttpRequest, HttpResponse, ResponseError, web};
use futures::FutureExt;
use meterr_operators::event::excerpt;

use super::State;
use super::problem::{self, Kind, MEDIA_TYPE, Problem};

pub(super) async fn guard(
    request: ServiceRequest,
    next: Next<impl MessageBody + 'static>,
) -> Result<ServiceResponse<BoxBody>, Error> {
    let loopback = request.app_data::<web::Data<State>>().is_some_and(|state| state.loopback);
    if let Err(problem) = admitted(request.request(), loopback) {
        return Ok(request.into_response(problem.error_response()));
    }
    // The routes share nothing that a panic could leave half done: the engine's state lies behind
    // channels, the cursors' lock is not held across a call, and budgets are given back by drop.
    let response = match AssertUnwindSafe(next.call(request)).catch_unwind().await {
        Ok(result) => result?,
        // The panic hook has reported it.
        Err(_) => return Err(Problem::new(Kind::Internal, "the handler panicked").into()),
    };
    let status = response.status();
    let ours = |response: &ServiceResponse<_>| {
        let media_type = response.headers().get(header::CONTENT_TYPE);
        media_type.is_some_and(|media_type| media_type == MEDIA_TYPE)
    };
    if (status.is_client_error() || status.is_server_error()) && !ours(&response) {
        let problem = problem::of_status(status).error_response();
        return Ok(response.into_response(problem));
    }
    Ok(response.map_into_boxed_body())
}

/// The answer to a path that is no route.
pub(super) async fn not_found(request: HttpRequest) -> HttpResponse {
    let path = excerpt(request.uri().path());
    Problem::new(
        Kind::NotFound,
        format!("there is no route {path:?}; GET /openapi.json lists them"),
    )
    .error_response()
}

fn admitted(request: &HttpRequest, loopback: bool) -> Result<(), Problem> {
    let text = |name| request.headers().get(name).map(|value| value.to_str().unwrap_or("?"));
    let host = text(header::HOST);
    if loopback
        && let Some(host) = host
        && !local(host)
    {
        return Err(Problem::new(
            Kind::Misdirected,
            format!("host {:?} is no name of this machine's loopback interface", excerpt(host)),
        ));
    }
    let safe = [Method::GET, Method::HEAD, Method::OPTIONS].contains(request.method());
    if !safe && let Some(origin) = text(header::ORIGIN) {
        let of = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        if of.is_none() || of != host {
            return Err(Problem::new(
                Kind::ForeignOrigin,
                format!("origin {:?} is not that of this server", excerpt(origin)),
            ));
        }
    }
    Ok(())
}

/// Whether a `Host` names the loopback interface, with or without a port.
fn local(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => rest.split(']').next().unwrap_or(""),
        None => host.split(':').next().unwrap_or(""),
    };
    name.eq_ignore_ascii_case("localhost")
        || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;
    use actix_web::test::TestRequest;

    #[test]
    fn only_names_of_the_loopback_interface_are_local() {
        for host in ["localhost", "LOCALHOST:7070", "127.0.0.1", "127.1.2.3:80", "[::1]:80"] {
            assert!(local(host), "{host}");
        }
        for host in ["", "evil.example", "localhost.evil.example:80", "10.0.0.1", "[::2]", "?"] {
            assert!(!local(host), "{host}");
        }
    }

    #[test]
    fn a_page_of_another_origin_may_change_nothing() {
        let kind = |method: Method, host: &str, origin: Option<&str>, loopback| {
            let mut request = TestRequest::default().method(method).insert_header(("host", host));
            if let Some(origin) = origin {
                request = request.insert_header(("origin", origin));
            }
            admitted(&request.to_http_request(), loopback).err().map(|problem| problem.kind())
        };
        let (foreign, own) = (Some("http://evil.example"), Some("http://localhost:7070"));
        assert_eq!(kind(Method::POST, "localhost:7070", None, true), None);
        assert_eq!(kind(Method::POST, "localhost:7070", own, true), None);
        assert_eq!(kind(Method::GET, "localhost:7070", foreign, true), None);
        let refused = Some(Kind::ForeignOrigin);
        assert_eq!(kind(Method::POST, "localhost:7070", foreign, true), refused);
        assert_eq!(kind(Method::DELETE, "localhost:7070", Some("null"), false), refused);
        assert_eq!(kind(Method::POST, "localhost:80", own, true), refused);
        assert_eq!(kind(Method::GET, "evil.example", None, true), Some(Kind::Misdirected));
        assert_eq!(kind(Method::GET, "meterr.internal", None, false), None);
    }
}
