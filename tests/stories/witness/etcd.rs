//! Three members of Debian's etcd, of which some die, and one that answers too late.
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use replication::{Answer, Incarnation, Lineage, Party, Question, Record, Side, Term, Word};
use serde_json::{Value, json};
use stories::debian::{Debian, output};
use stories::monitor::SOON;

use crate::rig::{Asker, in_memory, paths};

const GUEST: Lineage = Lineage(7);

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
    pub fn start(name: &str, members: usize) -> Result<Self> {
        let this = Self::run_all(name, members, None)?;
        this.elected()?;
        Ok(this)
    }

    /// With the certificates in `tls`, if given, for both ends of every connection of a client.
    fn run_all(name: &str, members: usize, tls: Option<&Path>) -> Result<Self> {
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
            command.arg("--data-dir").arg(this.dir.join(format!("m{at}")));
            this.members.push(Member { port: *port, command, child: None });
            this.run(at)?;
        }
        Ok(this)
    }

    /// Starts a member, which may have run before.
    fn run(&mut self, at: usize) -> Result<()> {
        let log =
            File::options().create(true).append(true).open(self.dir.join(format!("{at}.log")))?;
        let member = self.members.get_mut(at).context("no such member")?;
        let command = member.command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        member.child = Some(command.spawn().context("cannot run etcd")?);
        Ok(())
    }

    fn kill(&mut self, at: usize) -> Result<()> {
        if let Some(mut child) = self.members.get_mut(at).and_then(|member| member.child.take()) {
            child.kill()?;
            child.wait()?;
        }
        Ok(())
    }

    /// As a witness, the members in this order.
    fn uri_of(&self, members: &[usize]) -> String {
        let members = members.iter().filter_map(|at| self.members.get(*at));
        let urls: Vec<_> =
            members.map(|member| format!("http://127.0.0.1:{}", member.port)).collect();
        format!("etcd:{}", urls.join(","))
    }

    pub fn uri(&self) -> String {
        self.uri_of(&(0..self.members.len()).collect::<Vec<_>>())
    }

    /// Waits until there is a leader; which member it is.
    fn elected(&self) -> Result<usize> {
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
fn debian() -> Result<Debian> {
    let paths = paths()?;
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

fn party(number: u128) -> Party {
    Party { side: Side::Primary, incarnation: Incarnation(number) }
}

fn claim(term: u64, number: u128) -> Question {
    Question::Claim { term: Term(term), word: Word::Solo, party: party(number) }
}

fn won(number: u128) -> Answer {
    Answer::Record(Some(Record { word: Word::Solo, winner: party(number), settled: None }))
}

/// Asks until there is an answer, as a monitor does.
fn insist(asker: &mut Asker, question: Question) -> Result<(Answer, Duration)> {
    let begin = Instant::now();
    loop {
        match asker.ask(GUEST, question) {
            Ok(answer) => return Ok((answer, begin.elapsed())),
            Err(e) if begin.elapsed() > SOON => return Err(e),
            Err(_) => thread::sleep(Duration::from_millis(100)),
        }
    }
}

#[test]
fn members_may_die_and_no_claim_is_lost_or_granted_twice() -> Result<()> {
    let mut cluster = Cluster::start("dying", 3)?;
    let uri = cluster.uri();
    let identity = Asker::new(&uri, None)?.identify()?;
    let (mut a, mut b) = (Asker::new(&uri, Some(&identity))?, Asker::new(&uri, Some(&identity))?);
    ensure!(a.ask(GUEST, claim(1, 1))? == won(1));
    ensure!(b.ask(GUEST, claim(1, 2))? == won(1));

    // One that does not lead: the others answer.
    let leader = cluster.elected()?;
    let follower = (leader + 1) % 3;
    cluster.kill(follower)?;
    let (answer, follower_took) = insist(&mut a, claim(2, 1))?;
    ensure!(answer == won(1) && insist(&mut b, claim(2, 2))?.0 == won(1));
    cluster.run(follower)?;
    cluster.elected()?;

    // The leader, while claims are on their way.
    let leader = cluster.elected()?;
    b.send(&crate::rig::line(GUEST, claim(3, 2)).to_string())?;
    cluster.kill(leader)?;
    let (by_a, leader_took) = insist(&mut a, claim(3, 1))?;
    let _ = b.receive()?;
    let by_b = insist(&mut b, claim(3, 2))?.0;
    ensure!(by_a == by_b, "a leader's death has split a term: {by_a:?}, {by_b:?}");

    // Two of three: nobody is granted anything.
    let second = cluster.elected()?;
    cluster.kill(second)?;
    for (asker, number) in [(&mut a, 1), (&mut b, 2)] {
        let answer = asker.ask(GUEST, claim(4, number));
        ensure!(answer.is_err(), "granted without a quorum: {answer:?}");
    }
    cluster.run(second)?;
    cluster.elected()?;
    let (by_a, by_b) = (insist(&mut a, claim(4, 1))?.0, insist(&mut b, claim(4, 2))?.0);
    ensure!(by_a == by_b, "a late claim has split a term: {by_a:?}, {by_b:?}");
    ensure!(a.ask(GUEST, claim(1, 2))? == won(1), "an old record has changed");
    println!(
        "a claim took {follower_took:?} after a follower's death, {leader_took:?} after the leader's"
    );
    Ok(())
}

/// Passes what it is sent to a member, and the answers only after the time-out.
fn late(to: u16) -> Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let Ok(member) = TcpStream::connect(("127.0.0.1", to)) else { continue };
            let (Ok(mut from), Ok(mut on)) = (client.try_clone(), member.try_clone()) else {
                continue;
            };
            thread::spawn(move || std::io::copy(&mut from, &mut on));
            thread::spawn(move || {
                let (mut member, mut client) = (member, client);
                let mut chunk = [0; 4096];
                while let Ok(length @ 1..) = member.read(&mut chunk) {
                    thread::sleep(Duration::from_millis(1500));
                    if client.write_all(chunk.get(..length).unwrap_or_default()).is_err() {
                        return;
                    }
                }
            });
        }
    });
    Ok(port)
}

#[test]
fn a_claim_whose_answer_was_late_is_the_claimants() -> Result<()> {
    let cluster = Cluster::start("late", 3)?;
    let through = late(cluster.members[0].port)?;
    let direct = cluster.uri_of(&[1]);
    let slow = format!("etcd:http://127.0.0.1:{through}");
    // At another member it reads its own value.
    let both = format!("{slow},{}", direct.trim_start_matches("etcd:"));
    let mut asker = Asker::new(&both, None)?;
    let begin = Instant::now();
    ensure!(asker.ask(GUEST, claim(1, 1))? == won(1));
    ensure!(begin.elapsed() >= Duration::from_secs(1), "it was answered by the late member");
    // Where there is no other member, nothing is known, but the term may be won; and it is.
    let mut alone = Asker::new(&slow, None)?;
    let said = alone.ask(GUEST, claim(2, 1));
    ensure!(said.is_err(), "{said:?}");
    ensure!(Asker::new(&direct, None)?.ask(GUEST, claim(2, 2))? == won(1));
    Ok(())
}

/// What openssl reads.
const OPENSSL: &str = "[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:TRUE
[end]
subjectAltName = IP:127.0.0.1
";

/// Certificates for both ends, by one authority, in `dir`.
fn certificates(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    fs::write(dir.join("openssl.cnf"), OPENSSL)?;
    let debian = debian()?;
    for who in ["ca", "server", "client"] {
        let mut make = debian.program("usr/bin/openssl")?;
        make.current_dir(dir).env("OPENSSL_CONF", "openssl.cnf").args(["req", "-x509", "-nodes"]);
        make.args(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-days", "2"]);
        make.args(["-subj", &format!("/CN={who}"), "-config", "openssl.cnf"]);
        make.args(["-keyout", &format!("{who}-key.pem"), "-out", &format!("{who}-cert.pem")]);
        match who {
            "ca" => make.args(["-extensions", "authority"]),
            _ => make.args(["-extensions", "end", "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem"]),
        };
        output(&mut make)?;
    }
    Ok(())
}

#[test]
fn with_tls_both_ends_have_to_show_a_certificate() -> Result<()> {
    let dir = in_memory("certificates")?;
    let (right, wrong) = (dir.join("right"), dir.join("wrong"));
    certificates(&right)?;
    certificates(&wrong)?;
    let cluster = Cluster::run_all("tls", 1, Some(&right))?;
    let member = cluster.members[0].port;
    let with = |tls: &Path| format!("etcd:https://127.0.0.1:{member},tls={}", tls.display());
    let mut asker = Asker::new(&with(&right), None)?;
    ensure!(insist(&mut asker, claim(1, 1))?.0 == won(1));
    // Certificates of another authority; none at all; and a key that does not belong to them.
    ensure!(Asker::new(&with(&wrong), None)?.ask(GUEST, claim(2, 2)).is_err());
    let none = dir.join("none");
    fs::create_dir_all(&none)?;
    fs::copy(right.join("ca-cert.pem"), none.join("ca-cert.pem"))?;
    ensure!(Asker::new(&with(&none), None)?.ask(GUEST, claim(2, 2)).is_err());
    fs::copy(wrong.join("client-key.pem"), none.join("client-key.pem"))?;
    fs::copy(right.join("client-cert.pem"), none.join("client-cert.pem"))?;
    let said = Asker::new(&with(&none), None)?.ask(GUEST, claim(2, 2));
    ensure!(said.is_err_and(|e| e.to_string().contains("client-key.pem")));
    ensure!(asker.ask(GUEST, Question::Look { term: Term(2) })? == Answer::Record(None));
    Ok(fs::remove_dir_all(dir)?)
}

#[test]
fn another_cluster_is_another_witness() -> Result<()> {
    let (one, other) = (Cluster::start("one", 1)?, Cluster::start("other", 1)?);
    let identity = Asker::new(&one.uri(), None)?.identify()?;
    ensure!(Asker::new(&other.uri(), None)?.identify()? != identity);
    let prefixed = format!("{},prefix=/elsewhere/", one.uri());
    ensure!(Asker::new(&prefixed, None)?.identify()? != identity);
    match Asker::new(&other.uri(), Some(&identity))?.ask(GUEST, claim(1, 1)) {
        Err(e) if e.to_string().contains("another one") => Ok(()),
        other => bail!("{other:?}"),
    }
}
