//! Connections to the sockets of a domain's consoles.
use std::{
    fs::File,
    io,
    os::{
        fd::AsRawFd,
        unix::{fs::OpenOptionsExt, net::UnixStream},
    },
    path::Path,
};

use rustix::{
    fs::OFlags,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};

/// Connect to the socket `path`; a relative one is relative to `run`. Never blocks: if the
/// listener's queue is full, that is an error at once.
///
/// # Errors
/// When no process listens there.
pub fn dial(run: &Path, path: &Path) -> io::Result<UnixStream> {
    let whole = run.join(path);
    let (Some(directory), Some(name)) = (whole.parent(), whole.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    // A socket's path has at most 107 bytes; a directory's may have more. Opening a FIFO would
    // block.
    let flags = (OFlags::DIRECTORY | OFlags::PATH).bits().cast_signed();
    let directory = File::options().read(true).custom_flags(flags).open(directory)?;
    let short = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name);
    let address = SocketAddrUnix::new(short)?;
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &address)?;
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false)?;
    Ok(stream)
}
