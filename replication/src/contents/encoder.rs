//! Contents as frames: the sending side.
use super::{
    Counts, LONGEST_NAME, LONGEST_SECTION, Operation, PAGE, PAGES, PIECE, Page, RANGES, Refused,
    bases::Bases,
    digest::Chain,
    frame::{self, BEGIN, CLOSE, DELTA, DISK, PAGES_KIND, SECTION, ZEROS, is_zero},
    lz4::Packer,
    reader::Write,
};
use crate::identity::{Digest, Epoch, Term};

/// Of the 512 words of a page, the most that differ when a difference is tried: with more, the page
/// by itself is usually as small.
const MOST_DIFFERING: u32 = 256;

/// What was sent since the encoder exists. All but the last are pages of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counters {
    /// As they are.
    pub raw: u64,
    /// Zero.
    pub zero: u64,
    /// Not sent, as their contents had been sent before.
    pub same: u64,
    /// As a difference.
    pub delta: u64,
    /// Packed by themselves.
    pub lz4: u64,
    /// Bytes of all frames.
    pub wire: u64,
}

/// Records that become one frame.
struct Records {
    kind: u32,
    bytes: Vec<u8>,
    count: usize,
    most: usize,
}

/// Turns the contents of epochs into frames, for one connection at a time. Each method appends
/// complete frames to a buffer; with a buffer that the caller empties and gives again, nothing is
/// allocated.
pub struct Encoder {
    term: Term,
    epoch: Epoch,
    serial: u32,
    chain: Chain,
    counts: Counts,
    counters: Counters,
    sequence: u32,
    pages: Records,
    deltas: Records,
    zeros: Records,
    /// The range that may grow: address and pages.
    zero: Option<(u64, u64)>,
    bases: Bases,
    packer: Option<Packer>,
    difference: Box<Page>,
}

impl Encoder {
    /// An encoder for a connection on which nothing was sent. It keeps at most `cache` bytes of
    /// pages sent earlier ([`CACHE`](super::CACHE)), and with `compress` switched off none, and
    /// sends pages as they are, unless they are zero.
    #[must_use]
    pub fn new(compress: bool, cache: usize) -> Self {
        Self {
            term: Term(0),
            epoch: Epoch(0),
            serial: 0,
            chain: Chain::after(Digest(0)),
            counts: Counts::default(),
            counters: Counters::default(),
            sequence: 0,
            pages: Records::new(PAGES_KIND, PAGES),
            deltas: Records::new(DELTA, PAGES),
            zeros: Records::new(ZEROS, RANGES),
            zero: None,
            bases: Bases::new(if compress { cache } else { 0 }),
            packer: compress.then(Packer::new),
            difference: Box::new([0; PAGE]),
        }
    }

    /// A new connection: nothing was sent on it, and what was begun on the old one is dropped.
    pub fn forget(&mut self) {
        self.bases.clear();
        (self.serial, self.chain, self.counts) = (0, Chain::after(Digest(0)), Counts::default());
        (self.pages.count, self.deltas.count, self.zeros.count) = (0, 0, 0);
        self.zero = None;
    }

    /// What was sent so far.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// Begin an epoch, or its next round while the backup is being filled. `pages` is the most pages
    /// that will follow, those that are zero included; `wall_time`, in ns since 1970, is for people.
    pub fn begin(
        &mut self,
        (term, epoch): (Term, Epoch),
        pages: u64,
        wall_time: u64,
        to: &mut Vec<u8>,
    ) {
        self.flush(to);
        (self.term, self.epoch, self.sequence) = (term, epoch, 0);
        self.serial = self.serial.saturating_add(1);
        let at = self.open(BEGIN, to);
        to.extend(self.serial.to_le_bytes());
        to.extend(pages.to_le_bytes());
        to.extend(wall_time.to_le_bytes());
        self.close_frame(at, to);
    }

    /// The contents of the page at the guest-physical `address`, which has not been sent in this
    /// round.
    pub fn page(&mut self, address: u64, page: &Page, to: &mut Vec<u8>) {
        if is_zero(page) {
            return self.zeros(address, 1, to);
        }
        let Some(packer) = &mut self.packer else {
            return self.put_page(address, page, to);
        };
        let base = self.bases.replace(address, page, self.serial, &mut self.difference);
        if let Some(base) = base {
            if base.differing == 0 {
                self.counters.same += 1;
                return;
            }
            if base.differing <= MOST_DIFFERING
                && let Some(packed) = packer.difference(&self.difference)
            {
                self.deltas.begin(self.term, self.epoch);
                let bytes = &mut self.deltas.bytes;
                bytes.extend(address.to_le_bytes());
                bytes.extend(base.serial.to_le_bytes());
                put(bytes, packed);
                self.counters.delta += 1;
                self.counts.pages += 1;
                self.deltas.end(to, &mut self.chain, &mut self.counters.wire);
                return;
            }
        }
        let Some(packed) = packer.page(page) else {
            return self.put_page(address, page, to);
        };
        self.pages.begin(self.term, self.epoch);
        self.pages.bytes.extend(address.to_le_bytes());
        put(&mut self.pages.bytes, packed);
        self.counters.lz4 += 1;
        self.counts.pages += 1;
        self.pages.end(to, &mut self.chain, &mut self.counters.wire);
    }

    fn put_page(&mut self, address: u64, page: &Page, to: &mut Vec<u8>) {
        self.pages.begin(self.term, self.epoch);
        self.pages.bytes.extend(address.to_le_bytes());
        put(&mut self.pages.bytes, page);
        self.counters.raw += 1;
        self.counts.pages += 1;
        self.pages.end(to, &mut self.chain, &mut self.counters.wire);
    }

    /// This many pages from `address` on are zero; none of them has been sent in this round. They
    /// must be in one piece of memory.
    pub fn zeros(&mut self, address: u64, pages: u64, to: &mut Vec<u8>) {
        if !self.bases.is_empty() {
            (0..pages).for_each(|page| self.bases.remove(address + page * PAGE as u64));
        }
        self.counters.zero += pages;
        self.counts.zeros += pages;
        match &mut self.zero {
            Some((first, grown)) if *first + *grown * PAGE as u64 == address => *grown += pages,
            _ => {
                self.put_zeros(to);
                self.zero = Some((address, pages));
            }
        }
    }

    fn put_zeros(&mut self, to: &mut Vec<u8>) {
        let Some((address, pages)) = self.zero.take() else { return };
        self.zeros.begin(self.term, self.epoch);
        self.zeros.bytes.extend(address.to_le_bytes());
        self.zeros.bytes.extend(pages.to_le_bytes());
        self.zeros.end(to, &mut self.chain, &mut self.counters.wire);
    }

    /// A section of the machine's state.
    ///
    /// # Errors
    /// [`Refused::SectionName`] or [`Refused::Section`] when the name is longer than
    /// [`LONGEST_NAME`], or the section than [`LONGEST_SECTION`]: no receiver would take it.
    pub fn section(&mut self, name: &str, bytes: &[u8], to: &mut Vec<u8>) -> Result<(), Refused> {
        let length = u8::try_from(name.len()).ok().filter(|_| name.len() <= LONGEST_NAME);
        let length = length.ok_or(Refused::SectionName)?;
        let total = u32::try_from(bytes.len()).ok().filter(|_| bytes.len() <= LONGEST_SECTION);
        let total = total.ok_or(Refused::Section)?;
        let (mut offset, mut rest) = (0u32, bytes);
        loop {
            let (piece, left) = rest.split_at(rest.len().min(PIECE));
            let at = self.open(SECTION, to);
            to.push(length);
            to.extend(name.as_bytes());
            to.extend(total.to_le_bytes());
            to.extend(offset.to_le_bytes());
            to.extend(piece);
            self.close_frame(at, to);
            rest = left;
            offset += piece.len() as u32;
            if rest.is_empty() {
                break;
            }
        }
        self.counts.sections += 1;
        Ok(())
    }

    /// Something that the guest did to a disk, in order over all disks. Data of more than [`PIECE`]
    /// bytes becomes several writes.
    pub fn disk(&mut self, write: &Write<'_>, to: &mut Vec<u8>) {
        let Write { disk, operation, offset, length, data } = *write;
        if data.len() > PIECE {
            let mut offset = offset;
            for data in data.chunks(PIECE) {
                let length = data.len() as u64;
                self.disk(&Write { disk, operation, offset, length, data }, to);
                offset = offset.saturating_add(length);
            }
            return;
        }
        let operation = Operation::ALL.iter().position(|known| *known == operation).unwrap_or(0);
        let at = self.open(DISK, to);
        to.extend(disk.to_le_bytes());
        to.push(operation as u8);
        to.extend(self.sequence.to_le_bytes());
        to.extend(offset.to_le_bytes());
        to.extend(length.to_le_bytes());
        to.extend(data);
        self.close_frame(at, to);
        self.sequence += 1;
        self.counts.writes += 1;
    }

    /// All of the epoch has been sent: [`Message::End`](crate::Message::End) may follow. Returns the
    /// digest of its frames.
    pub fn close(&mut self, to: &mut Vec<u8>) -> Digest {
        self.flush(to);
        let digest = self.chain.digest();
        let Counts { pages, zeros, sections, writes } = std::mem::take(&mut self.counts);
        let at = self.open(CLOSE, to);
        to.extend(pages.to_le_bytes());
        to.extend(zeros.to_le_bytes());
        to.extend(sections.to_le_bytes());
        to.extend(writes.to_le_bytes());
        to.extend(digest.0.to_le_bytes());
        self.close_frame(at, to);
        self.chain = Chain::after(digest);
        digest
    }

    /// Complete the frames that are not full yet.
    fn flush(&mut self, to: &mut Vec<u8>) {
        self.put_zeros(to);
        for records in [&mut self.pages, &mut self.deltas, &mut self.zeros] {
            records.flush(to, &mut self.chain, &mut self.counters.wire);
        }
    }

    fn open(&self, kind: u32, to: &mut Vec<u8>) -> usize {
        frame::open(to, kind, self.term, self.epoch)
    }

    fn close_frame(&mut self, at: usize, to: &mut Vec<u8>) {
        self.chain.add(frame::close(to, at));
        self.counters.wire += (to.len() - at) as u64;
    }
}

impl Records {
    fn new(kind: u32, most: usize) -> Self {
        Self { kind, bytes: Vec::new(), count: 0, most }
    }

    /// Before a record is appended.
    fn begin(&mut self, term: Term, epoch: Epoch) {
        if self.count == 0 {
            self.bytes.clear();
            frame::open(&mut self.bytes, self.kind, term, epoch);
        }
        self.count += 1;
    }

    /// After a record was appended.
    fn end(&mut self, to: &mut Vec<u8>, chain: &mut Chain, wire: &mut u64) {
        if self.count == self.most {
            self.flush(to, chain, wire);
        }
    }

    fn flush(&mut self, to: &mut Vec<u8>, chain: &mut Chain, wire: &mut u64) {
        if self.count == 0 {
            return;
        }
        chain.add(frame::close(&mut self.bytes, 0));
        *wire += self.bytes.len() as u64;
        self.count = 0;
        if to.is_empty() {
            std::mem::swap(to, &mut self.bytes);
        } else {
            to.extend_from_slice(&self.bytes);
        }
    }
}

/// Append a record's length and bytes, of at most a page.
fn put(to: &mut Vec<u8>, bytes: &[u8]) {
    to.extend((bytes.len() as u16).to_le_bytes());
    to.extend_from_slice(bytes);
}
