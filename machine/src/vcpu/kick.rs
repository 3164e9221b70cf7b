//! Interrupting KVM_RUN from another thread.
//!
//! A kick sets `immediate_exit` in the vCPU's run page and then signals its thread. Whether the
//! signal arrives inside KVM_RUN or before it, KVM_RUN returns EINTR: no kick is lost, and a vCPU
//! that is not kicked has no overhead.
// UNSAFETY: signals go to threads by number.
#![expect(unsafe_code, reason = "signals")]
use std::{
    io,
    mem::offset_of,
    os::fd::AsRawFd,
    sync::{Arc, atomic::Ordering},
};

use kvm_bindings::kvm_run;

use crate::kvm::shared_page::SharedPage;

const IMMEDIATE_EXIT: usize = offset_of!(kvm_run, immediate_exit);
/// `io.size`, the second byte of the exit's own fields.
const IO_SIZE: usize = offset_of!(kvm_run, __bindgen_anon_1) + 1;
/// The run page's number in a vCPU's descriptor.
const RUN_PAGE: u32 = 0;

/// The vCPU thread's end: clears the kick.
/// It has a second mapping of the run page.
pub struct Kicked(Arc<SharedPage>);

impl Kicked {
    /// Bytes of one access of the PIO exit that KVM_RUN has just returned with: a string
    /// instruction causes several accesses at once, and their total does not give the size of one.
    pub fn io_size(&self) -> usize {
        usize::from(self.0.byte::<IO_SIZE>().load(Ordering::Relaxed))
    }

    /// After EINTR: later kicks count again.
    pub fn clear(&self) {
        self.0.byte::<IMMEDIATE_EXIT>().store(0, Ordering::SeqCst);
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

/// The kernel's thread id of the calling thread.
pub fn thread_number() -> u32 {
    rustix::thread::gettid().as_raw_pid().cast_unsigned()
}

/// The signal for kicks.
fn signal() -> libc::c_int {
    vmm_sys_util::signal::SIGRTMIN()
}
