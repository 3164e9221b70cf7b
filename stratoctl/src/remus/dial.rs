//! Connections from a primary to its backup.
//!
//! A socket leads to a monitor that listens there. A TCP port and a command lead to `stratoctl
//! remus-receive`, which first has to make a domain: both sides exchange a line of JSON each, a
//! [`Greeting`] and a [`Welcome`]. What follows is between the two monitors.
use std::{
    fmt,
    fs::File,
    io::{self, Read, Write},
    net::{TcpStream, ToSocketAddrs},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{net::UnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use state::regular_file::open_regular;

use super::{Unknown, bounded::wait, protection::Protection, tls::Encrypted, uuid::Uuid};
use crate::registry::{Description, Name};

/// How long it may take to connect.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);
/// How long the other side may take to make a domain, and a user to be asked for nothing.
const WELCOME_LIMIT: Duration = Duration::from_secs(30);
/// Longest line of either side, in bytes: a configuration has at most 256 KiB.
pub const MAX_LINE: usize = 1 << 20;
/// Version of the two lines.
const VERSION: u32 = 1;

/// How a primary reaches its backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Dial {
    /// The socket of a monitor that listens.
    Unix(PathBuf),
    /// A host and port where `remus-receive -p` listens.
    Tcp(String, u16),
    /// The same with TLS, and the directory with the certificates.
    Tls(String, u16, PathBuf),
    /// A line for the shell that leads to `remus-receive`, on its standard input and output.
    Command(String),
}

/// The first line, from the primary's side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Greeting {
    /// Of this format.
    pub version: u32,
    /// Name of the domain.
    pub name: Name,
    /// Its description.
    pub domain: Description,
    /// The identity of its witness.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub witness: Option<String>,
    /// The domain is to be handed over, and not to be protected then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub moves: bool,
    /// Make the backup, if there is none, and hang up. Otherwise what follows is for the backup that is
    /// there: one that was destroyed is not made again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub make: bool,
    /// What it writes to its disks is not replicated.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shares_disks: bool,
    /// What the witness knows it by, if that is not its UUID.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lineage: Option<Uuid>,
}

impl Greeting {
    /// For a domain with this protection.
    pub fn new(name: Name, domain: Description, protection: &Protection) -> Self {
        let Protection { ref identity, moves, shares_disks, lineage, .. } = *protection;
        let (witness, lineage) = (identity.clone(), Some(lineage));
        Self { version: VERSION, name, domain, witness, moves, make: false, shares_disks, lineage }
    }

    /// Check what was received.
    ///
    /// # Errors
    /// It has another version.
    pub fn check(self) -> Result<Self, Unknown> {
        match self.version {
            VERSION => Ok(self),
            other => Err(Unknown::new(format!(
                "the sender's stratoctl speaks version {other}, this one {VERSION}"
            ))),
        }
    }
}

/// The answer, from the backup's side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// Why there is no backup; absent if a monitor listens now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Welcome {
    /// Check what was received.
    fn check(self) -> Result<(), Unknown> {
        let Some(error) = self.error else { return Ok(()) };
        // It comes from another host, and may be shown on a terminal.
        let error: String = error.chars().filter(|c| !c.is_control()).take(500).collect();
        Err(Unknown::new(format!("the backup's stratoctl: {error}")))
    }
}

/// Connects to one backup, again and again.
pub struct Dialer {
    dial: Dial,
    greeting: Greeting,
    /// Where commands write their errors.
    log: PathBuf,
    /// Commands that lead to backups; each ends with its connection.
    commands: Vec<Child>,
}

impl Dialer {
    /// For `dial`; commands append their errors to the file `log`.
    pub fn new(dial: Dial, greeting: Greeting, log: PathBuf) -> Self {
        Self { dial, greeting, log, commands: Vec::new() }
    }

    /// Have the backup made on its host, if there is none there. That may take longer than the
    /// primary's monitor waits for an answer, and says why it cannot be made.
    ///
    /// # Errors
    /// There is no connection, or no backup.
    pub fn make(&mut self) -> Result<(), Unknown> {
        if matches!(self.dial, Dial::Unix(_)) {
            return Ok(());
        }
        self.greeting.make = true;
        let made = self.connect();
        self.greeting.make = false;
        made.map(drop)
    }

    /// A connection to the backup's monitor.
    ///
    /// # Errors
    /// There is none.
    pub fn connect(&mut self) -> Result<OwnedFd, Unknown> {
        self.commands.retain_mut(|child| !matches!(child.try_wait(), Ok(Some(_))));
        match &self.dial {
            Dial::Unix(path) => {
                let failed = |e| Unknown::new(format!("cannot connect to {}: {e}", path.display()));
                crate::dial::dial("/".as_ref(), path).map(OwnedFd::from).map_err(failed)
            }
            Dial::Tcp(host, port) => {
                let failed = |e| Unknown::new(format!("cannot connect to {host}:{port}: {e}"));
                let mut stream = tcp(host, *port).map_err(failed)?;
                stream.set_write_timeout(Some(CONNECT_LIMIT)).map_err(failed)?;
                greet(&mut stream, &self.greeting)?;
                stream.set_write_timeout(None).map_err(failed)?;
                Ok(stream.into())
            }
            Dial::Tls(host, port, directory) => {
                let failed = |e: &dyn fmt::Display| {
                    Unknown::new(format!("cannot connect to {host}:{port}: {e}"))
                };
                let stream = tcp(host, *port).map_err(|e| failed(&e))?;
                let mut session = Encrypted::client(&stream, directory, host)
                    .map_err(|e| failed(&format_args!("{e:#}")))?;
                session.send(&self.greeting).map_err(|e| failed(&e))?;
                session.receive(WELCOME_LIMIT).map_err(|e| failed(&e)).and_then(Welcome::check)?;
                session.end().map_err(|e| failed(&e))?;
                Ok(stream.into())
            }
            Dial::Command(line) => {
                let failed = |e| Unknown::new(format!("cannot run '{line}': {e}"));
                let (mut child, mut stream) = command(line, &self.log).map_err(failed)?;
                stream.set_write_timeout(Some(CONNECT_LIMIT)).map_err(failed)?;
                let greeted = greet(&mut stream, &self.greeting);
                if greeted.is_err() {
                    let _ = child.kill();
                }
                self.commands.push(child);
                greeted.map_err(|e| Unknown::new(format!("'{line}': {e}")))?;
                stream.set_write_timeout(None).map_err(failed)?;
                Ok(stream.into())
            }
        }
    }
}

fn tcp(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "it has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT_LIMIT) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                return Ok(stream);
            }
            Err(e) => last = e,
        }
    }
    Err(last)
}

/// A command whose standard input and output are both the other end of a socket.
fn command(line: &str, log: &Path) -> io::Result<(Child, UnixStream)> {
    let (own, theirs) = UnixStream::pair()?;
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", line]).process_group(0);
    shell.stdin(OwnedFd::from(theirs.try_clone()?)).stdout(OwnedFd::from(theirs));
    let log = open_regular(log, File::options().append(true));
    let child = shell.stderr(log.map_or_else(|_| Stdio::null(), Stdio::from)).spawn()?;
    Ok((child, own))
}

/// Exchange the two lines.
fn greet(stream: &mut (impl Read + Write + AsFd), greeting: &Greeting) -> Result<(), Unknown> {
    let failed = |e: io::Error| Unknown::new(format!("the backup's stratoctl: {e}"));
    write_line(stream, greeting).map_err(failed)?;
    let welcome: Welcome = read_line(stream, WELCOME_LIMIT).map_err(failed)?;
    welcome.check()
}

/// Write `value` as one line.
///
/// # Errors
/// The other side does not read it.
pub fn write_line(to: &mut impl Write, value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    to.write_all(&line)?;
    to.flush()
}

/// Read one line, and not a byte more: what follows is for somebody else.
///
/// # Errors
/// It does not come within `limit`, is too long, or is not what is expected.
pub fn read_line<T: DeserializeOwned>(
    from: &mut (impl Read + AsFd),
    limit: Duration,
) -> io::Result<T> {
    let deadline = Instant::now() + limit;
    let mut line = Vec::new();
    let mut byte = [0; 1];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if !wait(&[from.as_fd()], left)? {
            if left.is_zero() {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("nothing was received within {limit:?}"),
                ));
            }
            continue;
        }
        match from.read(&mut byte)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            _ if byte == *b"\n" => break,
            _ => line.extend(byte),
        }
        if line.len() > MAX_LINE {
            return Err(io::Error::other("a line is too long"));
        }
    }
    serde_json::from_slice(&line).map_err(io::Error::from)
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread};

    use serde_json::{Value, json};
    use transport::testing::Authority;

    use super::*;
    use crate::{policy::Policy, remus::wire::SideText};

    fn greeting() -> Greeting {
        let domain = Description {
            uuid: "00000000-0000-0000-0000-000000000007".into(),
            vcpus: 1,
            memory: 1 << 20,
            policy: Policy::default(),
            config: json!({}),
        };
        let protection = Protection::new(SideText::Primary, Uuid(7));
        Greeting::new("web".parse().unwrap(), domain, &protection)
    }

    fn exchanged(dial: Dial) -> Result<String, Unknown> {
        let mut dialer = Dialer::new(dial, greeting(), "/dev/null".into());
        let mut stream = File::from(dialer.connect()?);
        stream.write_all(b"frames\n").unwrap();
        let mut said = String::new();
        io::BufReader::new(stream).take(100).read_to_string(&mut said).unwrap();
        Ok(said)
    }

    #[test]
    fn a_command_is_greeted_and_gets_what_follows() {
        let script = "read -r greeting; echo '{}'; read -r frames; echo got $frames";
        assert_eq!(exchanged(Dial::Command(script.into())).as_deref(), Ok("got frames\n"));
        for (script, says) in [
            ("read -r x; echo '{\"error\": \"no room\\u001b[2J\"}'", "no room[2J"),
            ("read -r x; echo welcome", "expected"),
            ("exit 3", "stratoctl"),
            ("head -c 2000000 /dev/zero | tr '\\0' x", "too long"),
        ] {
            let said = exchanged(Dial::Command(script.into())).unwrap_err().to_string();
            assert!(said.contains(says) && !said.contains('\x1b'), "{script}: {said}");
        }
    }

    #[test]
    fn a_port_is_greeted_and_a_socket_is_not() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let peer = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let heard: Greeting = read_line(&mut stream, Duration::from_secs(60)).unwrap();
            assert_eq!(heard.check(), Ok(greeting()));
            write_line(&mut stream, &Welcome { error: None }).unwrap();
            let mut frames = [0; 7];
            stream.read_exact(&mut frames).unwrap();
            stream.write_all(b"got ").unwrap();
            stream.write_all(&frames).unwrap();
        });
        let said = exchanged(Dial::Tcp("127.0.0.1".into(), port));
        assert_eq!(said.as_deref(), Ok("got frames\n"));
        peer.join().unwrap();
        assert!(exchanged(Dial::Tcp("127.0.0.1".into(), port)).is_err(), "nobody listens");

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("replica.sock");
        assert!(exchanged(Dial::Unix(path.clone())).is_err(), "nobody listens");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let peer = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut frames = [0; 7];
            stream.read_exact(&mut frames).unwrap();
            stream.write_all(&frames).unwrap();
        });
        assert_eq!(exchanged(Dial::Unix(path)).as_deref(), Ok("frames\n"));
        peer.join().unwrap();
    }

    #[test]
    fn over_tls_the_greeting_is_encrypted_and_the_connection_is_free_afterwards() {
        let (ours, theirs) = (Authority::generate(), Authority::generate());
        let (own, stranger) = (ours.directory(&ours), theirs.directory(&ours));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let config = transport::server(own.path()).unwrap();
        let peer = thread::spawn(move || {
            for error in [None, Some("no room".to_owned())] {
                let (mut stream, _) = listener.accept().unwrap();
                let mut session = Encrypted::server(&stream, config.clone()).unwrap();
                let heard: Greeting = session.receive(Duration::from_secs(60)).unwrap();
                assert_eq!(heard, greeting());
                let refused = error.is_some();
                session.send(&Welcome { error }).unwrap();
                if !refused {
                    session.end().unwrap();
                    let mut frames = [0; 7];
                    stream.read_exact(&mut frames).unwrap();
                    stream.write_all(&frames).unwrap();
                }
            }
            let (stream, _) = listener.accept().unwrap();
            assert!(Encrypted::server(&stream, config).is_err(), "its certificate is not ours");
        });
        let dial = |directory: &Path| Dial::Tls("localhost".into(), port, directory.into());
        assert_eq!(exchanged(dial(own.path())).as_deref(), Ok("frames\n"));
        let said = exchanged(dial(own.path())).unwrap_err().to_string();
        assert!(said.contains("no room"), "{said}");
        let said = exchanged(dial(stranger.path())).unwrap_err().to_string();
        assert!(said.contains(&format!("localhost:{port}")), "{said}");
        peer.join().unwrap();
    }

    #[test]
    fn a_greeting_of_another_version_is_refused() {
        let mut text = serde_json::to_value(greeting()).unwrap();
        text["version"] = Value::from(2);
        let other: Greeting = serde_json::from_value(text).unwrap();
        assert!(other.check().unwrap_err().to_string().contains("version 2"));
    }
}
