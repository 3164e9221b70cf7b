//! The path of the socket. Tests of the traffic are in `tests/server.rs`.
use std::{
    fs,
    os::unix::{
        fs::{FileTypeExt, MetadataExt, symlink},
        net::{UnixDatagram, UnixListener},
    },
    path::PathBuf,
    thread,
};

use mio::Poll;

use super::*;

fn bind(path: &Path) -> Result<Server, BindError> {
    let poll = Poll::new().unwrap();
    Server::bind(path, poll.registry(), Token(0))
}

fn refused(path: &Path) -> String {
    let Err(error) = bind(path) else { panic!("{} was bound", path.display()) };
    let cause = std::error::Error::source(&error).map(|e| format!(": {e}")).unwrap_or_default();
    format!("{error}{cause}")
}

#[test]
fn the_socket_is_private_and_goes_with_the_server() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let server = bind(&path).unwrap();
    let metadata = fs::metadata(&path).unwrap();
    assert!(metadata.file_type().is_socket());
    assert_eq!(metadata.mode() & 0o777, 0o600);
    drop(server);
    assert!(!path.exists());

    let server = bind(&path).unwrap();
    // Another program's file in its place must not be removed.
    fs::remove_file(&path).unwrap();
    fs::write(&path, "precious").unwrap();
    drop(Server::shutdown(vec![server], Duration::ZERO));
    assert_eq!(fs::read(&path).unwrap(), b"precious");
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "nothing is stale");
    let server = bind(&path).unwrap();
    let text = refused(&path);
    assert!(text.contains("is in use: another program listens there"), "{text}");
    assert!(text.contains(path.to_str().unwrap()));
    assert!(path.exists());
    drop(server);

    // Also if its queue is full, or it is of another type.
    let full = UnixListener::bind(&path).unwrap();
    rustix::net::listen(&full, 0).unwrap();
    let _waiting = std::os::unix::net::UnixStream::connect(&path).unwrap();
    assert!(refused(&path).contains("is in use"));
    drop(full);
    fs::remove_file(&path).unwrap();
    let _datagram = UnixDatagram::bind(&path).unwrap();
    assert!(refused(&path).contains("is in use"));
}

#[test]
fn what_is_not_a_socket_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    fs::write(at("file"), "precious").unwrap();
    fs::create_dir(at("directory")).unwrap();
    drop(UnixListener::bind(at("stale")).unwrap());
    symlink(at("stale"), at("link")).unwrap();
    symlink(at("nowhere"), at("dangling")).unwrap();
    for (name, kind) in [
        ("file", "a file is there"),
        ("directory", "a directory is there"),
        ("link", "a symbolic link is there"),
        ("dangling", "a symbolic link is there"),
    ] {
        let text = refused(&at(name));
        assert!(text.contains(kind) && text.contains("remove it or choose another path"), "{text}");
        assert!(fs::symlink_metadata(at(name)).is_ok());
    }
    assert_eq!(fs::read(at("file")).unwrap(), b"precious");
    assert!(refused(Path::new("/dev/null")).contains("a device is there"));
}

#[test]
fn a_path_that_cannot_be_is_refused_with_the_reason() {
    let directory = tempfile::tempdir().unwrap();
    let fill = 107 - directory.path().as_os_str().len() - 1;
    let longest = directory.path().join("x".repeat(fill));
    drop(bind(&longest).unwrap());
    assert!(
        refused(&directory.path().join("x".repeat(fill + 1))).contains("longer than 107 bytes")
    );
    assert!(refused(Path::new("")).contains("is empty"));
    assert!(refused(Path::new("a\0b")).contains("NUL byte"));
    let missing: PathBuf = directory.path().join("missing/s");
    assert!(refused(&missing).contains("No such file or directory"));
    fs::write(directory.path().join("file"), "").unwrap();
    assert!(refused(&directory.path().join("file/s")).contains("Not a directory"));
    // A directory in which not even root may create files.
    let text = refused(Path::new("/proc/self/s"));
    assert!(text.contains("cannot bind control socket '/proc/self/s': "), "{text}");
}

#[test]
fn of_many_that_start_at_once_over_a_stale_socket_one_wins() {
    // The time limit for monitors that wait for each other; a descheduled one may need more than
    // usual.
    let claim = |path: &Path| bind::claim_within(path, Duration::from_secs(60));
    let directory = tempfile::tempdir().unwrap();
    for round in 0..20 {
        let path = directory.path().join(format!("{round}"));
        drop(UnixListener::bind(&path).unwrap());
        let servers: Vec<_> = thread::scope(|scope| {
            let starts: Vec<_> = (0..4).map(|_| scope.spawn(|| claim(&path))).collect();
            starts.into_iter().map(|start| start.join().unwrap()).collect()
        });
        assert_eq!(servers.iter().filter(|server| server.is_ok()).count(), 1);
        // Clients connect to the winner.
        std::os::unix::net::UnixStream::connect(&path).unwrap();
    }
}
