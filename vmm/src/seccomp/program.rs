//! The BPF program of a filter: a balanced tree over the numbers of system calls.
//!
//! When a filter is installed, the kernel translates it, and evaluates it once for each call number
//! to learn which calls are always allowed. Each thread installs its own filter, and all of that
//! adds to the time of every start. So programs are short: their trees end in chains of a few
//! comparisons, which take one instruction for each number, while a tree takes two. The program of
//! a thread that makes few calls begins by loading an argument, which the kernel's evaluation
//! cannot know, so that the evaluation ends at once.
//!
//! A program is built from its end, because its jumps only lead forward. All of them lead to one
//! `ALLOW` and one `TRAP`, as far as these are within reach.
use std::collections::BTreeMap;

use seccompiler::{BpfProgram, sock_filter};

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

/// The allowed system calls, by number: with any arguments if there are no rules, else if one of
/// the rules holds.
pub type Calls = BTreeMap<u32, Vec<Rule>>;

/// Most instructions that the kernel accepts (BPF_MAXINSNS).
#[cfg(test)]
pub const MAX_LENGTH: usize = 4096;

/// `AUDIT_ARCH_X86_64` (linux/audit.h).
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;
/// No call number is as large as this: where the last range of numbers is taken to end.
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

/// Numbers or values that are compared one after the other at the end of a tree.
const CHAIN: usize = 4;

/// The program that allows `calls`. Any other call raises SIGSYS; a call of another architecture
/// ends the process. With `cached`, the kernel determines which calls are always allowed when the
/// program is installed, which takes about 10 us and saves some 20 ns for each of these calls.
pub fn compile(calls: &Calls, cached: bool) -> BpfProgram {
    let mut code = Backwards::default();
    let root = code.calls(&parts(calls));
    code.within(0, root);
    code.push(statement(LOAD, NUMBER));
    code.push(statement(RETURN, libc::SECCOMP_RET_KILL_PROCESS));
    code.push(sock_filter { code: IF_EQUAL, jt: 1, jf: 0, k: ARCHITECTURE });
    code.push(statement(LOAD, ARCH));
    if !cached {
        code.push(statement(LOAD, ARGUMENTS));
    }
    code.code.reverse();
    code.code
}

/// A range of numbers that are treated alike: its first number, and the rules if the call is
/// allowed.
type Part<'a> = (u32, Option<&'a [Rule]>);

/// All numbers, in ranges that are treated alike: each begins at its number and extends to the next
/// one.
fn parts(calls: &Calls) -> Vec<Part<'_>> {
    let mut parts: Vec<Part<'_>> = vec![(0, None)];
    let mut free = 0;
    for (number, rules) in calls {
        if *number > free {
            parts.push((free, None));
        }
        parts.push((*number, Some(rules)));
        free = number.saturating_add(1);
    }
    parts.push((free, None));
    // A range that begins where the next one does is empty; two alike are merged.
    parts.dedup_by(|next, before| {
        let empty = before.0 == next.0;
        if empty {
            before.1 = next.1;
        }
        empty || before.1 == next.1
    });
    parts
}

/// Values, some of which are allowed, in ranges: each begins at its value and extends to the next
/// one.
fn values(mut allowed: Vec<u32>) -> Vec<(u32, bool)> {
    allowed.sort_unstable();
    allowed.dedup();
    let mut parts = vec![(0, false)];
    for value in allowed {
        match parts.last_mut() {
            // It begins where the range before it ends, or there is none before it.
            Some(last) if last.0 == value => last.1 = true,
            _ => parts.push((value, true)),
        }
        if let Some(end) = value.checked_add(1) {
            parts.push((end, false));
        }
    }
    parts.dedup_by(|next, before| next.1 == before.1);
    parts
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

/// A program under construction, last instruction first.
#[derive(Default)]
struct Backwards {
    code: BpfProgram,
    /// The last return of each verdict.
    allow: Option<usize>,
    trap: Option<usize>,
}

impl Backwards {
    fn push(&mut self, instruction: sock_filter) -> usize {
        self.code.push(instruction);
        self.code.len()
    }

    /// The number of an instruction that does what `target` does, with at most `reach` instructions
    /// between it and the one that is pushed next.
    fn within(&mut self, reach: usize, target: Target) -> usize {
        let known = match target {
            Target::At(at) => Some(at),
            Target::Allow => self.allow,
            Target::Trap => self.trap,
        };
        if let Some(at) = known.filter(|at| self.code.len() <= at + reach) {
            return at;
        }
        match target {
            Target::At(at) => {
                let far = u32::try_from(self.code.len().saturating_sub(at)).unwrap_or(u32::MAX);
                self.push(statement(JUMP, far))
            }
            Target::Allow => {
                let at = self.push(statement(RETURN, libc::SECCOMP_RET_ALLOW));
                *self.allow.insert(at)
            }
            Target::Trap => {
                let at = self.push(statement(RETURN, libc::SECCOMP_RET_TRAP));
                *self.trap.insert(at)
            }
        }
    }

    /// Compare the accumulator with `k`.
    fn compare(&mut self, code: u16, k: u32, yes: Target, no: Target) -> Target {
        /// Conditional jumps skip at most 255 instructions. One more may be added for `no`.
        const REACH: usize = 254;
        let (yes, no) = (self.within(REACH, yes), self.within(REACH, no));
        let skip = |at| u8::try_from(self.code.len() - at).unwrap_or(u8::MAX);
        Target::At(self.push(sock_filter { code, jt: skip(yes), jf: skip(no), k }))
    }

    /// Decide by the call number in the accumulator.
    fn calls(&mut self, parts: &[Part<'_>]) -> Target {
        let by_number = |parts: &[Part<'_>], end: u32| {
            let half = parts.first().map_or(0, |first| first.0.midpoint(end));
            parts.partition_point(|part| part.0 <= half)
        };
        self.tree(parts, NUMBERS, &by_number, &|code, rules| match rules {
            Some([]) => Target::Allow,
            Some(rules) => code.rules(rules),
            None => Target::Trap,
        })
    }

    /// A tree over `parts`, each of which begins at its value, and the last of which ends at `end`.
    /// `middle` says how many parts are below the root; `leaf` makes the code for a part.
    fn tree<T: PartialEq>(
        &mut self,
        parts: &[(u32, T)],
        end: u32,
        middle: &impl Fn(&[(u32, T)], u32) -> usize,
        leaf: &impl Fn(&mut Self, &T) -> Target,
    ) -> Target {
        if let [(_, only)] = parts {
            return leaf(self, only);
        }
        if let Some((single, others)) = singles(parts) {
            let others = leaf(self, others);
            return single.iter().rev().fold(others, |otherwise, (value, part)| {
                let found = leaf(self, part);
                self.compare(IF_EQUAL, *value, found, otherwise)
            });
        }
        let most = parts.len().saturating_sub(1);
        let (below, above) = parts.split_at(middle(parts, end).min(most).max(1.min(most)));
        let Some((from, _)) = above.first() else { return Target::Trap };
        let yes = self.tree(above, end, middle, leaf);
        let no = self.tree(below, *from, middle, leaf);
        self.compare(IF_GREATER_OR_EQUAL, *from, yes, no)
    }

    /// Require that one of `rules` holds. Rules about the same bits of an argument form one tree.
    fn rules(&mut self, rules: &[Rule]) -> Target {
        let mut groups: Vec<(Bits, Vec<Test>)> = Vec::new();
        for rule in rules {
            match groups.iter_mut().find(|(bits, _)| *bits == rule.bits()) {
                Some((_, alike)) => alike.push(rule.test),
                None => groups.push((rule.bits(), vec![rule.test])),
            }
        }
        let mut otherwise = Target::Trap;
        for ((argument, mask), tests) in groups.into_iter().rev() {
            let (mut allowed, mut excluded) = (Vec::new(), Vec::new());
            for test in tests {
                match test {
                    Test::Is(k) | Test::Has(_, k) => allowed.push(k),
                    Test::IsNot(k) => excluded.push(k),
                }
            }
            let half = |parts: &[(u32, bool)], _| parts.len() / 2;
            let tree = self.tree(&values(allowed), u32::MAX, &half, &|_, allow| match allow {
                true => Target::Allow,
                false => otherwise,
            });
            let first = excluded
                .iter()
                .fold(tree, |equal, k| self.compare(IF_EQUAL, *k, equal, Target::Allow));
            self.within(0, first);
            if let Some(mask) = mask {
                self.push(statement(AND, mask));
            }
            let load = statement(LOAD, ARGUMENTS + 8 * u32::from(argument));
            otherwise = Target::At(self.push(load));
        }
        otherwise
    }
}

/// If all `parts` are alike, except for at most [`CHAIN`] parts of a single value between them:
/// these exceptions, and the value of the others.
fn singles<T: PartialEq>(parts: &[(u32, T)]) -> Option<(Vec<&(u32, T)>, &T)> {
    let is_single = |at: usize| match (parts.get(at), parts.get(at + 1)) {
        (Some(part), Some(next)) => part.0.checked_add(1) == Some(next.0),
        _ => false,
    };
    let (_, (_, others)) = parts.iter().enumerate().find(|(at, _)| !is_single(*at))?;
    let differs = |(_, part): &(usize, &(u32, T))| part.1 != *others;
    let mut single = parts.iter().enumerate().filter(differs);
    if !single.clone().all(|(at, _)| is_single(at)) || single.clone().count() > CHAIN {
        return None;
    }
    Some((single.by_ref().map(|(_, part)| part).collect(), others))
}

/// Index of the argument, and a mask of its bits, if not all count.
type Bits = (u8, Option<u32>);

impl Rule {
    const fn bits(&self) -> Bits {
        let mask = match self.test {
            Test::Has(mask, _) => Some(mask),
            Test::Is(_) | Test::IsNot(_) => None,
        };
        (self.argument, mask)
    }
}

const fn statement(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would do: the verdict, and the number of instructions executed.
    fn run(program: &[sock_filter], arch: u32, number: u32, arguments: [u32; 6]) -> (u32, usize) {
        let (mut at, mut a, mut steps) = (0, 0, 0);
        loop {
            let sock_filter { code, jt, jf, k } = program[at];
            (at, steps) = (at + 1, steps + 1);
            match code {
                LOAD if k == NUMBER => a = number,
                LOAD if k == ARCH => a = arch,
                LOAD => a = arguments[((k - ARGUMENTS) / 8) as usize],
                AND => a &= k,
                JUMP => at += k as usize,
                IF_EQUAL => at += usize::from(if a == k { jt } else { jf }),
                IF_GREATER_OR_EQUAL => at += usize::from(if a >= k { jt } else { jf }),
                RETURN => return (k, steps),
                other => panic!("code {other:#x}"),
            }
        }
    }

    fn allowed(calls: &Calls, number: u32, arguments: [u32; 6]) -> bool {
        let holds = |rule: &Rule| {
            let value = arguments[usize::from(rule.argument)];
            match rule.test {
                Test::Is(k) => value == k,
                Test::IsNot(k) => value != k,
                Test::Has(mask, k) => value & mask == k,
            }
        };
        calls.get(&number).is_some_and(|rules| rules.is_empty() || rules.iter().any(holds))
    }

    fn check(calls: &Calls) {
        check_program(calls, &compile(calls, true));
        check_program(calls, &compile(calls, false));
    }

    fn check_program(calls: &Calls, program: &[sock_filter]) {
        assert!(program.len() < MAX_LENGTH);
        let values = [0, 1, 2, 3, 0xae80, 0xdead_ae80, 0xffff_0001, u32::MAX];
        let numbers = (0..600).chain([0x4000_0000, 0x4000_0001, u32::MAX]);
        for number in numbers {
            for (value, other) in values.iter().zip(values.iter().rev()) {
                let arguments = [*value, *other, *value, *other, *value, *other];
                let (verdict, steps) = run(program, ARCHITECTURE, number, arguments);
                let allow = verdict == libc::SECCOMP_RET_ALLOW;
                assert_eq!(allow, allowed(calls, number, arguments), "{number} {arguments:?}");
                assert!(allow || verdict == libc::SECCOMP_RET_TRAP);
                if calls.get(&number).is_none_or(Vec::is_empty) {
                    assert!(steps <= 5 + 12 + CHAIN, "{steps} steps for {number}");
                }
            }
            let (verdict, _) = run(program, 0x4000_0003, number, [0; 6]);
            assert_eq!(verdict, libc::SECCOMP_RET_KILL_PROCESS, "of another architecture");
        }
    }

    #[test]
    fn a_program_allows_what_the_table_allows() {
        check(&Calls::new());
        check(&Calls::from([(0, Vec::new())]));
        check(&(0..500).map(|number| (number, Vec::new())).collect());
        let rule = |argument, test| Rule { argument, test };
        let many = (0..300).map(|k| rule(1, Test::Is(k * 7))).collect();
        check(&Calls::from([
            (1, vec![rule(0, Test::Is(2))]),
            (2, vec![rule(5, Test::IsNot(3)), rule(0, Test::IsNot(0))]),
            (5, vec![rule(1, Test::Has(0xffff, 0xae80)), rule(1, Test::Is(3))]),
            (6, many),
            (7, vec![rule(2, Test::Has(4, 0)), rule(3, Test::Has(4, 0)), rule(2, Test::Is(9))]),
            (8, Vec::new()),
            (9, Vec::new()),
            (599, vec![rule(0, Test::Is(1))]),
        ]));
    }

    #[test]
    fn ends_that_are_out_of_reach_are_made_again() {
        let all: Vec<_> = (0..500).map(|k| Rule { argument: 1, test: Test::Is(k * 3) }).collect();
        check(&(0..3).map(|number| (number * 90, all.clone())).collect());
        // Every other number, so that each is a range of its own.
        check(&(0..255).map(|number| (number * 2, Vec::new())).collect());
    }
}
