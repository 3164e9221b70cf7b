// UNSAFETY: a network namespace for the test, and a packet socket in it, are made by calls that the
// standard library does not have.
#![expect(unsafe_code)]
//! Tests with real tap devices, in a network namespace that lasts as long as the test's thread.
//!
//! They need root (CAP_NET_ADMIN) and /dev/net/tun, and fail with a message where those are
//! missing.
use std::{
    fs::File,
    io::{ErrorKind, Read, Write},
    mem,
    net::{SocketAddr, UdpSocket},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    time::Duration,
};

use super::{link, *};
use crate::backend::net::tap::{Tap, TapError};

const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 7];
const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;
const MQ: u64 = 1 << VIRTIO_NET_F_MQ;

/// Move this thread into a network namespace without interfaces.
fn new_namespace() {
    // SAFETY: changes this thread only, which ends with the test.
    let moved = unsafe { libc::unshare(libc::CLONE_NEWNET) };
    assert_eq!(moved, 0, "this test needs root: {}", std::io::Error::last_os_error());
}

/// A persistent tap, which stays when no process has it open.
fn add_tap(name: &str, flags: i32) {
    let fd = launcher_opens(name, flags | libc::IFF_NO_PI);
    // SAFETY: TUNSETPERSIST takes a number.
    let set = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETPERSIST, 1) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

fn make_tap(options: i32) {
    new_namespace();
    add_tap("t0", libc::IFF_TAP | options);
    link::add_address("t0", [10, 0, 0, 1]);
    link::set("t0", true);
    link::add_neighbour("t0", [10, 0, 0, 2], GUEST_MAC);
}

/// Open the tap as a machine does, and wait until the host has noticed.
fn open_tap(queues: usize) -> Tap {
    let tap = Tap::open("t0", queues).unwrap();
    link::await_carrier("t0");
    tap
}

/// A socket of the host, on port 5000.
fn host_socket() -> UdpSocket {
    let socket = UdpSocket::bind("10.0.0.1:5000").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    socket
}

/// The next datagram. The wait may be interrupted when the test machine is suspended.
fn hear(socket: &UdpSocket, bytes: &mut [u8]) -> (usize, SocketAddr) {
    loop {
        match socket.recv_from(bytes) {
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            heard => return heard.unwrap(),
        }
    }
}

fn nic(pairs: u16, tap: Tap) -> Guest {
    let settings = NetSettings { mac: Some(GUEST_MAC), ..settings(pairs) };
    Guest::new(Box::new(Net::new("net0", settings, Some(Arc::new(tap))).unwrap()))
}

fn refill(guest: &mut Guest, queue: u16, n: usize, len: u32) {
    for _ in 0..n {
        let at = guest.room(len as usize);
        let q = &mut guest.queues[usize::from(queue)];
        let head = q.chain(&[(at, len, true)]);
        q.publish(head);
    }
    guest.kick(queue);
}

/// Every frame that has arrived on receive queue `queue`, header included, buffers joined.
fn received(guest: &mut Guest, queue: u16) -> Vec<Vec<u8>> {
    let mut frames = Vec::new();
    let memory = guest.memory.clone();
    let q = &mut guest.queues[usize::from(queue)];
    let mut pieces = Vec::new();
    while let Some((head, len)) = q.next_used() {
        let descriptor = vm_memory::GuestAddress(q.descriptors + 16 * u64::from(head));
        let at: u64 = vm_memory::Bytes::read_obj(&memory, descriptor).unwrap();
        let mut bytes = vec![0; len as usize];
        vm_memory::Bytes::read_slice(&memory, &mut bytes, vm_memory::GuestAddress(at)).unwrap();
        pieces.push(bytes);
    }
    let mut pieces = pieces.into_iter();
    while let Some(mut frame) = pieces.next() {
        for _ in 1..u16::from_le_bytes([frame[10], frame[11]]) {
            frame.extend(pieces.next().expect("a frame is in the used ring as a whole"));
        }
        frames.push(frame);
    }
    frames
}

/// Wait for a frame that `wanted` accepts, skipping others (IPv6 sends unsolicited frames).
fn await_frame(guest: &mut Guest, queue: u16, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let thread = guest.thread.clone();
    let mut found = None;
    thread.until("the frame", || {
        found = found.take().or_else(|| received(guest, queue).into_iter().find(|f| wanted(f)));
        found.is_some()
    });
    found.unwrap()
}

fn checksum(parts: &[&[u8]]) -> u16 {
    let bytes = parts.concat();
    let words =
        bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | c.get(1).map_or(0, |b| u32::from(*b)));
    let sum: u32 = words.sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    !((sum & 0xffff) + (sum >> 16)) as u16
}

/// A UDP datagram from the guest to the host, in an Ethernet frame after `header`. Its checksum is
/// left out if the header asks the host to fill it in.
fn udp_frame(header: [u8; 12], to_mac: [u8; 6], port: u16, payload: &[u8]) -> Vec<u8> {
    let udp_len = (8 + payload.len()) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp_len).to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 17, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]);
    let sum = checksum(&[&ip]);
    ip[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut udp = [4000u16.to_be_bytes(), port.to_be_bytes(), udp_len.to_be_bytes()].concat();
    let pseudo = [&ip[12..20], &[0, 17], &udp_len.to_be_bytes()].concat();
    let sum = if header[0] & 1 != 0 {
        !checksum(&[&pseudo])
    } else {
        checksum(&[&pseudo, &udp, &[0, 0], payload])
    };
    udp.extend(sum.to_be_bytes());
    [&header[..], &to_mac, &GUEST_MAC, &[8, 0], &ip, &udp, payload].concat()
}

fn send(guest: &mut Guest, queue: u16, frame: &[u8]) {
    let at = guest.bytes(frame);
    guest.request(queue, &[(at, frame.len() as u32, false)]);
    assert_eq!(guest.completion(queue).1, 0);
}

#[test]
fn datagrams_travel_both_ways() {
    make_tap(libc::IFF_VNET_HDR);
    let mut guest = nic(1, open_tap(1));
    guest.start(MERGEABLE | F_EVENT_IDX);
    refill(&mut guest, RX, 128, 1526);
    let host = host_socket();

    host.send_to(b"hello guest", "10.0.0.2:7").unwrap();
    let frame = await_frame(&mut guest, RX, |f| f.ends_with(b"hello guest"));
    assert_eq!(frame[12..18], GUEST_MAC);
    assert_eq!(frame[0], 0, "the host computed the checksum: the driver has no GUEST_CSUM");

    send(&mut guest, TX, &udp_frame([0; 12], link::mac("t0"), 5000, b"hello host"));
    let mut bytes = [0; 100];
    let (n, from) = hear(&host, &mut bytes);
    assert_eq!((&bytes[..n], from), (&b"hello host"[..], "10.0.0.2:4000".parse().unwrap()));
}

#[test]
fn checksums_are_computed_by_the_side_that_has_offered() {
    make_tap(libc::IFF_VNET_HDR);
    let mut guest = nic(1, open_tap(1));
    guest.start(MERGEABLE | CSUM | GUEST_CSUM);
    refill(&mut guest, RX, 128, 1526);
    let host = host_socket();
    host.send_to(b"no checksum yet", "10.0.0.2:7").unwrap();
    let frame = await_frame(&mut guest, RX, |f| f.ends_with(b"no checksum yet"));
    assert_eq!(frame[0] & 1, 1, "NEEDS_CSUM");
    // NEEDS_CSUM, from byte 34 of the frame on, to be put 6 further.
    let header = [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
    send(&mut guest, TX, &udp_frame(header, link::mac("t0"), 5000, b"yours"));
    let mut bytes = [0; 100];
    assert_eq!(hear(&host, &mut bytes).0, 5);
}

/// Make the host send one TCP segment of 40,000 bytes to a peer that does not exist: through a
/// packet socket with a virtio header, as a router in front of the tap would.
fn big_segment_to(name: &str) {
    // SAFETY: plain calls on descriptors; the address is fully initialized.
    unsafe {
        let fd = libc::socket(libc::AF_PACKET, libc::SOCK_RAW, 0);
        assert!(fd >= 0, "packet socket: {}", std::io::Error::last_os_error());
        let socket = OwnedFd::from_raw_fd(fd);
        let on: libc::c_int = 1;
        let len = mem::size_of_val(&on) as u32;
        let vnet = 15; // PACKET_VNET_HDR
        let set = libc::setsockopt(fd, libc::SOL_PACKET, vnet, (&raw const on).cast(), len);
        assert_eq!(set, 0);
        let name = std::ffi::CString::new(name).unwrap();
        let mut to: libc::sockaddr_ll = mem::zeroed();
        to.sll_family = libc::AF_PACKET as u16;
        to.sll_ifindex = libc::if_nametoindex(name.as_ptr()) as i32;
        let total = 20 + 20 + 40_000u16;
        let mut ip = vec![0x45, 0];
        ip.extend(total.to_be_bytes());
        ip.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        let sum = checksum(&[&ip]);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        let tcp = [0x10, 0, 0x20, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0];
        // NEEDS_CSUM, TCPv4, 54 bytes of headers, segments of 1448 bytes, checksum at 34 + 16.
        let header = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0];
        let ethernet = [&GUEST_MAC[..], &[2, 9, 9, 9, 9, 9], &[8, 0]].concat();
        let frame = [&header[..], &ethernet, &ip, &tcp, &vec![0x5a; 40_000]].concat();
        let address = (&raw const to).cast();
        let len = mem::size_of_val(&to) as u32;
        let sent = libc::sendto(fd, frame.as_ptr().cast(), frame.len(), 0, address, len);
        assert_eq!(sent, frame.len() as isize, "{}", std::io::Error::last_os_error());
        drop(socket);
    }
}

#[test]
fn segments_of_64_kib_arrive_whole_only_if_the_driver_takes_them() {
    make_tap(libc::IFF_VNET_HDR);
    let mut guest = nic(1, open_tap(1));
    guest.start(MERGEABLE | GUEST_CSUM | GUEST_TSO4);
    refill(&mut guest, RX, 200, 1526);
    big_segment_to("t0");
    let frame = await_frame(&mut guest, RX, |f| f.len() > 30_000);
    assert_eq!(frame.len(), 12 + 54 + 40_000);
    assert_eq!(frame[1] & 0x7f, 1, "TCPv4 segmentation is left to the driver");
    assert!(frame[66..].iter().all(|b| *b == 0x5a));

    guest.start(MERGEABLE);
    refill(&mut guest, RX, 200, 1526);
    big_segment_to("t0");
    let frame = await_frame(&mut guest, RX, |f| f.ends_with(&[0x5a; 100]));
    assert!(frame.len() < 1600, "the host has segmented it: {}", frame.len());
}

#[test]
fn a_segment_of_64_kib_from_the_guest_is_taken_whole() {
    make_tap(libc::IFF_VNET_HDR);
    let net = Net::new("net0", settings(1), Some(Arc::new(open_tap(1)))).unwrap();
    let stats = net.stats();
    let mut guest = Guest::new(Box::new(net));
    guest.start(CSUM | HOST_TSO4);
    let total = 40 + 60_000u16;
    let mut ip = vec![0x45, 0];
    ip.extend(total.to_be_bytes());
    ip.extend([0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 2, 10, 0, 0, 1]);
    let tcp = [0x10, 0, 0x20, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0];
    let header = [1, 1, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0];
    let ethernet = [&link::mac("t0")[..], &GUEST_MAC, &[8, 0]].concat();
    let frame = [&header[..], &ethernet, &ip, &tcp, &vec![1; 60_000]].concat();
    send(&mut guest, TX, &frame);
    assert_eq!((stats.tx.packets.load(SeqCst), stats.tx.drops.load(SeqCst)), (1, 0));
    // It is up to the kernel to refuse false headers.
    for lie in [
        [1, 0x55, 54, 0, 0xa8, 5, 34, 0, 16, 0, 0, 0],
        [1, 1, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0],
        [1, 1, 0xff, 0xff, 0xa8, 5, 34, 0, 16, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0xff, 0xff, 16, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 34, 0, 0xff, 0xff, 0, 0],
    ] {
        let before = stats.tx.drops.load(SeqCst);
        send(&mut guest, TX, &[&lie[..], &frame[12..112]].concat());
        assert_eq!(stats.tx.drops.load(SeqCst), before + 1, "{lie:?}");
    }
    send(&mut guest, TX, &[0; 13]);
    assert!(!guest.needs_reset());
}

#[test]
fn several_queues_share_the_work() {
    make_tap(libc::IFF_MULTI_QUEUE | libc::IFF_VNET_HDR);
    let mut guest = nic(2, open_tap(2));
    guest.start(MERGEABLE | MQ | CONTROL);
    for queue in [0, 2] {
        refill(&mut guest, queue, 250, 1526);
    }
    let sockets: Vec<_> = (0..32).map(|_| UdpSocket::bind("10.0.0.1:0").unwrap()).collect();
    let total = |guest: &mut Guest, wanted: usize| {
        for socket in &sockets {
            socket.send_to(b"spread", "10.0.0.2:7").unwrap();
        }
        let thread = guest.thread.clone();
        let mut count = [0, 0];
        thread.until("all datagrams", || {
            for (n, queue) in [0, 2].into_iter().enumerate() {
                let frames = received(guest, queue);
                count[n] += frames.iter().filter(|f| f.ends_with(b"spread")).count();
            }
            count[0] + count[1] == wanted
        });
        count
    };
    assert_eq!(total(&mut guest, 32), [32, 0], "one pair until the driver enables more");
    let command = guest.bytes(&[4, 0, 2, 0]);
    let status = guest.bytes(&[0xee]);
    guest.request(4, &[(command, 4, false), (status, 1, true)]);
    guest.completion(4);
    assert_eq!(guest.peek(status, 1), [0]);
    let count = total(&mut guest, 32);
    assert!(count[0] > 0 && count[1] > 0, "flows are spread: {count:?}");

    let host = host_socket();
    for queue in [1, 3] {
        send(&mut guest, queue, &udp_frame([0; 12], link::mac("t0"), 5000, &[queue as u8]));
        let mut byte = [0];
        hear(&host, &mut byte);
        assert_eq!(byte[0], queue as u8);
    }
}

#[test]
fn a_tap_deleted_while_live_costs_frames_only() {
    make_tap(libc::IFF_VNET_HDR);
    let net = Net::new("net0", settings(1), Some(Arc::new(open_tap(1)))).unwrap();
    let stats = net.stats();
    let mut guest = Guest::new(Box::new(net));
    guest.start(MERGEABLE);
    refill(&mut guest, RX, 64, 1526);
    let frame = udp_frame([0; 12], link::mac("t0"), 5000, b"x");
    link::set("t0", false);
    send(&mut guest, TX, &frame);
    assert_eq!(stats.tx.drops.load(SeqCst), 1, "down");
    link::set("t0", true);
    send(&mut guest, TX, &frame);
    assert_eq!(stats.tx.packets.load(SeqCst), 1, "up again");
    link::delete("t0");
    guest.thread.settle();
    for _ in 0..5 {
        send(&mut guest, TX, &frame);
    }
    assert_eq!(stats.tx.drops.load(SeqCst), 6);
    assert!(!guest.needs_reset());
    // Another tap can take its place.
    add_tap("t1", libc::IFF_TAP | libc::IFF_VNET_HDR);
    link::set("t1", true);
    guest.update(|net: &mut Net| net.unplug()).unwrap().unwrap();
    let tap = Tap::open("t1", 1).unwrap();
    guest.update(|net: &mut Net| net.plug(Arc::new(tap), None)).unwrap().unwrap();
    send(&mut guest, TX, &frame);
    assert_eq!(stats.tx.packets.load(SeqCst), 2);
}

#[test]
fn an_unusable_tap_is_reported_with_the_fix() {
    make_tap(libc::IFF_VNET_HDR);
    add_tap("u0", libc::IFF_TUN);
    add_tap("m0", libc::IFF_TAP | libc::IFF_MULTI_QUEUE);
    link::add_bridge("b0");
    let said = |name: &str, queues| Tap::open(name, queues).unwrap_err().to_string();
    let missing = said("nope", 1);
    assert!(missing.contains("ip tuntap add dev nope mode tap vnet_hdr && ip link"), "{missing}");
    assert!(missing.contains("ip link set nope up"), "{missing}");
    assert!(said("nope", 4).contains("mode tap multi_queue vnet_hdr"));
    assert!(!std::fs::read_to_string("/proc/thread-self/net/dev").unwrap().contains("nope"));
    for name in ["", "1234567890123456", "a/b", "a b", "a\0b"] {
        assert!(matches!(Tap::open(name, 1), Err(TapError::Name(_))), "{name:?}");
    }
    assert!(matches!(Tap::open("tap%d", 1), Err(TapError::Missing { .. })));
    assert!(matches!(Tap::look("nope", 1), Err(TapError::Missing { .. })));
    assert!(matches!(Tap::look("a/b", 1), Err(TapError::Name(_))));
    for name in ["u0", "b0", "lo"] {
        for queues in [1, 2] {
            assert!(matches!(Tap::open(name, queues), Err(TapError::NotTap { .. })), "{name}");
            assert!(matches!(Tap::look(name, queues), Err(TapError::NotTap { .. })), "{name}");
        }
    }
    assert!(matches!(Tap::look("t0", 2), Err(TapError::NotMultiQueue { .. })));
    assert!(said("t0", 2).contains("ip link del t0 && ip tuntap add dev t0 mode tap multi_queue"));
    let first = Tap::open("t0", 1).unwrap();
    assert!(said("t0", 1).contains("in use by another process"));
    // Looking does not attach to the tap, and does not need it to be free.
    Tap::look("t0", 1).unwrap();
    drop(first);
    Tap::look("t0", 1).unwrap();
    Tap::look("m0", 1).unwrap();
    Tap::look("m0", 3).unwrap();
    assert_eq!(Tap::open("t0", 1).unwrap().name(), "t0", "free again");
    assert_eq!(Tap::open("m0", 1).unwrap().queues(), 1, "one queue of many is fine");
    assert_eq!(Tap::open("m0", 3).unwrap().queues(), 3);
}

/// Open the tap device `name` as a launcher does that passes descriptors on.
fn launcher_opens(name: &str, flags: i32) -> OwnedFd {
    let file = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: TUNSETIFF takes an ifreq, which is plain data.
    unsafe {
        let mut request: libc::ifreq = mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = flags as i16;
        let set = libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request);
        assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    }
    file.into()
}

#[test]
fn inherited_descriptors_are_used_as_they_are() {
    make_tap(0);
    let fd = launcher_opens("t0", libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR);
    let raw: RawFd = fd.as_raw_fd();
    let tap = Tap::from_fds(vec![fd]).unwrap();
    assert_eq!((tap.name(), tap.has_header(), tap.fd(0)), ("t0", true, raw));
    let mut buffer = [0; 2000];
    while let Ok(n) = tap.read_buffer(0, &mut buffer) {
        assert!(n > 12, "an unsolicited frame of the host's IPv6");
    }
    drop(tap);

    let fd = launcher_opens("t0", libc::IFF_TAP | libc::IFF_NO_PI);
    let tap = Tap::from_fds(vec![fd]).unwrap();
    assert!(!tap.has_header());
    let mut guest = nic(1, tap);
    assert_eq!(guest.offered() & WITH_HEADER, 0);
    guest.start(MERGEABLE);
    refill(&mut guest, RX, 64, 1526);
    let host = host_socket();
    link::await_carrier("t0");
    host.send_to(b"bare", "10.0.0.2:7").unwrap();
    await_frame(&mut guest, RX, |f| f.ends_with(b"bare"));
    send(&mut guest, TX, &udp_frame([0; 12], link::mac("t0"), 5000, b"bare too"));
    let mut bytes = [0; 100];
    assert_eq!(hear(&host, &mut bytes).0, 8);
}

#[test]
fn descriptors_of_anything_else_are_refused() {
    make_tap(libc::IFF_MULTI_QUEUE);
    add_tap("u0", libc::IFF_TUN);
    let error = |fds| Tap::from_fds(fds).unwrap_err();
    assert!(matches!(error(vec![]), TapError::NoDescriptor));
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    assert!(matches!(error(vec![null()]), TapError::NotTapFd { .. }));
    let tun = launcher_opens("u0", libc::IFF_TUN | libc::IFF_NO_PI);
    assert!(error(vec![tun]).to_string().contains("IFF_TAP"));
    let multi_queue = libc::IFF_TAP | libc::IFF_MULTI_QUEUE | libc::IFF_VNET_HDR;
    let good = || launcher_opens("t0", multi_queue | libc::IFF_NO_PI);
    assert_eq!(Tap::from_fds(vec![good(), good()]).unwrap().queues(), 2);
    add_tap("t1", libc::IFF_TAP | libc::IFF_MULTI_QUEUE);
    let other = launcher_opens("t1", multi_queue | libc::IFF_NO_PI);
    assert!(error(vec![good(), other]).to_string().contains("another interface"));
    let unattached = OwnedFd::from(File::open("/dev/net/tun").unwrap());
    assert!(matches!(error(vec![unattached]), TapError::NotTapFd { .. }));
    let (mut a, mut b) = std::os::unix::net::UnixStream::pair().unwrap();
    a.write_all(b"x").unwrap();
    b.read_exact(&mut [0]).unwrap();
    assert!(matches!(error(vec![a.into()]), TapError::NotTapFd { .. }));
}
