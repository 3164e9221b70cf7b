#![no_main]
#[path = "../src/replication_contents.rs"]
mod replication_contents;

libfuzzer_sys::fuzz_target!(|data: &[u8]| replication_contents::entry(data));
