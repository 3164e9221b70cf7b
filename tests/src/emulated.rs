//! How many of the integration tests run in the emulated host. All of them take many minutes; where
//! the same tests run natively with another kernel, a sample is enough.
use std::env;

use anyhow::{Result, bail};

use crate::host::Host;
use crate::paths::GUEST_KERNEL;

/// Tests in a sample.
pub const SAMPLE: usize = 4;
/// Makes all of them run: `all`.
pub const VARIABLE: &str = "STORIES_EMULATED";

/// Whether only a sample of them runs.
///
/// # Errors
/// The variable for the host, or the one for how many tests run there, has an invalid value.
pub fn is_sampled() -> Result<bool> {
    let all = match env::var(VARIABLE).as_deref() {
        Ok("all") => true,
        Ok(other) => bail!("{VARIABLE}={other}: must be all"),
        Err(_) => false,
    };
    let emulated = matches!(Host::detect()?, Host::Emulated(_));
    Ok(emulated && !all && env::var_os(GUEST_KERNEL).is_some())
}

/// What a plain `cargo test` does not run here, and how to run that.
///
/// # Errors
/// As [`is_sampled`].
pub fn not_run() -> Result<String> {
    let said = if is_sampled()? {
        format!(
            "Not run: in the emulated host, all but {SAMPLE} of the tests that run natively, too; to \
             run them: {VARIABLE}=all cargo test -p stories --test linux"
        )
    } else if env::var_os(GUEST_KERNEL).is_none() {
        format!(
            "Not run: tests with a Linux kernel that finds virtio-mmio devices on its command line, \
             or runs where others have to be emulated; to run them: {GUEST_KERNEL}=VMLINUX cargo \
             test -p stories --test linux natively"
        )
    } else {
        "All tests were run.".to_owned()
    };
    Ok(said)
}
