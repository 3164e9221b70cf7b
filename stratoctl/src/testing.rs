//! The contents of the registry's files, without files: for fuzz targets.
use std::path::Path;

use serde::{Serialize, de::DeserializeOwned};

use crate::registry::{Description, Saved, Start, parse, text};

/// Parse `bytes` as a record of each kind. A valid record is written again, and must read back the
/// same.
///
/// # Panics
/// When there is a bug in this crate.
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
