//! What to do with what a shard finds at start. Pure: facts in, a plan or an alarm out.
//!
//! The log is the truth, the last commit record says up to where views were published, a checkpoint
//! saves reading the log from its beginning. Replay goes from the checkpoint to the last commit in
//! silence, epoch by epoch as the commit records cut them, since everything in there was published.
//! What stands in the log behind the last commit is new input.

use meterr_connectors::checkpoint::Manifest;

use crate::wire::Commit;

/// What was found.
#[derive(Debug)]
pub struct Facts<'a> {
    /// The checkpoint that verified, its newest manifest.
    pub checkpoint: Option<&'a Manifest>,
    /// The last commit record.
    pub commit: Option<&'a Commit>,
    /// Identity of the usage log.
    pub usage_log: &'a str,
    /// Identity of the control log.
    pub control_log: &'a str,
    /// Last durable usage position.
    pub usage_head: u64,
    /// Last durable control position.
    pub control_head: u64,
    /// Hash of the message at the checkpoint's usage position, if the log still has it.
    pub usage_hash: Option<[u8; 32]>,
}

/// What to do.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    /// Whether to load the checkpoint.
    pub load: bool,
    /// First usage position to replay.
    pub usage_from: u64,
    /// First control position to replay behind the checkpoint.
    pub control_from: u64,
    /// Position of the commit record contained in what is loaded; boundaries are read behind it.
    pub commit_from: u64,
    /// Epoch that is last committed.
    pub epoch: u64,
}

/// Why the shard must not go on: its figures would not be what was published.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Alarm {
    /// The logs are not those the checkpoint was made from.
    #[error(
        "the checkpoint belongs to {what} log {expected:?}, but this one is {found:?}; another data directory was put underneath"
    )]
    OtherLog {
        /// `usage` or `control`.
        what: &'static str,
        /// Identity in the checkpoint.
        expected: String,
        /// Identity found.
        found: String,
    },
    /// A log ends before what was already published from it.
    #[error(
        "the {what} log ends at {head}, but {published} was already published: an older state of the log was restored underneath"
    )]
    RolledBack {
        /// `usage` or `control`.
        what: &'static str,
        /// Its end.
        head: u64,
        /// Position published.
        published: u64,
    },
    /// The log has another message where the checkpoint ended.
    #[error(
        "the message at usage position {position} is not the one the checkpoint ended with: the log was changed underneath"
    )]
    OtherMessage {
        /// Position.
        position: u64,
    },
    /// The output log does not reach the checkpoint.
    #[error(
        "the checkpoint is at epoch {checkpoint}, but the output log's last commit is {commit}: an older output log was restored underneath"
    )]
    NoCommit {
        /// Epoch of the checkpoint.
        checkpoint: u64,
        /// Epoch of the last commit, 0 for none.
        commit: u64,
    },
}

/// Decides.
///
/// # Errors
/// An [`Alarm`], for an operator to look at.
pub fn plan(facts: &Facts<'_>) -> Result<Plan, Alarm> {
    let committed = facts
        .commit
        .map_or((0, 0, 0), |commit| (commit.epoch, commit.usage_position, commit.control_position));
    let (epoch, usage, control) = committed;
    for (what, head, published) in
        [("usage", facts.usage_head, usage), ("control", facts.control_head, control)]
    {
        if head < published {
            return Err(Alarm::RolledBack { what, head, published });
        }
    }
    let Some(checkpoint) = facts.checkpoint else {
        return Ok(Plan { load: false, usage_from: 1, control_from: 1, commit_from: 0, epoch });
    };
    for (what, expected, found) in [
        ("usage", &checkpoint.usage_log, facts.usage_log),
        ("control", &checkpoint.control_log, facts.control_log),
    ] {
        if expected != found {
            let (expected, found) = (expected.clone(), found.to_owned());
            return Err(Alarm::OtherLog { what, expected, found });
        }
    }
    if checkpoint.epoch > epoch {
        return Err(Alarm::NoCommit { checkpoint: checkpoint.epoch, commit: epoch });
    }
    if checkpoint.usage_position > 0 && facts.usage_hash != Some(checkpoint.usage_hash) {
        return Err(Alarm::OtherMessage { position: checkpoint.usage_position });
    }
    Ok(Plan {
        load: true,
        usage_from: checkpoint.usage_position + 1,
        control_from: checkpoint.control_position + 1,
        commit_from: checkpoint.commit_position,
        epoch,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use meterr_connectors::checkpoint::Kind;
    use meterr_operators::time::Time;

    fn manifest() -> Manifest {
        Manifest {
            format: 1,
            shard: 3,
            generation: 1,
            index: 0,
            kind: Kind::Base,
            usage_log: "u".into(),
            usage_position: 10,
            usage_hash: [1; 32],
            control_log: "c".into(),
            control_position: 2,
            log_time: 0,
            epoch: 5,
            commit_position: 9,
            token: 1,
            chunks: 0,
            bytes: 0,
            hash: [0; 32],
        }
    }

    fn commit() -> Commit {
        Commit {
            epoch: 7,
            usage_position: 15,
            control_position: 2,
            log_time: Time(0),
            token: 1,
            attempt: 1,
            parts: 0,
            hash: String::new(),
            seal: false,
        }
    }

    fn facts<'a>(checkpoint: &'a Manifest, commit: &'a Commit) -> Facts<'a> {
        Facts {
            checkpoint: Some(checkpoint),
            commit: Some(commit),
            usage_log: "u",
            control_log: "c",
            usage_head: 20,
            control_head: 2,
            usage_hash: Some([1; 32]),
        }
    }

    #[test]
    fn replay_goes_from_the_checkpoint_on() {
        let (m, c) = (manifest(), commit());
        let plan = plan(&facts(&m, &c)).unwrap();
        assert_eq!((plan.usage_from, plan.commit_from, plan.epoch), (11, 9, 7));
        assert!(plan.load);
    }

    #[test]
    fn without_anything_it_begins_at_the_beginning() {
        let (m, c) = (manifest(), commit());
        let nothing = Facts { checkpoint: None, commit: None, ..facts(&m, &c) };
        let plan = plan(&nothing).unwrap();
        assert_eq!((plan.load, plan.usage_from, plan.epoch), (false, 1, 0));
    }

    #[test]
    fn what_was_restored_underneath_is_noticed() {
        let (m, c) = (manifest(), commit());
        let alarm = |change: &dyn Fn(&mut Facts<'_>)| {
            let mut facts = facts(&m, &c);
            change(&mut facts);
            plan(&facts).unwrap_err().to_string()
        };
        assert!(alarm(&|f| f.usage_head = 14).contains("ends at 14, but 15 was already published"));
        assert!(alarm(&|f| f.control_head = 1).contains("the control log ends at 1"));
        assert!(alarm(&|f| f.usage_log = "x").contains("belongs to usage log"));
        assert!(alarm(&|f| f.usage_hash = Some([2; 32])).contains("message at usage position 10"));
        assert!(alarm(&|f| f.usage_hash = None).contains("message at usage position 10"));
        assert!(alarm(&|f| f.commit = None).contains("checkpoint is at epoch 5"));
    }
}
