//! Messages of the live protocol put together from their pieces, within bounds: whoever may publish
//! may send pieces without end.

use crate::changes::{LiveMessage, Row};

/// What a message takes in memory, roughly. Counted are the rows with their texts, since a row of
/// twenty bytes on the wire is one of several hundred here.
pub(in crate::nats) fn weight(message: &LiveMessage) -> usize {
    let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
    let row = |row: &Row| size_of::<Row>() + text(&row.window_start) + text(&row.key);
    let view = |(name, rows): (&String, &Vec<Row>)| {
        // A name stands in a node of a tree.
        128 + name.len() + rows.iter().map(row).sum::<usize>()
    };
    size_of::<LiveMessage>()
        + message.org.len()
        + message.as_of.shards.len() * 16
        + message.views.iter().map(view).sum::<usize>()
}

/// What came of a piece.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Taken {
    /// The message, if it is whole now.
    pub(super) whole: Option<LiveMessage>,
    /// Something is missing: a message begun before that will not be finished, or the pieces before
    /// this one.
    pub(super) lost: bool,
}

/// The pieces of one message, in order from the first.
#[derive(Debug, Default)]
pub(super) struct Pieces {
    pieces: Vec<LiveMessage>,
    weight: usize,
}

impl Pieces {
    /// Whether no piece waits for others.
    pub(super) fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// What is here weighs so much.
    #[cfg(test)]
    pub(super) fn weight(&self) -> usize {
        self.weight
    }

    /// Forgets what is here.
    pub(super) fn clear(&mut self) {
        *self = Pieces::default();
    }

    /// Takes the next piece. Pieces that weigh more than `weight_max` together are lost.
    pub(super) fn take(&mut self, piece: LiveMessage, weight_max: usize) -> Taken {
        let mut lost = false;
        if self.pieces.last().is_some_and(|last| !follows(last, &piece)) {
            self.clear();
            lost = true;
        }
        if (self.is_empty() && piece.piece != 0) || piece.piece >= piece.pieces {
            self.clear();
            return Taken { whole: None, lost: true };
        }
        self.weight = self.weight.saturating_add(weight(&piece));
        if self.weight > weight_max {
            self.clear();
            return Taken { whole: None, lost: true };
        }
        let last = piece.piece + 1 == piece.pieces;
        self.pieces.push(piece);
        Taken { whole: if last { self.whole() } else { None }, lost }
    }

    /// All pieces as one message.
    fn whole(&mut self) -> Option<LiveMessage> {
        let mut pieces = std::mem::take(self).pieces.into_iter();
        let mut whole = pieces.next()?;
        for piece in pieces {
            for (view, mut rows) in piece.views {
                whole.views.entry(view).or_default().append(&mut rows);
            }
        }
        (whole.piece, whole.pieces, whole.more) = (0, 1, false);
        Some(whole)
    }
}

/// Whether a piece is the next one after another.
fn follows(last: &LiveMessage, next: &LiveMessage) -> bool {
    (next.kind, next.shard, next.epoch, next.previous, next.pieces)
        == (last.kind, last.shard, last.epoch, last.previous, last.pieces)
        && last.piece.checked_add(1) == Some(next.piece)
}
