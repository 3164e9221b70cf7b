//! Whether the guest of a protected domain that has no monitor may run at its backup. Only the
//! witness knows that; where nobody has closed the last term, it is closed here, so that the backup
//! cannot continue the guest any more.
use anyhow::Context as _;
use replication::Term;

use super::{super::Context, cold};
use crate::{
    failure::Failure,
    matrix::{self, Leave, State, Verb},
    registry::Place,
    remus::{
        protection::Protection,
        uuid::Uuid,
        wire::{Need, RecordText, Said, SideText, WordText},
        witness::Asked,
    },
};

/// Most terms of one lineage.
const MAX_TERMS: u64 = 1 << 20;

/// Refuse `verb` if the guest of the domain at `place`, which has no monitor, may run at its backup;
/// otherwise forget that it was protected. The caller has its lock.
///
/// # Errors
/// It may run there, or nobody can tell.
pub fn leave_behind(ctx: &Context, verb: Verb, place: &Place) -> anyhow::Result<()> {
    let Some(protection) = Protection::of(place)? else { return Ok(()) };
    let name = &place.name;
    let doubt = |why: String| {
        let hint = format!(
            "look at its backup: `stratoctl info` there; if the guest certainly runs nowhere, \
             `stratoctl unprotect -F {name}` forgets the protection"
        );
        Failure::hint(format!("the guest of '{name}' may run at its backup: {why}"), hint)
    };
    let Some(uri) = protection.witness().map_err(|e| doubt(format!("the witness: {e}")))? else {
        let why = "it was protected when its monitor ended, and there is no witness to ask";
        return Err(doubt(why.to_owned()).into());
    };
    let program = std::env::current_exe().context("the path of this program")?;
    let mut witness = Asked::new(uri, protection.identity.clone(), program);
    // Its monitor has ended, so its number can be used once more.
    let own = match protection.incarnation {
        Some(own) => own,
        None => Uuid::random().context("no random numbers")?,
    };
    // A machine with disks asks by itself before it runs: its disks say in which term it was
    // protected. While that is open, what was decided before does not matter.
    let asks = has_disks(place) && !protection.shares_disks;
    if let (true, Some(Term(term))) = (asks, cold::open_term(place)) {
        let look = Need::Look { lineage: protection.lineage, term };
        if let Said::Record { record: None } = witness.ask(&look) {
            return Ok(());
        }
    }
    let ask = |need: Need| witness.ask(&need);
    match verdict(ask, (protection.lineage, protection.side), own, !asks).map_err(doubt)? {
        Verdict::Free if asks => Ok(()),
        Verdict::Free => {
            Protection::forget(&ctx.registry, place).context("cannot remove the record")
        }
        Verdict::Moved => {
            let moved = Protection { moved: true, ..protection };
            moved.record(&ctx.registry, place).context("cannot record that it has moved")?;
            Ok(matrix::admit(verb, State::Moved, name, Leave::default())?)
        }
    }
}

fn has_disks(place: &Place) -> bool {
    let description = place.description().ok();
    let drives = description.as_ref().and_then(|known| known.config.get("drive"));
    drives.and_then(serde_json::Value::as_array).is_some_and(|drives| !drives.is_empty())
}

/// What a witness says about a lineage.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// The guest runs nowhere, and no backup can continue it.
    Free,
    /// It was continued by another process.
    Moved,
}

/// Find out who has the guest that the process `own` had, of a lineage's side. If nobody has, and
/// `close`, the open term is closed for that process.
///
/// # Errors
/// Why that is not known.
fn verdict(
    mut ask: impl FnMut(Need) -> Said,
    (lineage, side): (Uuid, SideText),
    own: Uuid,
    close: bool,
) -> Result<Verdict, String> {
    let mut record = |need| match ask(need) {
        Said::Record { record } => Ok(Some(record)),
        Said::Superseded => Ok(None),
        Said::Unknown { reason } => Err(format!("the witness does not answer: {reason}")),
        Said::Connected { .. } | Said::Down => Err("that is no answer of a witness".to_owned()),
    };
    let moved = |record: &RecordText| {
        record.word != WordText::End && record.yielded_to.unwrap_or(record.incarnation) != own
    };
    // The first open term, and the last one that is decided. Of those before, a witness may only
    // say that they are superseded.
    let (mut open, mut last) = (1, None);
    loop {
        match record(Need::Look { lineage, term: open })? {
            Some(None) => break,
            Some(decided) => last = decided,
            None => {}
        }
        if open == MAX_TERMS {
            return Err(format!("it has more than {MAX_TERMS} terms"));
        }
        open += 1;
    }
    match last {
        Some(last) if moved(&last) => return Ok(Verdict::Moved),
        Some(RecordText { word: WordText::End, .. }) => return Ok(Verdict::Free),
        _ => {}
    }
    if !close {
        return Ok(Verdict::Free);
    }
    let (word, incarnation) = (WordText::Cold, own);
    match record(Need::Claim { lineage, term: open, word, side, incarnation })?.flatten() {
        Some(record) if moved(&record) => Ok(Verdict::Moved),
        Some(_) => Ok(Verdict::Free),
        None => Err(format!("term {open} was closed by another process at the same time")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remus::wire::SettledText;

    const LINEAGE: Uuid = Uuid(7);
    const OWN: Uuid = Uuid(1);
    const OTHER: Uuid = Uuid(2);

    fn closed(word: WordText, incarnation: Uuid) -> RecordText {
        let side = SideText::Primary;
        RecordText { word, side, incarnation, settled: None, yielded_to: None }
    }

    fn promoted(incarnation: Uuid, yielded_to: Option<Uuid>) -> RecordText {
        let settled = Some(match yielded_to {
            Some(_) => SettledText::Yielded,
            None => SettledText::Running,
        });
        let side = SideText::Backup;
        RecordText { side, settled, yielded_to, ..closed(WordText::Promote, incarnation) }
    }

    /// What comes of these records, of the terms from 1 on, and what they are afterwards.
    fn judge(records: Vec<RecordText>, close: bool) -> (Result<Verdict, String>, Vec<RecordText>) {
        let forgets = judge_by(records.clone(), close, true);
        assert_eq!(forgets, judge_by(records, close, false), "each witness says the same");
        forgets
    }

    /// By a witness that still `knows` the records of terms before the last one, or does not.
    fn judge_by(
        mut records: Vec<RecordText>,
        close: bool,
        knows: bool,
    ) -> (Result<Verdict, String>, Vec<RecordText>) {
        let ask = |need: Need| match need {
            Need::Look { term, .. } if !knows && term < records.len() as u64 => Said::Superseded,
            Need::Claim { term, .. } if term < records.len() as u64 => Said::Superseded,
            Need::Look { term, .. } => {
                Said::Record { record: records.get(term as usize - 1).copied() }
            }
            Need::Claim { word, side, incarnation, term, .. } => {
                if term as usize > records.len() {
                    records.push(RecordText { side, ..closed(word, incarnation) });
                }
                Said::Record { record: records.get(term as usize - 1).copied() }
            }
            _ => Said::Unknown { reason: "not asked here".into() },
        };
        (verdict(ask, (LINEAGE, SideText::Primary), OWN, close), records)
    }

    #[test]
    fn who_has_continued_the_guest_keeps_it() {
        for last in [
            promoted(OTHER, None),
            RecordText { settled: None, ..promoted(OTHER, None) },
            closed(WordText::Solo, OTHER),
            closed(WordText::Cold, OTHER),
            promoted(OWN, Some(OTHER)),
        ] {
            for records in [vec![last], vec![closed(WordText::Solo, OWN), last]] {
                assert_eq!(judge(records.clone(), true), (Ok(Verdict::Moved), records));
            }
        }
    }

    #[test]
    fn an_open_term_is_closed_before_the_guest_starts_again() {
        for records in [
            vec![],
            vec![closed(WordText::Solo, OWN)],
            vec![promoted(OTHER, Some(OWN))],
            vec![promoted(OTHER, None), promoted(OWN, None)],
        ] {
            let (judged, after) = judge(records.clone(), true);
            assert_eq!(judged, Ok(Verdict::Free), "{records:?}");
            let cold = [&records[..], &[closed(WordText::Cold, OWN)]].concat();
            assert_eq!(after, cold);
            assert_eq!(judge(after, true).0, Ok(Verdict::Free), "asked again");
            assert_eq!(judge(records.clone(), false), (Ok(Verdict::Free), records));
        }
        // A guest that has ended in order has no open term.
        for by in [OWN, OTHER] {
            let ended = vec![closed(WordText::End, by)];
            assert_eq!(judge(ended.clone(), true), (Ok(Verdict::Free), ended));
        }
    }

    #[test]
    fn without_an_answer_it_may_run() {
        let of = (LINEAGE, SideText::Primary);
        let silent = |_| Said::Unknown { reason: "it hangs".into() };
        let said = verdict(silent, of, OWN, true).unwrap_err();
        assert!(said.contains("it hangs"), "{said}");
        let overtaken = |need| match need {
            Need::Look { .. } => Said::Record { record: None },
            _ => Said::Superseded,
        };
        assert!(verdict(overtaken, of, OWN, true).is_err());
        // The backup claims first.
        let late = |need| match need {
            Need::Look { .. } => Said::Record { record: None },
            _ => Said::Record { record: Some(promoted(OTHER, None)) },
        };
        assert_eq!(verdict(late, of, OWN, true), Ok(Verdict::Moved));
    }
}
