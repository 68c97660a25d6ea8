//! The one table of questions that can be asked on NATS: what the service subscribes to, how a
//! request is read, and what the AsyncAPI document must name.
//!
//! What concerns one org stands under `meterr.query.<org>`, so that permissions can let an org's own
//! programs ask about that org and nothing else: the org of the subject counts, and no parameter can
//! name another. What concerns the deployment, or changes anything, stands under `meterr.admin`.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::subjects::pattern;
use crate::requests::parameters::{self, Parameters};
use crate::requests::problem::Problem;
use crate::requests::{Desk, dead_letters, live, parsed, prices, spend, views};

/// A question that can be asked.
#[derive(Debug)]
pub struct Endpoint {
    /// Name in the service's description.
    pub name: &'static str,
    /// Its subject; `{org}` and `{node}` stand for one token each.
    pub address: &'static str,
    /// Members a request may have.
    pub members: &'static [&'static str],
    pub(super) ask: Ask,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    CatchUp,
    Spend,
    View,
    Unpriced,
    TimeZone,
    Top,
    Status,
    Cluster,
    Drain,
    Move,
    Prices,
    SetPrices,
    PreviewPrices,
    Views,
    DeclareView,
    RemoveView,
    SetTimeZone,
    DeadLetters,
    DeadLetter,
    ReplayDeadLetter,
}

const fn endpoint(
    name: &'static str,
    address: &'static str,
    members: &'static [&'static str],
    ask: Ask,
) -> Endpoint {
    Endpoint { name, address, members, ask }
}

/// Members of a request for spend.
const SPEND: &[&str] =
    &["user", "window", "from", "to", "by", "min_position", "timeout_ms", "limit", "cursor"];
/// Members of a request for the rows of a declared view.
const VIEW: &[&str] = &["name", "from", "to", "min_position", "timeout_ms", "limit", "cursor"];

/// Every question.
pub static ENDPOINTS: [Endpoint; 22] = [
    endpoint("live", "meterr.query.{org}", live::CATCH_UP, Ask::CatchUp),
    endpoint("spend", "meterr.query.{org}.spend", SPEND, Ask::Spend),
    endpoint("view", "meterr.query.{org}.view", VIEW, Ask::View),
    endpoint("spend-page", "meterr.query.{org}.spend.{node}", SPEND, Ask::Spend),
    endpoint("view-page", "meterr.query.{org}.view.{node}", VIEW, Ask::View),
    endpoint("unpriced", "meterr.query.{org}.unpriced", spend::UNPRICED, Ask::Unpriced),
    endpoint("time-zone", "meterr.query.{org}.time-zone", &[], Ask::TimeZone),
    endpoint("top", "meterr.admin.top", spend::TOP, Ask::Top),
    endpoint("status", "meterr.admin.status", &[], Ask::Status),
    endpoint("cluster", "meterr.admin.cluster", &[], Ask::Cluster),
    endpoint("cluster-drain", "meterr.admin.cluster.drain", &["node", "drain"], Ask::Drain),
    endpoint("cluster-move", "meterr.admin.cluster.move", &["shard", "node"], Ask::Move),
    endpoint("prices", "meterr.admin.prices", prices::PRICES, Ask::Prices),
    endpoint("prices-set", "meterr.admin.prices.set", &["prices"], Ask::SetPrices),
    endpoint("prices-preview", "meterr.admin.prices.preview", &["prices"], Ask::PreviewPrices),
    endpoint("views", "meterr.admin.views", &[], Ask::Views),
    endpoint(
        "views-declare",
        "meterr.admin.views.declare",
        &["name", "by", "window"],
        Ask::DeclareView,
    ),
    endpoint("views-remove", "meterr.admin.views.remove", &["name"], Ask::RemoveView),
    endpoint(
        "time-zone-set",
        "meterr.admin.time-zone.set",
        &["org", "time_zone"],
        Ask::SetTimeZone,
    ),
    endpoint(
        "dead-letters",
        "meterr.admin.dead-letters",
        dead_letters::DEAD_LETTERS,
        Ask::DeadLetters,
    ),
    endpoint("dead-letters-show", "meterr.admin.dead-letters.show", &["id"], Ask::DeadLetter),
    endpoint(
        "dead-letters-replay",
        "meterr.admin.dead-letters.replay",
        &["id", "event"],
        Ask::ReplayDeadLetter,
    ),
];

impl Endpoint {
    /// Whether it is about one org, which its subject names.
    pub fn of_org(&self) -> bool {
        self.address.contains("{org}")
    }

    /// Whether only one node answers it, which its subject names.
    pub fn of_node(&self) -> bool {
        self.address.contains("{node}")
    }

    /// What the node of this name subscribes to.
    pub fn pattern(&self, node: &str) -> String {
        pattern(&self.address.replace("{node}", node))
    }

    /// What to do about an answer that does not fit a message.
    pub(super) fn narrower(&self) -> &'static str {
        let has = |member| self.members.contains(&member);
        if has("limit") {
            "ask for fewer rows at once with limit"
        } else if has("n") {
            "ask for fewer rows with n"
        } else if has("model") {
            "ask for one model"
        } else {
            "raise max_payload of the NATS server, or ask over HTTP"
        }
    }

    /// Reads a request.
    pub(super) fn read(&self, subject: &str, payload: &Bytes) -> Result<Question, Problem> {
        let org = match self.of_org() {
            true => parameters::org(subject.split('.').nth(2).unwrap_or(""))?,
            false => String::new(),
        };
        // These are bodies with a form of their own, read where they are used.
        let parameters = match self.ask {
            Ask::SetPrices
            | Ask::PreviewPrices
            | Ask::DeclareView
            | Ask::ReplayDeadLetter
            | Ask::Drain
            | Ask::Move => Parameters::default(),
            _ => Parameters::from_json(payload, self.members)?,
        };
        Ok(Question { ask: self.ask, org, parameters, payload: payload.clone() })
    }
}

/// A request that was read.
#[derive(Debug)]
pub(super) struct Question {
    ask: Ask,
    org: String,
    parameters: Parameters,
    payload: Bytes,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Replay<'a> {
    id: String,
    #[serde(borrow, default)]
    event: Option<&'a RawValue>,
}

impl Question {
    /// Whether it may wait for positions that are not there yet.
    pub fn waits(&self) -> bool {
        self.parameters.text("min_position").is_some()
    }

    /// The cursor it names, if any.
    pub fn cursor(&self) -> Option<&str> {
        self.parameters.text("cursor")
    }

    /// The messages of the answer, at least one.
    pub async fn answer(self, desk: &Desk) -> Result<Vec<Bytes>, Problem> {
        let Question { ask, org, parameters, payload } = self;
        let answer = match ask {
            Ask::CatchUp => return desk.catch_up(org, &parameters).await,
            Ask::Spend => {
                let user = parameters.text("user");
                let user = user.map(|user| parameters::name("user", user)).transpose()?;
                desk.spend(org, user, &parameters).await
            }
            Ask::View => desk.view(view_name(&parameters)?, org, &parameters).await,
            Ask::Unpriced => desk.unpriced(org, &parameters).await,
            Ask::TimeZone => desk.time_zone(org).await,
            Ask::Top => desk.top(&parameters).await,
            Ask::Status => desk.status().await,
            Ask::Cluster => desk.cluster().await,
            Ask::Drain => desk.drain(parsed(&payload)?).await,
            Ask::Move => desk.move_shard(parsed(&payload)?).await,
            Ask::Prices => desk.prices(&parameters).await,
            Ask::SetPrices => desk.set_prices(&payload).await,
            Ask::PreviewPrices => desk.preview_prices(&payload).await,
            Ask::Views => desk.views().await,
            Ask::DeclareView => desk.declare_view(&payload).await,
            Ask::RemoveView => desk.remove_view(view_name(&parameters)?).await,
            Ask::SetTimeZone => {
                let org = parameters::org(parameters.required("org", parameters::ORG_FORM)?)?;
                let zone = parameters.required("time_zone", "an IANA name")?;
                desk.set_time_zone(org, zone.to_owned()).await
            }
            Ask::DeadLetters => desk.dead_letters(&parameters).await,
            Ask::DeadLetter => {
                let id = parameters.required("id", dead_letters::ID_FORM)?;
                desk.dead_letter(dead_letters::id("id", id)?).await
            }
            Ask::ReplayDeadLetter => {
                let Replay { id, event } = parsed(&payload)?;
                let id = dead_letters::id("id", &id)?;
                let event = event.map_or("", RawValue::get);
                let mended = desk.mended(event.as_bytes())?;
                desk.replay_dead_letter(id, mended).await
            }
        };
        Ok(vec![answer?])
    }
}

fn view_name(parameters: &Parameters) -> Result<String, Problem> {
    views::name(parameters.required("name", views::NAME_FORM)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn names_and_addresses_are_unique_and_subjects_do_not_overlap() {
        let names: BTreeSet<_> = ENDPOINTS.iter().map(|endpoint| endpoint.name).collect();
        let patterns: BTreeSet<_> =
            ENDPOINTS.iter().map(|endpoint| endpoint.pattern("n1")).collect();
        assert_eq!((names.len(), patterns.len()), (ENDPOINTS.len(), ENDPOINTS.len()));
        for endpoint in &ENDPOINTS {
            let first = if endpoint.of_org() { "meterr.query." } else { "meterr.admin." };
            assert!(endpoint.address.starts_with(first), "{}", endpoint.address);
            assert!(endpoint.name.bytes().all(|b| b.is_ascii_lowercase() || b == b'-'));
        }
    }

    #[test]
    fn members_are_those_of_the_shared_questions() {
        assert_eq!(SPEND[1..], *spend::SPEND);
        assert_eq!(VIEW[1..], *spend::VIEW);
    }
}
