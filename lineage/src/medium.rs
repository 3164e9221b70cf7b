//! What the journal and the images are written to: files, and in tests a medium whose power can be
//! cut.
use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::unix::fs::FileExt,
};

use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

/// Where a journal is.
pub trait Medium {
    /// Fill `bytes` from `offset`.
    ///
    /// # Errors
    /// When they cannot all be read.
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;
    /// Write all of `bytes` at `offset`, not durably.
    ///
    /// # Errors
    /// When they may not all be written.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()>;
    /// Make everything written durable.
    ///
    /// # Errors
    /// When it may not be durable. Repeating it proves nothing: the kernel may have dropped what it
    /// could not write.
    fn sync(&self) -> io::Result<()>;
}

/// The backup's copy of a disk.
pub trait Image: Medium {
    /// Its length in bytes.
    ///
    /// # Errors
    /// When it is not known.
    fn size(&self) -> io::Result<u64>;
    /// Let `length` bytes read as zeroes, not durably. Their blocks stay allocated, so that later
    /// writes find room.
    ///
    /// # Errors
    /// When some may not be zero.
    fn zero(&self, offset: u64, length: u64) -> io::Result<()>;
}

impl Medium for File {
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(bytes, offset)
    }

    fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

impl Image for File {
    fn size(&self) -> io::Result<u64> {
        // Unlike the length in its metadata, also right for a block device.
        let mut file = self;
        file.seek(SeekFrom::End(0))
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        if length == 0 {
            return Ok(());
        }
        let mode = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        match fallocate(self, mode, offset, length) {
            Ok(()) => return Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
            Err(e) => return Err(e.into()),
        }
        let end = offset.saturating_add(length);
        let mut at = offset;
        while at < end {
            let step = (end - at).min(ZEROES.len() as u64);
            let zeroes = usize::try_from(step).ok().and_then(|n| ZEROES.get(..n));
            self.write_all_at(zeroes.unwrap_or_default(), at)?;
            at += step;
        }
        Ok(())
    }
}
