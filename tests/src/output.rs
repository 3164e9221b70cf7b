//! One output of a process, collected as it arrives.
use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

/// How an output is shown while it is collected.
#[derive(Debug, Clone, Copy)]
pub enum Show {
    /// On standard output, as it arrives.
    AsItIs,
    /// Line by line, without the ends of the lines.
    Lines(fn(&str)),
}

/// What has arrived so far.
#[derive(Default)]
pub struct Output {
    text: Mutex<Text>,
    changed: Condvar,
}

#[derive(Default)]
struct Text {
    shown: String,
    ended: bool,
}

impl Output {
    /// Collects from `source` and shows the output at once, before a waiting thread is woken.
    pub fn of(mut source: impl Read + Send + 'static, show: Show) -> Arc<Self> {
        let output = Arc::new(Self::default());
        let collected = Arc::clone(&output);
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            let mut line = String::new();
            while let Ok(length @ 1..) = source.read(&mut buffer) {
                let bytes = buffer.get(..length).unwrap_or_default();
                let text = String::from_utf8_lossy(bytes);
                match show {
                    // With print!, so that a test harness can capture it. Standard output may be
                    // closed.
                    Show::AsItIs => {
                        print!("{text}");
                        let _ = io::stdout().flush();
                    }
                    Show::Lines(show) => {
                        line.push_str(&text);
                        while let Some((whole, rest)) = line.split_once('\n') {
                            show(whole.trim_end_matches('\r'));
                            line = rest.to_owned();
                        }
                    }
                }
                collected.lock().shown.push_str(&text);
                collected.changed.notify_all();
            }
            collected.lock().ended = true;
            collected.changed.notify_all();
        });
        output
    }

    fn lock(&self) -> MutexGuard<'_, Text> {
        self.text.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All output so far.
    pub fn text(&self) -> String {
        self.lock().shown.clone()
    }

    /// How many bytes have arrived.
    pub fn length(&self) -> usize {
        self.lock().shown.len()
    }

    /// All output, once it has ended.
    ///
    /// # Errors
    /// A process holds it open for longer than `limit`.
    pub fn to_its_end(&self, limit: Duration) -> Result<String> {
        let wait = self.changed.wait_timeout_while(self.lock(), limit, |text| !text.ended);
        let (text, waited) = wait.unwrap_or_else(PoisonError::into_inner);
        ensure!(!waited.timed_out(), "its output is still open");
        Ok(text.shown.clone())
    }

    /// Waits for `text` after `from`; returns the output up to the end of `text`, and that
    /// position.
    ///
    /// # Errors
    /// It does not come within `limit`, or the output ends.
    pub fn wait_for(&self, text: &str, from: usize, limit: Duration) -> Result<(String, usize)> {
        let deadline = Instant::now() + limit;
        let mut output = self.lock();
        loop {
            let new = output.shown.get(from..).unwrap_or_default();
            if let Some(at) = new.find(text) {
                let end = at + text.len();
                return Ok((new.get(..end).unwrap_or_default().to_owned(), from + end));
            }
            ensure!(!output.ended, "it ended before it showed '{text}'");
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(!left.is_zero(), "it did not show '{text}' within {limit:?}");
            output =
                self.changed.wait_timeout(output, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
