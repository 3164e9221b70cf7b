//! The seed of the integration tests' random choices.
use std::env;
use std::hash::{BuildHasher, RandomState};

use anyhow::{Context, Result};

use crate::paths::SEED;

/// The number in `STORIES_SEED`, or a different one each time.
///
/// # Errors
/// The variable holds no number.
pub fn get() -> Result<u64> {
    match env::var(SEED) {
        Ok(seed) => seed.parse().with_context(|| format!("{SEED}={seed} is not a number")),
        Err(_) => Ok(RandomState::new().hash_one(0)),
    }
}
