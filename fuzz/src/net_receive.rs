//! Arbitrary frames from the network for a guest that provides arbitrary receive buffers, with
//! limits, pauses and saved states in between.
use std::{os::unix::net::UnixDatagram, time::Duration};

use devices::{
    Device,
    bus::BusDevice,
    testing::{Guest, RAM, Wire},
    virtio::net::{Net, NetSettings},
};

use crate::input::Input;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
/// Bytes of the header before a frame (`virtio_net_hdr_v1`).
const HEADER: usize = 12;

fn begin(guest: &mut Guest, input: &mut Input) {
    let features = guest.offered() & (u64::from(input.u32()) << 32 | u64::from(input.u32()));
    if guest.negotiate(features | 1 << 32) {
        guest.queues.clear();
        guest.place_all();
        guest.store(0x70, 15);
    }
}

/// Provide a chain of buffers for one frame, or for a part of it.
fn provide(guest: &mut Guest, input: &mut Input) {
    let Some(mut queue) = guest.queues.first().cloned() else { return };
    let (count, shape) = (1 + u16::from(input.u8() % 8), input.u8());
    let head = input.u16() % queue.size;
    for n in 0..count {
        let here = (head + n) % queue.size;
        let offset = u64::from(input.u16());
        let address = match input.u8() % 8 {
            0 => RAM - (offset & 63),
            1 => u64::MAX - offset,
            _ => (8 << 20) + offset * 16,
        };
        let length = match shape & 3 {
            0 => u32::from(input.u8()),
            1 => 1526,
            2 => 65_550,
            _ => input.u32(),
        };
        let write = if shape & 0x10 != 0 && n == 1 { 0 } else { WRITE };
        let more = if n + 1 < count { NEXT } else { 0 };
        queue.descriptor(here, address, length, write | more, (here + 1) % queue.size);
    }
    queue.publish(head);
    queue = queue.clone();
    guest.queues[0] = queue;
}

fn work(guest: &Guest) {
    // Frames that wait for buffers would never finish.
    for _ in 0..8 {
        if guest.thread.turn(Duration::ZERO) == 0 {
            break;
        }
    }
}

/// No input may cause a panic, an access outside of RAM or an unbounded wait.
pub fn entry(input: &[u8]) {
    let mut input = Input(input);
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let (flags, limit) = (input.u8(), u64::from(input.u16()));
    let settings = NetSettings {
        queue_pairs: 1,
        queue_size: 256,
        pps: (flags & 1 != 0).then_some(limit),
        bps: (flags & 2 != 0).then_some(limit * 64),
        ..NetSettings::default()
    };
    let mut guest = Guest::new(Box::new(
        Net::new("net0", settings, Some(std::sync::Arc::new(Wire(ours)))).unwrap(),
    ));
    begin(&mut guest, &mut input);
    for _ in 0..200 {
        if input.0.is_empty() {
            break;
        }
        match input.u8() % 16 {
            0..4 => provide(&mut guest, &mut input),
            4..9 => {
                let mut frame = input.bytes::<HEADER>().to_vec();
                let (length, byte) = (usize::from(input.u16()), input.u8());
                frame.resize(HEADER + length, byte);
                // Also shorter than a header.
                frame.truncate(HEADER + length - usize::from(byte & 15).min(HEADER + length));
                let _ = theirs.send(&frame);
            }
            9..13 => {
                if let Some(notifier) = guest.transport.notifiers().first() {
                    notifier.write(1).unwrap();
                }
                work(&guest);
            }
            13 => {
                let Some(queue) = guest.queues.first() else { continue };
                match input.u8() % 3 {
                    0 => queue.set_available_index(input.u16()),
                    1 => queue.set_used_event(input.u16()),
                    _ => queue.set_used_index(input.u16()),
                }
            }
            14 => {
                guest.transport.pause();
                if let Ok(section) = guest.transport.save()
                    && let Some(section) = input.change(&section)
                {
                    let _ = guest.transport.restore(&section);
                }
                guest.transport.resume();
                work(&guest);
            }
            _ if input.u8() & 1 != 0 => begin(&mut guest, &mut input),
            _ => {
                let (offset, value) = (u64::from(input.u16()) % 0x140, input.bytes::<8>());
                guest.transport.write(offset, &value[..1 << (input.u8() % 4)]);
            }
        }
    }
    guest.transport.pause();
    guest.transport.reset();
}
