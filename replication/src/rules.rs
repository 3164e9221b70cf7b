//! The rules that the promise rests on, by name. With the feature `controls` a test may switch one
//! off, to see that the searches find what it prevents; without that feature none can be, and the
//! checks cost nothing.

/// A rule of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Rule {
    /// Gates shut before the first `End`; a backup may promote only once `Armed`.
    Arm,
    /// A claim sent ends the term for both: its sender never goes back to Protected or Standby.
    Burn,
    /// A term binds two incarnations; the witness answers an incarnation, not a side.
    Pair,
    /// An armed term is closed by a claim before the primary continues without its backup.
    Close,
    /// The primary claims the term for the backup before it sends `Release`.
    Hand,
    /// A start from an image that says `protected` asks the witness.
    Cold,
    /// Output of an epoch waits for the backup's acknowledgement.
    Ack,
    /// The witness decides, not a time-out.
    Wit,
    /// A backup asks before it runs: silence is no proof.
    Gran,
    /// A backup that was granted the term and cannot run gives it back, and a Fenced primary keeps
    /// the guest until the backup is known to run.
    Yield,
    /// The image is not written before the epoch's journal is durable.
    Durable,
    /// The journal is trimmed only after the image was synced.
    Sync,
    /// Promotion makes the journal void before the guest's first write.
    Void,
}

/// Which rules hold: all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Rules {
    #[cfg(feature = "controls")]
    off: Option<Rule>,
}

impl Rules {
    /// All of them.
    pub const ALL: Self = Self {
        #[cfg(feature = "controls")]
        off: None,
    };

    /// All rules but one.
    #[cfg(feature = "controls")]
    #[must_use]
    pub const fn without(rule: Rule) -> Self {
        Self { off: Some(rule) }
    }

    /// Whether `rule` holds.
    #[cfg(feature = "controls")]
    pub(crate) fn hold(self, rule: Rule) -> bool {
        self.off != Some(rule)
    }

    /// Whether `rule` holds: it does.
    #[cfg(not(feature = "controls"))]
    #[expect(clippy::unused_self, reason = "with the feature `controls` it is used")]
    pub(crate) const fn hold(self, _rule: Rule) -> bool {
        true
    }
}
