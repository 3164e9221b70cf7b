//! A Unix socket that this process listens on.
use std::{
    fs::{self, Permissions},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::{
            fs::{FileTypeExt, MetadataExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};

use super::CharError;
use crate::log_limit::log_seldom;

/// The listening socket; dropping it removes its path.
pub(super) struct Listener {
    socket: UnixListener,
    path: PathBuf,
    /// Device and inode of the path, so that nobody else's is removed.
    identity: Option<(u64, u64)>,
}

impl Listener {
    pub fn bind(path: &Path) -> Result<Self, CharError> {
        make_way(path)?;
        let open = || {
            let socket = UnixListener::bind(path)?;
            let this = Self { socket, path: path.into(), identity: identity(path) };
            fs::set_permissions(path, Permissions::from_mode(0o600))?;
            this.socket.set_nonblocking(true)?;
            Ok(this)
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

impl Drop for Listener {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            // Somebody was faster: gone is gone.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

/// Remove a socket that nobody listens on any more; refuse anything else that is in the way.
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
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let probe = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
        .map_err(|e| failed(e.into()))?;
    match connect(&probe, &address) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(failed),
        _ => Err(CharError::InUse { path: path.into() }),
    }
}
