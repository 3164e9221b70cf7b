//! Flags about the process itself.
use super::Log;
use super::draft::Draft;
use super::fields::Fields;
use crate::incoming::{Arbiter, Mapping, Place, Replica, Source, StreamSource, Tls};
use crate::value::{self, Rule};

pub(crate) fn pidfile(draft: &mut Draft, f: &mut Fields) {
    draft.pidfile = f.path("");
}

pub(crate) fn daemonize(draft: &mut Draft, _: &mut Fields) {
    draft.daemonize = true;
}

pub(crate) fn freeze(draft: &mut Draft, _: &mut Fields) {
    draft.paused = true;
}

pub(crate) fn log(draft: &mut Draft, f: &mut Fields) {
    draft.log = Some(f.path("").map_or(Log::Stderr, Log::File));
}

pub(crate) fn disable_seccomp(draft: &mut Draft, _: &mut Fields) {
    draft.disable_seccomp = true;
}

/// `-sandbox on|off[,spawn=allow|deny]`. QEMU's other keys name what is always denied here.
pub(crate) fn sandbox(draft: &mut Draft, f: &mut Fields) {
    let on = f.text("enable", value::boolean).unwrap_or(true);
    draft.disable_seccomp |= !on;
    draft.spawn = f.choice("spawn", &[("allow", Ok(true)), ("deny", Ok(false))]).unwrap_or(false);
    for key in ["obsolete", "elevateprivileges", "resourcecontrol"] {
        let _ = f.text(key, value::text);
    }
}

/// `-incoming file:DIR[,mapped=on|off|uffd][,disks=DIR]`, `unix:SOCKET`, `fd:NUMBER` or
/// `exec:COMMAND`; all but the last with `,clock=continue|realtime` and `,force=on|off`.
pub(crate) fn incoming(draft: &mut Draft, f: &mut Fields) {
    let incoming = f.text("", |word| match word.split_once(':') {
        Some(("file", rest)) => directory(rest),
        Some(("unix", rest)) => {
            stream(rest, |path| value::socket_path(path).map(StreamSource::Unix))
        }
        Some(("fd", rest)) => {
            stream(rest, |number| value::number(number, 3..=i32::MAX).map(StreamSource::Fd))
        }
        Some(("replicate", rest)) => replica(rest).map(|backup| (backup, How::default())),
        // The whole rest of the value: commands may contain commas.
        Some(("exec", command)) if !command.is_empty() => value::text(command)
            .map(|command| (Source::Stream(StreamSource::Exec(command)), How::default())),
        Some(("tcp", _)) => {
            Err("streams over TCP are not supported; use unix:, fd: or exec:".into())
        }
        _ => Err("must be file:DIRECTORY, unix:SOCKET, fd:NUMBER, exec:COMMAND or \
                  replicate:unix:SOCKET or replicate:tcp:HOST:PORT"
            .into()),
    });
    // Kept even when it is wrong, so that no missing kernel is reported.
    draft.incoming = incoming.or(Some((Source::Stream(StreamSource::Fd(0)), How::default())));
}

/// How a saved machine is restored.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct How {
    /// See [`crate::incoming::Incoming`].
    pub clock_realtime: bool,
    /// See [`crate::incoming::Incoming`].
    pub force: bool,
}

impl How {
    /// Apply `key=word`; false when the key is unknown.
    fn take(&mut self, key: &str, word: &str) -> Result<bool, Rule> {
        match key {
            "clock" => self.clock_realtime = is_realtime(word)?,
            "force" => {
                self.force = value::boolean(word).map_err(|_| "force must be on or off")?;
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

fn directory(text: &str) -> Result<(Source, How), Rule> {
    let mut parts = text.split(',');
    let path = value::path(parts.next().unwrap_or_default())?;
    let (mut mapping, mut disks, mut how) = (Mapping::On, None, How::default());
    for option in parts {
        match option.split_once('=') {
            Some(("mapped", "uffd")) => mapping = Mapping::Uffd,
            Some(("mapped", word)) => match value::boolean(word) {
                Ok(true) => mapping = Mapping::On,
                Ok(false) => mapping = Mapping::Off,
                Err(_) => return Err("mapped must be on, off or uffd".into()),
            },
            Some(("disks", place)) => disks = Some(value::path(place)?),
            Some((key, word)) if how.take(key, word)? => {}
            _ => {
                return Err("after the directory, only ,mapped=on|off|uffd, ,disks=DIR, \
                            ,clock=continue|realtime and ,force=on|off are allowed"
                    .into());
            }
        }
    }
    Ok((Source::Directory { path, mapping, disks }, how))
}

fn stream(
    mut text: &str,
    from: impl FnOnce(&str) -> Result<StreamSource, Rule>,
) -> Result<(Source, How), Rule> {
    let mut how = How::default();
    // A socket's path may contain commas.
    while let Some((rest, (key, word))) =
        text.rsplit_once(',').and_then(|(rest, last)| Some((rest, last.split_once('=')?)))
        && how.take(key, word)?
    {
        text = rest;
    }
    Ok((Source::Stream(from(text)?), how))
}

/// `unix:SOCKET` or `tcp:HOST:PORT`, with `[,witness=ID|,fence=KIND][,tls=DIR|off]`.
fn replica(text: &str) -> Result<Source, Rule> {
    const FORM: &str = "must be replicate:unix:SOCKET or replicate:tcp:HOST:PORT, with ,witness=ID or ,fence=KIND if \
         the backup may promote itself, and ,tls=DIR or ,tls=off";
    let (mut rest, mut arbiter, mut tls) = (text, None, None);
    // A socket's path may contain commas.
    while let Some((before, (key, word))) =
        rest.rsplit_once(',').and_then(|(before, last)| Some((before, last.split_once('=')?)))
    {
        let is_given = match key {
            "witness" => arbiter.replace(Arbiter::Witness(value::text(word)?)).is_some(),
            "fence" => arbiter.replace(Arbiter::Fence(value::text(word)?)).is_some(),
            "tls" if word == "off" => tls.replace(Tls::Off).is_some(),
            "tls" => tls.replace(Tls::Directory(value::path(word)?)).is_some(),
            _ => return Err(FORM.into()),
        };
        if is_given {
            return Err("only one of witness and fence is allowed, and each option once".into());
        }
        rest = before;
    }
    let place = match rest.split_once(':') {
        Some(("unix", path)) => Place::Unix(value::socket_path(path)?),
        Some(("tcp", address)) => Place::Tcp(tcp_address(address)?),
        _ => return Err(FORM.into()),
    };
    let (arbiter, tls) = (arbiter.unwrap_or(Arbiter::None), tls.unwrap_or(Tls::Local));
    Ok(Source::Replica(Replica { place, arbiter, tls }))
}

/// `HOST:PORT`; an IPv6 address is in brackets.
fn tcp_address(word: &str) -> Result<String, Rule> {
    let port = word.rsplit_once(':').filter(|(host, port)| {
        let plain = !host.contains(':') || (host.starts_with('[') && host.ends_with(']'));
        !host.is_empty() && plain && port.parse::<u16>().is_ok()
    });
    port.map(|_| word.to_owned()).ok_or_else(|| {
        "must be tcp:HOST:PORT, such as tcp:192.0.2.1:7000, tcp:[::]:7000 or tcp:0.0.0.0:7000"
            .into()
    })
}

fn is_realtime(word: &str) -> Result<bool, Rule> {
    match word {
        "continue" => Ok(false),
        "realtime" => Ok(true),
        _ => Err("clock must be continue or realtime".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clock_and_force_are_said_behind_a_directory_and_behind_a_stream() {
        let realtime = How { clock_realtime: true, force: false };
        let both = How { clock_realtime: true, force: true };
        let on = |mapping| Source::Directory { path: "/a".into(), mapping, disks: None };
        let place = Source::Directory {
            path: "/a".into(),
            mapping: Mapping::Off,
            disks: Some("b/c".into()),
        };
        assert_eq!(directory("/a,disks=b/c,mapped=off").ok(), Some((place, How::default())));
        assert_eq!(directory("/a").ok(), Some((on(Mapping::On), How::default())));
        assert_eq!(
            directory("/a,clock=realtime,mapped=off").ok(),
            Some((on(Mapping::Off), realtime))
        );
        assert_eq!(
            directory("/a,mapped=uffd,clock=continue").ok(),
            Some((on(Mapping::Uffd), How::default()))
        );
        for wrong in
            ["/a,", "/a,disks=", "/a,clock", "/a,clock=host", "/a,b=c", "/a,mapped=no,clock="]
        {
            assert!(directory(wrong).is_err(), "{wrong}");
        }
        let unix = |text| stream(text, |path| Ok(StreamSource::Unix(path.into()))).ok();
        let at = |path: &str| Source::Stream(StreamSource::Unix(path.into()));
        assert_eq!(unix("/a,b"), Some((at("/a,b"), How::default())));
        assert_eq!(unix("/a,b,clock=realtime"), Some((at("/a,b"), realtime)));
        assert_eq!(unix("/a,b,force=on,clock=realtime"), Some((at("/a,b"), both)));
        assert_eq!(directory("/a,force=on,clock=realtime").ok(), Some((on(Mapping::On), both)));
        assert_eq!(unix("/a,clock=host"), None);
        assert_eq!(unix("/a,force=maybe"), None);
    }

    #[test]
    fn a_backup_listens_at_a_socket_or_a_port() {
        let unix = |path: &str| Place::Unix(path.into());
        let tcp = |address: &str| Place::Tcp(address.into());
        let witness = Arbiter::Witness("dir:7".into());
        for (text, place, arbiter, tls) in [
            ("unix:/a,b", unix("/a,b"), Arbiter::None, Tls::Local),
            ("unix:/a,b,witness=dir:7,tls=/c", unix("/a,b"), witness, Tls::Directory("/c".into())),
            ("tcp:h:7,tls=off,fence=x", tcp("h:7"), Arbiter::Fence("x".into()), Tls::Off),
            ("tcp:[::]:7", tcp("[::]:7"), Arbiter::None, Tls::Local),
        ] {
            let source = Source::Replica(Replica { place, arbiter, tls });
            assert_eq!(replica(text), Ok(source), "{text}");
        }
        for wrong in [
            "/a",
            "unix:",
            "tcp:",
            "tcp:h",
            "tcp:h:",
            "tcp::7",
            "tcp:h:65536",
            "tcp:::1:7",
            "tcp:h:7,x=y",
            "unix:/a,witness=1,fence=2",
            "unix:/a,tls=off,tls=/b",
            "unix:/a,tls=",
        ] {
            assert!(replica(wrong).is_err(), "{wrong}");
        }
    }
}
