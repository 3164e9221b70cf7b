//! A monitor's log, printed as text for a terminal.
use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    path::Path,
};

use state::regular_file::open_regular;

const BLOCK: u64 = 16 << 10;

/// A log that is followed as it grows.
pub struct Log {
    file: File,
}

impl Log {
    /// Open the log at its beginning, or before its last `lines` lines.
    ///
    /// # Errors
    /// When it does not exist or cannot be read.
    pub fn open(path: &Path, lines: Option<usize>) -> io::Result<Self> {
        let mut file = open_regular(path, File::options().read(true))?;
        let from = match lines {
            Some(lines) => before_last(&mut file, lines)?,
            None => 0,
        };
        file.seek(SeekFrom::Start(from))?;
        Ok(Self { file })
    }

    /// Write all lines so far. A monitor's log may contain text of the guest, which must not
    /// control the terminal.
    ///
    /// # Errors
    /// When the log cannot be read, or `to` cannot be written.
    pub fn pour(&mut self, to: &mut impl Write) -> io::Result<()> {
        let mut block = vec![0; BLOCK as usize];
        loop {
            let n = self.file.read(&mut block)?;
            if n == 0 {
                return to.flush();
            }
            let mut text = block.get(..n).unwrap_or_default().to_vec();
            text.retain(|byte| !byte.is_ascii_control() || matches!(byte, b'\n' | b'\t'));
            to.write_all(&text)?;
        }
    }
}

/// Offset of the last `lines` lines of `file`.
fn before_last(file: &mut File, lines: usize) -> io::Result<u64> {
    let length = file.metadata()?.len();
    if lines == 0 {
        return Ok(length);
    }
    let mut end = length;
    let mut left = lines;
    let mut block = Vec::new();
    while end > 0 {
        let begin = end.saturating_sub(BLOCK);
        block.resize((end - begin) as usize, 0);
        file.seek(SeekFrom::Start(begin))?;
        file.read_exact(&mut block)?;
        for (byte, at) in block.iter().rev().zip((begin..end).rev()) {
            // The newline of the last line starts no other line.
            if *byte != b'\n' || at + 1 == length {
                continue;
            }
            match left.checked_sub(1) {
                Some(0) | None => return Ok(at + 1),
                Some(rest) => left = rest,
            }
        }
        end = begin;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn last(text: &[u8], lines: Option<usize>) -> Vec<u8> {
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), text).expect("written");
        let mut said = Vec::new();
        Log::open(file.path(), lines).and_then(|mut log| log.pour(&mut said)).expect("read");
        said
    }

    #[test]
    fn the_last_lines_are_found_however_long_they_are() {
        for (text, lines, wanted) in [
            (&b"a\nb\nc\n"[..], 2, &b"b\nc\n"[..]),
            (b"a\nb\nc", 2, b"b\nc"),
            (b"a\nb\nc\n", 3, b"a\nb\nc\n"),
            (b"a\nb\nc\n", 9, b"a\nb\nc\n"),
            (b"\n\n\n", 1, b"\n"),
            (b"a\nb\n", 0, b""),
            (b"", 5, b""),
        ] {
            assert_eq!(last(text, Some(lines)), wanted, "{text:?} {lines}");
        }
        let long =
            [vec![b'x'; 40_000], b"\n".to_vec(), vec![b'y'; 40_000], b"\n".to_vec()].concat();
        assert_eq!(last(&long, Some(1)), long[40_001..]);
        assert_eq!(last(&long, None), long);
    }

    #[test]
    fn a_terminal_is_not_reprogrammed() {
        assert_eq!(last(b"\x1b[2Jred\t\xc3\xa4\r\n\0\x07", None), b"[2Jred\t\xc3\xa4\n");
    }
}
