#![no_main]
#[path = "../src/replication_roles.rs"]
mod replication_roles;

libfuzzer_sys::fuzz_target!(|data: &[u8]| replication_roles::primary(data));
