//! The JSON file: its tree, then its sections.
//!
//! The tree is our own and not `serde_json::Value`: that keeps the last of two equal keys silently.
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;
use serde::de::{MapAccess, SeqAccess, Visitor};

use super::draft::Draft;
use super::fields::{Fields, Raw};
use super::kinds::{KINDS, Section};
use super::problem::{Place, did_you_mean};
use super::{action, chars, objects, system};

/// Most bytes of a file; a full description has two thousand.
const MAX_FILE: u64 = 256 << 10;

/// Anything JSON can say. serde_json stops at a depth of 128.
#[derive(Debug)]
enum Tree {
    Null,
    Bool(bool),
    Number(String),
    Text(String),
    List(Vec<Tree>),
    Object(Vec<(String, Tree)>),
}

/// Sections that are not about a kind of devices.
const SECTIONS: &[(&str, Section)] = &[
    ("boot-source", Section::Object(system::boot_source)),
    ("machine-config", Section::Object(system::machine_config)),
    ("domain", Section::Object(action::domain)),
    ("serial", Section::Object(chars::json_serial)),
    ("iothread", Section::List(objects::iothread)),
    ("vsock", Section::Refused("virtio-vsock")),
];

fn known() -> impl Iterator<Item = &'static (&'static str, Section)> {
    SECTIONS.iter().chain(KINDS.iter().map(|kind| &kind.section))
}

/// `-config FILE`.
pub(crate) fn config(draft: &mut Draft, f: &mut Fields) {
    let Some(path) = f.path("") else { return };
    match read(&path) {
        Ok(text) => read_text(draft, &path.to_string_lossy(), &text),
        Err(rule) => {
            f.problem("", format!("{}: {rule}", path.display()));
            unread(draft);
        }
    }
}

/// What the file would have said is not known: no second complaint that the kernel is missing.
fn unread(draft: &mut Draft) {
    draft.kernel.get_or_insert_default();
}

fn read(path: &Path) -> Result<Vec<u8>, String> {
    let mut text = vec![];
    File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut text))
        .map_err(|e| format!("Failed to open config file by: {e}"))?;
    if text.len() as u64 > MAX_FILE {
        return Err(format!("too large, at most {MAX_FILE} bytes"));
    }
    Ok(text)
}

/// Takes what a file says; `file` is its name for messages.
pub(crate) fn read_text(draft: &mut Draft, file: &str, text: &[u8]) {
    let root = Place::Json { file: file.to_owned(), path: String::new() };
    match serde_json::from_slice(text) {
        Ok(Tree::Object(sections)) => sections_of(draft, &root, sections),
        Ok(other) => {
            draft.problems.add(&root, format!("{}; must be an object", other.kind()));
            unread(draft);
        }
        Err(e) => {
            draft.problems.add(&root, format!("not JSON: {e}"));
            unread(draft);
        }
    }
}

fn sections_of(draft: &mut Draft, root: &Place, sections: Vec<(String, Tree)>) {
    let mut seen = std::collections::HashSet::new();
    for (key, tree) in sections {
        let place = root.key(&key);
        let Some((_, section)) = known().find(|(name, _)| *name == key) else {
            let built = known().filter(|(_, s)| !matches!(s, Section::Refused(_)));
            let names: Vec<_> = built.map(|(name, _)| *name).collect();
            let hint = did_you_mean(&key, names.iter().copied());
            let hint = if hint.is_empty() { ";" } else { &hint };
            draft.problems.add(&place, format!("unknown{hint} allowed: {}", names.join(", ")));
            continue;
        };
        if !seen.insert(key) {
            draft.problems.add(&place, "given more than once");
            continue;
        }
        match (*section, tree) {
            (Section::Refused(what), _) => {
                draft.problems.add(&place, format!("{what} is not built yet: leave it out"));
            }
            (Section::Object(take), Tree::Object(items)) => object(draft, place, items, take),
            (Section::List(take), Tree::List(list)) => {
                for (index, item) in list.into_iter().enumerate() {
                    let place = place.item(index);
                    match item {
                        Tree::Object(items) => object(draft, place, items, take),
                        other => {
                            let rule = format!("{}; must be an object", other.kind());
                            draft.problems.add(&place, rule);
                        }
                    }
                }
            }
            (Section::Object(_), other) => {
                unread(draft);
                draft.problems.add(&place, format!("{}; must be an object", other.kind()));
            }
            (Section::List(_), other) => {
                draft.problems.add(&place, format!("{}; must be a list of objects", other.kind()));
            }
        }
    }
}

fn object(
    draft: &mut Draft,
    place: Place,
    items: Vec<(String, Tree)>,
    take: fn(&mut Draft, &mut Fields),
) {
    let items = items.into_iter().map(|(key, tree)| (key, tree.into_raw())).collect();
    let mut fields = Fields::new(place, items);
    take(draft, &mut fields);
    draft.problems.extend(fields.done());
}

impl Tree {
    fn kind(&self) -> &'static str {
        match self {
            Self::Null => "null",
            Self::Bool(_) => "a truth value",
            Self::Number(_) => "a number",
            Self::Text(_) => "a string",
            Self::List(_) => "a list",
            Self::Object(_) => "an object",
        }
    }

    fn into_raw(self) -> Raw {
        let kind = self.kind();
        match self {
            Self::Text(text) => Raw::Text(text),
            Self::Number(text) => Raw::Scalar(kind, text),
            Self::Bool(value) => Raw::Scalar(kind, value.to_string()),
            Self::Null | Self::List(_) | Self::Object(_) => Raw::Other(kind),
        }
    }
}

impl<'de> Deserialize<'de> for Tree {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TreeVisitor)
    }
}

struct TreeVisitor;

impl<'de> Visitor<'de> for TreeVisitor {
    type Value = Tree;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Tree, E> {
        Ok(Tree::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Tree, E> {
        Ok(Tree::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Tree, E> {
        Ok(Tree::Number(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Tree, E> {
        Ok(Tree::Number(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Tree, E> {
        Ok(Tree::Number(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Tree, E> {
        Ok(Tree::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Tree, E> {
        Ok(Tree::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Tree, A::Error> {
        let mut list = vec![];
        while let Some(item) = seq.next_element()? {
            list.push(item);
        }
        Ok(Tree::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Tree, A::Error> {
        let mut object = vec![];
        while let Some(entry) = map.next_entry()? {
            object.push(entry);
        }
        Ok(Tree::Object(object))
    }
}
