//! Claiming the path of the control socket.
use std::{
    fs::{self, File, FileType, TryLockError},
    io,
    os::{
        fd::OwnedFd,
        unix::{
            ffi::OsStrExt,
            fs::{FileTypeExt, MetadataExt},
        },
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{Mode, fchmod},
    io::Errno,
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
    },
};

/// Longest path of a unix socket: `sun_path` less its NUL.
const MAX_PATH: usize = 107;

/// How long to wait for other monitors that check paths in the same directory.
const LOCK_TIMEOUT: Duration = Duration::from_secs(1);

/// Length of the kernel's queue of waiting connections.
const BACKLOG: i32 = 128;

/// Why the control socket could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The path is not valid for a socket.
    #[error("control socket path '{}' is {wrong}", path.display())]
    Path {
        /// The path.
        path: PathBuf,
        /// What is wrong with it.
        wrong: &'static str,
    },
    /// The path exists and is not a socket.
    #[error("control socket '{}' cannot be created: a {kind} is there; remove it or choose another path", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
        /// The type of the file there.
        kind: &'static str,
    },
    /// Another program listens there.
    #[error("control socket '{}' is in use: another program listens there", path.display())]
    Live {
        /// The path.
        path: PathBuf,
    },
    /// A socket to connect to refuses.
    #[error(
        "cannot connect to control socket '{}', as -qmp does without ,server,nowait; with them the monitor \
         listens there itself",
        path.display()
    )]
    Connect {
        /// The path.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
    /// The operating system refuses a step.
    #[error("cannot {action} control socket '{}'", path.display())]
    Os {
        /// What was tried.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The error.
        source: io::Error,
    },
}

/// The name of a socket that this process created; removed on drop.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode, to recognize another program's file in its place.
    identity: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let ours = |m: &fs::Metadata| (m.dev(), m.ino()) == self.identity;
        if fs::symlink_metadata(&self.path).is_ok_and(|m| ours(&m)) {
            // If the directory has become read-only, the name stays.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Listen at `path` with mode 0600. A socket without a listener is replaced; anything else is left
/// alone and refused.
pub fn claim(path: &Path) -> Result<(OwnedFd, SocketFile), BindError> {
    claim_within(path, LOCK_TIMEOUT)
}

pub(super) fn claim_within(
    path: &Path,
    timeout: Duration,
) -> Result<(OwnedFd, SocketFile), BindError> {
    check(path)?;
    let os = |action| move |e: Errno| BindError::Os { action, path: path.into(), source: e.into() };
    let address = SocketAddrUnix::new(path).map_err(os("name"))?;
    // Of two monitors that start at once, neither may take the other's new socket for a stale one.
    let _lock = lock_directory(path, timeout);
    make_room(path, &address)?;

    let socket = socket().map_err(os("create"))?;
    // Before bind, so that the file never has another mode.
    fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(os("set the mode of"))?;
    bind(&socket, &address).map_err(os("bind"))?;
    let metadata = fs::symlink_metadata(path).map_err(|source| BindError::Os {
        action: "look at",
        path: path.into(),
        source,
    })?;
    let file = SocketFile { path: path.into(), identity: (metadata.dev(), metadata.ino()) };
    listen(&socket, BACKLOG).map_err(os("listen on"))?;
    Ok((socket, file))
}

/// Connect to the program that listens at `path`.
pub(super) fn connected(path: &Path) -> Result<OwnedFd, BindError> {
    check(path)?;
    let failed = |e: Errno| BindError::Connect { path: path.into(), source: e.into() };
    let socket = socket().map_err(failed)?;
    connect(&socket, &SocketAddrUnix::new(path).map_err(failed)?).map_err(failed)?;
    Ok(socket)
}

fn check(path: &Path) -> Result<(), BindError> {
    let bytes = path.as_os_str().as_bytes();
    let wrong = match bytes {
        [] => "empty",
        _ if bytes.contains(&0) => "not a path: it contains a NUL byte",
        _ if bytes.len() > MAX_PATH => "longer than 107 bytes, the limit for a Unix socket",
        _ => return Ok(()),
    };
    Err(BindError::Path { path: path.into(), wrong })
}

/// Make sure that nothing exists at `path`.
fn make_room(path: &Path, address: &SocketAddrUnix) -> Result<(), BindError> {
    let os = |action, source| BindError::Os { action, path: path.into(), source };
    let kind = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(os("look at", e)),
    };
    if !kind.is_socket() {
        return Err(BindError::NotASocket { path: path.into(), kind: name(kind) });
    }
    let probe = socket().map_err(|e| os("create", e.into()))?;
    match connect(&probe, address) {
        Err(Errno::CONNREFUSED) => fs::remove_file(path).map_err(|e| os("remove the stale", e)),
        Err(Errno::NOENT) => Ok(()),
        // AGAIN: its queue of waiting clients is full. PROTOTYPE: it is of another type than ours.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(BindError::Live { path: path.into() }),
        Err(e) => Err(os("check for a listener on", e.into())),
    }
}

fn socket() -> rustix::io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
}

fn name(kind: FileType) -> &'static str {
    match () {
        () if kind.is_file() => "file",
        () if kind.is_dir() => "directory",
        () if kind.is_symlink() => "symbolic link",
        () if kind.is_fifo() => "named pipe",
        () => "device",
    }
}

/// A lock held while the path is checked and bound. Only monitors that start at the same moment
/// contend for it; one that cannot get it (unreadable directory, another program's lock) continues
/// without.
fn lock_directory(path: &Path, timeout: Duration) -> Option<File> {
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty());
    let directory = File::open(parent.unwrap_or(Path::new("."))).ok()?;
    let deadline = Instant::now() + timeout;
    loop {
        match directory.try_lock() {
            Ok(()) => return Some(directory),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(1));
            }
            Err(_) => return None,
        }
    }
}
