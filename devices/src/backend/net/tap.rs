// UNSAFETY: tap devices are set up by ioctls.
#![expect(unsafe_code)]
//! Tap devices.
use std::{
    fs::OpenOptions,
    io::{self, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
};

use rustix::{
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::{FdFlags, fcntl_setfd},
    net::{AddressFamily, SocketFlags, SocketType, netdevice::name_to_index, socket_with},
};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO,
};

use super::{
    Frame, HEADER, NetBackend, Offloads,
    link::{self, Kind},
};

pub(super) const CLONE_DEVICE: &str = "/dev/net/tun";
const TAP: i32 = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// A host tap device with one or more queues. It is detached, not deleted, when dropped.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<std::fs::File>,
    header: bool,
    uso: bool,
}

/// Why a tap device cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "shown by the message")]
pub enum TapError {
    /// No interface of that name can exist.
    #[error("'{0}' is not a network interface name: 1 to 15 bytes, no '/' and no space")]
    Name(String),
    /// There is no such interface.
    #[error("tap device '{name}' does not exist. Create it with:{}", recipe(.name, *.queues))]
    Missing { name: String, queues: usize },
    /// Another process uses it.
    #[error(
        "tap device '{name}' is in use by another process{}. Give each machine its own:{}",
        holder.map_or_else(String::new, |pid| format!(" ({pid})")),
        recipe("NAME", *.queues)
    )]
    Busy { name: String, queues: usize, holder: Option<u32> },
    /// A network interface, but not a tap device.
    #[error(
        "network interface '{name}' is not a tap device (tun, bridge, or hardware). Create one \
         with another name:{}",
        recipe("NAME", *.queues)
    )]
    NotTap { name: String, queues: usize },
    /// It has one queue where several are needed.
    #[error(
        "tap device '{name}' has one queue, but {queues} are required. Recreate it: ip link del \
         {name} &&{}",
        recipe(.name, *.queues)
    )]
    NotMultiQueue { name: String, queues: usize },
    /// This process has no permission to use it.
    #[error(
        "no permission to use tap device '{name}'. As root, recreate it for the current user: ip \
         link del {name} && ip tuntap add dev {name} mode tap user \"$USER\" vnet_hdr && ip link \
         set {name} up"
    )]
    Permission { name: String },
    /// The tun driver is missing or not accessible.
    #[error("cannot open {CLONE_DEVICE}; as root: modprobe tun; chmod 666 {CLONE_DEVICE}")]
    Driver { source: io::Error },
    /// Not an open descriptor, or not one of a tap device.
    #[error("descriptor {fd} is not an open tap device")]
    NotTapFd { fd: RawFd, source: io::Error },
    /// A descriptor of a tap device in a mode that no virtio device can use.
    #[error("descriptor {fd} of '{name}' {what}")]
    Mode { fd: RawFd, name: String, what: &'static str },
    /// No descriptor was passed.
    #[error("not a descriptor of a tap device")]
    NoDescriptor,
    /// The host refused one step of the set-up.
    #[error("tap device '{name}': cannot {what}")]
    Host { name: String, what: &'static str, source: io::Error },
}

fn check_name(name: &str) -> Result<(), TapError> {
    let valid = (1..=15).contains(&name.len())
        && !name.bytes().any(|b| b == 0 || b == b'/' || b.is_ascii_whitespace());
    if valid { Ok(()) } else { Err(TapError::Name(name.into())) }
}

fn recipe(name: &str, queues: usize) -> String {
    let multi_queue = if queues > 1 { " multi_queue" } else { "" };
    format!(" ip tuntap add dev {name} mode tap{multi_queue} vnet_hdr && ip link set {name} up")
}

impl Tap {
    /// Attach to the existing tap device `name` with `queues` queues.
    ///
    /// # Errors
    /// When it does not exist, is not a tap device, is busy, or the host refuses; the message
    /// includes the command that fixes it.
    pub fn open(name: &str, queues: usize) -> Result<Self, TapError> {
        check_name(name)?;
        let missing = || TapError::Missing { name: name.into(), queues };
        // TUNSETIFF would create a missing tap, so check first and compare afterwards.
        let index = interface_index(name).ok_or_else(missing)?;

        let mut flags = if queues > 1 { TAP | libc::IFF_MULTI_QUEUE } else { TAP };
        let first = match attach(name, flags) {
            Err(AttachError::WrongKind) if queues <= 1 => {
                flags |= libc::IFF_MULTI_QUEUE;
                attach(name, flags)
            }
            Err(AttachError::WrongKind) => {
                return Err(match attach(name, TAP) {
                    Err(AttachError::WrongKind) => TapError::NotTap { name: name.into(), queues },
                    _ => TapError::NotMultiQueue { name: name.into(), queues },
                });
            }
            result => result,
        };
        let mut files = Vec::with_capacity(queues);
        files.push(first.map_err(|e| e.explain(name, queues))?);
        if interface_index(name) != Some(index) {
            return Err(missing());
        }
        while files.len() < queues {
            files.push(attach(name, flags).map_err(|e| e.explain(name, queues))?);
        }
        Self::set_up(name.into(), files, true)
    }

    /// Check that there is a tap device `name` that supports `queues` queues. It is not changed,
    /// and another process may have it.
    ///
    /// # Errors
    /// When it does not exist, is not a tap device, or has one queue where several are wanted.
    pub fn look(name: &str, queues: usize) -> Result<(), TapError> {
        check_name(name)?;
        let owned = || name.to_owned();
        match link::kind(name) {
            Ok(Kind::Missing) => Err(TapError::Missing { name: owned(), queues }),
            Ok(Kind::Other) => Err(TapError::NotTap { name: owned(), queues }),
            Ok(Kind::Tap { several: Some(false) }) if queues > 1 => {
                Err(TapError::NotMultiQueue { name: owned(), queues })
            }
            Ok(Kind::Tap { .. }) => Ok(()),
            Err(source) => Err(TapError::Host { name: owned(), what: "query its type", source }),
        }
    }

    /// Use tap devices that another process has opened: one descriptor for each queue, all of one
    /// interface. They become non-blocking and close-on-exec.
    ///
    /// They must have been opened with `IFF_NO_PI`. That cannot be checked: `TUNGETIFF` reports
    /// the same bit for a socket without filter.
    ///
    /// # Errors
    /// When a descriptor is not one of a tap device, or not of the same one as the others.
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Self, TapError> {
        let mut name: Option<String> = None;
        let mut header = true;
        for fd in &fds {
            let handle = fd;
            let fd = handle.as_raw_fd();
            let request = get_interface(fd).map_err(|source| TapError::NotTapFd { fd, source })?;
            let this = interface_name(&request);
            let flags = request_flags(&request);
            let mode = |what| TapError::Mode { fd, name: this.clone(), what };
            if flags & libc::IFF_TAP == 0 {
                return Err(mode("is a tun device: a tap device is needed (IFF_TAP)"));
            }
            if fds.len() > 1 && flags & libc::IFF_MULTI_QUEUE == 0 {
                return Err(mode("has one queue: open it with IFF_MULTI_QUEUE"));
            }
            if *name.get_or_insert_with(|| this.clone()) != this {
                return Err(mode("belongs to another interface than the first descriptor"));
            }
            header &= flags & libc::IFF_VNET_HDR != 0;
            make_non_blocking(handle).map_err(|source| TapError::NotTapFd { fd, source })?;
        }
        let name = name.ok_or(TapError::NoDescriptor)?;
        Self::set_up(name, fds.into_iter().map(std::fs::File::from).collect(), header)
    }

    /// Name of the interface when it was attached.
    pub fn name(&self) -> &str {
        &self.name
    }

    fn set_up(name: String, queues: Vec<std::fs::File>, header: bool) -> Result<Self, TapError> {
        let mut tap = Self { name, queues, header, uso: false };
        let failed = |what| {
            let name = tap.name.clone();
            move |source| TapError::Host { name, what, source }
        };
        if header {
            for queue in &tap.queues {
                let size = HEADER as libc::c_int;
                // SAFETY: TUNSETVNETHDRSZ reads an int.
                unsafe {
                    ioctl(queue.as_raw_fd(), libc::TUNSETVNETHDRSZ, (&raw const size).cast())
                }
                .map_err(failed("set the size of the virtio header"))?;
            }
            let uso = libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
            let uso = tap.set_tun_offloads(uso).is_ok();
            tap.set_tun_offloads(0).map_err(failed("disable offloads"))?;
            tap.uso = uso;
        }
        Ok(tap)
    }

    fn set_tun_offloads(&self, flags: libc::c_uint) -> io::Result<()> {
        // The setting applies to the whole device, however many queues it has.
        let fd = self.fd(0);
        // SAFETY: TUNSETOFFLOAD takes a plain number in place of the pointer.
        unsafe { ioctl(fd, libc::TUNSETOFFLOAD, std::ptr::without_provenance(flags as usize)) }
    }

    fn queue(&self, queue: usize) -> io::Result<&std::fs::File> {
        self.queues.get(queue).ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl NetBackend for Tap {
    fn queues(&self) -> usize {
        self.queues.len()
    }

    fn fd(&self, queue: usize) -> RawFd {
        self.queues.get(queue).map_or(-1, AsRawFd::as_raw_fd)
    }

    fn has_header(&self) -> bool {
        self.header
    }

    fn has_uso(&self) -> bool {
        self.uso
    }

    fn read(&self, queue: usize, into: &mut Frame, spill: &mut [u8]) -> io::Result<usize> {
        into.read_from(self.fd(queue), spill)
    }

    fn read_buffer(&self, queue: usize, into: &mut [u8]) -> io::Result<usize> {
        let mut queue = self.queue(queue)?;
        if self.header {
            return queue.read(into);
        }
        let (header, frame) =
            into.split_at_mut_checked(HEADER).ok_or(io::ErrorKind::InvalidInput)?;
        header.fill(0);
        Ok(queue.read(frame)? + HEADER)
    }

    fn write(&self, queue: usize, frame: &mut Frame) -> io::Result<usize> {
        if !self.header {
            frame.skip(HEADER);
        }
        frame.write_to(self.fd(queue))
    }

    fn write_buffer(&self, frame: &[u8]) -> io::Result<usize> {
        let start = if self.header { 0 } else { HEADER };
        let frame = frame.get(start..).ok_or(io::ErrorKind::InvalidInput)?;
        self.queue(0)?.write(frame)
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        if !self.header {
            return Ok(());
        }
        let mut flags = 0;
        // The kernel accepts the other offloads only together with this one.
        if offloads.has(VIRTIO_NET_F_GUEST_CSUM) {
            flags |= libc::TUN_F_CSUM;
            for (feature, flag) in [
                (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
                (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
                (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
                (VIRTIO_NET_F_GUEST_UFO, libc::TUN_F_UFO),
            ] {
                if offloads.has(feature) {
                    flags |= flag;
                }
            }
            // The kernel refuses one without the other.
            if offloads.0 & Offloads::USO.0 == Offloads::USO.0 {
                flags |= libc::TUN_F_USO4 | libc::TUN_F_USO6;
            }
        }
        self.set_tun_offloads(flags)
    }

    fn set_active_queues(&self, queues: usize) -> io::Result<()> {
        if self.queues.len() <= 1 {
            return Ok(());
        }
        for (n, queue) in self.queues.iter().enumerate() {
            let flag = if n < queues { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
            let request = interface_request("", flag);
            // SAFETY: TUNSETQUEUE reads an ifreq.
            let set =
                unsafe { ioctl(queue.as_raw_fd(), libc::TUNSETQUEUE, (&raw const request).cast()) };
            match set {
                // It is in the wanted state already.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                result => result?,
            }
        }
        Ok(())
    }
}

enum AttachError {
    /// EINVAL: not a tap, or its MULTI_QUEUE flag differs.
    WrongKind,
    Driver(io::Error),
    Other(io::Error),
}

impl AttachError {
    fn explain(self, name: &str, queues: usize) -> TapError {
        let name = name.to_owned();
        let source = match self {
            Self::WrongKind => return TapError::NotTap { name, queues },
            Self::Driver(source) => return TapError::Driver { source },
            Self::Other(source) => source,
        };
        match source.raw_os_error() {
            Some(libc::EBUSY) => {
                let holder = link::holder(&name);
                TapError::Busy { name, queues, holder }
            }
            Some(libc::EPERM | libc::EACCES) => TapError::Permission { name },
            _ => TapError::Host { name, what: "attach", source },
        }
    }
}

fn attach(name: &str, flags: i32) -> Result<std::fs::File, AttachError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(CLONE_DEVICE)
        .map_err(AttachError::Driver)?;
    let mut request = interface_request(name, flags);
    let request = (&raw mut request).cast_const().cast();
    // SAFETY: TUNSETIFF reads and writes an ifreq.
    match unsafe { ioctl(file.as_raw_fd(), libc::TUNSETIFF, request) } {
        Ok(()) => Ok(file),
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Err(AttachError::WrongKind),
        Err(e) => Err(AttachError::Other(e)),
    }
}

/// # Safety
/// `argument` must be what `request` expects.
unsafe fn ioctl(fd: RawFd, request: libc::Ioctl, argument: *const libc::c_void) -> io::Result<()> {
    // SAFETY: passed on to the caller.
    match unsafe { libc::ioctl(fd, request, argument) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

fn get_interface(fd: RawFd) -> io::Result<libc::ifreq> {
    let mut request = interface_request("", 0);
    // SAFETY: TUNGETIFF writes an ifreq, and `request` is one.
    unsafe { ioctl(fd, libc::TUNGETIFF, (&raw mut request).cast_const().cast()) }?;
    Ok(request)
}

fn interface_request(name: &str, flags: i32) -> libc::ifreq {
    // SAFETY: ifreq is plain data; zero is a value of each of its fields.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}

fn interface_name(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().take_while(|c| **c != 0).map(|c| *c as u8);
    String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned()
}

fn request_flags(request: &libc::ifreq) -> i32 {
    // SAFETY: every bit pattern is a short, and TUNGETIFF has set this member.
    i32::from(unsafe { request.ifr_ifru.ifru_flags } as u16)
}

/// The index, which distinguishes an interface from a later one of the same name.
fn interface_index(name: &str) -> Option<u32> {
    let flags = SocketFlags::CLOEXEC;
    let any = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None).ok()?;
    name_to_index(any, name).ok()
}

fn make_non_blocking(fd: impl AsFd) -> io::Result<()> {
    fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
    Ok(fcntl_setfd(&fd, FdFlags::CLOEXEC)?)
}
