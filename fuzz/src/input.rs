//! Decodes an input's bytes, for entry functions that interpret them as steps.
#![allow(dead_code, reason = "each target needs a part of it")]
use state::Section;

/// The input, byte by byte; zeroes after its end.
pub struct Input<'a>(pub &'a [u8]);

impl Input<'_> {
    pub fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let n = self.0.len().min(N);
        bytes[..n].copy_from_slice(&self.0[..n]);
        self.0 = &self.0[n..];
        bytes
    }

    pub fn u8(&mut self) -> u8 {
        self.bytes::<1>()[0]
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    pub fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }

    /// `section` with one byte changed, if the result is a section; most bytes that matter are
    /// digits.
    pub fn change(&mut self, section: &Section) -> Option<Section> {
        let (at, other) = (usize::from(self.u16()), self.u8());
        let mut json = section.state.get().to_owned().into_bytes();
        if let Some(byte) = json.get_mut(at) {
            *byte = if byte.is_ascii_digit() { b'0' + other % 10 } else { other };
        }
        section.with(String::from_utf8(json).ok()?).ok()
    }
}
