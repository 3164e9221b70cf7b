//! The terminal that the guest's console is connected to: raw while the guest runs, and always
//! restored, whatever ends the process except SIGKILL.
use std::{io::IsTerminal, sync::OnceLock};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// The settings to restore. Process-wide, because the terminal is.
static BEFORE: OnceLock<Termios> = OnceLock::new();

/// Restores the terminal when dropped.
pub struct Raw(());

impl Raw {
    /// Make the terminal on standard input raw; `None` if standard input is no terminal.
    pub fn enter() -> Option<Self> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            return None;
        }
        let before = tcgetattr(&stdin).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        // Output stays cooked: the monitor's own log lines share the terminal with the guest.
        raw.output_modes = before.output_modes;
        tcsetattr(&stdin, OptionalActions::Now, &raw).ok()?;
        if BEFORE.set(before).is_ok() {
            let next = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                put_back();
                next(info);
            }));
        }
        Some(Self(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        put_back();
    }
}

pub(crate) fn put_back() {
    if let Some(before) = BEFORE.get() {
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
    }
}
