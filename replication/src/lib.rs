//! The protocol of replication: state machines of a primary, a backup and a witness that decide who
//! may run a guest, without threads, sockets, files, clocks or randomness. The caller passes in
//! each event with the time, and carries out the outputs: `step(now, input) -> outputs`. The
//! monitor and the searches under `tests/` drive the same code. What an epoch contains is bytes to
//! them; [`contents`] has its form.
//!
//! The promise: when one host, process or link fails, the guest continues at the other side from a
//! state that no outsider can tell from the one before; and there are never two copies whose output
//! can be seen.
//!
//! # An epoch
//!
//! ```text
//!            guest runs in epoch e         guest runs in epoch e+1
//!   primary ---------------------[pause]------------------------------------------------------
//!                Capture(e) -----'   | pages, End(e)            ^ Ack(e)   | ReleaseThrough(e):
//!                                    v                          |          v the output of e
//!   backup  ------------------------ Hold(e): memory, journal --'            leaves the gates
//! ```
//! Output is released only when the backup could continue from a state that has produced it. At
//! most two epochs are unacknowledged; beyond that the guest continues, and the epoch grows.
//!
//! # Who owns a term
//!
//! A *term* is one ownership of the guest. It binds two incarnations (processes), and is closed
//! exactly once, at the [`Witness`], by a compare-and-swap ([`Record`]): `solo`, `promote`, `cold`
//! or `end`. The winner is the primary of the next term. No time-out decides anything: it only
//! leads to a question.
//!
//! **Rule R.** Output leaves the primary only if (a) the backup has acknowledged its epoch in this
//! term, or (b) the term is the primary's alone. A guest runs at the backup only if the term is the
//! backup's.
//!
//! The states are drawn in [`primary`], [`backup`] and, for a start from disk, in [`Start`]'s
//! module. Each rule that the promise rests on has a name, and lies in one place:
//!
//! | rule | says | where |
//! |---|---|---|
//! | arm | gates shut before the first `End`; a backup may promote only once `Armed` | `primary/epochs.rs` `begin_epoch`, `acknowledged`; `backup/mod.rs` `may_promote` |
//! | burn | a claim sent ends the term for both | `primary/link.rs` `may_reconnect`; `backup/greeting.rs` `judge` |
//! | pair | a term binds two incarnations, and a record names one | `record.rs` `reading`; `primary/link.rs` `accepted`; `backup/greeting.rs` `judge` |
//! | close | an armed term is left by a claim only | `primary/command.rs` `leave` |
//! | hand | the primary claims for the backup before `Release` | `primary/epochs.rs` `give_away` |
//! | cold | a start from an image that says `protected` asks | `start.rs` `claim` |
//! | ack | output waits for the acknowledgement | `primary/epochs.rs` `release` |
//! | wit | the witness decides | `primary/term.rs` `claim`; `backup/term.rs` `try_claim` |
//! | gran | the backup asks before it runs | `backup/term.rs` `try_claim` |
//! | yield | who was granted a term and never ran gives it back; a Fenced primary keeps the guest | `witness.rs`; `primary/term.rs` `wait_for_backup`; `interface.rs` `unused` |
//! | durable, sync, void | the order of journal and image at the backup | `journal.rs` |
//!
//! # How it is checked
//!
//! `tests/search.rs` visits every order of events of these machines within small bounds. With the
//! feature `controls` it switches each rule off alone, and has to find what breaks.
//! `tests/simulator.rs` runs them against virtual time, with links that delay, processes that are
//! killed or stopped, and a guest whose client remembers every answer.
//!
//! # What the caller has to do
//!
//! - Carry out outputs in order. A process that dies between two is something the machines expect.
//! - Give inputs one at a time; drain sockets before a [`Input::Tick`].
//! - Pass in complete, undamaged frames only: checksums and digests of epochs are checked before.
//! - Repeat nothing: questions are asked again by [`Output::Ask`], with the same nonce.
//! - Report how full staging and gates are ([`Input::Room`]), and drop nothing of what is held.
//! - A second path for beats is its own: send one at each [`Output::BeatBeside`], and give each
//!   authentic one that arrives as [`Input::HeardBeside`]. It counts as a sign of life, and says
//!   nothing else.
#![forbid(unsafe_code)]

pub mod backup;
mod base;
pub mod contents;
mod hearing;
mod identity;
mod interface;
mod journal;
mod message;
pub mod pace;
pub mod primary;
mod record;
mod rules;
#[cfg(feature = "controls")]
mod searched;
mod settings;
mod start;
mod status;
mod timers;
pub mod wire;
mod witness;

pub use backup::Backup;
pub use base::Identity;
pub use identity::{Connection, Digest, Epoch, Incarnation, Lineage, Pair, Party, Side, Term};
pub use interface::{Bond, Command, Denial, Event, Exit, From, Input, Mark, Output, Room, Why};
pub use journal::Journal;
pub use message::{Accept, Fault, Frame, Hello, Memory, Message, Refusal};
pub use primary::Primary;
pub use record::{Answer, Question, Reading, Record, Settled, Word};
pub use rules::{Rule, Rules};
#[cfg(feature = "controls")]
pub use searched::Searched;
pub use settings::{Agreement, Arbiter, OnLoss, Settings, SettingsError};
pub use start::Start;
pub use status::{Status, Waiting};
pub use timers::{Time, Timer};
pub use witness::{Reply, Witness};
