//! A file system in a file that can be frozen: every write to it then waits, as with storage that
//! hangs. The kernel cannot end a process that waits for it.
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

use anyhow::Result;

use crate::archive::make_ext4;
use crate::debian::{Debian, output};
use crate::paths::Paths;

/// Bytes of the file system.
const SIZE: u64 = 8 << 20;

/// Makes an empty file system in `image`, to be mounted through a loop device.
///
/// # Errors
/// The file cannot be written.
pub fn make_file_system(paths: &Paths, image: &Path) -> Result<()> {
    let lock = paths.lock()?;
    let debian = Debian::get(paths)?;
    drop(lock);
    make_ext4(&debian, image, SIZE, None)
}

/// A frozen file system; thawed when dropped, as it could not be unmounted otherwise. Accessed
/// through a descriptor, because the monitor's mount namespace disappears when the monitor is
/// killed, even while the kernel cannot end the process yet.
pub struct Frozen(File);

impl Frozen {
    /// Freezes the file system that process `pid` sees at `place`.
    ///
    /// # Errors
    /// It cannot be frozen: this needs root.
    pub fn new(pid: u32, place: &str) -> Result<Self> {
        let frozen = Self(File::open(format!("/proc/{pid}/root{place}"))?);
        output(&mut frozen.fsfreeze("-f"))?;
        Ok(frozen)
    }

    /// Thaws it.
    ///
    /// # Errors
    /// It is not frozen.
    pub fn thaw(self) -> Result<()> {
        output(&mut self.fsfreeze("-u")).map(drop)
    }

    fn fsfreeze(&self, how: &str) -> Command {
        let mut command = Command::new("fsfreeze");
        let place = format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd());
        command.args([how, &place]);
        command
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // An error means that it is thawed already.
        let _ = self.fsfreeze("-u").output();
    }
}
