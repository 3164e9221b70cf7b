//! One page in LZ4's block format, and back.
use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};

use super::{PAGE, Page};

/// A page that does not become smaller than this is not worth unpacking at the other side.
const WORTH: usize = PAGE - PAGE / 8;
/// After this many pages in a row that did not become smaller, the most pages are passed by:
/// two to this power, less one.
const MOST_MISSES: u32 = 5;

/// Packs pages, without an allocation for each.
pub struct Packer {
    table: CompressTable,
    output: Box<[u8]>,
    /// Pages in a row that did not become smaller.
    misses: u32,
    /// Pages that are not tried any more.
    pass_by: u32,
}

impl Packer {
    pub fn new() -> Self {
        let output = vec![0; get_maximum_output_size(PAGE)].into();
        Self { table: CompressTable::small(), output, misses: 0, pass_by: 0 }
    }

    /// Contents of a page, if they become smaller. Data that was compressed or encrypted comes in
    /// many pages: after a failure some pages are not tried, twice as many after the next one.
    pub fn page(&mut self, page: &Page) -> Option<&[u8]> {
        if self.pass_by > 0 {
            self.pass_by -= 1;
            return None;
        }
        let length = self.pack(page);
        if length < WORTH {
            self.misses = 0;
            return self.output.get(..length);
        }
        self.misses = (self.misses + 1).min(MOST_MISSES);
        self.pass_by = (1 << self.misses) - 1;
        None
    }

    /// A difference, if it becomes smaller than a page.
    pub fn difference(&mut self, difference: &Page) -> Option<&[u8]> {
        let length = self.pack(difference);
        if length < WORTH { self.output.get(..length) } else { None }
    }

    fn pack(&mut self, page: &Page) -> usize {
        compress_into_with_table(page, &mut self.output, &mut self.table).unwrap_or(PAGE)
    }
}

/// Unpack exactly one page. Returns whether `packed` was one.
pub fn unpack(packed: &[u8], page: &mut Page) -> bool {
    decompress_into(packed, page).is_ok_and(|length| length == PAGE)
}
