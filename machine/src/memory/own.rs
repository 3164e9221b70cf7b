//! The monitor's own memory, which each machine on a host uses in addition to the guest's.
#[cfg(target_env = "gnu")]
use std::ffi::c_void;

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
