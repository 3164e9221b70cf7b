//! Runs the entry functions of `fuzz/` with inputs from a seeded PRNG.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
#[path = "../../fuzz/src/chain.rs"]
mod chain;
#[path = "../../fuzz/src/input.rs"]
mod input;
#[path = "../../fuzz/src/mutate.rs"]
mod mutate;

#[test]
fn saves_that_build_on_each_other_in_any_way() {
    let mut seeds = Vec::new();
    for count in 0..5 {
        let mut seed = vec![count];
        for n in 0..=count {
            // Based on the previous save; three changes each; no damage.
            seed.extend([0, 0, 3, n, 0, 1, n, 2, 4, n, 7, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        }
        seeds.push(seed);
    }
    mutate::hammer("chain", &seeds, 60, chain::entry);
}
