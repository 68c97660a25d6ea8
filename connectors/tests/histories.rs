//! Histories and decoder agree: each line of a generated history decodes to the event, or to the
//! reason, that the history says. Tests may thus feed either form.
#![allow(clippy::unwrap_used)]

use meterr_connectors::codec::decode_lines;
use meterr_operators::event::{Event, Reason, Rejection};
use meterr_operators::histories::{HistoryOptions, Step, history};
use meterr_operators::rng::Rng;

#[test]
fn lines_decode_to_what_histories_say() {
    fn outcome<'a>(line: &Result<Event<'a>, Rejection>) -> Result<Event<'a>, Reason> {
        line.clone().map_err(|rejection| rejection.reason)
    }
    for seed in 0..24 {
        for step in history(&mut Rng::new(seed), &HistoryOptions::default()) {
            let Step::Message(message) = step else { continue };
            let payload = message.payload();
            let mut decoded = decode_lines(payload.as_bytes());
            for (number, line) in (1..).zip(&message.lines) {
                let (got, raw, event) = decoded.next().unwrap();
                assert_eq!((got, raw), (number, line.text.as_bytes()), "seed {seed}");
                assert_eq!(outcome(&event), outcome(&line.event), "seed {seed}: {}", line.text);
            }
            assert!(decoded.next().is_none(), "seed {seed}: {payload}");
        }
    }
}
