#![no_main]
#[path = "../src/kernel.rs"]
mod kernel;

libfuzzer_sys::fuzz_target!(|data: &[u8]| kernel::entry(data));
