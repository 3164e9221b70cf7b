//! Shows the progress of long steps: a spinner or a bar, then one line with the time that it took.
use std::time::Duration;

use indicatif::{HumanDuration, ProgressBar, ProgressStyle};

/// A step in progress.
pub struct Step {
    bar: ProgressBar,
    what: String,
}

impl Step {
    /// A step whose length is not known.
    #[must_use]
    pub fn spinner(what: &str) -> Self {
        Self::new(ProgressBar::no_length(), what, "  {spinner} {msg} ({elapsed})")
    }

    /// A step that moves `bytes`.
    #[must_use]
    pub fn bytes(what: &str, bytes: u64) -> Self {
        Self::new(ProgressBar::new(bytes), what, "  {msg} {bar:30} {bytes}/{total_bytes}")
    }

    /// A step over `count` things.
    #[must_use]
    pub fn count(what: &str, count: usize) -> Self {
        Self::new(ProgressBar::new(count as u64), what, "  {msg} {bar:30} {pos}/{len}")
    }

    fn new(bar: ProgressBar, what: &str, template: &str) -> Self {
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(100));
        Self { bar, what: what.to_owned() }
    }

    /// Sets the position.
    pub fn at(&self, position: u64) {
        self.bar.set_position(position);
    }

    /// Advances by one.
    pub fn advance(&self) {
        self.bar.inc(1);
    }

    /// Shows what is being done now.
    pub fn say(&self, what: &str) {
        self.bar.set_message(what.to_owned());
    }

    /// Ends the step and leaves one line behind.
    pub fn done(self) {
        self.bar.finish_and_clear();
        eprintln!("  {} ({})", self.what, seconds(self.bar.elapsed()));
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// A duration for people.
#[must_use]
pub fn seconds(time: Duration) -> String {
    match time.as_secs() {
        0..100 => format!("{:.1} s", time.as_secs_f64()),
        _ => HumanDuration(time).to_string(),
    }
}
