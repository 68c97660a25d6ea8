//! The shards of this node as decisions about leases see them: [`Shards`] over what the node's actors
//! keep.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use meterr_operators::ids::ShardId;

use crate::actors::{Wish, Wishes};
use crate::cluster::{Held, Shards};
use crate::lifecycle::{State, Wanted};
use crate::node::{NodeError, NodeShared, random_bytes};
use crate::settings::{Settings, node_name_valid};

/// The shards of a node.
pub struct NodeShards {
    shared: Arc<NodeShared>,
    wishes: Wishes,
}

impl NodeShards {
    /// Those of a node, whose actors hear wishes.
    pub fn new(shared: Arc<NodeShared>, wishes: Wishes) -> NodeShards {
        NodeShards { shared, wishes }
    }

    fn wish(&self, shard: ShardId, wanted: Wanted) {
        // Without room, or after the node's end, it is for whoever decides to wish again.
        let _ = self.wishes.try_send(Wish(shard, wanted));
    }
}

impl Shards for NodeShards {
    fn held(&self) -> Vec<Held> {
        let shared = &self.shared;
        let stopping = shared.stopping.load(Ordering::Relaxed);
        let held = shared.states.iter().enumerate().map(|(at, state)| {
            let (state, problem) = state.lock().clone();
            let token = shared.tokens[at].load(Ordering::Relaxed);
            let behind = shared.behind[at].load(Ordering::Relaxed);
            let writing = shared.writing[at].load(Ordering::Relaxed);
            match state {
                State::Claim => Held::Nothing,
                State::Restore | State::Replay if token == 0 => Held::Opening,
                State::Restore | State::Replay | State::Seal => Held::Owned { token, live: false },
                State::StandBy => Held::StandingBy { behind },
                State::Live => Held::Owned { token, live: true },
                State::Release | State::Drain => Held::Releasing,
                // Nobody waits for it as urgently as the next start.
                State::HandOver if stopping && writing => Held::Releasing,
                State::HandOver | State::Released => Held::Released,
                State::Lost => Held::Lost { token: shared.lost[at].load(Ordering::Relaxed) },
                State::Stopped(_) => Held::Stopped(problem.unwrap_or_default()),
            }
        });
        held.collect()
    }

    fn stand_by(&self, shard: ShardId) {
        self.wish(shard, Wanted::StandBy);
    }

    fn own(&self, shard: ShardId, token: u64) {
        self.wish(shard, Wanted::Own(token));
    }

    fn release(&self, shard: ShardId) {
        self.wish(shard, Wanted::Release);
    }

    fn drop(&self, shard: ShardId) {
        self.wish(shard, Wanted::Drop);
    }
}

/// The name of this node: as set, or a random one that its data directory keeps.
///
/// # Errors
/// When the directory cannot be read or written, or keeps something else.
pub fn node_name(settings: &Settings) -> Result<String, NodeError> {
    if let Some(name) = &settings.cluster.node {
        return Ok(name.clone());
    }
    let path = settings.node.data_dir.join("node");
    let io = |what: &str| {
        let what = format!("cannot {what} {}", path.display());
        move |source| NodeError::Io { what, source }
    };
    match std::fs::read_to_string(&path) {
        Ok(name) if node_name_valid(name.trim()) => return Ok(name.trim().to_owned()),
        Ok(_) => {
            return Err(NodeError::Refused(format!(
                "{} does not hold the name of a node; delete it, or set cluster.node",
                path.display()
            )));
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(io("read")(error)),
    }
    let [a, b, c, d, ..] = random_bytes()?;
    let name = format!("n-{a:02x}{b:02x}{c:02x}{d:02x}");
    write_whole(&path, name.as_bytes()).map_err(io("write"))?;
    Ok(name)
}

/// Writes a file so that a crash leaves all of it or nothing.
fn write_whole(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let beside = path.with_extension("new");
    let mut file = std::fs::File::create(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_directory_keeps_its_node_s_name() {
        let dir = tempfile::tempdir().unwrap();
        let mut settings = Settings::default();
        settings.node.data_dir = dir.path().to_owned();
        let name = node_name(&settings).unwrap();
        assert!(node_name_valid(&name), "{name}");
        assert_eq!(node_name(&settings).unwrap(), name);
        std::fs::write(dir.path().join("node"), "a.b").unwrap();
        assert!(node_name(&settings).unwrap_err().to_string().contains("set cluster.node"));
        settings.cluster.node = Some("b".to_owned());
        assert_eq!(node_name(&settings).unwrap(), "b");
    }
}
