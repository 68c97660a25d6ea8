//! The format of checkpoints is kept: what this version writes is what stands in the golden file, and
//! what stands there can be read. `UPDATE_GOLDEN=1` rewrites the file; a changed file means a new
//! [`snapshot::FORMAT`] and a reader for the old one, with the old file kept.

#![allow(clippy::unwrap_used)]

use std::path::Path;

use bytes::Bytes;
use meterr_engine::snapshot;
use meterr_operators::event::HashKey;
use meterr_operators::histories::{HistoryOptions, Step, history};
use meterr_operators::ids::ShardId;
use meterr_operators::rng::Rng;
use meterr_operators::rollup::ViewSet;
use meterr_operators::shard::{History, Incoming, Shard, ShardState};

struct Texts(Vec<(u64, Vec<meterr_operators::histories::Line>)>);

impl History for Texts {
    fn event_at(
        &mut self,
        place: meterr_operators::dedupe::Place,
    ) -> Result<meterr_operators::event::Event<'static>, String> {
        let (_, lines) = self.0.iter().find(|(at, _)| *at == place.position).unwrap();
        lines[place.line as usize - 1].event.clone().map_err(|e| e.to_string())
    }
}

/// Base and delta of a small history.
fn states() -> [ShardState; 2] {
    let options = HistoryOptions { shards: 1, orgs: 3, steps: 40, lines_max: 4 };
    let steps = history(&mut Rng::new(11), &options);
    let mut worker = meterr_engine::worker::timely_worker();
    let key = HashKey([3; 16]);
    let mut shard = Shard::new(&mut worker, ShardId(0), 1, key, ViewSet::DEFAULT);
    shard.allow_time_jump(i64::MAX);
    shard.want_deltas();
    let mut texts = Texts(Vec::new());
    let mut base = None;
    for (n, step) in steps.iter().enumerate() {
        match step {
            Step::Control(change) => shard.control(&mut worker, n as u64 + 1, change).unwrap(),
            Step::Message(message) => {
                texts.0.push((message.position, message.lines.clone()));
                let lines =
                    message.lines.iter().enumerate().map(|(at, line)| {
                        (at as u32 + 1, line.text.as_bytes(), line.event.clone())
                    });
                let incoming = Incoming {
                    position: message.position,
                    time: message.time,
                    subject: &message.subject,
                    lines,
                };
                shard.message(incoming, &mut texts).unwrap();
            }
            Step::Boundary => {
                shard.close_epoch(&mut worker, n as u64);
                if n > steps.len() / 2 && base.is_none() {
                    base = Some(shard.take_base());
                }
            }
        }
    }
    shard.close_epoch(&mut worker, steps.len() as u64);
    let delta = shard.take_delta();
    [base.unwrap(), delta]
}

fn hex(chunks: &[Bytes]) -> String {
    let line = |chunk: &Bytes| chunk.iter().map(|b| format!("{b:02x}")).collect::<String>();
    chunks.iter().map(|chunk| line(chunk) + "\n").collect()
}

fn unhex(text: &str) -> Vec<Bytes> {
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    let chunk = |line: &str| line.as_bytes().chunks(2).map(byte).collect::<Vec<u8>>().into();
    text.lines().map(chunk).collect()
}

#[test]
fn checkpoints_are_written_and_read_as_the_golden_file_has_them() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    for (name, state) in ["base", "delta"].into_iter().zip(states()) {
        let path = dir.join(format!("snapshot-v{}-{name}.hex", snapshot::FORMAT));
        let epochs = vec![(0, 3), (2, 7)];
        let chunks = snapshot::encode(state.clone(), epochs.clone()).unwrap();
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(&path, hex(&chunks)).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap();
        assert_eq!(hex(&chunks), golden, "{name}: the format changed");
        assert_eq!(snapshot::decode(&unhex(&golden)).unwrap(), (state.clone(), epochs), "{name}");
        // The first format had no epochs. What it wrote is read for ever.
        let first = std::fs::read_to_string(dir.join(format!("snapshot-v1-{name}.hex"))).unwrap();
        assert_eq!(snapshot::decode(&unhex(&first)).unwrap(), (state, Vec::new()), "{name}");
    }
}

#[test]
fn a_changed_byte_is_noticed() {
    let [base, _] = states();
    let chunks = snapshot::encode(base, vec![(1, 1)]).unwrap();
    let mut rng = Rng::new(5);
    for _ in 0..500 {
        let mut chunks = chunks.clone();
        let at = rng.below(chunks.len() as u64) as usize;
        let mut bytes = chunks[at].to_vec();
        let byte = rng.below(bytes.len() as u64) as usize;
        bytes[byte] ^= 1 << rng.below(8);
        chunks[at] = bytes.into();
        assert!(snapshot::decode(&chunks).is_err(), "chunk {at}, byte {byte}");
    }
}

#[test]
fn what_is_no_checkpoint_is_refused_without_panic() {
    let mut rng = Rng::new(6);
    for len in 0..300 {
        let bytes: Vec<u8> = (0..len).map(|_| rng.below(256) as u8).collect();
        assert!(snapshot::decode(&[bytes.into()]).is_err());
    }
}
