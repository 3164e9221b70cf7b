//! Any input gives a result, never a panic, and no message controls a terminal.

use super::*;
use crate::cli::draft::Draft;
use crate::cli::flags::TABLE;
use crate::cli::{json, resolve};

/// A seeded PRNG (xorshift64): the same inputs in every run.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % n
    }

    fn pick<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.below(words.len())]
    }
}

const PIECES: &[&str] = &[
    "id",
    "file",
    "drive",
    "netdev",
    "chardev",
    "tap",
    "socket",
    "stdio",
    "pty",
    "path",
    "server",
    "nowait",
    "virtio-blk-device",
    "virtio-net-device",
    "virtio-serial-device",
    "virtconsole",
    "virtio-rng-device",
    "rng-random",
    "iothread",
    "a",
    "b",
    "rng",
    "0",
    "1",
    "254",
    "255",
    "16M",
    "18446744073709551616",
    "-1",
    "=",
    ",",
    ",,",
    "==",
    "",
    "\0",
    "é",
    "\u{1b}[2J",
    "unix:/x",
    "tcp:",
    "chardev:",
    "fds",
    "4:5",
    "mac",
    "0e:90:df:9f:a8:88",
    "queues",
    "on",
    "off",
    "microvm",
    "sockets",
    "cores",
    "max-bytes",
    "period",
    "json",
    "/dev/null",
    "mq",
    "ifname",
    "qom-type",
];

#[test]
fn random_words_never_panic() {
    let mut rng = Rng(0x9e37_79b9_7f4a_7c15);
    let mut accepted = 0;
    for _ in 0..8_000 {
        let mut args: Vec<OsString> = vec![];
        if rng.below(2) == 0 {
            args = words("-kernel k -api-channel unix:s");
        }
        for _ in 0..rng.below(6) {
            let flag = TABLE[rng.below(TABLE.len())].names[0];
            args.push(format!("-{flag}").into());
            for _ in 0..rng.below(3) {
                let count = rng.below(7);
                let piece = |rng: &mut Rng| {
                    let separator = rng.pick(&["=", ",", ",", ""]);
                    format!("{}{separator}", rng.pick(PIECES))
                };
                args.push((0..count).map(|_| piece(&mut rng)).collect::<String>().into());
            }
        }
        match parse(args.clone().into_iter()) {
            Ok(_) => accepted += 1,
            Err(problems) => {
                assert!(!problems.is_empty(), "{args:?}");
                let clean = problems.iter().all(|line| !line.contains(char::is_control));
                assert!(clean, "{args:?}: {problems}");
            }
        }
    }
    assert!(accepted > 50, "some of it means something: {accepted}");
}

#[test]
fn an_example_with_any_piece_changed_never_panics() {
    let text = include_str!("../../../../config-examples/full.json");
    let mut rng = Rng(0x2545_f491_4f6c_dd1d);
    let pieces = [
        "{", "}", "[", "]", ",", ":", "\"", "null", "1e999", "-0", "1.0", "true", "\\u0000",
        "drive", "0",
    ];
    for _ in 0..5_000 {
        let mut bytes = text.as_bytes().to_vec();
        for _ in 0..=rng.below(3) {
            let (from, len) = (rng.below(bytes.len()), rng.below(12));
            let to = (from + len).min(bytes.len());
            bytes.splice(from..to, rng.pick(&pieces).bytes());
        }
        let mut draft = Draft::default();
        json::read_text(&mut draft, "f", &bytes);
        if let Err(problems) = resolve::resolve(draft) {
            assert!(problems.iter().all(|line| !line.contains(char::is_control)));
        }
    }
}

#[test]
fn what_is_shown_does_not_steer_the_terminal() {
    let said = problem("-smp \u{1b}[31m");
    assert_eq!(said, "-smp \\u{1b}[31m: cpus: '\\u{1b}[31m': must be a number in 1..=254");
}
