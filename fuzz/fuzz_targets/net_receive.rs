#![no_main]
#[path = "../src/input.rs"]
mod input;
#[path = "../src/net_receive.rs"]
mod net_receive;

libfuzzer_sys::fuzz_target!(|data: &[u8]| net_receive::entry(data));
