//! What the replicated guest's work looks like, so that both ends can compute it: the hash over all
//! numbers that its counter has given, the contents of the memory that it writes, and the records
//! on its disk. This is the host's side and, as a module of `init/replicated.rs`, the guest's.

/// Bytes of a page, and of a record.
pub const PAGE: usize = 4096;
/// Where the hash begins: FNV's offset basis.
pub const FIRST_HASH: u64 = 0xcbf2_9ce4_8422_2325;
const PRIME: u64 = 0x100_0000_01b3;

/// The hash after `number` was given to the request `word`: FNV-1a, over everything that led here.
#[must_use]
pub fn hash(before: u64, number: u64, word: &str) -> u64 {
    let bytes = number.to_le_bytes().into_iter().chain(word.bytes());
    bytes.fold(before, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME))
}

/// Fills the first `bytes` bytes of page number `page`, as they are after round `round`. They do
/// not compress.
pub fn fill(area: &mut [u8], round: u64, page: u64, bytes: usize) {
    let mut state = mix(round.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ page);
    for word in area.chunks_exact_mut(8).take(bytes / 8) {
        state = step(state);
        word.copy_from_slice(&state.to_le_bytes());
    }
}

/// The checksum of an area that continues another; begin with [`FIRST_HASH`].
#[must_use]
pub fn checksum(before: u64, area: &[u8]) -> u64 {
    area.chunks_exact(8).fold(before, |sum, word| {
        let word = word.try_into().map_or(0, u64::from_le_bytes);
        (sum ^ word).wrapping_mul(PRIME).rotate_left(29)
    })
}

/// Record `number` of the disk, from 1; it is in block `number - 1` of [`PAGE`] bytes.
pub fn record(number: u64, block: &mut [u8]) {
    fill(block, number, !0, PAGE);
    block.iter_mut().zip(number.to_le_bytes()).for_each(|(to, from)| *to = from);
}

fn step(state: u64) -> u64 {
    state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407)
}

/// SplitMix64's last step.
fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}
