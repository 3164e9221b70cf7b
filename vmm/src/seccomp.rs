//! The system-call filters: once a thread serves, the host does for it only what it needs. They are
//! on unless `-disable-seccomp` is given.
//!
//! Each thread installs its own filter, for its [`Kind`], as the last step before it serves; see
//! `table.rs` for what the filters allow. Threads of the machine and of devices do so through their
//! [`ThreadStart`], without knowing of filters. No thread can be started from behind a filter, so
//! all threads are known before the guest runs. Then [`Confinement::finish`] confines the main
//! thread, and waits until all others are confined: a thread without a filter is an error that ends
//! the start.
//!
//! A call that is not allowed is not carried out: a line with its number is written to standard
//! error and to the log file, and the process ends by SIGSYS. The handler that does so cannot be
//! replaced, because SIGSYS is the one signal that the filters do not permit in `rt_sigaction`. If
//! SIGSYS is blocked, the kernel ends the process itself, without the line; glibc's functions that
//! start threads and programs block it.
//!
//! What a filter cannot see: the path given to `openat`, and the requests given to an io_uring. A
//! ring can open files and sockets, but can neither start programs nor trace processes.
mod calls;
mod program;
mod table;

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use libc::{c_int, c_void, siginfo_t};
use machine::{FirstStep, Refused, ThreadKind, ThreadStart};
use parking_lot::{Condvar, Mutex};
use seccompiler::sock_filter;

use self::{program::Program, table::Table};
use crate::{last_words, signals};

/// This process's memory, to read the siginfo of the signal; opened before it can be needed.
/// Without /proc, as in a bare chroot, the report has no number.
static MEMORY: OnceLock<Option<File>> = OnceLock::new();

/// How long a thread may take to install its filter.
const LIMIT: Duration = Duration::from_secs(1);

/// Why a thread has no filter.
#[derive(Debug, thiserror::Error)]
pub enum SeccompError {
    /// The handler of SIGSYS cannot be set.
    #[error("cannot catch forbidden system calls")]
    Handler(#[source] io::Error),
    /// The kernel refuses it.
    #[error("the host rejects the system-call filter; to run without one, use -disable-seccomp")]
    Refused(#[source] seccompiler::Error),
    /// It did not install one in time.
    #[error("the thread {0} has no system-call filter")]
    Missing(String),
}

/// The role of a thread, which determines its filter. The threads table of CONTRIBUTING.md
/// describes each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The main thread.
    Main,
    /// A vCPU thread.
    Vcpu,
    /// An I/O thread.
    Io,
    /// Writes a log or a console's output to a file: `log`, `output`.
    Writer,
    /// `checkpoint`: saves.
    Checkpoint,
    /// `files0` and `files1`: what may wait for storage.
    Files,
    /// `disks`: writes the disks of a backup.
    Disks,
    /// `faults` and `prefetch`: fill restored memory.
    Memory,
    /// `stream`: reads what a peer sends. It may read, write to memory that it has, and report; it
    /// may not open or create anything, nor use KVM.
    Stream,
}

impl From<ThreadKind> for Kind {
    fn from(kind: ThreadKind) -> Self {
        match kind {
            ThreadKind::Vcpu => Self::Vcpu,
            ThreadKind::Io => Self::Io,
            ThreadKind::Writer => Self::Writer,
        }
    }
}

/// Gives each thread its filter, and tracks which threads have none yet; clones share their state.
/// The default confines no thread.
#[derive(Clone, Default)]
pub struct Confinement(Option<Arc<Filters>>);

struct Filters {
    spawn: bool,
    /// Locked, because threads that start concurrently report here; never held during a system
    /// call.
    threads: Mutex<Threads>,
    changed: Condvar,
}

#[derive(Default)]
struct Threads {
    /// Threads that have been started, or are about to be, and have no filter yet: number and name.
    without: Vec<(usize, String)>,
    /// Number of threads so far.
    count: usize,
    /// The first thread that could not be confined, and why.
    failed: Option<SeccompError>,
}

impl Confinement {
    /// Confine threads from now on. With `spawn`, commands may be handed to the process that starts
    /// them. A forbidden call is reported by [`last_words`].
    ///
    /// # Errors
    /// When the handler for these reports cannot be set.
    pub fn begin(spawn: bool) -> Result<Self, SeccompError> {
        report_forbidden_calls()?;
        let (threads, changed) = Default::default();
        Ok(Self(Some(Arc::new(Filters { spawn, threads, changed }))))
    }

    /// What the thread called `name`, which is about to be started, has to run before it serves.
    pub fn first_step(&self, kind: Kind, name: &str) -> FirstStep {
        let Some(filters) = &self.0 else { return Box::new(|| Ok(())) };
        let unconfined = Unconfined { number: filters.enter(name), filters: filters.clone() };
        Box::new(move || unconfined.confine(kind))
    }

    /// The same, for threads of the machine and of devices.
    pub fn thread_start(&self) -> ThreadStart {
        let this = self.clone();
        ThreadStart::new(move |kind, name| this.first_step(kind.into(), name))
    }

    /// A guard to be held by the thread called `name`, which has no filter, until it ends. It has
    /// to end before the guest runs.
    pub fn passing(&self, name: &str) -> Passing {
        Passing(self.0.as_ref().map(|filters| {
            let number = filters.enter(name);
            (filters.clone(), number)
        }))
    }

    /// Check that no thread has failed to be confined.
    ///
    /// # Errors
    /// Why the first such thread has no filter.
    pub fn check(&self) -> Result<(), SeccompError> {
        let failed = self.0.as_ref().and_then(|filters| filters.threads.lock().failed.take());
        failed.map_or(Ok(()), Err)
    }

    /// Confine the calling thread, the main one, permanently, and wait until all others are
    /// confined. No thread can be started afterwards.
    ///
    /// # Errors
    /// When the host does not support filters, or a thread has none.
    pub fn finish(&self) -> Result<(), SeccompError> {
        let Some(filters) = &self.0 else { return Ok(()) };
        filters.install(Kind::Main)?;
        let deadline = Instant::now() + LIMIT;
        let mut threads = filters.threads.lock();
        while threads.failed.is_none()
            && !threads.without.is_empty()
            && !filters.changed.wait_until(&mut threads, deadline).timed_out()
        {}
        match (threads.failed.take(), threads.without.first()) {
            (Some(why), _) => Err(why),
            (None, Some((_, name))) => Err(SeccompError::Missing(name.clone())),
            (None, None) => Ok(()),
        }
    }
}

impl Filters {
    /// Register a thread that has no filter yet; returns the number by which it is known.
    fn enter(&self, name: &str) -> usize {
        let mut threads = self.threads.lock();
        threads.count += 1;
        let number = threads.count;
        threads.without.push((number, name.to_owned()));
        number
    }

    /// Unregister a thread that has a filter or has ended; returns its name, if it was still
    /// registered.
    fn leave(&self, number: usize) -> Option<String> {
        let mut threads = self.threads.lock();
        let mine = threads.without.iter().position(|thread| thread.0 == number);
        let name = mine.map(|at| threads.without.swap_remove(at).1);
        drop(threads);
        self.changed.notify_all();
        name
    }

    fn failed(&self, why: SeccompError) {
        self.threads.lock().failed.get_or_insert(why);
    }

    /// Confine the calling thread, permanently.
    fn install(&self, kind: Kind) -> Result<(), SeccompError> {
        let program = program::for_process(program(kind, self.spawn), std::process::id());
        seccompiler::apply_filter(&program).map_err(SeccompError::Refused)
    }
}

/// The program of a kind's filter. Only the main thread's depends on `spawn`.
fn program(kind: Kind, spawn: bool) -> &'static [sock_filter] {
    macro_rules! compiled {
        ($kind:expr, $spawn:expr) => {{
            // I/O threads make calls for each packet and request; a vCPU's KVM_RUN is always
            // filtered by its arguments.
            const CACHED: bool = matches!($kind, Kind::Io);
            const PROGRAM: Program = program::compile(Table::of($kind, $spawn).calls(), CACHED);
            static INSTRUCTIONS: [sock_filter; PROGRAM.len()] = PROGRAM.instructions();
            &INSTRUCTIONS
        }};
    }
    match kind {
        Kind::Main if spawn => compiled!(Kind::Main, true),
        Kind::Main => compiled!(Kind::Main, false),
        Kind::Vcpu => compiled!(Kind::Vcpu, false),
        Kind::Io => compiled!(Kind::Io, false),
        Kind::Writer => compiled!(Kind::Writer, false),
        Kind::Checkpoint => compiled!(Kind::Checkpoint, false),
        Kind::Files => compiled!(Kind::Files, false),
        Kind::Disks => compiled!(Kind::Disks, false),
        Kind::Memory => compiled!(Kind::Memory, false),
        Kind::Stream => compiled!(Kind::Stream, false),
    }
}

/// A thread that has no filter yet. If this is dropped, it will never have one.
struct Unconfined {
    filters: Arc<Filters>,
    number: usize,
}

impl Unconfined {
    fn confine(self, kind: Kind) -> Result<(), Refused> {
        let result = self.filters.install(kind).map_err(|why| {
            self.filters.failed(why);
            Refused
        });
        self.filters.leave(self.number);
        result
    }
}

impl Drop for Unconfined {
    fn drop(&mut self) {
        if let Some(name) = self.filters.leave(self.number) {
            self.filters.failed(SeccompError::Missing(name));
        }
    }
}

/// A thread without a filter, which has ended when this is dropped.
pub struct Passing(Option<(Arc<Filters>, usize)>);

impl Drop for Passing {
    fn drop(&mut self) {
        if let Some((filters, number)) = &self.0 {
            filters.leave(*number);
        }
    }
}

fn report_forbidden_calls() -> Result<(), SeccompError> {
    MEMORY.get_or_init(|| File::open("/proc/self/mem").ok());
    signals::handle(libc::SIGSYS, forbidden).map_err(SeccompError::Handler)
}

/// The handler of SIGSYS. Takes no lock and allocates nothing, like [`last_words`].
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
    // This begins with a call that is itself forbidden. All signals are blocked here, and a
    // forbidden call while SIGSYS is blocked ends the process by SIGSYS.
    let _ = signal_hook::low_level::emulate_default_handler(libc::SIGSYS);
}

/// The number of the system call that the filter caught, from the `siginfo_t` at `address`.
fn trapped(memory: &File, address: usize) -> Option<i32> {
    /// `si_code` of a signal from a filter (asm-generic/siginfo.h).
    const SYS_SECCOMP: i32 = 1;
    const SI_CODE: u64 = 8;
    /// Offset of the field after the address of the calling instruction, on 64-bit Linux.
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

    /// All kinds of threads.
    const KINDS: [Kind; 9] = [
        Kind::Main,
        Kind::Vcpu,
        Kind::Io,
        Kind::Writer,
        Kind::Checkpoint,
        Kind::Files,
        Kind::Disks,
        Kind::Memory,
        Kind::Stream,
    ];

    #[test]
    fn the_programs_are_short() {
        for kind in KINDS {
            let program = program(kind, true);
            let length = program.len();
            assert!((1..140).contains(&length), "{kind:?}: {length} instructions");
            // The process's number stands in one place, which is an argument of one call.
            let itself = program.iter().filter(|i| i.k == program::ITSELF).count();
            assert_eq!(itself, 1, "{kind:?}");
        }
    }

    #[test]
    fn a_thread_that_never_comes_to_its_filter_is_named() {
        let confinement = Confinement::begin(false).unwrap();
        drop(confinement.first_step(Kind::Files, "files"));
        let missing = confinement.check().unwrap_err();
        assert_eq!(missing.to_string(), "the thread files has no system-call filter");
        assert!(confinement.check().is_ok());
    }
}
