//! JSON without loss of duplicate keys. `serde_json::Value` silently keeps the last of two equal
//! keys; the configuration reader has to report them, and QMP to refuse them.
#![forbid(unsafe_code)]
use std::{collections::HashSet, fmt};

use serde::de::{self, Deserialize, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Error, Map, Number, Value};

/// Any JSON value. serde_json stops at a depth of 128.
#[derive(Debug, Clone, PartialEq)]
pub enum Tree {
    /// null.
    Null,
    /// true or false.
    Bool(bool),
    /// A number.
    Number(Number),
    /// A string.
    Text(String),
    /// An array.
    List(Vec<Tree>),
    /// An object: its members in order, duplicates included.
    Object(Vec<(String, Tree)>),
}

impl Tree {
    /// Parse `text` as one value.
    ///
    /// # Errors
    /// When it is not valid JSON.
    pub fn read(text: &[u8]) -> Result<Self, Error> {
        Reader { strict: false }.read(text)
    }

    /// Parse `text` as one value, without anything that readers disagree on: duplicate keys, and
    /// NUL in a string, which would truncate a path.
    ///
    /// # Errors
    /// When it is invalid, or contains one of these; the error says where.
    pub fn read_strict(text: &[u8]) -> Result<Self, Error> {
        Reader { strict: true }.read(text)
    }
}

impl From<Tree> for Value {
    /// Convert to `serde_json::Value`: of two equal keys, the last one is kept.
    fn from(tree: Tree) -> Self {
        match tree {
            Tree::Null => Self::Null,
            Tree::Bool(value) => Self::Bool(value),
            Tree::Number(number) => Self::Number(number),
            Tree::Text(text) => Self::String(text),
            Tree::List(items) => items.into_iter().map(Self::from).collect(),
            Tree::Object(members) => {
                let members = members.into_iter().map(|(key, value)| (key, value.into()));
                Self::Object(members.collect::<Map<_, _>>())
            }
        }
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Reader { strict: false }.deserialize(from)
    }
}

/// How a value is parsed.
#[derive(Clone, Copy)]
struct Reader {
    strict: bool,
}

impl Reader {
    fn read(self, text: &[u8]) -> Result<Tree, Error> {
        let mut from = serde_json::Deserializer::from_slice(text);
        let tree = self.deserialize(&mut from)?;
        from.end().map(|()| tree)
    }

    fn check<E: de::Error>(self, text: &str) -> Result<(), E> {
        match self.strict && text.contains('\0') {
            true => Err(E::custom("NUL in a string")),
            false => Ok(()),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Reader {
    type Value = Tree;

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<Tree, D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader {
    type Value = Tree;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Tree, E> {
        Ok(Tree::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Tree, E> {
        Ok(Tree::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Tree, E> {
        Ok(Tree::Number(value.into()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Tree, E> {
        Ok(Tree::Number(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Tree, E> {
        // As serde_json does: JSON has no NaN or infinity.
        Ok(Number::from_f64(value).map_or(Tree::Null, Tree::Number))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Tree, E> {
        self.check(value)?;
        Ok(Tree::Text(value.to_owned()))
    }

    fn visit_string<E: de::Error>(self, value: String) -> Result<Tree, E> {
        self.check(&value)?;
        Ok(Tree::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Tree, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(self)? {
            items.push(item);
        }
        Ok(Tree::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tree, A::Error> {
        let (mut members, mut seen) = (Vec::new(), HashSet::new());
        while let Some(key) = map.next_key::<String>()? {
            self.check(&key)?;
            if self.strict && !seen.insert(key.clone()) {
                return Err(de::Error::custom(format_args!("duplicate key '{key}'")));
            }
            members.push((key, map.next_value_seed(self)?));
        }
        Ok(Tree::Object(members))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn everything_is_as_it_was_written() {
        let text = br#" {"b":[null,true,-1,18446744073709551615,1.5,"x"],"a":{},"b":1} "#;
        let Tree::Object(members) = Tree::read(text).unwrap() else { panic!() };
        assert_eq!(
            members.iter().map(|(key, _)| key.as_str()).collect::<Vec<_>>(),
            ["b", "a", "b"]
        );
        let first = Value::from(members[0].1.clone());
        assert_eq!(first, json!([null, true, -1, u64::MAX, 1.5, "x"]));
        assert_eq!(Value::from(Tree::Object(members))["b"], json!(1), "the last one counts");
        assert!(Tree::read(b"{} x").is_err() && Tree::read(b"").is_err());
    }

    #[test]
    fn what_readers_disagree_on_is_refused_where_that_is_asked_for() {
        for (text, says) in [
            (r#"{"a":1,"a":2}"#, "duplicate key 'a' at line 1 column 10"),
            (r#"{"x":[{"a":1,"a":2}]}"#, "duplicate key 'a'"),
            (r#"["a\u0000"]"#, "NUL in a string"),
            (r#"{"a\u0000":1}"#, "NUL in a string"),
        ] {
            let error = Tree::read_strict(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
            assert!(Tree::read(text.as_bytes()).is_ok());
        }
    }

    #[test]
    fn depth_has_a_bound() {
        assert!(Tree::read(&[b'['; 1 << 20]).is_err());
    }
}
