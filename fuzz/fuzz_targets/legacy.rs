#![no_main]
#[path = "../src/input.rs"]
mod input;
#[path = "../src/legacy.rs"]
mod legacy;

libfuzzer_sys::fuzz_target!(|data: &[u8]| legacy::entry(data));
