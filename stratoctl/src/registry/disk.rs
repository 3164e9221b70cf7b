//! Every change that the registry makes to the disk goes through [`Disk`], so that a test can stop
//! between any two of them.
use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt, symlink},
    path::Path,
};

use rustix::fs::OFlags;
use state::regular_file::open_regular;

/// The steps that changes are made of. Each is whole or has not happened, but for [`Disk::write`].
pub trait Disk {
    /// Make a directory, mode 0700; that it is there already is no error.
    fn mkdir(&self, path: &Path) -> io::Result<()>;
    /// Make a file of mode 0600 and write to it; one that is there is emptied first.
    fn write(&self, path: &Path, contents: &[u8]) -> io::Result<()>;
    /// Wait until a file's contents, or a directory's names, are on the disk.
    fn sync(&self, path: &Path) -> io::Result<()>;
    /// Give a file or directory another name, in place of what has that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Make a symbolic link to `target` at `path`.
    fn link(&self, target: &Path, path: &Path) -> io::Result<()>;
    /// Take a file away; that it is gone already is no error.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Take a directory away with all that is in it; that it is gone already is no error.
    fn remove_tree(&self, path: &Path) -> io::Result<()>;
}

/// The host's.
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
        // A file or a directory; opening a FIFO would wait.
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

/// Replace the file at `path`: whoever looks, whenever the power fails, finds the old contents or
/// the new ones.
pub fn replace(disk: &dyn Disk, path: &Path, contents: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    let written = disk
        .write(&new, contents)
        .and_then(|()| disk.sync(&new))
        .and_then(|()| disk.rename(&new, path));
    if written.is_err() {
        // A disk that is full has more use for the space.
        let _ = disk.remove(&new);
    }
    written?;
    sync_parent(disk, path)
}

/// Make what was renamed or removed at `path` last.
pub fn sync_parent(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |parent| disk.sync(parent))
}
