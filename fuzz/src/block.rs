//! Valid requests, many at once, to a disk with io_uring and rate limits, with pauses and saved
//! states while some are in flight.
use std::time::Duration;

use devices::{
    Device,
    backend::disk::{Aio, Disk, OpenOptions},
    testing::{Guest, HIGH},
    virtio::blk::{Backend, Block, Settings},
    worker::Park,
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

use crate::input::Input;

/// Sectors of the disk.
const SECTORS: u64 = 256;
const SECTOR: u64 = 512;
/// Addresses of the header, the status and the data of request `slot`.
const HEADERS: u64 = 8 << 20;
const DATA: u64 = 9 << 20;
const SLOTS: u64 = 16;
/// Most bytes of data in a request.
const MAX_BYTES: u64 = 64 * SECTOR;

fn work(guest: &Guest) {
    for _ in 0..16 {
        if guest.thread.turn(Duration::from_micros(100)) == 0 {
            break;
        }
    }
}

/// One request of `count` sectors from `sector` on, in `pieces` buffers.
fn publish(guest: &mut Guest, slot: u64, kind: u32, sector: u64, count: u64, pieces: u64) {
    let Some(mut queue) = guest.queues.first().cloned() else { return };
    let header = HEADERS + slot * 64;
    let mut words = [0; 16];
    words[..4].copy_from_slice(&kind.to_le_bytes());
    words[8..].copy_from_slice(&sector.to_le_bytes());
    guest.memory.write_slice(&words, GuestAddress(header)).unwrap();
    let data = DATA + slot * MAX_BYTES;
    let mut chain = vec![(header, 16, false)];
    match kind {
        // Discard and write zeroes: the range.
        11 | 13 => {
            let range =
                [&sector.to_le_bytes()[..], &(count as u32).to_le_bytes(), &[0; 4]].concat();
            guest.memory.write_slice(&range, GuestAddress(data)).unwrap();
            chain.push((data, 16, false));
        }
        4 => {}
        8 => chain.push((data, 20, true)),
        _ => {
            let bytes = count * SECTOR;
            let piece = (bytes / pieces).max(1);
            let ends = (1..pieces).map(|n| n * piece).chain([bytes]);
            let mut at = 0;
            for end in ends {
                if at < end {
                    chain.push((data + at, (end - at) as u32, kind == 0));
                }
                at = end;
            }
        }
    }
    chain.push((header + 32, 1, true));
    let head = queue.chain(&chain);
    queue.publish(head);
    guest.queues[0] = queue;
}

/// No input may cause a panic or an unbounded wait.
pub fn entry(input: &[u8]) {
    let mut input = Input(input);
    let image = TempFile::new().unwrap();
    image.as_file().set_len(SECTORS * SECTOR).unwrap();
    let flags = input.u8();
    let options = OpenOptions {
        aio: if flags & 3 == 3 { Aio::Off } else { Aio::Auto },
        discard: flags & 4 != 0,
        ..OpenOptions::default()
    };
    let backend = Backend {
        ops_per_second: (flags & 8 != 0).then_some(1 + u64::from(input.u16()) * 16),
        bytes_per_second: (flags & 16 != 0).then_some(1 + u64::from(input.u32())),
        ..Disk::open(image.as_path(), &options).unwrap().into()
    };
    let settings = Settings { queues: 1, queue_size: 64, on_error: None };
    let mut guest = Guest::new(Box::new(Block::new("vda", settings, Some(backend))));
    let features = guest.offered();
    guest.start(features & !(u64::from(input.u8()) << 28) | 1 << 32);
    guest.place_all();
    // The contents of guest memory, and so of the data that it writes.
    for slot in 0..SLOTS {
        let bytes = vec![slot as u8 + 1; MAX_BYTES as usize];
        guest.memory.write_slice(&bytes, GuestAddress(DATA + slot * MAX_BYTES)).unwrap();
    }
    guest.memory.write_slice(&[7; 512], GuestAddress(HIGH)).unwrap();
    for _ in 0..200 {
        if input.0.is_empty() {
            break;
        }
        match input.u8() % 8 {
            0..4 => {
                let [slot, kind, sector, count, pieces] = input.bytes();
                let kind = [0, 0, 1, 1, 1, 4, 8, 11, 13, 13][usize::from(kind % 10)];
                // Some extend beyond the end of the disk.
                let (sector, count) = (u64::from(sector), u64::from(count % 64) + 1);
                let slot = u64::from(slot) % SLOTS;
                publish(&mut guest, slot, kind, sector, count, 1 + u64::from(pieces % 8));
            }
            4 | 5 => {
                if let Some(notifier) = guest.transport.notifiers().first() {
                    notifier.write(1).unwrap();
                }
                work(&guest);
            }
            6 => {
                let how = input.u8();
                // Waiting for those in flight, or not: then they are carried out again.
                guest.thread.parks(if how & 2 == 0 { Park::Drain } else { Park::Keep });
                guest.transport.pause();
                guest.thread.parks(Park::Drain);
                let section = guest.transport.save().unwrap();
                // Unmodified, or with small changes. A disk that has been written to since is
                // refused.
                let section = match how & 1 {
                    0 => Some(section),
                    _ => input.change(&section),
                };
                if let Some(section) = section {
                    let _ = guest.transport.restore(&section);
                }
                guest.transport.resume();
            }
            _ => work(&guest),
        }
    }
    guest.transport.pause();
    guest.transport.reset();
}
