//! The mark of a disk's image: what a saved state knows it by, as the host tells it.
use std::{
    ffi::CStr,
    fs::{File, Metadata},
    io,
    os::unix::fs::MetadataExt,
};

use rustix::io::Errno;

use crate::{device::Mark, hex::HexArray};

/// The extended attribute that an image's generation is in: 16 bytes, in network byte order.
pub const ATTRIBUTE: &CStr = c"user.stratovirt.generation";

impl Mark {
    /// That of `file`, which no machine has open.
    ///
    /// # Errors
    /// When the host does not tell.
    pub fn of(file: &File) -> io::Result<Self> {
        let found = file.metadata()?;
        // Where there are no attributes, no file has a generation.
        let generation = generation(file).ok().flatten().map(HexArray::from);
        Ok(Self { generation, size: found.len(), mtime_ns: mtime_ns(&found) })
    }
}

/// The generation that the attribute of `file` says, if it has one.
///
/// # Errors
/// When the file system keeps no attributes, or the host does not tell.
pub fn generation(file: &File) -> io::Result<Option<u128>> {
    let mut value = [0; 17];
    match rustix::fs::fgetxattr(file, ATTRIBUTE, &mut value[..]) {
        Ok(16) => Ok(value.first_chunk().copied().map(u128::from_be_bytes)),
        // Another program's.
        Ok(_) | Err(Errno::NODATA | Errno::RANGE) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// The last change of a file, in nanoseconds since 1970, UTC.
pub fn mtime_ns(found: &Metadata) -> i64 {
    found.mtime().saturating_mul(1_000_000_000).saturating_add(found.mtime_nsec())
}
