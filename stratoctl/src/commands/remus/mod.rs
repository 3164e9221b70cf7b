//! Protecting domains by replication: the monitors at both ends do it; these verbs start it, steer
//! it, and keep a process that does for a monitor what that may not do itself.
mod agent;
mod fence;
mod receive;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use qmp::client::{Client, ClientError};
use serde_json::{Map, Value, json};

pub use agent::{agent, revive};
pub use fence::{fence, refuse_fenced};
pub use receive::receive;

use super::{Answer, Context, LockedDomain, lifecycle};
use crate::{
    failure::Failure,
    matrix::Verb,
    progress,
    registry::{Name, Place},
    remus::{
        dial::Dial,
        protection::Protection,
        wire::SideText,
        witness::{self, Asked},
    },
    verbs::{Failover, Interval, OnLoss, Remus, Unprotect},
};

/// How long a witness is asked for its identity.
const IDENTIFY_LIMIT: Duration = Duration::from_secs(10);
/// Poll interval while a domain becomes protected.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// The URI for which a monitor throws away what it sends.
const NOWHERE: &str = "null:";

pub fn remus(ctx: &Context, args: &Remus) -> anyhow::Result<Answer> {
    let refusals = refusals(args);
    if !refusals.is_empty() {
        return Err(Failure::new(refusals.join("\n")).into());
    }
    let mut held = ctx.hold(Verb::Remus, &args.domain)?;
    // A monitor without replication says so here, before anything has changed.
    let before = held.status.client()?.execute_raw("query-replication", json!({}))?;
    let state = word(&before, "state");
    if !matches!(state, "off" | "degraded") {
        let what = format!("'{}' is protected already: it is {state}", args.domain);
        let hint = format!("`stratoctl unprotect {}` ends that", args.domain);
        return Err(Failure::hint(what, hint).into());
    }
    let witness = match (&args.witness, args.local) {
        (None, true) => Some(ctx.own_witness()?),
        (named, _) => named.clone(),
    };
    let identity = witness.as_ref().map(identify).transpose()?;
    // A backup that has taken over keeps the lineage of its primary.
    let lineage = match Protection::of(&held.place)? {
        Some(earlier) => earlier.lineage,
        None => described(&held.place)?.uuid.parse().context("the domain's UUID")?,
    };
    let mut protection = Protection {
        side: SideText::Primary,
        lineage,
        witness: witness.as_ref().map(ToString::to_string),
        identity: identity.clone(),
        fence: args.fence.as_ref().map(ToString::to_string),
        dial: None,
    };
    if args.local {
        let backup = receive::beside(ctx, &held.place, &protection)?;
        protection.dial = Some(Dial::Unix(backup));
    } else {
        protection.dial = dial(ctx, args, &protection)?;
    }
    protection.record(&ctx.registry, &held.place).context("cannot record the protection")?;
    let started = revive(ctx, &held.place).and_then(|()| {
        let client = held.status.client()?;
        client.execute_raw("replication-start", Value::Object(start(args, &protection)?))?;
        until_protected(client, args)
    });
    match started {
        Ok(state) => Ok(Answer::new("", json!({ "name": args.domain, "replication": state }))),
        Err(e) => {
            // Unless it runs in spite of the error: then it is needed.
            let now = held.status.client()?.execute_raw("query-replication", json!({}));
            if now.is_ok_and(|now| word(&now, "state") == "off") {
                Protection::forget(&ctx.registry, &held.place)?;
                if args.local {
                    receive::undo(ctx, &held.place)?;
                }
            }
            Err(e)
        }
    }
}

/// Every reason to refuse the options, at once.
fn refusals(args: &Remus) -> Vec<String> {
    let mut all = Vec::new();
    let mut refuse = |when: bool, what: &str| {
        if when {
            all.push(what.to_owned());
        }
    };
    let arbiter = args.local || args.witness.is_some() || args.fence.is_some();
    refuse(args.no_script, "-N: there is no script to leave out: the monitor itself holds output");
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
    refuse(args.timeout.is_some_and(|ms| ms < 10), "--timeout: 10 ms is the least");
    let timeout = args.timeout.unwrap_or(1000);
    refuse(
        args.heartbeat.is_some_and(|ms| ms == 0 || ms * 2 > timeout),
        "--heartbeat: must be from 1 ms to half of the time-out",
    );
    let loopback = ["localhost", "127.0.0.1", "::1"];
    let plain = args.port.is_some() && args.tls.is_none();
    refuse(
        plain && args.host.as_deref().is_some_and(|host| !loopback.contains(&host)),
        "-p: without --tls memory would cross the network in the clear; ssh, the default, encrypts",
    );
    if args.force {
        return all;
    }
    let mut unsafe_one = |when: bool, what: &str| {
        if when {
            all.push(format!("{what}; -F accepts that"));
        }
    };
    unsafe_one(args.blackhole, "-b: nothing is protected");
    unsafe_one(args.no_hold, "-n: clients may see answers that are lost in a failover");
    unsafe_one(args.no_disks, "-d: after a failover memory and disks do not match");
    unsafe_one(
        !arbiter && !args.blackhole,
        "neither --witness nor --fence: a failover would be by hand only, since nothing else tells \
         whether the other side still runs",
    );
    all
}

fn identify(uri: &witness::Uri) -> anyhow::Result<String> {
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
fn dial(ctx: &Context, args: &Remus, protection: &Protection) -> anyhow::Result<Option<Dial>> {
    let Some(host) = &args.host else { return Ok(None) };
    if args.blackhole {
        return Ok(None);
    }
    if let Some(port) = args.port {
        return Ok(Some(Dial::Tcp(host.clone(), port)));
    }
    let shell = match args.shell.as_deref() {
        Some("") => return Ok(Some(Dial::Command(host.clone()))),
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
    for (option, value) in [("--witness", &protection.witness), ("--fence", &protection.fence)] {
        if let Some(value) = value {
            words.extend([option.to_owned(), value.clone()]);
        }
    }
    // Once for the shell there, once for the shell here.
    let there: Vec<_> = words.iter().map(|word| quoted(word)).collect();
    let line = format!("{shell} {} {}", quoted(host), quoted(&there.join(" ")));
    Ok(Some(Dial::Command(line)))
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
fn start(args: &Remus, protection: &Protection) -> anyhow::Result<Map<String, Value>> {
    let interval = match args.interval {
        Interval::Auto => json!("auto"),
        Interval::Milliseconds(ms) => json!(ms),
    };
    let only = |when: bool, value: bool| when.then_some(json!(value));
    let tls = args.tls.as_ref().map(std::path::absolute).transpose().context("--tls")?;
    let all = [
        ("uri", args.blackhole.then(|| json!(NOWHERE))),
        ("interval", Some(interval)),
        ("timer", only(args.timer, true)),
        ("compression", only(args.uncompressed, false)),
        ("network", only(args.no_hold, false)),
        ("disks", only(args.no_disks, false)),
        ("unsafe", only(args.blackhole || args.no_hold || args.no_disks, true)),
        ("lineage", Some(json!(protection.lineage))),
        ("witness", protection.identity.as_ref().map(|identity| json!(identity))),
        ("fence", protection.arbitrating_fence()?.map(|kind| json!(kind))),
        ("on-backup-loss", args.on_backup_loss.map(|action| json!(action.word()))),
        ("on-backup-slow", args.on_backup_slow.map(|action| json!(action.word()))),
        ("heartbeat-interval", args.heartbeat.map(|ms| json!(ms))),
        ("heartbeat-timeout", args.timeout.map(|ms| json!(ms))),
        ("tls-dir", tls.map(|directory| json!(directory))),
    ];
    let given = all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    Ok(given.collect())
}

/// Wait until the domain is protected; its state then.
fn until_protected(client: &mut Client, args: &Remus) -> anyhow::Result<Value> {
    let shown = progress::spinner(&format!("Protecting {}", args.domain));
    let mut reason = None;
    let state = loop {
        let now = client.execute_raw("query-replication", json!({}))?;
        match word(&now, "state") {
            "protected" => break Ok(now),
            "off" => {
                let reason = reason.unwrap_or_else(|| "the monitor does not say why".to_owned());
                break Err(Failure::hint(
                    format!("'{}' is not protected: {reason}", args.domain),
                    format!("`stratoctl dmesg {}` shows more", args.domain),
                ));
            }
            _ => {}
        }
        progress::turn(&shown);
        match client.next_event(POLL_INTERVAL) {
            Ok(event) if event.event == "REPLICATION_STATE" => {
                reason = event.data.get("reason").and_then(Value::as_str).map(str::to_owned);
            }
            Ok(_) | Err(ClientError::Timeout { .. }) => {}
            Err(e) => return Err(e.into()),
        }
    };
    shown.finish_and_clear();
    Ok(state?)
}

pub fn unprotect(ctx: &Context, args: &Unprotect) -> anyhow::Result<Answer> {
    let mut held = ctx.hold(Verb::Unprotect, &args.domain)?;
    if let Some(client) = held.status.client.as_mut() {
        let arguments = if args.force { json!({ "force": true }) } else { json!({}) };
        client.execute_raw("replication-stop", arguments)?;
    }
    // Its process ends when it sees that.
    Protection::forget(&ctx.registry, &held.place).context("cannot remove the record")?;
    if args.force {
        fence::forget(ctx, &held.place)?;
    }
    Ok(Answer::new("", json!({ "name": args.domain, "protected": false })))
}

pub fn failover(ctx: &Context, args: &Failover) -> anyhow::Result<Answer> {
    let mut held = ctx.hold(Verb::Failover, &args.domain)?;
    revive(ctx, &held.place)?;
    let mut arguments = Map::new();
    for (name, given) in [("planned", args.planned), ("force", args.force)] {
        if given {
            arguments.insert(name.to_owned(), json!(true));
        }
    }
    let client = held.status.client()?;
    let reply = client.execute_raw("replication-failover", Value::Object(arguments))?;
    Ok(Answer::new("", json!({ "name": args.domain, "failover": reply })))
}

impl Context {
    /// A witness for two sides on this host: the registry's own directory. It outlives a reboot, as
    /// the disks do.
    fn own_witness(&self) -> anyhow::Result<witness::Uri> {
        let path: PathBuf = self.registry.place_for_witness()?;
        Ok(witness::Uri::Dir(path))
    }
}

/// What a monitor reports about replication, for `list` and `info`; `None` if the domain is not
/// protected.
pub fn report(place: &Place, client: Option<&mut Client>) -> Option<Value> {
    let protection = Protection::of(place).ok().flatten()?;
    let mut object = json!({
        "side": protection.side.word(),
        "agent": crate::remus::protection::has_agent(place),
        "witness": protection.witness,
        "fence": protection.fence,
    });
    let reply = client.and_then(|c| c.execute_raw("query-replication", json!({})).ok());
    if let (Some(members), Some(Value::Object(reply))) = (object.as_object_mut(), reply) {
        members.extend(reply);
    }
    Some(object)
}

/// The report in one word: `P` or `B`, its state unless it is the usual one, and its lag.
pub fn summary(report: &Value) -> String {
    let role = report.get("role").or_else(|| report.get("side")).and_then(Value::as_str);
    let side = if role == Some("backup") { "B" } else { "P" };
    let state = match word(report, "state") {
        "" => " ?",
        "protected" | "standby" => "",
        other => &format!(" {other}"),
    };
    // How long the oldest output that is held has waited.
    let lag = report.get("oldest-us").and_then(Value::as_u64).filter(|us| *us > 0);
    let lag = lag.map(|us| format!(" {} ms", us.div_ceil(1000))).unwrap_or_default();
    format!("{side}{state}{lag}")
}

fn word<'a>(object: &'a Value, name: &str) -> &'a str {
    object.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// The name of the backup of a domain on the same host.
fn backup_name(name: &Name) -> anyhow::Result<Name> {
    const TAIL: &str = "-backup";
    let head: String = name.as_str().chars().take(Name::MAX_BYTES - TAIL.len()).collect();
    Ok(format!("{head}{TAIL}").parse()?)
}

/// A domain whose lock is held by the caller.
fn unlocked(place: Place, status: crate::domain::Status) -> LockedDomain {
    LockedDomain { place, status, lock: None }
}

/// The description of the domain at `place`, as it is sent to another host.
fn described(place: &Place) -> anyhow::Result<crate::registry::Description> {
    lifecycle::described(place)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::{
        remus::uuid::Uuid,
        verbs::{Command, Line},
    };

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
            ("web --local", &[]),
            ("web b", &["neither"]),
            ("web b -F", &[]),
            ("web b -b -n -d", &["-b:", "-n:", "-d:"]),
            ("web -b -n -d -F", &[]),
            ("web b -N -n", &["-N:", "-n:", "neither"]),
            ("web b -N -F", &["-N:"]),
            ("web b --witness dir:/w --on-backup-loss continue -F", &["continue"]),
            ("web b -F --on-backup-loss continue", &[]),
            ("web b -F --on-backup-loss witness", &["witness: needs"]),
            ("web b -F --on-backup-loss stop", &["stop: needs"]),
            ("web b --witness dir:/w --timeout 9 --heartbeat 5", &["--timeout", "--heartbeat"]),
            ("web b --witness dir:/w --timeout 200 --heartbeat 20", &[]),
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
                side: SideText::Primary,
                lineage: Uuid(7),
                witness: args.witness.as_ref().map(ToString::to_string),
                identity: None,
                fence: None,
                dial: None,
            };
            dial(&ctx(root), &args, &protection).unwrap()
        };
        let command = |text: &str| Some(Dial::Command(text.into()));
        assert_eq!(line("web b -F", None), command("ssh b 'stratoctl remus-receive'"));
        assert_eq!(
            line("web b -F -e -s rsh", Some("/a b")),
            command(r"rsh b 'stratoctl remus-receive --root '\''/a b'\'' -e'")
        );
        assert_eq!(
            line("web b --witness dir:/w", None),
            command("ssh b 'stratoctl remus-receive --witness dir:/w'")
        );
        assert_eq!(line("web receive-it -F -s ''", None), command("receive-it"));
        assert_eq!(line("web b -F -p 9", None), Some(Dial::Tcp("b".into(), 9)));
        assert_eq!(line("web -b -F", None), None);
    }

    #[test]
    fn options_become_arguments_and_defaults_are_left_to_the_monitor() {
        let protection = |identity: Option<&str>, fence: Option<&str>| Protection {
            side: SideText::Primary,
            lineage: Uuid(7),
            witness: None,
            identity: identity.map(str::to_owned),
            fence: fence.map(str::to_owned),
            dial: None,
        };
        let said =
            |words: &str, protection| Value::Object(start(&parse(words), &protection).unwrap());
        assert_eq!(
            said("web b -F", protection(None, None)),
            json!({ "interval": 200, "lineage": LINEAGE })
        );
        assert_eq!(
            said(
                "web b -i auto --timer -u -n -d -F --heartbeat 20 --timeout 200 \
                 --on-backup-loss stall --on-backup-slow solo",
                protection(None, Some("ssh:b"))
            ),
            json!({ "interval": "auto", "timer": true, "compression": false, "network": false,
                "disks": false, "unsafe": true, "lineage": LINEAGE, "fence": "ssh",
                "on-backup-loss": "stall", "on-backup-slow": "solo",
                "heartbeat-interval": 20, "heartbeat-timeout": 200 })
        );
        // With a witness the fence decides nothing.
        assert_eq!(
            said("web b", protection(Some("dir:7"), Some("ssh:b"))),
            json!({ "interval": 200, "lineage": LINEAGE, "witness": "dir:7" })
        );
    }

    #[test]
    fn a_list_says_which_side_and_how_far_behind() {
        for (report, shown) in [
            (json!({ "side": "primary" }), "P ?"),
            (json!({ "side": "backup", "state": "standby" }), "B"),
            (json!({ "side": "backup", "role": "primary", "state": "off" }), "P off"),
            (json!({ "role": "primary", "state": "protected", "oldest-us": 2500 }), "P 3 ms"),
        ] {
            assert_eq!(summary(&report), shown, "{report}");
        }
    }
}
