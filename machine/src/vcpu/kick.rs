//! Interrupting KVM_RUN from another thread.
//!
//! A kick sets `immediate_exit` in the vCPU's run page and then signals its thread. Whether the
//! signal arrives inside KVM_RUN or before it, KVM_RUN returns EINTR: no kick is lost, and a vCPU
//! that is not kicked has no overhead.
// UNSAFETY: signals go to threads by number, and timers send them.
#![expect(unsafe_code, reason = "signals and timers")]
use std::{
    io,
    mem::offset_of,
    os::fd::AsRawFd,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use kvm_bindings::kvm_run;

use crate::kvm::shared_page::SharedPage;

const IMMEDIATE_EXIT: usize = offset_of!(kvm_run, immediate_exit);
/// `io.size`, the second byte of the exit's own fields.
const IO_SIZE: usize = offset_of!(kvm_run, __bindgen_anon_1) + 1;
/// The run page's number in a vCPU's descriptor.
const RUN_PAGE: u32 = 0;

/// The vCPU thread's end of a pair: clears kicks. It has a second mapping of the run page.
pub struct Kicked(Arc<SharedPage>);

impl Kicked {
    /// Bytes of one access of the PIO exit that KVM_RUN has just returned with: a string
    /// instruction causes several accesses at once, and their total does not give the size of one.
    pub fn io_size(&self) -> usize {
        usize::from(self.0.byte::<IO_SIZE>().load(Ordering::Relaxed))
    }

    /// After EINTR: later kicks count again. Returns whether there was a kick, not only a tick.
    pub fn clear(&self) -> bool {
        self.0.byte::<IMMEDIATE_EXIT>().swap(0, Ordering::SeqCst) != 0
    }
}

/// Kicks one vCPU; works from any thread, and after the vCPU has ended.
#[derive(Clone)]
pub struct Kicker {
    page: Arc<SharedPage>,
    thread: libc::pid_t,
}

impl Kicker {
    /// Make KVM_RUN on the vCPU return EINTR, now or at its next entry.
    pub fn kick(&self) {
        self.page.byte::<IMMEDIATE_EXIT>().store(1, Ordering::SeqCst);
        // SAFETY: signals a thread of this process, by number; the handler does nothing.
        unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), self.thread, signal()) };
    }

    /// The kernel's thread id of the vCPU's thread.
    pub fn thread(&self) -> u32 {
        self.thread.cast_unsigned()
    }
}

/// Both ends, for the vCPU that will run on the calling thread.
///
/// # Errors
/// When the run page cannot be mapped or the signal handler cannot be set.
pub fn pair(vcpu: &impl AsRawFd) -> io::Result<(Kicker, Kicked)> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    // Without SA_RESTART, so that KVM_RUN returns; the handler itself has nothing to do.
    vmm_sys_util::signal::register_signal_handler(signal(), nothing)
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    let page = Arc::new(SharedPage::map(vcpu, RUN_PAGE)?);
    let thread = thread_number().cast_signed();
    Ok((Kicker { page: page.clone(), thread }, Kicked(page)))
}

/// Interrupts KVM_RUN repeatedly, on the thread that created the ticks. A tick that arrives outside
/// of KVM_RUN is lost.
pub struct Ticks(libc::timer_t);

// SAFETY: a timer's id is the process's, not a thread's.
unsafe impl Send for Ticks {}

impl Ticks {
    /// Ticks for the calling thread, which has called [`pair`]; none yet.
    ///
    /// # Errors
    /// When the host refuses a timer.
    pub fn new() -> io::Result<Self> {
        // SAFETY: all its fields are numbers and pointers, which may be zero.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal();
        event.sigev_notify_thread_id = thread_number().cast_signed();
        let mut timer = std::ptr::null_mut();
        // SAFETY: reads `event`, and writes `timer`.
        match unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) } {
            0 => Ok(Self(timer)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Tick once each `period`; never if it is zero.
    ///
    /// # Errors
    /// When the period is a second or more.
    pub fn every(&self, period: Duration) -> io::Result<()> {
        let period = libc::timespec { tv_sec: 0, tv_nsec: period.as_nanos() as i64 };
        let setting = libc::itimerspec { it_interval: period, it_value: period };
        // SAFETY: `self` has the timer, and the call reads `setting`.
        match unsafe { libc::timer_settime(self.0, 0, &raw const setting, std::ptr::null_mut()) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

impl Drop for Ticks {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and not used any more.
        unsafe { libc::timer_delete(self.0) };
    }
}

/// The kernel's thread id of the calling thread.
pub fn thread_number() -> u32 {
    rustix::thread::gettid().as_raw_pid().cast_unsigned()
}

/// The signal for kicks.
fn signal() -> libc::c_int {
    vmm_sys_util::signal::SIGRTMIN()
}
