//! The JSON file: its tree, then its sections. A repeated key is reported as a problem.
use std::fs::File;
use std::io::Read;
use std::path::Path;

use json::Tree;

use super::draft::Draft;
use super::fields::{Fields, Raw};
use super::kinds::{KINDS, Section};
use super::problem::{Place, did_you_mean};
use super::{action, chars, objects, system};

/// Largest file in bytes; a full description has two thousand.
const MAX_FILE: u64 = 256 << 10;

/// Sections that do not belong to one kind of device.
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

/// The file's contents are unknown: do not also report that the kernel is missing.
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

/// Apply the contents of a file; `file` is its name for messages.
pub(crate) fn read_text(draft: &mut Draft, file: &str, text: &[u8]) {
    let root = Place::Json { file: file.to_owned(), path: String::new() };
    match Tree::read(text) {
        Ok(Tree::Object(sections)) => sections_of(draft, &root, sections),
        Ok(other) => {
            draft.problems.add(&root, format!("{}; must be an object", kind(&other)));
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
                draft.problems.add(&place, format!("{what} is not supported: leave it out"));
            }
            (Section::Object(take), Tree::Object(items)) => object(draft, place, items, take),
            (Section::List(take), Tree::List(list)) => {
                for (index, item) in list.into_iter().enumerate() {
                    let place = place.item(index);
                    match item {
                        Tree::Object(items) => object(draft, place, items, take),
                        other => {
                            let rule = format!("{}; must be an object", kind(&other));
                            draft.problems.add(&place, rule);
                        }
                    }
                }
            }
            (Section::Object(_), other) => {
                unread(draft);
                draft.problems.add(&place, format!("{}; must be an object", kind(&other)));
            }
            (Section::List(_), other) => {
                draft.problems.add(&place, format!("{}; must be a list of objects", kind(&other)));
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
    let items = items.into_iter().map(|(key, tree)| (key, raw(tree))).collect();
    let mut fields = Fields::new(place, items);
    take(draft, &mut fields);
    draft.problems.extend(fields.done());
}

/// The type of `tree`, for messages.
fn kind(tree: &Tree) -> &'static str {
    match tree {
        Tree::Null => "null",
        Tree::Bool(_) => "a truth value",
        Tree::Number(_) => "a number",
        Tree::Text(_) => "a string",
        Tree::List(_) => "a list",
        Tree::Object(_) => "an object",
    }
}

fn raw(tree: Tree) -> Raw {
    let kind = kind(&tree);
    match tree {
        Tree::Text(text) => Raw::Text(text),
        Tree::Number(number) => {
            let float = number.as_f64().filter(|_| number.is_f64());
            Raw::Scalar(kind, float.map_or_else(|| number.to_string(), |float| float.to_string()))
        }
        Tree::Bool(value) => Raw::Scalar(kind, value.to_string()),
        Tree::Null | Tree::List(_) | Tree::Object(_) => Raw::Other(kind),
    }
}
