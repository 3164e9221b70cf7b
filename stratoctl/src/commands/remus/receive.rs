//! `remus-receive`: the backup's side. It makes a domain whose monitor waits for a primary, and
//! passes on what its connection carries. A primary that connects again finds the same domain.
use std::{
    fs::File,
    io::{self, Read, Write},
    net::{Ipv4Addr, Ipv6Addr, Shutdown, TcpListener, TcpStream},
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::Context as _;
use rustls::ServerConfig;
use serde_json::json;

use super::{
    super::{Answer, Context, end, lifecycle, restore::text},
    agent::revive,
    backup_name,
    leave::is_backup,
    migrate::arrived,
    protect::{absolute, identify},
    unlocked,
};
use crate::{
    configuration, domain,
    failure::Failure,
    matrix::{State, Verb},
    monitor::{self, More},
    registry::{Description, Lock, Name, Place},
    remus::{
        beats,
        bounded::wait,
        dial::{Greeting, Welcome, read_line, write_line},
        protection::Protection,
        tls::Encrypted,
        uuid::Uuid,
        wire::SideText,
    },
    verbs::{MovedDisk, RemusReceive},
};

/// The monitor's socket for its primary, in its directory.
const SOCKET: &str = "replica.sock";
/// How long the sender may take to introduce itself.
const GREETING_LIMIT: Duration = Duration::from_secs(10);
/// How often it is checked whether a domain that waits for connections has ended.
const CHECK: Duration = Duration::from_secs(1);

pub fn receive(ctx: &Context, args: &RemusReceive) -> anyhow::Result<Answer> {
    match args.port {
        Some(port) => listen(ctx, args, port),
        None => {
            // Not through the buffers of this process: what follows the first line is the monitors'.
            let own =
                |fd: io::Result<OwnedFd>| fd.map(File::from).context("standard input and output");
            let input = own(io::stdin().as_fd().try_clone_to_owned())?;
            let output = own(io::stdout().as_fd().try_clone_to_owned())?;
            let (place, only_made) = welcome(ctx, args, &input, &output)?;
            if only_made {
                return Ok(Answer::silent());
            }
            let socket = connect(&place.run)?;
            // The other thread may never get input; it ends with this process.
            let carried = relay(input, output, &socket);
            // The sender has ended, perhaps because the guest is here now.
            if arrived(ctx, &place)? {
                return Ok(Answer::silent());
            }
            carried.map(|()| Answer::silent())
        }
    }
}

/// Wait for a primary at a port of this host, and for the same one again while its backup exists.
fn listen(ctx: &Context, args: &RemusReceive, port: u16) -> anyhow::Result<Answer> {
    let cannot = || format!("cannot listen on port {port}");
    let tls = args.tls.as_deref().map(transport::server).transpose()?;
    let listener = match &tls {
        Some(_) => TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
            .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))),
        // What is not encrypted must not come from other hosts: ssh forwards ports.
        None => TcpListener::bind((Ipv4Addr::LOCALHOST, port)),
    };
    let listener = listener.with_context(cannot)?;
    let address = listener.local_addr().with_context(cannot)?;
    listener.set_nonblocking(true).with_context(cannot)?;
    say(format_args!("Waiting on port {} of {}", address.port(), address.ip()));
    let mut domain: Option<(Name, u32)> = None;
    loop {
        if let Some((name, id)) = &domain {
            let place = ctx.place_of(*id)?;
            let ended = place.is_none();
            let runs = match &place {
                Some(place) if !waits(place) => arrived(ctx, place)? || args.no_wait,
                _ => false,
            };
            if ended || runs {
                let what = if ended { "has ended" } else { "runs" };
                let json = json!({ "name": name, "ended": ended });
                return Ok(Answer::new(format!("'{name}' {what}"), json));
            }
        }
        if !wait(&[listener.as_fd()], CHECK).with_context(cannot)? {
            continue;
        }
        let Ok((stream, from)) = listener.accept() else { continue };
        let passed = take_in(ctx, args, stream, tls.as_ref());
        match passed.with_context(|| format!("a connection from {from}")) {
            Ok(place) => domain = place.id().map(|id| (place.name, id)),
            Err(e) => say(format_args!("stratoctl: {e:#}")),
        }
    }
}

/// Print a line to standard error. Its reader may have ended.
fn say(line: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Whether a domain's monitor still waits for its primary, as far as can be found out.
fn waits(place: &Place) -> bool {
    domain::qmp(place).is_ok_and(|mut client| is_backup(&mut client).unwrap_or(true))
}

/// Exchange the first lines, and hand the connection to the monitor of the domain, which is
/// returned.
fn take_in(
    ctx: &Context,
    args: &RemusReceive,
    stream: TcpStream,
    tls: Option<&Arc<ServerConfig>>,
) -> anyhow::Result<Place> {
    stream.set_nonblocking(false)?;
    let (place, only_made) = match tls {
        None => welcome(ctx, args, &stream, &stream)?,
        Some(config) => {
            let mut session = Encrypted::server(&stream, config.clone())?;
            let greeting = session.receive(GREETING_LIMIT).context("the sender's first line")?;
            let (made, welcome) = answered(ctx, args, greeting);
            session.send(&welcome).context("the sender does not listen")?;
            session.end().context("the sender does not end its greeting")?;
            made?
        }
    };
    if only_made {
        return Ok(place);
    }
    let mut client = domain::qmp(&place)?;
    let name = "primary";
    client.execute_with_fds("getfd", json!({ "fdname": name }), &[stream.as_fd()])?;
    let connected = json!({ "nonce": 0, "need": "connect", "result": "connected", "fd": name });
    client.execute_raw("replication-answer", connected)?;
    Ok(place)
}

/// Exchange the first lines; the domain, and whether it was only to be made.
fn welcome<T>(
    ctx: &Context,
    args: &RemusReceive,
    mut input: &T,
    mut output: &T,
) -> anyhow::Result<(Place, bool)>
where
    T: AsFd,
    for<'a> &'a T: Read + Write,
{
    let greeting: Greeting =
        read_line(&mut input, GREETING_LIMIT).context("the sender's first line")?;
    let (made, welcome) = answered(ctx, args, greeting);
    let said = write_line(&mut output, &welcome);
    let made = made?;
    said.context("the sender does not listen")?;
    Ok(made)
}

/// The domain for which a greeting has come, whether it was only to be made, and the answer.
fn answered(
    ctx: &Context,
    args: &RemusReceive,
    greeting: Greeting,
) -> (anyhow::Result<(Place, bool)>, Welcome) {
    let made = greeting.check().map_err(anyhow::Error::from).and_then(|greeting| {
        let name = args.name.clone().unwrap_or_else(|| greeting.name.clone());
        let make = greeting.make;
        receiver(ctx, args, &name, greeting).map(|place| (place, make))
    });
    let error = made.as_ref().err().map(|e| format!("{e:#}"));
    (made, Welcome { error })
}

/// The domain that receives, which may exist.
fn receiver(
    ctx: &Context,
    args: &RemusReceive,
    name: &Name,
    greeting: Greeting,
) -> anyhow::Result<Place> {
    let lineage: Uuid = match greeting.lineage {
        Some(lineage) => lineage,
        None => greeting.domain.uuid.parse().context("the domain's UUID")?,
    };
    // The primary may have been renamed since it was here last.
    if let Some(place) = ctx.backup_of(lineage)? {
        revive(ctx, &place)?;
        return Ok(place);
    }
    if !greeting.make {
        let what = format!("there is no backup of '{}' here any more", greeting.name);
        let hint =
            format!("`stratoctl remus {} HOST` where the domain is makes one", greeting.name);
        return Err(Failure::hint(what, hint).into());
    }
    let identity = args.witness.as_ref().map(identify).transpose()?;
    if identity != greeting.witness {
        let show =
            |identity: &Option<String>| identity.clone().unwrap_or_else(|| "none".to_owned());
        let what = format!(
            "the two sides have different witnesses: {} there, {} here",
            show(&greeting.witness),
            show(&identity)
        );
        return Err(Failure::hint(what, "give both the same --witness").into());
    }
    let protection = Protection {
        witness: args.witness.as_ref().map(ToString::to_string),
        identity,
        fence: args.fence.as_ref().map(ToString::to_string),
        moves: greeting.moves,
        shares_disks: greeting.shares_disks,
        ..Protection::new(SideText::Backup, lineage)
    };
    let place = make(ctx, name, &greeting.domain, &protection, (args.tls.as_deref(), &args.disk))?;
    if let Some(address) = &args.heartbeat_path {
        let listened = beats::listen(address)
            .and_then(|socket| beats::hand_over(&mut domain::qmp(&place)?, &socket));
        if let Err(e) = listened {
            end(ctx, &mut unlocked(place.clone(), domain::query(&ctx.registry, &place)))?;
            return Err(e);
        }
    }
    Ok(place)
}

fn connect(run: &Path) -> anyhow::Result<UnixStream> {
    crate::dial::dial(run, Path::new(SOCKET)).context("the backup's monitor does not listen")
}

/// Make the backup of the domain at `place` on this host; the socket that its monitor listens at.
///
/// # Errors
/// It does not start, or there is a domain of that name.
pub fn beside(
    ctx: &Context,
    place: &Place,
    primary: &Protection,
    disks: &[MovedDisk],
) -> anyhow::Result<PathBuf> {
    let name = backup_name(&place.name)?;
    let mut description = lifecycle::described(place)?;
    // Of its own: what belongs to a domain is found by its UUID, and removed with it.
    description.uuid = configuration::uuid()?;
    let (side, dial) = (SideText::Backup, None);
    let protection = Protection { side, dial, incarnation: None, ..primary.clone() };
    let disks =
        if primary.shares_disks { disks.to_vec() } else { beside_those(&description, disks) };
    let backup = make(ctx, &name, &description, &protection, (None, &disks))?;
    Ok(backup.run.join(SOCKET))
}

/// The images of a backup on the same host: those that are named, else `IMAGE.backup` beside each.
fn beside_those(description: &Description, named: &[MovedDisk]) -> Vec<MovedDisk> {
    let drives = description.config.get("drive").and_then(serde_json::Value::as_array);
    let text = |drive: &serde_json::Value, key| Some(drive.get(key)?.as_str()?.to_owned());
    let mut disks = named.to_vec();
    for drive in drives.into_iter().flatten() {
        if let (Some(id), Some(path)) = (text(drive, "drive_id"), text(drive, "path_on_host"))
            && drive.get("read_only").and_then(serde_json::Value::as_bool) != Some(true)
            && !named.iter().any(|disk| disk.id == id)
        {
            disks.push(MovedDisk { id, path: format!("{path}.backup").into(), raw: true });
        }
    }
    disks
}

/// End what [`beside`] has made, unless it has become the domain itself meanwhile.
///
/// # Errors
/// It cannot be ended.
pub fn undo(ctx: &Context, place: &Place, lineage: Uuid) -> anyhow::Result<()> {
    let name = backup_name(&place.name)?;
    let _lock = ctx.registry.lock(&name)?;
    let (Some(backup), mut status) = ctx.query(&name) else { return Ok(()) };
    let ours = Protection::of(&backup)?
        .is_some_and(|known| known.side == SideText::Backup && known.lineage == lineage);
    let waits = match &mut status.client {
        Some(client) => is_backup(client)?,
        None => true,
    };
    match ours && waits {
        true => end(ctx, &mut unlocked(backup, status)),
        false => Ok(()),
    }
}

/// Make a domain whose monitor waits for its primary.
fn make(
    ctx: &Context,
    name: &Name,
    description: &Description,
    protection: &Protection,
    (tls, disks): (Option<&Path>, &[MovedDisk]),
) -> anyhow::Result<Place> {
    let (_lock, place) = match ctx.take_back(name, protection.lineage)? {
        Some(back) => back,
        None => (ctx.take(Verb::Restore, name)?, ctx.registry.add(name, false, description)?),
    };
    let mut source = format!("replicate:unix:{SOCKET}");
    if let Some(identity) = &protection.identity {
        source.push_str(&format!(",witness={identity}"));
    }
    if let Some(fence) = protection.arbitrating_fence()? {
        source.push_str(&format!(",fence={fence}"));
    }
    if let Some(directory) = tls {
        source.push_str(&format!(",tls={}", absolute(directory).display()));
    }
    let mut more = More { words: vec!["-incoming".into(), source], reads: None };
    for MovedDisk { id, path, .. } in disks {
        let path = std::path::absolute(path).context("--disk")?;
        more.words.extend(["-drive".into(), format!("id={id},file={}", text(&path)?)]);
    }
    let (registry, program) = (&ctx.registry, &ctx.program);
    let made = protection
        .record(registry, &place)
        .context("cannot record the protection")
        .and_then(|()| monitor::start(registry, program, &place, description, false, &more))
        .and_then(|_| identified(ctx, &place, protection))
        .and_then(|()| revive(ctx, &place));
    if let Err(e) = made {
        let status = domain::query(registry, &place);
        end(ctx, &mut unlocked(place, status)).context("after a failed start")?;
        return Err(e);
    }
    Ok(place)
}

/// Record what the witness will know the backup by, if its monitor says so.
fn identified(ctx: &Context, place: &Place, protection: &Protection) -> anyhow::Result<()> {
    let said = domain::query(&ctx.registry, place).replication;
    let own = said.and_then(|said| said.incarnation?.parse().ok());
    let known = Protection { incarnation: own, ..protection.clone() };
    known.record(&ctx.registry, place).context("cannot record the protection")
}

/// Whether a domain has no monitor.
fn is_gone(state: State) -> bool {
    matches!(state, State::Absent | State::Registered | State::Killed | State::Moved)
}

impl Context {
    /// The registered domain called `name`, if its guest has moved away and is to come back: what is
    /// protected now has the same lineage.
    fn take_back(&self, name: &Name, lineage: Uuid) -> anyhow::Result<Option<(Lock, Place)>> {
        if self.registry.find(name).is_none() {
            return Ok(None);
        }
        let lock = self.registry.lock(name)?;
        let (Some(place), status) = self.query(name) else { return Ok(None) };
        let known = Protection::of(&place)?.is_some_and(|known| known.lineage == lineage);
        if !(place.managed && known && is_gone(status.state)) {
            return Ok(None);
        }
        self.registry.clear(&place)?;
        Ok(Some((lock, place)))
    }

    /// The backup in this registry that belongs to `lineage`.
    fn backup_of(&self, lineage: Uuid) -> anyhow::Result<Option<Place>> {
        let places = self.registry.names()?;
        let mut places = places.iter().filter_map(|name| self.registry.find(name));
        Ok(places.find(|place| {
            let known = Protection::of(place).ok().flatten();
            known.is_some_and(|known| known.side == SideText::Backup && known.lineage == lineage)
                && !is_gone(domain::query(&self.registry, place).state)
        }))
    }
}

/// Carry bytes both ways until the monitor hangs up.
fn relay(mut input: File, mut output: File, socket: &UnixStream) -> anyhow::Result<()> {
    let mut to = socket.try_clone()?;
    thread::Builder::new().name("input".into()).spawn(move || {
        // An error is an end, too: the monitor sees that.
        let _ = io::copy(&mut Plain(&mut input), &mut to);
        let _ = to.shutdown(Shutdown::Write);
    })?;
    let copied = io::copy(&mut Plain(&mut &*socket), &mut output);
    copied.map(|_| ()).context("the connection to the sender")
}

/// Something to be read by read(2) only. Left to itself, [`io::copy`] calls splice(2), and that keeps
/// a pipe locked while it waits for a socket: what is in the pipe already cannot be read then.
struct Plain<R>(R);

impl<R: Read> Read for Plain<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read(buf)
    }
}
