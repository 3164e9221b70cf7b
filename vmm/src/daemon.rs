//! `-daemonize`: the monitor goes on in the background once it can answer.
//!
//! The process starts itself again rather than forking, so that no half-initialised state is
//! shared. The first process waits until the second one can answer, prints what went wrong if it
//! cannot, and ends with its status. It does so before anything is read: a file that is read from a
//! pipe can be read once, by the one that needs it.
use std::{
    env,
    fs::OpenOptions,
    io::{self, Read, Write},
    os::unix::process::CommandExt,
    process::{Command, ExitCode, Stdio},
};

/// Set in the environment of the process that goes on.
pub(crate) const MARK: &str = "STRATOVIRT_DAEMON";

/// Which of the two processes this is.
pub enum Side {
    /// The one that was started: it only waits, and ends like this.
    Starter(ExitCode),
    /// The one that goes on.
    Daemon(Ready),
}

/// To be used once the monitor can answer; dropping it unused tells the starter of a failure.
pub struct Ready(());

/// Start the second process, or find that this is it.
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
        return Ok(Side::Starter(ExitCode::SUCCESS));
    }
    let status = child.wait()?;
    let code = status.code().and_then(|c| u8::try_from(c).ok()).unwrap_or(1);
    Ok(Side::Starter(ExitCode::from(code.max(1))))
}

impl Ready {
    /// Tell the starter that all is well, and let go of its terminal.
    ///
    /// # Errors
    /// When /dev/null cannot be opened.
    pub fn tell(self) -> io::Result<()> {
        let null = OpenOptions::new().read(true).write(true).open("/dev/null")?;
        let mut out = io::stdout();
        // A starter that has gone is told nothing, and that is no reason to end.
        let _ = out.write_all(b"ready").and_then(|()| out.flush());
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)?;
        Ok(())
    }
}
