//! `-object`, and the older flags for the same things: I/O threads and sources of randomness.
use super::draft::{Draft, RngSource};
use super::fields::Fields;

#[derive(Clone, Copy)]
pub(crate) enum Kind {
    IoThread,
    RngRandom,
}

pub(crate) const KINDS: &[(&str, Result<Kind, &str>)] = &[
    ("iothread", Ok(Kind::IoThread)),
    ("rng-random", Ok(Kind::RngRandom)),
    ("memory-backend-ram", Err("a memory back-end object")),
    ("memory-backend-file", Err("a memory back-end object")),
    ("memory-backend-memfd", Err("a memory back-end object")),
    ("tls-creds-x509", Err("TLS")),
    ("authz-simple", Err("TLS")),
];

/// `-object`.
pub(crate) fn object(draft: &mut Draft, f: &mut Fields) {
    f.require(&["qom-type"]);
    match f.choice("qom-type", KINDS) {
        Some(Kind::IoThread) => iothread(draft, f),
        Some(Kind::RngRandom) => {
            f.require(&["id", "filename"]);
            let (id, path) = (f.id("id"), f.path("filename"));
            if let Some(id) = id {
                let path = path.unwrap_or_default();
                draft.rng_sources.push(RngSource { place: f.place().clone(), id, path });
            }
        }
        None => f.abandon(),
    }
}

/// `-iothread`, and an item of `iothread`.
pub(crate) fn iothread(draft: &mut Draft, f: &mut Fields) {
    f.require(&["id"]);
    draft.iothreads.extend(f.id("id").map(|id| (f.place().clone(), id)));
}
