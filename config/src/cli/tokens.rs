//! Arguments to flags with their values.
use std::ffi::OsString;

use super::draft::Draft;
use super::fields::Fields;
use super::flags::flags;
use super::problem::{Place, Problems, did_you_mean, shortened};
use super::table::{self, Effect, Flag, Shape};

/// One flag as it was given.
#[derive(Debug)]
pub(crate) struct Given {
    pub(crate) flag: &'static Flag,
    /// The name that was used, without the dash.
    name: &'static str,
    words: Vec<String>,
    /// One of its words is not valid text, which has been reported.
    unreadable: bool,
}

/// Splits arguments: a word with a dash is a flag, all words up to the next one are its value.
pub(crate) fn scan(args: impl Iterator<Item = OsString>) -> (Vec<Given>, Problems) {
    let mut problems = Problems::default();
    let mut given: Vec<Given> = vec![];
    // Words after an unknown flag belong to it: report nothing about them.
    let mut unknown = false;
    for arg in args {
        let word = match arg.into_string() {
            Ok(word) => word,
            Err(arg) => {
                let shown = arg.to_string_lossy();
                let rule = format!("Argument '{}' is not UTF-8", shortened(&shown));
                match given.last_mut().filter(|_| !unknown && !shown.starts_with('-')) {
                    Some(last) => {
                        problems.add(&Place::Flag(format!("-{}", last.name)), rule);
                        last.words.push(shown.into_owned());
                        last.unreadable = true;
                    }
                    None => problems.add_line(rule),
                }
                continue;
            }
        };
        match word.strip_prefix('-') {
            Some(name) => {
                let found = table::find(name);
                unknown = found.is_none();
                match found {
                    Some((flag, name)) => {
                        given.push(Given { flag, name, words: vec![], unreadable: false })
                    }
                    None => problems.add_line(unexpected(&word)),
                }
            }
            None if unknown => {}
            None => match given.last_mut() {
                Some(last) => last.words.push(word),
                None => problems.add_line(unexpected(&word)),
            },
        }
    }
    let given = merge(given, &mut problems);
    for g in &given {
        g.check_shape(&mut problems);
    }
    (given, problems)
}

fn unexpected(word: &str) -> String {
    let names = flags().flat_map(|flag| flag.names);
    let hint = did_you_mean(word.trim_start_matches('-'), names.copied());
    let hint = hint.replace("mean '", "mean '-");
    format!(
        "Found argument '{}' which wasn't expected, or isn't valid in the context{hint}{} Use '-h' \
         or '-help' to get usage.",
        shortened(word),
        if hint.is_empty() { "." } else { "" },
    )
}

/// Merges repeated flags: words are joined (`-append`), other values kept in order where repetition
/// is allowed.
fn merge(given: Vec<Given>, problems: &mut Problems) -> Vec<Given> {
    let mut merged: Vec<Given> = vec![];
    for g in given {
        let earlier = merged.iter_mut().find(|m| std::ptr::eq(m.flag, g.flag));
        match earlier {
            Some(earlier) if matches!(g.flag.shape, Shape::Words(_)) => {
                g.check_shape(problems);
                earlier.words.extend(g.words);
            }
            Some(_) if !g.flag.repeat => problems.add_line(format!(
                "The argument '{}' was provided more than once: -{} may be given once",
                g.name, g.name
            )),
            _ => merged.push(g),
        }
    }
    merged
}

impl Given {
    fn check_shape(&self, problems: &mut Problems) {
        let name = self.name;
        match (self.flag.shape, self.words.as_slice()) {
            (Shape::Any | Shape::Optional(_) | Shape::OptionalProperties(_), [])
            | (Shape::Any, _)
            | (Shape::Switch, []) => {}
            (Shape::Switch, [first, ..]) => problems.add_line(format!(
                "The value '{}' is illegel for argument '{name}': -{name} takes no value",
                shortened(first)
            )),
            (Shape::Plain(form) | Shape::Words(form) | Shape::Properties(form, _), []) => {
                problems.add_line(format!(
                    "The argument '{name}' requires a value, but none was supplied: -{name} {form}"
                ));
            }
            (Shape::Words(_), _) | (_, [_]) => {}
            (_, [_, second, ..]) => problems.add_line(format!(
                "Found argument '{}' which wasn't expected, or isn't valid in the context: -{name} \
                 takes one value (quote it if it holds a space)",
                shortened(second)
            )),
        }
    }

    /// Takes the flag's values into the draft.
    pub(crate) fn apply(&self, draft: &mut Draft) {
        let Effect::Apply(apply) = self.flag.effect else {
            if let Effect::Refuse(what) = self.flag.effect {
                let rule = format!("{what} is not supported: leave it out");
                draft.problems.add(&Place::Flag(self.shown()), rule);
            }
            return;
        };
        if self.unreadable {
            // The flag's values are unknown: do not also report that the kernel is missing.
            draft.kernel.get_or_insert_default();
            return;
        }
        let place = Place::Flag(self.shown());
        let first = self.words.first();
        let mut fields = match (self.flag.shape, first) {
            // Reported already by `check_shape`.
            (Shape::Plain(_) | Shape::Words(_) | Shape::Properties(..), None) => return,
            (Shape::Words(_), _) => {
                let place = Place::Flag(format!("-{}", self.name));
                Fields::plain(place, Some(&self.words.join(" ")))
            }
            (Shape::Properties(_, lead), Some(word)) => Fields::properties(place, word, lead),
            (Shape::OptionalProperties(_), Some(word)) => Fields::properties(place, word, None),
            (Shape::OptionalProperties(_), None) => Fields::new(place, vec![]),
            (Shape::Plain(_) | Shape::Optional(_), word) => {
                let place = Place::Flag(format!("-{}", self.name));
                Fields::plain(place, word.map(String::as_str))
            }
            (Shape::Switch | Shape::Any, _) => Fields::plain(place, None),
        };
        apply(draft, &mut fields);
        draft.problems.extend(fields.done());
    }

    /// The flag as it was given, shortened.
    pub(crate) fn shown(&self) -> String {
        match self.words.first() {
            Some(word) => format!("-{} {}", self.name, shortened(word)),
            None => format!("-{}", self.name),
        }
    }
}
