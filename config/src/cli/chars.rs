//! Character back-ends and what uses them: serial port, console, control sockets.
use std::path::PathBuf;

use crate::{CharBackend, limits};

use super::Control;
use super::draft::{Chardev, Draft, Serial};
use super::fields::Fields;
use crate::value::{self, Rule};

#[derive(Clone, Copy)]
pub(crate) enum Kind {
    Stdio,
    Pty,
    File,
    Socket,
}

pub(crate) const KINDS: &[(&str, Result<Kind, &str>)] = &[
    ("stdio", Ok(Kind::Stdio)),
    ("pty", Ok(Kind::Pty)),
    ("file", Ok(Kind::File)),
    ("socket", Ok(Kind::Socket)),
];

/// `-api-channel unix:PATH`; anything after a comma has always been ignored.
pub(crate) fn api_channel(draft: &mut Draft, f: &mut Fields) {
    let path = f.text("", |word| unix(word.split_once(',').map_or(word, |(path, _)| path)));
    draft.control = path.map(|path| (f.place().clone(), Control { path, connects: false }));
}

/// `-qmp unix:PATH[,server,nowait]`.
pub(crate) fn qmp(draft: &mut Draft, f: &mut Fields) {
    let path = f.text("address", unix);
    let connects = ["server", "nowait", "wait"].iter().all(|key| !f.has(key));
    listening(f, connects);
    f.refuse("iothread", "QMP on an I/O thread");
    draft.control = path.map(|path| (f.place().clone(), Control { path, connects }));
}

/// `-mon chardev=ID,mode=control`.
pub(crate) fn mon(draft: &mut Draft, f: &mut Fields) {
    f.require(&["chardev", "mode"]);
    let chardev = f.id("chardev");
    let _ = f.id("id");
    let _ = f.choice("mode", &[("control", Ok(())), ("readline", Err("the human monitor"))]);
    draft.monitors.extend(chardev.map(|id| (f.place().clone(), id)));
}

/// `-chardev`, in both forms.
pub(crate) fn chardev(draft: &mut Draft, f: &mut Fields) {
    f.require(&["id"]);
    let id = f.id("id");
    let console = !f.has("backend");
    let backend = if console {
        f.require(&["path"]);
        socket(f)
    } else {
        backend(f)
    };
    let Some(id) = id else { return };
    // Kept even without a valid back-end, so that references to it resolve.
    let backend = backend.unwrap_or(CharBackend::File(PathBuf::new()));
    draft.chardevs.push(Chardev { place: f.place().clone(), id, backend, console });
}

/// `-serial`.
pub(crate) fn serial(draft: &mut Draft, f: &mut Fields) {
    let chardev = f.text("backend", |word| Ok(word.strip_prefix("chardev:").map(str::to_owned)));
    let place = f.place().clone();
    draft.serial = match chardev.flatten() {
        Some(id) => match value::id(&id) {
            Ok(id) => Some(Serial::Chardev(place, id)),
            Err(rule) => {
                f.problem("chardev", rule);
                None
            }
        },
        None => backend(f).map(|backend| Serial::Backend(place, backend)),
    };
}

/// An item of `console`.
pub(crate) fn json_console(draft: &mut Draft, f: &mut Fields) {
    f.require(&["console_id", "socket_path"]);
    let (id, path) = (f.id("console_id"), f.text("socket_path", value::socket_path));
    if let (Some(id), Some(path)) = (id, path) {
        let backend = CharBackend::Socket { path, replay: 0 };
        draft.chardevs.push(Chardev { place: f.place().clone(), id, backend, console: true });
    }
}

/// `serial`.
pub(crate) fn json_serial(draft: &mut Draft, f: &mut Fields) {
    f.require(&["stdio"]);
    draft.serial = f.boolean("stdio").map(|stdio| {
        if stdio { Serial::Backend(f.place().clone(), CharBackend::Stdio) } else { Serial::Off }
    });
}

fn backend(f: &mut Fields) -> Option<CharBackend> {
    match f.choice("backend", KINDS) {
        Some(Kind::Stdio) => Some(CharBackend::Stdio),
        Some(Kind::Pty) => Some(CharBackend::Pty),
        Some(Kind::File) => {
            f.require(&["path"]);
            f.path("path").map(CharBackend::File)
        }
        Some(Kind::Socket) => {
            f.refuse("port", "a TCP character device");
            f.refuse("host", "a TCP character device");
            if !f.has("port") {
                f.require(&["path"]);
            }
            listening(f, false);
            socket(f)
        }
        None => {
            f.require(&["backend"]);
            f.abandon();
            None
        }
    }
}

fn socket(f: &mut Fields) -> Option<CharBackend> {
    let replay = f.text("replay", |word| value::size(word, limits::REPLAY)).unwrap_or(0);
    f.text("path", value::socket_path).map(|path| CharBackend::Socket { path, replay })
}

/// `server` and `nowait`, also in the longer form `server=on,wait=off`; or neither, if `without`
/// allows that.
fn listening(f: &mut Fields, without: bool) {
    let (server, nowait) = (f.switch("server"), f.switch("nowait"));
    let waits = f.boolean("wait").map_or(nowait != Some(true), |wait| wait);
    if without {
        return;
    }
    if server != Some(true) {
        f.problem("server", "must be given: connecting to a socket is not supported");
    }
    if waits {
        f.problem("nowait", "must be given: waiting for a client is not supported");
    }
}

fn unix(word: &str) -> Result<PathBuf, Rule> {
    match word.split_once(':') {
        Some(("unix", path)) => value::socket_path(path),
        Some(("tcp", _)) => Err("tcp type is not support yet! must be unix:PATH".into()),
        _ => Err("Failed to parse path: must be unix:PATH".into()),
    }
}
