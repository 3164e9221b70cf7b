//! What the registry's files hold, without files: for fuzzers.
use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};

use crate::registry::{Description, Saved, Start, parse, text};

/// Take `bytes` for a record of each kind. What is one is written as something that reads the same.
///
/// # Panics
/// When something is wrong with this crate.
pub fn records(bytes: &[u8]) {
    record::<Description>(bytes);
    record::<Start>(bytes);
    record::<Saved>(bytes);
}

fn record<T: DeserializeOwned + Serialize + PartialEq>(bytes: &[u8]) {
    let path = Path::new("domain.json");
    match parse::<T>(bytes, path) {
        Ok(record) => {
            let again = text(&record).ok().and_then(|text| parse::<T>(&text, path).ok());
            assert!(again.is_some_and(|again| again == record), "written as something else");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
