//! The one table of routes: registration, the `Allow` header and the check of the OpenAPI document
//! all read it.

use actix_web::http::Method;
use actix_web::{HttpRequest, ResponseError, Route, web};

use super::problem::{Kind, Problem};
use super::{cluster, dead_letters, events, operations, prices, settings, spend, stream, views};

/// A method of a path, and what answers it.
pub(super) struct Entry {
    pub method: Method,
    pub path: &'static str,
    to: fn(Route) -> Route,
}

const fn entry(method: Method, path: &'static str, to: fn(Route) -> Route) -> Entry {
    Entry { method, path, to }
}

/// Every route. Entries of one path stand together.
pub(super) static ROUTES: [Entry; 28] = [
    entry(Method::POST, "/v1/events", |route| route.to(events::publish)),
    entry(Method::GET, "/v1/orgs/{org}/spend", |route| route.to(spend::of_org)),
    entry(Method::GET, "/v1/orgs/{org}/users/{user}/spend", |route| route.to(spend::of_user)),
    entry(Method::GET, "/v1/orgs/{org}/stream", |route| route.to(stream::follow)),
    entry(Method::GET, "/v1/orgs/{org}/unpriced", |route| route.to(spend::unpriced)),
    entry(Method::GET, "/v1/orgs/{org}/time-zone", |route| route.to(settings::time_zone)),
    entry(Method::PUT, "/v1/orgs/{org}/time-zone", |route| route.to(settings::set_time_zone)),
    entry(Method::GET, "/v1/top", |route| route.to(spend::top)),
    entry(Method::GET, "/v1/dead-letters", |route| route.to(dead_letters::list)),
    entry(Method::GET, "/v1/dead-letters/{id}", |route| route.to(dead_letters::one)),
    entry(Method::POST, "/v1/dead-letters/{id}/replay", |route| route.to(dead_letters::replay)),
    entry(Method::GET, "/v1/prices", |route| route.to(prices::book)),
    entry(Method::POST, "/v1/prices", |route| route.to(prices::change)),
    entry(Method::POST, "/v1/prices/preview", |route| route.to(prices::preview)),
    entry(Method::GET, "/v1/views", |route| route.to(views::list)),
    entry(Method::POST, "/v1/views", |route| route.to(views::declare)),
    entry(Method::DELETE, "/v1/views/{name}", |route| route.to(views::remove)),
    entry(Method::GET, "/v1/views/{name}/orgs/{org}", |route| route.to(spend::of_view)),
    entry(Method::GET, "/v1/shards", |route| route.to(operations::shards)),
    entry(Method::GET, "/v1/cluster", |route| route.to(cluster::show)),
    entry(Method::POST, "/v1/cluster/nodes/{node}/drain", |route| route.to(cluster::drain)),
    entry(Method::POST, "/v1/cluster/shards/{shard}/move", |route| route.to(cluster::move_shard)),
    entry(Method::GET, "/healthz", |route| route.to(operations::healthz)),
    entry(Method::GET, "/readyz", |route| route.to(operations::readyz)),
    entry(Method::GET, "/metrics", |route| route.to(operations::metrics)),
    entry(Method::GET, "/openapi.json", |route| route.to(operations::openapi)),
    entry(Method::GET, "/asyncapi.json", |route| route.to(operations::asyncapi)),
    entry(Method::GET, "/problems/{kind}", |route| route.to(operations::problem_kind)),
];

/// A stream has no end, so HEAD would subscribe for nothing.
const NO_HEAD: &str = "/v1/orgs/{org}/stream";

/// Adds every route to the application. A GET answers HEAD too; other methods are 405.
pub(super) fn register(config: &mut web::ServiceConfig) {
    for group in ROUTES.chunk_by(|a, b| a.path == b.path) {
        let path = group[0].path;
        let mut resource = web::resource(path);
        let mut allowed = Vec::new();
        for Entry { method, to, .. } in group {
            resource = resource.route(to(web::method(method.clone())));
            allowed.push(method.as_str());
            if method == Method::GET && path != NO_HEAD {
                resource = resource.route(to(web::head()));
                allowed.push("HEAD");
            }
        }
        let allow = allowed.join(", ");
        config.service(resource.default_service(web::to(move |request: HttpRequest| {
            let problem = Problem::new(
                Kind::Method,
                format!("{} is not offered here; {allow} is", request.method()),
            );
            let response = problem.header("allow", allow.clone()).error_response();
            async move { response }
        })));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn paths_stand_together_and_nothing_is_named_twice() {
        let groups: Vec<&str> =
            ROUTES.chunk_by(|a, b| a.path == b.path).map(|group| group[0].path).collect();
        assert_eq!(groups.iter().collect::<HashSet<_>>().len(), groups.len());
        let routes: HashSet<_> = ROUTES.iter().map(|entry| (&entry.method, entry.path)).collect();
        assert_eq!(routes.len(), ROUTES.len());
    }
}
