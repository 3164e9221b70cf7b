//! `cargo check-house`: the lints of this workspace that neither the compiler nor clippy has.
use std::process::ExitCode;

use anyhow::Result;
use xtask::lints;

fn main() -> Result<ExitCode> {
    let broken = lints::check(lints::workspace())?;
    for line in &broken {
        eprintln!("{line}");
    }
    if broken.is_empty() {
        println!("No rule of the workspace is broken.");
        return Ok(ExitCode::SUCCESS);
    }
    Ok(ExitCode::FAILURE)
}
