//! The directories of the registry.
use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::Context;

use crate::failure::Failure;

/// The run-time part, which is gone after a reboot of the host, and the persistent part.
pub fn find(root: Option<&Path>) -> anyhow::Result<(PathBuf, PathBuf)> {
    if let Some(root) = root {
        let root = std::path::absolute(root).context("--root")?;
        return Ok((root.join("run"), root.join("state")));
    }
    let super_user = rustix::process::geteuid().is_root();
    choose(super_user, |name| env::var_os(name).map(PathBuf::from))
}

fn choose(
    super_user: bool,
    variable: impl Fn(&str) -> Option<PathBuf>,
) -> anyhow::Result<(PathBuf, PathBuf)> {
    if super_user {
        return Ok(("/run/stratovirt".into(), "/var/lib/stratovirt".into()));
    }
    // The specification requires relative ones to be ignored.
    let absolute = |name| variable(name).filter(|path| path.is_absolute());
    let run = absolute("XDG_RUNTIME_DIR").ok_or_else(|| {
        Failure::hint(
            "no directory for run-time files: XDG_RUNTIME_DIR is not set to an absolute path",
            "log in with a session that sets it, or give --root DIR",
        )
    })?;
    let state = absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .ok_or_else(|| {
            Failure::hint(
                "there is no place for the registry: neither XDG_STATE_HOME nor HOME is set to a \
                 full path",
                "set one of them, or give --root DIR",
            )
        })?;
    Ok((run.join("stratovirt"), state.join("stratovirt")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(variables: &[(&str, &str)]) -> anyhow::Result<(PathBuf, PathBuf)> {
        choose(false, |name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into())
        })
    }

    #[test]
    fn the_super_user_has_the_systems_place() {
        let places = choose(true, |_| None).expect("places");
        assert_eq!(places, ("/run/stratovirt".into(), "/var/lib/stratovirt".into()));
    }

    #[test]
    fn others_have_their_own() {
        let run = ("XDG_RUNTIME_DIR", "/run/user/7");
        let places = with(&[run, ("XDG_STATE_HOME", "/s")]).expect("places");
        assert_eq!(places, ("/run/user/7/stratovirt".into(), "/s/stratovirt".into()));
        let home = ("HOME", "/home/me");
        let places = with(&[run, home, ("XDG_STATE_HOME", "relative")]).expect("places");
        assert_eq!(places.1, Path::new("/home/me/.local/state/stratovirt"));
    }

    #[test]
    fn without_any_the_error_says_which_to_set() {
        let said = with(&[("HOME", "/home/me")]).expect_err("no place").to_string();
        assert!(said.contains("XDG_RUNTIME_DIR"), "{said}");
        let run = ("XDG_RUNTIME_DIR", "/run/user/7");
        let said = with(&[run]).expect_err("no place").to_string();
        assert!(said.contains("XDG_STATE_HOME"), "{said}");
    }
}
