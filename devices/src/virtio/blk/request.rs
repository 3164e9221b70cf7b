//! A request in the driver's layout (virtio 1.3, section 5.2.6): 16 bytes of header, the data, one
//! byte of status. Descriptor boundaries need not match those of the parts.
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::{Address, GuestAddress};

use crate::{
    Memory,
    backend::disk::SECTOR,
    virtio::chain::{self, Chain, Segment},
};

const HEADER: u64 = 16;
/// One range of a discard or write-zeroes request.
const RANGE: usize = 16;
/// Most bytes of one read or write. The specification sets no limit, but buffers may overlap: a
/// chain of 1024 could request 4 TiB. Drivers stay at a few MiB.
const MAX_TRANSFER: u64 = 256 << 20;
/// Most sectors of one discard or write-zeroes request: 64 MiB, which does not take long even where
/// the zeroes have to be written out.
pub const MAX_RANGE: u32 = 1 << 17;

/// The request, after every check that does not depend on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Data into guest memory.
    Read {
        /// First sector.
        sector: u64,
    },
    /// Data out of guest memory.
    Write {
        /// First sector.
        sector: u64,
    },
    /// Make earlier writes durable.
    Flush,
    /// The serial number.
    GetId,
    /// A range that is no longer needed.
    Discard(Range),
    /// A range to be zeroed, and whether it may be deallocated.
    WriteZeroes(Range, bool),
    /// An unknown type or flag.
    Unsupported,
    /// A known type with an invalid layout.
    Malformed,
}

/// A range of sectors, not checked against a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First sector.
    pub sector: u64,
    /// How many.
    pub count: u32,
}

impl Range {
    /// Its length.
    pub fn bytes(self) -> u64 {
        u64::from(self.count) * SECTOR
    }
}

/// Address of the status byte, or `None` when the driver left no room for it.
pub fn status(chain: &Chain) -> Option<GuestAddress> {
    let last = chain.writable().last()?;
    last.addr.checked_add(u64::from(last.len) - 1)
}

/// Parse a request, and put the segments of its data into `data`; the second result is their total
/// length. The chain must have room for a status.
pub fn parse(chain: &Chain, memory: &Memory, data: &mut Vec<Segment>) -> (Request, u64) {
    data.clear();
    let mut header = [0; HEADER as usize];
    if chain::read(memory, chain.readable(), 0, &mut header) != header.len() {
        return (Request::Malformed, 0);
    }
    let kind = u32::from_le_bytes(bytes(&header, 0));
    let sector = u64::from_le_bytes(bytes(&header, 8));
    match kind {
        VIRTIO_BLK_T_IN => cut(chain.writable(), 0, 1, data),
        VIRTIO_BLK_T_OUT => cut(chain.readable(), HEADER, 0, data),
        VIRTIO_BLK_T_GET_ID => cut(chain.writable(), 0, 1, data),
        _ => {}
    }
    let len = chain::total(data);
    let request = match kind {
        VIRTIO_BLK_T_IN | VIRTIO_BLK_T_OUT if !len.is_multiple_of(SECTOR) || len > MAX_TRANSFER => {
            Request::Malformed
        }
        VIRTIO_BLK_T_IN => Request::Read { sector },
        VIRTIO_BLK_T_OUT => Request::Write { sector },
        VIRTIO_BLK_T_FLUSH => Request::Flush,
        VIRTIO_BLK_T_GET_ID => Request::GetId,
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            range(chain, memory, kind == VIRTIO_BLK_T_DISCARD)
        }
        _ => Request::Unsupported,
    };
    (request, len)
}

/// The only range of a request, as one is the maximum (max_discard_seg and max_write_zeroes_seg are
/// 1).
fn range(chain: &Chain, memory: &Memory, discard: bool) -> Request {
    let mut range = [0; RANGE];
    let whole = chain::total(chain.readable()) == HEADER + RANGE as u64;
    if !whole || chain::read(memory, chain.readable(), HEADER, &mut range) != RANGE {
        return Request::Malformed;
    }
    let sector = u64::from_le_bytes(bytes(&range, 0));
    let count = u32::from_le_bytes(bytes(&range, 8));
    let flags = u32::from_le_bytes(bytes(&range, 12));
    let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
    let range = Range { sector, count };
    match () {
        () if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 => Request::Unsupported,
        () if discard && unmap => Request::Unsupported,
        () if count > MAX_RANGE => Request::Malformed,
        () if discard => Request::Discard(range),
        () => Request::WriteZeroes(range, unmap),
    }
}

/// `segments` without their first `front` and last `back` bytes.
fn cut(segments: &[Segment], mut front: u64, back: u64, out: &mut Vec<Segment>) {
    let mut left = chain::total(segments).saturating_sub(front).saturating_sub(back);
    for s in segments {
        let len = u64::from(s.len);
        let skip = front.min(len);
        front -= skip;
        let take = (len - skip).min(left);
        left -= take;
        if take > 0 {
            out.push(Segment { addr: s.addr.unchecked_add(skip), len: take as u32 });
        }
    }
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    for (to, from) in out.iter_mut().zip(from.iter().skip(at)) {
        *to = *from;
    }
    out
}
