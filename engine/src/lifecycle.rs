//! The life of a shard on this node. Pure: a state and what happened in, the next state and what to
//! do out; the shard's actor does it.
//!
//! ```text
//!            ┌──────────────────────────── lost (another node took it over)
//!            │
//! claim ─► restore ─► replay ─► stand by ─► seal ─► live ─► drain ─► released (the node stops)
//!            ▲                     ▲ ▲        │       │
//!            │ after a failure     │ └────────┘       ▼
//!            │                     └─ hand over ◄─ release
//!            └───────────── any ─► stopped (an operator must look)
//! ```
//!
//! On a node with logs of its own every shard is to be owned from the start. In a cluster its leases
//! say what is wanted ([`Wanted`]).

use std::time::Duration;

/// Where a shard is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Nothing of it is here.
    Claim,
    /// Its checkpoint is being loaded.
    Restore,
    /// Its log is read on from the checkpoint.
    Replay,
    /// It follows its owner's commits.
    StandBy,
    /// It is being taken over.
    Seal,
    /// At work.
    Live,
    /// Finishing the commit under way, to be handed over.
    Release,
    /// Finished; another node may take it over.
    HandOver,
    /// Finishing what came in.
    Drain,
    /// Done.
    Released,
    /// Another node took it over.
    Lost,
    /// Stopped for this reason.
    Stopped(String),
}

impl State {
    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            State::Claim => "claim",
            State::Restore => "restore",
            State::Replay => "replay",
            State::StandBy => "stand_by",
            State::Seal => "seal",
            State::Live => "live",
            State::Release => "release",
            State::HandOver => "hand_over",
            State::Drain => "drain",
            State::Released => "released",
            State::Lost => "lost",
            State::Stopped(_) => "stopped",
        }
    }
}

/// What is wanted of a shard on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// To follow its owner.
    StandBy,
    /// To be owned under at least this token.
    Own(u64),
    /// To be owned no more, and to stand by for whoever takes it over.
    Release,
    /// To be let go of.
    Drop,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happened {
    /// Something else is wanted.
    Want(Wanted),
    /// Replay goes on.
    Replaying,
    /// The shard is rebuilt and stands by.
    Opened,
    /// The shard is sealed and owned.
    Owned,
    /// It could not be sealed: another node committed in between.
    Overtaken,
    /// The shard is owned no more and stands by.
    HandedOver,
    /// The shard committed something, or took in what its owner committed.
    Committed,
    /// Another node owns it: a commit was refused.
    TakenOver,
    /// The shard stopped; whether trying again may help.
    Stopped {
        /// Why.
        reason: String,
        /// Whether trying again may help.
        transient: bool,
    },
    /// The server of its logs is away.
    Away {
        /// What was tried.
        reason: String,
    },
    /// Its thread died; whether it was this shard that was worked on.
    ThreadDied {
        /// Whether it was worked on.
        culprit: bool,
        /// What the panic said.
        reason: String,
    },
    /// The node drains.
    Drain,
    /// The worker finished it.
    Drained,
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Tell the worker to open it, after a while, for what is wanted by then.
    OpenAfter(Duration),
    /// Tell the worker to take it over under this token.
    OwnIt(u64),
    /// Tell the worker to commit no more.
    ReleaseIt,
    /// Tell the worker to let go of it.
    DropIt,
    /// Tell the worker to finish it.
    DrainIt,
    /// Begin to read its usage log, unless that goes on.
    StartReader,
    /// Begin to read its owner's commits, unless that goes on.
    StartFollowing,
    /// Stop reading commits.
    StopFollowing,
    /// Stop reading anything.
    StopReaders,
    /// Say that an operator must look.
    RaiseAlarm(String),
}

/// Failures in a row after which a shard is left alone.
pub const FAILURES_MAX: u32 = 5;

/// A shard's life.
#[derive(Debug, Clone)]
pub struct Lifecycle {
    state: State,
    /// Token under which it is to be owned, if it is.
    goal: Option<u64>,
    /// Failures since the last commit.
    failures: u32,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Lifecycle { state: State::Claim, goal: None, failures: 0 }
    }
}

impl Lifecycle {
    /// Where it is.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Token under which it is owned or to be owned.
    pub fn goal(&self) -> Option<u64> {
        self.goal
    }

    /// Takes in what happened.
    pub fn on(&mut self, happened: Happened) -> Vec<Action> {
        use Action::*;
        match (&self.state, happened) {
            (State::Released, _) => Vec::new(),
            (_, Happened::Want(wanted)) => self.want(wanted),
            // What a shard that was let go of still says.
            (State::Claim | State::Lost | State::Stopped(_), Happened::Drain) => {
                self.state = State::Released;
                Vec::new()
            }
            (State::Claim | State::Lost, _) => Vec::new(),
            (State::Restore, Happened::Replaying) => {
                self.state = State::Replay;
                Vec::new()
            }
            (_, Happened::Replaying) => Vec::new(),
            (State::Drain, Happened::Opened) => vec![DrainIt],
            (State::Release, Happened::Opened) => vec![StopReaders, StartReader, StartFollowing],
            (State::Stopped(_), Happened::Opened) => Vec::new(),
            (_, Happened::Opened) if self.goal.is_some() => {
                // The worker goes on to seal it.
                self.state = State::Seal;
                Vec::new()
            }
            (_, Happened::Opened) => {
                self.state = State::StandBy;
                vec![StopReaders, StartReader, StartFollowing]
            }
            (State::Restore | State::Replay | State::Seal, Happened::Owned)
                if self.goal.is_some() =>
            {
                self.state = State::Live;
                vec![StopFollowing, StartReader]
            }
            (_, Happened::Owned) => Vec::new(),
            (State::Seal, Happened::Overtaken) => vec![StartReader, StartFollowing],
            (_, Happened::Overtaken) => Vec::new(),
            (State::Release, Happened::HandedOver) => {
                self.state = State::HandOver;
                vec![StartReader, StartFollowing]
            }
            (_, Happened::HandedOver) => Vec::new(),
            (_, Happened::Committed) => {
                self.failures = 0;
                Vec::new()
            }
            (State::Stopped(_), Happened::TakenOver) => Vec::new(),
            (State::Drain, Happened::TakenOver) => {
                self.state = State::Released;
                vec![StopReaders]
            }
            (_, Happened::TakenOver) => {
                self.state = State::Lost;
                self.goal = None;
                vec![StopReaders]
            }
            (_, Happened::Stopped { reason, transient: false }) => self.stop(reason),
            (_, Happened::Stopped { reason, transient: true }) => self.retry(reason, true),
            (_, Happened::Away { reason }) => self.wait(reason),
            (_, Happened::ThreadDied { culprit, reason }) => self.retry(reason, culprit),
            (State::Drain, Happened::Drain) => Vec::new(),
            (State::Restore | State::Replay, Happened::Drain) => {
                self.state = State::Drain;
                vec![DrainIt]
            }
            (_, Happened::Drain) => {
                self.state = State::Drain;
                vec![StopReaders, DrainIt]
            }
            (_, Happened::Drained) => {
                self.state = State::Released;
                vec![StopReaders]
            }
        }
    }

    fn want(&mut self, wanted: Wanted) -> Vec<Action> {
        use Action::*;
        match (&self.state, wanted) {
            (State::Released | State::Drain, _) => Vec::new(),
            (_, Wanted::Drop) => {
                *self = Lifecycle::default();
                vec![StopReaders, DropIt]
            }
            (State::Stopped(_), _) => Vec::new(),
            (State::Claim | State::Lost, Wanted::Release) => Vec::new(),
            (State::Claim | State::Lost, wanted) => {
                self.goal = match wanted {
                    Wanted::Own(token) => Some(token),
                    _ => None,
                };
                self.state = State::Restore;
                vec![OpenAfter(Duration::ZERO)]
            }
            (State::HandOver, Wanted::StandBy) => {
                self.state = State::StandBy;
                Vec::new()
            }
            (_, Wanted::StandBy) => Vec::new(),
            (_, Wanted::Own(token)) if self.goal.is_some_and(|goal| goal >= token) => Vec::new(),
            (State::Restore | State::Replay, Wanted::Own(token)) => {
                self.goal = Some(token);
                vec![OwnIt(token)]
            }
            (_, Wanted::Own(token)) => {
                self.goal = Some(token);
                self.state = State::Seal;
                vec![OwnIt(token)]
            }
            (State::StandBy, Wanted::Release) => {
                self.state = State::HandOver;
                Vec::new()
            }
            (State::Release | State::HandOver, Wanted::Release) => Vec::new(),
            // Nothing is sealed. It goes on opening, perhaps later, and then stands by.
            (State::Restore | State::Replay, Wanted::Release) => {
                self.goal = None;
                vec![ReleaseIt]
            }
            (_, Wanted::Release) => {
                self.goal = None;
                self.state = State::Release;
                vec![ReleaseIt]
            }
        }
    }

    fn stop(&mut self, reason: String) -> Vec<Action> {
        let draining = self.state == State::Drain;
        let actions = vec![Action::StopReaders, Action::RaiseAlarm(reason.clone())];
        self.state = if draining { State::Released } else { State::Stopped(reason) };
        actions
    }

    /// Nobody's fault: tried again for as long as it takes.
    fn wait(&mut self, reason: String) -> Vec<Action> {
        match self.state {
            State::Stopped(_) => Vec::new(),
            State::Drain => self.stop(reason),
            _ => self.open_again(Duration::from_secs(1)),
        }
    }

    fn retry(&mut self, reason: String, blamed: bool) -> Vec<Action> {
        if matches!(self.state, State::Stopped(_)) {
            return Vec::new();
        }
        if self.state == State::Drain {
            return self.stop(reason);
        }
        self.failures += u32::from(blamed);
        if self.failures >= FAILURES_MAX {
            return self.stop(format!("{reason} ({FAILURES_MAX} times without a commit between)"));
        }
        let wait = Duration::from_millis(100) * (1 << self.failures.min(6)) / 2;
        self.open_again(if blamed { wait } else { Duration::ZERO })
    }

    fn open_again(&mut self, wait: Duration) -> Vec<Action> {
        // What was being released is not owned any more: nothing of it is under way.
        self.state = State::Restore;
        vec![Action::StopReaders, Action::OpenAfter(wait)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live() -> Lifecycle {
        let mut life = Lifecycle::default();
        let own = Happened::Want(Wanted::Own(1));
        assert_eq!(life.on(own), [Action::OpenAfter(Duration::ZERO)]);
        life.on(Happened::Replaying);
        open(&mut life);
        life
    }

    fn open(life: &mut Lifecycle) {
        assert_eq!(life.on(Happened::Opened), []);
        let begun = [Action::StopFollowing, Action::StartReader];
        assert_eq!(life.on(Happened::Owned), begun);
        assert_eq!(*life.state(), State::Live);
    }

    #[test]
    fn an_ordinary_life() {
        let mut life = live();
        assert_eq!(life.on(Happened::Drain), [Action::StopReaders, Action::DrainIt]);
        life.on(Happened::Drained);
        assert_eq!(*life.state(), State::Released);
        assert_eq!(life.on(Happened::Opened), []);
    }

    #[test]
    fn a_panicking_shard_is_tried_again_but_not_for_ever() {
        let mut life = live();
        let died = || Happened::ThreadDied { culprit: true, reason: "overflow".into() };
        let mut opens = 0;
        while !matches!(life.state(), State::Stopped(_)) {
            let actions = life.on(died());
            opens += actions.iter().filter(|a| matches!(a, Action::OpenAfter(_))).count();
            if !matches!(life.state(), State::Stopped(_)) {
                open(&mut life);
            }
            assert!(opens < 10);
            if opens as u32 == FAILURES_MAX - 1 {
                let last = life.on(died());
                assert!(last.iter().any(|a| matches!(a, Action::RaiseAlarm(_))));
            }
        }
        assert_eq!(opens as u32, FAILURES_MAX - 1);
    }

    #[test]
    fn neighbours_of_a_panic_are_not_blamed_and_a_commit_forgives() {
        let mut life = live();
        for _ in 0..100 {
            let died = Happened::ThreadDied { culprit: false, reason: "x".into() };
            assert_eq!(life.on(died), [Action::StopReaders, Action::OpenAfter(Duration::ZERO)]);
            open(&mut life);
        }
        for _ in 0..100 {
            life.on(Happened::ThreadDied { culprit: true, reason: "x".into() });
            open(&mut life);
            life.on(Happened::Committed);
        }
        assert_eq!(*life.state(), State::Live);
    }

    #[test]
    fn a_server_that_is_away_is_waited_for() {
        let mut life = live();
        for _ in 0..100 {
            let away = Happened::Away { reason: "no answer".into() };
            let second = Duration::from_secs(1);
            assert_eq!(life.on(away), [Action::StopReaders, Action::OpenAfter(second)]);
        }
        open(&mut life);
        assert_eq!(*life.state(), State::Live);
    }

    /// From one node to another and back.
    #[test]
    fn a_shard_is_handed_over() {
        use Action::*;
        let want = |wanted| Happened::Want(wanted);
        let mut life = Lifecycle::default();
        assert_eq!(life.on(want(Wanted::StandBy)), [OpenAfter(Duration::ZERO)]);
        assert_eq!(life.on(Happened::Opened), [StopReaders, StartReader, StartFollowing]);
        assert_eq!(*life.state(), State::StandBy);
        assert_eq!(life.on(want(Wanted::Own(7))), [OwnIt(7)]);
        assert_eq!(life.on(want(Wanted::Own(7))), []);
        assert_eq!(life.on(Happened::Overtaken), [StartReader, StartFollowing]);
        assert_eq!(life.on(Happened::Owned), [StopFollowing, StartReader]);
        assert_eq!(life.on(want(Wanted::Release)), [ReleaseIt]);
        assert_eq!(life.on(want(Wanted::Release)), []);
        assert_eq!(*life.state(), State::Release);
        assert_eq!(life.on(Happened::HandedOver), [StartReader, StartFollowing]);
        assert_eq!((life.state(), life.goal()), (&State::HandOver, None));
        // Whoever was to get it is gone.
        assert_eq!(life.on(want(Wanted::Own(9))), [OwnIt(9)]);
        assert_eq!(life.on(Happened::HandedOver), [], "said before it heard");
        life.on(Happened::Owned);
        assert_eq!((life.state(), life.goal()), (&State::Live, Some(9)));
        assert_eq!(life.on(Happened::TakenOver), [StopReaders]);
        assert_eq!((life.state(), life.goal()), (&State::Lost, None));
        assert_eq!(life.on(Happened::Opened), [], "a late word");
        assert_eq!(life.on(want(Wanted::Own(12))), [OpenAfter(Duration::ZERO)]);
        assert_eq!(life.on(want(Wanted::Drop)), [StopReaders, DropIt]);
        assert_eq!(*life.state(), State::Claim);
        assert_eq!(life.on(Happened::Drain), []);
        assert_eq!(*life.state(), State::Released);
    }

    /// Whatever happens in whatever order, only a drain ends a life, an alarm stays until the shard is
    /// let go of, and a reader never runs beside a shard that is not here.
    #[test]
    fn no_order_of_things_confuses_it() {
        let happened = |n: u64| match n % 16 {
            0 => Happened::Want(Wanted::StandBy),
            1 => Happened::Want(Wanted::Own(n / 16)),
            2 => Happened::Want(Wanted::Release),
            3 => Happened::Want(Wanted::Drop),
            4 => Happened::Replaying,
            5 | 6 => Happened::Opened,
            7 | 8 => Happened::Owned,
            9 => Happened::Overtaken,
            10 => Happened::HandedOver,
            11 => Happened::TakenOver,
            12 => Happened::Away { reason: "x".into() },
            13 => Happened::ThreadDied { culprit: n.is_multiple_of(3), reason: "x".into() },
            14 => Happened::Stopped { reason: "x".into(), transient: n.is_multiple_of(2) },
            _ => Happened::Committed,
        };
        let mut rng = meterr_operators::rng::Rng::stream(1, 0);
        for _ in 0..2_000 {
            let mut life = Lifecycle::default();
            let (mut reading, mut following) = (false, false);
            for _ in 0..100 {
                let before = life.state().clone();
                for action in life.on(happened(rng.bits() % 1_600)) {
                    match action {
                        Action::StartReader => reading = true,
                        Action::StartFollowing => following = true,
                        Action::StopFollowing => following = false,
                        Action::StopReaders => (reading, following) = (false, false),
                        _ => {}
                    }
                }
                let gone = matches!(life.state(), State::Claim | State::Lost | State::Stopped(_));
                assert!(!gone || !(reading || following), "{before:?} to {:?}", life.state());
                assert!(*life.state() != State::Live || (reading && life.goal().is_some()));
                assert!(*life.state() != State::StandBy || following);
                assert_ne!(*life.state(), State::Released);
            }
            life.on(Happened::Drain);
            life.on(Happened::Drained);
            assert_eq!(*life.state(), State::Released);
        }
    }

    #[test]
    fn an_alarm_stays() {
        let mut life = live();
        let stopped = Happened::Stopped { reason: "rolled back".into(), transient: false };
        assert!(life.on(stopped).contains(&Action::RaiseAlarm("rolled back".into())));
        life.on(Happened::ThreadDied { culprit: false, reason: "x".into() });
        assert_eq!(*life.state(), State::Stopped("rolled back".into()));
        life.on(Happened::Drain);
        assert_eq!(*life.state(), State::Released);
    }
}
