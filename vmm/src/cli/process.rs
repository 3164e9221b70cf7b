//! Flags about the process itself.
use super::draft::Draft;
use super::fields::Fields;
use super::value::{self, Rule};
use super::{Log, Mapped, Source, Stream};

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

/// `-sandbox on|off[,spawn=allow|deny]`. What else QEMU has there is denied here in any case.
pub(super) fn sandbox(draft: &mut Draft, f: &mut Fields) {
    let on = f.text("enable", value::boolean).unwrap_or(true);
    draft.disable_seccomp |= !on;
    draft.spawn = f.choice("spawn", &[("allow", Ok(true)), ("deny", Ok(false))]).unwrap_or(false);
    for key in ["obsolete", "elevateprivileges", "resourcecontrol"] {
        let _ = f.text(key, value::text);
    }
}

/// `-incoming file:DIR[,mapped=on|off|uffd]`, `unix:SOCKET`, `fd:NUMBER` or `exec:COMMAND`.
pub(super) fn incoming(draft: &mut Draft, f: &mut Fields) {
    let source = f.text("", |word| match word.split_once(':') {
        Some(("file", rest)) => directory(rest),
        Some(("unix", path)) => value::socket_path(path).map(Stream::Unix).map(Source::Stream),
        Some(("fd", number)) => {
            value::number(number, 3..=i32::MAX).map(Stream::Fd).map(Source::Stream)
        }
        // All of the rest: commands have commas.
        Some(("exec", command)) if !command.is_empty() => {
            value::text(command).map(Stream::Exec).map(Source::Stream)
        }
        Some(("tcp", _)) => Err("streams over TCP are not built; use unix:, fd: or exec:".into()),
        _ => Err("must be file:DIRECTORY, unix:SOCKET, fd:NUMBER or exec:COMMAND".into()),
    });
    // Kept even when it is wrong, so that nobody asks for a kernel.
    draft.incoming = source.or(Some(Source::Stream(Stream::Fd(0))));
}

fn directory(text: &str) -> Result<Source, Rule> {
    let (path, option) = text.split_once(',').unwrap_or((text, "mapped=on"));
    let mapped = match option.split_once('=') {
        Some(("mapped", "uffd")) => Mapped::Uffd,
        Some(("mapped", word)) => match value::boolean(word) {
            Ok(true) => Mapped::On,
            Ok(false) => Mapped::Off,
            Err(_) => return Err("mapped must be on, off or uffd".into()),
        },
        _ => return Err("behind the directory, only ,mapped=on|off|uffd is allowed".into()),
    };
    Ok(Source::Directory { path: value::path(path)?, mapped })
}
