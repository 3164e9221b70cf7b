//! Problems of a command line or a file: place, value, and what is allowed.
use std::fmt;
use std::path::{Path, absolute};

use crate::{DeviceConfig, MachineConfig, Part};

/// Longest part of a user's text that a message quotes, in characters.
const SHOWN: usize = 160;

/// Where a value was given: a flag or a key of the JSON file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Place {
    /// A flag with its value, and perhaps one of its keys.
    Flag(String),
    /// A file and the path of a key in it; the path is empty for the file as a whole.
    Json { file: String, path: String },
}

impl Place {
    /// The place of `key` inside this one; this place itself for an empty key.
    pub(crate) fn key(&self, key: &str) -> Self {
        let key = shortened(key);
        match self {
            place if key.is_empty() => place.clone(),
            Self::Flag(flag) => Self::Flag(format!("{flag}: {key}")),
            Self::Json { file, path } => {
                let dot = if path.is_empty() { "" } else { "." };
                Self::Json { file: file.clone(), path: format!("{path}{dot}{key}") }
            }
        }
    }

    /// The place of a key that the file calls `json` and flags call `flag`.
    pub(crate) fn key_of(&self, json: &str, flag: &str) -> Self {
        self.key(if matches!(self, Self::Flag(_)) { flag } else { json })
    }

    /// The place of item `index` of this list.
    pub(crate) fn item(&self, index: usize) -> Self {
        match self {
            Self::Flag(flag) => Self::Flag(format!("{flag}[{index}]")),
            Self::Json { file, path } => {
                Self::Json { file: file.clone(), path: format!("{path}[{index}]") }
            }
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(flag) => f.write_str(flag),
            Self::Json { file, path } if path.is_empty() => f.write_str(file),
            Self::Json { file, path } => write!(f, "{file}: {path}"),
        }
    }
}

/// Where each part of a machine was requested.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places(Vec<(Part, Place)>);

impl Places {
    /// Record that `part` was given at `place`, replacing any earlier place.
    pub(crate) fn note(&mut self, part: Part, place: Place) {
        self.0.push((part, place));
    }

    /// The problems that keep the machine that `config` describes from being built, each with the
    /// place of its part: `errors`, each with the part of the configuration that it is about, if a
    /// single one.
    pub fn explain(
        &self,
        errors: impl IntoIterator<Item = (Option<Part>, String)>,
        config: &MachineConfig,
    ) -> Problems {
        let mut problems = Problems::default();
        for (part, error) in errors {
            let place = self.0.iter().rev().find(|(of, _)| Some(of) == part.as_ref());
            match place {
                Some((part, place)) => {
                    let beside = beside(place, part, config).unwrap_or_default();
                    problems.add(place, format!("{error}{beside}"));
                }
                None => problems.add_line(format!("stratovirt: {error}")),
            }
        }
        problems
    }
}

/// A hint for a relative path in a file that does not exist from the working directory, but does
/// from the file's own directory.
fn beside(place: &Place, part: &Part, config: &MachineConfig) -> Option<String> {
    let Place::Json { file, .. } = place else { return None };
    let path = match part {
        Part::Kernel => &config.boot.kernel,
        Part::Initrd => config.boot.initrd.as_ref()?,
        Part::MemoryPath => config.memory.path.as_ref()?,
        Part::Disk(id) => &config.disks.iter().find(|disk| disk.id == *id)?.path,
        Part::Device(slot) => {
            let of = |device: &&DeviceConfig| device.facts().slot() == *slot;
            config.devices.iter().find(of)?.facts().path()?
        }
        _ => return None,
    };
    let there = absolute(Path::new(file)).ok()?.parent()?.join(path);
    (path.is_relative() && !path.exists() && there.exists()).then(|| {
        format!(
            "; a relative path begins in the working directory, and the file is beside this one: {}",
            there.display()
        )
    })
}

/// All problems, one line each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Problems(Vec<String>);

impl Problems {
    /// Whether there are no problems.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The problems in the order in which they were found, each one line.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }

    /// A problem of `place` as a whole.
    pub(crate) fn add(&mut self, place: &Place, rule: impl fmt::Display) {
        self.push(format!("{place}: {rule}"));
    }

    /// A problem of `value` at `place`.
    pub(crate) fn add_value(&mut self, place: &Place, value: &str, rule: impl fmt::Display) {
        self.push(format!("{place}: '{}': {rule}", shortened(value)));
    }

    /// A problem of the command line as a whole.
    pub(crate) fn add_line(&mut self, line: impl fmt::Display) {
        self.push(line.to_string());
    }

    pub(crate) fn extend(&mut self, others: Self) {
        others.0.into_iter().for_each(|line| self.push(line));
    }

    fn push(&mut self, line: String) {
        self.0.push(printable(&line));
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Problems {}

/// `text` cut to a readable length.
pub(crate) fn shortened(text: &str) -> String {
    match text.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

/// Escape control characters: a message must not control the terminal.
fn printable(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() })
        .collect()
}

/// `; did you mean 'x'?` when one of `known` is close to `word`, else nothing.
pub(crate) fn did_you_mean<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    // Long words are not typing errors, and the distance costs the product of the lengths.
    if word.len() > 64 {
        return String::new();
    }
    let word = word.to_lowercase().replace('-', "_");
    known
        .into_iter()
        .map(|name| (strsim::osa_distance(&word, &name.to_lowercase().replace('-', "_")), name))
        .filter(|(distance, name)| *distance <= 2 && *distance * 3 <= name.len())
        .min()
        .map(|(_, name)| format!("; did you mean '{name}'?"))
        .unwrap_or_default()
}
