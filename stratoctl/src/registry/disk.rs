//! Every change that the registry makes to the disk goes through [`Disk`], so that a test can stop
//! it between any two steps.
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink},
    path::Path,
};

use rustix::fs::OFlags;
use state::regular_file::open_regular;

/// The steps of which changes consist. Each is done completely or not at all, except for
/// [`Disk::write`].
pub trait Disk {
    /// Create a directory, mode 0700; an existing one is no error.
    fn mkdir(&self, path: &Path) -> io::Result<()>;
    /// Create a file of mode 0600 and write to it; an existing one is truncated first.
    fn write(&self, path: &Path, contents: &[u8]) -> io::Result<()>;
    /// Wait until a file's contents, or a directory's entries, are on the disk.
    fn sync(&self, path: &Path) -> io::Result<()>;
    /// Rename a file or directory; an existing one of the new name is replaced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Create a symbolic link to `target` at `path`.
    fn link(&self, target: &Path, path: &Path) -> io::Result<()>;
    /// Remove a file; a missing one is no error.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Remove a directory with all its contents; a missing one is no error.
    fn remove_tree(&self, path: &Path) -> io::Result<()>;
}

/// The host's disk.
#[derive(Debug, Clone, Copy)]
pub struct Real;

impl Disk for Real {
    fn mkdir(&self, path: &Path) -> io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(path)
    }

    fn write(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o600);
        open_regular(path, &mut options)?.write_all(contents)
    }

    fn sync(&self, path: &Path) -> io::Result<()> {
        // A file or a directory; opening a FIFO would block.
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        File::options().read(true).custom_flags(flags).open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn link(&self, target: &Path, path: &Path) -> io::Result<()> {
        symlink(target, path)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        unless_gone(fs::remove_file(path))
    }

    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        unless_gone(fs::remove_dir_all(path))
    }
}

fn unless_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Replace the file at `path` atomically: whenever the power fails, a reader finds either the old
/// contents or the new ones.
pub fn replace(disk: &dyn Disk, path: &Path, contents: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let written = disk
        .write(&new, contents)
        .and_then(|()| disk.sync(&new))
        .and_then(|()| disk.rename(&new, path));
    if written.is_err() {
        // The space may be needed: the disk may be full.
        let _ = disk.remove(&new);
    }
    written?;
    sync_parent(disk, path)
}

/// Make the creation, renaming or removal of `path` durable.
pub fn sync_parent(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |parent| disk.sync(parent))
}
