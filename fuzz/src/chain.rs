//! Saves in directories that build on each other, some of their files damaged: the combined memory
//! is read correctly, or refused with a named error.
use std::{
    fs,
    path::{Path, PathBuf},
};

use state::{
    State,
    config::Base,
    directory::{self, DirectoryError, MAX_CHAIN, MEMORY, STATE},
    hex::Hex,
    memory_file::{BLOCK, blocks, trailer},
    testing::{self, MEMORY as SIZE},
};
use tempfile::TempDir;

use crate::input::Input;

/// A save in `directory`, on top of `base` if there is one, with changes given by the input.
fn save(directory: &Path, id: u128, base: Option<(u128, u32, &str)>, input: &mut Input) {
    fs::create_dir_all(directory).unwrap();
    let mut state = State { config: testing::config(id), ..testing::state() };
    if let Some((base, sum, path)) = base {
        state.config.base = Some(Base { path: path.into(), id: base.into(), state: Hex(sum) });
    }
    state.changed = Vec::new();
    let mut at = 0;
    for _ in 0..input.u8() % 6 {
        at += u64::from(input.u16()) * 64;
        let end = at + 4096 * (1 + u64::from(input.u8() % 8));
        if state.config.base.is_some() {
            state.changed.push(at..end);
        }
        at = end;
    }
    state.sums = vec![0; blocks(SIZE).count()];
    let mut bytes = Vec::new();
    if state.write(&mut bytes).is_err() {
        return;
    }
    damage(&mut bytes, input);
    fs::write(directory.join(STATE), bytes).unwrap();
    let file = fs::File::create(directory.join(MEMORY)).unwrap();
    let (length, shorter) = (SIZE + trailer(id, SIZE).len() as u64, u64::from(input.u8() / 250));
    file.set_len(length - shorter).unwrap();
    let mut last = trailer(id, SIZE);
    damage(&mut last, input);
    std::os::unix::fs::FileExt::write_all_at(&file, &last, SIZE).unwrap();
}

fn damage(bytes: &mut [u8], input: &mut Input) {
    let (how, at, to) = (input.u8(), usize::from(input.u16()), input.u8());
    if how > 200
        && let Some(byte) = bytes.get_mut(at)
    {
        *byte = to;
    }
}

/// Read a whole chain of saves.
pub fn read(directory: &Path) -> Result<usize, DirectoryError> {
    let (mut state, _) = directory::read(&directory.join(STATE))?;
    let chain = directory::memory(directory, &mut state)?;
    let pieces = chain.pieces();
    // The pieces cover all of memory, each part once.
    let mut at = 0;
    for (range, layer) in &pieces {
        assert!(range.start == at && range.end > at && *layer < chain.layers.len(), "{pieces:?}");
        at = range.end;
    }
    assert_eq!(at, chain.size);
    let layers = chain.layers.len();
    let contents = chain.open()?;
    let mut buffer = vec![0; BLOCK as usize];
    for block in contents.filled() {
        let _ = contents.read(&(block.start..block.end.min(block.start + BLOCK)), &mut buffer);
    }
    let _ = contents.check_zeros();
    Ok(layers)
}

/// The input gives the number of saves, the base of each, and what is damaged.
pub fn entry(input: &[u8]) {
    let mut input = Input(input);
    let dir = TempDir::new().unwrap();
    let place = |n: usize| -> PathBuf { dir.path().join(n.to_string()) };
    let count = 1 + usize::from(input.u8()) % 5;
    for n in 0..count {
        let sum = |n: usize| directory::read(&place(n).join(STATE)).map_or(0, |(_, sum)| sum);
        let (below, other) = (input.u8(), input.u8());
        // Mostly based on the previous save; some on themselves or on a missing one.
        let base = match (n, below) {
            (0, 0..200) => None,
            (_, 0..200) => Some(n - 1),
            _ => Some(usize::from(other) % (count + 1)),
        };
        let path = base.map(|base| format!("../{base}")).unwrap_or_default();
        let base = base.map(|base| (base as u128 + 1, sum(base), path.as_str()));
        save(&place(n), n as u128 + 1, base, &mut input);
    }
    match read(&place(count - 1)) {
        Ok(layers) => assert!((1..=MAX_CHAIN).contains(&layers)),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
