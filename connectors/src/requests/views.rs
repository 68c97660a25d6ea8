//! Declared views: groupings that are kept live. Their rows are asked for in `spend.rs`.

use meterr_operators::event::excerpt;
use serde::Serialize;

use super::problem::{Kind, Problem};
use super::{Answer, Desk, changed, json, parsed};
use crate::api::ViewDeclaration;

/// Longest name.
const NAME_LEN_MAX: usize = 64;
/// Most dimensions.
const DIMENSIONS_MAX: usize = 4;
/// What a name must be.
pub(crate) const NAME_FORM: &str = "1 to 64 characters of a-z, 0-9 and '_'";

#[derive(Debug, Serialize)]
struct Views {
    views: Vec<ViewDeclaration>,
}

impl Desk {
    /// Declared views.
    pub async fn views(&self) -> Answer {
        json(&Views { views: self.plain(self.api.views()).await? })
    }

    /// Declares a view.
    pub async fn declare_view(&self, body: &[u8]) -> Answer {
        let view: ViewDeclaration = parsed(body)?;
        checked(&view).map_err(|detail| Problem::new(Kind::Body, detail))?;
        changed(self.plain(self.api.declare_view(view)).await?)
    }

    /// Removes a declared view.
    pub async fn remove_view(&self, name: String) -> Answer {
        changed(self.plain(self.api.remove_view(name)).await?)
    }
}

/// The name of a view, checked.
pub(crate) fn name(text: &str) -> Result<String, Problem> {
    if name_valid(text) {
        return Ok(text.to_owned());
    }
    Err(Problem::parameter("name", text, NAME_FORM))
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
