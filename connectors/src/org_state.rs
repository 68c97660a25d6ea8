//! The rows of one org as the live protocol tells them: apply each event, read the rows.
//!
//! Memory follows the rows that carry something. A row whose events were all taken back is removed.

use std::collections::BTreeMap;

use meterr_operators::ids::Positions;

use crate::api::{Figures, StreamId};
use crate::changes::{LiveKind, LiveMessage, Row};

/// Start of the window and key of a row, as in [`Row`].
pub type RowKey = (Option<String>, Option<String>);

/// The rows of one org, by view, window and key.
///
/// ```
/// use meterr_connectors::changes::LiveMessage;
/// use meterr_connectors::org_state::OrgState;
///
/// let snapshot: LiveMessage = serde_json::from_str(
///     r#"{"kind":"snapshot","shard":3,"epoch":17,"as_of":"3:118","org":"acme",
///         "views":{"org_all":[[null,null,2,"0.15",0,[1000]]]}}"#,
/// )?;
/// let mut state = OrgState::default();
/// state.apply(snapshot);
/// assert_eq!(state.figures("org_all", None, None).unwrap().events, 2);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OrgState {
    at: Option<StreamId>,
    as_of: Positions,
    views: BTreeMap<String, BTreeMap<RowKey, Figures>>,
}

impl OrgState {
    /// Takes in a whole message: a snapshot replaces everything, a change replaces the rows it has.
    /// Messages have to come in the order in which a subscriber gets them.
    pub fn apply(&mut self, message: LiveMessage) {
        let LiveMessage { kind, shard, epoch, as_of, views, .. } = message;
        (self.at, self.as_of) = (Some(StreamId { shard, epoch }), as_of);
        match kind {
            LiveKind::Current => return,
            LiveKind::Snapshot => self.views.clear(),
            LiveKind::Change => {}
        }
        for (view, rows) in views {
            let kept = self.views.entry(view).or_default();
            for Row { window_start, key, figures } in rows {
                let at = (window_start, key);
                if carries_something(&figures) {
                    kept.insert(at, figures);
                } else {
                    kept.remove(&at);
                }
            }
        }
        self.views.retain(|_, rows| !rows.is_empty());
    }

    /// Shard and epoch the rows are valid at; none before the first message.
    pub fn at(&self) -> Option<StreamId> {
        self.at
    }

    /// Positions included.
    pub fn as_of(&self) -> &Positions {
        &self.as_of
    }

    /// Names of the views that have rows.
    pub fn views(&self) -> impl Iterator<Item = &str> {
        self.views.keys().map(String::as_str)
    }

    /// Rows of a view, by window start and key as texts.
    pub fn rows(&self, view: &str) -> impl Iterator<Item = (&RowKey, &Figures)> {
        self.views.get(view).into_iter().flatten()
    }

    /// Figures of one row; none when it carries nothing.
    pub fn figures(
        &self,
        view: &str,
        window_start: Option<&str>,
        key: Option<&str>,
    ) -> Option<&Figures> {
        let at = (window_start.map(str::to_owned), key.map(str::to_owned));
        self.views.get(view)?.get(&at)
    }
}

/// Whether a row says anything. A cost of nothing, as of a model that is free, does not.
fn carries_something(figures: &Figures) -> bool {
    let cost = figures.cost.filter(|cost| cost.get() != 0);
    Figures { cost, ..*figures } != Figures::default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(kind: &str, epoch: u64, views: &str) -> LiveMessage {
        let text = format!(
            "{{\"kind\":\"{kind}\",\"shard\":3,\"epoch\":{epoch},\"as_of\":\"3:{epoch}\",\
             \"org\":\"acme\",\"views\":{views}}}"
        );
        serde_json::from_str(&text).unwrap()
    }

    fn shown(state: &OrgState, view: &str) -> Vec<(Option<String>, i64)> {
        state.rows(view).map(|((_, key), figures)| (key.clone(), figures.events)).collect()
    }

    #[test]
    fn rows_are_replaced_removed_and_begun_anew() {
        let key = |key: &str| Some(key.to_owned());
        let mut state = OrgState::default();
        assert_eq!((state.at(), state.views().count()), (None, 0));
        let rows = r#"{"org_all":[[null,null,3,"1",0,[5]]],
            "user_day":[["d","u",1,"0.5",0,[5]],["d","v",2,"0.5",0,[]]]}"#;
        state.apply(message("snapshot", 7, rows));
        assert_eq!(shown(&state, "user_day"), [(key("u"), 1), (key("v"), 2)]);
        // All of one user's events are taken back; of the other's, some tokens remain to be seen.
        let rows = r#"{"user_day":[["d","u",0,"0",0,[]],["d","v",0,null,0,[0,0,0,0,-1]]]}"#;
        state.apply(message("change", 9, rows));
        assert_eq!(shown(&state, "user_day"), [(key("v"), 0)]);
        assert_eq!(shown(&state, "org_all"), [(None, 3)]);
        state.apply(message("current", 11, "{}"));
        assert_eq!(state.at().map(|at| at.epoch), Some(11));
        assert_eq!(state.as_of().to_string(), "3:11");
        assert!(state.figures("user_day", Some("d"), Some("u")).is_none());
        assert_eq!(state.figures("user_day", Some("d"), Some("v")).unwrap().output_tokens, -1);
        // Views without rows are gone.
        state.apply(message("change", 12, r#"{"user_day":[["d","v",0,null,0,[]]]}"#));
        assert_eq!(state.views().collect::<Vec<_>>(), ["org_all"]);
        state.apply(message("snapshot", 15, r#"{"model_day":[["d","m",1,null,1,[]]]}"#));
        assert_eq!(state.views().collect::<Vec<_>>(), ["model_day"]);
    }
}
