//! Links between the pages of the project: their targets have to exist, headings included.
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Where pages are, besides those at the top.
const PAGES: &str = "docs";

/// Every broken link under `workspace`.
///
/// # Errors
/// A page cannot be read.
pub fn check(workspace: &Path) -> Result<Vec<String>> {
    let mut broken = Vec::new();
    for dir in [workspace.to_owned(), workspace.join(PAGES)] {
        for page in pages(&dir)? {
            let name = page.strip_prefix(workspace).unwrap_or(&page).display();
            for link in links(&read(&page)?) {
                if !leads_somewhere(&page, &link)? {
                    broken.push(format!("{name} links to {link}, which does not exist"));
                }
            }
        }
    }
    Ok(broken)
}

fn pages(dir: &Path) -> Result<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(Vec::new()) };
    let paths: Vec<PathBuf> =
        entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
    Ok(paths.into_iter().filter(|path| is_page(path)).collect())
}

fn is_page(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "md")
}

fn read(page: &Path) -> Result<String> {
    fs::read_to_string(page).with_context(|| format!("cannot read {}", page.display()))
}

/// Targets of the links in a page that stay in the project.
fn links(text: &str) -> Vec<String> {
    let targets = text.split("](").skip(1).filter_map(|rest| Some(rest.split_once(')')?.0));
    targets.filter(|target| !target.contains("://")).map(str::to_owned).collect()
}

fn leads_somewhere(page: &Path, link: &str) -> Result<bool> {
    let (file, heading) = link.split_once('#').map_or((link, None), |(f, h)| (f, Some(h)));
    let target =
        if file.is_empty() { page.to_owned() } else { page.parent().unwrap_or(page).join(file) };
    match heading {
        None => Ok(target.exists()),
        Some(_) if !target.is_file() => Ok(false),
        Some(heading) => Ok(anchors(&read(&target)?).iter().any(|anchor| anchor == heading)),
    }
}

/// The names that GitHub gives to the headings of a page.
fn anchors(text: &str) -> Vec<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    let anchor = |line: &str| -> String {
        let title = line.trim_start_matches('#').trim().to_lowercase();
        let kept = title.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_the_project_are_found_and_others_are_not() {
        let text = "See [a](docs/a.md#b-c), ![b](b.svg) and [c](https://example.org/x).";
        assert_eq!(links(text), ["docs/a.md#b-c", "b.svg"]);
    }

    #[test]
    fn headings_have_the_names_that_github_gives_them() {
        assert_eq!(
            anchors("# What is `-x`, and why?\ntext\n## A B"),
            ["what-is--x-and-why", "a-b"]
        );
    }

    #[test]
    fn what_does_not_exist_is_told() {
        let dir = std::env::temp_dir().join(format!("links.{}", std::process::id()));
        fs::create_dir_all(dir.join(PAGES)).unwrap();
        let readme = "[a](docs/a.md) [b](docs/a.md#title) [c](docs/a.md#none) [d](none.md)";
        fs::write(dir.join("README.md"), readme).unwrap();
        fs::write(dir.join("docs/a.md"), "# Title\n[up](../README.md)").unwrap();
        let broken = check(&dir).unwrap();
        fs::remove_dir_all(dir).unwrap();
        assert_eq!(
            broken,
            [
                "README.md links to docs/a.md#none, which does not exist",
                "README.md links to none.md, which does not exist",
            ]
        );
    }
}
