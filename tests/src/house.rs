//! The rules of the house that no compiler checks: which crate may know which, how long a file may
//! get, where unsafe code may live.
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use cargo_metadata::MetadataCommand;

/// Each crate and the siblings it may depend on; what is not listed may know none.
const ARROWS: [(&str, &[&str]); 6] = [
    ("state", &[]),
    ("devices", &["state"]),
    ("qmp", &[]),
    ("machine", &["devices", "state"]),
    ("vmm", &["machine", "qmp", "state"]),
    ("stories", &["qmp", "state"]),
];
/// Longest file, in lines without tests.
const LONGEST: usize = 800;
/// Where unsafe code may live: files, and directories with everything in them.
const ROOMS: [&str; 6] = [
    "machine/src/kvm/",
    "machine/src/vcpu/kick.rs",
    "devices/src/testing/descriptors.rs",
    "machine/src/memory.rs",
    "machine/src/memory/",
    "devices/src/backend/",
];
/// What the line above an opt-in begins with.
const REASON: &str = "// UNSAFETY:";

/// Every broken rule under `workspace`, one line each.
///
/// # Errors
/// cargo or the file system does not answer.
pub fn check(workspace: &Path) -> Result<Vec<String>> {
    let mut command = MetadataCommand::new();
    let metadata =
        command.current_dir(workspace).no_deps().exec().context("cargo metadata fails")?;
    let members: Vec<&str> =
        metadata.packages.iter().map(|package| package.name.as_str()).collect();
    let mut broken = Vec::new();
    for package in &metadata.packages {
        // A crate may name itself, to test with another of its features.
        let siblings: Vec<&str> = package
            .dependencies
            .iter()
            .map(|needed| needed.name.as_str())
            .filter(|name| members.contains(name) && *name != package.name.as_str())
            .collect();
        broken.extend(wrong_arrows(package.name.as_str(), &siblings));
        let root = package.manifest_path.parent().context("a package without a directory")?;
        check_sources(workspace, root.as_std_path(), &mut broken)?;
    }
    broken.sort();
    Ok(broken)
}

fn wrong_arrows(package: &str, siblings: &[&str]) -> Vec<String> {
    let allowed =
        ARROWS.iter().find(|(name, _)| *name == package).map_or(&[][..], |(_, allowed)| allowed);
    let wrong = siblings.iter().filter(|name| !allowed.contains(name));
    wrong
        .map(|name| format!("{package} depends on {name}; it may know {}", list(allowed)))
        .collect()
}

fn list(names: &[&str]) -> String {
    if names.is_empty() { "no sibling".to_owned() } else { format!("only {}", names.join(" and ")) }
}

fn check_sources(workspace: &Path, dir: &Path, broken: &mut Vec<String>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            if !path.ends_with("target") {
                check_sources(workspace, &path, broken)?;
            }
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            let text = fs::read_to_string(&path)
                .with_context(|| format!("cannot read {}", path.display()))?;
            let name = path.strip_prefix(workspace).unwrap_or(&path).to_string_lossy().into_owned();
            broken.extend(check_source(&name, &text));
        }
    }
    Ok(())
}

/// The rules for one file, `name` being its path in the workspace.
fn check_source(name: &str, text: &str) -> Vec<String> {
    let mut broken = Vec::new();
    let tests = is_test(name);
    let own = text.lines().take_while(|line| !line.starts_with("#[cfg(test)]")).count();
    if own > LONGEST && !tests {
        broken.push(format!(
            "{name} has {own} lines without tests; {LONGEST} is the most: split it by subject"
        ));
    }
    let lines: Vec<&str> = text.lines().collect();
    for (index, line) in lines.iter().enumerate() {
        if !opts_in(line) {
            continue;
        }
        let at = format!("{name}:{}", index + 1);
        let above =
            lines.iter().take(index).rev().take_while(|line| line.trim_start().starts_with("//"));
        if !above.into_iter().any(|line| line.trim_start().starts_with(REASON)) {
            broken.push(format!(
                "{at} opts in to unsafe code without a line '{REASON} ...' above it that says why"
            ));
        }
        if !tests
            && !ROOMS
                .iter()
                .any(|room| name == *room || (room.ends_with('/') && name.starts_with(room)))
        {
            broken.push(format!(
                "{at} opts in to unsafe code outside of its rooms: {}",
                ROOMS.join(", ")
            ));
        }
    }
    broken
}

/// Whether a line is an attribute that opts in to unsafe code.
fn opts_in(line: &str) -> bool {
    let line = line.trim_start();
    let attribute = line.strip_prefix("#!").or_else(|| line.strip_prefix('#'));
    attribute.is_some_and(|attribute| {
        ["[expect(unsafe_code", "[allow(unsafe_code"]
            .iter()
            .any(|begin| attribute.starts_with(begin))
    })
}

/// Tests are free to be long, and to be unsafe where they like.
fn is_test(name: &str) -> bool {
    name.starts_with("tests/") || name.ends_with("/tests.rs") || name.contains("/tests/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knowledge_goes_down_only() {
        assert!(wrong_arrows("vmm", &["machine", "qmp"]).is_empty());
        assert_eq!(
            wrong_arrows("machine", &["qmp"]),
            ["machine depends on qmp; it may know only devices and state"]
        );
        assert_eq!(
            wrong_arrows("devices", &["machine"]),
            ["devices depends on machine; it may know only state"]
        );
        assert_eq!(
            wrong_arrows("a-new-crate", &["vmm"]),
            ["a-new-crate depends on vmm; it may know no sibling"]
        );
    }

    #[test]
    fn a_file_may_be_long_only_by_its_tests() {
        let long = "//\n".repeat(LONGEST + 1);
        assert_eq!(check_source("vmm/src/a.rs", &long).len(), 1);
        assert!(check_source("vmm/src/a.rs", &format!("#[cfg(test)]\n{long}")).is_empty());
        assert!(check_source("vmm/src/a/tests.rs", &long).is_empty());
    }

    #[test]
    fn unsafe_code_lives_in_its_rooms_and_says_why() {
        let attribute = "#![expect(unsafe_code)]\n";
        let reasoned = format!("// UNSAFETY: ioctls.\n{attribute}");
        assert!(check_source("machine/src/kvm/vm.rs", &reasoned).is_empty());
        assert!(check_source("devices/src/backend/tap.rs", &reasoned).is_empty());
        assert_eq!(check_source("machine/src/kvm/vm.rs", attribute).len(), 1);
        assert_eq!(check_source("machine/src/boot/mod.rs", &reasoned).len(), 1);
        assert_eq!(check_source("machine/src/memory.rs.rs", attribute).len(), 2);
        assert!(check_source("devices/src/blk/tests.rs", &reasoned).is_empty());
    }

    #[test]
    fn this_house_is_in_order() {
        let broken = check(crate::paths::workspace()).unwrap();
        assert!(broken.is_empty(), "{}", broken.join("\n"));
    }
}
