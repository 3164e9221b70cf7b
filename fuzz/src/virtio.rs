//! A driver controlled by the input: registers, rings, descriptors, memory and notifications of a
//! disk, a NIC, a console or a source of randomness, with pauses, resets and saved states in
//! between.
use std::{fs::File, io::Write, os::unix::net::UnixDatagram, sync::Arc, time::Duration};

use devices::{
    Device,
    backend::{
        char::Char,
        disk::{Aio, Disk, OpenOptions},
    },
    bus::BusDevice,
    testing::{DriverQueue, Guest, HIGH, HIGH_LEN, RAM, Wire},
    virtio::{
        VirtioDevice, blk,
        console::Console,
        net::{Net, NetSettings},
        rng::Rng,
    },
};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::tempfile::TempFile;

use crate::input::Input;

/// An address, mostly one in use.
fn address(input: &mut Input) -> u64 {
    let offset = u64::from(input.u16());
    match input.u8() {
        0 => RAM - (offset & 63),
        1 => HIGH + (offset & 4095),
        2 => HIGH + HIGH_LEN - (offset & 63),
        3 => u64::from_le_bytes(input.bytes()),
        // The rings of queue 0.
        4 => (1 << 20) + (offset & 0x3fff),
        _ => (8 << 20) + offset,
    }
}

/// The host's ends of the devices' back-ends.
struct Host {
    image: TempFile,
    frames: Option<UnixDatagram>,
    typist: Option<File>,
}

impl Host {
    fn new() -> Self {
        let image = TempFile::new().unwrap();
        image.as_file().set_len(1 << 20).unwrap();
        Self { image, frames: None, typist: None }
    }

    fn device(&mut self, kind: u8) -> Box<dyn VirtioDevice> {
        match kind % 6 {
            0..3 => {
                let aio = if kind.is_multiple_of(6) { Aio::Auto } else { Aio::Off };
                let (readonly, discard) = (kind & 0x40 != 0, kind & 0x80 != 0);
                let options = OpenOptions { readonly, discard, aio, ..OpenOptions::default() };
                let disk = Disk::open(self.image.as_path(), &options).unwrap();
                let limited = (kind & 0x20 != 0).then_some(5);
                let backend = blk::Backend { ops_per_second: limited, ..disk.into() };
                let settings = blk::Settings { queues: 2, queue_size: 16, on_error: None };
                Box::new(blk::Block::new("vda", settings, Some(backend)))
            }
            3 => {
                let (ours, theirs) = UnixDatagram::pair().unwrap();
                ours.set_nonblocking(true).unwrap();
                theirs.set_nonblocking(true).unwrap();
                self.frames = Some(theirs);
                let pps = (kind & 0x40 != 0).then_some(5);
                let settings =
                    NetSettings { queue_pairs: 1, queue_size: 256, pps, ..NetSettings::default() };
                Box::new(Net::new("net0", settings, Some(Arc::new(Wire(ours)))).unwrap())
            }
            4 => {
                let char = Char::pty().unwrap();
                let path = char.name.trim_start_matches("pty:");
                self.typist = File::options().write(true).open(path).ok();
                Box::new(Console::new("con0", char))
            }
            _ => {
                let limit = (kind & 0x40 != 0).then_some(1000);
                Box::new(Rng::new("rng0", "/dev/urandom".as_ref(), limit).unwrap())
            }
        }
    }

    /// An event from outside the guest.
    fn disturb(&mut self, byte: u8) {
        let bytes = vec![byte; 12 + usize::from(byte) * 9];
        if let Some(frames) = &self.frames {
            let _ = frames.send(&bytes);
            // Receiving what the guest has sent makes room.
            let _ = frames.recv(&mut [0; 64]);
        }
        if let Some(typist) = &mut self.typist {
            let _ = typist.write(&bytes[..usize::from(byte & 63)]);
        }
    }
}

/// Workers that always have more work would never finish.
fn work(guest: &Guest) {
    for _ in 0..8 {
        if guest.thread.turn(Duration::ZERO) == 0 {
            break;
        }
    }
}

fn begin(guest: &mut Guest, input: &mut Input) {
    let features = guest.offered() & (u64::from(input.u32()) << 32 | u64::from(input.u32()));
    if !guest.negotiate(features | 1 << 32) {
        return;
    }
    guest.queues.clear();
    for index in 0..4 {
        let max = guest.queue_max(index);
        if max > 0 {
            let size = max.min(2 << (input.u8() % 8));
            let queue = guest.place(index, size);
            guest.queues.push(queue);
        }
    }
    guest.store(0x70, 15);
}

fn queue(guest: &mut Guest, input: &mut Input) -> Option<(u16, DriverQueue)> {
    let index = usize::from(input.u8()) % guest.queues.len().max(1);
    guest.queues.get(index).map(|queue| (index as u16, queue.clone()))
}

/// A request like a correct driver's, or nearly: its header, and the first bytes of its data.
fn request(kind: u8, input: &mut Input) -> (Vec<u8>, Vec<u8>) {
    let [number, class, command, value, sector, count, flags] = input.bytes();
    if kind % 6 == 3 {
        return (vec![class % 6, command % 3], vec![value & 0x82, count & 1, 0, 0, 0, 0, 0, 0]);
    }
    // In, out, flush, identity, discard, write zeroes; and an unknown type.
    let number = [0, 1, 4, 8, 11, 13, 77][usize::from(number % 7)];
    let header = [number, 0, 0, 0, 0, 0, 0, 0, sector, value & 15, 0, 0, 0, 0, 0, 0];
    let range = [sector, value & 15, 0, 0, 0, 0, 0, 0, count, 0, 0, 0, flags & 3, 0, 0, 0];
    (header.to_vec(), range.to_vec())
}

/// No input may cause a panic, an access outside of RAM or an unbounded wait.
pub fn entry(input: &[u8]) {
    let mut input = Input(input);
    let mut host = Host::new();
    let kind = input.u8();
    let mut guest = Guest::new(host.device(kind));
    begin(&mut guest, &mut input);
    for _ in 0..300 {
        if input.0.is_empty() {
            break;
        }
        match input.u8() % 16 {
            0..4 => {
                let Some((_, queue)) = queue(&mut guest, &mut input) else { continue };
                let index = u16::from(input.u8()) % queue.size;
                let (address, flags) = (address(&mut input), u16::from(input.u8() & 7));
                let length = match input.u8() % 4 {
                    0 => input.u32(),
                    1 => u32::from(input.u8()) * 512,
                    _ => u32::from(input.u8()),
                };
                queue.descriptor(index, address, length, flags, u16::from(input.u8()));
            }
            4 => {
                let Some((number, mut queue)) = queue(&mut guest, &mut input) else { continue };
                let (first, second) = request(kind, &mut input);
                let (header, data, status) = (8 << 20, (8 << 20) + 4096, (8 << 20) + 4000);
                guest.memory.write_slice(&first, GuestAddress(header)).unwrap();
                guest.memory.write_slice(&second, GuestAddress(data)).unwrap();
                let shape = input.u8();
                let length = match shape & 0xf0 {
                    0 => second.len() as u32,
                    _ => u32::from(shape >> 4) * 512,
                };
                let into_guest = shape & 1 != 0;
                let first = (header, first.len() as u32, false);
                let chain = [first, (data, length, into_guest), (status, 1, true)];
                let head = queue.chain(&chain[..3 - usize::from(shape >> 1 & 1)]);
                queue.publish(head);
                guest.queues[usize::from(number)] = queue;
            }
            5 | 6 => {
                let Some((_, queue)) = queue(&mut guest, &mut input) else { continue };
                queue.publish(u16::from(input.u8()));
            }
            7 => {
                let Some((_, queue)) = queue(&mut guest, &mut input) else { continue };
                match input.u8() % 3 {
                    0 => queue.set_available_index(input.u16()),
                    1 => queue.set_used_event(input.u16()),
                    _ => queue.set_used_index(input.u16()),
                }
            }
            8 => {
                let address = GuestAddress(address(&mut input));
                // Writes outside of RAM fail.
                let _ = guest.memory.write_slice(&input.bytes::<16>(), address);
            }
            9..12 => {
                if let Some(notifier) = guest.transport.notifiers().get(usize::from(input.u8() % 3))
                {
                    notifier.write(1).unwrap();
                }
                work(&guest);
            }
            12 => {
                let (offset, value) = (u64::from(input.u16()) % 0x140, input.bytes::<8>());
                let width = 1 << (input.u8() % 4);
                guest.transport.write(offset, &value[..width]);
            }
            13 => host.disturb(input.u8()),
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
            _ => begin(&mut guest, &mut input),
        }
    }
    work(&guest);
    guest.transport.pause();
    guest.transport.reset();
}
