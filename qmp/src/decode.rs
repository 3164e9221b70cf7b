//! Decoding of a request's arguments into the command's own type.
//!
//! Differs from `serde_json::from_value` in four ways: an array is not a struct; `1.0` is an integer
//! (generic JSON writers send it); `"on"` and `"off"` are booleans (as in StratoVirt); and errors
//! are worded as in QEMU, with the path of the parameter.
use std::fmt::{self, Display};

use serde::{
    de::{
        self, DeserializeOwned, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess,
        SeqAccess, Unexpected, Visitor,
    },
    forward_to_deserialize_any,
};
use serde_json::{Map, Value};

use crate::Error;

/// Decode `arguments` into the command.
pub fn decode<T: DeserializeOwned>(arguments: Map<String, Value>) -> Result<T, Error> {
    T::deserialize(Decoder(Value::Object(arguments))).map_err(|e| Error::text(e.to_string()))
}

/// The error, and the parameter that it is about (path inside the arguments; empty while unknown).
#[derive(Debug)]
struct DecodeError {
    path: String,
    wrong: Wrong,
}

#[derive(Debug)]
enum Wrong {
    Unexpected { allowed: &'static [&'static str] },
    Missing,
    Type { expected: String },
    Value { got: String, expected: String },
    Other(String),
}

impl DecodeError {
    fn new(path: &str, wrong: Wrong) -> Self {
        Self { path: path.into(), wrong }
    }

    fn inside(mut self, key: &str) -> Self {
        self.path = match self.path.is_empty() {
            true => key.into(),
            false => format!("{key}.{}", self.path),
        };
        self
    }
}

impl Display for DecodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = &self.path;
        match &self.wrong {
            Wrong::Unexpected { allowed: [] } => {
                write!(f, "Parameter '{path}' is unexpected (there are none)")
            }
            Wrong::Unexpected { allowed } => {
                write!(f, "Parameter '{path}' is unexpected (known here: {})", allowed.join(", "))
            }
            Wrong::Missing => write!(f, "Parameter '{path}' is missing"),
            Wrong::Type { expected } => {
                write!(f, "Invalid parameter type for '{path}', expected: {expected}")
            }
            Wrong::Value { got, expected } => {
                write!(f, "Parameter '{path}' does not accept value {got}, expected: {expected}")
            }
            Wrong::Other(text) => write!(f, "Parameter '{path}': {text}"),
        }
    }
}

impl std::error::Error for DecodeError {}

impl de::Error for DecodeError {
    fn custom<T: Display>(text: T) -> Self {
        Self::new("", Wrong::Other(text.to_string()))
    }

    fn invalid_type(_: Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::new("", Wrong::Type { expected: expected.to_string() })
    }

    fn invalid_value(got: Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        Self::new("", Wrong::Value { got: got.to_string(), expected: expected.to_string() })
    }

    fn unknown_variant(got: &str, allowed: &'static [&'static str]) -> Self {
        let expected = format!("one of {}", allowed.join(", "));
        Self::new("", Wrong::Value { got: format!("'{got}'"), expected })
    }

    fn unknown_field(field: &str, allowed: &'static [&'static str]) -> Self {
        Self::new(field, Wrong::Unexpected { allowed })
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(field, Wrong::Missing)
    }
}

struct Decoder(Value);

impl Decoder {
    /// The value, with a whole number in integer form.
    fn whole(self) -> Self {
        let Some(float) = self.0.as_f64().filter(|_| self.0.is_f64()) else { return self };
        // 2^53: up to here a double determines the integer exactly.
        if float.fract() != 0.0 || float.abs() > 9_007_199_254_740_992.0 {
            return self;
        }
        #[expect(clippy::cast_possible_truncation, reason = "whole and within 2^53")]
        Self(Value::from(float as i64))
    }

    fn mismatch<'de, V: Visitor<'de>>(&self, visitor: &V) -> DecodeError {
        de::Error::invalid_type(Unexpected::Other("another type"), visitor)
    }
}

macro_rules! integers {
    ($($method:ident)*) => {
        $(fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
            self.whole().deserialize_any(visitor)
        })*
    };
}

impl<'de> Deserializer<'de> for Decoder {
    type Error = DecodeError;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match self.0 {
            Value::Null => visitor.visit_unit(),
            Value::Bool(v) => visitor.visit_bool(v),
            Value::Number(v) => match (v.as_u64(), v.as_i64(), v.as_f64()) {
                (Some(v), ..) => visitor.visit_u64(v),
                (_, Some(v), _) => visitor.visit_i64(v),
                (.., v) => visitor.visit_f64(v.unwrap_or(f64::NAN)),
            },
            Value::String(v) => visitor.visit_string(v),
            Value::Array(v) => visitor.visit_seq(Items(v.into_iter(), 0)),
            Value::Object(v) => visitor.visit_map(Members(v.into_iter(), None)),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match self.0.as_str() {
            Some("on" | "yes" | "true") => visitor.visit_bool(true),
            Some("off" | "no" | "false") => visitor.visit_bool(false),
            _ => self.deserialize_any(visitor),
        }
    }

    integers! {
        deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, DecodeError> {
        match self.0 {
            Value::Null => visitor.visit_none(),
            _ => visitor.visit_some(self),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        match self.0 {
            Value::Object(_) => self.deserialize_any(visitor),
            _ => Err(de::Error::invalid_type(Unexpected::Other("another type"), &"an object")),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, DecodeError> {
        match self.0 {
            Value::String(name) => visitor.visit_enum(name.into_deserializer()),
            _ => Err(self.mismatch(&visitor)),
        }
    }

    forward_to_deserialize_any! {
        i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map
        identifier ignored_any
    }
}

struct Members(serde_json::map::IntoIter, Option<(String, Value)>);

impl<'de> MapAccess<'de> for Members {
    type Error = DecodeError;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, DecodeError> {
        self.1 = self.0.next();
        let Some((key, _)) = &self.1 else { return Ok(None) };
        seed.deserialize(key.as_str().into_deserializer()).map(Some)
    }

    fn next_value_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<S::Value, DecodeError> {
        let (key, value) = self.1.take().unwrap_or_default();
        seed.deserialize(Decoder(value)).map_err(|e| e.inside(&key))
    }
}

struct Items(std::vec::IntoIter<Value>, usize);

impl<'de> SeqAccess<'de> for Items {
    type Error = DecodeError;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, DecodeError> {
        let Some(item) = self.0.next() else { return Ok(None) };
        let index = self.1;
        self.1 += 1;
        seed.deserialize(Decoder(item)).map(Some).map_err(|e| e.inside(&index.to_string()))
    }
}

#[cfg(test)]
mod tests;
