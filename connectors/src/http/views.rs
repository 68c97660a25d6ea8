//! Declared views: groupings that are kept live. Their rows are served by `spend.rs`.

use actix_web::{HttpRequest, HttpResponse, web};
use meterr_operators::event::excerpt;
use serde::Serialize;

use super::problem::{Kind, Problem};
use super::query::{self, Query};
use super::{Position, State, body};
use crate::api::ViewDeclaration;

/// Longest name.
const NAME_LEN_MAX: usize = 64;
/// Most dimensions.
const DIMENSIONS_MAX: usize = 4;

#[derive(Debug, Serialize)]
struct Views {
    views: Vec<ViewDeclaration>,
}

pub(super) async fn list(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    Query::of(&request, &[])?;
    let views = state.plain(state.api.views()).await?;
    Ok(HttpResponse::Ok().json(Views { views }))
}

pub(super) async fn declare(
    state: web::Data<State>,
    request: HttpRequest,
    payload: web::Payload,
) -> Result<HttpResponse, Problem> {
    Query::of(&request, &[])?;
    let mut held = state.budget.hold();
    let view: ViewDeclaration = body::json(&request, payload, &state.settings, &mut held).await?;
    checked(&view).map_err(|detail| Problem::new(Kind::Body, detail))?;
    let position = state.plain(state.api.declare_view(view)).await?;
    Ok(HttpResponse::Accepted().json(Position { position }))
}

pub(super) async fn remove(
    state: web::Data<State>,
    request: HttpRequest,
) -> Result<HttpResponse, Problem> {
    Query::of(&request, &[])?;
    let position = state.plain(state.api.remove_view(name(&request)?)).await?;
    Ok(HttpResponse::Accepted().json(Position { position }))
}

/// The view's name in the path.
pub(super) fn name(request: &HttpRequest) -> Result<String, Problem> {
    let name = query::segment(request, 2, "name")?;
    if name_valid(&name) {
        return Ok(name);
    }
    Err(Problem::parameter("name", &name, "1 to 64 characters of a-z, 0-9 and '_'"))
}

fn name_valid(name: &str) -> bool {
    (1..=NAME_LEN_MAX).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
}

fn checked(view: &ViewDeclaration) -> Result<(), String> {
    if !name_valid(&view.name) {
        return Err(format!(
            "name {:?} must be 1 to {NAME_LEN_MAX} characters of a-z, 0-9 and '_'",
            excerpt(&view.name)
        ));
    }
    if !(1..=DIMENSIONS_MAX).contains(&view.by.len()) {
        return Err(format!(
            "by has {} dimensions; 1 to {DIMENSIONS_MAX} are taken",
            view.by.len()
        ));
    }
    for (at, dimension) in view.by.iter().enumerate() {
        let known = ["user", "model", "provider", "feature"].contains(&dimension.as_str())
            || dimension.strip_prefix("tag:").is_some_and(|tag| {
                (1..=meterr_operators::event::NAME_LEN_MAX).contains(&tag.len())
                    && !tag.chars().any(char::is_control)
            });
        if !known {
            return Err(format!(
                "by names {:?}; known are user, model, provider, feature and tag:NAME",
                excerpt(dimension)
            ));
        }
        if view.by[..at].contains(dimension) {
            return Err(format!("by names {:?} twice", excerpt(dimension)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::Window;

    #[test]
    fn a_wrong_declaration_is_refused_beside_its_valid_twin() {
        let check = |name: &str, by: &[&str]| {
            checked(&ViewDeclaration {
                name: name.to_owned(),
                by: by.iter().map(|&dimension| dimension.to_owned()).collect(),
                window: Window::Day,
            })
        };
        assert_eq!(check("by_team_1", &["tag:team", "model"]), Ok(()));
        for (name, by, part) in [
            ("By-team", vec!["model"], "a-z"),
            ("", vec!["model"], "1 to 64"),
            ("v", vec![], "0 dimensions"),
            ("v", vec!["user", "model", "provider", "feature", "tag:a"], "5 dimensions"),
            ("v", vec!["org"], "known are"),
            ("v", vec!["tag:"], "known are"),
            ("v", vec!["model", "model"], "twice"),
        ] {
            let error = check(name, &by).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }
}
