//! The life of a shard on this node. Pure: a state and what happened in, the next state and what to
//! do out; the shard's actor does it.
//!
//! ```text
//! claim ─► restore ─► replay ─► live ─► drain ─► released
//!             └───────────┴───────┴──────► stopped (an operator must look)
//! ```
//!
//! Claiming is the data directory's lock and sealing part of opening, as long as one process owns all
//! shards; leases will come between.

use std::time::Duration;

/// Where a shard is in its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Not begun.
    Claim,
    /// Its checkpoint is being loaded.
    Restore,
    /// Its log is read on from the checkpoint.
    Replay,
    /// At work.
    Live,
    /// Finishing what came in.
    Drain,
    /// Done.
    Released,
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
            State::Live => "live",
            State::Drain => "drain",
            State::Released => "released",
            State::Stopped(_) => "stopped",
        }
    }
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Happened {
    /// The node started.
    Start,
    /// Replay goes on.
    Replaying,
    /// The shard is open.
    Opened,
    /// The shard committed something.
    Committed,
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
    /// Tell the worker to open it, after a while.
    OpenAfter(Duration),
    /// Begin to read its log.
    StartReader,
    /// Stop reading its log.
    StopReader,
    /// Tell the worker to finish it.
    DrainWorker,
    /// Say that an operator must look.
    RaiseAlarm(String),
}

/// Failures in a row after which a shard is left alone.
pub const FAILURES_MAX: u32 = 5;

/// A shard's life.
#[derive(Debug, Clone)]
pub struct Lifecycle {
    state: State,
    /// Failures since the last commit.
    failures: u32,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Lifecycle { state: State::Claim, failures: 0 }
    }
}

impl Lifecycle {
    /// Where it is.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// Takes in what happened.
    pub fn on(&mut self, happened: Happened) -> Vec<Action> {
        use Action::*;
        if self.state == State::Released {
            return Vec::new();
        }
        match happened {
            Happened::Start => {
                self.state = State::Restore;
                vec![OpenAfter(Duration::ZERO)]
            }
            Happened::Replaying => {
                if self.state == State::Restore {
                    self.state = State::Replay;
                }
                Vec::new()
            }
            Happened::Opened if self.state == State::Drain => vec![DrainWorker],
            Happened::Opened => {
                self.state = State::Live;
                vec![StartReader]
            }
            Happened::Committed => {
                self.failures = 0;
                Vec::new()
            }
            Happened::Stopped { reason, transient: false } => self.stop(reason),
            Happened::Stopped { reason, transient: true } => self.retry(reason, true),
            Happened::Away { reason } => self.wait(reason),
            Happened::ThreadDied { culprit, reason } => self.retry(reason, culprit),
            Happened::Drain => match self.state {
                State::Live => {
                    self.state = State::Drain;
                    vec![StopReader, DrainWorker]
                }
                State::Restore | State::Replay => {
                    // The worker hears it after opening, which cannot be cut short.
                    self.state = State::Drain;
                    vec![DrainWorker]
                }
                State::Claim | State::Stopped(_) => {
                    self.state = State::Released;
                    Vec::new()
                }
                State::Drain | State::Released => Vec::new(),
            },
            Happened::Drained => {
                self.state = State::Released;
                vec![StopReader]
            }
        }
    }

    fn stop(&mut self, reason: String) -> Vec<Action> {
        let draining = self.state == State::Drain;
        let actions = vec![Action::StopReader, Action::RaiseAlarm(reason.clone())];
        self.state = if draining { State::Released } else { State::Stopped(reason) };
        actions
    }

    /// Nobody's fault: tried again for as long as it takes.
    fn wait(&mut self, reason: String) -> Vec<Action> {
        match self.state {
            State::Stopped(_) => Vec::new(),
            State::Drain => self.stop(reason),
            _ => {
                self.state = State::Restore;
                vec![Action::StopReader, Action::OpenAfter(Duration::from_secs(1))]
            }
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
        self.state = State::Restore;
        let wait = Duration::from_millis(100) * (1 << self.failures.min(6)) / 2;
        vec![Action::StopReader, Action::OpenAfter(if blamed { wait } else { Duration::ZERO })]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live() -> Lifecycle {
        let mut life = Lifecycle::default();
        assert_eq!(life.on(Happened::Start), [Action::OpenAfter(Duration::ZERO)]);
        life.on(Happened::Replaying);
        assert_eq!(life.on(Happened::Opened), [Action::StartReader]);
        life
    }

    #[test]
    fn an_ordinary_life() {
        let mut life = live();
        assert_eq!(life.on(Happened::Drain), [Action::StopReader, Action::DrainWorker]);
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
            life.on(Happened::Opened);
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
            assert_eq!(life.on(died), [Action::StopReader, Action::OpenAfter(Duration::ZERO)]);
            life.on(Happened::Opened);
        }
        for _ in 0..100 {
            life.on(Happened::ThreadDied { culprit: true, reason: "x".into() });
            life.on(Happened::Opened);
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
            assert_eq!(life.on(away), [Action::StopReader, Action::OpenAfter(second)]);
        }
        life.on(Happened::Opened);
        assert_eq!(*life.state(), State::Live);
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
