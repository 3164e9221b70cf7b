//! Programs in C that need nothing but KVM, as a measure of what is possible.
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use stories::debian::output;

/// What they have in common.
const HEADER: &str = include_str!("machine.h");

/// The program `name` with this source, compiled in `dir`.
///
/// # Errors
/// There is no C compiler, or KVM's headers are missing.
pub fn compiled(dir: &Path, name: &str, source: &str) -> Result<PathBuf> {
    let program = dir.join(name);
    let file = program.with_extension("c");
    fs::write(dir.join("machine.h"), HEADER)?;
    fs::write(&file, source)?;
    output(Command::new("cc").args(["-O2", "-o"]).arg(&program).arg(&file))
        .with_context(|| format!("{name}.c does not build (this needs cc and Linux's headers)"))?;
    Ok(program)
}
