//! `stratoctl`: see the library, which fuzz targets use, too.
#![forbid(unsafe_code)]
use std::process::ExitCode;

fn main() -> ExitCode {
    stratoctl::main()
}
