//! What the monitor may ask of the host while the guest runs.
//!
//! Found by tracing it through everything it can be asked to do, and completed with what the C
//! library and the kernel put in place of a call or do the first time only (`clock_gettime` where
//! there is no vDSO, `sched_getaffinity` before a second heap).
//!
//! Whoever adds a back-end, an ioctl or a thread that starts late looks here.
use libc::*;
use machine::memory::fault;

use super::program::{Calls, Rule, Test};

/// Whatever the arguments.
const CALLS: &[c_long] = &[
    // Files: disks, the kernel on reset, logs, consoles. `open`, `stat`, `lstat` are musl's.
    SYS_openat,
    SYS_open,
    SYS_close,
    SYS_statx,
    SYS_newfstatat,
    SYS_fstat,
    SYS_stat,
    SYS_lstat,
    SYS_fstatfs,
    SYS_lseek,
    SYS_read,
    SYS_readv,
    SYS_pread64,
    SYS_preadv,
    SYS_preadv2,
    SYS_write,
    SYS_writev,
    SYS_pwrite64,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_fdatasync,
    SYS_fallocate,
    SYS_ftruncate,
    // The generation of a disk's image.
    SYS_fgetxattr,
    SYS_fsetxattr,
    // The socket's and the pid file's names at the end, and which descriptors there are to give up;
    // standard output when in the background.
    SYS_unlink,
    SYS_getdents64,
    // Saving: the directory, its lock, and the files put in their places.
    SYS_mkdir,
    SYS_rmdir,
    SYS_flock,
    SYS_fsync,
    SYS_rename,
    // Where it is, for a save that builds on it.
    SYS_readlink,
    SYS_getcwd,
    SYS_dup2,
    SYS_io_uring_setup,
    SYS_io_uring_enter,
    // Waiting.
    SYS_poll,
    SYS_ppoll,
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_wait,
    SYS_epoll_pwait,
    SYS_eventfd2,
    SYS_timerfd_create,
    SYS_timerfd_settime,
    SYS_nanosleep,
    SYS_clock_nanosleep,
    SYS_clock_gettime,
    SYS_gettimeofday,
    SYS_restart_syscall,
    // QMP and console clients. Sockets that listen were made before.
    SYS_accept4,
    // Saving into a socket; only Unix sockets can be made, see below.
    SYS_connect,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_sendto,
    SYS_shutdown,
    // Memory; the rest of it is below.
    SYS_munmap,
    SYS_mremap,
    SYS_madvise,
    SYS_brk,
    // Threads: those still on their way into their first function when the filter comes, where
    // signals are blocked and nothing could be reported; then locks, signals, the end.
    SYS_rseq,
    SYS_set_robust_list,
    SYS_futex,
    SYS_sched_yield,
    SYS_sched_getaffinity,
    SYS_getpid,
    SYS_gettid,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sigaltstack,
    SYS_exit,
    SYS_exit_group,
    SYS_getrandom,
];

/// With `-sandbox on,spawn=allow`.
const SPAWN: &[c_long] = &[SYS_socketpair, SYS_sendmsg];

/// Of the thread that reads what a peer sends: nothing is opened, made or asked of KVM.
const READER: &[c_long] = &[
    SYS_read,
    SYS_recvfrom,
    SYS_poll,
    SYS_ppoll,
    // Reports: the main loop's eventfd, the log, and what is said of a forbidden call.
    SYS_write,
    SYS_writev,
    SYS_pread64,
    SYS_close,
    // Memory; the rest of it is below.
    SYS_munmap,
    SYS_mremap,
    SYS_madvise,
    SYS_brk,
    SYS_futex,
    SYS_sched_yield,
    SYS_clock_gettime,
    SYS_gettimeofday,
    SYS_restart_syscall,
    SYS_getrandom,
    SYS_getpid,
    SYS_gettid,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sigaltstack,
    SYS_exit,
];

/// What `ioctl` may be asked for, the hottest first.
const IOCTLS: &[Ioctl] = &[
    // Descriptors, as the standard library sets them up.
    FIONBIO,
    FIOCLEX,
    // Disks that are block devices.
    BLKSSZGET,
    BLKPBSZGET,
    BLKDISCARD,
    // Saves that keep disks.
    FICLONE,
    // Taps.
    TUNSETIFF,
    TUNGETIFF,
    TUNSETVNETHDRSZ,
    TUNSETOFFLOAD,
    TUNSETQUEUE,
    SIOCGIFINDEX,
    // The terminal, put back at the end.
    TCGETS,
    TCSETS,
    TCSETSW,
    TCSETSF,
    TCGETS2,
    TCSETS2,
    // Restored memory that is filled while the guest runs.
    fault::UFFDIO_COPY,
    fault::UFFDIO_ZEROPAGE,
    fault::UFFDIO_WAKE,
];

// linux/fs.h; the libc crate lacks it.
const BLKDISCARD: Ioctl = 0x1277;

/// KVM's type of ioctl, and its numbers (linux/kvm.h) that run, stop, reset and save a machine that
/// has been built.
const KVM: u8 = 0xae;
const KVM_NUMBERS: &[u8] = &[
    0x80, // RUN
    // A reset makes a new virtual machine: CREATE_VM, CHECK_EXTENSION, GET_VCPU_MMAP_SIZE,
    // GET_SUPPORTED_CPUID, CREATE_VCPU, SET_USER_MEMORY_REGION, SET_TSS_ADDR,
    // SET_IDENTITY_MAP_ADDR, CREATE_IRQCHIP, IRQFD, CREATE_PIT2, IOEVENTFD, SET_CPUID2.
    0x01, 0x03, 0x04, 0x05, 0x41, 0x46, 0x47, 0x48, 0x60, 0x76, 0x77, 0x79, 0x90,
    0xad, // KVMCLOCK_CTRL
    0x7b, 0x7c, // SET_CLOCK, GET_CLOCK
    0xe1, 0xe2, // SET_DEVICE_ATTR, GET_DEVICE_ATTR
    0x62, 0x63, // GET_IRQCHIP, SET_IRQCHIP
    0x42, // GET_DIRTY_LOG
    0xa3, // GET_TSC_KHZ
    0x81, 0x82, // GET_REGS, SET_REGS
    0x83, 0x84, // GET_SREGS, SET_SREGS
    0x88, 0x89, // GET_MSRS, SET_MSRS
    0x8e, 0x8f, // GET_LAPIC, SET_LAPIC
    0x98, 0x99, // GET_MP_STATE, SET_MP_STATE
    0x9f, 0xa0, // GET_PIT2, SET_PIT2; GET_VCPU_EVENTS, SET_VCPU_EVENTS
    0xa1, 0xa2, // GET_DEBUGREGS, SET_DEBUGREGS
    0xa4, 0xa5, // GET_XSAVE, SET_XSAVE
    0xa6, 0xa7, // GET_XCRS, SET_XCRS
    0xbe, 0xbf, // GET_NESTED_STATE, SET_NESTED_STATE
];

/// What `fcntl` may be asked for.
const FCNTLS: &[c_int] =
    &[F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD, F_DUPFD_CLOEXEC, F_OFD_SETLK];

/// System calls, and what their arguments must be: any one of the rules, or anything without rules.
/// With `spawn`, also what hands a command to another process, which is not confined.
pub fn allowed(spawn: bool) -> Calls {
    let kvm = |n: &u8| rule(1, Test::Has(0xffff, u16::from_be_bytes([KVM, *n]).into()));
    let ioctls = IOCTLS.iter().map(|request| is(1, *request as u32));
    let limited = [
        (SYS_ioctl, KVM_NUMBERS.iter().map(kvm).chain(ioctls).collect()),
        (SYS_fcntl, FCNTLS.iter().map(|command| is(1, command.cast_unsigned())).collect()),
        // Names of threads that have just started.
        (SYS_prctl, vec![is(0, PR_SET_NAME.cast_unsigned())]),
        // To ask for the number of an interface, and to save into.
        (SYS_socket, vec![is(0, AF_UNIX.cast_unsigned())]),
    ];
    let calls = CALLS.iter().chain(if spawn { SPAWN } else { &[] });
    calls.map(|call| (*call, Vec::new())).chain(limited).chain(common()).map(numbered).collect()
}

/// What the thread may do that reads what a peer sends.
pub fn reader() -> Calls {
    // What the standard library asks of a descriptor before it closes it, when it checks itself.
    let limited = [(SYS_fcntl, vec![is(1, F_GETFD.cast_unsigned())])];
    let calls = READER.iter().map(|call| (*call, Vec::new()));
    calls.chain(limited).chain(common()).map(numbered).collect()
}

/// What every thread may do.
fn common() -> impl Iterator<Item = (c_long, Vec<Rule>)> {
    let not_code = || vec![rule(2, Test::Has(PROT_EXEC.cast_unsigned(), 0))];
    let common = [
        // Data never becomes code.
        (SYS_mmap, not_code()),
        (SYS_mprotect, not_code()),
        // The own vCPU threads, and itself to abort.
        (SYS_tgkill, vec![is(0, std::process::id())]),
        (SYS_rt_sigaction, vec![rule(0, Test::IsNot(SIGSYS.cast_unsigned()))]),
    ];
    common.into_iter()
}

fn is(argument: u8, value: u32) -> Rule {
    rule(argument, Test::Is(value))
}

fn rule(argument: u8, test: Test) -> Rule {
    Rule { argument, test }
}

/// Numbers of system calls have 32 bits (linux/seccomp.h).
fn numbered((call, rules): (c_long, Vec<Rule>)) -> (u32, Vec<Rule>) {
    (u32::try_from(call).unwrap_or(u32::MAX), rules)
}
