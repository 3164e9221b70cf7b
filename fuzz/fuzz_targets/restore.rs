#![no_main]
#[path = "../src/restore.rs"]
mod restore;
#[path = "../src/saved.rs"]
mod saved;

libfuzzer_sys::fuzz_target!(|data: &[u8]| restore::entry(data));
