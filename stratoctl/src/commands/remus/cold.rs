//! A start from disks that belong to a guest which was protected: the other side may have it. Their
//! sidecars say so, and the monitor refuses such disks; here the witness or the fence is asked
//! first, and what a backup had not written to its images yet is taken from its journal.
use std::{
    collections::VecDeque,
    env,
    fs::File,
    io,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use lineage::{Entry, Images, ImagesError, JournalFile, Mark, Permission, Side};
use replication::{
    Agreement, Answer as Decided, Arbiter, Digest, Exit, Identity, Incarnation, Input, OnLoss,
    Output, Question, Rules, Settings, Settled, Term,
};
use rustix::fs::{FlockOperation, fcntl_lock};
use serde::{Deserialize, Serialize};

use super::super::Context;
use crate::{
    configuration,
    failure::Failure,
    registry::{self, Description, Place},
    remus::{
        Unknown, fence,
        protection::Protection,
        uuid::Uuid,
        wire::{Need, SettledText},
        witness::Asked,
    },
};

/// How long the witness or the fence may take.
const LIMIT: Duration = Duration::from_secs(40);
/// How long until it is asked again.
const AGAIN: Duration = Duration::from_millis(500);

/// The process of this host that a term is claimed for: asked for again after a lost answer, it is
/// the same.
#[derive(Serialize, Deserialize)]
struct Claim {
    term: u64,
    incarnation: Uuid,
}

/// Make sure that the guest of these disks may run here.
///
/// # Errors
/// It may run elsewhere, or nobody says that it does not. With `force`, only disks that have no
/// contents of a guest are refused.
pub fn permit(
    ctx: &Context,
    place: &Place,
    description: &Description,
    force: bool,
) -> anyhow::Result<()> {
    let paths = writable(description);
    let images = match images(&paths) {
        Ok(images) => images,
        // The monitor says what is wrong with the image itself.
        Err(_) if paths.iter().any(|path| !path.exists()) => return Ok(()),
        Err(e) => return Err(e.into()),
    };
    let permission = match force {
        true => images.permission_by_force(),
        false => images.permission(),
    };
    let permission = permission.map_err(|e| match e {
        ImagesError::Refused { image, denial, .. } if !force => {
            let what = format!("{}: {denial}", image.display());
            let hint = format!(
                "start the guest on its other host, and protect it from there; or, if it certainly \
                 does not run there and never will, `stratoctl start --force {}`",
                place.name
            );
            Failure::hint(what, hint).into()
        }
        other => anyhow::Error::from(other),
    })?;
    let Some(entry) = images.entry().cloned() else { return Ok(()) };
    match permission {
        Permission::Run { term, promoted: Some(winner) } => {
            // That this is so is noted where the primary of the term before looks for it.
            settle(place, &entry, term, winner);
            Ok(())
        }
        Permission::Run { term, .. } if force => {
            let _locks = replayed(&paths, &entry)?;
            Ok(images.bind(&Entry { mark: Mark::Running { term, promoted: None }, ..entry })?)
        }
        Permission::Unbound | Permission::Run { .. } => Ok(()),
        Permission::Claim(entry) => {
            let _locks = replayed(&paths, &entry)?;
            claim(ctx, place, &images, &entry)
        }
    }
}

/// The guest that the disks of a domain belong to, once they were protected.
///
/// # Errors
/// Their sidecars cannot be read, or they belong to different guests.
pub fn lineage(description: &Description) -> anyhow::Result<Option<Uuid>> {
    let images = images(&writable(description))?;
    Ok(images.entry().map(|entry| Uuid(entry.lineage.0)))
}

/// The term that the disks of the domain at `place` were protected in when its monitor ended.
pub fn open_term(place: &Place) -> Option<Term> {
    let images = images(&writable(&place.description().ok()?)).ok()?;
    match images.entry()?.mark {
        Mark::Protected(bond) | Mark::Fencing(bond) => Some(bond.term),
        _ => None,
    }
}

fn images(paths: &[PathBuf]) -> Result<Images, ImagesError> {
    Images::read(paths.iter().map(PathBuf::as_path))
}

/// The images that the guest can write to.
fn writable(description: &Description) -> Vec<PathBuf> {
    let drives = description.config.get("drive").and_then(serde_json::Value::as_array);
    let writable = drives
        .into_iter()
        .flatten()
        .filter(|drive| drive.get("read_only").and_then(serde_json::Value::as_bool) != Some(true));
    writable.filter_map(|drive| Some(drive.get("path_on_host")?.as_str()?.into())).collect()
}

/// Bring the images up to the last epoch in their journal, if that is of this term. They are locked
/// until the files are closed.
fn replayed(paths: &[PathBuf], entry: &Entry) -> anyhow::Result<Vec<File>> {
    let mut images = Vec::new();
    for path in paths {
        let cannot = || format!("cannot open {}", path.display());
        let image = File::options().read(true).write(true).open(path).with_context(cannot)?;
        // As a monitor locks it.
        fcntl_lock(&image, FlockOperation::NonBlockingLockExclusive).map_err(|e| {
            let what = format!("{} is in use ({e})", path.display());
            Failure::hint(what, "a monitor of the same guest may be its backup: `stratoctl list`")
        })?;
        images.push(image);
    }
    let (Mark::Protected(bond) | Mark::Fencing(bond)) = entry.mark else { return Ok(images) };
    if bond.side == Side::Backup
        && let Some(journal) = journal(paths)?
    {
        let failed = || format!("the journal {}", journal.display());
        let mut journal =
            JournalFile::open(&journal, entry.lineage, bond.term).with_context(failed)?;
        if journal.term() == bond.term {
            journal.settle(&images).with_context(failed)?;
        }
    }
    Ok(images)
}

/// The journal of these images, beside the first of them.
fn journal(paths: &[PathBuf]) -> io::Result<Option<PathBuf>> {
    for path in paths {
        let journal = JournalFile::beside(path)?;
        if journal.exists() {
            return Ok(Some(journal));
        }
    }
    Ok(None)
}

/// Win the term, or be refused.
fn claim(ctx: &Context, place: &Place, images: &Images, entry: &Entry) -> anyhow::Result<()> {
    let (Mark::Protected(bond) | Mark::Fencing(bond)) = entry.mark else { return Ok(()) };
    let protection = Protection::of(place)?.with_context(|| {
        format!(
            "'{0}' was protected with {1}, of which its record says nothing; if the guest certainly \
             does not run on the other host and never will, `stratoctl start --force {0}`",
            place.name, entry.arbiter
        )
    })?;
    let mut asked = Asker::new(ctx, place, &protection, entry, bond.side)?;
    // Its monitor has ended, so its number can be used once more.
    let incarnation = match protection.incarnation {
        Some(own) => Incarnation(own.0),
        None => incarnation(ctx, place, bond.term)?,
    };
    let me = Identity { lineage: entry.lineage, incarnation };
    let settings = settings(asked.arbiter);
    let (mut start, outputs) = replication::Start::new(me, entry.mark, settings, Rules::ALL);
    let (began, mut outputs) = (Instant::now(), VecDeque::from(outputs));
    let mut last = String::new();
    loop {
        let input = match outputs.pop_front() {
            Some(Output::Mark(mark)) => {
                images.bind(&Entry { mark, ..entry.clone() })?;
                Input::Marked(mark)
            }
            Some(Output::Ask { nonce, question }) => match asked.ask(entry, question) {
                Ok(answer) => Input::Answered { nonce, question, answer },
                Err(why) => {
                    last = why.to_string();
                    continue;
                }
            },
            Some(Output::Run { .. }) => return Ok(()),
            Some(Output::Exit(Exit::Refused(denial))) => {
                let what = format!("'{}': {denial}", place.name);
                let hint = format!(
                    "start the guest on its other host; or, if it certainly does not run there and \
                     never will, `stratoctl start --force {}`",
                    place.name
                );
                return Err(Failure::hint(what, hint).into());
            }
            Some(_) => continue,
            None if began.elapsed() >= LIMIT => {
                let what = format!(
                    "'{}' was protected, and {} does not say whether its guest runs on the other \
                     host: {last}",
                    place.name, entry.arbiter
                );
                let hint = format!(
                    "try again; or, if it certainly does not run there and never will, `stratoctl \
                     start --force {}`",
                    place.name
                );
                return Err(Failure::hint(what, hint).into());
            }
            None => {
                thread::sleep(AGAIN);
                Input::Tick
            }
        };
        outputs.extend(start.step(began.elapsed(), input));
    }
}

/// The process that the term is claimed for.
fn incarnation(ctx: &Context, place: &Place, term: Term) -> anyhow::Result<Incarnation> {
    let path = place.home.join("claim.json");
    if let Ok(known) = registry::read::<Claim>(&path)
        && known.term == term.0
    {
        return Ok(Incarnation(known.incarnation.0));
    }
    let incarnation: Uuid = configuration::uuid()?.parse().context("a new UUID")?;
    let claim = Claim { term: term.0, incarnation };
    registry::write(ctx.registry.disk(), &path, &claim).context("cannot note the claim")?;
    Ok(Incarnation(incarnation.0))
}

/// A start needs nothing of them but who decides.
fn settings(arbiter: Arbiter) -> Settings {
    Settings {
        agreement: Agreement { arbiter, machine: Digest(0) },
        timeout: Duration::from_secs(1),
        period: Duration::from_millis(200),
        ack_limit: Duration::from_secs(10),
        on_loss: OnLoss::Claim,
        leave_slow: false,
    }
}

/// Asks the witness or the fence that the sidecars name.
struct Asker {
    arbiter: Arbiter,
    witness: Option<Asked>,
    fence: Option<fence::Uri>,
    own: Vec<PathBuf>,
    peer: Side,
}

impl Asker {
    fn new(
        ctx: &Context,
        place: &Place,
        protection: &Protection,
        entry: &Entry,
        side: Side,
    ) -> anyhow::Result<Self> {
        let program = env::current_exe().context("the path of this program")?;
        let here = match (&protection.identity, protection.arbitrating_fence()?) {
            (Some(identity), _) => format!("witness {identity}"),
            (None, Some(kind)) => format!("fence {kind}"),
            (None, None) => "nobody".to_owned(),
        };
        if here != entry.arbiter {
            anyhow::bail!(
                "'{}' was protected with {}, and its record says {here}",
                place.name,
                entry.arbiter
            );
        }
        let witness = protection.witness().map_err(Failure::new)?;
        let witness =
            witness.map(|uri| Asked::new(uri, protection.identity.clone(), program.clone()));
        let mut own = vec![program];
        if let Some(root) = &ctx.root {
            own.extend(["--root".into(), std::path::absolute(root)?]);
        }
        let arbiter = match witness {
            Some(_) => Arbiter::Witness(Digest(0)),
            None => Arbiter::Fence(Digest(0)),
        };
        let peer = match side {
            Side::Primary => Side::Backup,
            Side::Backup => Side::Primary,
        };
        let fence = protection.fence().map_err(Failure::new)?;
        Ok(Self { arbiter, witness, fence, own, peer })
    }

    fn ask(&mut self, entry: &Entry, question: Question) -> Result<Decided, Unknown> {
        let lineage = Uuid(entry.lineage.0);
        let need = match question {
            Question::Fence { term } => {
                let fence = self.fence.as_ref().ok_or(Unknown::new("there is no fence"))?;
                fence.bring_down(&self.own, entry.lineage, term, self.peer)?;
                return Ok(Decided::Down);
            }
            Question::Look { term } => Need::Look { lineage, term: term.0 },
            Question::Claim { term, word, party } => Need::Claim {
                lineage,
                term: term.0,
                word: word.into(),
                side: party.side.into(),
                incarnation: Uuid(party.incarnation.0),
            },
            Question::Settle { term, winner, to } => {
                let (to, yielded_to) = match to {
                    Settled::Running => (SettledText::Running, None),
                    Settled::Yielded { to } => (SettledText::Yielded, Some(Uuid(to.0))),
                };
                Need::Settle { lineage, term: term.0, winner: Uuid(winner.0), to, yielded_to }
            }
        };
        let witness = self.witness.as_mut().ok_or(Unknown::new("there is no witness"))?;
        witness.ask(&need).try_into()
    }
}

/// Note at the witness that the guest runs here, where that can be done; its former primary waits
/// for it.
fn settle(place: &Place, entry: &Entry, term: Term, winner: Incarnation) {
    let Ok(Some(Protection { identity, witness: Some(uri), .. })) = Protection::of(place) else {
        return;
    };
    let (Ok(uri), Ok(program), Some(closed)) =
        (uri.parse(), env::current_exe(), term.0.checked_sub(1))
    else {
        return;
    };
    let (lineage, winner) = (Uuid(entry.lineage.0), Uuid(winner.0));
    let to = SettledText::Running;
    let need = Need::Settle { lineage, term: closed, winner, to, yielded_to: None };
    // It can be done later, too: the guest is this side's.
    let _ = Asked::new(uri, identity, program).ask(&need);
}
