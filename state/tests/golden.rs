//! Saved states written by released programs, which this one has to read. `golden/make` makes them;
//! a test never does.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::BufReader,
    path::{Path, PathBuf},
};

use state::{
    PARTS, Section, State,
    device::VirtioMmio,
    frame::{Kind, Reader},
};

/// Every `state` file.
fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files(&path, found),
            false if path.ends_with("state") => found.push(path),
            false => {}
        }
    }
}

fn golden() -> Vec<PathBuf> {
    let mut found = Vec::new();
    files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"), &mut found);
    assert!(found.len() >= 3, "{found:?}");
    found
}

/// Kind and version of each section in `file`, including nested ones.
fn parts(file: &Path) -> BTreeSet<(String, u32)> {
    let mut reader = Reader::begin(BufReader::new(File::open(file).unwrap())).unwrap();
    let (mut body, mut parts) = (Vec::new(), BTreeSet::new());
    loop {
        match reader.next(&mut body).unwrap() {
            Kind::End => return parts,
            Kind::Config | Kind::Section => {
                let section = Section::from_bytes(&body).unwrap();
                if let Ok(VirtioMmio { device, .. }) = section.read() {
                    parts.insert((device.kind, device.version));
                }
                parts.insert((section.kind, section.version));
            }
            _ => {}
        }
    }
}

#[test]
fn every_released_state_is_read() {
    for file in golden() {
        let state = State::read(BufReader::new(File::open(&file).unwrap()));
        state.unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    }
}

#[test]
fn the_present_version_of_every_part_has_a_golden_file() {
    let known: BTreeSet<_> = golden().iter().flat_map(|file| parts(file)).collect();
    for (kind, version) in PARTS {
        assert!(
            known.contains(&(kind.to_owned(), version)),
            "no golden file has {kind} in version {version}: make one with a release build, by \
             state/tests/golden/make, and commit it"
        );
    }
}
