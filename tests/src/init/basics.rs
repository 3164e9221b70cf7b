//! What the inits of guests have in common, which are programs without crates: a module of
//! `init/replicated.rs`, and of `xtask/guest/init.rs`.
use std::ffi::{CStr, c_char, c_int, c_ulong, c_void};
use std::io;
use std::thread;
use std::time::{Duration, Instant};

unsafe extern "C" {
    fn mount(
        source: *const c_char,
        target: *const c_char,
        kind: *const c_char,
        flags: c_ulong,
        data: *const c_void,
    ) -> c_int;
    fn socket(domain: c_int, kind: c_int, protocol: c_int) -> c_int;
    fn ioctl(fd: c_int, request: c_ulong, argument: *mut c_void) -> c_int;
}

const SIOCSIFADDR: c_ulong = 0x8916;
const SIOCSIFNETMASK: c_ulong = 0x891c;
const SIOCSIFFLAGS: c_ulong = 0x8914;
const IFF_UP: u8 = 1;
const NETMASK: [u8; 4] = [255, 255, 255, 0];

/// Mounts a file system of the kernel's own.
pub fn attach(kind: &CStr, target: &CStr) {
    // SAFETY: all are C strings; these file systems take no data.
    unsafe { mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
}

/// Tries for 10 seconds.
pub fn until<T>(mut ready: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let started = Instant::now();
    loop {
        match ready() {
            Err(_) if started.elapsed() < Duration::from_secs(10) => {
                thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

/// Brings up eth0, once it is there, with `address` and a netmask of 24 bits.
pub fn bring_up(address: [u8; 4]) -> io::Result<()> {
    until(|| configure(SIOCSIFADDR, &internet(address)))?;
    configure(SIOCSIFNETMASK, &internet(NETMASK))?;
    configure(SIOCSIFFLAGS, &[IFF_UP, 0])
}

/// `struct sockaddr_in`, without the port.
fn internet([a, b, c, d]: [u8; 4]) -> [u8; 8] {
    [2, 0, 0, 0, a, b, c, d]
}

/// `struct ifreq` of linux/if.h.
#[repr(C)]
struct Interface {
    name: [u8; 16],
    value: [u8; 24],
}

fn configure(request: c_ulong, value: &[u8]) -> io::Result<()> {
    let mut interface = Interface { name: [0; 16], value: [0; 24] };
    interface.name[..4].copy_from_slice(b"eth0");
    interface.value[..value.len()].copy_from_slice(value);
    // SAFETY: AF_INET, SOCK_DGRAM; then `interface` is a whole `struct ifreq`. The socket stays
    // open for good: there are three of them.
    let result = unsafe {
        let fd = socket(2, 2, 0);
        if fd < 0 { fd } else { ioctl(fd, request, (&raw mut interface).cast()) }
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
