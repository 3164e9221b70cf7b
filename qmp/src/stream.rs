//! Splits a byte stream into JSON objects, independent of how the bytes arrive.
//!
//! JSON's nesting grammar is checked here byte by byte, so that a mistake is reported where it
//! occurs, and memory, depth and time are bounded before any parser sees the message. Strings and
//! scalars are checked by the parser.
//!
//! ```text
//!           '{'                      balanced
//!  Between -----> Inside ------------------------> Between, a message is complete
//!     |             | mistake, too deep, too long
//!     | other       v
//!     +---------> Skipping --- newline, balanced --> Between
//! ```
//!
//! Recovery follows QEMU's lexer (line ends and structure show where a sender starts again): a
//! newline always ends it; a broken object also ends where its braces balance or at a byte that
//! never occurs in JSON, and invalid bytes between objects also end where the next object begins.

/// Longest message, in bytes.
pub const MAX_MESSAGE: usize = 1 << 20;

/// Deepest nesting of objects and arrays in a message.
pub const MAX_DEPTH: u32 = 64;

/// One item of the stream.
#[derive(Debug, PartialEq, Eq)]
pub enum Item {
    /// A balanced object.
    Object(Vec<u8>),
    /// An error in the input; everything up to a point of recovery is skipped.
    Malformed(String),
}

/// What the grammar expects next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    /// An object, between messages.
    Message,
    /// `"` of a key; `}` if the object is empty so far.
    Key { first: bool },
    /// `:` after a key.
    Colon,
    /// A value; `]` if the array is empty so far.
    Value { first: bool },
    /// `,` or the end of the object or array.
    More,
    /// The rest of a string that is a key or a value.
    String { key: bool, escaped: bool },
    /// The rest of a number, `true`, `false` or `null`.
    Scalar,
    /// The end of invalid bytes between messages.
    Recovery,
    /// The end of a broken message, with its open nesting.
    Skip { open: u64, string: bool, escaped: bool },
}

/// The state of one stream.
#[derive(Debug)]
pub struct Splitter {
    want: Want,
    /// Open objects (bit 1) and arrays (bit 0), the innermost in the lowest bit.
    stack: u64,
    depth: u32,
    message: Vec<u8>,
}

impl Splitter {
    /// The state at the beginning of a stream.
    pub fn new() -> Self {
        Self { want: Want::Message, stack: 0, depth: 0, message: Vec::new() }
    }

    /// Bytes of memory in use.
    pub fn memory(&self) -> usize {
        self.message.capacity()
    }

    /// Read up to the end of the next item; returns how many bytes were used, and the item if there
    /// is one.
    pub fn read(&mut self, input: &[u8]) -> (usize, Option<Item>) {
        let mut used = 0;
        for &byte in input {
            used += 1;
            let item = self.byte(byte);
            if item.is_some() {
                return (used, item);
            }
        }
        (used, None)
    }

    fn byte(&mut self, byte: u8) -> Option<Item> {
        match self.want {
            Want::Message => return self.between(byte),
            Want::Recovery => {
                match byte {
                    b'\n' => self.want = Want::Message,
                    b'{' => return self.between(byte),
                    _ => {}
                }
                return None;
            }
            Want::Skip { .. } if starts_afresh(byte) => {
                self.want = Want::Recovery;
                return None;
            }
            Want::Skip { .. } => {
                self.skip(byte);
                return None;
            }
            _ => {}
        }
        if self.message.len() >= MAX_MESSAGE {
            return self.broken(byte, &format!("a message is longer than {MAX_MESSAGE} bytes"));
        }
        match self.grammar(byte) {
            Ok(()) => self.message.push(byte),
            Err(wrong) => return self.broken(byte, &wrong),
        }
        (self.depth == 0).then(|| {
            self.want = Want::Message;
            Item::Object(std::mem::take(&mut self.message))
        })
    }

    /// Process a byte between messages.
    fn between(&mut self, byte: u8) -> Option<Item> {
        match byte {
            b' ' | b'\t' | b'\r' | b'\n' => None,
            b'{' => {
                (self.stack, self.depth) = (1, 1);
                self.want = Want::Key { first: true };
                self.message.push(byte);
                None
            }
            _ => {
                self.want = Want::Recovery;
                let what = show(byte);
                Some(Item::Malformed(format!("JSON parse error, expecting an object, got {what}")))
            }
        }
    }

    /// Process a byte inside a message.
    fn grammar(&mut self, byte: u8) -> Result<(), String> {
        match (self.want, byte) {
            (Want::String { key, escaped: true }, _) if !starts_afresh(byte) => {
                self.want = Want::String { key, escaped: false };
            }
            (Want::String { key, .. }, b'\\') => self.want = Want::String { key, escaped: true },
            (Want::String { key: true, .. }, b'"') => self.want = Want::Colon,
            (Want::String { key: false, .. }, b'"') => self.want = Want::More,
            (Want::String { .. }, 0..0x20 | 0xfe..) => {
                return Err(format!("control character {byte:#04x} in a string"));
            }
            (Want::String { .. }, _) => {}
            (Want::Scalar, b'0'..=b'9' | b'a'..=b'z' | b'A'..=b'Z' | b'.' | b'+' | b'-') => {}
            (Want::Scalar, _) => {
                self.want = Want::More;
                return self.grammar(byte);
            }
            (_, b' ' | b'\t' | b'\r' | b'\n') => {}
            (Want::Key { .. }, b'"') => self.want = Want::String { key: true, escaped: false },
            (Want::Key { first: true } | Want::More, b'}') if self.stack & 1 == 1 => self.close(),
            (Want::Value { first: true } | Want::More, b']') if self.stack & 1 == 0 => self.close(),
            (Want::Colon, b':') => self.want = Want::Value { first: false },
            (Want::More, b',') if self.stack & 1 == 1 => self.want = Want::Key { first: false },
            (Want::More, b',') => self.want = Want::Value { first: false },
            (Want::Value { .. }, b'{') => self.open(1, Want::Key { first: true })?,
            (Want::Value { .. }, b'[') => self.open(0, Want::Value { first: true })?,
            (Want::Value { .. }, b'"') => self.want = Want::String { key: false, escaped: false },
            (Want::Value { .. }, b'0'..=b'9' | b'-' | b't' | b'f' | b'n') => {
                self.want = Want::Scalar
            }
            (want, _) => {
                let expected = match want {
                    Want::Key { .. } => "a key in double quotes",
                    Want::Colon => "':'",
                    Want::More if self.stack & 1 == 1 => "',' or '}'",
                    Want::More => "',' or ']'",
                    _ => "a value",
                };
                return Err(format!("expecting {expected}, got {}", show(byte)));
            }
        }
        Ok(())
    }

    fn open(&mut self, kind: u64, want: Want) -> Result<(), String> {
        if self.depth == MAX_DEPTH {
            return Err(format!("nested deeper than {MAX_DEPTH} levels"));
        }
        self.depth += 1;
        self.stack = self.stack << 1 | kind;
        self.want = want;
        Ok(())
    }

    fn close(&mut self) {
        self.depth -= 1;
        self.stack >>= 1;
        self.want = Want::More;
    }

    /// Give up the message at `byte`.
    fn broken(&mut self, byte: u8, wrong: &str) -> Option<Item> {
        let (string, escaped) = match self.want {
            Want::String { escaped, .. } => (true, escaped),
            _ => (false, false),
        };
        self.message = Vec::new();
        if starts_afresh(byte) {
            self.want = Want::Recovery;
        } else {
            self.want = Want::Skip { open: self.depth.into(), string, escaped };
            self.skip(byte);
        }
        Some(Item::Malformed(format!("JSON parse error, {wrong}")))
    }

    fn skip(&mut self, byte: u8) {
        let Want::Skip { open, string, escaped } = &mut self.want else { return };
        match byte {
            b'\n' => self.want = Want::Message,
            _ if *escaped => *escaped = false,
            b'\\' if *string => *escaped = true,
            b'"' => *string = !*string,
            b'{' | b'[' if !*string => *open += 1,
            b'}' | b']' if !*string => {
                *open -= 1;
                if *open == 0 {
                    self.want = Want::Message;
                }
            }
            _ => {}
        }
    }
}

/// Whether `byte` is one that a client sends to discard a message, whatever is open in it: it never
/// occurs in JSON (QMP specification, "Forcing the JSON parser into known-good state").
fn starts_afresh(byte: u8) -> bool {
    matches!(byte, 0..0x20 | 0xfe..) && !matches!(byte, b'\t' | b'\r' | b'\n')
}

fn show(byte: u8) -> String {
    match byte {
        0x21..0x7f => format!("'{}'", char::from(byte)),
        _ => format!("byte {byte:#04x}"),
    }
}

#[cfg(test)]
mod tests;
