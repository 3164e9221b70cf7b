#![no_main]
#[path = "../src/replication_roles.rs"]
#[allow(dead_code, reason = "it has the other role, too")]
mod replication_roles;

libfuzzer_sys::fuzz_target!(|data: &[u8]| replication_roles::primary(data));
