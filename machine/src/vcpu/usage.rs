//! Processor time of a thread.
// UNSAFETY: getrusage(2) has no safe wrapper here.
#![expect(unsafe_code, reason = "getrusage")]
use std::mem::MaybeUninit;

/// Microseconds that the kernel has worked for the calling thread; 0 if it does not say.
pub fn system_us() -> u64 {
    let mut usage = MaybeUninit::<libc::rusage>::uninit();
    // SAFETY: the kernel fills in all of `usage` when it returns 0.
    let time = unsafe {
        match libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr()) {
            0 => usage.assume_init().ru_stime,
            _ => return 0,
        }
    };
    let of = |value: i64| u64::try_from(value).unwrap_or(0);
    of(time.tv_sec).saturating_mul(1_000_000).saturating_add(of(time.tv_usec))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_work_for_this_thread_is_counted() {
        let before = system_us();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while system_us() <= before {
            assert!(std::time::Instant::now() < end, "it does not grow");
            std::fs::read("/proc/self/status").unwrap();
        }
    }
}
