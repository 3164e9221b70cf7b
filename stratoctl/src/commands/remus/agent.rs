//! The process that does for a protected domain's monitor what that may not do itself: see
//! [`crate::remus::serve`]. There is one for each protected domain, and it ends with the protection
//! or with the monitor. If it is killed, the monitor continues, and the next verb starts another one.
use std::{
    env,
    io::{self, Write},
    path::PathBuf,
};

use anyhow::Context as _;
use replication::{Lineage, Question, Side};

use super::super::{Answer, Context, restart_policy};
use crate::{
    domain,
    registry::{Lock, Name, Place},
    remus::{
        Unknown,
        dial::{Dial, Dialer, Greeting},
        fence::{self, begin},
        protection::{Protection, agent_lock, has_agent, lock_marks, marks},
        serve::{End, Means, Server},
        uuid::Uuid,
        wire::{Said, SideText},
        witness::Asked,
    },
};

/// Start the process for the domain at `place`, if that is protected and has none.
///
/// # Errors
/// It does not start.
pub fn revive(ctx: &Context, place: &Place) -> anyhow::Result<()> {
    if Protection::of(place)?.is_none() || has_agent(place) {
        return Ok(());
    }
    let cannot = || format!("cannot start what answers for '{}'", place.name);
    restart_policy::start_verb(ctx, "remus-agent", place).with_context(cannot)
}

/// The process: answers the monitor of `name` until it hangs up.
///
/// # Errors
/// The domain is not there, or is not protected.
pub fn agent(ctx: &Context, name: &Name) -> anyhow::Result<Answer> {
    // Detach from the terminal. This fails if the process leads a session already, which serves as
    // well.
    let _ = rustix::process::setsid();
    let place = ctx.registry.find(name).context("there is no such domain")?;
    let id = place.id().context("it has not been started")?;
    let protection = Protection::of(&place)?.context("it is not protected")?;
    let lock = Lock::attempt_once(&agent_lock(&place)).context("cannot lock it")?;
    let ready = || {
        let mut out = io::stdout();
        out.write_all(b"\n").and_then(|()| out.flush())
    };
    let Some(_lock) = lock else {
        // Another one has been faster.
        ready()?;
        return Ok(Answer::silent());
    };
    let mut client = domain::qmp(&place)?;
    ready()?;
    let started = place.clone();
    let mut now = place;
    let mut known = protection;
    loop {
        let mut server = Server::new(means(ctx, &now, &known)?)?;
        let mut found = Some(known.clone());
        let needed = || {
            // It may have been renamed.
            if now.id() != Some(id) {
                match ctx.place_of(id) {
                    Ok(Some(place)) => now = place,
                    _ => {
                        found = None;
                        return false;
                    }
                }
            }
            if let Ok(record) = Protection::of(&now) {
                found = record;
            }
            found.as_ref() == Some(&known)
        };
        let log = |line: &str| restart_policy::log(&started, line);
        let end = server.run(&mut client, needed, log)?;
        // A promoted domain that is protected again has another backup.
        match (end, found) {
            (End::HungUp, _) | (_, None) => return Ok(Answer::silent()),
            (End::Late, Some(record)) => (client, known) = (domain::qmp(&now)?, record),
            (End::Unneeded, Some(record)) => known = record,
        }
    }
}

/// Connects to the backup of the domain at `place`, by `dial`.
///
/// # Errors
/// The domain's record cannot be read.
pub fn dialer(place: &Place, protection: &Protection, dial: Dial) -> anyhow::Result<Dialer> {
    let greeting = Greeting::new(place.name.clone(), place.description()?, protection);
    Ok(Dialer::new(dial, greeting, place.run.join("log")))
}

fn means(ctx: &Context, place: &Place, protection: &Protection) -> anyhow::Result<Means> {
    let program = env::current_exe().context("the path of this program")?;
    let named = |what: &str, error: String| anyhow::anyhow!("{what} of '{}': {error}", place.name);
    let witness = protection.witness().map_err(|e| named("the witness", e))?;
    let mut witness =
        witness.map(|uri| Asked::new(uri, protection.identity.clone(), program.clone()));
    witness.iter_mut().for_each(Asked::warm_up);
    let fence = protection.fence().map_err(|e| named("the fence", e))?;
    let dial = protection.dial.clone();
    let mut dialer = dial.map(|dial| dialer(place, protection, dial)).transpose()?;

    let mut own: Vec<PathBuf> = vec![program];
    if let Some(root) = &ctx.root {
        own.extend(["--root".into(), std::path::absolute(root)?]);
    }
    let fencer = Fencer {
        registry_root: ctx.root.clone(),
        place: place.clone(),
        own,
        fence,
        peer: match protection.side {
            SideText::Primary => Side::Backup,
            SideText::Backup => Side::Primary,
        },
    };
    Ok(Means {
        dial: Box::new(move || match &mut dialer {
            Some(dialer) => dialer.connect(),
            None => Err(Unknown::new("this side has no backup to connect to")),
        }),
        witness: Box::new(move |need| match &mut witness {
            Some(witness) => witness.ask(need),
            None => Said::Unknown { reason: "there is no witness".into() },
        }),
        fence: Box::new(move |need| {
            let down = need.question().and_then(|(lineage, question)| match question {
                Question::Fence { .. } => fencer.fence(lineage, question),
                _ => Err(Unknown::new("not a question to a fence")),
            });
            match down {
                Ok(()) => Said::Down,
                Err(why) => Said::Unknown { reason: why.to_string() },
            }
        }),
    })
}

/// Fences the other side.
struct Fencer {
    registry_root: Option<PathBuf>,
    place: Place,
    /// This program, with its global options.
    own: Vec<PathBuf>,
    fence: Option<fence::Uri>,
    peer: Side,
}

impl Fencer {
    fn fence(&self, lineage: Lineage, question: Question) -> Result<(), Unknown> {
        let Some(fence) = &self.fence else { return Err(Unknown::new("there is no fence")) };
        let term = question.term();
        self.note(Uuid(lineage.0), term.0)?;
        fence.bring_down(&self.own, lineage, term, self.peer)
    }

    /// Note first that this side fences: then it cannot be fenced itself.
    fn note(&self, lineage: Uuid, term: u64) -> Result<(), Unknown> {
        let registry = crate::registry::Registry::open(self.registry_root.as_deref())
            .map_err(|e| Unknown::new(format!("{e:#}")))?;
        let _lock = lock_marks(&self.place).map_err(|e| Unknown::new(e.to_string()))?;
        begin(&marks(&registry, &self.place), lineage, term)
    }
}
