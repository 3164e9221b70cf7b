//! A kernel or initrd file: opened without blocking, read straight into guest memory.
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use devices::Memory;
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::memory::HUGE_PAGE;

/// Bytes that suffice to identify a file's type.
const HEAD: u64 = 4096;
/// Most bytes that are read at a time.
const PIECE: u64 = 1 << 20;
/// Two threads read parts of a file that have at least as many bytes.
const LARGE: u64 = 4 << 20;

/// Why a file cannot be read.
#[derive(Debug, Error)]
pub enum SourceError {
    /// Missing, or not readable for this process.
    #[error("it cannot be opened")]
    Open(#[source] io::Error),
    /// A directory, FIFO, device or socket.
    #[error("it is {0}, not a regular file")]
    NotRegular(&'static str),
    /// It failed while being read, or became shorter.
    #[error("{len} bytes at offset {offset:#x} cannot be read")]
    Read {
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
        /// The system's error.
        source: io::Error,
    },
    /// It failed while being read into guest memory, or became shorter.
    #[error("{len} bytes at offset {offset:#x} cannot be read into guest memory at {address:#x}")]
    Load {
        /// First byte.
        offset: u64,
        /// How many.
        len: u64,
        /// Where to.
        address: u64,
        /// The error of guest memory.
        source: GuestMemoryError,
    },
}

pub(crate) struct Source<'a> {
    file: File,
    pub(crate) len: u64,
    reading: Reading<'a>,
}

/// How files are read.
#[derive(Clone, Copy)]
pub(crate) enum Reading<'a> {
    /// For the start of a machine, with the help of another thread: most of the time goes into
    /// memory that is touched for the first time.
    AtStart,
    /// By a thread that cannot start another one. Counts the starts and ends of calls that may wait
    /// for storage: it is odd during one.
    Counted(&'a AtomicU64),
}

impl Reading<'_> {
    fn waiting<T>(self, call: impl FnOnce() -> T) -> T {
        let Self::Counted(calls) = self else { return call() };
        calls.fetch_add(1, Ordering::Relaxed);
        let result = call();
        calls.fetch_add(1, Ordering::Relaxed);
        result
    }
}

impl<'a> Source<'a> {
    pub(crate) fn open(path: &Path, reading: Reading<'a>) -> Result<Self, SourceError> {
        use std::os::unix::fs::FileTypeExt;
        // Opening a FIFO would otherwise wait for a writer.
        let opened: io::Result<_> = reading.waiting(|| {
            let file = OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
                .open(path)?;
            let metadata = file.metadata()?;
            Ok((file, metadata))
        });
        let (file, metadata) = opened.map_err(SourceError::Open)?;
        let kind = metadata.file_type();
        if kind.is_file() {
            return Ok(Source { file, len: metadata.len(), reading });
        }
        Err(SourceError::NotRegular(if kind.is_dir() {
            "a directory"
        } else if kind.is_fifo() {
            "a FIFO"
        } else if kind.is_block_device() {
            "a block device"
        } else {
            "a character device or socket"
        }))
    }

    /// The first bytes: 4096, or the whole file if that is shorter.
    pub(crate) fn head(&self) -> Result<Vec<u8>, SourceError> {
        self.read(0, self.len.min(HEAD))
    }

    /// Read a part that is small enough to be kept. The caller has bounded `len`.
    pub(crate) fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, SourceError> {
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX)];
        self.reading
            .waiting(|| self.file.read_exact_at(&mut bytes, offset))
            .map_err(|source| SourceError::Read { offset, len, source })?;
        Ok(bytes)
    }

    /// Read a part straight into guest memory.
    pub(crate) fn load(
        &self,
        memory: &Memory,
        offset: u64,
        len: u64,
        address: u64,
    ) -> Result<(), SourceError> {
        // No huge page is touched by both threads.
        let middle = (address.saturating_add(len / 2) & !(HUGE_PAGE - 1)).saturating_sub(address);
        let second = if len >= LARGE { self.opened_again() } else { None };
        match second {
            None => self.load_from(&self.file, memory, offset, len, address),
            Some(second) => thread::scope(|scope| {
                let (offset_2, address_2) = (offset + middle, address + middle);
                let rest = scope.spawn(move || {
                    self.load_from(&second, memory, offset_2, len - middle, address_2)
                });
                self.load_from(&self.file, memory, offset, middle, address)?;
                rest.join().unwrap_or_else(|_| {
                    let source = io::Error::other("its thread has panicked");
                    Err(SourceError::Read { offset: offset_2, len: len - middle, source })
                })
            }),
        }
    }

    /// The file with a position of its own, for the other thread; `None` if there is none, or
    /// /proc is not mounted.
    fn opened_again(&self) -> Option<File> {
        match self.reading {
            Reading::AtStart => File::open(format!("/proc/self/fd/{}", self.file.as_raw_fd())).ok(),
            Reading::Counted(_) => None,
        }
    }

    fn load_from(
        &self,
        mut file: &File,
        memory: &Memory,
        offset: u64,
        len: u64,
        address: u64,
    ) -> Result<(), SourceError> {
        file.seek(SeekFrom::Start(offset)).map_err(|source| SourceError::Read {
            offset,
            len,
            source,
        })?;
        for at in (0..len).step_by(PIECE as usize) {
            let piece = (len - at).min(PIECE);
            let to = GuestAddress(address.saturating_add(at));
            self.reading
                .waiting(|| memory.read_exact_volatile_from(to, &mut file, piece as usize))
                .map_err(|source| SourceError::Load { offset, len, address, source })?;
        }
        Ok(())
    }
}
