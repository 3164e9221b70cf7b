//! A Unix socket that this process listens on.
use std::{
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            fs::{FileTypeExt, MetadataExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    fs::{Mode, fchmod},
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
    },
};

use super::CharError;
use crate::log_limit::log_seldom;

/// The listen backlog: connections that wait while one is served.
const BACKLOG: i32 = 128;

/// The listening socket.
pub(super) struct Listener {
    socket: UnixListener,
    path: PathBuf,
}

/// The socket's name in the file system; dropping it removes it.
pub(super) struct SocketName {
    path: PathBuf,
    /// Device and inode of the path, so that another process's socket is not removed.
    identity: Option<(u64, u64)>,
}

impl Listener {
    /// Listen at `path`, with mode 0600 from the first moment on.
    pub fn bind(path: &Path) -> Result<(Self, SocketName), CharError> {
        make_way(path)?;
        let open = || {
            let address = SocketAddrUnix::new(path)?;
            let socket = unix_socket()?;
            // Before bind, so that the file never has another mode.
            fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            bind(&socket, &address)?;
            let name = SocketName { path: path.into(), identity: identity(path) };
            listen(&socket, BACKLOG)?;
            Ok((Self { socket: socket.into(), path: path.into() }, name))
        };
        open().map_err(CharError::open(path.display().to_string()))
    }

    /// The next connection, non-blocking, if one waits.
    pub fn accept(&self) -> Option<UnixStream> {
        match self.socket.accept() {
            Ok((stream, _)) => stream.set_nonblocking(true).is_ok().then_some(stream),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => None,
            Err(error) => {
                log_seldom!(warn, "{}: cannot accept: {error}", self.path.display());
                None
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for SocketName {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // Another process may have removed it already.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

/// Remove a socket that no process listens on any more; refuse anything else that is in the way.
fn make_way(path: &Path) -> Result<(), CharError> {
    let failed = |error: io::Error| CharError::open(path.display().to_string())(error);
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
        Ok(found) if !found.file_type().is_socket() => {
            return Err(CharError::NotASocket { path: path.into() });
        }
        Ok(_) => {}
    }
    let address = SocketAddrUnix::new(path).map_err(|e| failed(e.into()))?;
    let probe = unix_socket().map_err(|e| failed(e.into()))?;
    match connect(&probe, &address) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(failed),
        _ => Err(CharError::InUse { path: path.into() }),
    }
}

fn unix_socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}
