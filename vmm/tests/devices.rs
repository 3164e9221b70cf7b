//! Checks the table of `docs/adding-a-device.md`: it says for every device what that supports.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
use std::{fs, path::Path};

use config::cli::models;

const COLUMNS: [&str; 8] = [
    "save",
    "incremental",
    "stream",
    "restore elsewhere",
    "reset",
    "hot-plug",
    "filter",
    "replication",
];

fn cells(line: &str) -> Vec<&str> {
    line.trim_matches('|').split('|').map(str::trim).collect()
}

/// Whether a source file under `dir` contains `text`.
fn said(dir: &Path, text: &str) -> bool {
    fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).any(|path| {
        match path.extension() {
            _ if path.is_dir() => said(&path, text),
            Some(rs) if rs == "rs" => fs::read_to_string(&path).unwrap().contains(text),
            _ => false,
        }
    })
}

#[test]
fn every_device_says_what_it_can_do_and_what_refuses_the_rest() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let page = fs::read_to_string(root.join("docs/adding-a-device.md")).unwrap();
    let mut table = page.lines().skip_while(|line| !line.starts_with("| model |"));
    let head = cells(table.next().expect("a table of the models"));
    assert_eq!(head[1..], COLUMNS);
    let rows: Vec<_> = table.skip(1).take_while(|line| line.starts_with('|')).map(cells).collect();
    let models = models();
    for model in &models {
        let own = rows.iter().filter(|row| row[0] == format!("`{}`", model.name)).count();
        assert_eq!(own, 1, "{}: one row of docs/adding-a-device.md", model.name);
    }
    assert_eq!(rows.len(), models.len(), "a row for a model that there is not");
    let sources = ["config/src", "devices/src", "machine/src", "vmm/src"];
    for row in &rows {
        assert_eq!(row.len(), 1 + COLUMNS.len(), "{row:?}");
        for (column, cell) in COLUMNS.iter().zip(&row[1..]) {
            let message = cell.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
            let holds = match message {
                Some(message) => sources.iter().any(|dir| said(&root.join(dir), message)),
                None => *cell == "works",
            };
            assert!(holds, "{}, {column}: '{cell}' is neither \"works\" nor a message", row[0]);
        }
    }
}
