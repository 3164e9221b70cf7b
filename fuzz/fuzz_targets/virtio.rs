#![no_main]
#[path = "../src/input.rs"]
mod input;
#[path = "../src/virtio.rs"]
mod virtio;

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio::entry(data));
