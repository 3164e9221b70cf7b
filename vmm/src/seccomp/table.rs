//! The system calls that each thread of the monitor may make once it serves: one table for all
//! threads.
//!
//! The table was made by tracing every thread through everything it can be asked to do. Added to
//! that are calls that the C library and the kernel substitute, or make only the first time
//! (`clock_gettime` where there is no vDSO). No thread may start another thread or a program, or
//! listen on a new socket.
//!
//! A new back-end, ioctl or thread needs its entries here.
#![expect(clippy::indexing_slicing, reason = "evaluated by the compiler, which then fails")]
use libc::*;
use machine::memory::fault;

use super::{
    Kind::{self, *},
    calls::{Calls, Rule, Test},
    program::ITSELF,
};
use crate::arch::{MACHINE_IOCTLS, VCPU_IOCTLS};

/// Calls that threads of some kinds may make with any arguments.
struct Group {
    kinds: &'static [Kind],
    calls: &'static [c_long],
}

/// A call that threads of some kinds may make if one of its arguments is allowed.
struct Limited {
    kinds: &'static [Kind],
    call: c_long,
    argument: u8,
    allowed: Allowed,
}

/// The allowed values of an argument.
enum Allowed {
    /// One of these values.
    Values(&'static [u32]),
    /// One of KVM's ioctls with these numbers.
    Kvm(&'static [u8]),
    /// None of these bits are set.
    Without(u32),
    /// Any other value.
    Not(u32),
    /// This process.
    Itself,
}

/// Every thread.
const ALL: &[Kind] = &[Main, Vcpu, Io, Writer, Checkpoint, Files, Disks, Memory, Stream];
/// Threads that open files of the host by their names.
const OPENS: &[Kind] = &[Main, Checkpoint, Files, Disks];
/// Threads that create devices or parts of them: to plug them, to set them up for a driver, or to
/// check whether a state can be restored.
const MAKES: &[Kind] = &[Main, Vcpu, Checkpoint, Files, Disks];

const CALLS: &[Group] = &[
    Group {
        kinds: ALL,
        calls: &[
            SYS_read,
            SYS_write,
            SYS_close,
            // The number of a forbidden call, for its report.
            SYS_pread64,
            SYS_ppoll,
            SYS_clock_gettime,
            SYS_restart_syscall,
            // Memory; the other calls for it are below.
            SYS_munmap,
            SYS_mremap,
            SYS_madvise,
            SYS_brk,
            // Locks, signals, exit.
            SYS_futex,
            SYS_sched_yield,
            SYS_getpid,
            SYS_gettid,
            SYS_rt_sigprocmask,
            SYS_rt_sigreturn,
            SYS_sigaltstack,
            SYS_exit,
            // Also when a page of memory is lost, on any thread that touches it.
            SYS_exit_group,
        ],
    },
    Group { kinds: &[Main, Vcpu, Io, Checkpoint, Files, Disks, Stream], calls: &[SYS_getrandom] },
    // Files: disks, the kernel on reset, saves. `open`, `stat`, `lstat` are musl's.
    Group { kinds: OPENS, calls: &[SYS_openat, SYS_open, SYS_fstat, SYS_fstatfs, SYS_lseek] },
    // Which process holds a file; which descriptors to close at the end; where a save is.
    Group { kinds: OPENS, calls: &[SYS_readlink, SYS_getdents64] },
    Group { kinds: &[Main, Memory], calls: &[SYS_nanosleep, SYS_clock_nanosleep] },
    // The generation of a disk's image.
    Group {
        kinds: &[Io, Checkpoint, Files, Disks],
        calls: &[SYS_fgetxattr, SYS_fsetxattr, SYS_fsync],
    },
    Group { kinds: &[Checkpoint, Files, Disks], calls: &[SYS_ftruncate, SYS_pwrite64] },
    // The sidecar of a disk that is to be plugged, or is replicated.
    Group { kinds: &[Files, Disks], calls: &[SYS_flock, SYS_getcwd] },
    // Sidecars, and images and journal of a backup.
    Group { kinds: &[Files, Disks], calls: &[SYS_fdatasync, SYS_fallocate, SYS_linkat] },
    // Disks and taps.
    Group {
        kinds: &[Io],
        calls: &[
            SYS_readv,
            SYS_writev,
            SYS_preadv,
            SYS_preadv2,
            SYS_pwritev,
            SYS_pwritev2,
            SYS_fdatasync,
            SYS_fallocate,
            SYS_io_uring_register,
        ],
    },
    // A disk's ring is created when it is plugged and when its driver sets it up, and tried when
    // the disk is opened.
    Group { kinds: &[Main, Vcpu, Io, Files, Disks], calls: &[SYS_io_uring_setup] },
    Group { kinds: &[Main, Io, Files, Disks], calls: &[SYS_io_uring_enter] },
    // Saving: the directory, its lock, and moving the files into place.
    Group {
        kinds: &[Checkpoint],
        calls: &[SYS_mkdir, SYS_rmdir, SYS_flock, SYS_rename, SYS_getcwd],
    },
    // An I/O thread may be the last owner of a console's socket, and removes its name.
    Group {
        kinds: &[Main, Io, Checkpoint, Files, Disks],
        calls: &[SYS_statx, SYS_newfstatat, SYS_stat, SYS_lstat],
    },
    Group { kinds: &[Main, Io, Checkpoint, Files, Disks], calls: &[SYS_unlink] },
    // Descriptors released at the end; standard output when in the background.
    Group { kinds: &[Main, Files], calls: &[SYS_dup2] },
    Group { kinds: &[Main, Io, Checkpoint], calls: &[SYS_epoll_wait, SYS_epoll_pwait] },
    Group { kinds: &[Main, Vcpu, Io, Checkpoint, Files, Disks], calls: &[SYS_epoll_ctl] },
    Group { kinds: MAKES, calls: &[SYS_epoll_create1, SYS_eventfd2, SYS_timerfd_create] },
    Group { kinds: &[Main, Vcpu, Io, Checkpoint, Files, Disks], calls: &[SYS_timerfd_settime] },
    // What page faults cost.
    Group { kinds: &[Vcpu], calls: &[SYS_getrusage] },
    // Bursts of console output.
    Group { kinds: &[Vcpu], calls: &[SYS_timer_create, SYS_timer_settime, SYS_timer_delete] },
    // QMP and console clients, primaries of a backup. Listening sockets were created before.
    Group { kinds: &[Main, Io, Stream], calls: &[SYS_accept4] },
    Group { kinds: &[Main, Io, Stream], calls: &[SYS_recvfrom] },
    Group { kinds: &[Main, Vcpu, Io, Checkpoint, Stream], calls: &[SYS_sendto] },
    Group { kinds: &[Main, Io, Checkpoint], calls: &[SYS_shutdown] },
    // Receives a descriptor for `getfd`, and looks where it leads.
    Group { kinds: &[Main], calls: &[SYS_recvmsg, SYS_getpeername] },
    // The process at the other end of a Unix socket.
    Group { kinds: &[Checkpoint, Stream], calls: &[SYS_pidfd_open] },
    // Saving into a socket; only Unix sockets can be made, see below.
    Group { kinds: &[Checkpoint], calls: &[SYS_connect] },
];

/// With `-sandbox on,spawn=allow`: commands are handed to the process that starts them.
const SPAWN: Group = Group { kinds: &[Main], calls: &[SYS_socketpair, SYS_sendmsg] };

const LIMITED: &[Limited] = &[
    // Data never becomes executable.
    Limited { kinds: ALL, call: SYS_mmap, argument: 2, allowed: Allowed::Without(EXEC) },
    Limited { kinds: ALL, call: SYS_mprotect, argument: 2, allowed: Allowed::Without(EXEC) },
    // The process's own vCPU threads, and the calling thread in order to abort.
    Limited { kinds: ALL, call: SYS_tgkill, argument: 0, allowed: Allowed::Itself },
    // For kicks, and for signals that end the process.
    Limited {
        kinds: &[Main, Vcpu],
        call: SYS_rt_sigaction,
        argument: 0,
        allowed: Allowed::Not(SIGSYS.cast_unsigned()),
    },
    // The standard library's check of a descriptor before it closes it, in debug builds.
    limited(if cfg!(debug_assertions) { ALL } else { &[] }, SYS_fcntl, &[F_GETFD as u32]),
    limited(&[Main, Vcpu, Io, Checkpoint, Files, Disks], SYS_fcntl, &[F_DUPFD_CLOEXEC as u32]),
    limited(
        &[Main, Io, Checkpoint, Files, Disks],
        SYS_fcntl,
        &[
            F_GETFD as u32,
            F_SETFD as u32,
            F_GETFL as u32,
            F_SETFL as u32,
            F_DUPFD as u32,
            F_OFD_SETLK as u32,
        ],
    ),
    // A connection of a replicated machine that was handed over: small messages are sent at once.
    // Its file status flags are restored at the end.
    Limited {
        kinds: &[Main],
        call: SYS_setsockopt,
        argument: 1,
        allowed: Allowed::Values(&[IPPROTO_TCP as u32]),
    },
    limited(&[Stream], SYS_fcntl, &[F_SETFL as u32]),
    // Whether what was handed over is for datagrams.
    Limited {
        kinds: &[Main],
        call: SYS_getsockopt,
        argument: 2,
        allowed: Allowed::Values(&[SO_TYPE as u32]),
    },
    // The process at its other end.
    Limited {
        kinds: &[Checkpoint, Stream],
        call: SYS_getsockopt,
        argument: 2,
        allowed: Allowed::Values(&[SO_PEERCRED as u32, SO_PEERPIDFD as u32]),
    },
    // The terminal, restored at the end, whatever ends the process.
    limited(ALL, SYS_ioctl, &[TCSETS as u32, TCSETS2 as u32]),
    // Descriptors, as the standard library sets them up.
    limited(&[Main, Io, Checkpoint, Files, Disks], SYS_ioctl, &[FIONBIO as u32, FIOCLEX as u32]),
    // Disks that are block devices.
    limited(&[Main, Files, Disks], SYS_ioctl, &[BLKSSZGET as u32, BLKPBSZGET as u32]),
    limited(&[Io], SYS_ioctl, &[BLKDISCARD]),
    // Saves that keep disks.
    limited(&[Checkpoint], SYS_ioctl, &[FICLONE as u32]),
    // Taps: plugged by the main thread, and set up as the driver wants it.
    limited(
        &[Main],
        SYS_ioctl,
        &[TUNSETIFF as u32, TUNGETIFF as u32, TUNSETVNETHDRSZ as u32, SIOCGIFINDEX as u32],
    ),
    limited(&[Main, Vcpu, Io], SYS_ioctl, &[TUNSETOFFLOAD as u32, TUNSETQUEUE as u32]),
    // Restored memory that is filled while the guest runs, some of which a device may give back to
    // the host.
    limited(
        &[Io, Memory],
        SYS_ioctl,
        &[fault::UFFDIO_COPY as u32, fault::UFFDIO_ZEROPAGE as u32, fault::UFFDIO_WAKE as u32],
    ),
    // Running a vCPU, and reading and writing its state.
    Limited { kinds: &[Vcpu], call: SYS_ioctl, argument: 1, allowed: Allowed::Kvm(VCPU_IOCTLS) },
    // The machine as a whole. A reset creates a new KVM machine, with its vCPUs.
    Limited { kinds: &[Main], call: SYS_ioctl, argument: 1, allowed: Allowed::Kvm(MACHINE_IOCTLS) },
    // To query the index of an interface, and to save into a socket.
    Limited {
        kinds: &[Main, Checkpoint],
        call: SYS_socket,
        argument: 0,
        allowed: Allowed::Values(&[AF_UNIX as u32]),
    },
];

const EXEC: u32 = PROT_EXEC as u32;
// linux/fs.h; the libc crate lacks it.
const BLKDISCARD: u32 = 0x1277;
/// KVM's type of ioctl (linux/kvm.h).
const KVM: u8 = 0xae;

/// A call whose second argument is a command.
const fn limited(kinds: &'static [Kind], call: c_long, commands: &'static [u32]) -> Limited {
    Limited { kinds, call, argument: 1, allowed: Allowed::Values(commands) }
}

/// Most calls, and most rules, that a table has room for.
const MOST: usize = 256;

/// The system calls of one kind of threads.
pub struct Table {
    numbers: [u32; MOST],
    count: usize,
    rules: [(u32, Rule); MOST],
    rule_count: usize,
}

impl Table {
    /// The system calls of threads of this kind, and the rules for their arguments. With `spawn`,
    /// this includes the calls that hand a command to another process, which is not confined.
    pub const fn of(kind: Kind, spawn: bool) -> Self {
        let rule = (0, Rule { argument: 0, test: Test::Is(0) });
        let mut table = Self { numbers: [0; MOST], count: 0, rules: [rule; MOST], rule_count: 0 };
        let mut at = 0;
        while at < CALLS.len() {
            table.allow_group(kind, &CALLS[at]);
            at += 1;
        }
        if spawn {
            table.allow_group(kind, &SPAWN);
        }
        at = 0;
        while at < LIMITED.len() {
            if contains(LIMITED[at].kinds, kind) {
                table.limit(&LIMITED[at]);
            }
            at += 1;
        }
        table
    }

    /// The same as slices.
    pub const fn calls(&self) -> Calls<'_> {
        Calls {
            numbers: self.numbers.split_at(self.count).0,
            rules: self.rules.split_at(self.rule_count).0,
        }
    }

    const fn allow_group(&mut self, kind: Kind, group: &Group) {
        let mut at = 0;
        while contains(group.kinds, kind) && at < group.calls.len() {
            self.allow(group.calls[at]);
            at += 1;
        }
    }

    /// Insert a call in the order of numbers.
    const fn allow(&mut self, call: c_long) {
        let number = number(call);
        let mut at = self.count;
        while at > 0 && self.numbers[at - 1] > number {
            at -= 1;
        }
        if at > 0 && self.numbers[at - 1] == number {
            return;
        }
        let mut end = self.count;
        while end > at {
            self.numbers[end] = self.numbers[end - 1];
            end -= 1;
        }
        self.numbers[at] = number;
        self.count += 1;
    }

    const fn limit(&mut self, limited: &Limited) {
        self.allow(limited.call);
        match limited.allowed {
            Allowed::Values(values) => {
                let mut at = 0;
                while at < values.len() {
                    self.rule(limited, Test::Is(values[at]));
                    at += 1;
                }
            }
            Allowed::Kvm(numbers) => {
                let mut at = 0;
                while at < numbers.len() {
                    let request = u16::from_be_bytes([KVM, numbers[at]]);
                    self.rule(limited, Test::Has(0xffff, request as u32));
                    at += 1;
                }
            }
            Allowed::Without(bits) => self.rule(limited, Test::Has(bits, 0)),
            Allowed::Not(value) => self.rule(limited, Test::IsNot(value)),
            Allowed::Itself => self.rule(limited, Test::Is(ITSELF)),
        }
    }

    const fn rule(&mut self, limited: &Limited, test: Test) {
        let rule = Rule { argument: limited.argument, test };
        self.rules[self.rule_count] = (number(limited.call), rule);
        self.rule_count += 1;
    }
}

const fn contains(kinds: &[Kind], kind: Kind) -> bool {
    let mut at = 0;
    while at < kinds.len() && kinds[at] as u8 != kind as u8 {
        at += 1;
    }
    at < kinds.len()
}

/// Call numbers have 32 bits (linux/seccomp.h).
const fn number(call: c_long) -> u32 {
    call as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_call_is_allowed_both_without_and_with_a_rule() {
        for kind in ALL {
            let groups = CALLS.iter().chain([&SPAWN]).filter(|group| group.kinds.contains(kind));
            let mut calls: Vec<_> = groups.flat_map(|group| group.calls).collect();
            let all = calls.len();
            calls.sort_unstable();
            calls.dedup();
            assert_eq!(calls.len(), all, "{kind:?}: a call is listed twice");
            let limited = LIMITED.iter().filter(|limited| limited.kinds.contains(kind));
            for limited in limited {
                assert!(!calls.contains(&&limited.call), "{kind:?}: {}", limited.call);
            }
        }
    }
}
