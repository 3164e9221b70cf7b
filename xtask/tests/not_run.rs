//! The last thing that `cargo test` does: says what it has not run. cargo runs packages and their tests
//! in alphabetical order, and integration tests last.
use std::env;

use anyhow::Result;

fn main() -> Result<()> {
    // With a filter or an option it is not about everything.
    if env::args().len() == 1 {
        println!("\n{}", stories::emulated::not_run()?);
    }
    Ok(())
}
