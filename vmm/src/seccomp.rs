//! The system-call filter: from the guest's first instruction on, the host does for this process
//! only what a monitor needs. On unless `-disable-seccomp` is given.
//!
//! One list for all threads; see `calls.rs` for it. A call that is not on it is not carried out: a
//! line with its number goes to standard error and to the log file, and the process ends by SIGSYS.
//! The handler that does so cannot be put out of action, because SIGSYS is the one signal that
//! `rt_sigaction` may not touch. Under a blocked SIGSYS the kernel ends the process by itself and
//! without the line; that is how it goes with glibc's ways to start threads and programs.
//!
//! What a filter cannot see: the path that `openat` is given, and what an io_uring is asked for. A
//! ring can open files and sockets, but neither start programs nor trace processes.
mod calls;
mod program;

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    sync::OnceLock,
    time::{Duration, Instant},
};

use libc::{c_int, c_void, siginfo_t};
use seccompiler::BpfProgram;

use crate::{last_words, signals};

/// Why there is no filter.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The handler of SIGSYS cannot be set.
    #[error("cannot watch for forbidden system calls")]
    Handler(#[source] io::Error),
    /// The kernel refuses it.
    #[error("the host refuses the system-call filter; to run without one, use -disable-seccomp")]
    Refused(#[source] seccompiler::Error),
}

/// This process's memory, to look at what came with the signal; opened before it can be needed.
/// Without /proc, as in a bare chroot, the report has no number.
static MEMORY: OnceLock<Option<File>> = OnceLock::new();

/// The filter of all threads.
pub struct Filter(BpfProgram);

/// Make it. With `spawn`, another process may be handed what it is to start.
pub fn filter(spawn: bool) -> Filter {
    Filter(program::compile(&calls::allowed(spawn)))
}

/// Confine all threads, those that run and those to come, for good. A forbidden call is reported
/// by [`last_words`].
///
/// # Errors
/// When the host has no filters.
pub fn confine(Filter(program): &Filter) -> Result<(), SeccompError> {
    report_forbidden_calls()?;
    let deadline = Instant::now() + Duration::from_secs(1);
    loop {
        match seccompiler::apply_filter_all_threads(program) {
            // A thread that was joined and has a filter of its own may still be on its way out.
            Err(seccompiler::Error::ThreadSync(_)) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            other => return other.map_err(SeccompError::Refused),
        }
    }
}

/// Confine the calling thread, which reads what a peer sends: it may read, write to memory that it
/// has, and report. It has to end before [`confine`].
///
/// # Errors
/// When the host has no filters.
pub fn confine_reader() -> Result<(), SeccompError> {
    let program = program::compile(&calls::reader());
    report_forbidden_calls()?;
    seccompiler::apply_filter(&program).map_err(SeccompError::Refused)
}

fn report_forbidden_calls() -> Result<(), SeccompError> {
    MEMORY.get_or_init(|| File::open("/proc/self/mem").ok());
    signals::handle(libc::SIGSYS, forbidden).map_err(SeccompError::Handler)
}

/// The handler of SIGSYS. Takes no lock and no memory, as [`last_words`].
extern "C" fn forbidden(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    let memory = MEMORY.get().and_then(Option::as_ref);
    let mut line = [0; 128];
    let mut rest = line.as_mut_slice();
    let _ = match memory.and_then(|memory| trapped(memory, info.addr())) {
        Some(number) => writeln!(
            rest,
            "stratovirt: Received a bad system call, number: {number}. If it is needed, use \
             -disable-seccomp"
        ),
        None => writeln!(rest, "stratovirt: Received a bad system call, number unknown"),
    };
    let left = rest.len();
    last_words::say(line.get(..line.len().saturating_sub(left)).unwrap_or_default());
    // Begins with a call that is forbidden itself. All signals are blocked here, and a forbidden
    // call under a blocked SIGSYS ends the process by it.
    let _ = signal_hook::low_level::emulate_default_handler(libc::SIGSYS);
}

/// The number of the system call that the filter caught, from the `siginfo_t` at `address`.
fn trapped(memory: &File, address: usize) -> Option<i32> {
    /// `si_code` of a signal from a filter (asm-generic/siginfo.h).
    const SYS_SECCOMP: i32 = 1;
    const SI_CODE: u64 = 8;
    /// Behind the address of the calling instruction, where 64-bit Linux has it.
    const SI_SYSCALL: u64 = 24;
    let word = |offset: u64| {
        let mut word = [0; 4];
        let at = u64::try_from(address).ok()?.checked_add(offset)?;
        memory.read_exact_at(&mut word, at).ok()?;
        Some(i32::from_ne_bytes(word))
    };
    if word(SI_CODE)? == SYS_SECCOMP { word(SI_SYSCALL) } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_programs_of_this_length() {
        let Filter(program) = filter(true);
        assert!((1..program::MAX_LENGTH).contains(&program.len()), "{}", program.len());
    }
}
