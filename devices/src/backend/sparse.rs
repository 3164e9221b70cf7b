//! Files with holes where there are only zeros.
use std::{fs::File, io, os::unix::fs::FileExt};

/// What is zero or not as a whole, in bytes.
const PAGE: usize = 4096;

/// The runs of pages of one kind in `bytes`: where they begin, and whether they are zero.
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

/// Whether all of it is zero; quick to say no.
fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    words.iter().all(|word| *word == [0; 64]) && rest.iter().all(|b| *b == 0)
}

/// Write the pages of `bytes` that are not zero to `at`, where `to` is a hole; how many bytes were written.
///
/// # Errors
/// When the file does not take them.
pub fn write(to: &File, bytes: &[u8], at: u64) -> io::Result<u64> {
    let mut written = 0;
    for (start, run, _) in runs(bytes).filter(|(_, _, zero)| !zero) {
        to.write_all_at(run, at + start)?;
        written += run.len() as u64;
    }
    Ok(written)
}
