//! The entry functions of `fuzz/`, with inputs from a seeded PRNG.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, missing_docs, reason = "a test")]
use config::Description;
use machine::memory::allocate;
use state::{
    State,
    file::{write_config, write_sections},
    frame::{Kind, Writer},
};
use vmm::checkpoint::{Progress, ReceiveError, receive};

#[path = "../../fuzz/src/mutate.rs"]
mod mutate;
#[path = "../../fuzz/src/replication_roles.rs"]
mod replication_roles;
#[path = "../../fuzz/src/saved.rs"]
mod saved;

/// The result of receiving a stream.
fn received(bytes: &[u8]) -> Result<(), ReceiveError> {
    let give = |description: &Description| {
        allocate(&description.config.memory).map_err(|e| ReceiveError::NoRoom(e.to_string()))
    };
    receive(bytes, |_| Ok(()), give, &Progress::default()).map(drop)
}

#[test]
fn states_that_say_anything() {
    let whole = state::testing::state();
    let mut file = Vec::new();
    whole.write(&mut file).unwrap();
    let mut to = Writer::begin(Vec::new()).unwrap();
    write_config(&mut to, &whole.config).unwrap();
    let (at, length) = (4096u64.to_le_bytes(), 8192u64.to_le_bytes());
    to.frame(Kind::Pages, &[&at, &[7; 4096]]).unwrap();
    to.frame(Kind::Zeros, &[&at, &length]).unwrap();
    write_config(&mut to, &whole.config).unwrap();
    write_sections(&mut to, &whole.sections).unwrap();
    to.end(0).unwrap();
    let sent = to.into_inner();

    let (file_seed, stream_seed, bare) =
        (saved::frames(&file), saved::frames(&sent), [&[0][..], &file].concat());
    // The seeds are read to their end.
    assert_eq!(State::read(&saved::bytes(&file_seed)[..]).unwrap(), whole);
    saved::last_of_stream(&saved::bytes(&stream_seed)).unwrap();
    received(&saved::bytes(&stream_seed)).unwrap();
    let mut seeds = vec![file_seed, stream_seed, bare];
    // Files saved by released versions.
    for name in ["9d2bfdc-everything", "bd6521f-everything"] {
        let golden = concat!(env!("CARGO_MANIFEST_DIR"), "/../state/tests/golden");
        seeds.push(saved::frames(&std::fs::read(format!("{golden}/{name}/state")).unwrap()));
    }
    mutate::hammer("state", &seeds, 5000, saved::entry);
    // And what the monitor does with them.
    mutate::hammer("state", &seeds, 2000, |input| {
        let _ = received(&saved::bytes(input)).map_err(|e| e.to_string());
    });
}

#[test]
fn a_primary_that_says_anything() {
    let (said, _) = replication_roles::session();
    mutate::hammer("replication_backup", &[said], 300, replication_roles::backup);
}

#[test]
fn a_backup_that_says_anything() {
    let (_, said) = replication_roles::session();
    mutate::hammer("replication_primary", &[said], 100, replication_roles::primary);
}
