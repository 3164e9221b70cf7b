//! Disks: raw image files and block devices of the host.
//!
//! The format is never guessed. A guest owns every byte of its disk, so a monitor that follows an
//! image header found there lets the guest name files of the host (GHSA-jmr4-g2hv-mjj6). At most,
//! an image that begins like another format can be refused ([`OpenOptions::probe`]).
mod copy;
mod engine;
mod error;
mod format;
mod generation;
mod holder;
mod observer;
mod opening;
mod spot_check;
mod storage;
mod sys;
#[cfg(test)]
mod tests;
mod write_log;

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::{FileExt, FileTypeExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::event::{EventfdFlags, eventfd};
use state::mark;

pub use crate::virtio::chain::Segment;

pub use self::{
    copy::{CopyMethod, DiskCopy, Step, data_after},
    engine::Op,
    error::DiskError,
    generation::{ATTRIBUTE, DiskMark},
    observer::{Change, ChangeKind, Observer, Verdict, Waker},
    spot_check::{SpotCheck, SpotHash},
    storage::{Outcome, Storage},
    write_log::{Contents, Copied, Logged, Taken, WriteLog},
};
use time::OffsetDateTime;

use self::{
    generation::Generation,
    observer::{Observers, Permit},
    opening::{check_kind, lock, open, open_direct, open_error},
    sys::{FileSystem, Lock},
    write_log::Logging,
};

/// Bytes of a sector, the unit of every address on a virtio disk.
pub const SECTOR: u64 = 512;

/// How long a caller waits for a disk's storage; beyond that, the storage counts as hung.
pub const DISK_STALL_LIMIT: Duration = Duration::from_secs(1);

/// How requests that have to wait for the medium are carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Aio {
    /// By io_uring where the host allows it, else as [`Aio::Off`].
    #[default]
    Auto,
    /// By io_uring; opening fails where the host refuses it.
    IoUring,
    /// One after the other, by blocking system calls.
    Off,
}

/// How to open a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OpenOptions {
    /// Never write. Several machines may then share the image.
    pub readonly: bool,
    /// Bypass the host's page cache (`O_DIRECT`).
    pub direct: bool,
    /// Deallocate space that the guest discards.
    pub discard: bool,
    /// How to wait for the medium.
    pub aio: Aio,
    /// Refuse an image that looks like another format: its guest would see an empty disk, and
    /// format it.
    pub probe: bool,
}

/// The part of a disk that bypasses the page cache.
#[derive(Debug)]
struct Direct {
    file: Arc<File>,
    /// What the addresses of buffers must be multiples of; a power of two.
    memory_align: u64,
    /// What offsets and lengths must be multiples of; a power of two.
    offset_align: u64,
}

/// An open disk, locked against other machines for as long as it lives.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    /// Through the page cache. Of a direct disk, only for what `O_DIRECT` cannot do: the host
    /// keeps the two coherent, so nothing has to be copied through aligned buffers here.
    file: Arc<File>,
    direct: Option<Direct>,
    device: bool,
    /// On tmpfs: reads and writes never wait for a medium, but `RWF_NOWAIT` is not supported.
    in_memory: bool,
    readonly: bool,
    discard: bool,
    io_uring: bool,
    logical: u32,
    physical: u32,
    bytes: AtomicU64,
    observers: Observers,
    /// For an image that can be written, if its file system stores it.
    generation: Option<Arc<Generation>>,
    logging: Logging,
}

impl Disk {
    /// Open and lock the image or block device at `path`.
    ///
    /// # Errors
    /// See [`DiskError`]: each says what to do about it.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self, DiskError> {
        Self::opened(path, options, true)
    }

    /// Like [`Disk::open`] but without the lock, for a disk that another machine still holds and is
    /// to release: it must not be used until [`Disk::hold`].
    ///
    /// # Errors
    /// As [`Disk::open`], but for the lock.
    pub fn open_unheld(path: &Path, options: &OpenOptions) -> Result<Self, DiskError> {
        Self::opened(path, options, false)
    }

    fn opened(path: &Path, options: &OpenOptions, held: bool) -> Result<Self, DiskError> {
        let OpenOptions { readonly, direct, discard, aio, probe } = *options;
        // Checked before it is opened, because opening alone can wait without end (a FIFO) or have an
        // effect (a watchdog); and again afterwards, because it may have been replaced.
        let seen = path.metadata().map_err(|source| open_error(path, readonly, source))?;
        check_kind(path, &seen)?;
        let file = open(path, readonly, 0).map_err(|e| open_error(path, readonly, e))?;
        let failed = |source| open_error(path, readonly, source);
        let found = file.metadata().map_err(failed)?;
        check_kind(path, &found)?;
        let file_system = sys::file_system(&file);
        if file_system == FileSystem::Proc {
            return Err(DiskError::NotADisk { path: path.into(), kind: "a file of procfs" });
        }
        if held {
            lock(path, &file, readonly)?;
        }
        if probe && let Some((format, qemu_name)) = format::other_than_raw(&file) {
            return Err(DiskError::Format { path: path.into(), format, qemu_name });
        }
        let device = found.file_type().is_block_device();
        let direct = if direct { Some(open_direct(path, readonly, &file)?) } else { None };
        let io_uring = match (aio, engine::probe()) {
            (Aio::Off, _) => false,
            (_, Ok(())) => true,
            (Aio::IoUring, Err(source)) => {
                return Err(DiskError::NoIoUring { path: path.into(), source });
            }
            (Aio::Auto, Err(why)) => {
                log::info!("{}: no io_uring ({why}), requests wait in turn", path.display());
                false
            }
        };
        // An image always has sectors of 512 bytes, whatever its storage has, or a partition table
        // made elsewhere could not be found in it; a host block device keeps its own size.
        let (logical, physical) =
            if device { sys::sector_sizes(&file).map_err(failed)? } else { (SECTOR as u32, 4096) };
        let observers = Observers::new()
            .map_err(|source| DiskError::NoDescriptor { path: path.into(), source })?;
        let file = Arc::new(file);
        let mut generation = None;
        if !readonly && !device {
            match Generation::of(&file, observers.waker(), io_uring) {
                Ok(of_the_image) => generation = Some(Arc::new(of_the_image)),
                Err(e) => log::info!("{}: cannot store a generation mark ({e})", path.display()),
            }
        }
        let disk = Self {
            path: path.into(),
            file,
            direct,
            device,
            in_memory: !device && file_system == FileSystem::Memory,
            readonly,
            discard: discard && !readonly,
            io_uring,
            logical,
            physical: physical.max(logical),
            bytes: AtomicU64::new(0),
            observers,
            generation,
            logging: Logging::default(),
        };
        disk.observe_generation(|_| ());
        disk.measure()?;
        Ok(disk)
    }

    /// A disk of `bytes` without storage, as if it had been opened: its device can be restored from
    /// a saved state, and every request fails.
    ///
    /// # Errors
    /// When no descriptor is left.
    pub fn without_image(
        path: &Path,
        options: &OpenOptions,
        bytes: u64,
    ) -> Result<Self, DiskError> {
        let failed = |source| DiskError::NoDescriptor { path: path.into(), source };
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let file = eventfd(0, flags).map_err(|e| failed(e.into()))?;
        Ok(Self {
            path: path.into(),
            file: Arc::new(file.into()),
            direct: None,
            device: false,
            in_memory: false,
            readonly: options.readonly,
            discard: options.discard && !options.readonly,
            io_uring: false,
            logical: SECTOR as u32,
            physical: 4096,
            bytes: AtomicU64::new(bytes),
            observers: Observers::new().map_err(failed)?,
            generation: None,
            logging: Logging::default(),
        })
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that a guest can address: the size when last measured, in whole logical blocks.
    pub fn size(&self) -> u64 {
        self.bytes.load(Ordering::Acquire)
    }

    /// Refuse requests beyond `bytes` from here on, before [`Disk::resize`] truncates the image.
    ///
    /// # Errors
    /// [`DiskError::ReadOnly`].
    pub fn begin_resize(&self, bytes: u64) -> Result<(), DiskError> {
        if self.readonly {
            return Err(DiskError::ReadOnly { path: self.path.clone() });
        }
        if !self.device {
            self.bytes.fetch_min(bytes - bytes % u64::from(self.logical), Ordering::AcqRel);
        }
        Ok(())
    }

    /// From now on, `observer` is asked before each change and notified after it. It is not
    /// notified of those already under way, so this is best done while the guest is stopped.
    pub fn observe(&self, observer: Arc<dyn Observer>) {
        self.observers.add(&observer, || ());
    }

    /// Stop asking `observer`. It is still notified of the end of changes that it has allowed.
    pub fn unobserve(&self, observer: &dyn Observer) {
        self.observers.remove(observer);
    }

    /// The waker, for an observer that delays changes.
    pub fn waker(&self) -> Waker {
        self.observers.waker()
    }

    /// Fill `bytes` with the disk's contents from `offset` on, through the page cache. Waits for the
    /// storage.
    ///
    /// # Errors
    /// When they cannot all be read.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    /// Whether it is a block device of the host.
    pub fn is_device(&self) -> bool {
        self.device
    }

    /// The mark by which the image is recognised later, now that its machine is saved: the next
    /// change gives it another generation. `None` for a read-only disk and a block device. No
    /// request may be under way.
    pub fn mark(&self) -> Option<DiskMark> {
        if self.readonly || self.device {
            return None;
        }
        let generation = self.observe_generation(Generation::save);
        let found = self.file.metadata();
        let found = found.inspect_err(|e| log::warn!("{}: {e}", self.path.display())).ok()?;
        Some(DiskMark { generation, size: found.len(), mtime_ns: mark::mtime_ns(&found) })
    }

    /// Bytes of the whole image, including any that the guest cannot address.
    fn bytes_of_image(&self) -> io::Result<u64> {
        Ok(if self.device { self.size() } else { self.file.metadata()?.len() })
    }

    /// Start a spot check for the save `id`, of the disk's contents at this moment. `None` for a
    /// disk that is read-only or not a block device. No request may be under way.
    pub fn spot_check(&self, id: u128) -> Option<SpotCheck> {
        if self.readonly || !self.device {
            return None;
        }
        let file = self.direct.as_ref().map_or(&self.file, |direct| &direct.file);
        let check = SpotCheck::new(file, self.size(), id, self.waker());
        self.observe(check.observer());
        Some(check)
    }

    /// Check that the image is the one that `mark` was taken of, unchanged since then; for a
    /// `copy`, the time of its last change is ignored.
    ///
    /// # Errors
    /// [`DiskError::Changed`] when it is not, or when that cannot be determined.
    pub fn check_mark(&self, mark: &DiskMark, copy: bool) -> Result<(), DiskError> {
        let path = || self.path.clone();
        let failed = |source| DiskError::Size { path: path(), source };
        let found = DiskMark::of(&self.file).map_err(failed)?;
        let generation = found.generation;
        let what = match () {
            () if found.size != mark.size => {
                format!("it has {} bytes instead of {}", found.size, mark.size)
            }
            () if copy && mark.generation.is_none() => {
                "it is at another path, and the saved one could not be marked".to_owned()
            }
            () if copy && generation.is_none() => "it has no mark".to_owned(),
            () if mark.generation.is_some()
                && generation.is_some_and(|g| Some(g) != mark.generation) =>
            {
                "it has been changed since, or is another image".to_owned()
            }
            () if !copy && found.mtime_ns != mark.mtime_ns => {
                format!("it has been written since, when it was from {}", date(mark.mtime_ns))
            }
            () => return Ok(()),
        };
        Err(DiskError::Changed { path: path(), what, written: date(found.mtime_ns) })
    }

    /// Attach the image's generation as an observer before the next change, once `ready` has been
    /// called.
    fn observe_generation<T>(&self, ready: impl FnOnce(&Generation) -> T) -> Option<T> {
        let generation = self.generation.clone()?;
        let observer: Arc<dyn Observer> = generation.clone();
        Some(self.observers.add(&observer, || ready(&generation)))
    }

    /// Make the image `bytes` long; a block device is only measured again. This resizes the open
    /// image, even if its name now refers to another file. Returns the size that the guest is to
    /// see.
    ///
    /// # Errors
    /// [`DiskError::ReadOnly`], [`DiskError::Resize`], [`DiskError::Size`], [`DiskError::Stalled`];
    /// the size is then unchanged.
    pub fn resize(&self, bytes: u64) -> Result<u64, DiskError> {
        if self.readonly {
            return Err(DiskError::ReadOnly { path: self.path.clone() });
        }
        if !self.device {
            let resized = self.resize_image(bytes);
            let size = self.measure();
            return resized.and(size);
        }
        self.measure()
    }

    fn resize_image(&self, bytes: u64) -> Result<(), DiskError> {
        let permit = self.resize_permit(bytes)?;
        let result = self.file.set_len(bytes);
        permit.after(&result);
        result.map_err(|source| DiskError::Resize { path: self.path.clone(), bytes, source })
    }

    /// Ask the observers until none delays the resizing any more, but with a time limit.
    fn resize_permit(&self, bytes: u64) -> Result<Permit, DiskError> {
        let refused = |source| DiskError::Resize { path: self.path.clone(), bytes, source };
        let before = self.file.metadata().map_err(refused)?.len();
        let range = before.min(bytes)..before.max(bytes);
        let begin = Instant::now();
        loop {
            let change = || Change { kind: ChangeKind::Resize, range: range.clone() };
            if let Some(permit) = self.observers.before(change).map_err(refused)? {
                return Ok(permit);
            }
            if begin.elapsed() >= DISK_STALL_LIMIT {
                return Err(DiskError::Stalled { path: self.path.clone() });
            }
            // The worker, which waits on the same descriptor, may consume the wake-up.
            self.observers.wait(DISK_STALL_LIMIT / 100).map_err(refused)?;
        }
    }

    /// Measure the size again and return it.
    fn measure(&self) -> Result<u64, DiskError> {
        // A block device has no length in its metadata, but an end that can be sought. Nothing
        // else uses the position.
        let end = (&*self.file).seek(SeekFrom::End(0));
        let end = end.map_err(|source| DiskError::Size { path: self.path.clone(), source })?;
        let size = end - end % u64::from(self.logical);
        if size == 0 {
            log::warn!("{} is too small for a single block", self.path.display());
        } else if size != end {
            log::warn!(
                "{}: the last {} bytes are not a whole block; the guest does not see them",
                self.path.display(),
                end - size
            );
        }
        self.bytes.store(size, Ordering::Release);
        Ok(size)
    }

    /// Whether writes are refused.
    pub fn readonly(&self) -> bool {
        self.readonly
    }

    /// Whether discarded space is deallocated.
    pub fn discard(&self) -> bool {
        self.discard
    }

    /// Bytes of a block, the smallest unit that the medium reads or writes: 512 to 4096.
    pub fn logical_block(&self) -> u32 {
        self.logical
    }

    /// Release the lock, so that other machines can use the disk. This one must not use it until
    /// [`Disk::hold`].
    pub fn release(&self) {
        // If the lock cannot be released, it is kept.
        let _ = sys::lock(&self.file, Lock::Release);
    }

    /// The numbers of its file descriptors.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let direct = self.direct.iter().map(|direct| direct.file.as_raw_fd());
        std::iter::once(self.file.as_raw_fd()).chain(direct)
    }

    /// Take the lock, as [`Disk::open`] does.
    ///
    /// # Errors
    /// When another machine has it.
    pub fn hold(&self) -> Result<(), DiskError> {
        lock(&self.path, &self.file, self.readonly)
    }

    /// Bytes of a physical block, which the medium writes without reading it first.
    pub fn physical_block(&self) -> u32 {
        self.physical
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Closing is not enough while a child process between fork and exec has the descriptor,
        // too.
        self.release();
    }
}

/// A date for people, in UTC.
fn date(ns: i64) -> String {
    let Ok(at) = OffsetDateTime::from_unix_timestamp_nanos(ns.into()) else {
        return format!("{ns} ns");
    };
    let (hour, minute, second) = at.to_hms();
    format!("{}T{hour:02}:{minute:02}:{second:02}.{:09}Z", at.date(), at.nanosecond())
}
