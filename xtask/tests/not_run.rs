//! The last step of `cargo test`: reports what was not run. cargo runs packages and their tests in
//! alphabetical order, and integration tests last.
use std::env;

use anyhow::Result;

fn main() -> Result<()> {
    // With a filter or an option, not everything was supposed to run.
    if env::args().len() == 1 {
        println!("\n{}", stories::emulated::not_run()?);
    }
    Ok(())
}
