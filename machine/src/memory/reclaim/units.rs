//! Which parts of a region can be given back, where whole units have to be replaced first: the
//! number of withheld pages of each unit, and which units have already been replaced.
use std::ops::Range;

use super::super::image::PAGE_SIZE;

/// What to do for a range.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// These bytes are memory that can be given back directly.
    Release(Range<u64>),
    /// These whole units have to be replaced by such memory.
    Replace(Range<u64>),
}

/// The units of one region. Offsets and lengths in bytes, from the region's start.
pub(super) struct Units {
    /// Bytes of a unit: a multiple of the page size.
    unit: u64,
    /// Bytes of the region.
    size: u64,
    replaced: Bits,
    withheld: Bits,
    /// How many pages of each unit are withheld.
    counts: Vec<u32>,
    pieces: usize,
}

impl Units {
    /// The units of a region of `size` bytes. Each is replaced once, after which any page of it can
    /// be given back.
    pub fn new(size: u64, unit: u64) -> Self {
        let count = usize::try_from(size.div_ceil(unit)).unwrap_or(usize::MAX);
        Self {
            unit,
            size,
            replaced: Bits::new(size.div_ceil(unit)),
            withheld: Bits::new(size.div_ceil(PAGE_SIZE)),
            counts: vec![0; count],
            pieces: 0,
        }
    }

    /// Number of contiguous runs of replaced units.
    pub fn pieces(&self) -> usize {
        self.pieces
    }

    /// Note whether the pages in `range` are withheld.
    pub fn withhold(&mut self, range: &Range<u64>, on: bool) {
        for page in range.start / PAGE_SIZE..range.end.min(self.size) / PAGE_SIZE {
            let index = usize::try_from(page * PAGE_SIZE / self.unit).ok();
            let Some(count) = index.and_then(|index| self.counts.get_mut(index)) else { return };
            if self.withheld.set(page, on) {
                *count = if on { *count + 1 } else { count.saturating_sub(1) };
            }
        }
    }

    /// Note that no page is withheld any more.
    pub fn release_all(&mut self) {
        self.withheld = Bits::new(self.size.div_ceil(PAGE_SIZE));
        // A new vector takes no memory until it is touched, whatever the region's size.
        self.counts = vec![0; self.counts.len()];
    }

    /// What to do for `range`, which consists of whole pages: for units that are all in it, and for
    /// units whose pages outside of it are all withheld. Ascending.
    pub fn steps(&self, range: &Range<u64>) -> Vec<Step> {
        let mut steps = Vec::new();
        let end = range.end.min(self.size);
        let mut at = range.start;
        while at < end {
            let index = at / self.unit;
            let unit = index * self.unit..((index + 1) * self.unit).min(self.size);
            let part = at..unit.end.min(end);
            at = part.end;
            if self.replaced.get(index) {
                push(&mut steps, Step::Release(part));
            } else if part == unit || self.is_withheld(index, &unit) {
                push(&mut steps, Step::Replace(unit));
            }
        }
        steps
    }

    fn is_withheld(&self, index: u64, unit: &Range<u64>) -> bool {
        let count = usize::try_from(index).ok().and_then(|index| self.counts.get(index));
        count.is_some_and(|count| u64::from(*count) * PAGE_SIZE == unit.end - unit.start)
    }

    /// How many pieces there would be if `range`, of a [`Step::Replace`], were replaced.
    pub fn pieces_with(&self, range: &Range<u64>) -> usize {
        let before = (range.start / self.unit).checked_sub(1);
        let neighbours = [before, Some(range.end.div_ceil(self.unit))];
        let joined = neighbours.into_iter().flatten().filter(|unit| self.replaced.get(*unit));
        (self.pieces + 1).saturating_sub(joined.count())
    }

    /// Note that `range`, of a [`Step::Replace`], was replaced.
    pub fn note_replaced(&mut self, range: &Range<u64>) {
        self.pieces = self.pieces_with(range);
        for unit in range.start / self.unit..range.end.div_ceil(self.unit) {
            self.replaced.set(unit, true);
        }
    }
}

/// Append a step, merged with the last one if they are adjacent.
fn push(steps: &mut Vec<Step>, step: Step) {
    match (steps.last_mut(), &step) {
        (Some(Step::Release(last)), Step::Release(next))
        | (Some(Step::Replace(last)), Step::Replace(next))
            if last.end == next.start =>
        {
            last.end = next.end;
        }
        _ => steps.push(step),
    }
}

/// A bitmap that takes memory only where bits have been set.
struct Bits(Vec<u64>);

impl Bits {
    fn new(count: u64) -> Self {
        Self(vec![0; usize::try_from(count.div_ceil(64)).unwrap_or(usize::MAX)])
    }

    fn get(&self, bit: u64) -> bool {
        let word = usize::try_from(bit / 64).ok().and_then(|word| self.0.get(word));
        word.is_some_and(|word| word & (1 << (bit % 64)) != 0)
    }

    /// Sets `bit`; returns whether that was a change.
    fn set(&mut self, bit: u64, on: bool) -> bool {
        let word = usize::try_from(bit / 64).ok().and_then(|word| self.0.get_mut(word));
        let Some(word) = word else { return false };
        let before = *word;
        match on {
            true => *word |= 1 << (bit % 64),
            false => *word &= !(1 << (bit % 64)),
        }
        before != *word
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIT: u64 = 64 << 10;

    fn units(range: Range<u64>) -> Range<u64> {
        range.start * UNIT..range.end * UNIT
    }

    fn pages(range: Range<u64>) -> Range<u64> {
        range.start * PAGE_SIZE..range.end * PAGE_SIZE
    }

    #[test]
    fn only_whole_units_are_replaced_and_then_any_page_is_released() {
        let mut all = Units::new(1 << 20, UNIT);
        assert_eq!(all.steps(&pages(1..16)), []);
        assert_eq!(all.steps(&pages(1..63)), [Step::Replace(units(1..3))]);
        all.note_replaced(&units(1..3));
        let steps =
            [Step::Replace(units(0..1)), Step::Release(units(1..3)), Step::Replace(units(3..4))];
        assert_eq!(all.steps(&units(0..4)), steps);
        assert_eq!(all.steps(&pages(15..17)), [Step::Release(pages(16..17))]);
        assert_eq!(all.steps(&(15 * UNIT..99 * UNIT)), [Step::Replace(units(15..16))]);
    }

    #[test]
    fn pages_that_are_withheld_add_up_and_what_is_released_is_missing() {
        let mut all = Units::new(1 << 20, UNIT);
        for page in (16..32).rev() {
            assert_eq!(all.steps(&pages(page..page + 1)), [], "{page}");
            all.withhold(&pages(page..page + 1), true);
            all.withhold(&pages(page..page + 1), true);
        }
        assert_eq!(all.steps(&pages(16..17)), [Step::Replace(units(1..2))]);
        assert_eq!(all.steps(&pages(0..17)), [Step::Replace(units(0..2))]);
        all.withhold(&pages(20..21), false);
        all.withhold(&pages(20..21), false);
        assert_eq!(all.steps(&pages(16..17)), []);
        all.withhold(&pages(20..21), true);
        assert_eq!(all.steps(&pages(20..21)), [Step::Replace(units(1..2))]);
        all.release_all();
        assert_eq!(all.steps(&pages(16..17)), []);
    }

    #[test]
    fn pieces_are_counted_by_what_lies_between_them() {
        let mut all = Units::new(1 << 20, UNIT);
        for (unit, pieces) in [(0, 1), (2, 2), (15, 3), (14, 3), (1, 2), (3, 2)] {
            assert_eq!(all.pieces_with(&units(unit..unit + 1)), pieces);
            all.note_replaced(&units(unit..unit + 1));
            assert_eq!(all.pieces(), pieces, "{unit}");
        }
        all.note_replaced(&units(4..14));
        assert_eq!(all.pieces(), 1);
    }
}
