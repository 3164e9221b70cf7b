//! Debian's etcd, as a witness that its members may lose, or remember only in part.
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::debian::Debian;
use crate::monitor::SOON;
use crate::paths::Paths;

/// Members of one cluster, on this host, in memory.
pub struct Cluster {
    dir: PathBuf,
    members: Vec<Member>,
}

struct Member {
    port: u16,
    command: Command,
    child: Option<Child>,
}

impl Cluster {
    /// Starts as many members, which have a leader then. `name` is that of their directory.
    ///
    /// # Errors
    /// They cannot be started.
    pub fn start(name: &str, members: usize) -> Result<Self> {
        let this = Self::run_all(name, members, None)?;
        this.elected()?;
        Ok(this)
    }

    /// The same, with the certificates in `tls`, if given, for both ends of every connection of a client.
    /// It may have no leader yet.
    ///
    /// # Errors
    /// They cannot be started.
    pub fn run_all(name: &str, members: usize, tls: Option<&Path>) -> Result<Self> {
        let debian = debian()?;
        let dir = in_memory(&format!("etcd-{name}"))?;
        // The ports are free now; nobody else on this host takes them in that moment.
        let listeners: Vec<_> =
            (0..2 * members).map(|_| TcpListener::bind("127.0.0.1:0")).collect::<Result<_, _>>()?;
        let ports: Vec<_> = listeners
            .iter()
            .map(|listener| Ok(listener.local_addr()?.port()))
            .collect::<Result<_>>()?;
        drop(listeners);
        let (clients, peers) = ports.split_at(members);
        let scheme = if tls.is_some() { "https" } else { "http" };
        let client_url = |port: &u16| format!("{scheme}://127.0.0.1:{port}");
        let url = |port: &u16| format!("http://127.0.0.1:{port}");
        let all: Vec<_> =
            peers.iter().enumerate().map(|(at, port)| format!("m{at}={}", url(port))).collect();
        let mut this = Self { dir, members: Vec::new() };
        for (at, (port, peer)) in clients.iter().zip(peers).enumerate() {
            let mut command = debian.program("usr/bin/etcd")?;
            command.args(["--name", &format!("m{at}"), "--initial-cluster", &all.join(",")]);
            command.args(["--listen-client-urls", &client_url(port)]);
            command.args(["--advertise-client-urls", &client_url(port)]);
            command.args(["--listen-peer-urls", &url(peer)]);
            command.args(["--initial-advertise-peer-urls", &url(peer)]);
            command.args(["--heartbeat-interval", "50", "--election-timeout", "500"]);
            if let Some(tls) = tls {
                command
                    .arg("--client-cert-auth")
                    .arg("--trusted-ca-file")
                    .arg(tls.join("ca-cert.pem"));
                command.arg("--cert-file").arg(tls.join("server-cert.pem"));
                command.arg("--key-file").arg(tls.join("server-key.pem"));
            }
            command.arg("--data-dir").arg(this.data(at));
            this.members.push(Member { port: *port, command, child: None });
            this.run(at)?;
        }
        Ok(this)
    }

    /// Starts a member, which may have run before.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn run(&mut self, at: usize) -> Result<()> {
        let log =
            File::options().create(true).append(true).open(self.dir.join(format!("{at}.log")))?;
        let member = self.members.get_mut(at).context("no such member")?;
        let command = member.command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        member.child = Some(command.spawn().context("cannot run etcd")?);
        Ok(())
    }

    /// Kills a member.
    ///
    /// # Errors
    /// It is not this process's any more.
    pub fn kill(&mut self, at: usize) -> Result<()> {
        if let Some(mut child) = self.members.get_mut(at).and_then(|member| member.child.take()) {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// As a witness, the members in this order.
    #[must_use]
    pub fn uri_of(&self, members: &[usize]) -> String {
        let members = members.iter().filter_map(|at| self.members.get(*at));
        let urls: Vec<_> =
            members.map(|member| format!("http://127.0.0.1:{}", member.port)).collect();
        format!("etcd:{}", urls.join(","))
    }

    /// As a witness, with all members.
    #[must_use]
    pub fn uri(&self) -> String {
        self.uri_of(&(0..self.members.len()).collect::<Vec<_>>())
    }

    /// The port of a member for clients.
    #[must_use]
    pub fn port(&self, at: usize) -> Option<u16> {
        self.members.get(at).map(|member| member.port)
    }

    /// Where a member keeps what it knows.
    #[must_use]
    pub fn data(&self, at: usize) -> PathBuf {
        self.dir.join(format!("m{at}"))
    }

    /// Waits until there is a leader; which member it is.
    ///
    /// # Errors
    /// There is none in time.
    pub fn elected(&self) -> Result<usize> {
        let deadline = Instant::now() + SOON;
        loop {
            for (at, member) in self.members.iter().enumerate() {
                let status = post(member.port, "/v3/maintenance/status", &json!({}));
                let own = |status: &Value| {
                    let leader = status.get("leader").filter(|leader| leader.is_string());
                    leader.is_some() && leader == status.pointer("/header/member_id")
                };
                if status.is_ok_and(|status| own(&status)) {
                    return Ok(at);
                }
            }
            ensure!(Instant::now() < deadline, "no leader is elected: see {}", self.dir.display());
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// The packages, fetched first if they are not there.
///
/// # Errors
/// They cannot be fetched.
pub fn debian() -> Result<Debian> {
    let paths = Paths::of_this_host()?;
    let _lock = paths.lock()?;
    Debian::get(&paths).context("there is no etcd, so this test cannot be run")
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for at in 0..self.members.len() {
            let _ = self.kill(at);
        }
        if !thread::panicking() {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

/// A request to one member.
fn post(port: u16, path: &str, body: &Value) -> Result<Value> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let body = body.to_string();
    write!(stream, "POST {path} HTTP/1.0\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
    let mut reply = String::new();
    stream.read_to_string(&mut reply)?;
    let (_, body) = reply.split_once("\r\n\r\n").context("no body")?;
    Ok(serde_json::from_str(body)?)
}

/// An empty directory in memory: what is tested is order, and not how long a disk takes.
///
/// # Errors
/// It cannot be made.
pub fn in_memory(name: &str) -> Result<PathBuf> {
    let dir = Path::new("/dev/shm").join(format!("witness-{name}-{}", std::process::id()));
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    Ok(dir)
}
