//! Requests from a client, and messages to it.
use json::Tree;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::Error;

/// A well-formed request: command and arguments.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Command name.
    pub execute: String,
    /// Its arguments; absent ones are an empty object.
    pub arguments: Map<String, Value>,
}

/// Any JSON value; it is echoed.
pub type Id = Option<Value>;

impl Request {
    /// Parse one object. The id is found whenever the text is JSON at all, so that errors include
    /// it.
    pub fn parse(text: &[u8]) -> (Result<Self, Error>, Id) {
        match Tree::read_strict(text).map(Value::from) {
            Ok(Value::Object(mut message)) => {
                let id = message.shift_remove("id");
                (Self::from_members(message), id)
            }
            Ok(_) => (Err(Error::text("QMP input must be a JSON object")), None),
            Err(error) => {
                // Text that is refused below may still be JSON to a laxer reader.
                let lax = serde_json::from_slice::<Map<String, Value>>(text);
                let id = lax.ok().and_then(|mut message| message.shift_remove("id"));
                (Err(Error::text(format!("JSON parse error, {error}"))), id)
            }
        }
    }

    fn from_members(mut message: Map<String, Value>) -> Result<Self, Error> {
        let execute = match message.shift_remove("execute") {
            Some(Value::String(name)) => name,
            Some(_) => return Err(Error::text("QMP input member 'execute' must be a string")),
            None => return Err(Error::text("QMP input lacks member 'execute'")),
        };
        let arguments = match message.shift_remove("arguments") {
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err(Error::text("QMP input member 'arguments' must be an object")),
            None => Map::new(),
        };
        match message.keys().next() {
            Some(name) => Err(Error::text(format!("QMP input member '{name}' is unexpected"))),
            None => Ok(Self { execute, arguments }),
        }
    }
}

/// The line that answers a request.
pub fn answer(result: Result<Value, Error>, id: &Id) -> Vec<u8> {
    #[derive(Serialize)]
    struct Answer<'a> {
        #[serde(skip_serializing_if = "Option::is_none")]
        r#return: Option<Value>,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<Error>,
        #[serde(skip_serializing_if = "Option::is_none")]
        id: &'a Id,
    }
    let (r#return, error) = match result {
        Ok(value) => (Some(value), None),
        Err(error) => (None, Some(error)),
    };
    line(&Answer { r#return, error, id })
}

/// `message` as one line of the wire, ending in CRLF.
pub fn line(message: &impl Serialize) -> Vec<u8> {
    // Only maps with keys that are not strings can fail; the protocol has none.
    let mut line = serde_json::to_vec(message).unwrap_or_default();
    line.extend_from_slice(b"\r\n");
    line
}

#[cfg(test)]
mod tests;
