//! Checkpoints among blobs, so that a node can restore what another one saved.
//!
//! ```text
//! checkpoint/<shard>/<generation>-<token>/<index>-<hash>         manifest, as a frame
//! checkpoint/<shard>/<generation>-<token>/<index>-<hash>.<part>  its chunks, as frames one after another
//! ```
//!
//! Numbers are padded so that names sort as they count; the hash is of the manifest's frame, which holds
//! the hash of the chunks and of the manifest before it. So one name has one content, and two writers,
//! such as a frozen owner and the one that took over, never overwrite each other: they write under
//! their tokens. The manifest comes last; before it is there nothing of a checkpoint is believed, and
//! what a crash leaves without one goes when its generation is pruned.
//!
//! The manifests of a generation form a tree by the hashes they refer to. Every path from a base is a
//! state that was committed; of those that verify, the one with the highest epoch is loaded, then the
//! one with the highest token. A delta continues what this process loaded or wrote last. Where that is
//! not known and several manifests stand in the place before it, it is refused: behind the wrong one it
//! would verify and be wrong.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use meterr_operators::ids::{SHARDS_MAX, ShardId};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use crate::blobs::{Blob, BlobError, Blobs};
use crate::checkpoint::{
    Chain, CheckpointError, CheckpointStore, Kind, Manifest, Notice, Verified,
};
use crate::checkpoint_record::{
    CHUNK_FORM, NO_PREVIOUS, Place, Record, Slot, Stored, problem_of, problem_of_chunks,
    problem_of_order, record_hash, refused,
};
use crate::frame::{self, HEADER_LEN, Header};

mod names;
#[cfg(test)]
mod tests;
mod tree;

use self::names::{Name, name_of, parse, part_name, shard_prefix};
use self::tree::{Node, Tree, newer_of};

/// Bytes of chunks in one blob, and at most one chunk more.
const PART_LEN: usize = 16 * 1024 * 1024;
/// Requests under way at once.
const REQUESTS: usize = 8;
/// Most checkpoints a shard may have before it is taken for damage.
const CHECKPOINTS_MAX: usize = 100_000;

/// A [`CheckpointStore`] on [`Blobs`]. Its calls block and must not be made on a thread of the runtime
/// that serves asynchronous work.
pub struct BlobCheckpoints {
    blobs: Arc<dyn Blobs>,
    runtime: Handle,
    format_known: u16,
    part_len: usize,
    /// The chain that this process loaded or wrote last of each shard.
    chains: Mutex<HashMap<ShardId, Vec<Stored>>>,
    /// Newest generation of shards whose base was refused for it. A damaged one counts, and no list
    /// shows it.
    floors: Mutex<HashMap<ShardId, u64>>,
    notices: Mutex<Vec<Notice>>,
}

/// What a listing shows of a shard.
#[derive(Default)]
struct Listed {
    manifests: BTreeSet<Name>,
    /// Parts by the manifest's name.
    parts: HashMap<String, Vec<Blob>>,
    all: Vec<(u64, String)>,
}

impl BlobCheckpoints {
    /// A store on these blobs that believes chunks of formats up to `format_known`. Requests run on the
    /// runtime given.
    pub fn new(blobs: Arc<dyn Blobs>, runtime: Handle, format_known: u16) -> BlobCheckpoints {
        let (chains, floors, notices) = Default::default();
        BlobCheckpoints {
            blobs,
            runtime,
            format_known,
            part_len: PART_LEN,
            chains,
            floors,
            notices,
        }
    }

    fn failed(what: &str, error: &BlobError) -> CheckpointError {
        CheckpointError::Store { what: what.to_owned(), cause: error.to_string() }
    }

    /// Waits on any thread, also one that another runtime works on; timers and connections are those of
    /// the runtime given.
    fn wait<T>(
        &self,
        what: &str,
        work: impl Future<Output = Result<T, BlobError>>,
    ) -> Result<T, CheckpointError> {
        let _runtime = self.runtime.enter();
        futures::executor::block_on(work).map_err(|error| Self::failed(what, &error))
    }

    fn names(&self, shard: ShardId) -> Result<Listed, CheckpointError> {
        let prefix = shard_prefix(shard);
        let blobs = self.wait("checkpoints cannot be listed", self.blobs.list(&prefix))?;
        let mut listed = Listed::default();
        for blob in blobs {
            let Some(rest) = blob.name.strip_prefix(&prefix) else { continue };
            let Some((generation, token, index, part)) = parse(rest) else { continue };
            listed.all.push((generation, blob.name.clone()));
            match part {
                None => {
                    let name = Name { generation, index, token, text: blob.name };
                    listed.manifests.insert(name);
                }
                Some(_) => {
                    let whole = blob.name.rsplit_once('.').map_or("", |(whole, _)| whole);
                    listed.parts.entry(whole.to_owned()).or_default().push(blob);
                }
            }
        }
        if listed.manifests.len() > CHECKPOINTS_MAX {
            return Err(CheckpointError::Store {
                what: format!("shard {shard} has more than {CHECKPOINTS_MAX} checkpoints"),
                cause: format!("see what is below {prefix} in {}", self.blobs.shown()),
            });
        }
        Ok(listed)
    }

    /// Reads manifests. One that vanished meanwhile is left out.
    fn read(
        &self,
        shard: ShardId,
        mut listed: Listed,
        wanted: impl Fn(&Name) -> bool,
    ) -> Result<Vec<Node>, CheckpointError> {
        let names: Vec<Name> =
            std::mem::take(&mut listed.manifests).into_iter().filter(wanted).collect();
        let read = futures::stream::iter(names)
            .map(|name| {
                let blob = self.blobs.get(&name.text);
                async move { Ok::<_, BlobError>((name, blob.await?)) }
            })
            .buffered(REQUESTS)
            .try_collect::<Vec<_>>();
        let read = self.wait("manifests cannot be read", read)?;
        let node = |(name, bytes): (Name, Option<Bytes>)| {
            let slot = Slot::read(&bytes?, shard.0, name.generation, name.index);
            let parts = listed.parts.remove(&name.text).unwrap_or_default();
            let slot = match slot {
                Slot::Sound(stored) if stored.record.manifest.token != name.token => {
                    Slot::Unsound("its token is not that of its name".to_owned())
                }
                slot => slot,
            };
            Some(Node { name, slot, parts })
        };
        Ok(read.into_iter().filter_map(node).collect())
    }

    /// Reads the chunks of a checkpoint; the inner error says what is wrong with them.
    fn chunks(
        &self,
        node: &Node,
        m: &Manifest,
    ) -> Result<Result<Vec<Bytes>, String>, CheckpointError> {
        let stored: u64 = node.parts.iter().map(|part| part.bytes).sum();
        let expected = m.bytes.saturating_add(u64::from(m.chunks) * HEADER_LEN as u64);
        if stored != expected {
            return Ok(Err(format!("its parts have {stored} bytes of {expected}")));
        }
        let parts: Vec<Blob> = node.parts.clone();
        let read = futures::stream::iter(parts)
            .map(|part| {
                let blob = self.blobs.get(&part.name);
                async move { Ok::<_, BlobError>((part, blob.await?)) }
            })
            .buffered(REQUESTS)
            .try_collect::<Vec<_>>();
        let mut chunks = Vec::with_capacity(m.chunks.min(1 << 16) as usize);
        for (number, (part, bytes)) in
            self.wait("chunks cannot be read", read)?.into_iter().enumerate()
        {
            if part.name != part_name(&node.name.text, number) {
                return Ok(Err(format!("part {number} is missing")));
            }
            let Some(mut bytes) = bytes else { return Ok(Err(format!("part {number} is gone"))) };
            while !bytes.is_empty() {
                match chunk(&mut bytes) {
                    Ok(chunk) => chunks.push(chunk),
                    Err(problem) => return Ok(Err(format!("chunk {}: {problem}", chunks.len()))),
                }
            }
        }
        Ok(problem_of_chunks(m, &chunks).map_or(Ok(chunks), Err))
    }

    /// What a checkpoint continues, checked; nothing for a base.
    fn link(&self, listed: Listed, m: &Manifest) -> Result<Option<Stored>, CheckpointError> {
        let shard = m.shard_id();
        let Manifest { generation, token, .. } = *m;
        let of = |wanted: &dyn Fn(&Name) -> bool| {
            let names = listed.manifests.iter().filter(|name| wanted(name));
            names.map(|name| name.generation).max().unwrap_or(0)
        };
        // Behind a later owner nothing is written.
        let newest = of(&|name| name.token >= token);
        let others = of(&|name| name.token < token);
        if m.kind == Kind::Base {
            if generation <= newest || generation < others {
                self.floors.lock().insert(shard, newest.max(others));
                return Err(refused(format!(
                    "base of generation {generation} of shard {shard} is not above the newest, {}",
                    newest.max(others)
                )));
            }
            // Behind checkpoints of a newer version neither.
            let nodes = self.read(shard, listed, |name| {
                name.generation.saturating_add(1) >= newest.max(others)
            })?;
            return match newer_of(&nodes) {
                Some((found, known)) => Err(CheckpointError::Newer { found, known }),
                None => Ok(None),
            };
        }
        let before: Place = (generation, m.index.wrapping_sub(1));
        let mut there = listed.manifests.iter().map(|name| (name.generation, name.index));
        if generation < newest && there.any(|place| place == before) {
            return Err(refused(format!(
                "delta of generation {generation} of shard {shard}: the newest is {newest}"
            )));
        }
        let before = self.predecessor(listed, m, before)?;
        match problem_of_order(&before.record.manifest, m) {
            None => Ok(Some(before)),
            Some(problem) => Err(refused(format!("delta of shard {shard}: {problem}"))),
        }
    }

    /// What a delta continues: in the chain that this process loaded or wrote, or else the only
    /// manifest that stands in the place before it.
    fn predecessor(
        &self,
        listed: Listed,
        m: &Manifest,
        before: Place,
    ) -> Result<Stored, CheckpointError> {
        let Manifest { generation, index, .. } = *m;
        let refuse = |why: &str| {
            let shard = m.shard;
            let delta = format!("delta {index} of generation {generation} of shard {shard}");
            Err(refused(format!("{delta} {why}")))
        };
        let mut there = listed.manifests.iter().map(|name| (name.generation, name.index));
        let nothing = !there.any(|place| place == before);
        let chain = self.chains.lock().get(&m.shard_id()).cloned();
        let Some(chain) = chain else {
            let nodes =
                self.read(m.shard_id(), listed, |name| (name.generation, name.index) == before)?;
            if let Some((found, known)) = newer_of(&nodes) {
                return Err(CheckpointError::Newer { found, known });
            }
            let mut sound = nodes.iter().filter_map(Node::stored);
            return match (sound.next(), sound.next()) {
                (Some(one), None) => Ok(one.clone()),
                (None, _) => refuse("has nothing before it"),
                (Some(_), Some(_)) => {
                    refuse("has several checkpoints before it; load one, or write a base")
                }
            };
        };
        let place = |stored: &&Stored| {
            (stored.record.manifest.generation, stored.record.manifest.index) == before
        };
        let Some(stored) = chain.iter().find(place) else {
            let other = "does not continue what was loaded or written last; write a base";
            return refuse(if nothing { "has nothing before it" } else { other });
        };
        let name = name_of(&stored.record.manifest, &stored.hash);
        // A listing may be behind what this process wrote itself.
        let stands = listed.manifests.contains(&name)
            || self.wait("manifest cannot be read", self.blobs.get(&name.text))?.is_some();
        if stands { Ok(stored.clone()) } else { refuse("has lost what is before it; write a base") }
    }

    fn put(&self, name: &Name, frame: Vec<u8>, chunks: &[Bytes]) -> Result<(), CheckpointError> {
        let what = format!("{} not written", name.text);
        let mut parts: Vec<Vec<u8>> = Vec::new();
        for chunk in chunks {
            let chunk =
                frame::seal(CHUNK_FORM, chunk).map_err(|error| refused(error.to_string()))?;
            match parts.last_mut().filter(|part| part.len() < self.part_len) {
                Some(part) => part.extend_from_slice(&chunk),
                None => parts.push(chunk),
            }
        }
        let put = async {
            futures::stream::iter(parts.into_iter().enumerate())
                .map(|(n, part)| self.blobs.put(&part_name(&name.text, n), part.into()))
                .buffer_unordered(REQUESTS)
                .try_collect::<Vec<()>>()
                .await?;
            self.blobs.put(&name.text, frame.into()).await
        };
        self.wait(&what, put)
    }

    /// Deletes blobs, manifests first: none may stand whose chunks are gone.
    fn delete(&self, names: impl Iterator<Item = String>) -> Result<(), CheckpointError> {
        let (parts, manifests): (Vec<String>, Vec<String>) =
            names.partition(|name| name.contains('.'));
        for names in [manifests, parts] {
            let gone = futures::stream::iter(names)
                .map(|name| self.blobs.delete(&name))
                .buffer_unordered(REQUESTS)
                .try_collect::<Vec<()>>();
            self.wait("old checkpoints not removed", gone)?;
        }
        Ok(())
    }

    /// Verifies nodes of one generation: for each whether it is sound up to its base, and what is wrong
    /// with the first that is not.
    fn verify_generation(&self, nodes: &[&Node]) -> Result<(u32, Option<String>), CheckpointError> {
        let tree = Tree::of(nodes, self.format_known);
        let mut sound: BTreeSet<usize> = BTreeSet::new();
        let mut problem = None;
        for (at, node) in nodes.iter().enumerate() {
            let wrong = match &tree.before[at] {
                Err(wrong) => Some(wrong.clone()),
                Ok(Some(before)) if !sound.contains(before) => {
                    Some("what it continues is not sound".to_owned())
                }
                Ok(_) => match node.stored() {
                    Some(stored) => self.chunks(node, &stored.record.manifest)?.err(),
                    None => None,
                },
            };
            match wrong {
                None => drop(sound.insert(at)),
                Some(wrong) => {
                    problem.get_or_insert(format!("checkpoint {}: {wrong}", node.name.index));
                }
            }
        }
        Ok((sound.len() as u32, problem))
    }
}

/// Takes one framed chunk off the front.
fn chunk(bytes: &mut Bytes) -> Result<Bytes, String> {
    let Some(head) = bytes.first_chunk::<HEADER_LEN>() else {
        return Err("it is cut short".to_owned());
    };
    let header = Header::read(CHUNK_FORM, head).map_err(|error| error.to_string())?;
    if bytes.len() < HEADER_LEN + header.len {
        return Err("it is cut short".to_owned());
    }
    let chunk = bytes.slice(HEADER_LEN..HEADER_LEN + header.len);
    header.check(&chunk).map_err(|error| error.to_string())?;
    *bytes = bytes.slice(HEADER_LEN + header.len..);
    Ok(chunk)
}

impl CheckpointStore for BlobCheckpoints {
    fn take_notices(&self) -> Vec<Notice> {
        std::mem::take(&mut self.notices.lock())
    }

    fn write(&self, manifest: &Manifest, chunks: &[Bytes]) -> Result<(), CheckpointError> {
        if let Some(problem) = problem_of(manifest, chunks) {
            return Err(refused(problem));
        }
        let shard = manifest.shard_id();
        let listed = self.names(shard)?;
        // What this writer wrote at this place and above is replaced.
        let Manifest { generation, index, token, .. } = *manifest;
        let own = |name: &&Name| {
            (name.generation, name.token) == (generation, token) && name.index >= index
        };
        let replaced: Vec<Name> = listed.manifests.iter().filter(own).cloned().collect();
        let parts = |name: &Name| listed.parts.get(&name.text).cloned().unwrap_or_default();
        let gone: Vec<String> = replaced
            .iter()
            .flat_map(|name| {
                let parts = parts(name).into_iter().map(|part| part.name);
                std::iter::once(name.text.clone()).chain(parts)
            })
            .collect();
        let before = self.link(listed, manifest)?;
        let previous = before.as_ref().map_or(NO_PREVIOUS, |before| before.hash);
        let record = Record { manifest: manifest.clone(), previous };
        let frame = record.encode().map_err(|error| refused(error.to_string()))?;
        let hash = record_hash(&frame);
        let name = name_of(manifest, &hash);
        // What fails is continued by nothing; what was before it may be, once more.
        let mut chain = self.chains.lock().remove(&shard).unwrap_or_default();
        chain.retain(|stored| manifest.kind == Kind::Delta && stored.record.manifest.index < index);
        if let Some(before) = before.filter(|_| chain.is_empty()) {
            chain.push(before);
        }
        self.chains.lock().insert(shard, chain.clone());
        self.put(&name, frame, chunks)?;
        chain.push(Stored { record, hash });
        self.chains.lock().insert(shard, chain);
        if manifest.kind == Kind::Base {
            self.floors.lock().remove(&shard);
        }
        let gone = gone.into_iter().filter(|old| !old.starts_with(&name.text));
        if let Err(error) = self.delete(gone) {
            // It stands; what it replaces is a state that was committed as well.
            let later = format!("replaced checkpoints of shard {shard} stay: {error}");
            self.notices.lock().push(Notice::Later(later));
        }
        Ok(())
    }

    fn list(&self, shard: ShardId) -> Result<Vec<Manifest>, CheckpointError> {
        let nodes = self.read(shard, self.names(shard)?, |_| true)?;
        if let Some((found, known)) = newer_of(&nodes) {
            return Err(CheckpointError::Newer { found, known });
        }
        let sound = nodes.iter().filter_map(Node::stored);
        Ok(sound.map(|stored| stored.record.manifest.clone()).collect())
    }

    fn shards(&self) -> Result<Vec<ShardId>, CheckpointError> {
        let blobs = self.wait("checkpoints cannot be listed", self.blobs.list("checkpoint/"))?;
        let shard = |blob: Blob| {
            let (shard, rest) = blob.name.strip_prefix("checkpoint/")?.split_once('/')?;
            let (.., part) = parse(rest)?;
            let shard = shard.parse().ok().filter(|shard| *shard < SHARDS_MAX && part.is_none());
            shard.map(ShardId)
        };
        let shards: BTreeSet<ShardId> = blobs.into_iter().filter_map(shard).collect();
        Ok(shards.into_iter().collect())
    }

    fn load(&self, shard: ShardId, before: Option<u64>) -> Result<Option<Chain>, CheckpointError> {
        let wanted = |name: &Name| before.is_none_or(|before| name.generation < before);
        let nodes = self.read(shard, self.names(shard)?, wanted)?;
        let nodes: Vec<&Node> = nodes.iter().collect();
        let tree = Tree::of(&nodes, self.format_known);
        let linked = |at: &usize| tree.before[*at].is_ok();
        let mut ends: Vec<usize> = (0..nodes.len()).filter(linked).collect();
        let rank = |at: &usize| {
            let m = nodes[*at].stored().map(|stored| &stored.record.manifest);
            m.map(|m| (m.epoch, m.token, m.generation, m.index))
        };
        ends.sort_by_key(|at| std::cmp::Reverse(rank(at)));
        let mut read: HashMap<usize, Option<Vec<Bytes>>> = HashMap::new();
        'ends: for end in ends {
            let path = tree.path(end);
            for at in &path {
                let Some(stored) = nodes[*at].stored() else { continue 'ends };
                if !read.contains_key(at) {
                    let chunks = self.chunks(nodes[*at], &stored.record.manifest)?;
                    let problem = chunks.as_ref().err();
                    if let Some(problem) = problem {
                        let name = &nodes[*at].name.text;
                        let lost = format!("{name} is damaged: {problem}");
                        self.notices.lock().push(Notice::Lost(lost));
                    }
                    read.insert(*at, chunks.ok());
                }
                if read.get(at).is_none_or(Option::is_none) {
                    continue 'ends;
                }
            }
            let continued = path.iter().filter_map(|at| nodes[*at].stored().cloned()).collect();
            let part = |at: usize| {
                let chunks = read.remove(&at).flatten()?;
                Some((nodes[at].stored()?.record.manifest.clone(), chunks))
            };
            let chain: Chain = path.into_iter().filter_map(part).collect();
            self.chains.lock().insert(shard, continued);
            return Ok(Some(chain));
        }
        self.chains.lock().insert(shard, Vec::new());
        match tree.newer {
            Some((found, known)) => Err(CheckpointError::Newer { found, known }),
            None => Ok(None),
        }
    }

    fn base_above(&self, shard: ShardId) -> Option<u64> {
        self.floors.lock().get(&shard).copied()
    }

    fn verify(&self, shard: ShardId) -> Result<Vec<Verified>, CheckpointError> {
        let nodes = self.read(shard, self.names(shard)?, |_| true)?;
        let mut generations: BTreeMap<u64, Vec<&Node>> = BTreeMap::new();
        nodes
            .iter()
            .for_each(|node| generations.entry(node.name.generation).or_default().push(node));
        let verified = generations.into_iter().map(|(generation, nodes)| {
            let (sound, problem) = self.verify_generation(&nodes)?;
            let total = nodes.len() as u32;
            Ok(Verified { shard: shard.0, generation, sound, total, problem })
        });
        verified.collect()
    }

    fn prune(&self, shard: ShardId, keep: usize) -> Result<(), CheckpointError> {
        let verified = self.verify(shard)?;
        let mut kept = 0;
        // The oldest stays whatever it is: there is nothing older to delete.
        let oldest_kept = verified.iter().skip(1).rev().find(|verified| {
            kept += usize::from(verified.problem.is_none());
            kept >= keep.max(1)
        });
        let Some(oldest_kept) = oldest_kept.map(|verified| verified.generation) else {
            return Ok(());
        };
        let listed = self.names(shard)?;
        let old = listed.all.into_iter().filter(|(generation, _)| *generation < oldest_kept);
        self.delete(old.map(|(_, name)| name))
    }
}
