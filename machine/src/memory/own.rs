//! The monitor's own memory: of which each machine on a host has a part of its own.
#[cfg(target_env = "gnu")]
use std::ffi::c_void;

/// Have all threads share one heap. The C library would give each a heap of its own, so that they do not wait
/// for each other; they seldom allocate, and never where data is moved. Called before there are threads.
pub fn share_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number, and there is one thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Let go of the pages of code, which the kernel maps by sixteen at the first touch of one. Starting touches
/// most of the program, and running a machine a small part of it, which comes back at its next touch.
pub fn forget_start() {
    #[cfg(target_env = "gnu")]
    {
        unsafe extern "C" {
            // Made by the linker: between them lie code and constants, and nothing that can be written.
            static __executable_start: u8;
            static etext: u8;
        }
        let (begin, end) = (&raw const __executable_start, &raw const etext);
        let length = (end.addr() & !4095).saturating_sub(begin.addr());
        // SAFETY: these pages are mapped from the program's file and have never been written to, so that
        // the kernel reads the same again.
        if unsafe { libc::madvise(begin.cast::<c_void>().cast_mut(), length, libc::MADV_DONTNEED) }
            != 0
        {
            log::debug!("cannot let go of code: {}", std::io::Error::last_os_error());
        }
    }
}
