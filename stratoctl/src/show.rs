//! Formatting of values for people.
use std::{
    fmt,
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::Path,
};

use serde_json::Value;
use state::regular_file::open_regular;

/// A table whose columns are as wide as they need to be.
pub struct Table<const N: usize> {
    rows: Vec<[String; N]>,
}

impl<const N: usize> Table<N> {
    /// A table with these headings.
    pub fn new(headings: [&str; N]) -> Self {
        Self { rows: vec![headings.map(str::to_owned)] }
    }

    /// Add a row.
    pub fn row(&mut self, cells: [String; N]) {
        self.rows.push(cells);
    }
}

impl<const N: usize> fmt::Display for Table<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(String::len).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..N).map(width).collect();
        for row in &self.rows {
            let padded: Vec<String> =
                row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
            writeln!(f, "{}", padded.join("  ").trim_end())?;
        }
        Ok(())
    }
}

/// Bytes, in the largest unit that leaves a non-zero digit before the point.
pub fn bytes(count: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let unit = UNITS.iter().find(|(_, shift)| count >> shift > 0);
    let Some((unit, shift)) = unit else { return format!("{count} B") };
    let tenths = (u128::from(count) * 10) >> shift;
    match tenths % 10 {
        0 => format!("{} {unit}", tenths / 10),
        part => format!("{}.{part} {unit}", tenths / 10),
    }
}

/// Seconds, as days and a time.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds as u64;
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let time = format!("{:02}:{:02}:{:02}", rest / 3600, rest / 60 % 60, rest % 60);
    if days == 0 { time } else { format!("{days}d {time}") }
}

/// An object's members, one per line.
pub fn members(object: &Value) -> String {
    let mut text = String::new();
    for (name, value) in object.as_object().into_iter().flatten() {
        let shown = match (name.as_str(), value) {
            (_, Value::Null) => continue,
            ("uptime", Value::Number(n)) => duration(n.as_f64().unwrap_or(0.0)),
            ("replication", Value::Object(_)) => inner(value),
            (_, Value::String(word)) => word.clone(),
            (_, Value::Array(lines)) if lines.is_empty() => continue,
            (_, Value::Array(lines)) => {
                let lines = lines.iter().filter_map(Value::as_str);
                lines.map(|line| format!("\n    {line}")).collect()
            }
            (_, Value::Object(_)) => {
                format!("{value:#}").lines().map(|line| format!("\n    {line}")).collect()
            }
            (name, other) => scalar(name, other),
        };
        let line = match shown.starts_with('\n') {
            true => format!("{name}:{shown}\n"),
            false => format!("{:<9}{shown}\n", format!("{name}:")),
        };
        text.push_str(&line);
    }
    text
}

/// The members of an object in an object, one per line, except those that are null.
fn inner(object: &Value) -> String {
    let members = object.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    let line = |(name, value): (&String, &Value)| {
        let shown = match value {
            Value::Object(parts) => {
                let part =
                    |(name, value): (&String, &Value)| format!("{name} {}", scalar(name, value));
                parts.iter().map(part).collect::<Vec<_>>().join(", ")
            }
            other => scalar(name, other),
        };
        format!("\n    {:<14} {shown}", format!("{name}:"))
    };
    members.map(line).collect()
}

/// A value, by the unit that its name ends with.
fn scalar(name: &str, value: &Value) -> String {
    match (value, value.as_u64()) {
        (Value::String(word), _) => word.clone(),
        (_, Some(n)) if matches!(name, "memory" | "rss") || name.ends_with("bytes") => bytes(n),
        (_, Some(n)) if name.ends_with("-us") => format!("{}.{:03} ms", n / 1000, n % 1000),
        (other, _) => other.to_string(),
    }
}

/// The last lines of a log, which may be long and may contain anything.
pub fn last_lines(path: &Path, most: usize) -> Vec<String> {
    const END: u64 = 16 << 10;
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = open_regular(path, File::options().read(true))?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(END)))?;
        let mut text = Vec::new();
        file.take(END).read_to_end(&mut text)?;
        Ok(text)
    };
    let text = read().unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(most);
    let plain = |line: &&str| line.chars().filter(|c| !c.is_control()).collect();
    lines.iter().skip(from).map(plain).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn members_are_lines_and_numbers_have_their_units() {
        let shown = members(&json!({ "name": "web", "rss": 2048, "disks": [], "policy": null,
            "replication": { "state": "protected", "oldest-us": 2500, "held-bytes": 1536,
                "peer": null, "last-failover": { "detect-us": 90, "run-us": 7001 } } }));
        let lines = [
            "name:    web",
            "rss:     2 KiB",
            "replication:",
            "    state:         protected",
            "    oldest-us:     2.500 ms",
            "    held-bytes:    1.5 KiB",
            "    last-failover: detect-us 0.090 ms, run-us 7.001 ms",
            "",
        ];
        assert_eq!(shown, lines.join("\n"));
    }
}
