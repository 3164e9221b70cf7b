//! `stratoctl`: all verbs of a domain's life cycle, without a daemon. A domain is a directory in
//! the registry and a running monitor; each verb reads both and talks QMP to the monitor.
//!
//! ```text
//! verbs     the command line           matrix    verb x state: done or refused
//! commands  what each verb does        domain    the state, found by asking
//! registry  directories, locks         monitor   starting stratovirt   process  its identity
//! ```
#![forbid(unsafe_code)]
mod agent;
mod commands;
mod configuration;
mod console;
mod dial;
mod domain;
mod failure;
mod log;
mod matrix;
mod monitor;
mod pages;
mod policy;
mod process;
mod progress;
mod registry;
mod remus;
mod show;
#[cfg(feature = "testing")]
pub mod testing;
mod verbs;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::Parser;
use serde_json::json;

/// The main function of the program.
#[must_use]
pub fn main() -> ExitCode {
    let line = verbs::Line::parse();
    let as_json = line.global.json;
    match commands::run(line) {
        Ok(answer) => {
            let mut text = if as_json && !answer.json.is_null() {
                format!("{:#}", answer.json)
            } else {
                answer.text
            };
            if !text.is_empty() && !text.ends_with('\n') {
                text.push('\n');
            }
            // A reader that has closed its end wants no more.
            let _ = io::stdout().write_all(text.as_bytes());
            ExitCode::from(answer.status)
        }
        Err(error) => {
            let hint = failure::hint_of(&error);
            let message = match (as_json, hint) {
                (true, _) => {
                    format!("{:#}", json!({ "error": format!("{error:#}"), "hint": hint }))
                }
                (false, Some(hint)) => format!("stratoctl: {error:#}\nhint: {hint}"),
                (false, None) => format!("stratoctl: {error:#}"),
            };
            let _ = writeln!(io::stderr(), "{message}");
            ExitCode::FAILURE
        }
    }
}
