//! Allowed system calls, and the rules about their arguments, as programs are made from them.
#![expect(clippy::indexing_slicing, reason = "evaluated by the compiler, which then fails")]

/// A condition on an argument of a system call, of which the kernel uses 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Index of the argument, from 0.
    pub argument: u8,
    /// The condition.
    pub test: Test,
}

/// See [`Rule`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Test {
    /// The argument is this value.
    Is(u32),
    /// The argument is any other value.
    IsNot(u32),
    /// The bits in the first value, a mask, are those of the second.
    Has(u32, u32),
}

/// The allowed system calls.
#[derive(Debug, Clone, Copy)]
pub struct Calls<'a> {
    /// Their numbers, in ascending order.
    pub numbers: &'a [u32],
    /// Rules about the arguments of some of them, each with the call's number. If a call has rules,
    /// one of them has to hold.
    pub rules: &'a [(u32, Rule)],
}

impl Calls<'_> {
    /// Index of the first rule of the call `number`, at `from` or after it; the number of all rules
    /// if there is none.
    pub const fn rule(&self, number: u32, from: usize) -> usize {
        let mut at = from;
        while at < self.rules.len() && self.rules[at].0 != number {
            at += 1;
        }
        at
    }

    /// Whether the call `number` has the rules that the call `other` has.
    pub const fn has_rules_of(&self, other: u32, number: u32) -> bool {
        let (mut one, mut two) = (self.rule(other, 0), self.rule(number, 0));
        while one < self.rules.len() && two < self.rules.len() {
            let (rule, other_rule) = (self.rules[one].1, self.rules[two].1);
            if rule.argument != other_rule.argument || !rule.test.is(other_rule.test) {
                return false;
            }
            (one, two) = (self.rule(other, one + 1), self.rule(number, two + 1));
        }
        one == two
    }

    /// Whether the rule at `index` is the first of its call that is about its bits.
    pub const fn is_first(&self, index: usize) -> bool {
        let (number, rule) = self.rules[index];
        let mut at = self.rule(number, 0);
        while !self.rules[at].1.is_about_bits_of(rule) {
            at = self.rule(number, at + 1);
        }
        at == index
    }

    /// The least value, `from` or above, that is allowed by a rule of the call `number` about the
    /// bits of `like`.
    pub const fn allowed_from(&self, number: u32, like: Rule, from: u32) -> Option<u32> {
        let mut least = None;
        let mut at = self.rule(number, 0);
        while at < self.rules.len() {
            let rule = self.rules[at].1;
            if let Test::Is(value) | Test::Has(_, value) = rule.test
                && rule.is_about_bits_of(like)
                && value >= from
            {
                least = match least {
                    Some(known) if known < value => Some(known),
                    _ => Some(value),
                };
            }
            at = self.rule(number, at + 1);
        }
        least
    }
}

impl Rule {
    /// A mask of the argument's bits, if not all count.
    pub const fn mask(self) -> Option<u32> {
        match self.test {
            Test::Has(mask, _) => Some(mask),
            Test::Is(_) | Test::IsNot(_) => None,
        }
    }

    pub const fn is_about_bits_of(self, other: Self) -> bool {
        let same = match (self.mask(), other.mask()) {
            (Some(this), Some(other)) => this == other,
            (None, None) => true,
            _ => false,
        };
        same && self.argument == other.argument
    }
}

impl Test {
    const fn is(self, other: Self) -> bool {
        match (self, other) {
            (Self::Is(this), Self::Is(other)) | (Self::IsNot(this), Self::IsNot(other)) => {
                this == other
            }
            (Self::Has(mask, this), Self::Has(other_mask, other)) => {
                mask == other_mask && this == other
            }
            _ => false,
        }
    }
}
