//! A configuration file (which begins with a brace), or a command line, one word per line.
use std::{ffi::OsString, io::Write, os::unix::ffi::OsStringExt};

use config::cli::{Action, parse};
use vmm_sys_util::tempfile::TempFile;

/// The whole input is accepted, or all its errors are reported.
pub fn entry(input: &[u8]) {
    let word = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    let file = TempFile::new().unwrap();
    let args = if input.trim_ascii_start().starts_with(b"{") {
        file.as_file().write_all(input).unwrap();
        vec!["-api-channel".into(), "unix:s".into(), "-config".into(), file.as_path().into()]
    } else {
        let args: Vec<_> = input.split(|byte| *byte == b'\n').map(word).collect();
        // Files other than the fuzzer's own are not read.
        match args.iter().any(|arg| arg.to_string_lossy().contains("config")) {
            true => return,
            false => args,
        }
    };
    match parse(args.into_iter()) {
        Ok(Action::Run(_) | Action::PrintHelp(_) | Action::PrintVersion(_)) => {}
        Err(problems) => assert!(!problems.to_string().is_empty()),
    }
}
