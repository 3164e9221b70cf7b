//! Keys with values: what follows a flag (`key=value,key=value`) and an object of the JSON file.
//!
//! A reader asks for each key it knows. Keys that it never asks for are unknown, and those it asks
//! for make up the list of allowed keys: there is no second list to maintain.
use std::collections::HashSet;
use std::ops::RangeInclusive;
use std::path::PathBuf;

use super::problem::{Place, Problems, did_you_mean};
use crate::types::{Id, MemorySize, Rate, ValueError};
use crate::value::{self, Rule};

/// A value as given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Raw {
    /// Text: words of the command line, strings of JSON.
    Text(String),
    /// Number or boolean of JSON.
    Scalar(&'static str, String),
    /// A key without a value, such as `server` in `-qmp unix:PATH,server,nowait`.
    Bare,
    /// null, list or object of JSON.
    Other(&'static str),
}

/// The type of a key's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Text.
    Text,
    /// A number.
    Number,
    /// A number of bytes.
    Size,
    /// A boolean.
    Bool,
}

/// Keys with values, and the problems found in them.
#[derive(Debug)]
pub(crate) struct Fields {
    place: Place,
    items: Vec<(String, Raw)>,
    /// Keys asked for, in order, and the type of each.
    known: Vec<(&'static str, Kind)>,
    /// Keys that exist elsewhere and are refused by name.
    refused: Vec<&'static str>,
    /// Unknown keys are not reported any more.
    abandoned: bool,
    problems: Problems,
}

impl Fields {
    /// From the given items; a repeated key is a problem, and its first value counts.
    pub(crate) fn new(place: Place, given: Vec<(String, Raw)>) -> Self {
        let mut problems = Problems::default();
        let mut items: Vec<(String, Raw)> = Vec::with_capacity(given.len());
        let mut seen = HashSet::new();
        for (key, raw) in given {
            if seen.insert(key.clone()) {
                items.push((key, raw));
            } else {
                problems.add(&place.key(&key), "given more than once");
            }
        }
        Self { place, items, known: vec![], refused: vec![], abandoned: false, problems }
    }

    /// From a flag with one plain value, whose key is empty.
    pub(crate) fn plain(place: Place, word: Option<&str>) -> Self {
        let items = word.map(|w| (String::new(), Raw::Text(w.to_owned())));
        Self::new(place, items.into_iter().collect())
    }

    /// From `[value,]key=value,...`: a first word without `=`, or with one only after a colon (as
    /// in `unix:/a=b`), is the value of `lead`, if there is one.
    pub(crate) fn properties(place: Place, text: &str, lead: Option<&str>) -> Self {
        let mut items = vec![];
        let mut problems = Problems::default();
        for (index, word) in text.split(',').enumerate() {
            let pair = word.split_once('=').filter(|(key, _)| index > 0 || !key.contains(':'));
            match (pair, lead) {
                _ if word.is_empty() => {
                    problems.add(&place, "a comma with nothing before or after it");
                }
                (Some(("", _)), _) => problems.add_value(&place, word, "must be key=value"),
                (Some((key, word)), _) => items.push((key.into(), Raw::Text(word.into()))),
                (None, Some(lead)) if index == 0 => {
                    items.push((lead.to_owned(), Raw::Text(word.into())));
                }
                (None, _) => items.push((word.into(), Raw::Bare)),
            }
        }
        let mut fields = Self::new(place, items);
        fields.problems.extend(problems);
        fields
    }

    /// Where they were given.
    pub(crate) fn place(&self) -> &Place {
        &self.place
    }

    /// Whether the key is given, with any value.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.items.iter().any(|(k, _)| k == key)
    }

    /// A value made by `parse`; `None` when not given or wrong.
    pub(crate) fn text<T>(
        &mut self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, Rule>,
    ) -> Option<T> {
        self.get(key, Kind::Text, "a string", &[], parse)
    }

    /// An id or name.
    pub(crate) fn id(&mut self, key: &'static str) -> Option<Id> {
        self.text(key, value::id)
    }

    /// A path.
    pub(crate) fn path(&mut self, key: &'static str) -> Option<PathBuf> {
        self.text(key, value::path)
    }

    /// A number in `range`.
    pub(crate) fn number<N>(&mut self, key: &'static str, range: RangeInclusive<N>) -> Option<N>
    where
        N: std::str::FromStr + PartialOrd + std::fmt::Display,
    {
        self.get(key, Kind::Number, "a number", &["a number"], |word| value::number(word, range))
    }

    /// A number that is a `T`.
    pub(crate) fn parsed<T>(&mut self, key: &'static str) -> Option<T>
    where
        T: std::str::FromStr<Err = ValueError>,
    {
        self.get(key, Kind::Number, "a number", &["a number"], |word| {
            word.parse().map_err(|e: ValueError| e.to_string())
        })
    }

    /// A limit per second; 0 means unlimited.
    pub(crate) fn rate<const MIN: u64, const MAX: u64>(
        &mut self,
        key: &'static str,
    ) -> Option<Rate<MIN, MAX>> {
        let rate = self.get(key, Kind::Number, "a number", &["a number"], |word| {
            Rate::or_unlimited(value::number(word, 0..=MAX)?).map_err(|e| e.to_string())
        });
        rate.flatten()
    }

    /// Guest RAM in bytes.
    pub(crate) fn memory_size(&mut self, key: &'static str) -> Option<MemorySize> {
        self.get(key, Kind::Size, "a number or a string", &["a number"], value::memory_size)
    }

    /// A boolean.
    pub(crate) fn boolean(&mut self, key: &'static str) -> Option<bool> {
        self.get(key, Kind::Bool, "true or false", &["a truth value"], value::boolean)
    }

    /// Whether space that the guest discards goes back to the host.
    pub(crate) fn discard(&mut self, key: &'static str) -> Option<bool> {
        self.get(key, Kind::Text, "true, false or a string", &["a truth value"], value::discard)
    }

    /// A key that stands alone or has a boolean value.
    pub(crate) fn switch(&mut self, key: &'static str) -> Option<bool> {
        if self.items.iter().any(|(k, raw)| k == key && *raw == Raw::Bare) {
            self.know(key, Kind::Bool);
            return Some(true);
        }
        self.boolean(key)
    }

    /// One of `choices`; any other value is a problem.
    pub(crate) fn choice<T: Copy>(
        &mut self,
        key: &'static str,
        choices: &[(&str, Result<T, &str>)],
    ) -> Option<T> {
        self.text(key, |word| choose(word, choices))
    }

    /// Report that `key` exists in StratoVirt and is not supported, if it is given.
    pub(crate) fn refuse(&mut self, key: &'static str, what: &str) {
        self.refused.push(key);
        if self.has(key) {
            self.problem(key, format!("{what} is not supported: leave it out"));
        }
    }

    /// `key` enables an unsupported feature; only off is accepted, which is the default.
    pub(crate) fn only_off(&mut self, key: &'static str, what: &str) {
        if self.boolean(key) == Some(true) {
            self.problem(key, format!("{what} is not supported; use off"));
        }
    }

    /// Each of `keys` must be there.
    pub(crate) fn require(&mut self, keys: &[&'static str]) {
        for key in keys {
            if !self.has(key) {
                self.problem(key, "missing");
            }
        }
    }

    /// A problem with `key`, or with the whole if `key` is empty.
    pub(crate) fn problem(&mut self, key: &str, rule: impl std::fmt::Display) {
        let place = self.place.key(key);
        self.problems.add(&place, rule);
    }

    /// Report no problems about the other keys.
    pub(crate) fn abandon(&mut self) {
        self.abandoned = true;
    }

    /// The problems, including unknown keys.
    pub(crate) fn done(mut self) -> Problems {
        if self.abandoned {
            return self.problems;
        }
        let allowed: Vec<_> = self.keys().filter(|key| !key.is_empty()).collect();
        let allowed = allowed.join(", ");
        for (key, raw) in &self.items {
            if self.keys().any(|known| known == key) || self.refused.contains(&key.as_str()) {
                continue;
            }
            let hint = did_you_mean(key, self.keys());
            let rule = match (raw, allowed.as_str()) {
                (_, "") => "unknown: no key is allowed here".to_owned(),
                _ => format!(
                    "unknown{hint}{} allowed: {allowed}",
                    if hint.is_empty() { ";" } else { "" }
                ),
            };
            self.problems.add(&self.place.key(key), rule);
        }
        self.problems
    }

    fn know(&mut self, key: &'static str, kind: Kind) {
        if !self.keys().any(|known| known == key) {
            self.known.push((key, kind));
        }
    }

    fn keys(&self) -> impl Iterator<Item = &'static str> {
        self.known.iter().map(|(key, _)| *key)
    }

    /// The keys that were asked for, and the type of each.
    pub(crate) fn known(&self) -> impl Iterator<Item = (&'static str, Kind)> {
        self.known.iter().copied()
    }

    fn get<T>(
        &mut self,
        key: &'static str,
        kind: Kind,
        wanted: &str,
        scalars: &[&str],
        parse: impl FnOnce(&str) -> Result<T, Rule>,
    ) -> Option<T> {
        self.know(key, kind);
        let (_, raw) = self.items.iter().find(|(k, _)| k == key)?;
        let place = self.place.key(key);
        match raw {
            Raw::Text(word) => match parse(word) {
                Ok(value) => return Some(value),
                Err(rule) => self.problems.add_value(&place, word, rule),
            },
            Raw::Scalar(kind, word) if scalars.contains(kind) => match parse(word) {
                Ok(value) => return Some(value),
                Err(rule) => self.problems.add_value(&place, word, rule),
            },
            Raw::Scalar(kind, word) => {
                self.problems.add_value(&place, word, format!("{kind}; must be {wanted}"));
            }
            Raw::Bare => self.problems.add(&place, format!("needs a value, {key}=...")),
            Raw::Other(kind) => self.problems.add(&place, format!("{kind}; must be {wanted}")),
        }
        None
    }
}

/// The choice that `word` names; an `Err` in a choice says why it is not supported.
pub(crate) fn choose<T: Copy>(word: &str, choices: &[(&str, Result<T, &str>)]) -> Result<T, Rule> {
    let known = choices.iter().find(|(name, _)| name.eq_ignore_ascii_case(word));
    let allowed: Vec<_> =
        choices.iter().filter(|(_, c)| c.is_ok()).map(|(name, _)| *name).collect();
    match known {
        Some((_, Ok(choice))) => Ok(*choice),
        Some((_, Err(what))) => Err(format!("{what} is not supported; use {}", allowed.join("|"))),
        None => {
            let hint = did_you_mean(word, allowed.iter().copied());
            Err(format!("must be {}{hint}", allowed.join("|")))
        }
    }
}
