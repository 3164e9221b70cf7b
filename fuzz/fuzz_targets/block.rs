#![no_main]
#[path = "../src/block.rs"]
mod block;
#[path = "../src/input.rs"]
mod input;

libfuzzer_sys::fuzz_target!(|data: &[u8]| block::entry(data));
