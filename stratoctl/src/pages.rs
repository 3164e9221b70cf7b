//! Completions and manual pages, generated from the table of verbs.
use std::{io, path::Path};

use anyhow::Context;
use clap::{Command, CommandFactory};
use clap_complete::Shell;
use serde_json::json;

use crate::{commands::Answer, verbs::Line};

/// Completions for `shell`.
pub fn completions(shell: Shell) -> Answer {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut public(), "stratoctl", &mut text);
    let text = String::from_utf8_lossy(&text).into_owned();
    let json = json!({ "shell": shell.to_string(), "script": text });
    Answer::new(text, json)
}

/// The command line without stratoctl's internal verbs.
fn public() -> Command {
    let line = Line::command();
    let verbs: Vec<_> =
        line.get_subcommands().filter(|verb| !verb.is_hide_set()).cloned().collect();
    Command::new("stratoctl").args(line.get_arguments().cloned()).subcommands(verbs)
}

/// The manual page of stratoctl itself, or all pages into `directory`.
///
/// # Errors
/// When it cannot be written.
pub fn man(directory: Option<&Path>) -> anyhow::Result<Answer> {
    let Some(directory) = directory else {
        let mut text = Vec::new();
        clap_mangen::Man::new(Line::command()).render(&mut text)?;
        let text = String::from_utf8_lossy(&text).into_owned();
        return Ok(Answer::new(text.clone(), json!({ "page": text })));
    };
    let pages = write(directory)
        .with_context(|| format!("cannot write manual pages into {}", directory.display()))?;
    let text = format!("{pages} pages in {}", directory.display());
    Ok(Answer::new(text, json!({ "directory": directory, "pages": pages })))
}

fn write(directory: &Path) -> io::Result<usize> {
    std::fs::create_dir_all(directory)?;
    let line = Line::command().disable_help_subcommand(true);
    clap_mangen::generate_to(line, directory)?;
    Ok(1 + verbs().count())
}

/// The names of the verbs that are not internal.
fn verbs() -> impl Iterator<Item = String> {
    let line = public();
    let verbs: Vec<_> = line.get_subcommands().map(|verb| verb.get_name().to_owned()).collect();
    verbs.into_iter()
}

#[cfg(test)]
mod tests {
    use clap::ValueEnum;

    use super::*;

    #[test]
    fn the_table_of_verbs_is_sound() {
        Line::command().debug_assert();
    }

    #[test]
    fn every_verb_has_a_page_and_is_completed() {
        let directory = tempfile::tempdir().expect("a directory");
        let said = man(Some(directory.path())).expect("pages").text;
        let pages = std::fs::read_dir(directory.path()).expect("a directory").count();
        assert!(said.starts_with(&format!("{pages} pages")), "{said}, {pages}");
        let main = man(None).expect("a page").text;
        for verb in verbs() {
            let page = directory.path().join(format!("stratoctl-{verb}.1"));
            let page = std::fs::read_to_string(page).expect(&verb);
            assert!(page.contains(".SH NAME") && page.contains(".SH SYNOPSIS"), "{verb}: {page}");
            assert!(
                main.contains(&format!("stratoctl\\-{}(1)", verb.replace('-', "\\-"))),
                "{verb}"
            );
            for shell in Shell::value_variants() {
                assert!(completions(*shell).text.contains(&verb), "{verb} for {shell}");
            }
        }
        for shell in Shell::value_variants() {
            let text = completions(*shell).text;
            for hidden in ["Restart a domain under", "stratoctl__watch", ";watch"] {
                assert!(!text.contains(hidden), "{hidden} for {shell}");
            }
        }
        assert!(!directory.path().join("stratoctl-watch.1").exists(), "not for people");
    }
}
