//! The program of a filter: a balanced tree over the numbers of system calls.
//!
//! When a filter is installed, the kernel runs it once for each number to learn what it need not be asked about
//! any more. In one chain of comparisons that takes half a millisecond of each start.
use std::collections::BTreeMap;

use seccompiler::{BpfProgram, sock_filter};

/// What has to be true of a system call's argument, of which the kernel takes 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    /// Which one, from 0.
    pub argument: u8,
    /// What.
    pub test: Test,
}

/// See [`Rule`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Test {
    /// It is this value.
    Is(u32),
    /// It is any other.
    IsNot(u32),
    /// Its bits of the first value are those of the second.
    Has(u32, u32),
}

/// The system calls that are allowed, by number: with any arguments where there are no rules, else if one
/// of the rules is true.
pub type Calls = BTreeMap<u32, Vec<Rule>>;

/// Most instructions that the kernel takes (BPF_MAXINSNS).
#[cfg(test)]
pub const MAX_LENGTH: usize = 4096;

/// `AUDIT_ARCH_X86_64` (linux/audit.h).
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: u32 = 0xc000_003e;

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

const ALLOW: sock_filter = statement(RETURN, libc::SECCOMP_RET_ALLOW);
const TRAP: sock_filter = statement(RETURN, libc::SECCOMP_RET_TRAP);

const fn statement(code: u16, k: u32) -> sock_filter {
    sock_filter { code, jt: 0, jf: 0, k }
}

/// The program that allows `calls`. Any other ends in a signal (SIGSYS), one of another architecture ends
/// the process.
pub fn compile(calls: &Calls) -> BpfProgram {
    let mut program = vec![
        statement(LOAD, ARCH),
        sock_filter { code: IF_EQUAL, jt: 1, jf: 0, k: ARCHITECTURE },
        statement(RETURN, libc::SECCOMP_RET_KILL_PROCESS),
        statement(LOAD, NUMBER),
    ];
    program.extend(tree(&parts(calls)));
    program
}

/// What is to be done from a number on.
type Part<'a> = (u32, Option<&'a [Rule]>);

/// All numbers, in parts that are treated alike: each begins at its number and reaches to the next one.
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
    // A part that begins where the next one does is empty; two alike are one.
    parts.dedup_by(|next, before| {
        let empty = before.0 == next.0;
        if empty {
            before.1 = next.1;
        }
        let plain = |part: &Part<'_>| part.1.is_none_or(<[Rule]>::is_empty);
        empty || plain(before) && plain(next) && before.1.is_some() == next.1.is_some()
    });
    parts
}

/// The number is in the accumulator.
fn tree(parts: &[Part<'_>]) -> BpfProgram {
    let (below, above) = parts.split_at(parts.len() / 2);
    let Some((first, _)) = above.first().filter(|_| !below.is_empty()) else {
        return match parts.first() {
            Some((_, Some([]))) => vec![ALLOW],
            Some((_, Some(rules))) => tests(rules),
            Some((_, None)) | None => vec![TRAP],
        };
    };
    let (below, above) = (tree(below), tree(above));
    let far = u32::try_from(below.len()).unwrap_or(u32::MAX);
    let mut code = match u8::try_from(below.len()) {
        Ok(jt) => vec![sock_filter { code: IF_GREATER_OR_EQUAL, jt, jf: 0, k: *first }],
        // Conditional jumps reach 255 instructions.
        Err(_) => vec![
            sock_filter { code: IF_GREATER_OR_EQUAL, jt: 0, jf: 1, k: *first },
            statement(JUMP, far),
        ],
    };
    code.extend(below);
    code.extend(above);
    code
}

/// One of `rules` has to be true. They are looked at in order, those in a row about the same bits of an
/// argument without loading it again.
fn tests(rules: &[Rule]) -> BpfProgram {
    let mut code = Vec::new();
    for alike in rules.chunk_by(|one, next| loaded(one) == loaded(next)).flat_map(|c| c.chunks(128))
    {
        let Some((argument, mask)) = alike.first().map(loaded) else { continue };
        code.push(statement(LOAD, ARGUMENTS + 8 * u32::from(argument)));
        code.extend(mask.map(|mask| statement(AND, mask)));
        for (rule, left) in alike.iter().zip((0..alike.len()).rev()) {
            // Over the tests that are left and over the jump behind them.
            let hit = u8::try_from(left + 1).unwrap_or(u8::MAX);
            code.push(match rule.test {
                Test::Is(k) | Test::Has(_, k) => sock_filter { code: IF_EQUAL, jt: hit, jf: 0, k },
                Test::IsNot(k) => sock_filter { code: IF_EQUAL, jt: 0, jf: hit, k },
            });
        }
        code.extend([statement(JUMP, 1), ALLOW]);
    }
    code.push(TRAP);
    code
}

/// Which argument, and which bits of it.
fn loaded(rule: &Rule) -> (u8, Option<u32>) {
    let mask = match rule.test {
        Test::Has(mask, _) => Some(mask),
        Test::Is(_) | Test::IsNot(_) => None,
    };
    (rule.argument, mask)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel does: the verdict, and how many instructions it took.
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
        let program = compile(calls);
        assert!(program.len() < MAX_LENGTH);
        let values = [0, 1, 2, 3, 0xae80, 0xdead_ae80, 0xffff_0001, u32::MAX];
        let numbers = (0..600).chain([0x4000_0000, 0x4000_0001, u32::MAX]);
        for number in numbers {
            for (value, other) in values.iter().zip(values.iter().rev()) {
                let arguments = [*value, *other, *value, *other, *value, *other];
                let (verdict, steps) = run(&program, ARCHITECTURE, number, arguments);
                let allow = verdict == libc::SECCOMP_RET_ALLOW;
                assert_eq!(allow, allowed(calls, number, arguments), "{number} {arguments:?}");
                assert!(allow || verdict == libc::SECCOMP_RET_TRAP);
                if calls.get(&number).is_none_or(Vec::is_empty) {
                    assert!(steps <= 4 + 16, "{steps} steps for {number}");
                }
            }
            let (verdict, _) = run(&program, 0x4000_0003, number, [0; 6]);
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
}
