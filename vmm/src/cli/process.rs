//! Flags about the process itself.
use super::Log;
use super::draft::Draft;
use super::fields::Fields;

pub(super) fn pidfile(draft: &mut Draft, f: &mut Fields) {
    draft.pidfile = f.path("");
}

pub(super) fn daemonize(draft: &mut Draft, _: &mut Fields) {
    draft.daemonize = true;
}

pub(super) fn freeze(draft: &mut Draft, _: &mut Fields) {
    draft.paused = true;
}

pub(super) fn action(draft: &mut Draft, f: &mut Fields) {
    draft.reboot =
        f.choice("reboot", &[("reset", Ok(true)), ("shutdown", Ok(false))]).unwrap_or(false);
}

pub(super) fn log(draft: &mut Draft, f: &mut Fields) {
    draft.log = Some(f.path("").map_or(Log::Stderr, Log::File));
}

pub(super) fn disable_seccomp(draft: &mut Draft, _: &mut Fields) {
    draft.disable_seccomp = true;
}
