//! Files that are written by a thread of their own, because the storage of a file can hang without
//! any warning: neither poll nor O_NONBLOCK works for regular files.
//!
//! ```text
//!   any thread --never waits--> pipe (bounded) --> writer's thread --may hang--> file
//! ```
use std::{
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc,
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread,
    time::Duration,
};

use crate::threads::{ThreadKind, ThreadStart};
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{OFlags, fcntl_setfl},
    io::{Errno, read},
    pipe::{PipeFlags, fcntl_setpipe_size, pipe_with},
};

/// Bytes queued for the file; the caller keeps or drops any more.
const PIPE: usize = 256 << 10;

/// The write end of the pipe to the file; it never waits. When it is dropped, the thread writes
/// what is left in the pipe and ends.
pub struct Writer {
    input: OwnedFd,
    output: Arc<OwnedFd>,
    /// Disconnects when everything is written.
    done: Receiver<()>,
}

impl Writer {
    /// Start a thread called `name` that writes to `file`, with the first step that `start` gives
    /// it. On that thread, `failed` is called when a write fails, with the cause and the number of
    /// bytes lost.
    ///
    /// # Errors
    /// When the host has no thread or descriptor left.
    pub fn spawn(
        name: &str,
        file: File,
        start: &ThreadStart,
        mut failed: impl FnMut(&io::Error, usize) + Send + 'static,
    ) -> io::Result<Self> {
        let (output, input) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // The host may allow less: the pipe is smaller then.
        let _ = fcntl_setpipe_size(&input, PIPE);
        fcntl_setfl(&input, OFlags::NONBLOCK)?;
        let output = Arc::new(output);
        let (alive, done) = channel();
        let from = output.clone();
        let first_step = start.first_step(ThreadKind::Writer, name);
        thread::Builder::new().name(name.into()).stack_size(64 << 10).spawn(move || {
            let _alive = alive;
            if first_step().is_err() {
                return;
            }
            let mut buffer = [0; 8192];
            while let Some(length @ 1..) = next(&from, &mut buffer) {
                let bytes = buffer.get(..length).unwrap_or_default();
                if let Err(e) = { &file }.write_all(bytes) {
                    failed(&e, length);
                }
            }
        })?;
        Ok(Self { input, output, done })
    }

    /// The read end of the pipe, for a process that is exiting and writes the rest itself. Never
    /// waits.
    pub fn rest(&self) -> Arc<OwnedFd> {
        self.output.clone()
    }

    /// Wait until everything is written; false when that takes longer than `patience`.
    pub fn finish(self, patience: Duration) -> bool {
        drop(self.input);
        self.done.recv_timeout(patience) == Err(RecvTimeoutError::Disconnected)
    }
}

impl AsFd for Writer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.input.as_fd()
    }
}

/// Wait for the next bytes; returns how many there are, 0 at the end.
fn next(from: &OwnedFd, buffer: &mut [u8]) -> Option<usize> {
    loop {
        match read(from, &mut *buffer) {
            Err(Errno::AGAIN) => match poll(&mut [PollFd::new(from, PollFlags::IN)], None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return None,
            },
            Err(Errno::INTR) => {}
            other => return other.ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(60);

    /// A file that hangs: the write end of a full pipe.
    fn hanging() -> (File, File) {
        let (reader, writer) = io::pipe().unwrap();
        (File::from(OwnedFd::from(reader)), File::from(OwnedFd::from(writer)))
    }

    #[test]
    fn all_arrives_in_order_before_the_end() {
        let mut file = tempfile();
        let writer =
            Writer::spawn("test", file.try_clone().unwrap(), &ThreadStart::default(), |_, _| ())
                .unwrap();
        let lines: Vec<u8> = (0..5000).flat_map(|n| format!("{n}\n").into_bytes()).collect();
        assert_eq!(rustix::io::write(&writer, &lines), Ok(lines.len()));
        assert!(writer.finish(SOON));
        let mut found = Vec::new();
        io::Seek::rewind(&mut file).unwrap();
        io::Read::read_to_end(&mut file, &mut found).unwrap();
        assert!(found == lines);
    }

    #[test]
    fn a_file_that_hangs_holds_only_its_thread() {
        let (mut reader, file) = hanging();
        let writer = Writer::spawn("test", file, &ThreadStart::default(), |_, _| ()).unwrap();
        let mut written = 0;
        // What exceeds the pipes is refused at once.
        while let Ok(n) = rustix::io::write(&writer, &[7; 4096]) {
            written += n;
        }
        assert!(written >= 64 << 10, "{written} bytes have room");
        assert!(!writer.finish(Duration::ZERO), "nothing has been read");
        let mut found = Vec::new();
        io::Read::read_to_end(&mut reader, &mut found).unwrap();
        assert_eq!(found.len(), written);
    }

    #[test]
    fn what_the_file_does_not_take_is_told() {
        let (sender, failures) = channel();
        let full = File::options().write(true).open("/dev/full").unwrap();
        let failed = move |e: &io::Error, n| sender.send((e.kind(), n)).unwrap();
        let writer = Writer::spawn("test", full, &ThreadStart::default(), failed).unwrap();
        rustix::io::write(&writer, b"lost").unwrap();
        assert_eq!(failures.recv_timeout(SOON), Ok((io::ErrorKind::StorageFull, 4)));
        assert!(writer.finish(SOON));
    }

    fn tempfile() -> File {
        let path = vmm_sys_util::tempfile::TempFile::new().unwrap();
        path.into_file()
    }
}
