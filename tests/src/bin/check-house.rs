//! `cargo check-house`: refuses what the rules of the house do not allow.
use std::process::ExitCode;

use anyhow::Result;
use stories::{house, paths};

fn main() -> Result<ExitCode> {
    let broken = house::check(paths::workspace())?;
    for line in &broken {
        eprintln!("{line}");
    }
    if broken.is_empty() {
        println!("The house is in order.");
        return Ok(ExitCode::SUCCESS);
    }
    Ok(ExitCode::FAILURE)
}
