//! `remus`: protects a domain.
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::Context as _;
use qmp::schema::{QueryReplication, ReplicationBlackhole, ReplicationStart};
use serde_json::json;

use super::{
    super::{Answer, Context, lifecycle},
    agent::{dialer, revive},
    cold, receive,
    syncing::until_protected,
};
use crate::{
    failure::Failure,
    matrix::Verb,
    registry::Place,
    remus::{
        beats,
        dial::Dial,
        fence,
        protection::Protection,
        uuid::Uuid,
        wire::SideText,
        witness::{self, Asked},
    },
    verbs::{Interval, OnLoss, Remus},
};

/// How long a witness is asked for its identity.
const IDENTIFY_LIMIT: Duration = Duration::from_secs(10);
/// Milliseconds between two checkpoints at most, with `-i auto`.
const LONGEST_PERIOD: u64 = 1000;
/// Longest path of a socket (`sun_path`), with the NUL character that ends it.
const LONGEST_SOCKET: usize = 108;
/// The monitor's time-out in milliseconds, unless another one is given.
const TIMEOUT: u64 = 1000;
/// How soon a witness is asked again.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

pub fn remus(ctx: &Context, args: &Remus, quiet: bool) -> anyhow::Result<Answer> {
    protect(ctx, args, false, quiet)
}

/// Protect a domain; with `moves`, until it has been handed over. `quiet` shows no progress.
///
/// # Errors
/// It is not protected.
pub fn protect(ctx: &Context, args: &Remus, moves: bool, quiet: bool) -> anyhow::Result<Answer> {
    let refusals = refusals(args);
    if !refusals.is_empty() {
        return Err(Failure::new(refusals.join("\n")).into());
    }
    let verb = if moves { Verb::Migrate } else { Verb::Remus };
    let mut held = ctx.hold(verb, &args.domain)?;
    // A monitor without replication says so here, before anything has changed.
    let before = held.status.client()?.execute(&QueryReplication {})?;
    let witness = match (&args.witness, args.local) {
        (None, true) => Some(ctx.own_witness()?),
        (named, _) => named.clone(),
    };
    let identity = witness.as_ref().map(identify).transpose()?;
    let earlier = Protection::of(&held.place)?;
    // A monitor that has one keeps it, so a backup that has taken over has that of its primary; and
    // so do disks. A later monitor of the same domain without disks gets another one: it would
    // begin with term 1 again, which the witness knows as closed.
    let lineage = match &before.lineage {
        Some(known) => known.parse().context("the monitor's lineage")?,
        None => {
            let description = lifecycle::described(&held.place)?;
            // Disks that are not replicated have no sidecars.
            let known = if args.no_disks { None } else { cold::lineage(&description)? };
            known.map_or_else(Uuid::random, Ok).context("no random numbers")?
        }
    };
    let mut protection = Protection {
        witness: witness.as_ref().map(ToString::to_string),
        identity: identity.clone(),
        fence: args.fence.as_ref().map(ToString::to_string),
        moves,
        shares_disks: args.no_disks,
        ..Protection::new(SideText::Primary, lineage)
    };
    if args.local {
        let backup = receive::beside(ctx, &held.place, &protection, &args.disk)?;
        protection.dial = Some(Dial::Unix(backup));
    } else if let Some(host) = &args.host {
        protection.dial = Some(dial(ctx, args, host, &protection));
    }
    protection.record(&ctx.registry, &held.place).context("cannot record the protection")?;
    let started = make(&held.place, &protection).and_then(|()| {
        revive(ctx, &held.place)?;
        let client = held.status.client()?;
        client.execute(&start(args, &protection)?)?;
        if let Some(address) = &args.heartbeat_path {
            beats::hand_over(client, &beats::connect(address)?)?;
        }
        until_protected(client, &args.domain, quiet)
    });
    match started {
        Ok(info) => {
            protection.incarnation = info.incarnation.as_deref().and_then(|own| own.parse().ok());
            let recorded = protection.record(&ctx.registry, &held.place);
            recorded.context("cannot record the protection")?;
            Ok(Answer::new("", json!({ "name": args.domain, "replication": info })))
        }
        Err(e) => {
            // Unless it runs in spite of the error: then it is needed.
            let now = held.status.client()?.execute(&QueryReplication {});
            if now.is_ok_and(|now| now.state == before.state) {
                match earlier {
                    Some(earlier) => earlier.record(&ctx.registry, &held.place)?,
                    None => Protection::forget(&ctx.registry, &held.place)?,
                }
                if args.local {
                    receive::undo(ctx, &held.place, lineage)?;
                }
            }
            Err(e)
        }
    }
}

/// Have the backup made on its host.
///
/// # Errors
/// There is no connection, or no backup.
fn make(place: &Place, protection: &Protection) -> anyhow::Result<()> {
    let Some(dial) = protection.dial.clone() else { return Ok(()) };
    let cannot = |e| Failure::new(format!("'{}' is not protected: {e}", place.name));
    dialer(place, protection, dial)?.make().map_err(|e| cannot(e).into())
}

/// Every reason to refuse the options, at once.
fn refusals(args: &Remus) -> Vec<String> {
    let mut all = Vec::new();
    let mut refuse = |when: bool, what: &str| {
        if when {
            all.push(what.to_owned());
        }
    };
    refuse(args.no_script, "-N: there is no script to leave out: the monitor itself holds output");
    refuse(
        args.max_period.is_some() && args.interval != Interval::Auto,
        "--max-period: only with -i auto, whose longest interval it is",
    );
    refuse(
        args.blackhole && args.local,
        "-b: replication into nothing has no backup: leave out --local",
    );
    refuse(
        args.blackhole && !args.force,
        "-b: nothing is protected, it only shows what protection costs; -F accepts that",
    );
    refuse(
        args.no_hold && !args.force,
        "-n: output would be seen before the backup could continue from it; -F accepts that",
    );
    refuse(
        args.no_disks && !args.force,
        "-d: the guest would find on its disks what it has written after its last checkpoint, or \
         nothing where the hosts do not share them; -F accepts that",
    );
    let longest = args.timeout.unwrap_or(TIMEOUT) / 3;
    refuse(
        args.heartbeat.is_some_and(|ms| ms == 0 || ms > longest),
        &format!("--heartbeat: 1 to {longest} ms, a third of --timeout, so that one may be lost"),
    );
    refuse(
        args.tls.is_some() && args.port.is_none(),
        "--tls: belongs to -p: ssh, the default, encrypts by itself",
    );
    let arbiter = args.local || args.witness.is_some() || args.fence.is_some();
    refuse(
        args.on_backup_loss == Some(OnLoss::Continue) && arbiter,
        "--on-backup-loss continue: the primary would not ask, but with a witness or a fence the \
         backup may continue by itself: leave these out, or choose another action",
    );
    for (action, name) in [(OnLoss::Witness, "witness"), (OnLoss::Stop, "stop")] {
        refuse(
            args.on_backup_loss == Some(action) && !arbiter,
            &format!("--on-backup-loss {name}: needs --witness or --fence"),
        );
    }
    refuse(
        args.fence == Some(fence::Uri::Local) && !args.local && args.witness.is_none(),
        "--fence local: ends processes of this host, so it decides only with --local",
    );
    refuse(args.timeout.is_some_and(|ms| ms < 10), "--timeout: 10 ms is the least");
    let loopback = ["localhost", "127.0.0.1", "::1"];
    let elsewhere = args.host.as_deref().is_some_and(|host| !loopback.contains(&host));
    refuse(
        args.port.is_some() && elsewhere && args.tls.is_none(),
        "-p: memory would cross the network in the clear: give certificates with --tls; or leave -p \
         out, as ssh encrypts",
    );
    refuse(
        !arbiter && !args.blackhole && !args.force,
        "neither --witness nor --fence: a failover would be by hand only, since nothing else tells \
         whether the other side still runs; -F accepts that",
    );
    all
}

/// The identity of a witness.
///
/// # Errors
/// It does not answer.
pub fn identify(uri: &witness::Uri) -> anyhow::Result<String> {
    let program = std::env::current_exe().context("the path of this program")?;
    let mut asked = Asked::new(uri.clone(), None, program);
    let deadline = Instant::now() + IDENTIFY_LIMIT;
    loop {
        match asked.identify() {
            Ok(identity) => return Ok(identity),
            Err(e) if Instant::now() >= deadline => return Err(e.into()),
            Err(_) => std::thread::sleep(POLL_INTERVAL),
        }
    }
}

/// How the backup is reached.
fn dial(ctx: &Context, args: &Remus, host: &str, protection: &Protection) -> Dial {
    if let Some(port) = args.port {
        return match &args.tls {
            Some(directory) => Dial::Tls(host.to_owned(), port, absolute(directory)),
            None => Dial::Tcp(host.to_owned(), port),
        };
    }
    let shell = match args.shell.as_deref() {
        Some("") => return Dial::Command(host.to_owned()),
        other => other.unwrap_or("ssh"),
    };
    let mut words = vec!["stratoctl".to_owned(), "remus-receive".to_owned()];
    if let Some(root) = &ctx.root {
        // The same directory on the other host, as for the witness and the disks.
        words.extend(["--root".to_owned(), root.display().to_string()]);
    }
    if args.no_wait {
        words.push("-e".to_owned());
    }
    for (option, value) in [
        ("--witness", &protection.witness),
        ("--fence", &protection.fence),
        ("--heartbeat-path", &args.heartbeat_path),
    ] {
        if let Some(value) = value {
            words.extend([option.to_owned(), value.clone()]);
        }
    }
    // Once for the shell there, once for the shell here.
    let there: Vec<_> = words.iter().map(|word| quoted(word)).collect();
    let line = format!("{shell} {} {}", quoted(host), quoted(&there.join(" ")));
    Dial::Command(line)
}

/// A path that means the same to a monitor, which has another current directory.
pub fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./:@,=".contains(&byte);
    match !word.is_empty() && word.bytes().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

/// The arguments of `replication-start`.
fn start(args: &Remus, protection: &Protection) -> anyhow::Result<ReplicationStart> {
    let (interval, max_period) = match args.interval {
        Interval::Auto => (None, Some(args.max_period.unwrap_or(LONGEST_PERIOD))),
        Interval::Milliseconds(ms) => (Some(ms), None),
    };
    let (tls, tls_hostname) = match &protection.dial {
        Some(Dial::Tls(host, _, directory)) => {
            let directory = directory.to_str().context("the directory's path is not UTF-8")?;
            (Some(directory.to_owned()), Some(host.clone()))
        }
        _ => (None, None),
    };
    // Where the monitor connects by itself, both sides know each other's process, and learn at once
    // that it has ended.
    let uri = match &protection.dial {
        Some(Dial::Unix(socket)) if socket.as_os_str().len() < LONGEST_SOCKET => {
            Some(format!("unix:{}", socket.to_str().context("the socket's path is not UTF-8")?))
        }
        _ => None,
    };
    Ok(ReplicationStart {
        uri,
        tls,
        tls_hostname,
        interval,
        max_period,
        timer: args.timer.then_some(true),
        lineage: Some(protection.lineage.to_string()),
        witness: protection.identity.clone(),
        fence: protection.arbitrating_fence()?.map(str::to_owned),
        on_backup_loss: args.on_backup_loss.map(Into::into),
        on_backup_slow: args.on_backup_slow.map(Into::into),
        heartbeat_timeout: args.timeout,
        heartbeat_interval: args.heartbeat,
        ack_limit: args.ack_limit,
        max_staging: args.max_staging,
        max_held: args.max_held,
        compression: args.uncompressed.then_some(false),
        network: args.no_hold.then_some(false),
        disks: args.no_disks.then_some(false),
        blackhole: args.blackhole.then_some(ReplicationBlackhole::Checkpoint),
        // Refused before, unless it was accepted.
        r#unsafe: (args.blackhole || args.no_hold || args.no_disks).then_some(true),
    })
}

impl Context {
    /// A witness for two sides on this host: the registry's own directory. It outlives a reboot, as
    /// the disks do.
    fn own_witness(&self) -> anyhow::Result<witness::Uri> {
        let path: PathBuf = self.registry.place_for_witness()?;
        Ok(witness::Uri::Dir(path))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use qmp::schema::{OnBackupLoss, OnBackupSlow};

    use super::*;
    use crate::verbs::{Command, Line};

    const LINEAGE: &str = "00000000-0000-0000-0000-000000000007";

    fn parse(words: &str) -> Remus {
        let words = ["stratoctl", "remus"].into_iter().chain(words.split_whitespace());
        let words = words.map(|word| if word == "''" { "" } else { word });
        match Line::try_parse_from(words).unwrap().verb {
            Command::Remus(args) => *args,
            _ => unreachable!(),
        }
    }

    #[test]
    fn all_that_is_unsafe_is_refused_at_once() {
        for (words, reasons) in [
            ("web b --witness dir:/w", &[][..]),
            ("web b --fence ssh:b", &[]),
            ("web --local --fence local", &[]),
            ("web b --fence local --witness dir:/w", &[]),
            ("web b --fence local", &["decides only with --local"]),
            ("web b", &["neither"]),
            ("web b -F", &[]),
            ("web b -N -n -d", &["-N:", "-n:", "-d:", "neither"]),
            ("web b -n -b", &["-b:", "-n:"]),
            ("web b -u -n -b -F", &[]),
            ("web --local -b -F", &["leave out --local"]),
            (
                "web b -F --max-period 50 -d --heartbeat 400 --tls /t",
                &["--max-period:", "--heartbeat:", "--tls:"],
            ),
            ("web b -F -i auto --max-period 50 --timer", &[]),
            ("web b --witness dir:/w --on-backup-loss continue -F", &["continue"]),
            ("web b -F --on-backup-loss continue", &[]),
            ("web b -F --on-backup-loss witness", &["witness: needs"]),
            ("web b -F --on-backup-loss stop", &["stop: needs"]),
            ("web b --witness dir:/w --timeout 9", &["--timeout"]),
            ("web b --witness dir:/w --timeout 200 --heartbeat 66", &[]),
            ("web b --witness dir:/w --timeout 200 --heartbeat 67", &["1 to 66 ms"]),
            ("web b -p 9 --witness dir:/w", &["in the clear"]),
            ("web localhost -p 9 --witness dir:/w", &[]),
            ("web b -p 9 --tls /t --witness dir:/w", &[]),
        ] {
            let said = refusals(&parse(words));
            assert_eq!(said.len(), reasons.len(), "{words}: {said:?}");
            for reason in reasons {
                assert!(said.iter().any(|said| said.contains(reason)), "{words}: {said:?}");
            }
        }
        for wrong in ["web", "web b --local", "web b -p 1 -s x", "web b -i 0", "web b --fence x"] {
            let words = ["stratoctl", "remus"].into_iter().chain(wrong.split_whitespace());
            assert!(Line::try_parse_from(words).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_other_host_is_reached_as_xl_does() {
        let ctx = |root: Option<&str>| Context {
            registry: crate::registry::Registry::open(Some("/nowhere".as_ref())).unwrap(),
            program: "stratovirt".into(),
            root: root.map(Into::into),
        };
        let line = |words: &str, root| {
            let args = parse(words);
            let protection = Protection {
                witness: args.witness.as_ref().map(ToString::to_string),
                ..Protection::new(SideText::Primary, Uuid(7))
            };
            dial(&ctx(root), &args, args.host.as_deref().unwrap(), &protection)
        };
        let command = |text: &str| Dial::Command(text.into());
        assert_eq!(line("web b -F", None), command("ssh b 'stratoctl remus-receive'"));
        assert_eq!(
            line("web b -F -e -s rsh", Some("/a b")),
            command(r"rsh b 'stratoctl remus-receive --root '\''/a b'\'' -e'")
        );
        assert_eq!(
            line("web b --witness dir:/w", None),
            command("ssh b 'stratoctl remus-receive --witness dir:/w'")
        );
        assert_eq!(
            line("web b -F --heartbeat-path 10.0.0.2:7", None),
            command("ssh b 'stratoctl remus-receive --heartbeat-path 10.0.0.2:7'")
        );
        assert_eq!(line("web receive-it -F -s ''", None), command("receive-it"));
        assert_eq!(line("web b -F -p 9", None), Dial::Tcp("b".into(), 9));
        assert_eq!(line("web b -F -p 9 --tls /t", None), Dial::Tls("b".into(), 9, "/t".into()));
    }

    #[test]
    fn options_become_arguments_and_defaults_are_left_to_the_monitor() {
        let protection = |identity: Option<&str>, fence: Option<&str>| Protection {
            identity: identity.map(str::to_owned),
            fence: fence.map(str::to_owned),
            ..Protection::new(SideText::Primary, Uuid(7))
        };
        let said = |words: &str, protection| start(&parse(words), &protection).unwrap();
        let usual = ReplicationStart {
            interval: Some(200),
            lineage: Some(LINEAGE.into()),
            ..Default::default()
        };
        assert_eq!(said("web b -F", protection(None, None)), usual);
        let options = "web b -i 25 --timeout 200 --on-backup-loss stall --on-backup-slow solo";
        assert_eq!(
            said(options, protection(None, Some("ssh:b"))),
            ReplicationStart {
                interval: Some(25),
                fence: Some("ssh".into()),
                on_backup_loss: Some(OnBackupLoss::Stall),
                on_backup_slow: Some(OnBackupSlow::Solo),
                heartbeat_timeout: Some(200),
                ..usual.clone()
            }
        );
        let encrypted = Protection {
            dial: Some(Dial::Tls("b".into(), 9, "/t".into())),
            ..protection(None, None)
        };
        assert_eq!(
            said("web b -F -p 9 --tls /t", encrypted),
            ReplicationStart {
                tls: Some("/t".into()),
                tls_hostname: Some("b".into()),
                ..usual.clone()
            }
        );
        assert_eq!(
            said("web b -F -i auto --timer -u", protection(None, None)),
            ReplicationStart {
                interval: None,
                max_period: Some(LONGEST_PERIOD),
                timer: Some(true),
                compression: Some(false),
                ..usual.clone()
            }
        );
        assert_eq!(
            said(
                "web b -F --heartbeat 9 --ack-limit 5 --max-staging 2M --max-held 32M -d",
                protection(None, None)
            ),
            ReplicationStart {
                heartbeat_interval: Some(9),
                ack_limit: Some(5),
                max_staging: Some(2 << 20),
                max_held: Some(32 << 20),
                disks: Some(false),
                r#unsafe: Some(true),
                ..usual.clone()
            }
        );
        assert_eq!(
            said("web b -F -i auto --max-period 50 -b -n", protection(None, None)),
            ReplicationStart {
                interval: None,
                max_period: Some(50),
                network: Some(false),
                blackhole: Some(ReplicationBlackhole::Checkpoint),
                r#unsafe: Some(true),
                ..usual.clone()
            }
        );
        // With a witness the fence decides nothing.
        assert_eq!(
            said("web b", protection(Some("dir:7"), Some("ssh:b"))),
            ReplicationStart { witness: Some("dir:7".into()), ..usual }
        );
    }
}
