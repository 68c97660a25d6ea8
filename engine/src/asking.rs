//! Who answers a question to a shard: this node, from a shard it owns or one that stands by, or another.
//!
//! The owner is asked first, since its state is current by itself. When it cannot be reached, what
//! stands by answers if it has what is wanted, and says how old it may be. A replica answers from what
//! it follows. While nobody can answer (a shard on the move, an owner that is gone) the question waits
//! for the newest view of the cluster and is asked again, until [`ClusterLink::patience`] is over.
//!
//! Positions are waited for by the node that answers: only there is it known what is committed. A
//! question is passed on once, so views of the cluster that disagree cannot send it round in circles.

use std::time::Duration;

use futures::FutureExt;
use meterr_connectors::api::{ApiError, ApiResult, AsOf};
use meterr_connectors::cluster::PeerError;
use meterr_operators::ids::{Positions, ShardId};
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::cluster::link::ClusterLink;
use crate::cluster::{ClusterView, Held};
use crate::lifecycle::State;
use crate::live::LiveShard;
use crate::questions::{
    Answered, NodeAnswer, NodeQuestion, Refusal, ShardAnswer, ShardQuestion, Wanted, answer,
    decode, encode, millis,
};
use crate::service::Service;
use crate::worker::Command;

/// How long an owner may be silent before what stands by is asked in its place.
const OWNER_PATIENCE: Duration = Duration::from_secs(2);
/// Until a question is asked again when no new view of the cluster comes: a node that came back and a
/// shard that was opened are not told.
const AGAIN: Duration = Duration::from_millis(100);
/// Time an answer may take on its way, beyond the wait for positions.
const ON_THE_WAY: Duration = Duration::from_millis(500);
/// Staleness of a state that was never known to be current: the largest number that every JSON reader
/// takes.
pub const STALENESS_MS_MAX: u64 = (1 << 53) - 1;

/// Whom to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Whom {
    /// The shard of this node.
    Here,
    /// Another node.
    Node(String),
    /// Nobody has it.
    Nobody,
}

/// Whether a shard that is held so answers.
pub(crate) fn answers(held: &Held) -> bool {
    match held {
        Held::Owned { live: true, .. }
        | Held::StandingBy { .. }
        | Held::Releasing
        | Held::Released => true,
        Held::Owned { live: false, .. }
        | Held::Nothing
        | Held::Opening
        | Held::Lost { .. }
        | Held::Stopped(_) => false,
    }
}

/// Whom to ask first. Pure.
pub(crate) fn first(held: &Held, owner: Option<&str>, me: &str, replica: bool) -> Whom {
    let owned = matches!(held, Held::Owned { live: true, .. });
    match owner {
        _ if owned || replica && answers(held) => Whom::Here,
        // On its way from here: what this node has is the last committed state there is.
        Some(owner) if owner == me && answers(held) => Whom::Here,
        Some(owner) if owner != me => Whom::Node(owner.to_owned()),
        _ => Whom::Nobody,
    }
}

/// Whom to ask when the first one does not answer: others that follow the shard. Pure.
pub(crate) fn second(view: &ClusterView, shard: ShardId, held: &Held, me: &str) -> Vec<Whom> {
    if answers(held) {
        return vec![Whom::Here];
    }
    let of = view.shards.get(usize::from(shard.0));
    let (owner, wanted) = of.map_or((None, None), |of| (of.owner.as_deref(), of.wanted.as_deref()));
    let replicas = view.nodes.iter().filter(|node| node.state == "replica");
    let mut others: Vec<&str> = wanted.into_iter().collect();
    others.extend(replicas.map(|node| node.node.as_str()));
    others.retain(|node| *node != me && Some(*node) != owner);
    others.truncate(2);
    others.into_iter().map(|node| Whom::Node(node.to_owned())).collect()
}

/// Why nobody answered yet.
enum Trouble {
    /// Asking others will not help.
    Final(ApiError),
    /// Another node, or the same later, may answer.
    Again(String),
}

impl Service {
    /// Asks a shard, wherever it is, once it has committed what `positions` want of it.
    pub(crate) async fn ask(
        &self,
        shard: ShardId,
        question: ShardQuestion,
        positions: Option<&Positions>,
    ) -> ApiResult<Answered> {
        self.check_positions(positions)?;
        let wanted = Wanted::of(positions, shard);
        let begun = Instant::now();
        let reached_by = begun + self.shared.min_position_timeout;
        let Some(link) = self.shared.cluster.get() else {
            let answered = self.ask_alone(shard, &question, wanted, reached_by).await;
            return answered.map_err(|refusal| self.refused(shard, refusal));
        };
        let until = begun + link.patience;
        let mut view = link.view.clone();
        loop {
            let seen = view.borrow_and_update().clone();
            let (held, owner) = (link.held(shard), seen.owner(shard));
            let whom = first(&held, owner, &link.me, link.replica);
            let mut why = match self.ask_whom(link, &whom, shard, &question, wanted, until).await {
                Ok(answered) => return Ok(answered),
                Err(Trouble::Final(error)) => return Err(error),
                Err(Trouble::Again(why)) => why,
            };
            for whom in second(&seen, shard, &link.held(shard), &link.me) {
                if whom == Whom::Here && !self.reached(shard, wanted) {
                    continue;
                }
                match self.ask_whom(link, &whom, shard, &question, wanted, until).await {
                    Ok(answered) => return Ok(answered),
                    Err(Trouble::Final(ApiError::Timeout { .. })) => {}
                    Err(Trouble::Final(error)) => return Err(error),
                    Err(Trouble::Again(other)) => why = format!("{why}; {other}"),
                }
            }
            if Instant::now() >= until {
                return Err(ApiError::Unavailable(format!("shard {shard} has no answer: {why}")));
            }
            let again = until.min(Instant::now() + AGAIN);
            tokio::select! {
                // The sender is gone when the node stops; then time is what ends this.
                Ok(()) = view.changed() => {}
                () = sleep_until(again) => {}
            }
        }
    }

    /// Asks a shard of a node that has all of them, waiting while it is being opened.
    async fn ask_alone(
        &self,
        shard: ShardId,
        question: &ShardQuestion,
        wanted: Wanted,
        until: Instant,
    ) -> Result<Answered, Refusal> {
        let mut progress = self.shared.progress[usize::from(shard.0)].clone();
        loop {
            progress.mark_unchanged();
            // Looked at before: once it is open there is nothing to wait for.
            let opening = matches!(
                self.shared.states[usize::from(shard.0)].lock().0,
                State::Claim | State::Restore | State::Replay | State::Seal | State::StandBy
            );
            let answered = self.ask_here(shard, question, wanted, until, None).await;
            let missing = matches!(answered, Err(Refusal::NotHere { .. }));
            if !missing || !opening || Instant::now() >= until {
                return answered;
            }
            let again = until.min(Instant::now() + AGAIN);
            tokio::select! {
                Ok(()) = progress.changed() => {}
                () = sleep_until(again) => {}
            }
        }
    }

    /// Asks every shard, and joins what the answers count up to.
    pub(crate) async fn ask_all(
        &self,
        question: ShardQuestion,
        positions: Option<&Positions>,
    ) -> ApiResult<(Vec<ShardAnswer>, AsOf)> {
        let asked = self.all_shards().map(|shard| self.ask(shard, question.clone(), positions));
        let mut as_of = AsOf::default();
        let mut answers = Vec::new();
        let mut late = false;
        for answered in futures::future::join_all(asked).await {
            match answered {
                Ok(answered) => {
                    as_of.join(answered.as_of);
                    answers.push(answered.answer);
                }
                Err(ApiError::Timeout { current }) => {
                    late = true;
                    as_of.join(AsOf { as_of: current, ..AsOf::default() });
                }
                Err(error) => return Err(error),
            }
        }
        if late {
            return Err(ApiError::Timeout { current: as_of.as_of });
        }
        Ok((answers, as_of))
    }

    fn check_positions(&self, positions: Option<&Positions>) -> ApiResult<()> {
        let shards = self.shared.logs.len();
        let named = positions.into_iter().flat_map(|positions| &positions.shards);
        match named.map(|(shard, _)| shard).find(|shard| usize::from(shard.0) >= shards) {
            None => Ok(()),
            Some(shard) => {
                Err(ApiError::Invalid(format!("position names shard {shard}, which there is not")))
            }
        }
    }

    fn reached(&self, shard: ShardId, wanted: Wanted) -> bool {
        wanted.reached(&self.shared.progress[usize::from(shard.0)].borrow())
    }

    async fn ask_whom(
        &self,
        link: &ClusterLink,
        whom: &Whom,
        shard: ShardId,
        question: &ShardQuestion,
        wanted: Wanted,
        until: Instant,
    ) -> Result<Answered, Trouble> {
        let reached_by = until.min(Instant::now() + self.shared.min_position_timeout);
        match whom {
            Whom::Nobody => Err(Trouble::Again(nobody(link, shard))),
            Whom::Here => {
                let answered = self.ask_here(shard, question, wanted, reached_by, Some(link)).await;
                answered.map_err(|refusal| match refusal {
                    Refusal::NotHere { why } => Trouble::Again(why),
                    refusal => Trouble::Final(self.refused(shard, refusal)),
                })
            }
            Whom::Node(node) => {
                let question = NodeQuestion::Shard {
                    shard,
                    wanted,
                    wait_ms: millis(reached_by.saturating_duration_since(Instant::now())),
                    question: Box::new(question.clone()),
                };
                let mut view = link.view.clone();
                let owner = link.owner(shard);
                let lost = async {
                    let moved = view.wait_for(|view| view.owner(shard) != owner.as_deref());
                    let gone = moved.await.is_err();
                    if gone {
                        futures::future::pending::<()>().await;
                    }
                };
                let silent = async {
                    // Worth it only if something here could answer in the owner's place.
                    sleep_until(Instant::now() + OWNER_PATIENCE).await;
                    if !answers(&link.held(shard)) || !self.reached(shard, wanted) {
                        futures::future::pending::<()>().await;
                    }
                };
                let answer = tokio::select! {
                    biased;
                    answer = self.ask_node(link, node, &question, until) => answer?,
                    () = lost => {
                        return Err(Trouble::Again("it changed hands meanwhile".to_owned()));
                    }
                    () = silent => {
                        return Err(Trouble::Again(format!("its owner {node:?} is silent")));
                    }
                };
                match answer {
                    NodeAnswer::Shard(answered) if answered.in_bounds() => Ok(answered),
                    NodeAnswer::Refused(Refusal::NotHere { why }) => {
                        Err(Trouble::Again(format!("node {node:?}: {why}")))
                    }
                    NodeAnswer::Refused(refusal) => {
                        Err(Trouble::Final(self.refused(shard, refusal)))
                    }
                    NodeAnswer::Shard(_) | NodeAnswer::Status(_) => {
                        Err(Trouble::Final(strange(shard)))
                    }
                }
            }
        }
    }

    async fn ask_node(
        &self,
        link: &ClusterLink,
        node: &str,
        question: &NodeQuestion,
        until: Instant,
    ) -> Result<NodeAnswer, Trouble> {
        let question = encode(question).map_err(|why| {
            Trouble::Final(ApiError::Invalid(format!("the question is not sent: {why}")))
        })?;
        let timeout = until.saturating_duration_since(Instant::now()) + ON_THE_WAY;
        let answer = link.peers.ask(node, question, timeout).await;
        let answer = answer.map_err(|error: PeerError| Trouble::Again(error.to_string()))?;
        decode(&answer).map_err(|why| {
            Trouble::Final(ApiError::Unavailable(format!(
                "the answer of node {node:?} cannot be read: {why}"
            )))
        })
    }

    /// Asks another node something of its own, for at most `timeout`.
    pub(crate) async fn ask_other(
        &self,
        link: &ClusterLink,
        node: &str,
        question: &NodeQuestion,
        timeout: Duration,
    ) -> Result<NodeAnswer, String> {
        let asked = self.ask_node(link, node, question, Instant::now() + timeout).await;
        asked.map_err(|trouble| match trouble {
            Trouble::Final(error) => error.to_string(),
            Trouble::Again(why) => why,
        })
    }

    /// Asks what this node has of a shard, once it has committed what is wanted.
    pub(crate) async fn ask_here(
        &self,
        shard: ShardId,
        question: &ShardQuestion,
        wanted: Wanted,
        reached_by: Instant,
        link: Option<&ClusterLink>,
    ) -> Result<Answered, Refusal> {
        let mut progress = self.shared.progress[usize::from(shard.0)].clone();
        let reached = progress.wait_for(|progress| wanted.reached(progress)).map(|r| r.is_ok());
        let reached = timeout_at(reached_by, reached);
        let reached = match link {
            None => reached.await,
            // A shard that is let go meanwhile will never get there.
            Some(link) => tokio::select! {
                biased;
                reached = reached => reached,
                why = self.let_go(link, shard) => return Err(Refusal::NotHere { why }),
            },
        };
        if !matches!(reached, Ok(true)) {
            return Err(Refusal::Late { current: self.current(shard) });
        }
        let question = question.clone();
        let asked = self.run_here(shard, move |live| answer(live, &question));
        let mut answered = asked.await?;
        if let Some(link) = link
            && !matches!(link.held(shard), Held::Owned { live: true, .. })
        {
            let staleness = (link.staleness)(shard).map_or(STALENESS_MS_MAX, millis);
            answered.as_of.staleness_ms = Some(staleness.min(STALENESS_MS_MAX));
        }
        Ok(answered)
    }

    /// Runs something on a shard of this node between commits.
    pub(crate) async fn run_here<T: Send + 'static>(
        &self,
        shard: ShardId,
        run: impl FnOnce(&mut LiveShard) -> T + Send + 'static,
    ) -> Result<T, Refusal> {
        let (answer_to, asked) = oneshot::channel();
        let query = Box::new(move |live: &mut LiveShard| {
            // Whoever asked may have gone.
            drop(answer_to.send(run(live)));
        });
        self.shared.tell(shard, Command::Query(shard, query)).await;
        asked.await.map_err(|_| Refusal::NotHere { why: self.not_live(shard) })
    }

    /// Resolves when this node has nothing of a shard any more that could answer.
    async fn let_go(&self, link: &ClusterLink, shard: ShardId) -> String {
        let mut view = link.view.clone();
        loop {
            if !answers(&link.held(shard)) && !self.opening(link, shard) {
                return self.not_live(shard);
            }
            tokio::select! {
                Ok(()) = view.changed() => {}
                () = sleep_until(Instant::now() + AGAIN) => {}
            }
        }
    }

    fn opening(&self, link: &ClusterLink, shard: ShardId) -> bool {
        matches!(link.held(shard), Held::Owned { live: false, .. })
    }

    pub(crate) fn refused(&self, shard: ShardId, refusal: Refusal) -> ApiError {
        match refusal {
            Refusal::NotHere { why } => ApiError::Unavailable(why),
            Refusal::Late { current } => ApiError::Timeout { current },
            Refusal::Unreadable { why } => ApiError::Unavailable(format!(
                "the node that has shard {shard} cannot read the question: {why}"
            )),
        }
    }

    /// What a shard is here, as a sentence.
    pub(crate) fn not_live(&self, shard: ShardId) -> String {
        let (state, problem) = self.shared.states[usize::from(shard.0)].lock().clone();
        let problem = problem.map(|problem| format!(": {problem}")).unwrap_or_default();
        format!("shard {shard} is in state {:?}{problem}", state.name())
    }

    fn current(&self, shard: ShardId) -> Positions {
        let progress = *self.shared.progress[usize::from(shard.0)].borrow();
        let mut current = Positions { control: Some(progress.control), ..Positions::default() };
        current.raise(shard, progress.usage);
        current
    }
}

/// Why there is nobody to ask.
fn nobody(link: &ClusterLink, shard: ShardId) -> String {
    let view = link.view.borrow();
    let of = view.shards.get(usize::from(shard.0));
    let wanted = of.and_then(|of| of.wanted.as_deref());
    match (of.and_then(|of| of.owner.as_deref()), wanted) {
        (Some(owner), _) => format!("its owner {owner:?} (this node) is opening it"),
        (None, Some(wanted)) => format!("no node owns it; it goes to {wanted:?}"),
        (None, None) => "no node owns it".to_owned(),
    }
}

/// A node answered another question than it was asked.
pub(crate) fn strange(shard: ShardId) -> ApiError {
    ApiError::Internal(format!("shard {shard} gave an answer that does not fit the question"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::ShardView;

    const STANDS_BY: Held = Held::StandingBy { behind: 0 };
    const OWNED: Held = Held::Owned { token: 7, live: true };
    const TAKING: Held = Held::Owned { token: 7, live: false };

    #[test]
    fn the_owner_is_asked_first_and_a_replica_asks_itself() {
        let n2 = || Whom::Node("n2".to_owned());
        for (held, owner, replica, expected) in [
            (OWNED, Some("n1"), false, Whom::Here),
            // The view may be behind what this node knows of itself.
            (OWNED, Some("n2"), false, Whom::Here),
            (STANDS_BY, Some("n2"), false, n2()),
            (STANDS_BY, Some("n2"), true, Whom::Here),
            (Held::Opening, Some("n2"), true, n2()),
            (Held::Nothing, Some("n2"), false, n2()),
            (Held::Lost { token: 0 }, Some("n2"), false, n2()),
            (Held::Released, Some("n1"), false, Whom::Here),
            (Held::Released, Some("n2"), false, n2()),
            (TAKING, Some("n1"), false, Whom::Nobody),
            (STANDS_BY, None, false, Whom::Nobody),
            (Held::Nothing, None, true, Whom::Nobody),
        ] {
            assert_eq!(first(&held, owner, "n1", replica), expected, "{held:?} {owner:?}");
        }
    }

    #[test]
    fn who_follows_is_asked_second() {
        let shard = ShardId(0);
        let node = |name: &str, state: &str| crate::cluster::NodeView {
            node: name.to_owned(),
            state: state.to_owned(),
            capacity: 1.0,
            http: String::new(),
            version: String::new(),
            heard_ms: 0,
            shards: Vec::new(),
        };
        let view = ClusterView {
            node: "n1".to_owned(),
            nodes: vec![node("n1", "up"), node("n2", "silent"), node("r1", "replica")],
            shards: vec![ShardView {
                shard,
                owner: Some("n2".to_owned()),
                token: 1,
                wanted: Some("n3".to_owned()),
                pinned: None,
            }],
        };
        assert_eq!(second(&view, shard, &STANDS_BY, "n1"), [Whom::Here]);
        let others = ["n3", "r1"].map(|node| Whom::Node(node.to_owned()));
        assert_eq!(second(&view, shard, &Held::Nothing, "n1"), others);
        assert_eq!(second(&view, shard, &Held::Nothing, "r1"), others[..1]);
        assert_eq!(second(&view, ShardId(9), &Held::Nothing, "r1"), []);
    }
}
