//! A block device of the host backed by a file. Needs root and `losetup`.
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// The device; detached when dropped.
pub struct LoopDevice(PathBuf);

impl LoopDevice {
    /// A loop device on `file`.
    ///
    /// # Errors
    /// The host has no free one.
    pub fn new(file: &Path) -> Result<Self> {
        let out = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        let out = out.context("cannot run losetup")?;
        ensure!(out.status.success(), "losetup: {}", String::from_utf8_lossy(&out.stderr));
        Ok(Self(PathBuf::from(String::from_utf8(out.stdout)?.trim_end())))
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let ended = Command::new("losetup").arg("--detach").arg(&self.0).status();
        if !ended.is_ok_and(|status| status.success()) {
            eprintln!("{} is left behind", self.0.display());
        }
    }
}
