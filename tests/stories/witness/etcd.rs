//! Three members of Debian's etcd, of which some die, and one that answers too late.
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use replication::{Answer, Incarnation, Lineage, Party, Question, Record, Side, Term, Word};
use stories::debian::output;
use stories::monitor::SOON;
use stories::replicated::etcd::{Cluster, debian, in_memory};

use crate::rig::Asker;

const GUEST: Lineage = Lineage(7);

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
    let through = late(cluster.port(0).context("no member")?)?;
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
    let member = cluster.port(0).context("no member")?;
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
