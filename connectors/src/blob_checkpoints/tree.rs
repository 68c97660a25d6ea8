//! How the checkpoints of a generation continue each other.

use std::collections::HashMap;

use super::names::Name;
use crate::blobs::Blob;
use crate::checkpoint_record::{Slot, Stored, problem_of_link};

/// A checkpoint among blobs.
pub(super) struct Node {
    pub name: Name,
    pub slot: Slot,
    pub parts: Vec<Blob>,
}

impl Node {
    pub fn stored(&self) -> Option<&Stored> {
        self.slot.sound()
    }
}

pub(super) fn newer_of(nodes: &[Node]) -> Option<(u16, u16)> {
    nodes.iter().find_map(|node| match node.slot {
        Slot::Newer { found, known } => Some((found, known)),
        _ => None,
    })
}

/// How nodes continue each other, by manifests alone.
pub(super) struct Tree {
    /// For each node what it continues (none: it is a base), or what is wrong with it.
    pub before: Vec<Result<Option<usize>, String>>,
    /// A format that is not known, if there is one: (found, known).
    pub newer: Option<(u16, u16)>,
}

impl Tree {
    /// Nodes must be in the order of their places.
    pub fn of(nodes: &[&Node], format_known: u16) -> Tree {
        let mut tree = Tree { before: Vec::with_capacity(nodes.len()), newer: None };
        let mut by_hash: HashMap<[u8; 32], usize> = HashMap::new();
        for (at, node) in nodes.iter().enumerate() {
            let before = match &node.slot {
                Slot::Newer { found, known } => {
                    tree.newer = Some((*found, *known));
                    Err(format!("manifest schema {found} is newer than the known {known}"))
                }
                Slot::Unsound(problem) => Err(problem.clone()),
                Slot::Sound(stored) if stored.record.manifest.format > format_known => {
                    let found = stored.record.manifest.format;
                    tree.newer = Some((found, format_known));
                    Err(format!("format {found} is newer than the known {format_known}"))
                }
                Slot::Sound(stored) => {
                    let before = by_hash.get(&stored.record.previous).copied();
                    let linked = before.and_then(|before| nodes[before].stored());
                    match problem_of_link(linked, &stored.record) {
                        Some(problem) => Err(problem),
                        None => Ok(before),
                    }
                }
            };
            if let (Ok(_), Some(stored)) = (&before, node.stored()) {
                by_hash.insert(stored.hash, at);
            }
            tree.before.push(before);
        }
        tree
    }

    /// Nodes from the base to this one.
    pub fn path(&self, to: usize) -> Vec<usize> {
        let mut path = vec![to];
        let mut at = to;
        while let Some(Ok(Some(before))) = self.before.get(at) {
            at = *before;
            path.push(at);
        }
        path.reverse();
        path
    }
}
