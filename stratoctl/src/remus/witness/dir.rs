//! A directory that both hosts mount.
//!
//! ```text
//! WITNESS-ID           what tells this directory from others; random
//! LINEAGE.TERM         the record of a term
//! LINEAGE.TERM.next    what became of its promotion
//! .RANDOM.new          left by a process that was killed; may be deleted
//! ```
//! Each file appears under its name complete and once: it is written and synced under another name
//! and then linked, and link(2) fails where there is a file already. What link(2) returns does not
//! count, since a file server may have carried it out although its answer was lost; the file that
//! is there afterwards does. It is durable before it is believed: the directory is synced first.
//!
//! All steps of a question use one descriptor of the directory, whose `WITNESS-ID` was read. So a
//! file system that is unmounted meanwhile is not confused with the directory below it.
use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use replication::{Answer, Incarnation, Lineage, Party, Record, Settled, Term, Word};
use rustix::fs::{
    AtFlags, Dir as Entries, FileType, Mode, OFlags, fstat, fsync, linkat, open, openat, unlinkat,
};
use serde::{Serialize, de::DeserializeOwned};

use super::{Witness, identity, same};
use crate::remus::{
    Unknown,
    uuid::Uuid,
    wire::{OutcomeText, RecordText},
};

/// Name of the file with the identity.
const IDENTITY: &str = "WITNESS-ID";
/// Longest file, in bytes.
const MAX_FILE: u64 = 4096;

/// The witness in a directory.
pub struct Dir<L = RealLink> {
    path: PathBuf,
    /// The identity that it has to have.
    expected: Option<String>,
    link: L,
}

/// How a file gets its name: a double makes it fail, or lose its answer.
pub trait Link {
    /// link(2) within a directory.
    fn link(&mut self, dir: BorrowedFd<'_>, from: &str, to: &str) -> io::Result<()>;
}

/// link(2).
pub struct RealLink;

impl Link for RealLink {
    fn link(&mut self, dir: BorrowedFd<'_>, from: &str, to: &str) -> io::Result<()> {
        Ok(linkat(dir, from, dir, to, AtFlags::empty())?)
    }
}

impl Dir {
    pub fn new(path: PathBuf, expected: Option<String>) -> Self {
        Self { path, expected, link: RealLink }
    }
}

impl<L: Link> Dir<L> {
    /// The directory, if it is the right one.
    fn open(&self) -> Result<OwnedFd, Unknown> {
        let dir = self.any()?;
        if let Some(expected) = &self.expected {
            let found = self.read::<Uuid>(&dir, IDENTITY)?;
            let found = found.map_or_else(|| "nothing".to_owned(), |id| format!("dir:{id}"));
            same(Some(expected), &found)?;
        }
        Ok(dir)
    }

    fn any(&self) -> Result<OwnedFd, Unknown> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        open(&self.path, flags, Mode::empty()).map_err(|e| self.failed("open it", e))
    }

    fn failed(&self, what: &str, e: impl Into<io::Error>) -> Unknown {
        let e = e.into();
        Unknown::new(format!("witness dir:{}: cannot {what}: {e}", self.path.display()))
    }

    /// The contents of a file, if it exists.
    fn read<T: DeserializeOwned>(&self, dir: &OwnedFd, name: &str) -> Result<Option<T>, Unknown> {
        let failed = |e: io::Error| self.failed(&format!("read {name}"), e);
        // Opening a FIFO would wait for its writer.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = match openat(dir, name, flags, Mode::empty()) {
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            other => other.map_err(|e| failed(e.into()))?,
        };
        let kind = FileType::from_raw_mode(fstat(&file).map_err(|e| failed(e.into()))?.st_mode);
        if kind != FileType::RegularFile {
            return Err(failed(io::Error::other("it is not a regular file")));
        }
        let mut text = Vec::new();
        File::from(file).take(MAX_FILE).read_to_end(&mut text).map_err(failed)?;
        serde_json::from_slice(&text).map(Some).map_err(|e| failed(e.into()))
    }

    /// Make a file with `contents`, unless there is one of that name; then what is in the file.
    fn create<T: Serialize + DeserializeOwned>(
        &mut self,
        dir: &OwnedFd,
        name: &str,
        contents: &T,
    ) -> Result<T, Unknown> {
        let random = Uuid::random().map_err(|e| self.failed("get a random number", e))?;
        let new = format!(".{random}.new");
        let linked =
            self.write(dir, &new, contents).and_then(|()| self.link.link(dir.as_fd(), &new, name));
        // Whatever has failed, it has no further use.
        let _ = unlinkat(dir, &new, AtFlags::empty());
        match (self.read(dir, name)?, linked) {
            (Some(there), _) => Ok(there),
            (None, Err(e)) => Err(self.failed(&format!("make {name}"), e)),
            (None, Ok(())) => Err(Unknown::new(format!(
                "witness dir:{}: {name} has disappeared",
                self.path.display()
            ))),
        }
    }

    fn write(&self, dir: &OwnedFd, name: &str, contents: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_vec(contents)?;
        text.push(b'\n');
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
        let mut file = File::from(openat(dir, name, flags, mode)?);
        file.write_all(&text)?;
        file.sync_all()
    }

    /// The record of a term, durable.
    fn record(
        &self,
        dir: &OwnedFd,
        lineage: Lineage,
        term: Term,
    ) -> Result<Option<Record>, Unknown> {
        let name = name(lineage, term);
        let Some(text) = self.read::<RecordText>(dir, &name)? else { return Ok(None) };
        let mut record = Record::try_from(text)?;
        if let Some(outcome) = self.read::<OutcomeText>(dir, &next(&name))? {
            record.settled = Some(outcome.try_into()?);
        }
        // By whomever it was made: they may not have come to that.
        fsync(dir).map_err(|e| self.failed("sync it", e))?;
        Ok(Some(record))
    }

    /// Whether a later term is decided. Such a term exists only after this one was closed or given
    /// up, so it does not matter that its record may appear right after this.
    fn superseded(&self, dir: &OwnedFd, lineage: Lineage, term: Term) -> Result<bool, Unknown> {
        let failed = |e| self.failed("list it", e);
        let prefix = format!("{}.", Uuid(lineage.0));
        for entry in Entries::read_from(dir).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_string_lossy();
            let number = name.strip_prefix(&prefix).and_then(|rest| rest.parse::<u64>().ok());
            if number.is_some_and(|number| number > term.0) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// What there is of a term.
    fn state(&self, dir: &OwnedFd, lineage: Lineage, term: Term) -> Result<Answer, Unknown> {
        let known = self.record(dir, lineage, term)?;
        if known.is_some() || !self.superseded(dir, lineage, term)? {
            return Ok(Answer::Record(known));
        }
        // The term may have been decided since, and then the later one.
        Ok(self.record(dir, lineage, term)?.map_or(Answer::Superseded, |r| Answer::Record(Some(r))))
    }
}

fn name(lineage: Lineage, term: Term) -> String {
    format!("{}.{}", Uuid(lineage.0), term.0)
}

fn next(name: &str) -> String {
    format!("{name}.next")
}

impl<L: Link> Witness for Dir<L> {
    fn identify(&mut self) -> Result<String, Unknown> {
        let dir = self.any()?;
        let id = match self.read(&dir, IDENTITY)? {
            Some(id) => id,
            None => {
                let new = Uuid::random().map_err(|e| self.failed("get a random number", e))?;
                self.create(&dir, IDENTITY, &new)?
            }
        };
        fsync(&dir).map_err(|e| self.failed("sync it", e))?;
        let found = format!("dir:{id}");
        same(self.expected.as_deref(), &found)?;
        identity(&found)
    }

    fn look(&mut self, lineage: Lineage, term: Term) -> Result<Answer, Unknown> {
        let dir = self.open()?;
        self.state(&dir, lineage, term)
    }

    fn claim(
        &mut self,
        lineage: Lineage,
        term: Term,
        word: Word,
        party: Party,
    ) -> Result<Answer, Unknown> {
        let dir = self.open()?;
        match self.state(&dir, lineage, term)? {
            Answer::Record(None) => {}
            known => return Ok(known),
        }
        let wanted = RecordText::from(Record { word, winner: party, settled: None });
        self.create(&dir, &name(lineage, term), &wanted)?;
        Ok(Answer::Record(self.record(&dir, lineage, term)?))
    }

    fn settle(
        &mut self,
        lineage: Lineage,
        term: Term,
        winner: Incarnation,
        to: Settled,
    ) -> Result<Answer, Unknown> {
        let dir = self.open()?;
        let known = self.state(&dir, lineage, term)?;
        let Answer::Record(Some(record)) = known else { return Ok(known) };
        let whose = record.word == Word::Promote && record.winner.incarnation == winner;
        if record.settled.is_none() && whose {
            self.create(&dir, &next(&name(lineage, term)), &OutcomeText::from(to))?;
            return Ok(Answer::Record(self.record(&dir, lineage, term)?));
        }
        Ok(known)
    }
}

#[cfg(test)]
mod tests {
    use replication::Side;
    use rustix::{fs::mknodat, io::Errno};
    use tempfile::{TempDir, tempdir};

    use super::*;

    const GUEST: Lineage = Lineage(7);
    const TERM: Term = Term(1);

    fn party(number: u128) -> Party {
        Party { side: Side::Primary, incarnation: Incarnation(number) }
    }

    fn won(number: u128) -> Answer {
        let winner = party(number);
        Answer::Record(Some(Record { word: Word::Solo, winner, settled: None }))
    }

    /// A link(2) with this answer, whether or not it has done something.
    struct Lossy {
        does: bool,
        answer: Result<(), Errno>,
    }

    impl Link for Lossy {
        fn link(&mut self, dir: BorrowedFd<'_>, from: &str, to: &str) -> io::Result<()> {
            if self.does {
                RealLink.link(dir, from, to)?;
            }
            Ok(self.answer?)
        }
    }

    fn lossy(dir: &TempDir, does: bool, answer: Result<(), Errno>) -> Dir<Lossy> {
        Dir { path: dir.path().into(), expected: None, link: Lossy { does, answer } }
    }

    fn real(dir: &TempDir) -> Dir {
        Dir::new(dir.path().into(), None)
    }

    #[test]
    fn the_file_counts_and_not_what_link_returns() {
        for answer in [Ok(()), Err(Errno::EXIST), Err(Errno::IO), Err(Errno::TIMEDOUT)] {
            let dir = tempdir().unwrap();
            let mut lost = lossy(&dir, true, answer);
            assert_eq!(lost.claim(GUEST, TERM, Word::Solo, party(1)), Ok(won(1)), "{answer:?}");
            assert_eq!(lost.claim(GUEST, TERM, Word::Solo, party(2)), Ok(won(1)), "{answer:?}");
        }
    }

    #[test]
    fn a_claim_that_has_done_nothing_is_unknown_and_the_term_stays_open() {
        for answer in [Ok(()), Err(Errno::EXIST), Err(Errno::IO), Err(Errno::NOSPC)] {
            let dir = tempdir().unwrap();
            let said = lossy(&dir, false, answer).claim(GUEST, TERM, Word::Solo, party(1));
            assert!(said.is_err(), "{answer:?}: {said:?}");
            assert_eq!(real(&dir).look(GUEST, TERM), Ok(Answer::Record(None)));
            let rest = std::fs::read_dir(dir.path()).unwrap().count();
            assert_eq!(rest, 0, "{answer:?}: nothing is left");
        }
    }

    #[test]
    fn a_directory_that_is_not_mounted_is_another_witness() {
        let (shared, below) = (tempdir().unwrap(), tempdir().unwrap());
        let identity = real(&shared).identify().unwrap();
        assert_eq!(real(&shared).identify().as_ref(), Ok(&identity));
        assert_ne!(real(&below).identify().as_ref(), Ok(&identity));
        let mut mounted = Dir::new(shared.path().into(), Some(identity.clone()));
        assert_eq!(mounted.claim(GUEST, TERM, Word::Solo, party(1)), Ok(won(1)));
        // The path leads elsewhere now, to an empty directory, or to another witness.
        for path in [tempdir().unwrap(), below] {
            let mut gone = Dir::new(path.path().into(), Some(identity.clone()));
            let said = gone.claim(GUEST, TERM, Word::Solo, party(2)).unwrap_err().to_string();
            assert!(said.contains("is another one") && said.contains("mounted"), "{said}");
            assert!(gone.look(GUEST, TERM).is_err());
        }
    }

    #[test]
    fn damaged_records_are_no_answers() {
        let dir = tempdir().unwrap();
        let path = dir.path().join(name(GUEST, TERM));
        for damage in ["", "{", "[]", r#"{"word":"solo"}"#, &" ".repeat(5000)] {
            std::fs::write(&path, damage).unwrap();
            assert!(real(&dir).look(GUEST, TERM).is_err(), "{damage}");
            assert!(real(&dir).claim(GUEST, TERM, Word::Solo, party(1)).is_err(), "{damage}");
        }
        std::fs::remove_file(&path).unwrap();
        mknodat(rustix::fs::CWD, &path, FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert!(real(&dir).look(GUEST, TERM).is_err(), "a FIFO");
    }
}
