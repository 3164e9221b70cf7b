//! One part of a saved machine, identified by its kind and id, in the version in which it was
//! written.
use memchr::memchr2;
use serde::{Deserialize, Deserializer, Serialize, de::DeserializeOwned};
use serde_json::{Value, value::RawValue};

/// Deepest nesting of JSON in a section. Nothing written here comes close.
pub const MAX_DEPTH: usize = 64;

/// The saved form of a component. It is never the component's run-time type, even where the fields
/// are equal today: the saved form may only change together with its version.
pub trait Saved: Serialize + DeserializeOwned {
    /// Which part of a machine it is; never reused for another part.
    const KIND: &'static str;
    /// Raised with every change of the form. There is a golden file of each released version.
    const VERSION: u32;

    /// Convert the output of version `from` to that of version `from + 1`: rename fields, and give
    /// new ones the value that was implied before they existed. Called for each version up to the
    /// current one.
    ///
    /// # Errors
    /// When no such version was ever released, or `value` does not have its form.
    fn upgrade(from: u32, value: Value) -> Result<Value, SectionError> {
        let _ = value;
        Err(SectionError::Version { kind: Self::KIND.into(), found: from, known: Self::VERSION })
    }
}

/// A part of a saved machine, or of another part.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Section {
    /// [`Saved::KIND`].
    pub kind: String,
    /// Distinguishes parts of one kind; empty where there is only one.
    pub id: String,
    /// The [`Saved::VERSION`] of the program that wrote it.
    pub version: u32,
    /// Its contents in the form of that version.
    pub state: Box<RawValue>,
}

/// Why a part cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the error messages describe them")]
pub enum SectionError {
    #[error("it is of kind {found:?}; {expected:?} was expected")]
    Kind { found: String, expected: &'static str },
    #[error(
        "{kind} is of version {found}, and this program knows versions up to {known}: it was \
         written by a newer one, which can restore it"
    )]
    Newer { kind: String, found: u32, known: u32 },
    #[error("{kind} is of version {found}; no program wrote such a version (this one: {known})")]
    Version { kind: String, found: u32, known: u32 },
    #[error("its contents are not valid")]
    Malformed(#[from] serde_json::Error),
    #[error("its values are nested more than {MAX_DEPTH} levels deep")]
    TooDeep,
}

impl Section {
    /// Encode `saved` as the part `id`.
    ///
    /// # Errors
    /// When it cannot be encoded as JSON, for example because of a path that is not UTF-8.
    pub fn of<S: Saved>(id: impl Into<String>, saved: &S) -> Result<Self, SectionError> {
        let state = serde_json::value::to_raw_value(saved)?;
        Ok(Self { kind: S::KIND.into(), id: id.into(), version: S::VERSION, state })
    }

    /// Decode its contents, upgraded to the current version.
    ///
    /// # Errors
    /// When it has another kind, an unknown version, or an invalid form.
    pub fn read<S: Saved>(&self) -> Result<S, SectionError> {
        if self.kind != S::KIND {
            return Err(SectionError::Kind { found: self.kind.clone(), expected: S::KIND });
        }
        if self.version == S::VERSION {
            return Ok(serde_json::from_str(self.state.get())?);
        }
        if self.version > S::VERSION {
            let (kind, found, known) = (self.kind.clone(), self.version, S::VERSION);
            return Err(SectionError::Newer { kind, found, known });
        }
        let mut value = serde_json::from_str(self.state.get())?;
        for version in self.version..S::VERSION {
            value = S::upgrade(version, value)?;
        }
        Ok(serde_json::from_value(value)?)
    }

    /// Decode a section from its bytes.
    ///
    /// # Errors
    /// When they are not a valid section.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, SectionError> {
        check_depth(bytes)?;
        Ok(serde_json::from_slice(bytes)?)
    }

    /// The same section with other JSON as its state.
    ///
    /// # Errors
    /// When that is invalid.
    pub fn with(&self, json: impl Into<String>) -> Result<Self, SectionError> {
        Ok(Self { state: RawValue::from_string(json.into())?, ..self.clone() })
    }

    /// Kind and id, for messages.
    pub fn name(&self) -> String {
        name(&self.kind, &self.id)
    }
}

impl PartialEq for Section {
    fn eq(&self, other: &Self) -> bool {
        (&self.kind, &self.id, self.version) == (&other.kind, &other.id, other.version)
            && self.state.get() == other.state.get()
    }
}

impl Eq for Section {}

/// Deserialises a field that may be `null` but must not be missing. A field that an older version
/// lacked gets its value from [`Saved::upgrade`] only.
///
/// # Errors
/// When it is neither `null` nor a `T`.
pub fn required<'de, T, D>(from: D) -> Result<Option<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    Option::deserialize(from)
}

/// Kind and id, for messages.
pub fn name(kind: &str, id: &str) -> String {
    if id.is_empty() { kind.to_owned() } else { format!("{kind} {id}") }
}

/// Kind and id of a section whose bytes may be damaged, for the error message.
pub fn peek(bytes: &[u8]) -> Option<String> {
    const LONGEST: usize = 255;
    let begin = bytes.get(..2 * LONGEST + 64).unwrap_or(bytes);
    let text = begin.utf8_chunks().next()?.valid();
    let (kind, rest) = text.strip_prefix("{\"kind\":\"")?.split_once('"')?;
    let (id, _) = rest.strip_prefix(",\"id\":\"")?.split_once('"')?;
    let plain = |word: &str| word.len() <= LONGEST && !word.contains(char::is_control);
    (plain(kind) && plain(id)).then(|| name(kind, id))
}

/// Check the depth beforehand, as nested values are kept unparsed.
fn check_depth(bytes: &[u8]) -> Result<(), SectionError> {
    let (mut depth, mut rest) = (0usize, bytes);
    while let Some((byte, after)) = rest.split_first() {
        rest = after;
        match byte {
            b'"' => rest = after_string(rest),
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_DEPTH {
            return Err(SectionError::TooDeep);
        }
    }
    Ok(())
}

/// What follows the string that `bytes` begin in. Most of a section is strings of thousands of
/// digits.
fn after_string(mut bytes: &[u8]) -> &[u8] {
    while let Some(at) = memchr2(b'"', b'\\', bytes) {
        let escape = bytes.get(at) == Some(&b'\\');
        bytes = bytes.get(at + 1 + usize::from(escape)..).unwrap_or_default();
        if !escape {
            return bytes;
        }
    }
    &[]
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Version 1 had `hertz`; version 2 `khz`; version 3 adds `scaled`, which was always false
    /// before.
    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Timer {
        khz: u64,
        scaled: bool,
    }

    impl Saved for Timer {
        const KIND: &'static str = "timer";
        const VERSION: u32 = 3;

        fn upgrade(from: u32, mut value: Value) -> Result<Value, SectionError> {
            match from {
                1 => {
                    let hertz = value["hertz"].as_u64().unwrap_or(0);
                    value = json!({ "khz": hertz / 1000 });
                }
                2 => value["scaled"] = json!(false),
                found => {
                    let (kind, known) = (Self::KIND.into(), Self::VERSION);
                    return Err(SectionError::Version { kind, found, known });
                }
            }
            Ok(value)
        }
    }

    fn section(version: u32, state: &Value) -> Section {
        let text = json!({ "kind": "timer", "id": "t", "version": version, "state": state });
        Section::from_bytes(text.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn every_version_is_read_as_the_present_one() {
        let timer = Timer { khz: 5, scaled: false };
        for (version, state) in [
            (1, json!({ "hertz": 5000 })),
            (2, json!({ "khz": 5 })),
            (3, json!({ "khz": 5, "scaled": false })),
        ] {
            assert_eq!(section(version, &state).read::<Timer>().unwrap(), timer);
        }
        let written = Section::of("t", &timer).unwrap();
        assert_eq!(written, section(3, &json!({ "khz": 5, "scaled": false })));
    }

    #[test]
    fn what_no_version_wrote_is_refused() {
        for (version, state, says) in [
            (3, json!({ "khz": 5 }), "not valid"),
            (3, json!({ "khz": 5, "scaled": false, "more": 1 }), "not valid"),
            (2, json!({ "khz": 5, "more": 1 }), "not valid"),
            (4, json!({ "khz": 5, "scaled": false }), "newer"),
            (0, json!({}), "no program wrote"),
        ] {
            let error = section(version, &state).read::<Timer>().unwrap_err().to_string();
            assert!(error.contains(says), "{version} {state}: {error}");
        }
    }

    #[test]
    fn nested_values_stay_json_and_have_a_bottom() {
        let nested = |levels: usize| {
            let state = format!("{}{}", "[".repeat(levels), "]".repeat(levels));
            format!(r#"{{"kind":"k","id":"","version":1,"state":{state}}}"#)
        };
        let section = Section::from_bytes(nested(MAX_DEPTH - 1).as_bytes()).unwrap();
        assert_eq!(serde_json::to_string(&section).unwrap(), nested(MAX_DEPTH - 1));
        for levels in [MAX_DEPTH, 100_000] {
            let error = Section::from_bytes(nested(levels).as_bytes()).unwrap_err();
            assert!(matches!(error, SectionError::TooDeep), "{error}");
        }
        for brackets in [format!(r#"\"{}"#, "[".repeat(99)), format!(r#"{}\\"#, "[".repeat(99))] {
            let section = format!(r#"{{"kind":"k","id":"{brackets}","version":1,"state":0}}"#);
            Section::from_bytes(section.as_bytes()).expect("in a string they are no levels");
        }
    }

    #[test]
    fn a_damaged_section_still_has_its_name() {
        let whole = serde_json::to_vec(&Section::of("t", &Timer { khz: 1, scaled: true }).unwrap());
        assert_eq!(peek(&whole.unwrap()[..40]).as_deref(), Some("timer t"));
        assert_eq!(peek(b"{\"kind\":\"timer"), None);
        assert_eq!(peek(&[0xff; 8]), None);
    }
}
