//! Programs are run here as the kernel runs them.
use std::collections::BTreeMap;

use super::*;

/// The allowed calls, each with its rules.
type Wanted = BTreeMap<u32, Vec<Rule>>;

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

fn allowed(calls: &Wanted, number: u32, arguments: [u32; 6]) -> bool {
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

fn check(wanted: &Wanted) {
    let numbers: Vec<_> = wanted.keys().copied().collect();
    let rules = wanted.iter().flat_map(|(call, rules)| rules.iter().map(|rule| (*call, *rule)));
    let rules: Vec<_> = rules.collect();
    for cached in [true, false] {
        let program = compile(Calls { numbers: &numbers, rules: &rules }, cached);
        check_program(wanted, &program.code[MAX_LENGTH - program.len()..]);
    }
}

fn check_program(calls: &Wanted, program: &[sock_filter]) {
    assert!(program.len() < MAX_LENGTH);
    let values = [0, 1, 2, 3, 0xae80, 0xdead_ae80, 0xffff_0001, u32::MAX];
    let numbers = (0..600).chain([0x4000_0000, 0x4000_0001, u32::MAX]);
    for number in numbers {
        for (value, other) in values.iter().zip(values.iter().rev()) {
            let arguments = [*value, *other, *value, *other, *value, *other];
            let (verdict, steps) = run(program, AUDIT_ARCH, number, arguments);
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
    check(&Wanted::new());
    check(&Wanted::from([(0, Vec::new())]));
    check(&(0..500).map(|number| (number, Vec::new())).collect());
    let rule = |argument, test| Rule { argument, test };
    let many = (0..300).map(|k| rule(1, Test::Is(k * 7))).collect();
    check(&Wanted::from([
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
