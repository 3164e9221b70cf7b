//! What the searches under `tests/` need of every machine; see [`Rules`](crate::Rules).
use crate::{base::Base, identity::Connection, timers::Timer};

/// A machine whose states can be compared and whose timers can be fired at will.
pub trait Searched {
    /// What all machines share.
    fn base(&self) -> &Base;

    /// As [`Searched::base`].
    fn base_mut(&mut self) -> &mut Base;

    /// Make states comparable that differ only in clocks and in the numbers of questions and
    /// connections.
    fn normalise(&mut self, connection: impl Fn(Connection) -> Connection) {
        self.base_mut().normalise(connection);
    }

    /// The timers that are set. After [`normalise`](Self::normalise) any of them may be next.
    fn armed(&self) -> Vec<Timer> {
        self.base().timers.armed()
    }

    /// Let `timer` be due now.
    fn make_due(&mut self, timer: Timer) {
        let now = self.base().now;
        self.base_mut().timers.set(timer, now);
    }

    /// The nonce of the question that it waits for.
    fn nonce(&self) -> Option<u64> {
        self.base().nonce()
    }

    /// The connection that it uses.
    fn connection(&self) -> Option<Connection> {
        self.base().connection
    }

    /// Whether it has claimed this term.
    fn has_claimed(&self) -> bool {
        self.base().claimed
    }
}
