//! A peer that sends the contents of epochs: frames with right checksums and any bodies, among them
//! those of a real sender.
use replication::{
    Epoch, Term,
    contents::{Bounds, Event, Held, Reader, Refused},
};

const PAGES: u64 = 64;
const MAX_EPOCH: u64 = 64 << 10;
const TERM: Term = Term(1);

fn bounds() -> Bounds {
    let ram = vec![0..PAGES / 2 * 4096, 1 << 32..(1 << 32) + PAGES / 2 * 4096];
    let sections = vec!["vcpu0".to_owned(), "blk".to_owned()];
    Bounds { ram, disks: vec![1 << 20], sections, max_epoch: MAX_EPOCH }
}

/// The frames that an input describes: length, kind and body of each.
fn frames(mut input: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    while let [low, high, kind, rest @ ..] = input {
        let length = usize::from(u16::from_le_bytes([*low, *high])).min(rest.len());
        let (body, left) = rest.split_at(length);
        let at = bytes.len();
        let optional = u32::from(*kind >= 0x80) << 31;
        bytes.extend((u32::from(*kind & 0x7f) | optional).to_le_bytes());
        bytes.extend(u32::try_from(length).unwrap().to_le_bytes());
        bytes.extend(body);
        let crc = crc32fast::hash(&bytes[at..]);
        bytes.extend(crc.to_le_bytes());
        input = left;
    }
    bytes
}

/// Every event keeps the rules that a receiver relies on; the size of the pieces does not matter.
pub fn entry(input: &[u8]) {
    let Some((first, rest)) = input.split_first() else { return };
    let bytes = frames(rest);
    let whole = run(&bytes, bytes.len(), first % 2 == 1);
    assert_eq!(whole, run(&bytes, usize::from(first / 2) + 1, first % 2 == 1));
}

/// The number of whole epochs, and how it ended.
fn run(bytes: &[u8], piece: usize, filling: bool) -> (usize, Option<Refused>) {
    let mut reader = Reader::new(bounds());
    reader.accept(TERM, Epoch(0), filling);
    let (mut held, mut whole) = (Held::new(), 0);
    for mut piece in bytes.chunks(piece.max(1)) {
        loop {
            let event = match reader.next(&mut piece) {
                Ok(Some(event)) => event,
                Ok(None) => break,
                Err(refused) => return (whole, Some(refused)),
            };
            match &event {
                Event::Page { address, .. } | Event::Delta { address, .. } => {
                    assert!(is_memory(*address, 1));
                }
                Event::Zeros { address, pages } => assert!(is_memory(*address, *pages)),
                Event::Section { name, .. } => assert!(*name < 2),
                Event::Disk(write) => assert!(write.offset + write.length <= 1 << 20),
                Event::Begin { .. } => held.clear(),
                Event::Close(_) => whole += 1,
                Event::Message(_) => {}
            }
            held.take(&event);
            let kept: usize = held.sections().map(|(_, bytes)| bytes.len()).sum();
            let written: usize = held.writes().map(|write| write.data.len()).sum();
            let pages = held.changes().count();
            assert!(filling || (kept + written + pages * 64) as u64 <= MAX_EPOCH);
        }
    }
    (whole, None)
}

fn is_memory(address: u64, pages: u64) -> bool {
    address.is_multiple_of(4096)
        && bounds()
            .ram
            .iter()
            .any(|range| range.contains(&address) && pages * 4096 <= range.end - address)
}
