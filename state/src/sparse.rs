//! Where a sparse file has data.
use std::{fs::File, io, ops::Range};

use rustix::fs::{SeekFrom, seek};

/// Where `file` has data between `start` and `start + len`, relative to `start`.
///
/// # Errors
/// When the file cannot be searched.
pub fn data(file: &File, start: u64, len: u64) -> io::Result<Vec<Range<u64>>> {
    let end = start.saturating_add(len);
    let mut found = Vec::new();
    let mut at = start;
    while at < end {
        let from = match seek(file, SeekFrom::Data(at)) {
            Ok(from) if from < end => from,
            // No data up to the end of the file.
            Ok(_) | Err(rustix::io::Errno::NXIO) => break,
            Err(e) => return Err(e.into()),
        };
        let to = seek(file, SeekFrom::Hole(from))?.min(end);
        found.push(from - start..to - start);
        at = to.max(from + 1);
    }
    Ok(found)
}
