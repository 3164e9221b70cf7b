#![no_main]
#[path = "../src/chain.rs"]
mod chain;
#[path = "../src/input.rs"]
mod input;

libfuzzer_sys::fuzz_target!(|data: &[u8]| chain::entry(data));
