//! The protocol's questions and answers as QMP has them.
use qmp::{
    Error,
    schema::{
        Event, OnBackupLoss, OnBackupSlow, ReplicationAnswer, ReplicationInfo, ReplicationNeed,
        ReplicationOutcome, ReplicationRecord, ReplicationResult, ReplicationSide,
        ReplicationStatus, ReplicationWord,
    },
};
use replication::{
    Answer, Event as Told, Incarnation, Lineage, OnLoss, Party, Question, Record, Settled, Side,
    Status, Word,
};

use crate::durations::milliseconds;

/// A question that waits for its answer.
#[derive(Debug, Clone, Copy)]
pub struct Query {
    /// Its number.
    pub nonce: u64,
    /// The question.
    pub question: Question,
}

/// The event that reports a change of state, or something else that is to be told. A backup that
/// refuses may have said `why`.
pub fn changed(
    info: &ReplicationInfo,
    previous: ReplicationStatus,
    told: Told,
    why: Option<&str>,
) -> Event {
    let reason = match (told, why) {
        (Told::Refused(refusal), Some(why)) => format!("the backup refuses: {refusal}: {why}"),
        (told, _) => reason(told),
    };
    let ReplicationInfo { state, term, epoch, .. } = *info;
    log::info!("replication: {state:?} in term {term}: {reason}");
    Event::ReplicationState { state, previous, term, epoch, reason }
}

fn reason(told: Told) -> String {
    match told {
        Told::State(why) => why.to_string(),
        Told::Refused(refusal) => format!("the backup refuses: {refusal}"),
        Told::Failed(_, why) => format!("the command failed: {why}"),
        Told::RecordChanged(_) => "the witness's record has changed".to_owned(),
        Told::NoAnswer => "a question has had no answer for a while".to_owned(),
        Told::Gap(gap) => format!("the other side was silent for {} ms", gap.as_millis()),
        Told::EpochsStandStill(time) => {
            format!("the primary has captured no epoch for {} ms", time.as_millis())
        }
    }
}

/// Show clients what a side says of itself.
pub fn show(shown: &mut ReplicationInfo, status: &Status) {
    (shown.term, shown.acked) = (status.term.0, status.acked.0);
    shown.peer = status.peer.map(|peer| peer.to_string());
    (shown.armed, shown.claimed) = (status.armed, status.claimed);
    shown.waiting_for = status.waiting.map(|waiting| waiting.name().to_owned());
    (shown.stalls, shown.missed_beats) = (status.stalls, status.missed_beats);
    shown.throttle_percent = status.throttle.into();
    shown.largest_gap = milliseconds(status.largest_gap);
}

/// A UUID in its usual form.
///
/// # Errors
/// When `text`, the value of `key`, is none.
pub fn parse_uuid(key: &str, text: &str) -> Result<u128, Error> {
    let digits: String = text.split('-').collect();
    let parsed =
        u128::from_str_radix(&digits, 16).ok().filter(|id| Lineage(*id).to_string() == text);
    parsed.ok_or_else(|| {
        Error::text(format!(
            "Invalid parameter '{key}': '{text}': must be a UUID of 36 characters, in lower case"
        ))
    })
}

impl Query {
    /// Whether it is to become known by it that the guest runs here.
    pub fn settles(&self) -> bool {
        matches!(self.question, Question::Settle { .. } | Question::Claim { .. })
    }

    /// The event that asks it.
    pub fn event(&self, lineage: Lineage) -> Event {
        let (mut word, mut side, mut incarnation) = (None, None, None);
        let (mut winner, mut to, mut yielded_to) = (None, None, None);
        let need = match self.question {
            Question::Look { .. } => ReplicationNeed::Look,
            Question::Claim { word: how, party, .. } => {
                word = Some(word_of(how));
                side = Some(side_of(party.side));
                incarnation = Some(party.incarnation.to_string());
                ReplicationNeed::Claim
            }
            Question::Settle { winner: who, to: outcome, .. } => {
                winner = Some(who.to_string());
                let (outcome, whose) = outcome_of(outcome);
                (to, yielded_to) = (Some(outcome), whose);
                ReplicationNeed::Settle
            }
            Question::Fence { .. } => ReplicationNeed::Fence,
        };
        Event::ReplicationNeeds {
            nonce: self.nonce,
            need,
            lineage: lineage.to_string(),
            term: Some(self.question.term().0),
            word,
            side,
            incarnation,
            winner,
            to,
            yielded_to,
        }
    }

    /// What an agent's answer means; `None` if it does not answer this question, or not yet.
    ///
    /// # Errors
    /// When it is not a possible answer.
    pub fn answer(&self, answer: &ReplicationAnswer) -> Result<Option<Answer>, Error> {
        let Event::ReplicationNeeds { need, .. } = self.event(Lineage(0)) else { return Ok(None) };
        if answer.nonce != self.nonce || answer.need != need {
            return Ok(None);
        }
        let impossible = || {
            let desc = "Invalid parameter 'result': it does not answer that question";
            Err(Error::text(desc))
        };
        match (answer.result, need) {
            (ReplicationResult::Unknown, _) => Ok(None),
            (ReplicationResult::Down, ReplicationNeed::Fence) => Ok(Some(Answer::Down)),
            (ReplicationResult::Connected | ReplicationResult::Down, _)
            | (_, ReplicationNeed::Fence | ReplicationNeed::Connect) => impossible(),
            (ReplicationResult::Superseded, _) => Ok(Some(Answer::Superseded)),
            (ReplicationResult::Record, _) => {
                Ok(Some(Answer::Record(answer.record.as_ref().map(record).transpose()?)))
            }
        }
    }
}

fn record(record: &ReplicationRecord) -> Result<Record, Error> {
    let incarnation = Incarnation(parse_uuid("record.incarnation", &record.incarnation)?);
    let side = match record.side {
        ReplicationSide::Primary => Side::Primary,
        ReplicationSide::Backup => Side::Backup,
    };
    let word = match record.word {
        ReplicationWord::Solo => Word::Solo,
        ReplicationWord::Promote => Word::Promote,
        ReplicationWord::Cold => Word::Cold,
        ReplicationWord::End => Word::End,
    };
    let settled = match (record.settled, &record.yielded_to) {
        (None, _) => None,
        (Some(ReplicationOutcome::Running), _) => Some(Settled::Running),
        (Some(ReplicationOutcome::Yielded), Some(to)) => {
            Some(Settled::Yielded { to: Incarnation(parse_uuid("record.yielded-to", to)?) })
        }
        (Some(ReplicationOutcome::Yielded), None) => {
            return Err(Error::text("Parameter 'record.yielded-to' is missing"));
        }
    };
    Ok(Record { word, winner: Party { side, incarnation }, settled })
}

fn word_of(word: Word) -> ReplicationWord {
    match word {
        Word::Solo => ReplicationWord::Solo,
        Word::Promote => ReplicationWord::Promote,
        Word::Cold => ReplicationWord::Cold,
        Word::End => ReplicationWord::End,
    }
}

fn side_of(side: Side) -> ReplicationSide {
    match side {
        Side::Primary => ReplicationSide::Primary,
        Side::Backup => ReplicationSide::Backup,
    }
}

fn outcome_of(settled: Settled) -> (ReplicationOutcome, Option<String>) {
    match settled {
        Settled::Running => (ReplicationOutcome::Running, None),
        Settled::Yielded { to } => (ReplicationOutcome::Yielded, Some(to.to_string())),
    }
}

/// What a primary does without its backup.
pub fn on_loss(wanted: OnBackupLoss) -> OnLoss {
    match wanted {
        OnBackupLoss::Witness => OnLoss::Claim,
        OnBackupLoss::Stall => OnLoss::Stall,
        OnBackupLoss::Stop => OnLoss::Stop,
        OnBackupLoss::Continue => OnLoss::Continue,
    }
}

/// Whether a primary leaves a slow backup.
pub fn leaves(wanted: OnBackupSlow) -> bool {
    wanted == OnBackupSlow::Solo
}
