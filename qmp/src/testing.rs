//! Client input without a socket: for fuzzers.
use crate::{
    Request,
    decode::decode,
    request::answer,
    schema::{Command, EachCommand},
    stream::{Item, Splitter},
};

/// Split `bytes` into messages and decode those that are commands. How the bytes are split makes no
/// difference.
///
/// # Panics
/// When this crate has a bug.
pub fn messages(bytes: &[u8]) {
    let whole = items(bytes, bytes.len());
    let piece = usize::from(bytes.first().copied().unwrap_or(0) % 7) + 1;
    assert!(whole == items(bytes, piece), "pieces of {piece} bytes are read differently");
    for item in whole {
        if let Item::Object(text) = item {
            let (request, id) = Request::parse(&text);
            let result = request.map(|request| Decode(request).all()).map(|_| true.into());
            let line = answer(result, &id);
            assert!(
                line.ends_with(b"\r\n")
                    && serde_json::from_slice::<serde_json::Value>(&line).is_ok()
            );
        }
    }
}

fn items(bytes: &[u8], piece: usize) -> Vec<Item> {
    let mut splitter = Splitter::new();
    let mut items = Vec::new();
    for mut piece in bytes.chunks(piece.max(1)) {
        while !piece.is_empty() {
            let (used, item) = splitter.read(piece);
            items.extend(item);
            piece = piece.get(used..).unwrap_or_default();
        }
    }
    items
}

/// Decodes the request's arguments as those of each command of that name.
struct Decode(Request);

impl EachCommand for Decode {
    fn command<C: Command>(&mut self) {
        // Names that differ in case or punctuation are no commands, but their arguments are
        // decoded, too.
        if self.0.execute.eq_ignore_ascii_case(C::NAME)
            && let Err(error) = decode::<C>(self.0.arguments.clone())
        {
            assert!(!error.to_string().is_empty());
        }
    }
}
