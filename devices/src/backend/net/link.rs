//! Information about a network interface that does not require attaching to it: from rtnetlink(7),
//! and from the open files of other processes.
use std::{fs, io, path::Path};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};

use crate::backend::holder::{entries, find};

/// The kind of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// There is no interface of that name.
    Missing,
    /// A tap device, with one queue or several; `None`: a kernel older than 4.17, which does not
    /// report it.
    Tap {
        /// Several descriptors can be attached.
        several: Option<bool>,
    },
    /// Anything else.
    Other,
}

// linux/rtnetlink.h, linux/netlink.h and linux/if_link.h; the libc crate lacks some of them.
const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const NLM_F_REQUEST: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_MULTI_QUEUE: u16 = 7;
/// `IFF_TAP` of linux/if_tun.h, in the form of [`IFLA_TUN_TYPE`].
const TYPE_TAP: u8 = 2;
/// Bytes of `struct nlmsghdr` and of `struct ifinfomsg`.
const HEADER: usize = 16;
const INTERFACE: usize = 16;

/// The kind of the interface `name` in this network namespace.
///
/// # Errors
/// When the kernel does not report it.
pub(super) fn kind(name: &str) -> io::Result<Kind> {
    let flags = SocketFlags::CLOEXEC;
    // NETLINK_ROUTE is 0, which `None` stands for.
    let kernel = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    send(&kernel, &question(name), SendFlags::empty())?;
    let mut answer = vec![0; 64 << 10];
    let (length, _) = recv(&kernel, &mut answer[..], RecvFlags::empty())?;
    read(answer.get(..length).ok_or(io::ErrorKind::InvalidData)?)
}

fn question(name: &str) -> Vec<u8> {
    let mut attribute = [&[0; 4], name.as_bytes(), &[0]].concat();
    let length = attribute.len() as u16;
    attribute.splice(..4, [length.to_ne_bytes(), IFLA_IFNAME.to_ne_bytes()].concat());
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    let length = (HEADER + INTERFACE + attribute.len()) as u32;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend([RTM_GETLINK, NLM_F_REQUEST].map(u16::to_ne_bytes).concat());
    message.resize(HEADER + INTERFACE, 0);
    message.extend(attribute);
    message
}

fn read(answer: &[u8]) -> io::Result<Kind> {
    let malformed = || io::Error::from(io::ErrorKind::InvalidData);
    let kind = answer.get(4..6).and_then(word).ok_or_else(malformed)?;
    if kind == NLMSG_ERROR {
        let code = answer.get(HEADER..HEADER + 4).and_then(|bytes| bytes.first_chunk());
        let error = code.map_or(0, |code| i32::from_ne_bytes(*code)).wrapping_neg();
        return match error {
            libc::ENODEV => Ok(Kind::Missing),
            other => Err(io::Error::from_raw_os_error(other)),
        };
    }
    let all = answer.get(HEADER + INTERFACE..).filter(|_| kind == RTM_NEWLINK);
    let Some(info) = find_attribute(all.ok_or_else(malformed)?, IFLA_LINKINFO) else {
        return Ok(Kind::Other);
    };
    if find_attribute(info, IFLA_INFO_KIND) != Some(b"tun\0") {
        return Ok(Kind::Other);
    }
    let data = find_attribute(info, IFLA_INFO_DATA).unwrap_or_default();
    let byte = |kind| find_attribute(data, kind)?.first().copied();
    match byte(IFLA_TUN_TYPE) {
        None | Some(TYPE_TAP) => {
            Ok(Kind::Tap { several: byte(IFLA_TUN_MULTI_QUEUE).map(|flag| flag != 0) })
        }
        Some(_) => Ok(Kind::Other),
    }
}

fn word(bytes: &[u8]) -> Option<u16> {
    bytes.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))
}

/// The first attribute of a kind (`struct rtattr`).
fn find_attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    /// `NLA_TYPE_MASK`.
    const KIND: u16 = 0x3fff;
    loop {
        let length = usize::from(word(bytes)?);
        let kind = word(bytes.get(2..)?)?;
        let body = bytes.get(4..length)?;
        if kind & KIND == wanted {
            return Some(body);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
}

/// The other process, of this network namespace, that has the tap device `name`; `None` when it
/// cannot be found.
pub(super) fn holder(name: &str) -> Option<u32> {
    let namespace = |of: &Path| fs::read_link(of.join("ns/net")).ok();
    let here = namespace(Path::new("/proc/thread-self"))?;
    let says = format!("iff:\t{name}");
    find(|thread| {
        namespace(thread).is_some_and(|there| there == here)
            && entries(&thread.join("fd")).any(|(number, link)| {
                // Reading the fdinfo of other files may take long.
                fs::read_link(link)
                    .is_ok_and(|target| target == Path::new(super::tap::CLONE_DEVICE))
                    && fs::read_to_string(thread.join("fdinfo").join(number))
                        .is_ok_and(|info| info.lines().any(|line| line == says))
            })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_is_read_and_nonsense_harms_nobody() {
        assert_eq!(kind("lo").unwrap(), Kind::Other);
        assert_eq!(kind("no-such-one").unwrap(), Kind::Missing);
        let mut answer = question("lo");
        for length in 0..answer.len() {
            let _ = read(&answer[..length]);
        }
        for at in 0..answer.len() {
            for byte in [0, 1, 2, 16, 0xff] {
                let before = std::mem::replace(&mut answer[at], byte);
                let _ = read(&answer);
                answer[at] = before;
            }
        }
        assert!(find_attribute(&[0, 0, 0, 0, 0, 0, 0, 0], 7).is_none(), "it has to end");
    }
}
