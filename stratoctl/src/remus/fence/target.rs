//! The side that is to be fenced, and the side that fences: what each notes, and what that forbids.
use std::time::Duration;

use replication::Side;

use super::marks::{Mark, Marks, Stored};
use crate::remus::{Unknown, uuid::Uuid};

/// How long a monitor that was killed may take to end.
pub const KILL_LIMIT: Duration = Duration::from_secs(5);

/// What has become of a side that was to be fenced.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fenced {
    /// It certainly does not run, and will not start by itself.
    Down,
    /// It refuses: it continues.
    Refused(String),
}

/// Note that this side fences the other one in `term`. The caller holds the lock of `marks`.
///
/// # Errors
/// It was fenced itself, or the mark cannot be read or written.
pub fn begin(marks: &dyn Marks, lineage: Uuid, term: u64) -> Result<(), Unknown> {
    match marks.read()? {
        Some(known) if known.lineage == lineage && known.term >= term => match known.mark {
            Mark::Fencing if known.term == term => Ok(()),
            Mark::Fencing => Err(Unknown::new(format!(
                "this side has fenced the other one in a later term, {}",
                known.term
            ))),
            Mark::Fenced => {
                Err(Unknown::new(format!("this side was fenced in term {}", known.term)))
            }
        },
        _ => marks.write(&Stored { lineage, term, mark: Mark::Fencing }),
    }
}

/// Note that this side, `side`, was fenced in `term`, unless that is refused. The caller holds the
/// lock of `marks`, and kills the side's process afterwards.
///
/// # Errors
/// The mark cannot be read or written: nothing is certain then.
pub fn yield_to(
    marks: &dyn Marks,
    side: Side,
    lineage: Uuid,
    term: u64,
) -> Result<Fenced, Unknown> {
    match marks.read()? {
        Some(known) if known.lineage == lineage && known.term > term => {
            Ok(Fenced::Refused(format!("term {term} is over: this side is in term {}", known.term)))
        }
        Some(known)
            if known.lineage == lineage
                && known.term == term
                && known.mark == Mark::Fencing
                && side == Side::Primary =>
        {
            Ok(Fenced::Refused(format!("the primary is fencing its backup in term {term}")))
        }
        // Also when it is there already: it has to be durable.
        _ => {
            marks.write(&Stored { lineage, term, mark: Mark::Fenced })?;
            Ok(Fenced::Down)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    const GUEST: Uuid = Uuid(7);

    /// A mark in memory, on a disk that may fail.
    #[derive(Default)]
    struct Note {
        mark: RefCell<Option<Stored>>,
        fails: Cell<bool>,
    }

    impl Marks for Note {
        fn read(&self) -> Result<Option<Stored>, Unknown> {
            Ok(self.mark.borrow().clone())
        }

        fn write(&self, stored: &Stored) -> Result<(), Unknown> {
            match self.fails.get() {
                true => Err(Unknown::new("EIO")),
                false => {
                    *self.mark.borrow_mut() = Some(stored.clone());
                    Ok(())
                }
            }
        }
    }

    fn down(marks: &Note, side: Side, term: u64) -> bool {
        yield_to(marks, side, GUEST, term) == Ok(Fenced::Down)
    }

    /// In whatever order the steps of two crossing fences happen, the primary wins.
    #[test]
    fn where_fences_cross_the_primary_wins() {
        // A step: who, and whether it notes its fence or carries it out at the other side.
        let steps = [(0, false), (0, true), (1, false), (1, true)];
        let mut orders = 0;
        for order in permutations(&steps) {
            let at = |step| order.iter().position(|known| *known == step);
            if at((0, false)) > at((0, true)) || at((1, false)) > at((1, true)) {
                continue;
            }
            orders += 1;
            let (primary, backup) = (Note::default(), Note::default());
            let mut begun = [false, false];
            let mut won = [false, false];
            for (who, carries_out) in order {
                let (own, other, side) = match who {
                    0 => (&primary, &backup, Side::Backup),
                    _ => (&backup, &primary, Side::Primary),
                };
                if carries_out {
                    won[who] = begun[who] && down(other, side, 1);
                } else {
                    begun[who] = begin(own, GUEST, 1).is_ok();
                }
            }
            assert!(!(won[0] && won[1]), "each has fenced the other");
            assert!(won[0] || won[1], "and one of them continues");
            // Only a backup that was completely done before the primary had begun wins.
            assert_eq!(won[1], !begun[0]);
        }
        assert_eq!(orders, 6);
    }

    fn permutations(steps: &[(usize, bool)]) -> Vec<Vec<(usize, bool)>> {
        if steps.is_empty() {
            return vec![vec![]];
        }
        let mut all = Vec::new();
        for at in 0..steps.len() {
            let mut rest = steps.to_vec();
            let first = rest.remove(at);
            all.extend(permutations(&rest).into_iter().map(|tail| [vec![first], tail].concat()));
        }
        all
    }

    #[test]
    fn marks_of_other_terms_and_guests_do_not_count() {
        let marks = Note::default();
        begin(&marks, GUEST, 1).unwrap();
        begin(&marks, GUEST, 1).unwrap();
        assert!(down(&marks, Side::Primary, 2), "that fence was of the term before");
        assert!(begin(&marks, GUEST, 2).is_err(), "it is down");
        assert!(begin(&marks, GUEST, 1).is_err());
        begin(&marks, GUEST, 3).unwrap();
        assert!(!down(&marks, Side::Backup, 2), "late");
        assert!(yield_to(&marks, Side::Primary, Uuid(8), 1) == Ok(Fenced::Down));
    }

    #[test]
    fn a_mark_that_is_not_durable_proves_nothing() {
        let marks = Note::default();
        marks.fails.set(true);
        assert!(begin(&marks, GUEST, 1).is_err());
        assert!(yield_to(&marks, Side::Backup, GUEST, 1).is_err());
    }
}
