//! Witnesses: who has won a term is one compare-and-swap outside both hosts, and never undone.
//!
//! A witness is no server of this project, but something that both hosts use already: a directory
//! that both mount ([`Dir`]), an etcd cluster ([`Etcd`]), or a command ([`Exec`]). All of them
//! answer as [`replication::Witness`] does, durably, and have an identity: two sides that name
//! different witnesses would be granted one term each.
//!
//! Any of them may hang or fail. Then the answer is [`Unknown`], and the question may have had its
//! effect; it is asked again, and the winner gets the same answer as before.
mod ask;
mod dir;
mod etcd;
mod exec;

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use replication::{Answer, Incarnation, Lineage, Party, Question, Settled, Term, Word};

pub use ask::{Asked, answer_lines};
use dir::Dir;
use etcd::Etcd;
use exec::Exec;

use super::Unknown;

/// Keeps the records of terms.
pub trait Witness {
    /// What tells it from every other witness: 1 to 200 printable characters, without spaces and
    /// commas.
    ///
    /// # Errors
    /// It does not answer.
    fn identify(&mut self) -> Result<String, Unknown>;

    /// The record of a term.
    ///
    /// # Errors
    /// It does not answer.
    fn look(&mut self, lineage: Lineage, term: Term) -> Result<Answer, Unknown>;

    /// Close a term, if it is open and no later one is decided.
    ///
    /// # Errors
    /// It does not answer.
    fn claim(
        &mut self,
        lineage: Lineage,
        term: Term,
        word: Word,
        party: Party,
    ) -> Result<Answer, Unknown>;

    /// Record what became of the promotion of `winner`, if nothing is recorded yet.
    ///
    /// # Errors
    /// It does not answer.
    fn settle(
        &mut self,
        lineage: Lineage,
        term: Term,
        winner: Incarnation,
        to: Settled,
    ) -> Result<Answer, Unknown>;

    /// Any of these.
    ///
    /// # Errors
    /// It does not answer, or the question is not one for a witness.
    fn ask(&mut self, lineage: Lineage, question: Question) -> Result<Answer, Unknown> {
        match question {
            Question::Look { term } => self.look(lineage, term),
            Question::Claim { term, word, party } => self.claim(lineage, term, word, party),
            Question::Settle { term, winner, to } => self.settle(lineage, term, winner, to),
            Question::Fence { .. } => Err(Unknown::new("a fence is not a witness")),
        }
    }
}

/// Which witness: `dir:PATH`, `exec:COMMAND` or `etcd:URL[,URL..][,prefix=KEY][,tls=DIR]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Uri {
    Dir(PathBuf),
    Exec(String),
    Etcd(etcd::Cluster),
}

impl Uri {
    /// How long one question may take.
    pub const fn limit(&self) -> Duration {
        match self {
            Self::Dir(_) | Self::Etcd(_) => Duration::from_secs(5),
            Self::Exec(_) => Duration::from_secs(30),
        }
    }

    /// The witness, which has to have this identity, if one is given, whenever it is asked.
    ///
    /// # Errors
    /// The files that it needs cannot be read.
    fn open(&self, identity: Option<String>) -> Result<Box<dyn Witness>, Unknown> {
        Ok(match self {
            Self::Dir(path) => Box::new(Dir::new(path.clone(), identity)),
            Self::Exec(command) => Box::new(Exec::new(command.clone(), self.limit())),
            Self::Etcd(cluster) => Box::new(Etcd::new(cluster, identity, self.limit())?),
        })
    }
}

impl FromStr for Uri {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let kinds = "a witness is dir:PATH, exec:COMMAND or \
                     etcd:URL[,URL..][,prefix=KEY][,tls=DIR]";
        match text.split_once(':') {
            Some(("dir", path)) if path.starts_with('/') => Ok(Self::Dir(path.into())),
            Some(("dir", _)) => Err("dir: needs an absolute path, the same on both hosts".into()),
            Some(("exec", command)) if !command.trim().is_empty() => {
                Ok(Self::Exec(command.to_owned()))
            }
            Some(("etcd", rest)) => rest.parse().map(Self::Etcd),
            _ => Err(kinds.into()),
        }
    }
}

impl fmt::Display for Uri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dir(path) => write!(f, "dir:{}", path.display()),
            Self::Exec(command) => write!(f, "exec:{command}"),
            Self::Etcd(cluster) => write!(f, "etcd:{cluster}"),
        }
    }
}

/// Check an identity, so that it can be a word on any command line.
fn identity(text: &str) -> Result<String, Unknown> {
    let fits = |c: char| c.is_ascii_graphic() && c != ',';
    match (1..=200).contains(&text.len()) && text.chars().all(fits) {
        true => Ok(text.to_owned()),
        false => Err(Unknown::new(
            "the witness has no usable identity: it must be 1 to 200 printable ASCII characters \
             without spaces and commas",
        )),
    }
}

/// Refuse a witness that is another than the one the two sides have agreed on.
fn same(expected: Option<&str>, found: &str) -> Result<(), Unknown> {
    match expected {
        Some(expected) if expected != found => Err(Unknown::new(format!(
            "the witness is another one: {found}, not {expected}; is everything mounted?"
        ))),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn witnesses_are_named_by_uris() {
        for good in [
            "dir:/shared/a b",
            "exec:/usr/bin/fence_sanlock --lease x",
            "etcd:http://127.0.0.1:2379",
            "etcd:https://a:2379,https://b:2379,prefix=/x/,tls=/etc/etcd",
        ] {
            assert_eq!(good.parse::<Uri>().map(|uri| uri.to_string()).as_deref(), Ok(good));
        }
        for (wrong, says) in [
            ("", "a witness is"),
            ("nfs:/x", "a witness is"),
            ("dir:shared", "absolute"),
            ("exec: ", "a witness is"),
            ("etcd:", "URL"),
            ("etcd:a:2379", "http"),
            ("etcd:https://a:2379", "tls=DIR"),
            ("etcd:http://a,colour=red", "colour"),
        ] {
            let said = wrong.parse::<Uri>().unwrap_err();
            assert!(said.contains(says), "{wrong}: {said}");
        }
    }

    #[test]
    fn identities_are_plain_words() {
        for good in ["a", "dir:7", &"x".repeat(200)] {
            assert_eq!(identity(good).as_deref(), Ok(good));
        }
        for bad in ["", "a b", "a,b", "a\n", "ä", &"x".repeat(201)] {
            assert!(identity(bad).is_err(), "{bad}");
        }
    }
}
