//! What all machines share: who they are, their connection, the question that is being asked, the
//! sidecar word that is being written, their timers, and the outputs of the step in progress.
use std::time::Duration;

use crate::{
    hearing::Hearing,
    identity::{Connection, Epoch, Incarnation, Lineage, Party, Side, Term},
    interface::{Event, Mark, Output},
    message::{Frame, Message},
    record::{Answer, Question, Settled, Word},
    rules::Rules,
    settings::Settings,
    timers::{Time, Timer, Timers},
};

/// First and longest time between two attempts.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// The identity of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity {
    /// Its domain.
    pub lineage: Lineage,
    /// The process.
    pub incarnation: Incarnation,
}

/// How long a peer may be silent at least, as long as nothing depends on it.
const PATIENCE: Duration = Duration::from_secs(2);

/// What all machines share.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Base {
    pub me: Identity,
    pub settings: Settings,
    pub rules: Rules,
    pub side: Side,
    pub term: Term,
    pub now: Time,
    /// The connection in use.
    pub connection: Option<Connection>,
    /// A claim of this term was sent, or a fence begun: the term is burnt.
    pub claimed: bool,
    /// The question that is asked until it is answered.
    asking: Option<Asking>,
    nonce: u64,
    /// The word that is being written.
    pub marking: Option<Mark>,
    /// Nothing depends on the peer yet: no output is held for it, and it may not promote. A host
    /// that is busy with the first copy is not suspected in the time-out.
    patient: bool,
    /// When the peer was heard.
    pub(crate) hearing: Hearing,
    /// How often the peer was suspected.
    pub stalls: u64,
    /// Time from one beat to the next, where the settings' own is not wanted.
    pub(crate) heartbeat: Option<Duration>,
    /// Time until the next attempt to connect.
    redial: Duration,
    pub(crate) timers: Timers,
    out: Vec<Output>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Asking {
    nonce: u64,
    question: Question,
    again: Duration,
}

impl Base {
    pub fn new(me: Identity, side: Side, term: Term, settings: Settings, rules: Rules) -> Self {
        Self {
            me,
            settings,
            rules,
            side,
            term,
            now: Time::ZERO,
            connection: None,
            claimed: false,
            asking: None,
            nonce: 0,
            marking: None,
            patient: false,
            hearing: Hearing::default(),
            stalls: 0,
            heartbeat: None,
            redial: BACK_OFF.0,
            timers: Timers::default(),
            out: Vec::new(),
        }
    }

    /// This process, as records name it.
    pub fn party(&self) -> Party {
        Party { side: self.side, incarnation: self.me.incarnation }
    }

    pub fn output(&mut self, output: Output) {
        self.out.push(output);
    }

    pub fn tell(&mut self, event: Event) {
        self.output(Output::Tell(event));
    }

    pub fn take_outputs(&mut self) -> Vec<Output> {
        std::mem::take(&mut self.out)
    }

    /// Time from one beat to the next.
    pub fn heartbeat(&self) -> Duration {
        self.heartbeat.unwrap_or_else(|| self.settings.heartbeat())
    }

    /// Send over the connection in use, if there is one.
    pub fn send(&mut self, epoch: Epoch, message: Message) {
        if let Some(connection) = self.connection {
            self.output(Output::Send(connection, Frame { term: self.term, epoch, message }));
        }
    }

    /// Leave the connection in use.
    pub fn hang_up(&mut self) {
        if let Some(connection) = self.connection.take() {
            self.output(Output::Close(connection));
        }
    }

    fn patience(&self) -> Duration {
        let timeout = self.settings.timeout;
        if self.patient { timeout.max(PATIENCE) } else { timeout }
    }

    /// From here on the peer may be silent for longer, or not.
    pub fn set_patient(&mut self, patient: bool) {
        self.patient = patient;
        let limit = self.now + self.patience();
        if self.timers.get(Timer::Silence).is_some_and(|due| patient || due > limit) {
            self.timers.set(Timer::Silence, limit);
        }
    }

    /// A byte of the peer has arrived.
    pub fn heard(&mut self) {
        self.timers.set(Timer::Silence, self.now + self.patience());
        let heartbeat = self.heartbeat();
        if let Some(gap) = self.hearing.heard(self.now, &self.settings, heartbeat) {
            self.tell(Event::Gap(gap));
        }
    }

    /// Send a beat that says whether a claim was sent, and whether this side is unfit; also on the
    /// second path while `beside`, and again after a heart-beat's time.
    pub fn beat(&mut self, epoch: Epoch, (claimed, unfit): (bool, bool), probe: u64, beside: bool) {
        self.send(epoch, Message::Beat { claimed, unfit, probe });
        if beside {
            self.output(Output::BeatBeside);
        }
        if beside || self.connection.is_some() {
            self.timers.set(Timer::Beat, self.now + self.heartbeat());
        } else {
            self.timers.clear(Timer::Beat);
        }
    }

    /// Whether this process has been stopped for so long, up to `now`, that what it reads may be
    /// old.
    pub fn stood_still(&self, now: Time) -> bool {
        self.timers.next().is_some_and(|due| self.settings.stood_still(due, now))
    }

    /// Begin to write a word. If several are begun, only the last one is waited for.
    pub fn mark(&mut self, mark: Mark) {
        self.marking = Some(mark);
        self.output(Output::Mark(mark));
    }

    /// If `mark` is the word that is waited for, stop waiting and return true.
    pub fn marked(&mut self, mark: Mark) -> bool {
        self.marking.take_if(|waited| *waited == mark).is_some()
    }

    /// Ask until there is an answer. This replaces any earlier question.
    pub fn ask(&mut self, question: Question) {
        if self.asked() == Some(question) {
            return;
        }
        self.nonce += 1;
        self.asking = Some(Asking { nonce: self.nonce, question, again: BACK_OFF.0 });
        self.ask_again();
    }

    /// The question that waits for its answer.
    pub fn asked(&self) -> Option<Question> {
        self.asking.map(|asking| asking.question)
    }

    /// Ask the question in progress once more.
    pub fn ask_again(&mut self) {
        let Some(asking) = &mut self.asking else { return };
        let Asking { nonce, question, again } = *asking;
        asking.again = (again * 2).min(BACK_OFF.1);
        if again == BACK_OFF.1 {
            self.tell(Event::NoAnswer);
        }
        self.timers.set(Timer::Ask, self.now + again);
        self.output(Output::Ask { nonce, question });
    }

    /// If `answer` answers the question in progress, finish that question and return true. Answers
    /// to any other question or nonce are ignored. An open record does not answer a claim, nor does
    /// an unsettled one answer [`Question::Settle`]: they count as no answer. But who runs the guest
    /// has to know of a record that is still open, or another's.
    pub fn answered(&mut self, nonce: u64, question: Question, answer: Answer) -> bool {
        let asked = |asking: Asking| asking.nonce == nonce && asking.question == question;
        let fits = match (question, answer) {
            (Question::Settle { winner, to: Settled::Running, .. }, Answer::Record(record)) => {
                record.is_none_or(|record| {
                    let open = record.word == Word::Promote && record.settled.is_none();
                    !open || record.winner.incarnation != winner
                })
            }
            (Question::Settle { .. }, Answer::Record(record)) => {
                record.is_some_and(|record| record.settled.is_some())
            }
            (Question::Claim { .. }, Answer::Record(record)) => record.is_some(),
            (Question::Fence { .. }, answer) => answer == Answer::Down,
            (_, answer) => answer != Answer::Down,
        };
        let ours = fits && self.asking.is_some_and(asked);
        if ours {
            self.forget_question();
        }
        ours
    }

    pub fn forget_question(&mut self) {
        self.asking = None;
        self.timers.clear(Timer::Ask);
    }

    /// Connect, now or after the back-off.
    pub fn dial_again(&mut self, at_once: bool) {
        if at_once {
            self.redial = BACK_OFF.0;
            self.output(Output::Dial);
        }
        self.timers.set(Timer::Dial, self.now + self.redial);
        self.redial = (self.redial * 2).min(BACK_OFF.1);
    }

    /// Make states comparable that differ only in their clocks and in the numbers of questions and
    /// connections: every timer that is set may be due next, and numbers keep only their order.
    #[cfg(feature = "controls")]
    pub fn normalise(&mut self, connection: impl Fn(Connection) -> Connection) {
        self.now = Time::ZERO;
        self.hearing = Hearing::default();
        self.stalls = 0;
        // Beats say nothing new: what they would say of a claim is sent with the claim. The limit
        // on acknowledgements ends as silence does.
        self.timers.clear(Timer::Beat);
        self.timers.clear(Timer::AckLimit);
        self.timers.forget();
        self.redial = BACK_OFF.0;
        self.nonce = 0;
        if let Some(asking) = &mut self.asking {
            (asking.nonce, self.nonce) = (1, 1);
            asking.again = BACK_OFF.0;
        }
        self.connection = self.connection.map(connection);
    }

    /// The nonce of the question in progress.
    #[cfg(feature = "controls")]
    pub fn nonce(&self) -> Option<u64> {
        self.asking.map(|asking| asking.nonce)
    }
}
