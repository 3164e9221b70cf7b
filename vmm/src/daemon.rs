//! `-daemonize`: the monitor continues in the background once it can serve clients.
//!
//! The process starts its program again rather than forking, so that no half-initialised state is
//! shared. The first process waits until the second one can serve clients; if it cannot, the first
//! one prints the error and exits with its status. The split comes before anything is read: a file
//! that comes from a pipe can be read only once, by the process that needs it.
use std::{
    env,
    fs::OpenOptions,
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    process::{Command, Stdio},
};

/// Set in the environment of the background process.
pub(crate) const MARK: &str = "STRATOVIRT_DAEMON";

/// Which of the two processes this is.
pub enum Side {
    /// The process that was started: it only waits, and exits with this status.
    Starter(u8),
    /// The process that continues in the background.
    Daemon(Ready),
}

/// To be used once the monitor can serve clients; dropping it unused reports a failure to the
/// starter.
pub struct Ready(());

/// Start the second process, or find that this process is the second one.
///
/// # Errors
/// When the host refuses the process.
pub fn split() -> io::Result<Side> {
    if env::var_os(MARK).is_some() {
        rustix::process::setsid()?;
        return Ok(Side::Daemon(Ready(())));
    }
    let mut args = env::args_os();
    let name = args.next().unwrap_or_else(|| "stratovirt".into());
    let mut child = Command::new("/proc/self/exe")
        .arg0(name)
        .args(args)
        .env(MARK, "1")
        .stdout(Stdio::piped())
        .spawn()?;
    let mut word = Vec::new();
    if let Some(stdout) = child.stdout.as_mut() {
        stdout.read_to_end(&mut word)?;
    }
    if word == b"ready" {
        return Ok(Side::Starter(0));
    }
    let status = child.wait()?;
    let code = status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(1);
    Ok(Side::Starter(code.max(1)))
}

impl Ready {
    /// Report success to the starter, and let go of its terminal.
    ///
    /// # Errors
    /// When /dev/null cannot be opened.
    pub fn tell(self) -> io::Result<()> {
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        let mut out = io::stdout();
        // The starter may have gone; that is no reason to end.
        let _ = out.write_all(b"ready").and_then(|()| out.flush());
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)?;
        Ok(())
    }
}
