//! The witness: one compare-and-swap per term.
use std::collections::BTreeMap;

use crate::{
    identity::{Lineage, Term},
    record::{Answer, Question, Record, Settled, Word},
    rules::{Rule, Rules},
};

/// The records of a witness. The real ones are files or keys elsewhere, with the same rules; this
/// one is their reference.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Witness {
    records: BTreeMap<(Lineage, Term), Record>,
    rules: Rules,
}

/// What a question leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    /// To be durable before the answer is given.
    pub store: Option<(Term, Record)>,
    /// The answer.
    pub answer: Answer,
}

impl Witness {
    /// A witness that has decided nothing yet.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self { records: BTreeMap::new(), rules }
    }

    /// The record of a term; `None` while it is open.
    #[must_use]
    pub fn record(&self, lineage: Lineage, term: Term) -> Option<Record> {
        self.records.get(&(lineage, term)).copied()
    }

    /// Answer a question. The first claim of a term closes it, and every later question, also from
    /// the winner, is answered with that record. Nothing is ever deleted.
    pub fn step(&mut self, lineage: Lineage, question: Question) -> Reply {
        let term = question.term();
        let known = self.record(lineage, term);
        let superseded =
            self.records.range((lineage, term.next())..).any(|((of, _), _)| *of == lineage);
        let wanted = match (question, known) {
            (Question::Claim { word, party, .. }, None) if !superseded => {
                Some(Record { word, winner: party, settled: None })
            }
            (Question::Settle { winner, to, .. }, Some(known)) => {
                let whose = known.word == Word::Promote && known.winner.incarnation == winner;
                let gives_back = matches!(to, Settled::Yielded { .. });
                let open = known.settled.is_none() && whose;
                (open && (self.rules.hold(Rule::Yield) || !gives_back))
                    .then_some(Record { settled: Some(to), ..known })
            }
            _ => None,
        };
        let store = wanted.map(|record| (term, record));
        if let Some((term, record)) = store {
            self.records.insert((lineage, term), record);
        }
        let answer = match wanted.or(known) {
            None if superseded => Answer::Superseded,
            record => Answer::Record(record),
        };
        Reply { store, answer }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{Incarnation, Party, Side};

    const GUEST: Lineage = Lineage(7);
    const P: Party = Party { side: Side::Primary, incarnation: Incarnation(1) };
    const B: Party = Party { side: Side::Backup, incarnation: Incarnation(2) };

    fn claim(w: &mut Witness, term: u64, word: Word, party: Party) -> Answer {
        w.step(GUEST, Question::Claim { term: Term(term), word, party }).answer
    }

    #[test]
    fn the_first_claim_wins_and_everybody_is_told_the_same() {
        let mut w = Witness::default();
        let won = Record { word: Word::Promote, winner: B, settled: None };
        assert_eq!(claim(&mut w, 1, Word::Promote, B), Answer::Record(Some(won)));
        assert_eq!(claim(&mut w, 1, Word::Solo, P), Answer::Record(Some(won)));
        assert_eq!(claim(&mut w, 1, Word::Promote, B), Answer::Record(Some(won)));
        let other = Lineage(8);
        assert_eq!(w.step(other, Question::Look { term: Term(1) }).answer, Answer::Record(None));
    }

    #[test]
    fn a_promotion_is_settled_once_by_its_winner() {
        let mut w = Witness::default();
        claim(&mut w, 1, Word::Promote, B);
        let settle = |winner, to| Question::Settle { term: Term(1), winner, to };
        let yielded = Settled::Yielded { to: P.incarnation };
        assert_eq!(w.step(GUEST, settle(P.incarnation, yielded)).store, None);
        assert!(w.step(GUEST, settle(B.incarnation, yielded)).store.is_some());
        assert_eq!(w.step(GUEST, settle(B.incarnation, Settled::Running)).store, None);
        let record = w.record(GUEST, Term(1)).unwrap();
        assert_eq!(record.reading(P, Rules::default()), crate::record::Reading::Mine);
        assert_eq!(record.reading(B, Rules::default()), crate::record::Reading::Lost);
    }

    #[test]
    fn a_decided_higher_term_denies_the_lower_ones() {
        let mut w = Witness::default();
        claim(&mut w, 5, Word::Solo, P);
        assert_eq!(claim(&mut w, 4, Word::Solo, P), Answer::Superseded);
        assert_eq!(w.record(GUEST, Term(4)), None);
    }
}
