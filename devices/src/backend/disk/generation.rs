//! An image's generation, by which a saved state recognises the disk that belongs to it.
//!
//! It is 16 random bytes in an extended attribute of the image, which `cp --preserve=xattr` copies.
//! They are replaced, durably, before the first change of the image after it was opened or saved.
//!
//! ```text
//!            first change              durable
//!   Armed -----------------> Marking -----------> Marked: changes pass, unobserved
//!     ^                         |                   |
//!     +--- when it is durable --+----- a save ------+
//! ```
// UNSAFETY: io_uring is given addresses. The kernel copies the attribute's name and value when it
// accepts the request, and what is written to the waker is a static.
#![expect(unsafe_code)]

#[cfg(test)]
mod tests;

use std::{
    fmt,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd},
    sync::Arc,
};

use io_uring::{IoUring, opcode, squeue, types};
use parking_lot::Mutex;
use rustix::fs::XattrFlags;
use state::device::Mark;
pub use state::mark::{ATTRIBUTE, generation as read};

use super::{Change, Observer, Verdict, Waker};
use crate::random;

/// The value written to a waker, an eventfd.
static ONE: u64 = 1;

/// The identity of a writable image at the time its machine was saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskMark {
    /// Its generation, in network byte order; `None` where the file system has no extended
    /// attributes.
    pub generation: Option<u128>,
    /// Bytes of the file.
    pub size: u64,
    /// The time of its last change, in nanoseconds since 1970, UTC.
    pub mtime_ns: i64,
}

impl DiskMark {
    /// The mark of `file`, which no machine has open.
    ///
    /// # Errors
    /// When the host does not report it.
    pub fn of(file: &File) -> io::Result<Self> {
        Mark::of(file).map(Self::from)
    }
}

/// Give `file` this generation.
///
/// # Errors
/// When the file system has no extended attributes, or the host refuses.
pub fn write(file: &File, generation: u128) -> io::Result<()> {
    let value = generation.to_be_bytes();
    Ok(rustix::fs::fsetxattr(file, ATTRIBUTE, &value, XattrFlags::empty())?)
}

fn new() -> io::Result<u128> {
    Ok(u128::from_be_bytes(random::bytes()?))
}

/// The generation of an open image.
pub(super) struct Generation {
    file: Arc<File>,
    waker: Waker,
    state: Mutex<State>,
}

struct State {
    /// Whether this process may use io_uring, and io_uring can set attributes.
    io_uring: bool,
    /// The image's generation, or its next one while in [`Phase::Marking`].
    current: u128,
    phase: Phase,
}

enum Phase {
    Armed,
    Marking {
        job: Box<Job>,
        /// The image was saved meanwhile, so this generation is used up.
        saved: bool,
    },
    Marked,
}

impl Generation {
    /// The generation of `file`, which gets one if it has none. `waker` is called when a change
    /// that has to wait can be tried again.
    ///
    /// # Errors
    /// When the file system does not store it.
    pub fn of(file: &Arc<File>, waker: Waker, io_uring: bool) -> io::Result<Self> {
        let current = match read(file)? {
            Some(current) => current,
            None => {
                let first = new()?;
                write(file, first)?;
                first
            }
        };
        let state = Mutex::new(State { io_uring, current, phase: Phase::Armed });
        Ok(Self { file: file.clone(), waker, state })
    }

    /// The current generation, for a save made while no request is under way. The next change gives
    /// the image another one, so the disk has to be observed again.
    pub fn save(&self) -> u128 {
        let mut state = self.state.lock();
        match &mut state.phase {
            Phase::Armed => {}
            // No change under that generation has been made yet, and none will be.
            Phase::Marking { saved, .. } => *saved = true,
            phase @ Phase::Marked => *phase = Phase::Armed,
        }
        state.current
    }

    /// Start to write another generation to the image; `None` when it is durable already.
    fn begin(&self, state: &mut State) -> io::Result<Option<Box<Job>>> {
        let next = new()?;
        let job = match state.io_uring {
            true => Job::begin(&self.file, &self.waker, next)?,
            false => None,
        };
        if job.is_none() {
            write(&self.file, next)?;
            self.file.sync_all()?;
        }
        state.current = next;
        Ok(job.map(Box::new))
    }
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "generation {:032x}", self.state.lock().current)
    }
}

impl Observer for Generation {
    fn before(&self, _: &Change) -> io::Result<Verdict> {
        let mut state = self.state.lock();
        loop {
            match &mut state.phase {
                Phase::Marked => return Ok(Verdict::Retire),
                Phase::Armed => {
                    state.phase = match self.begin(&mut state)? {
                        Some(job) => Phase::Marking { job, saved: false },
                        None => Phase::Marked,
                    };
                }
                Phase::Marking { job, saved } => {
                    let Some(result) = job.result() else { return Ok(Verdict::Wait) };
                    let again = *saved || result.is_err();
                    state.phase = if again { Phase::Armed } else { Phase::Marked };
                    match result {
                        // Linux before 5.19 cannot.
                        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => state.io_uring = false,
                        // The change is refused: otherwise a save would mistake the changed image
                        // for the saved one.
                        other => other?,
                    }
                }
            }
        }
    }

    fn after(&self, _: &Change, _: &io::Result<()>) {}
}

/// A generation being written to the medium by io_uring: a recently copied image may have gigabytes
/// of dirty data to be flushed first.
struct Job(IoUring, [Option<i32>; 2]);

impl Job {
    const SET: u64 = 0;
    const SYNC: u64 = 1;
    const WAKE: u64 = 2;

    /// `None`: the host provides no ring.
    fn begin(file: &File, waker: &Waker, generation: u128) -> io::Result<Option<Self>> {
        let Ok(mut ring) = IoUring::new(4) else { return Ok(None) };
        let value = generation.to_be_bytes();
        let to = types::Fd(file.as_raw_fd());
        let woken = types::Fd(waker.as_fd().as_raw_fd());
        let name = ATTRIBUTE.as_ptr();
        // Each begins after the previous one has ended, whether it succeeded or not.
        let chain = squeue::Flags::IO_HARDLINK;
        let entries = [
            opcode::FSetXattr::new(to, name, value.as_ptr().cast(), value.len() as u32)
                .build()
                .user_data(Self::SET)
                .flags(chain),
            opcode::Fsync::new(to).build().user_data(Self::SYNC).flags(chain),
            opcode::Write::new(woken, (&raw const ONE).cast(), size_of_val(&ONE) as u32)
                .build()
                .user_data(Self::WAKE),
        ];
        // SAFETY: name and value are copied when the request is accepted, which is in this
        // function. `ONE` is a static, and the kernel keeps the descriptors open from then on.
        unsafe { ring.submission().push_multiple(&entries) }.map_err(io::Error::other)?;
        ring.submit()?;
        Ok(Some(Self(ring, [None; 2])))
    }

    /// Its result; `None` while it has not ended.
    fn result(&mut self) -> Option<io::Result<()>> {
        let Self(ring, results) = self;
        for entry in ring.completion() {
            match entry.user_data() {
                Self::SET => results[0] = Some(entry.result()),
                Self::SYNC => results[1] = Some(entry.result()),
                _ => {}
            }
        }
        let [Some(set), Some(sync)] = *results else { return None };
        let failed = [set, sync].into_iter().find(|said| *said < 0);
        Some(failed.map_or(Ok(()), |said| Err(io::Error::from_raw_os_error(said.wrapping_neg()))))
    }
}
