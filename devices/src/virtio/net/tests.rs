mod gated;
mod hostile;
mod lifecycle;
mod link;
mod tap;
mod wire;

use std::{
    os::unix::net::UnixDatagram,
    sync::{Arc, atomic::Ordering::SeqCst},
};

use self::wire::{Switches, Wire};
use super::*;
use crate::{
    Device,
    backend::net::HEADER,
    state::Section,
    testing::{Buffer, Guest},
};

const RX: u16 = 0;
const TX: u16 = 1;
const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const CONTROL: u64 = 1 << VIRTIO_NET_F_CTRL_VQ;

fn settings(queue_pairs: u16) -> NetSettings {
    NetSettings { queue_pairs, queue_size: 256, ..NetSettings::default() }
}

/// A guest with an interface, and the peer of its back-end.
struct Lan {
    guest: Guest,
    peers: Vec<UnixDatagram>,
    switches: Arc<Switches>,
    stats: Arc<NetStats>,
}

impl Lan {
    fn new(settings: NetSettings, header: bool) -> Self {
        Self::over(settings, header, |wire| wire)
    }

    /// With a back-end that is made from the wire.
    fn over(
        settings: NetSettings,
        header: bool,
        make: impl FnOnce(Arc<dyn NetBackend>) -> Arc<dyn NetBackend>,
    ) -> Self {
        let (wire, peers, switches) = Wire::new(settings.queue_pairs.into(), header);
        let net = Net::new("net0", settings, Some(make(Arc::new(wire)))).unwrap();
        let stats = net.stats();
        Self { guest: Guest::new(Box::new(net)), peers, switches, stats }
    }

    fn started(features: u64) -> Self {
        let mut lan = Self::new(settings(1), true);
        lan.guest.start(features);
        lan
    }

    /// A frame as it looks on the wire: header, then `len` bytes.
    fn frame(len: usize, seed: u8) -> Vec<u8> {
        let mut frame = vec![0; HEADER];
        frame.extend((0..len).map(|n| (n as u8).wrapping_mul(31).wrapping_add(seed)));
        frame
    }

    /// Send a frame from the host, and let the device run.
    fn host_sends(&mut self, frame: &[u8]) {
        self.peers[0].send(frame).unwrap();
        self.guest.thread.settle();
    }

    /// The driver makes `n` receive buffers of `len` bytes available, without notifying.
    fn post(&mut self, n: usize, len: u32) -> Vec<u64> {
        let mut addresses = Vec::new();
        for _ in 0..n {
            let at = self.guest.room(len as usize);
            let queue = &mut self.guest.queues[usize::from(RX)];
            let head = queue.chain(&[(at, len, true)]);
            queue.publish(head);
            addresses.push(at);
        }
        addresses
    }

    fn refill(&mut self, n: usize, len: u32) -> Vec<u64> {
        let addresses = self.post(n, len);
        self.guest.kick(RX);
        addresses
    }

    /// Lengths that the device reports as used on the receive queue.
    fn used(&mut self) -> Vec<u32> {
        let queue = &mut self.guest.queues[usize::from(RX)];
        std::iter::from_fn(|| queue.next_used()).map(|(_, len)| len).collect()
    }

    /// Send a frame from the driver.
    fn send(&mut self, frame: &[u8]) {
        let at = self.guest.bytes(frame);
        self.guest.request(TX, &[(at, frame.len() as u32, false)]);
    }

    /// What has arrived at the host, if anything.
    fn at_host(&self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 70_000];
        let n = self.peers[0].recv(&mut frame).ok()?;
        frame.truncate(n);
        Some(frame)
    }

    fn tx_done(&mut self) -> usize {
        let queue = &mut self.guest.queues[usize::from(TX)];
        std::iter::from_fn(|| queue.next_used()).count()
    }

    /// A command on control queue `index`: the device's answer, and what it reports as used.
    fn command(&mut self, index: u16, bytes: &[u8]) -> (u8, u32) {
        let (command, status) = (self.guest.bytes(bytes), self.guest.bytes(&[0xee]));
        let buffers: [Buffer; 2] = [(command, bytes.len() as u32, false), (status, 1, true)];
        self.guest.request(index, &buffers);
        let (_, len) = self.guest.completion(index);
        (self.guest.peek(status, 1)[0], len)
    }

    fn drops(&self) -> (u64, u64) {
        (self.stats.rx.drops.load(SeqCst), self.stats.tx.drops.load(SeqCst))
    }
}

#[test]
fn a_frame_from_the_host_lands_in_the_drivers_buffer() {
    for features in [0, MERGEABLE, F_EVENT_IDX, MERGEABLE | F_EVENT_IDX] {
        let mut lan = Lan::started(features);
        let at = lan.refill(64, 1526)[0];
        let frame = Lan::frame(100, 7);
        lan.host_sends(&frame);
        assert_eq!(lan.used(), [112]);
        let mut expected = frame;
        expected[10] = 1;
        assert_eq!(lan.guest.peek(at, 112), expected, "num_buffers is 1, the rest untouched");
        assert!(lan.guest.interrupted());
        assert_eq!(lan.stats.rx.packets.load(SeqCst), 1);
        assert_eq!(lan.stats.rx.bytes.load(SeqCst), 100);
    }
}

#[test]
fn a_long_frame_spreads_over_as_many_mergeable_buffers_as_it_needs() {
    let mut lan = Lan::started(MERGEABLE);
    let addresses = lan.refill(100, 1526);
    let frame = Lan::frame(60_000, 3);
    lan.host_sends(&frame);
    lan.host_sends(&Lan::frame(20, 4));
    let used = lan.used();
    assert_eq!(used.len(), 40 + 1);
    assert!(used[..39].iter().all(|&n| n == 1526), "all but the last are full");
    assert_eq!(used[39], 60_012 - 39 * 1526);
    assert_eq!(used[40], 32, "the next frame begins in the next buffer");
    let mut seen = Vec::new();
    for (at, len) in addresses.iter().zip(&used[..40]) {
        seen.extend(lan.guest.peek(*at, *len as usize));
    }
    assert_eq!(seen[10..12], 40u16.to_le_bytes());
    assert_eq!(seen[12..], frame[12..]);
}

#[test]
fn frames_wait_on_the_host_while_the_driver_has_no_buffers() {
    for features in [MERGEABLE, MERGEABLE | F_EVENT_IDX] {
        let mut lan = Lan::started(features);
        for n in 0..4 {
            lan.host_sends(&Lan::frame(1000, n));
        }
        assert_eq!(lan.used().len(), 0);
        assert_eq!(lan.switches.calls.load(SeqCst), 0, "no frame is read without room for it");
        let addresses = lan.refill(2, 1526);
        assert_eq!(lan.used(), [1012, 1012]);
        let more = lan.refill(2, 1526);
        assert_eq!(lan.used(), [1012, 1012]);
        for (n, at) in addresses.into_iter().chain(more).enumerate() {
            assert_eq!(lan.guest.peek(at + 12, 1000), Lan::frame(1000, n as u8)[12..]);
        }
        assert_eq!(lan.drops().0, 0);
    }
}

#[test]
fn a_long_frame_waits_for_enough_buffers_and_is_not_cut_off() {
    let mut lan = Lan::started(MERGEABLE);
    let mut addresses = lan.refill(5, 1526);
    lan.host_sends(&Lan::frame(9000, 1));
    lan.host_sends(&Lan::frame(10, 2));
    assert_eq!(lan.used().len(), 0, "6 buffers are needed, 5 are there");
    addresses.extend(lan.refill(2, 1526));
    let used = lan.used();
    assert_eq!(used, [1526, 1526, 1526, 1526, 1526, 1382, 22]);
    let mut seen = Vec::new();
    for (at, len) in addresses.iter().zip(&used[..6]) {
        seen.extend(lan.guest.peek(*at, *len as usize));
    }
    assert_eq!(seen[12..], Lan::frame(9000, 1)[12..]);
}

#[test]
fn a_frame_from_the_guest_leaves_as_it_is() {
    let mut lan = Lan::started(F_INDIRECT_DESC);
    let mut frame = Lan::frame(65_000, 9);
    frame[0] = 1;
    let at = lan.guest.bytes(&frame);
    let pieces: [Buffer; 4] = [
        (at, 5, false),
        (at + 5, 7, false),
        (at + 12, 30_000, false),
        (at + 30_012, 35_000, false),
    ];
    lan.guest.request(TX, &pieces);
    assert_eq!(lan.at_host(), Some(frame));
    assert_eq!(lan.guest.completion(TX), (0, 0));
    assert_eq!(lan.stats.tx.bytes.load(SeqCst), 65_000);
}

#[test]
fn the_driver_decides_whether_it_is_interrupted() {
    let mut lan = Lan::started(0);
    lan.send(&Lan::frame(60, 0));
    assert!(lan.guest.interrupted());
    let available = lan.guest.queues[1].available;
    let flags = |lan: &Lan, value: u16| {
        let at = vm_memory::GuestAddress(available);
        vm_memory::Bytes::write_obj(&lan.guest.memory, value, at).unwrap();
    };
    flags(&lan, 1);
    lan.send(&Lan::frame(60, 0));
    assert!(!lan.guest.interrupted(), "NO_INTERRUPT");

    let mut lan = Lan::started(F_EVENT_IDX);
    lan.guest.queues[1].set_used_event(2);
    for expected in [false, false, true, false] {
        lan.send(&Lan::frame(60, 0));
        assert_eq!(lan.guest.interrupted(), expected, "used_event is 2");
    }
}

#[test]
fn a_host_that_takes_no_more_gets_the_rest_later() {
    let mut lan = Lan::started(0);
    let at = lan.guest.bytes(&Lan::frame(1500, 5));
    for _ in 0..200 {
        let queue = &mut lan.guest.queues[1];
        let head = queue.chain(&[(at, 1512, false)]);
        queue.publish(head);
    }
    lan.guest.kick(TX);
    let before = lan.tx_done();
    assert!(before < 200, "the socket's buffer is full");
    let calls = lan.switches.calls.load(SeqCst);
    lan.guest.thread.settle();
    assert_eq!(lan.switches.calls.load(SeqCst), calls, "it waits, it does not spin");
    let mut arrived = 0;
    let thread = lan.guest.thread.clone();
    thread.until("all frames have arrived", || {
        while lan.at_host().is_some() {
            arrived += 1;
        }
        arrived == 200
    });
    assert_eq!((before + lan.tx_done(), lan.drops().1), (200, 0));
}

#[test]
fn a_flood_is_worked_off_in_turns() {
    let mut lan = Lan::started(MERGEABLE);
    lan.peers[0].set_nonblocking(true).unwrap();
    // Many frames arrive before the device runs: more than one batch.
    let mut wanted = 0;
    while lan.peers[0].send(&Lan::frame(14, 0)).is_ok() {
        wanted += 1;
    }
    let mut got = 0;
    while got < wanted {
        lan.refill(20, 64);
        let used = lan.used();
        assert!(used.iter().all(|&n| n == 26));
        assert!(!used.is_empty(), "{got} of {wanted}");
        got += used.len();
    }
    assert_eq!(lan.used().len(), 0);
}

#[test]
fn frames_without_virtio_header_get_one() {
    let mut lan = Lan::new(settings(1), false);
    let offered = lan.guest.offered();
    assert_eq!(offered & WITH_HEADER, 0, "no offloads");
    lan.guest.start(MERGEABLE);
    let at = lan.refill(64, 1526)[0];
    lan.host_sends(&[0xaa; 60]);
    assert_eq!(lan.used(), [72]);
    assert_eq!(lan.guest.peek(at, 72), [&[0; 10][..], &[1, 0], &[0xaa; 60]].concat());
    lan.send(&Lan::frame(60, 1));
    assert_eq!(lan.at_host().unwrap(), Lan::frame(60, 1)[12..]);
}

#[test]
fn rates_are_limited_in_each_direction() {
    let limits = NetSettings { pps: Some(100), ..settings(1) };
    let mut lan = Lan::new(limits, true);
    lan.guest.start(MERGEABLE);
    let at = lan.guest.bytes(&Lan::frame(60, 0));
    for _ in 0..30 {
        let queue = &mut lan.guest.queues[1];
        let head = queue.chain(&[(at, 72, false)]);
        queue.publish(head);
    }
    lan.guest.kick(TX);
    let first = lan.tx_done();
    assert!((1..30).contains(&first), "{first} at once, the rest later");
    lan.post(64, 1526);
    for n in 0..30 {
        lan.peers[0].send(&Lan::frame(60, n)).unwrap();
    }
    lan.guest.kick(RX);
    let first_rx = lan.used().len();
    assert!((1..30).contains(&first_rx), "{first_rx} at once, the rest later");
    let (mut sent, mut received) = (first, first_rx);
    let thread = lan.guest.thread.clone();
    thread.until("the timers let the rest through", || {
        sent += lan.tx_done();
        received += lan.used().len();
        sent == 30 && received == 30
    });
}

#[test]
fn a_frame_that_waits_for_the_host_is_charged_once_and_sent_later() {
    let mut lan = Lan::new(NetSettings { pps: Some(20), ..settings(1) }, true);
    lan.guest.start(0);
    lan.send(&Lan::frame(60, 0));
    lan.send(&Lan::frame(60, 1));
    // The host refuses the last frame that the limit lets through at once. It then signals that it
    // accepts more, while the limit would not.
    lan.switches.fault.store(libc::EAGAIN, SeqCst);
    lan.send(&Lan::frame(60, 2));
    lan.switches.fault.store(0, SeqCst);
    lan.send(&Lan::frame(60, 3));
    let mut done = 0;
    let thread = lan.guest.thread.clone();
    thread.until("all frames are dealt with", || {
        done += lan.tx_done();
        done == 4
    });
}

#[test]
fn what_was_received_is_marked_dirty() {
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion, bitmap::Bitmap};
    for buffers in [100, 10] {
        let mut lan = Lan::started(MERGEABLE);
        let addresses = lan.refill(buffers, 4096);
        let region = lan.guest.memory.find_region(GuestAddress(0)).unwrap();
        let mapping: &vm_memory::MmapRegion<_> = region;
        mapping.bitmap().reset();
        lan.host_sends(&Lan::frame(10_000, 1));
        let region = lan.guest.memory.find_region(GuestAddress(0)).unwrap();
        let dirty = |at: u64| region.bitmap().dirty_at(at as usize);
        assert!(addresses[..3].iter().all(|at| dirty(*at)), "three pages were written");
        assert!(addresses[3..].iter().all(|at| !dirty(*at)), "the others were not");
        assert!(dirty(lan.guest.queues[0].used));
    }
}
