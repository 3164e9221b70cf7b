//! A command of the user's: a lease manager, a cloud's conditional write.
//!
//! ```text
//! COMMAND identify                                    prints the identity; status 0
//! COMMAND look LINEAGE TERM                           status 0
//! COMMAND claim LINEAGE TERM WORD SIDE INCARNATION    0: INCARNATION has the term; 1: another one
//! COMMAND settle LINEAGE TERM WINNER running          0: recorded; 1: something else is recorded
//! COMMAND settle LINEAGE TERM WINNER yielded TO       likewise
//! ```
//! Except for `identify` it prints the record as it is then, as a JSON object (see
//! [`RecordText`]), or `open`, or `superseded`. It may print nothing where the status says
//! everything: after `claim` and `settle` with status 0. Any other status is no answer, and neither
//! is an answer that contradicts its status.
//!
//! A command that is too slow is killed, and asked again later; so a winner has to get the same
//! answer again.
use std::{process::Command, time::Duration};

use replication::{Answer, Incarnation, Lineage, Party, Record, Settled, Term, Word};

use super::{Witness, identity};
use crate::remus::{
    Unknown,
    bounded::{Done, run},
    uuid::Uuid,
    wire::{OutcomeText, RecordText, SideText, WordText},
};

/// A command as a witness.
pub struct Exec {
    command: String,
    limit: Duration,
}

impl Exec {
    pub fn new(command: String, limit: Duration) -> Self {
        Self { command, limit }
    }

    fn run(&self, words: &[&str]) -> Result<Done, Unknown> {
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", &format!("{} \"$@\"", self.command), "witness"]).args(words);
        run(&mut shell, self.limit).map_err(|e| self.failed(words, &e.to_string()))
    }

    fn failed(&self, words: &[&str], why: &str) -> Unknown {
        let verb = words.first().copied().unwrap_or_default();
        Unknown::new(format!("witness exec:{} {verb}: {why}", self.command))
    }

    /// What it answers: whether with status 0, and what it has printed.
    fn answer(&self, words: &[&str]) -> Result<(bool, Option<Answer>), Unknown> {
        let done = self.run(words)?;
        let granted = match done.code {
            Some(0) => true,
            Some(1) => false,
            Some(code) => {
                let what = format!("status {code}: {}", done.complaint());
                return Err(self.failed(words, &what));
            }
            None => return Err(self.failed(words, "a signal has ended it")),
        };
        let printed = match done.out.trim() {
            "" => None,
            "open" => Some(Answer::Record(None)),
            "superseded" => Some(Answer::Superseded),
            text => {
                let text: RecordText = serde_json::from_str(text)
                    .map_err(|e| self.failed(words, &format!("it prints no record: {e}")))?;
                Some(Answer::Record(Some(text.try_into()?)))
            }
        };
        Ok((granted, printed))
    }
}

impl Witness for Exec {
    fn identify(&mut self) -> Result<String, Unknown> {
        let words = ["identify"];
        let done = self.run(&words)?;
        match done.code {
            Some(0) => identity(done.out.trim()),
            _ => Err(self.failed(&words, &done.complaint())),
        }
    }

    fn look(&mut self, lineage: Lineage, term: Term) -> Result<Answer, Unknown> {
        let words = ["look", &Uuid(lineage.0).to_string(), &term.0.to_string()];
        match self.answer(&words)? {
            (true, Some(answer)) => Ok(answer),
            (true, None) => Err(self.failed(&words, "it prints nothing")),
            (false, _) => Err(self.failed(&words, "status 1")),
        }
    }

    fn claim(
        &mut self,
        lineage: Lineage,
        term: Term,
        word: Word,
        party: Party,
    ) -> Result<Answer, Unknown> {
        let words = [
            "claim",
            &Uuid(lineage.0).to_string(),
            &term.0.to_string(),
            WordText::from(word).word(),
            SideText::from(party.side).word(),
            &Uuid(party.incarnation.0).to_string(),
        ];
        let (granted, printed) = self.answer(&words)?;
        let wanted = Record { word, winner: party, settled: None };
        match printed {
            None if granted => Ok(Answer::Record(Some(wanted))),
            None => Err(self.failed(&words, "status 1, but it does not print who has the term")),
            Some(Answer::Record(Some(record)))
                if (record.winner.incarnation == party.incarnation) == granted =>
            {
                Ok(Answer::Record(Some(record)))
            }
            Some(Answer::Superseded) if !granted => Ok(Answer::Superseded),
            Some(_) => Err(self.failed(&words, "what it prints contradicts its exit status")),
        }
    }

    fn settle(
        &mut self,
        lineage: Lineage,
        term: Term,
        winner: Incarnation,
        to: Settled,
    ) -> Result<Answer, Unknown> {
        let outcome = OutcomeText::from(to);
        let (guest, number) = (Uuid(lineage.0).to_string(), term.0.to_string());
        let by = Uuid(winner.0).to_string();
        let heir = outcome.yielded_to.map(|heir| heir.to_string());
        let what = if heir.is_some() { "yielded" } else { "running" };
        let mut words = vec!["settle", &guest, &number, &by, what];
        words.extend(heir.as_deref());
        let (granted, printed) = self.answer(&words)?;
        // Without the record itself it is not known on which side the winner is.
        let answer = match printed {
            None if granted => self.look(lineage, term)?,
            None => return Err(self.failed(&words, "status 1, but it prints no record")),
            Some(answer) => answer,
        };
        let done = matches!(answer, Answer::Record(Some(record)) if record.settled == Some(to)
            && record.winner.incarnation == winner);
        match done == granted {
            true => Ok(answer),
            false => Err(self.failed(&words, "the record contradicts its exit status")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use replication::Side;

    use super::*;

    const GUEST: Lineage = Lineage(7);
    const TERM: Term = Term(1);
    const P: Party = Party { side: Side::Primary, incarnation: Incarnation(1) };
    const MINE: &str = r#"{"word":"promote","side":"primary","incarnation":"00000000-0000-0000-0000-000000000001"}"#;
    const OTHERS: &str =
        r#"{"word":"solo","side":"backup","incarnation":"00000000-0000-0000-0000-000000000002"}"#;

    fn witness(script: &str, limit: Duration) -> Exec {
        // A script that ignores its words.
        Exec::new(format!("sh -c '{script}'"), limit)
    }

    fn claimed(script: &str) -> Result<Answer, Unknown> {
        witness(script, Duration::from_secs(60)).claim(GUEST, TERM, Word::Promote, P)
    }

    fn record(text: &str) -> Answer {
        let text: RecordText = serde_json::from_str(text).unwrap();
        Answer::Record(Some(text.try_into().unwrap()))
    }

    #[test]
    fn the_exit_status_grants_or_denies() {
        assert_eq!(claimed("exit 0"), Ok(record(MINE)));
        assert_eq!(claimed(&format!("echo {}", MINE.replace('"', "\\\""))), Ok(record(MINE)));
        let others = format!("echo {}; exit 1", OTHERS.replace('"', "\\\""));
        assert_eq!(claimed(&others), Ok(record(OTHERS)));
        assert_eq!(claimed("echo superseded; exit 1"), Ok(Answer::Superseded));
    }

    #[test]
    fn a_command_that_lies_or_fails_has_not_answered() {
        let quoted = |text: &str| text.replace('"', "\\\"");
        for (script, says) in [
            (format!("echo {}; exit 0", quoted(OTHERS)), "contradicts"),
            (format!("echo {}; exit 1", quoted(MINE)), "contradicts"),
            ("echo open; exit 0".into(), "contradicts"),
            ("echo superseded; exit 0".into(), "contradicts"),
            ("exit 1".into(), "does not print who"),
            ("echo no quorum >&2; exit 2".into(), "status 2: no quorum"),
            ("echo granted; exit 0".into(), "no record"),
            ("kill -9 $$".into(), "status 137"),
        ] {
            let said = claimed(&script).unwrap_err().to_string();
            assert!(said.contains(says), "{script}: {said}");
        }
        let mut missing = Exec::new("/no/such/command".into(), Duration::from_secs(60));
        assert!(missing.look(GUEST, TERM).is_err());
        assert!(witness("exit 1", Duration::from_secs(60)).look(GUEST, TERM).is_err());
        assert!(witness("exit 0", Duration::from_secs(60)).look(GUEST, TERM).is_err());
        assert!(witness("echo a b", Duration::from_secs(60)).identify().is_err());
    }

    #[test]
    fn a_command_that_hangs_has_not_answered() {
        let begin = Instant::now();
        let mut hangs = witness("sleep 1000", Duration::from_millis(100));
        let said = hangs.claim(GUEST, TERM, Word::Solo, P).unwrap_err().to_string();
        assert!(said.contains("not ended within 100ms"), "{said}");
        assert!(begin.elapsed() < Duration::from_secs(60));
    }
}
