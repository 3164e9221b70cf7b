//! What waits to be sent.
use std::collections::VecDeque;

/// Bytes in order, kept in the pieces in which they came: they are not copied.
#[derive(Default)]
pub struct Queue {
    pieces: VecDeque<Vec<u8>>,
    /// Bytes of the first piece that were taken already.
    taken: usize,
    length: usize,
}

impl Queue {
    pub fn push(&mut self, piece: Vec<u8>) {
        if !piece.is_empty() {
            self.length += piece.len();
            self.pieces.push_back(piece);
        }
    }

    pub const fn len(&self) -> usize {
        self.length
    }

    pub const fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// The first bytes; nothing if it is empty.
    pub fn front(&self) -> &[u8] {
        let first = self.pieces.front().and_then(|piece| piece.get(self.taken..));
        first.unwrap_or_default()
    }

    /// Take away that many of [`Queue::front`].
    pub fn take(&mut self, count: usize) {
        let count = count.min(self.front().len());
        (self.taken, self.length) = (self.taken + count, self.length - count);
        if self.front().is_empty() {
            self.pieces.pop_front();
            self.taken = 0;
        }
    }
}
