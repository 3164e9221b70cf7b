//! Runs other programs, which may hang, for a limited time.
use std::{
    io::{self, Read},
    os::{fd::AsFd, unix::process::CommandExt},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::{Errno, ioctl_fionbio},
    process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open},
};

use super::Unknown;

/// Most bytes that are kept of each stream; the rest is read and dropped.
const MAX_OUTPUT: usize = 64 << 10;
/// How long a program that was killed may take to end: one that waits for storage cannot.
const KILL_LIMIT: Duration = Duration::from_millis(200);

/// What a program has left.
#[derive(Debug)]
pub struct Done {
    /// Its exit status; `None` if a signal has ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

impl Done {
    /// What it has said about a failure, on one line of at most 200 characters.
    pub fn complaint(&self) -> String {
        let text = if self.err.trim().is_empty() { &self.out } else { &self.err };
        let words: Vec<_> = text.split_whitespace().collect();
        words.join(" ").chars().filter(|c| !c.is_control()).take(200).collect()
    }
}

/// Run `command`, with nothing to read, for `limit` at most. Then it is killed with its
/// descendants; if that takes long, too, they are left behind.
///
/// # Errors
/// It cannot be started, or has not ended in time.
pub fn run(command: &mut Command, limit: Duration) -> Result<Done, Unknown> {
    let name = command.get_program().to_string_lossy().into_owned();
    let cannot = |e: io::Error| Unknown::new(format!("cannot run {name}: {e}"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // A group of its own, so that its descendants end with it.
    let mut child = command.process_group(0).spawn().map_err(cannot)?;
    let done = watch(&mut child, Instant::now() + limit).map_err(cannot)?;
    done.ok_or_else(|| Unknown::new(format!("{name} has not ended within {limit:?}")))
}

/// What `child` leaves; `None`, and it is killed, if it has not ended by `deadline`.
fn watch(child: &mut Child, deadline: Instant) -> io::Result<Option<Done>> {
    let pid = Pid::from_child(child);
    let end = pidfd_open(pid, PidfdFlags::empty())?;
    let mut out = Stream::new(child.stdout.take())?;
    let mut err = Stream::new(child.stderr.take())?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // Also when it has ended: then for what is there already. A descendant that has inherited
        // its output may never close it.
        let ended = wait(&[end.as_fd()], Duration::ZERO)?;
        out.read()?;
        err.read()?;
        if ended {
            let code = child.wait()?.code();
            return Ok(Some(Done { code, out: out.text(), err: err.text() }));
        }
        if left.is_zero() {
            let _ = kill_process_group(pid, Signal::KILL);
            if wait(&[end.as_fd()], KILL_LIMIT)? {
                child.wait()?;
            }
            return Ok(None);
        }
        let open = [out.open.as_ref().map(AsFd::as_fd), err.open.as_ref().map(AsFd::as_fd)];
        let mut fds: Vec<_> = open.into_iter().flatten().collect();
        fds.push(end.as_fd());
        wait(&fds, left)?;
    }
}

/// One end of a pipe, and what was read from it.
struct Stream<R> {
    open: Option<R>,
    bytes: Vec<u8>,
}

impl<R: Read + AsFd> Stream<R> {
    fn new(open: Option<R>) -> io::Result<Self> {
        if let Some(open) = &open {
            ioctl_fionbio(open, true)?;
        }
        Ok(Self { open, bytes: Vec::new() })
    }

    /// Read what is there.
    fn read(&mut self) -> io::Result<()> {
        let mut chunk = [0; 4096];
        while let Some(open) = &mut self.open {
            match open.read(&mut chunk) {
                Ok(0) => self.open = None,
                Ok(length) => {
                    let room = MAX_OUTPUT.saturating_sub(self.bytes.len()).min(length);
                    self.bytes.extend_from_slice(chunk.get(..room).unwrap_or_default());
                    if room == 0 {
                        // Enough: what never stops must not keep its reader busy.
                        self.open = None;
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}

/// Wait for `limit` until one of `fds` is readable or has ended; false if none is.
///
/// # Errors
/// When the kernel cannot wait.
pub fn wait(fds: &[impl AsFd], limit: Duration) -> io::Result<bool> {
    let mut fds: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
    match poll(&mut fds, Some(&limit)) {
        Err(Errno::INTR) => Ok(false),
        ready => Ok(ready? > 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, limit: Duration) -> Result<Done, Unknown> {
        run(Command::new("sh").args(["-c", script]), limit)
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn output_and_status_are_kept() {
        let done = shell("echo out; echo ' err\n or' >&2; exit 7", LONG).unwrap();
        assert_eq!((done.code, done.out.as_str()), (Some(7), "out\n"));
        assert_eq!(done.complaint(), "err or");
        assert_eq!(shell("kill -9 $$", LONG).unwrap().code, None);
        let said = run(&mut Command::new("/no/such/program"), LONG).unwrap_err().to_string();
        assert!(said.contains("cannot run /no/such/program"), "{said}");
    }

    #[test]
    fn endless_output_is_not_kept() {
        let done = shell("head -c 1000000 /dev/zero", LONG).unwrap();
        assert_eq!(done.out.len(), MAX_OUTPUT);
    }

    #[test]
    fn nothing_is_waited_for_beyond_the_limit() {
        // With a descendant that ignores signals and keeps the output open.
        let script = "trap '' TERM; sleep 1000 & sleep 1000";
        let begin = Instant::now();
        let said = shell(script, Duration::from_millis(50)).unwrap_err().to_string();
        assert!(said.contains("sh has not ended within 50ms"), "{said}");
        assert!(begin.elapsed() < LONG);
        // The output of a descendant that lives on is not waited for either.
        let begin = Instant::now();
        assert_eq!(shell("sleep 120 & echo over", LONG).unwrap().out, "over\n");
        assert!(begin.elapsed() < LONG);
    }
}
