//! Inputs for the entry functions without a fuzzer: valid ones with a few changes made by a seeded
//! PRNG, so that they are the same each time.
use std::{fs, path::Path};

/// A seeded PRNG (splitmix64).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }
}

/// Numbers at which arithmetic tends to go wrong.
const EDGES: [u64; 10] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_ffff,
];

/// Runs `entry` with each of `seeds`, and of those in `fuzz/seeds/TARGET`, unmodified, then `times`
/// times with a modified one (`FUZZ_TIMES` overrides the number). `fuzz/dictionaries/TARGET.dict`
/// has the tokens of the input's language. After a panic, the input that caused it is printed. With
/// `FUZZ_SEEDS` set, `seeds` are written to `fuzz/corpus/TARGET`, where cargo-fuzz begins.
pub fn hammer(target: &str, seeds: &[Vec<u8>], times: u64, entry: impl Fn(&[u8])) {
    let fuzz = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz"));
    if std::env::var_os("FUZZ_SEEDS").is_some() {
        let corpus = fuzz.join("corpus").join(target);
        fs::create_dir_all(&corpus).unwrap();
        for (number, seed) in seeds.iter().enumerate() {
            fs::write(corpus.join(format!("test-{}-{number}", seeds.len())), seed).unwrap();
        }
    }
    let mut seeds = seeds.to_vec();
    seeds.extend(found(&fuzz.join("seeds").join(target)));
    let dictionary = fuzz.join("dictionaries").join(target).with_extension("dict");
    let words = fs::read_to_string(dictionary).map_or_else(|_| Vec::new(), |text| words(&text));
    for seed in &seeds {
        tell_if_it_panics(seed, &entry);
    }
    let asked = std::env::var("FUZZ_TIMES").ok().and_then(|times| times.parse().ok());
    for time in 0..asked.unwrap_or(times) {
        let mut rng = Rng(time);
        let mut input = seeds[rng.below(seeds.len())].clone();
        for _ in 0..=rng.below(8) {
            change(&mut rng, &mut input, &words);
        }
        tell_if_it_panics(&input, &entry);
    }
}

/// The files in `directory`, sorted by name; none if it does not exist.
fn found(directory: &Path) -> Vec<Vec<u8>> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

/// The tokens of a libFuzzer dictionary: one in quotes on each line that is not a comment.
fn words(text: &str) -> Vec<Vec<u8>> {
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines.map(|line| word(line.trim_matches('"'))).collect()
}

fn word(escaped: &str) -> Vec<u8> {
    let (mut rest, mut word) = (escaped.as_bytes(), Vec::new());
    loop {
        (word, rest) = match rest {
            [] => return word,
            [b'\\', b'x', high, low, rest @ ..] => {
                let digits = [*high, *low];
                let digits = str::from_utf8(&digits).unwrap();
                ([word, vec![u8::from_str_radix(digits, 16).unwrap()]].concat(), rest)
            }
            [b'\\', byte, rest @ ..] | [byte, rest @ ..] => ([word, vec![*byte]].concat(), rest),
        };
    }
}

fn tell_if_it_panics(input: &[u8], entry: &impl Fn(&[u8])) {
    struct Tell<'a>(&'a [u8]);
    impl Drop for Tell<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                eprintln!("the input was b\"{}\"", self.0.escape_ascii());
            }
        }
    }
    let _tell = Tell(input);
    entry(input);
}

fn change(rng: &mut Rng, input: &mut Vec<u8>, words: &[Vec<u8>]) {
    let at = rng.below(input.len() + 1);
    let end = (at + 1 + rng.below(16)).min(input.len());
    let random: Vec<u8> = (0..=rng.below(16)).map(|_| rng.next() as u8).collect();
    match rng.below(10) {
        0..3 if at < end => input[at] ^= 1 << rng.below(8),
        3 => write(input, at, &random),
        4..6 => {
            let edge = EDGES[rng.below(EDGES.len())];
            let number = edge.wrapping_add(rng.below(3) as u64).wrapping_sub(1).to_le_bytes();
            write(input, at, &number[..1 << rng.below(4)]);
        }
        6 => drop(input.splice(at..at, random)),
        7 if at < end => drop(input.drain(at..end)),
        8 if at < end => {
            let again = input[at..end].to_vec();
            let to = rng.below(input.len());
            input.splice(to..to, again);
        }
        _ if words.is_empty() => input.truncate(at.max(1)),
        _ => drop(input.splice(at..at, words[rng.below(words.len())].clone())),
    }
}

fn write(input: &mut [u8], at: usize, bytes: &[u8]) {
    for (to, from) in input.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}
