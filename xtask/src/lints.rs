//! The rules of this workspace that compiler and clippy do not check: which crate may depend on
//! which, how long a file may be, where unsafe code may be, and that the links between its pages
//! have targets.
mod links;

use std::env;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

/// Each crate and the siblings that it may depend on; a crate that is not listed may depend on
/// none.
const ARROWS: [(&str, &[&str]); 13] = [
    ("json", &[]),
    ("replication", &[]),
    ("lineage", &["replication"]),
    ("state", &[]),
    ("config", &["json", "state"]),
    ("devices", &["state"]),
    ("qmp", &["json"]),
    ("machine", &["config", "devices", "lineage", "state"]),
    ("transport", &[]),
    ("vmm", &["machine", "qmp", "config", "state", "replication", "lineage", "transport"]),
    ("stratoctl", &["qmp", "state", "config", "replication", "lineage", "transport"]),
    ("stories", &["qmp", "state", "replication"]),
    ("xtask", &["qmp", "stories"]),
];
/// Longest file, in lines without tests.
const MAX_LINES: usize = 800;
/// Where unsafe code may be: files, and directories with everything in them.
const UNSAFE_ALLOWED: [&str; 8] = [
    "machine/src/arch/x86_64/kvm/",
    "machine/src/kvm/",
    "machine/src/vcpu/kick.rs",
    "machine/src/vcpu/usage.rs",
    "devices/src/testing/descriptors.rs",
    "machine/src/memory.rs",
    "machine/src/memory/",
    "devices/src/backend/",
];
/// What the line above an opt-in begins with.
const REASON: &str = "// UNSAFETY:";

/// The workspace that this program was built in.
#[must_use]
pub fn workspace() -> &'static Path {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own)
}

/// Every rule that is broken under `workspace`, one line each.
///
/// # Errors
/// cargo or the file system fails.
pub fn check(workspace: &Path) -> Result<Vec<String>> {
    let metadata = metadata(workspace)?;
    let packages: Vec<Package> =
        list(&metadata, "packages").iter().map(Package::read).collect::<Result<_>>()?;
    let mut broken = Vec::new();
    for package in &packages {
        // A crate may name itself, to test with another of its features.
        let siblings: Vec<&str> = package
            .dependencies
            .iter()
            .copied()
            .filter(|name| *name != package.name)
            .filter(|name| packages.iter().any(|sibling| sibling.name == *name))
            .collect();
        broken.extend(wrong_arrows(package.name, &siblings));
        check_sources(workspace, package.root, &mut broken)?;
    }
    broken.extend(links::check(workspace)?);
    broken.sort();
    Ok(broken)
}

/// cargo's metadata of a member of the workspace.
struct Package<'a> {
    name: &'a str,
    /// Where its manifest is.
    root: &'a Path,
    dependencies: Vec<&'a str>,
}

impl<'a> Package<'a> {
    fn read(package: &'a Value) -> Result<Self> {
        let manifest = text(package, "manifest_path")?;
        let root = Path::new(manifest).parent().context("a package without a directory")?;
        let dependencies = list(package, "dependencies").iter().map(|needed| text(needed, "name"));
        Ok(Self {
            name: text(package, "name")?,
            root,
            dependencies: dependencies.collect::<Result<_>>()?,
        })
    }
}

fn metadata(workspace: &Path) -> Result<Value> {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["metadata", "--no-deps", "--format-version", "1"]).current_dir(workspace);
    let out = cargo.output().context("cannot run cargo")?;
    ensure!(out.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).context("cannot read what cargo metadata prints")
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value.get(name).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn text<'a>(value: &'a Value, name: &str) -> Result<&'a str> {
    value.get(name).and_then(Value::as_str).with_context(|| format!("cargo metadata has no {name}"))
}

fn wrong_arrows(package: &str, siblings: &[&str]) -> Vec<String> {
    let allowed =
        ARROWS.iter().find(|(name, _)| *name == package).map_or(&[][..], |(_, allowed)| allowed);
    let wrong = siblings.iter().filter(|name| !allowed.contains(name));
    wrong
        .map(|name| format!("{package} depends on {name}; it may depend {}", names(allowed)))
        .collect()
}

fn names(names: &[&str]) -> String {
    if names.is_empty() {
        "on no other crate of the workspace".to_owned()
    } else {
        format!("only on {}", names.join(" and "))
    }
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
    if own > MAX_LINES && !tests {
        broken.push(format!(
            "{name} has {own} lines without tests; at most {MAX_LINES} are allowed: split it by subject"
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
            && !UNSAFE_ALLOWED
                .iter()
                .any(|place| name == *place || (place.ends_with('/') && name.starts_with(place)))
        {
            broken.push(format!(
                "{at} opts in to unsafe code where it is not allowed: it may be in {}",
                UNSAFE_ALLOWED.join(", ")
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

/// Tests may be long, and unsafe anywhere.
fn is_test(name: &str) -> bool {
    name.starts_with("tests/") || name.ends_with("/tests.rs") || name.contains("/tests/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dependencies_go_down_only() {
        assert!(wrong_arrows("vmm", &["machine", "qmp"]).is_empty());
        assert_eq!(
            wrong_arrows("machine", &["qmp"]),
            [
                "machine depends on qmp; it may depend only on config and devices and lineage and state"
            ]
        );
        assert_eq!(
            wrong_arrows("devices", &["machine"]),
            ["devices depends on machine; it may depend only on state"]
        );
        assert_eq!(
            wrong_arrows("a-new-crate", &["vmm"]),
            ["a-new-crate depends on vmm; it may depend on no other crate of the workspace"]
        );
    }

    #[test]
    fn a_file_may_be_long_only_by_its_tests() {
        let long = "//\n".repeat(MAX_LINES + 1);
        assert_eq!(check_source("vmm/src/a.rs", &long).len(), 1);
        assert!(check_source("vmm/src/a.rs", &format!("#[cfg(test)]\n{long}")).is_empty());
        assert!(check_source("vmm/src/a/tests.rs", &long).is_empty());
    }

    #[test]
    fn unsafe_code_is_only_where_it_is_allowed_and_says_why() {
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
    fn this_workspace_breaks_no_rule() {
        let broken = check(stories::paths::workspace()).unwrap();
        assert!(broken.is_empty(), "{}", broken.join("\n"));
    }
}
