//! The host's network interfaces, by rtnetlink(7). The `ip` command is not used because, between
//! fork and exec, its process briefly holds every descriptor of this one: files that another test
//! has just closed stay locked, taps stay busy, and pipes do not reach their end.
use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

/// IF_OPER_UP of linux/if.h.
const OPERSTATE_UP: u8 = 6;

/// Send the request `kind` to the kernel, and return the answer after its message header.
fn ask(kind: u16, flags: i32, body: &[u8]) -> Vec<u8> {
    let len = 16 + body.len() as u32;
    let flags = (libc::NLM_F_REQUEST | flags) as u16;
    let head = [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8]];
    // Protocol 0, the default, is NETLINK_ROUTE.
    let (family, kind) = (AddressFamily::NETLINK, SocketType::RAW);
    let kernel = socket_with(family, kind, SocketFlags::CLOEXEC, None).unwrap();
    send(&kernel, &[&head.concat(), body].concat(), SendFlags::empty()).unwrap();
    let mut answer = vec![0; 32 << 10];
    let heard = || recv(&kernel, &mut answer[..], RecvFlags::empty());
    let (n, _) = rustix::io::retry_on_intr(heard).unwrap();
    answer.truncate(n);
    if i32::from(u16::from_ne_bytes([answer[4], answer[5]])) == libc::NLMSG_ERROR {
        let code = i32::from_ne_bytes(answer[16..20].try_into().unwrap());
        assert_eq!(code, 0, "{}", std::io::Error::from_raw_os_error(-code));
    }
    answer.split_off(16)
}

fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let len = 4 + value.len() as u16;
    let mut bytes = [&len.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat();
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// struct ifinfomsg and the name of an interface; it is set up or down if `changed`.
fn link(name: &str, up: bool, changed: bool) -> Vec<u8> {
    let flags = [u32::from(up).to_ne_bytes(), u32::from(changed).to_ne_bytes()].concat();
    [vec![0; 8], flags, attribute(libc::IFLA_IFNAME, name.as_bytes())].concat()
}

pub fn set(name: &str, up: bool) {
    ask(libc::RTM_NEWLINK, libc::NLM_F_ACK, &link(name, up, true));
}

pub fn delete(name: &str) {
    ask(libc::RTM_DELLINK, libc::NLM_F_ACK, &link(name, false, false));
}

pub fn add_bridge(name: &str) {
    let kind = attribute(libc::IFLA_LINKINFO, &attribute(libc::IFLA_INFO_KIND, b"bridge"));
    let flags = libc::NLM_F_ACK | libc::NLM_F_CREATE | libc::NLM_F_EXCL;
    ask(libc::RTM_NEWLINK, flags, &[link(name, false, false), kind].concat());
}

/// The kernel's data on an interface: struct ifinfomsg and attributes.
fn look(name: &str) -> Vec<u8> {
    ask(libc::RTM_GETLINK, 0, &link(name, false, false))
}

/// The index of an interface, as the bytes that the system calls take.
fn index(name: &str) -> Vec<u8> {
    look(name)[4..8].to_vec()
}

fn value(name: &str, kind: u16) -> Vec<u8> {
    let answer = look(name);
    let mut rest = &answer[16..];
    while !rest.is_empty() {
        let len = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
        if u16::from_ne_bytes([rest[2], rest[3]]) == kind {
            return rest[4..len].to_vec();
        }
        rest = &rest[len.next_multiple_of(4).min(rest.len())..];
    }
    panic!("{name} has no attribute {kind}")
}

pub fn mac(name: &str) -> [u8; 6] {
    value(name, libc::IFLA_ADDRESS).try_into().unwrap()
}

/// Give it an address in a /24 network.
pub fn add_address(name: &str, address: [u8; 4]) {
    let message = [vec![libc::AF_INET as u8, 24, 0, 0], index(name)].concat();
    let address = attribute(libc::IFA_LOCAL, &address);
    ask(libc::RTM_NEWADDR, libc::NLM_F_ACK | libc::NLM_F_CREATE, &[message, address].concat());
}

/// Add a neighbour entry for `address`, so that the host does not send a query.
pub fn add_neighbour(name: &str, address: [u8; 4], mac: [u8; 6]) {
    let family = vec![libc::AF_INET as u8, 0, 0, 0];
    let state = [&libc::NUD_PERMANENT.to_ne_bytes()[..], &[0; 2]].concat();
    let (to, mac) = (attribute(libc::NDA_DST, &address), attribute(libc::NDA_LLADDR, &mac));
    let message = [family, index(name), state, to, mac].concat();
    ask(libc::RTM_NEWNEIGH, libc::NLM_F_ACK | libc::NLM_F_CREATE, &message);
}

/// Wait until the host sends to a tap that is open: it notices the carrier in the background, and
/// until then silently drops what it has to send.
pub fn await_carrier(name: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while value(name, libc::IFLA_OPERSTATE) != [OPERSTATE_UP] {
        assert!(Instant::now() < deadline, "{name} has no carrier");
        sleep(Duration::from_millis(1));
    }
}
