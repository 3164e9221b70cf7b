//! The BPF program of a filter: a balanced tree over the numbers of system calls.
//!
//! Programs are made while the monitor is compiled, so everything here is `const`. When a filter is
//! installed, the kernel translates its program, and evaluates it once for each call number to
//! learn which calls are always allowed. Each thread installs its own filter, and all of that adds
//! to the time of every start. So programs are short: their trees end in chains of a few
//! comparisons, which take one instruction for each number, while a tree takes two. The program of
//! a thread that makes few calls begins by loading an argument, which the kernel's evaluation
//! cannot know, so that the evaluation ends at once.
//!
//! A program is built from its end, because its jumps only lead forward. All of them lead to one
//! `ALLOW` and one `TRAP`, as far as these are within reach.
#![expect(clippy::indexing_slicing, reason = "evaluated by the compiler, which then fails")]
#[cfg(test)]
mod tests;

use seccompiler::{BpfProgram, sock_filter};

use super::calls::{Calls, Rule, Test};
use crate::arch::AUDIT_ARCH;

/// Most instructions that the kernel accepts (BPF_MAXINSNS).
pub const MAX_LENGTH: usize = 4096;

/// Placeholder for the process id, which [`for_process`] inserts. No process has this id.
pub const ITSELF: u32 = i32::MAX.cast_unsigned();

/// Above all call numbers: the end of the last range of numbers.
const NUMBERS: u32 = 512;

// linux/filter.h
const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const IF_GREATER_OR_EQUAL: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

// struct seccomp_data (linux/seccomp.h)
const NUMBER: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

const NOTHING: sock_filter = sock_filter { code: 0, jt: 0, jf: 0, k: 0 };

/// Numbers or values that are compared one after the other at the end of a tree.
const CHAIN: usize = 4;

/// The program that allows `calls`. Any other call raises SIGSYS; a call of another architecture
/// ends the process. With `cached`, the kernel determines which calls are always allowed when the
/// program is installed, which takes about 10 us and saves some 20 ns for each of these calls.
pub const fn compile(calls: Calls<'_>, cached: bool) -> Program {
    let mut program = Program { code: [NOTHING; MAX_LENGTH], length: 0, allow: None, trap: None };
    let root = program.tree(&calls, Parts::of_calls(&calls).all(), Some(NUMBERS));
    program.within(0, root);
    program.push(LOAD, NUMBER);
    program.push(RETURN, libc::SECCOMP_RET_KILL_PROCESS);
    program.push_jump(IF_EQUAL, AUDIT_ARCH, 1, 0);
    program.push(LOAD, ARCH);
    if !cached {
        program.push(LOAD, ARGUMENTS);
    }
    program
}

/// `program`, for the process with the id `this`.
pub fn for_process(program: &[sock_filter], this: u32) -> BpfProgram {
    let mut program = program.to_vec();
    for instruction in program.iter_mut().filter(|instruction| instruction.k == ITSELF) {
        instruction.k = this;
    }
    program
}

/// What becomes of a call, or of an argument's value.
#[derive(Clone, Copy)]
enum Leaf {
    Verdict(Target),
    /// The rules of the call with this number decide.
    Rules(u32),
}

impl Leaf {
    const fn is(self, other: Self) -> bool {
        match (self, other) {
            (Self::Verdict(this), Self::Verdict(other)) => this.is(other),
            (Self::Rules(this), Self::Rules(other)) => this == other,
            _ => false,
        }
    }
}

/// A range of numbers or values that are treated alike: it begins at the first one, and extends to
/// the next range.
type Part = (u32, Leaf);

/// All numbers or values, in ranges.
struct Parts {
    parts: [Part; 1024],
    count: usize,
}

impl Parts {
    /// All of them are treated alike.
    const fn new(all: Target) -> Self {
        Self { parts: [(0, Leaf::Verdict(all)); 1024], count: 1 }
    }

    const fn of_calls(calls: &Calls<'_>) -> Self {
        let mut parts = Self::new(Target::Trap);
        let mut at = 0;
        while at < calls.numbers.len() {
            let number = calls.numbers[at];
            let leaf = match parts.leaf_before(number) {
                // The same rules as those of the call before.
                Some(Leaf::Rules(before)) if calls.has_rules_of(before, number) => {
                    Leaf::Rules(before)
                }
                _ if calls.rule(number, 0) < calls.rules.len() => Leaf::Rules(number),
                _ => Leaf::Verdict(Target::Allow),
            };
            parts.single(number, leaf, Leaf::Verdict(Target::Trap));
            at += 1;
        }
        parts
    }

    /// What becomes of the number before `next`, if one was given.
    const fn leaf_before(&self, next: u32) -> Option<Leaf> {
        match self.count {
            2.. if self.parts[self.count - 1].0 == next => Some(self.parts[self.count - 2].1),
            _ => None,
        }
    }

    /// Treat `value`, which is above all that were given before, as `leaf` says, and those above it
    /// as `others`.
    const fn single(&mut self, value: u32, leaf: Leaf, others: Leaf) {
        self.push(value, leaf);
        if let Some(end) = value.checked_add(1) {
            self.push(end, others);
        }
    }

    const fn push(&mut self, from: u32, leaf: Leaf) {
        if self.parts[self.count - 1].0 == from {
            self.count -= 1;
        }
        if self.count == 0 || !self.parts[self.count - 1].1.is(leaf) {
            self.parts[self.count] = (from, leaf);
            self.count += 1;
        }
    }

    const fn all(&self) -> &[Part] {
        self.parts.split_at(self.count).0
    }
}

/// Target of a jump.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// The call is allowed.
    Allow,
    /// It is not.
    Trap,
    /// The instruction with this number, counted from the end of the program and from 1.
    At(usize),
}

impl Target {
    const fn is(self, other: Self) -> bool {
        match (self, other) {
            (Self::Allow, Self::Allow) | (Self::Trap, Self::Trap) => true,
            (Self::At(this), Self::At(other)) => this == other,
            _ => false,
        }
    }
}

/// A program under construction, from its end.
pub struct Program {
    /// Filled from the end.
    code: [sock_filter; MAX_LENGTH],
    length: usize,
    /// The last return of each verdict.
    allow: Option<usize>,
    trap: Option<usize>,
}

impl Program {
    /// Number of its instructions.
    pub const fn len(&self) -> usize {
        self.length
    }

    /// Its instructions.
    pub const fn instructions<const LENGTH: usize>(&self) -> [sock_filter; LENGTH] {
        let mut all = [NOTHING; LENGTH];
        let mut at = 0;
        while at < LENGTH {
            let sock_filter { code, jt, jf, k } = self.code[MAX_LENGTH - self.length + at];
            all[at] = sock_filter { code, jt, jf, k };
            at += 1;
        }
        all
    }

    const fn push(&mut self, code: u16, k: u32) -> usize {
        self.push_jump(code, k, 0, 0)
    }

    const fn push_jump(&mut self, code: u16, k: u32, jt: u8, jf: u8) -> usize {
        self.length += 1;
        self.code[MAX_LENGTH - self.length] = sock_filter { code, jt, jf, k };
        self.length
    }

    /// The number of an instruction that does what `target` does, with at most `reach` instructions
    /// between it and the one that is pushed next.
    const fn within(&mut self, reach: usize, target: Target) -> usize {
        let known = match target {
            Target::At(at) => Some(at),
            Target::Allow => self.allow,
            Target::Trap => self.trap,
        };
        match (known, target) {
            (Some(at), _) if self.length <= at + reach => at,
            (_, Target::At(at)) => self.push(JUMP, (self.length - at) as u32),
            (_, Target::Allow) => {
                let at = self.push(RETURN, libc::SECCOMP_RET_ALLOW);
                self.allow = Some(at);
                at
            }
            (_, Target::Trap) => {
                let at = self.push(RETURN, libc::SECCOMP_RET_TRAP);
                self.trap = Some(at);
                at
            }
        }
    }

    /// Compare the accumulator with `k`.
    const fn compare(&mut self, code: u16, k: u32, yes: Target, no: Target) -> Target {
        /// Conditional jumps skip at most 255 instructions. One more may be added for `no`.
        const REACH: usize = 254;
        let (yes, no) = (self.within(REACH, yes), self.within(REACH, no));
        let (jt, jf) = (self.length - yes, self.length - no);
        Target::At(self.push_jump(code, k, jt as u8, jf as u8))
    }

    /// A tree over `parts`. With `end`, where the last part ends, each root is in the middle between
    /// the first value and the end, else in the middle of the parts.
    const fn tree(&mut self, calls: &Calls<'_>, parts: &[Part], end: Option<u32>) -> Target {
        if let [(_, only)] = parts {
            return self.leaf(calls, *only);
        }
        if let Some(Singles { at, mut count, others }) = Singles::of(parts) {
            let mut otherwise = self.leaf(calls, others);
            while count > 0 {
                count -= 1;
                let (value, leaf) = parts[at[count]];
                let found = self.leaf(calls, leaf);
                otherwise = self.compare(IF_EQUAL, value, found, otherwise);
            }
            return otherwise;
        }
        let mut middle = parts.len() / 2;
        if let Some(end) = end {
            let half = parts[0].0.midpoint(end);
            middle = 1;
            while middle + 1 < parts.len() && parts[middle].0 <= half {
                middle += 1;
            }
        }
        let (below, above) = parts.split_at(middle);
        let from = above[0].0;
        let yes = self.tree(calls, above, end);
        let no = self.tree(calls, below, if end.is_some() { Some(from) } else { None });
        self.compare(IF_GREATER_OR_EQUAL, from, yes, no)
    }

    const fn leaf(&mut self, calls: &Calls<'_>, leaf: Leaf) -> Target {
        match leaf {
            Leaf::Verdict(target) => target,
            Leaf::Rules(number) => self.rules(calls, number),
        }
    }

    /// Require that one of the rules of a call holds. Rules about the same bits of an argument form
    /// one tree.
    const fn rules(&mut self, calls: &Calls<'_>, number: u32) -> Target {
        let mut otherwise = Target::Trap;
        let mut at = calls.rules.len();
        while at > 0 {
            at -= 1;
            let (call, rule) = calls.rules[at];
            if call == number && calls.is_first(at) {
                otherwise = self.alike(calls, number, rule, otherwise);
            }
        }
        otherwise
    }

    /// Require that one of those rules of a call holds that are about the same bits as `like`.
    const fn alike(
        &mut self,
        calls: &Calls<'_>,
        number: u32,
        like: Rule,
        otherwise: Target,
    ) -> Target {
        let mut parts = Parts::new(otherwise);
        let mut from = Some(0);
        while let Some(least) = from
            && let Some(value) = calls.allowed_from(number, like, least)
        {
            parts.single(value, Leaf::Verdict(Target::Allow), Leaf::Verdict(otherwise));
            from = value.checked_add(1);
        }
        let mut first = self.tree(calls, parts.all(), None);
        let mut at = calls.rule(number, 0);
        while at < calls.rules.len() {
            let rule = calls.rules[at].1;
            if let Test::IsNot(k) = rule.test
                && rule.is_about_bits_of(like)
            {
                first = self.compare(IF_EQUAL, k, first, Target::Allow);
            }
            at = calls.rule(number, at + 1);
        }
        self.within(0, first);
        if let Some(mask) = like.mask() {
            self.push(AND, mask);
        }
        Target::At(self.push(LOAD, ARGUMENTS + 8 * like.argument as u32))
    }
}

/// Parts that are all alike, except for at most [`CHAIN`] of a single value between them.
struct Singles {
    /// Indices of these exceptions.
    at: [usize; CHAIN],
    count: usize,
    others: Leaf,
}

impl Singles {
    /// `None` if there are more exceptions, or one that is a range.
    const fn of(parts: &[Part]) -> Option<Self> {
        let mut other = 0;
        while Self::is_single(parts, other) {
            other += 1;
        }
        let mut singles = Self { at: [0; CHAIN], count: 0, others: parts[other].1 };
        let mut at = 0;
        while at < parts.len() {
            if !parts[at].1.is(singles.others) {
                if singles.count == CHAIN || !Self::is_single(parts, at) {
                    return None;
                }
                singles.at[singles.count] = at;
                singles.count += 1;
            }
            at += 1;
        }
        Some(singles)
    }

    const fn is_single(parts: &[Part], at: usize) -> bool {
        at + 1 < parts.len() && parts[at + 1].0 - parts[at].0 == 1
    }
}
