//! The port's output on its way to the back-end.
use std::{io, sync::Arc};

use parking_lot::Mutex;

use crate::backend::char::CharSink;

/// Most bytes that are held.
const MOST: usize = 256;

/// The port's output. While someone holds it, it goes to the back-end line by line: a system call
/// for each byte, and a reader that wakes up for each, slow a guest down that writes much. Clones
/// share it.
///
/// The lock is needed because any vCPU may write. No thread blocks while holding it.
#[derive(Clone)]
pub struct Output(Arc<Mutex<State>>);

struct State {
    sink: CharSink,
    held: Vec<u8>,
    holders: u32,
}

impl Output {
    pub(super) fn new(sink: CharSink) -> Self {
        Self(Arc::new(Mutex::new(State { sink, held: Vec::new(), holders: 0 })))
    }

    /// Hold bytes until the end of their line, or until there are many. The caller has to call
    /// [`Output::pass_on`] from time to time, and [`Output::release`] once.
    pub fn hold(&self) {
        self.0.lock().holders += 1;
    }

    /// Pass on the bytes that are held now.
    pub fn pass_on(&self) {
        self.0.lock().pass_on();
    }

    /// Undo one [`Output::hold`], and pass on the bytes that are held now.
    pub fn release(&self) {
        let mut state = self.0.lock();
        state.holders = state.holders.saturating_sub(1);
        state.pass_on();
    }
}

impl State {
    fn pass_on(&mut self) {
        if !self.held.is_empty() {
            self.sink.send(&self.held);
            self.held.clear();
        }
    }
}

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock();
        state.held.extend_from_slice(bytes);
        if state.holders == 0 || bytes.contains(&b'\n') || state.held.len() >= MOST {
            state.pass_on();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
