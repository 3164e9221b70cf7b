//! A monitor's questions, the answers, and a witness's records, as JSON.
use clap::ValueEnum;
use replication::{
    Answer, Incarnation, Lineage, Party, Question, Record, Settled, Side, Term, Word,
};
use serde::{Deserialize, Serialize};

use super::{Unknown, uuid::Uuid};

/// What a monitor needs: the data of its event `REPLICATION_NEEDS`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Needs {
    /// To be repeated in the answer.
    pub nonce: u64,
    /// What.
    #[serde(flatten)]
    pub need: Need,
}

/// What a monitor needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "need", rename_all = "lowercase")]
pub enum Need {
    /// A connection to the backup.
    Connect,
    /// The record of a term.
    Look { lineage: Uuid, term: u64 },
    /// To close a term.
    Claim { lineage: Uuid, term: u64, word: WordText, side: SideText, incarnation: Uuid },
    /// To record what became of a promotion.
    Settle {
        lineage: Uuid,
        term: u64,
        winner: Uuid,
        to: SettledText,
        #[serde(rename = "yielded-to", default, skip_serializing_if = "Option::is_none")]
        yielded_to: Option<Uuid>,
    },
    /// That the peer does not run.
    Fence { lineage: Uuid, term: u64 },
}

impl Need {
    /// Its name on the wire.
    pub const fn word(&self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Look { .. } => "look",
            Self::Claim { .. } => "claim",
            Self::Settle { .. } => "settle",
            Self::Fence { .. } => "fence",
        }
    }

    /// As a question about a lineage, if it is one.
    ///
    /// # Errors
    /// A connection is no question, and a promotion is not yielded to nobody.
    pub fn question(self) -> Result<(Lineage, Question), Unknown> {
        let (lineage, question) = match self {
            Self::Connect => return Err(Unknown::new("a connection is not a question")),
            Self::Look { lineage, term } => (lineage, Question::Look { term: Term(term) }),
            Self::Claim { lineage, term, word, side, incarnation } => {
                let party = Party { side: side.into(), incarnation: Incarnation(incarnation.0) };
                (lineage, Question::Claim { term: Term(term), word: word.into(), party })
            }
            Self::Settle { lineage, term, winner, to, yielded_to } => {
                let winner = Incarnation(winner.0);
                let to = settled(Some(to), yielded_to)?
                    .ok_or_else(|| Unknown::new("there is nothing to record"))?;
                (lineage, Question::Settle { term: Term(term), winner, to })
            }
            Self::Fence { lineage, term } => (lineage, Question::Fence { term: Term(term) }),
        };
        Ok((Lineage(lineage.0), question))
    }
}

/// What an agent answers: a part of the arguments of `replication-answer`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "result", rename_all = "lowercase")]
pub enum Said {
    /// To [`Need::Connect`].
    Connected {
        /// The name that `getfd` has given to the connection.
        fd: String,
    },
    /// To a question to the witness.
    Record {
        /// As it is now, durably; `None` while the term is open.
        record: Option<RecordText>,
    },
    /// A later term is decided.
    Superseded,
    /// To [`Need::Fence`]: the peer certainly does not run.
    Down,
    /// There is no answer. What was asked may have happened.
    Unknown {
        /// Why, for people.
        reason: String,
    },
}

impl From<Result<Answer, Unknown>> for Said {
    fn from(answer: Result<Answer, Unknown>) -> Self {
        match answer {
            Ok(Answer::Record(record)) => Self::Record { record: record.map(Into::into) },
            Ok(Answer::Superseded) => Self::Superseded,
            Ok(Answer::Down) => Self::Down,
            Err(why) => Self::Unknown { reason: why.to_string() },
        }
    }
}

impl TryFrom<Said> for Answer {
    type Error = Unknown;

    fn try_from(said: Said) -> Result<Self, Unknown> {
        Ok(match said {
            Said::Record { record } => Self::Record(record.map(Record::try_from).transpose()?),
            Said::Superseded => Self::Superseded,
            Said::Down => Self::Down,
            Said::Unknown { reason } => return Err(Unknown::new(reason)),
            Said::Connected { .. } => return Err(Unknown::new("a connection is not an answer")),
        })
    }
}

/// By which word a term is closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WordText {
    Solo,
    Promote,
    Cold,
    End,
}

impl WordText {
    /// As on the wire.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Solo => "solo",
            Self::Promote => "promote",
            Self::Cold => "cold",
            Self::End => "end",
        }
    }
}

impl From<WordText> for Word {
    fn from(word: WordText) -> Self {
        match word {
            WordText::Solo => Self::Solo,
            WordText::Promote => Self::Promote,
            WordText::Cold => Self::Cold,
            WordText::End => Self::End,
        }
    }
}

impl From<Word> for WordText {
    fn from(word: Word) -> Self {
        match word {
            Word::Solo => Self::Solo,
            Word::Promote => Self::Promote,
            Word::Cold => Self::Cold,
            Word::End => Self::End,
        }
    }
}

/// A side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum SideText {
    /// Had the guest when the term began
    Primary,
    /// Holds its last checkpoint
    Backup,
}

impl SideText {
    /// As on the wire.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Primary => "primary",
            Self::Backup => "backup",
        }
    }
}

impl From<SideText> for Side {
    fn from(side: SideText) -> Self {
        match side {
            SideText::Primary => Self::Primary,
            SideText::Backup => Self::Backup,
        }
    }
}

impl From<Side> for SideText {
    fn from(side: Side) -> Self {
        match side {
            Side::Primary => Self::Primary,
            Side::Backup => Self::Backup,
        }
    }
}

/// What became of a promotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SettledText {
    Running,
    Yielded,
}

/// The decision of one term.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecordText {
    pub word: WordText,
    pub side: SideText,
    pub incarnation: Uuid,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settled: Option<SettledText>,
    #[serde(rename = "yielded-to", default, skip_serializing_if = "Option::is_none")]
    pub yielded_to: Option<Uuid>,
}

impl From<Record> for RecordText {
    fn from(record: Record) -> Self {
        let outcome = record.settled.map(OutcomeText::from);
        Self {
            word: record.word.into(),
            side: record.winner.side.into(),
            incarnation: Uuid(record.winner.incarnation.0),
            settled: outcome.map(|outcome| outcome.settled),
            yielded_to: outcome.and_then(|outcome| outcome.yielded_to),
        }
    }
}

impl TryFrom<RecordText> for Record {
    type Error = Unknown;

    fn try_from(text: RecordText) -> Result<Self, Unknown> {
        let settled = settled(text.settled, text.yielded_to)?;
        if settled.is_some() && text.word != WordText::Promote {
            return Err(Unknown::new("a record is damaged: only a promotion has an outcome"));
        }
        let winner = Party { side: text.side.into(), incarnation: Incarnation(text.incarnation.0) };
        Ok(Self { word: text.word.into(), winner, settled })
    }
}

/// What became of a promotion, as a witness keeps it beside the record itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutcomeText {
    pub settled: SettledText,
    #[serde(rename = "yielded-to", default, skip_serializing_if = "Option::is_none")]
    pub yielded_to: Option<Uuid>,
}

impl From<Settled> for OutcomeText {
    fn from(settled: Settled) -> Self {
        match settled {
            Settled::Running => Self { settled: SettledText::Running, yielded_to: None },
            Settled::Yielded { to } => {
                Self { settled: SettledText::Yielded, yielded_to: Some(Uuid(to.0)) }
            }
        }
    }
}

impl TryFrom<OutcomeText> for Settled {
    type Error = Unknown;

    fn try_from(text: OutcomeText) -> Result<Self, Unknown> {
        settled(Some(text.settled), text.yielded_to)?
            .ok_or_else(|| Unknown::new("an outcome is damaged"))
    }
}

fn settled(
    settled: Option<SettledText>,
    yielded_to: Option<Uuid>,
) -> Result<Option<Settled>, Unknown> {
    match (settled, yielded_to) {
        (None, None) => Ok(None),
        (Some(SettledText::Running), None) => Ok(Some(Settled::Running)),
        (Some(SettledText::Yielded), Some(to)) => {
            Ok(Some(Settled::Yielded { to: Incarnation(to.0) }))
        }
        _ => Err(Unknown::new("'yielded-to' belongs to 'yielded', and to nothing else")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const A: &str = "00000000-0000-0000-0000-00000000000a";
    const B: &str = "00000000-0000-0000-0000-00000000000b";

    fn read(value: &Value) -> Needs {
        let needs: Needs = serde_json::from_value(value.clone()).unwrap();
        assert_eq!(serde_json::to_value(&needs).unwrap(), *value, "written as it was read");
        needs
    }

    #[test]
    fn every_need_of_a_monitor_is_understood() {
        let connect = read(&json!({"nonce": 7, "need": "connect"}));
        assert_eq!(connect, Needs { nonce: 7, need: Need::Connect });
        assert!(connect.need.question().is_err());
        let claim = read(&json!({"nonce": 1, "need": "claim", "lineage": A, "term": 3,
            "word": "promote", "side": "backup", "incarnation": B}));
        let party = Party { side: Side::Backup, incarnation: Incarnation(11) };
        let question = Question::Claim { term: Term(3), word: Word::Promote, party };
        assert_eq!(claim.need.question(), Ok((Lineage(10), question)));
        let settle = read(&json!({"nonce": 1, "need": "settle", "lineage": A, "term": 3,
            "winner": B, "to": "yielded", "yielded-to": A}));
        let to = Settled::Yielded { to: Incarnation(10) };
        let question = Question::Settle { term: Term(3), winner: Incarnation(11), to };
        assert_eq!(settle.need.question(), Ok((Lineage(10), question)));
        let odd = read(&json!({"nonce": 1, "need": "settle", "lineage": A, "term": 3,
            "winner": B, "to": "running", "yielded-to": A}));
        assert!(odd.need.question().is_err());
        let fence = read(&json!({"nonce": 1, "need": "fence", "lineage": A, "term": 3}));
        let question = Question::Fence { term: Term(3) };
        assert_eq!(fence.need.question(), Ok((Lineage(10), question)));
    }

    #[test]
    fn answers_are_written_as_the_monitor_reads_them() {
        let winner = Party { side: Side::Backup, incarnation: Incarnation(11) };
        let settled = Some(Settled::Yielded { to: Incarnation(10) });
        let record = Record { word: Word::Promote, winner, settled };
        for (answer, text) in [
            (Ok(Answer::Record(None)), json!({"result": "record", "record": null})),
            (
                Ok(Answer::Record(Some(record))),
                json!({"result": "record", "record": {"word": "promote", "side": "backup",
                    "incarnation": B, "settled": "yielded", "yielded-to": A}}),
            ),
            (Ok(Answer::Superseded), json!({"result": "superseded"})),
            (Ok(Answer::Down), json!({"result": "down"})),
            (Err(Unknown::new("late")), json!({"result": "unknown", "reason": "late"})),
        ] {
            let said = Said::from(answer.clone());
            assert_eq!(serde_json::to_value(&said).unwrap(), text);
            let again: Said = serde_json::from_value(text).unwrap();
            assert_eq!(Answer::try_from(again), answer);
        }
    }
}
