//! The entry function of `fuzz/`, with inputs from a seeded PRNG.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
#[path = "../../fuzz/src/mutate.rs"]
mod mutate;

#[test]
fn records_that_say_anything() {
    let domain = r#"{"uuid":"8c3e7b1a-0d2f-4b5c-9e6f-112233445566","vcpus":1,"memory":268435456,"policy":{"on_poweroff":"destroy","on_reboot":"rename-restart","on_crash":"preserve"},"config":{"boot-source":{"kernel_image_path":"/k"},"drive":[]}"#;
    let seeds = [
        format!("{domain},\"version\":1}}"),
        r#"{"version":1,"id":7}"#.to_owned(),
        format!("{{\"version\":1,\"name\":\"web-1\",\"domain\":{domain}}}}}"),
    ];
    let seeds = seeds.map(String::into_bytes);
    mutate::hammer("record", &seeds, 5000, stratoctl::testing::records);
}
