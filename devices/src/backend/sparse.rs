//! Sparse files: holes in place of zeros.
use std::{fs::File, io, os::unix::fs::FileExt};

/// The granularity, in bytes, at which zeros become holes.
const PAGE: usize = 4096;

/// The runs of zero and of non-zero pages in `bytes`: offset, contents, and whether they are zero.
pub fn runs(bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8], bool)> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let zero = is_zero(rest.chunks(PAGE).next()?);
        let pages = rest.chunks(PAGE).take_while(|page| is_zero(page) == zero).count();
        let start = (bytes.len() - rest.len()) as u64;
        let run;
        (run, rest) = rest.split_at((pages * PAGE).min(rest.len()));
        Some((start, run, zero))
    })
}

/// Whether all bytes are zero; returns early if not.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|word| *word == [0; 64]) && rest.iter().all(|b| *b == 0)
}

/// Write the non-zero pages of `bytes` to `at`, where `to` has a hole; returns how many bytes were
/// written.
///
/// # Errors
/// When the file cannot be written.
pub fn write(to: &File, bytes: &[u8], at: u64) -> io::Result<u64> {
    let mut written = 0;
    for (start, run, _) in runs(bytes).filter(|(_, _, zero)| !zero) {
        to.write_all_at(run, at + start)?;
        written += run.len() as u64;
    }
    Ok(written)
}
