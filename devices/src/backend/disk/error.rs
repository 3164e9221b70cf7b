//! Why disks cannot be used, and what to do about it.
use std::{io, path::PathBuf};

/// Why a disk cannot be used.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "shown by the messages")]
pub enum DiskError {
    #[error("{path} does not exist; make an empty image with: truncate -s 1G {path}", path = path.display())]
    Missing { path: PathBuf, source: io::Error },
    #[error("cannot open {path} for {purpose}", path = path.display())]
    Open { path: PathBuf, purpose: &'static str, source: io::Error },
    #[error("{path} is {kind}; a disk is a regular file or a block device", path = path.display())]
    NotADisk { path: PathBuf, kind: &'static str },
    #[error(
        "{path} is a {format} image, but disks must be raw; convert it with: qemu-img convert -f \
         {qemu_name} -O raw {path} {path}.raw; or, if it is a raw disk that only looks like one, \
         confirm with format=raw (\"driver\": \"raw\" in blockdev-add)",
        path = path.display()
    )]
    Format { path: PathBuf, format: &'static str, qemu_name: &'static str },
    #[error(
        "{path} is in use by another machine ({}); stop that one, \
         or open the image with readonly=on in both",
        holder.map_or("lslocks shows which".to_owned(), |pid| format!("process {pid}")),
        path = path.display()
    )]
    InUse { path: PathBuf, holder: Option<u32> },
    #[error("the file system of {path} does not support O_DIRECT; use \
             direct=off", path = path.display())]
    NoDirect { path: PathBuf, source: io::Error },
    #[error(
        "the host refuses io_uring (sysctl kernel.io_uring_disabled, or a seccomp filter); \
         use aio=off for {path}",
        path = path.display()
    )]
    NoIoUring { path: PathBuf, source: io::Error },
    #[error("cannot determine the size of {path}", path = path.display())]
    Size { path: PathBuf, source: io::Error },
    #[error("{path} was opened with readonly=on: it cannot be resized", path = path.display())]
    ReadOnly { path: PathBuf },
    #[error("cannot resize {path} to {bytes} bytes", path = path.display())]
    Resize { path: PathBuf, bytes: u64, source: io::Error },
    #[error(
        "{path} cannot be resized now: its storage has not answered for a second; try again when \
         it does",
        path = path.display()
    )]
    Stalled { path: PathBuf },
    #[error(
        "{path} has changed since its machine was saved: {what} (its last change was at \
         {written}). With old memory and a newer disk, the guest would corrupt its file system. \
         Restore the save that was made last; or give the copy of the image that belongs to this \
         save with -drive id=ID,file=COPY (cp --preserve=xattr keeps its mark); or, if this is the \
         right one nevertheless, confirm with --force (-incoming ...,force=on)",
        path = path.display()
    )]
    Changed { path: PathBuf, what: String, written: String },
    #[error(
        "{path} has changed since its machine was saved: its first or last MiB, or one of 64 \
         blocks in between, differs. This was a spot check, as a block device has no mark: the \
         rest may differ, too. With old memory and a newer disk, the guest would corrupt its file \
         system. Restore the save that was made last; or give a copy of the device that belongs to \
         this save with -drive id=ID,file=COPY; or, if this is the right one nevertheless, confirm \
         with --force (-incoming ...,force=on)",
        path = path.display()
    )]
    SpotCheck { path: PathBuf },
    /// It belongs to a guest that is protected on two hosts.
    #[error("{0}")]
    Replicated(String),
    #[error("out of file descriptors for {path}", path = path.display())]
    NoDescriptor { path: PathBuf, source: io::Error },
}
