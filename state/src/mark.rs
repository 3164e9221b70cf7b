//! The mark of a disk image, by which a saved state recognises it, as read from the host.
use std::{
    ffi::CStr,
    fs::{File, Metadata},
    io,
    os::unix::fs::MetadataExt,
};

use rustix::io::Errno;

use crate::{device::Mark, hex::HexArray};

/// The extended attribute that holds an image's generation: 16 bytes, in network byte order.
pub const ATTRIBUTE: &CStr = c"user.stratovirt.generation";

impl Mark {
    /// The mark of `file`, which no machine has open.
    ///
    /// # Errors
    /// When the host does not report it.
    pub fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        // Where there are no extended attributes, no file has a generation.
        let generation = generation(file).ok().flatten().map(HexArray::from);
        Ok(Self { generation, size: found.len(), mtime_ns: mtime_ns(&found) })
    }
}

/// The generation in the attribute of `file`, if it has one.
///
/// # Errors
/// When the file system has no extended attributes, or the host does not report them.
pub fn generation(file: &File) -> io::Result<Option<u128>> {
    let mut value = [0; 17];
    match rustix::fs::fgetxattr(file, ATTRIBUTE, &mut value[..]) {
        Ok(16) => Ok(value.first_chunk().copied().map(u128::from_be_bytes)),
        // An attribute of another size was written by another program.
        Ok(_) | Err(Errno::NODATA | Errno::RANGE) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// The time of a file's last change, in nanoseconds since 1970, UTC.
pub fn mtime_ns(found: &Metadata) -> i64 {
    found.mtime().saturating_mul(1_000_000_000).saturating_add(found.mtime_nsec())
}
