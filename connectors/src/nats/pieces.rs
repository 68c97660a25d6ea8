//! Answers larger than a message, in pieces. Each says in a header which one it is, of how many:
//! `Meterr-Piece: 3/10`. They come in order, or the answer is not believed: on a reply subject of its
//! own, from one sender, nothing else can happen unless something was lost or does not belong there.

use async_nats::HeaderMap;
use bytes::{Bytes, BytesMut};

/// Largest answer, in bytes.
pub const ANSWER_LEN_MAX: usize = 64 * 1024 * 1024;
/// Largest piece, in bytes.
pub const PIECE_LEN_MAX: usize = 512 * 1024;
/// Most pieces an answer is believed to have; smaller ones are cut where messages must be small.
const PIECES_MAX: u32 = 16 * 1024;

const PIECE: &str = "Meterr-Piece";
const PROBLEM: &str = "Meterr-Problem";
/// Longest text of a problem that is believed.
const PROBLEM_CHARS_MAX: usize = 200;

/// Cuts an answer into pieces of at most `len` bytes, each with its headers.
pub(super) fn cut(answer: Bytes, len: usize) -> Vec<(HeaderMap, Bytes)> {
    let len = len.clamp(1, PIECE_LEN_MAX);
    let pieces = answer.len().div_ceil(len).max(1);
    if answer.len() > ANSWER_LEN_MAX || pieces > PIECES_MAX as usize {
        let mut headers = HeaderMap::new();
        let bytes = answer.len();
        headers.insert(PROBLEM, format!("the answer has {bytes} bytes, more than can be sent"));
        return vec![(headers, Bytes::new())];
    }
    let piece = |n: usize| {
        let mut headers = HeaderMap::new();
        headers.insert(PIECE, format!("{}/{pieces}", n + 1));
        (headers, answer.slice(n * len..answer.len().min((n + 1) * len)))
    };
    (0..pieces).map(piece).collect()
}

/// An answer as its pieces come.
#[derive(Debug, Default)]
pub(super) struct Joining {
    pieces: u32,
    taken: u32,
    bytes: BytesMut,
}

impl Joining {
    /// Takes a piece; gives the answer when it was the last.
    ///
    /// # Errors
    /// When it is not the piece that comes next. The answer is lost then.
    pub fn take(
        &mut self,
        headers: Option<&HeaderMap>,
        payload: &Bytes,
    ) -> Result<Option<Bytes>, String> {
        let header = |name| headers?.get_last(name).map(async_nats::HeaderValue::as_str);
        if let Some(problem) = header(PROBLEM) {
            return Err(problem.chars().take(PROBLEM_CHARS_MAX).collect());
        }
        let number = header(PIECE).and_then(|text| {
            let (number, pieces) = text.split_once('/')?;
            Some((number.parse::<u32>().ok()?, pieces.parse::<u32>().ok()?))
        });
        let (number, pieces) = number.ok_or("a message that is no piece of an answer")?;
        if self.taken == 0 {
            self.pieces = pieces;
        }
        if pieces != self.pieces || !(1..=PIECES_MAX).contains(&pieces) || number > pieces {
            return Err(format!("piece {number} of {pieces} does not belong to the answer"));
        }
        if number != self.taken + 1 {
            return Err(format!("piece {number} of {pieces} came after piece {}", self.taken));
        }
        if payload.len() > PIECE_LEN_MAX || self.bytes.len() + payload.len() > ANSWER_LEN_MAX {
            return Err(format!("piece {number} of {pieces} is too large"));
        }
        self.taken = number;
        if pieces == 1 {
            return Ok(Some(payload.clone()));
        }
        self.bytes.extend_from_slice(payload);
        Ok((number == pieces).then(|| std::mem::take(&mut self.bytes).freeze()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(name: &str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, value);
        headers
    }

    fn take(joining: &mut Joining, piece: &str, payload: &'static [u8]) -> Result<bool, String> {
        let taken = joining.take(Some(&headers(PIECE, piece)), &Bytes::from_static(payload))?;
        Ok(taken.is_some())
    }

    #[test]
    fn what_does_not_belong_spoils_the_answer() {
        let mut joining = Joining::default();
        assert!(joining.take(None, &Bytes::new()).is_err());
        let said = joining.take(Some(&headers(PROBLEM, &"x".repeat(999))), &Bytes::new());
        assert_eq!(said.unwrap_err().len(), PROBLEM_CHARS_MAX);
        let strange = ["", "/", "1", "0/1", "2/1", "-1/2", "1/0", "1/4294967295", "2/2", "1/2/2"];
        for piece in strange {
            assert!(take(&mut Joining::default(), piece, b"").is_err(), "{piece}");
        }
        for second in ["1/3", "3/3", "2/2", "2/4", "0/3"] {
            let mut joining = Joining::default();
            assert_eq!(take(&mut joining, "1/3", b"a"), Ok(false));
            assert!(take(&mut joining, second, b"a").is_err(), "{second}");
        }
        let large = Bytes::from(vec![0; PIECE_LEN_MAX + 1]);
        assert!(Joining::default().take(Some(&headers(PIECE, "1/1")), &large).is_err());
    }

    #[test]
    fn an_answer_has_a_limit() {
        let large = Bytes::from(vec![7; ANSWER_LEN_MAX + 1]);
        let pieces = cut(large.clone(), PIECE_LEN_MAX);
        assert_eq!(pieces.len(), 1);
        let said = Joining::default().take(Some(&pieces[0].0), &pieces[0].1).unwrap_err();
        assert!(said.contains("more than can be sent"), "{said}");
        // Whoever sends more than was said is stopped at the limit.
        let piece = large.slice(..PIECE_LEN_MAX);
        let mut joining = Joining::default();
        let taken = (1..).find(|n| {
            let headers = headers(PIECE, &format!("{n}/{PIECES_MAX}"));
            joining.take(Some(&headers), &piece).is_err()
        });
        assert_eq!(taken, Some(ANSWER_LEN_MAX / PIECE_LEN_MAX + 1));
        let whole = large.slice(..ANSWER_LEN_MAX);
        let mut joining = Joining::default();
        let joined = cut(whole.clone(), usize::MAX)
            .into_iter()
            .find_map(|(headers, piece)| joining.take(Some(&headers), &piece).unwrap());
        assert!(joined.unwrap() == whole);
    }

    proptest! {
        #[test]
        fn what_is_cut_is_joined(answer in proptest::collection::vec(any::<u8>(), 0..300), len in 1..100_usize) {
            let answer = Bytes::from(answer);
            let mut joining = Joining::default();
            let mut joined = None;
            for (headers, piece) in cut(answer.clone(), len) {
                prop_assert!(joined.is_none());
                joined = joining.take(Some(&headers), &piece).unwrap();
            }
            prop_assert_eq!(joined, Some(answer));
        }
    }
}
