//! Opening images and locking them.
use std::{
    fs::{File, Metadata},
    io,
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::Path,
    sync::Arc,
};

use super::{
    Direct, DiskError, holder,
    sys::{self, Lock},
};

pub(super) fn open(path: &Path, readonly: bool, flags: i32) -> io::Result<File> {
    // O_NONBLOCK in case it has become a FIFO since it was checked.
    let file = File::options()
        .read(true)
        .write(!readonly)
        .custom_flags(libc::O_NONBLOCK | flags)
        .open(path)?;
    // io_uring would fail requests instead of waiting.
    sys::clear_nonblock(&file)?;
    Ok(file)
}

pub(super) fn open_direct(
    path: &Path,
    readonly: bool,
    buffered: &File,
) -> Result<Direct, DiskError> {
    let file =
        open(path, readonly, libc::O_DIRECT).map_err(|source| match source.raw_os_error() {
            Some(libc::EINVAL) => DiskError::NoDirect { path: path.into(), source },
            _ => open_error(path, readonly, source),
        })?;
    let (memory_align, offset_align) = sys::direct_alignment(buffered);
    let file = Arc::new(file);
    Ok(Direct { file, memory_align, offset_align })
}

pub(super) fn open_error(path: &Path, readonly: bool, source: io::Error) -> DiskError {
    let path = path.into();
    match source.kind() {
        io::ErrorKind::NotFound => DiskError::Missing { path, source },
        _ => {
            let purpose = if readonly {
                "reading"
            } else {
                "writing (readonly=on opens it for \
                                                            reading)"
            };
            DiskError::Open { path, purpose, source }
        }
    }
}

pub(super) fn check_kind(path: &Path, found: &Metadata) -> Result<(), DiskError> {
    let found = found.file_type();
    let kind = match () {
        () if found.is_file() || found.is_block_device() => return Ok(()),
        () if found.is_dir() => "a directory",
        () if found.is_fifo() => "a FIFO",
        () if found.is_socket() => "a socket",
        () if found.is_char_device() => "a character device",
        () => "something unknown",
    };
    Err(DiskError::NotADisk { path: path.into(), kind })
}

/// Lock the file for one writer or any number of readers. The lock belongs to the open file, so it
/// is released with it, however the process ends.
pub(super) fn lock(path: &Path, file: &File, readonly: bool) -> Result<(), DiskError> {
    match sys::lock(file, if readonly { Lock::Shared } else { Lock::Exclusive }) {
        Ok(()) => Ok(()),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
            Err(DiskError::InUse { path: path.into(), holder: holder::of(file) })
        }
        Err(e) => {
            log::warn!(
                "{}: the file system has no locks ({e}); do not share the \
                        image",
                path.display()
            );
            Ok(())
        }
    }
}
