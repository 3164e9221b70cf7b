// UNSAFETY: a thread's network namespace is changed, and a tap made, by calls that the standard
// library does not have.
#![expect(unsafe_code)]
//! A network namespace without a name: it exists as long as a thread, a process or a descriptor of
//! it does. So it disappears however the test ends, even if that is killed.
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::panic::resume_unwind;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, ensure};
use rustix::io::Errno;
use rustix::thread::{
    LinkNameSpaceType, UnshareFlags, gettid, move_into_link_name_space, unshare_unsafe,
};

use crate::debian::{Debian, output};

/// A network namespace of its own.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// A namespace whose only interface is its loopback, which is up. Without IPv6, whose neighbour
    /// discovery would add frames that no test has sent.
    ///
    /// # Errors
    /// This process may not make one: this needs root.
    pub fn new(debian: &Debian) -> Result<Self> {
        let file = in_a_thread(|| -> Result<File> {
            // SAFETY: changes only the network namespace of this thread, which ends here.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }
                .context("cannot make a network namespace: this needs root")?;
            Ok(File::open("/proc/thread-self/ns/net")?)
        })?;
        let namespace = Self(file);
        namespace.set("net/ipv6/conf/all/disable_ipv6", "1")?;
        namespace.set("net/ipv6/conf/default/disable_ipv6", "1")?;
        // Where BBR is the host's default, it paces with a timer of its own.
        namespace.set("net/ipv4/tcp_congestion_control", "reno")?;
        namespace.ip(debian, "link set lo up")?;
        Ok(namespace)
    }

    /// Runs `act` in a thread that is in this namespace. Sockets and processes that it makes stay
    /// there.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    ///
    /// # Panics
    /// If `act` does.
    pub fn enter<T: Send>(&self, act: impl FnOnce() -> T + Send) -> Result<T> {
        in_a_thread(|| move_in(&self.0).map(|()| act()))
    }

    /// The same in a thread that is not waited for.
    ///
    /// # Errors
    /// No more descriptors or threads.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: &str,
        act: impl FnOnce() -> T + Send + 'static,
    ) -> Result<JoinHandle<Result<T>>> {
        let file = self.0.try_clone()?;
        let thread = thread::Builder::new().name(name.to_owned());
        Ok(thread.spawn(move || move_in(&file).map(|()| act()))?)
    }

    /// Runs `ip` with the arguments in `words`.
    ///
    /// # Errors
    /// It fails.
    pub fn ip(&self, debian: &Debian, words: &str) -> Result<()> {
        let mut ip = debian.program("bin/ip")?;
        ip.args(words.split_whitespace());
        self.enter(|| output(&mut ip))?.map(drop)
    }

    /// Sets a kernel parameter, a path below `/proc/sys`, if this kernel has it.
    ///
    /// # Errors
    /// The kernel refuses the value.
    pub fn set(&self, parameter: &str, value: &str) -> Result<()> {
        let file = format!("/proc/sys/{parameter}");
        match self.enter(|| fs::write(&file, value))? {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.with_context(|| format!("cannot write {value} to {file}")),
        }
    }

    /// Makes a tap of one queue, without offloads, whose other end is the returned descriptor. It
    /// exists as long as that is open, and does not block.
    ///
    /// # Errors
    /// There is no `/dev/net/tun`, or the name is taken or too long.
    pub fn tap(&self, name: &str) -> Result<File> {
        let file = self.enter(|| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
            options.open("/dev/net/tun").context("cannot open /dev/net/tun")
        })??;
        // `struct ifreq` of linux/if.h: the name, and flags at the beginning of the rest.
        let mut request = [0_u8; 40];
        let bytes = CString::new(name)?.into_bytes_with_nul();
        ensure!(bytes.len() <= libc::IFNAMSIZ, "{name} is too long for an interface");
        let flags = (libc::IFF_TAP | libc::IFF_NO_PI) as u16;
        request.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        request
            .iter_mut()
            .skip(libc::IFNAMSIZ)
            .zip(flags.to_le_bytes())
            .for_each(|(to, from)| *to = from);
        // SAFETY: `request` is a whole `struct ifreq`, which outlives the call.
        let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
        ensure!(made == 0, "cannot make tap {name}: {}", io::Error::last_os_error());
        Ok(file)
    }
}

/// Lets the processes that the calling thread starts see clocks that are so many seconds ahead, but
/// for the date: as on another host, which was started at another time. Where the kernel has no time
/// namespaces, or is one that may refuse to start a program in another one, nothing changes.
///
/// # Errors
/// This process may not do so: this needs root.
pub fn shift_clocks(seconds: u32) -> Result<()> {
    // Linux 6.1 refuses vfork there, by which programs are started.
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split('.').map_while(|number| number.parse::<u32>().ok());
    if (numbers.next(), numbers.next()) < (Some(6), Some(6)) {
        return Ok(());
    }
    // SAFETY: changes only what children of this thread are in.
    match unsafe { unshare_unsafe(UnshareFlags::NEWTIME) } {
        Err(Errno::INVAL) => return Ok(()),
        done => done.context("cannot make a time namespace: this needs root")?,
    }
    let offsets = format!("monotonic {seconds} 0\nboottime {seconds} 0\n");
    let file = format!("/proc/{}/timens_offsets", gettid().as_raw_nonzero());
    fs::write(&file, offsets).with_context(|| format!("cannot write {file}"))
}

fn move_in(namespace: &File) -> Result<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .context("cannot enter a network namespace")
}

/// A thread that changes its namespace must not be used for anything else afterwards.
fn in_a_thread<T: Send>(act: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| scope.spawn(act).join()).unwrap_or_else(|panic| resume_unwind(panic))
}
