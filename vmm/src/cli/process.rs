//! Flags about the process itself.
use super::Log;
use super::draft::Draft;
use super::fields::Fields;
use super::value;

pub(super) fn pidfile(draft: &mut Draft, f: &mut Fields) {
    draft.pidfile = f.path("");
}

pub(super) fn daemonize(draft: &mut Draft, _: &mut Fields) {
    draft.daemonize = true;
}

pub(super) fn freeze(draft: &mut Draft, _: &mut Fields) {
    draft.paused = true;
}

pub(super) fn log(draft: &mut Draft, f: &mut Fields) {
    draft.log = Some(f.path("").map_or(Log::Stderr, Log::File));
}

pub(super) fn disable_seccomp(draft: &mut Draft, _: &mut Fields) {
    draft.disable_seccomp = true;
}

/// `-incoming file:DIR[,mapped=on|off]`.
pub(super) fn incoming(draft: &mut Draft, f: &mut Fields) {
    let directory = f.text("uri", |word| match word.split_once(':') {
        Some(("file", path)) => value::path(path),
        Some(("tcp" | "unix" | "exec" | "fd", _)) => {
            Err("incoming streams are not built yet; use file:DIRECTORY".into())
        }
        _ => Err("must be file:DIRECTORY".into()),
    });
    let mapped = f.boolean("mapped").unwrap_or(true);
    draft.incoming = Some((directory.unwrap_or_default(), mapped));
}
