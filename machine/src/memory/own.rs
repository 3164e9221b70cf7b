//! The monitor's own memory, which each machine on a host uses in addition to the guest's, and its
//! first step.
#[cfg(target_env = "gnu")]
use std::ffi::c_void;

/// Defines the entry point of a program whose body is `$body`, a function that returns the exit
/// status. It replaces the standard library's, which costs a start 4 %: that one gives each thread a
/// second stack, to report an overflow of the first in words. Without it an overflow ends the
/// process by SIGSEGV. The program needs `#![no_main]`.
#[macro_export]
macro_rules! entry_point {
    ($body:path) => {
        #[unsafe(no_mangle)]
        extern "C" fn main(
            _: std::ffi::c_int,
            _: *const *const std::ffi::c_char,
        ) -> std::ffi::c_int {
            $crate::memory::own::begin();
            let status: u8 = $body();
            let _ = std::io::Write::flush(&mut std::io::stdout());
            status.into()
        }
    };
}

/// What the standard library's entry point does that a program relies on: writing to a pipe without
/// a reader is an error, and the descriptors 0 to 2 are open, so that no file gets such a number.
pub fn begin() {
    // SAFETY: there is one thread; the descriptors are only looked at, or opened.
    unsafe {
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        for fd in 0..=2 {
            if libc::fcntl(fd, libc::F_GETFD) == -1 {
                // It gets the lowest free number, which is this one.
                libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
            }
        }
    }
}

/// Make all threads share one heap. By default the C library gives each thread a heap, to avoid
/// contention; here threads seldom allocate, and never on the data path. Called before threads are
/// started.
pub fn share_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: only sets a number, while there is one thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Drop what only the start needed: free memory of the heap, and the pages of code, which the kernel
/// maps sixteen at a time at the first touch. Starting touches most of the program, running a
/// machine only a small part, which is mapped again at its next touch.
pub fn forget_start() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: gives back pages that nothing is allocated in.
        unsafe { libc::malloc_trim(0) };
        unsafe extern "C" {
            // Made by the linker: between them lie code and constants, and nothing writable.
            static __executable_start: u8;
            static etext: u8;
        }
        let (begin, end) = (&raw const __executable_start, &raw const etext);
        let length = (end.addr() & !4095).saturating_sub(begin.addr());
        // SAFETY: these pages are mapped from the program's file and were never written to, so the
        // kernel reads the same bytes again.
        if unsafe { libc::madvise(begin.cast::<c_void>().cast_mut(), length, libc::MADV_DONTNEED) }
            != 0
        {
            log::debug!("cannot unmap unused code: {}", std::io::Error::last_os_error());
        }
    }
}
