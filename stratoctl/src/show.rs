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
            ("memory" | "rss", Value::Number(n)) => bytes(n.as_u64().unwrap_or(0)),
            ("uptime", Value::Number(n)) => duration(n.as_f64().unwrap_or(0.0)),
            (_, Value::String(word)) => word.clone(),
            (_, Value::Array(lines)) if lines.is_empty() => continue,
            (_, Value::Array(lines)) => {
                let lines = lines.iter().filter_map(Value::as_str);
                lines.map(|line| format!("\n    {line}")).collect()
            }
            (_, Value::Object(_)) => {
                format!("{value:#}").lines().map(|line| format!("\n    {line}")).collect()
            }
            (_, other) => other.to_string(),
        };
        let line = match shown.starts_with('\n') {
            true => format!("{name}:{shown}\n"),
            false => format!("{:<9}{shown}\n", format!("{name}:")),
        };
        text.push_str(&line);
    }
    text
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
