//! Both ends of a connection over each kind of descriptors; and peers that cut it, are slow, send
//! garbage, or have the wrong certificates.
use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::{fd::AsFd, unix::net::UnixStream},
    path::Path,
};

use rcgen::KeyPair;
use rustix::event::poll;

use super::{testing::Authority, *};

/// What a test lets wait to be sent.
const LIMIT: usize = 100_000;

fn as_client(directory: &Path) -> Role {
    Role::Client(client(directory).unwrap(), "localhost".try_into().unwrap())
}

fn as_server(directory: &Path) -> Role {
    Role::Server(server(directory).unwrap())
}

fn tls(descriptors: Descriptors, role: Role) -> Link {
    Link::tls(descriptors, role, Instant::now()).unwrap()
}

fn sockets() -> [Descriptors; 2] {
    let (near, far) = UnixStream::pair().unwrap();
    [near, far].map(|socket| Descriptors::socket(socket.into()).unwrap())
}

fn tcp() -> [Descriptors; 2] {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let far = listener.accept().unwrap().0;
    [near, far].map(|socket| Descriptors::socket(socket.into()).unwrap())
}

fn pipes() -> [Descriptors; 2] {
    let (there, back) = (std::io::pipe().unwrap(), std::io::pipe().unwrap());
    [
        Descriptors::pipes(back.0.into(), there.1.into()).unwrap(),
        Descriptors::pipes(there.0.into(), back.1.into()).unwrap(),
    ]
}

/// Wait until one of them can do something, or its time is over.
fn wait(links: &[&Link]) {
    let mut fds: Vec<_> = links.iter().flat_map(|link| link.interest()).collect();
    let limit = rustix::time::Timespec { tv_sec: 10, tv_nsec: 0 };
    assert!(poll(&mut fds, Some(&limit)).unwrap() > 0, "nothing happens any more");
}

/// What both ends have to send, sent and received in turns.
fn exchange(links: &mut [Link; 2], data: &[Vec<u8>; 2]) {
    let (mut sent, mut received) = ([0, 0], [Vec::new(), Vec::new()]);
    let mut step = 1;
    while received[0] != data[1] || received[1] != data[0] {
        for (number, link) in links.iter_mut().enumerate() {
            step = step * 7 % 65_537;
            let rest = &data[number][sent[number]..];
            let room = LIMIT.saturating_sub(link.queued());
            let part = &rest[..rest.len().min(step).min(room)];
            link.send(part.to_vec());
            sent[number] += part.len();
            link.flush().unwrap();
            link.receive(Instant::now(), &mut received[number]).unwrap();
        }
        assert!(data[1].starts_with(&received[0]) && data[0].starts_with(&received[1]));
        if links.iter().zip(&data[..]).zip(sent).all(|((_, data), sent)| sent == data.len())
            && (received[0] != data[1] || received[1] != data[0])
        {
            wait(&[&links[0], &links[1]]);
        }
    }
}

fn data(bytes: usize) -> [Vec<u8>; 2] {
    let mut random = fastrand::Rng::with_seed(3);
    [bytes, bytes / 2].map(|bytes| (0..bytes).map(|_| random.u8(..)).collect())
}

#[test]
fn what_is_sent_arrives_over_all_kinds_of_descriptors_with_and_without_tls() {
    let authority = Authority::generate();
    let directory = authority.directory(&authority);
    for kind in [sockets, tcp, pipes] {
        let mut links = kind().map(|ends| Link::plain(ends, false).unwrap());
        exchange(&mut links, &data(3 << 20));
        let [near, mut far] = links;
        assert!(near.is_ready() && near.subject().is_none() && near.deadline().is_none());
        near.close();
        assert!(matches!(far.receive(Instant::now(), &mut Vec::new()), Err(LinkError::Closed)));
        assert!(far.is_closed());

        let [near, far] = kind();
        let roles = (as_client(directory.path()), as_server(directory.path()));
        let mut links = [tls(near, roles.0), tls(far, roles.1)];
        assert!(!links[0].is_ready() && links[0].subject().is_none());
        exchange(&mut links, &data(3 << 20));
        assert_eq!(links[0].subject().unwrap(), "CN=the server");
        assert_eq!(links[1].subject().unwrap(), "CN=the client");
        assert!(links.iter().all(|link| link.is_ready() && link.deadline().is_none()));
        let [near, mut far] = links;
        near.close();
        wait(&[&far]);
        assert!(matches!(far.receive(Instant::now(), &mut Vec::new()), Err(LinkError::Closed)));
    }
}

/// Let both act until one of them has failed, and what comes after that; what they received.
fn until_failure(links: &mut [Link; 2]) -> ([Option<LinkError>; 2], [Vec<u8>; 2]) {
    let (mut errors, mut received) = ([None, None], [Vec::new(), Vec::new()]);
    for _ in 0..200 {
        for (number, link) in links.iter_mut().enumerate() {
            if errors[number].is_none() {
                let now = Instant::now();
                let result = link.flush().and_then(|()| link.receive(now, &mut received[number]));
                errors[number] = result.err();
            }
        }
        std::thread::sleep(Duration::from_millis(1));
        if errors.iter().all(Option::is_some) {
            break;
        }
    }
    (errors, received)
}

#[test]
fn a_certificate_of_another_authority_is_refused_at_either_side() {
    let (ours, theirs) = (Authority::generate(), Authority::generate());
    let right = ours.directory(&ours);
    // Signed by another authority, and trusting ours: only we can find out.
    let stranger = theirs.directory(&ours);
    let [near, far] = sockets();
    let mut links = [tls(near, as_client(stranger.path())), tls(far, as_server(right.path()))];
    links[0].send(b"secret".to_vec());
    let (errors, received) = until_failure(&mut links);
    assert!(matches!(&errors[1], Some(LinkError::Tls(_))), "{errors:?}");
    assert!(
        matches!(&errors[0], Some(LinkError::Tls(rustls::Error::AlertReceived(_)))),
        "{errors:?}"
    );
    assert!(received[1].is_empty(), "nothing of a stranger is believed");
    let [near, far] = sockets();
    let mut links = [tls(near, as_client(right.path())), tls(far, as_server(stranger.path()))];
    links[0].send(b"secret".to_vec());
    let (errors, received) = until_failure(&mut links);
    assert!(
        matches!(&errors[0], Some(LinkError::Tls(rustls::Error::InvalidCertificate(_)))),
        "{errors:?}"
    );
    assert!(received[1].is_empty(), "nothing is said to a stranger");
    // The right authority, and another host's name.
    let [near, far] = sockets();
    let other = Role::Client(client(right.path()).unwrap(), "elsewhere".try_into().unwrap());
    let (errors, _) = until_failure(&mut [tls(near, other), tls(far, as_server(right.path()))]);
    assert!(matches!(&errors[0], Some(LinkError::Tls(_))), "{errors:?}");
}

#[test]
fn garbage_ends_in_an_error_and_a_silent_peer_in_time() {
    let authority = Authority::generate();
    let directory = authority.directory(&authority);
    let mut random = fastrand::Rng::with_seed(5);
    for round in 0..60 {
        let (mut peer, end) = UnixStream::pair().unwrap();
        let end = Descriptors::socket(end.into()).unwrap();
        let role = if round % 2 == 0 { as_client } else { as_server };
        let mut link = tls(end, role(directory.path()));
        let mut garbage: Vec<u8> = (0..random.usize(1..5000)).map(|_| random.u8(..)).collect();
        if round % 3 == 0 {
            // Looks like a record of a handshake that is long.
            garbage.splice(0..0, [22, 3, 3, 0x3f, 0xff, 2, 0xff, 0xff, 0xff]);
        }
        let late = Instant::now() + HANDSHAKE;
        peer.write_all(&garbage).unwrap();
        let mut into = Vec::new();
        let error = link.receive(late, &mut into).unwrap_err();
        assert!(matches!(error, LinkError::Tls(_) | LinkError::Handshake), "{error:?}");
        assert!(into.is_empty() && link.is_closed());
        assert!(link.subject().is_none());
    }
    // One that says nothing, or sends its greeting byte by byte.
    let [near, far] = sockets();
    let mut link = tls(far, as_server(directory.path()));
    let deadline = link.deadline().unwrap();
    assert_eq!(link.receive(deadline - Duration::from_millis(1), &mut Vec::new()).unwrap(), 0);
    assert!(matches!(link.receive(deadline, &mut Vec::new()), Err(LinkError::Handshake)));
    drop(near);
    let [near, mut relay] = sockets();
    let mut slow = tls(near, as_client(directory.path()));
    slow.flush().unwrap();
    let mut greeting = Vec::with_capacity(5000);
    relay.try_read(&mut greeting).unwrap().unwrap();
    let [mut peer, far] = sockets();
    let mut link = tls(far, as_server(directory.path()));
    let deadline = link.deadline().unwrap();
    for (at, byte) in greeting[..100].iter().enumerate() {
        peer.try_write(&[*byte]).unwrap().unwrap();
        let now = deadline - Duration::from_millis(100) + Duration::from_millis(at as u64);
        assert_eq!(link.receive(now, &mut Vec::new()).unwrap(), 0);
    }
    assert!(matches!(link.receive(deadline, &mut Vec::new()), Err(LinkError::Handshake)));
}

#[test]
fn a_connection_that_is_cut_anywhere_ends_and_gives_no_more_than_was_sent() {
    let authority = Authority::generate();
    let directory = authority.directory(&authority);
    let message = data(5000)[0].clone();
    let mut complete = 0;
    for cut in (0..12_000).step_by(331) {
        // From the client to the server through a relay that stops after `cut` bytes.
        let [near, mut from_near] = sockets();
        let [mut to_far, far] = sockets();
        let mut links =
            [tls(near, as_client(directory.path())), tls(far, as_server(directory.path()))];
        links[0].send(message.clone());
        let (mut passed, mut received) = (0, Vec::new());
        let mut error = None;
        for _ in 0..20 {
            let _ =
                links[0].flush().and_then(|()| links[0].receive(Instant::now(), &mut Vec::new()));
            let mut there = Vec::with_capacity(20_000);
            let _ = from_near.try_read(&mut there);
            there.truncate(cut - passed);
            passed += there.len();
            to_far.try_write(&there).unwrap();
            error = error.or(links[1].receive(Instant::now(), &mut received).err());
            let mut back = Vec::with_capacity(20_000);
            let _ = to_far.try_read(&mut back);
            from_near.try_write(&back).unwrap();
        }
        assert!(error.is_none());
        drop((to_far, from_near));
        let [mut near, mut far] = links;
        let end = far.receive(Instant::now(), &mut received);
        assert!(matches!(end, Err(LinkError::Closed)), "{cut}: {end:?}");
        assert!(near.receive(Instant::now(), &mut Vec::new()).is_err());
        assert!(received.is_empty() || received == message);
        complete += usize::from(received == message);
    }
    assert!((1..30).contains(&complete), "{complete}");
}

#[test]
fn what_a_peer_does_not_read_waits_and_is_counted() {
    let authority = Authority::generate();
    let directory = authority.directory(&authority);
    let [near, far] = sockets();
    let mut ready = [tls(near, as_client(directory.path())), tls(far, as_server(directory.path()))];
    exchange(&mut ready, &data(1000));
    let [mut link, silent] = ready;
    let mut plain = sockets().map(|ends| Link::plain(ends, false).unwrap());
    for link in [&mut link, &mut plain[0]] {
        let mut accepted = 0;
        while link.queued() < LIMIT {
            link.send(vec![7; 10_000]);
            accepted += 10_000;
            link.flush().unwrap();
            assert!(accepted < 10 << 20, "a socket's buffer is smaller");
        }
        let kept = accepted - LIMIT as u64;
        assert!(link.queued() < LIMIT + 10_000 && !link.is_flushed());
        assert!((kept - (64 << 10)..kept + 2 * 10_000).contains(&link.written()));
        assert_eq!(link.interest().count(), 1);
    }
    drop(silent);
    assert!(matches!(link.flush(), Err(LinkError::Closed)));
}

#[test]
fn without_tls_the_peer_is_on_this_host() {
    let hosts = ["127.0.0.1", "127.8.9.1", "::1", "::ffff:127.0.0.1"];
    for host in hosts {
        check_host(Some(host.parse().unwrap()), false).unwrap();
    }
    for host in ["192.0.2.1", "::ffff:192.0.2.1", "2001:db8::1", "0.0.0.0"] {
        let refused = check_host(Some(host.parse().unwrap()), false);
        assert!(matches!(refused, Err(LinkError::NotLocal(_))), "{host}");
        check_host(Some(host.parse().unwrap()), true).unwrap();
    }
    assert!(tcp()[0].host().unwrap().is_loopback());
    assert!(sockets()[0].host().is_none() && pipes()[0].host().is_none());
}

#[test]
fn files_that_are_no_certificates_are_named() {
    let authority = Authority::generate();
    let spoil = |name: &str, contents: Option<&[u8]>| {
        let directory = authority.directory(&authority);
        let path = directory.path().join(name);
        match contents {
            Some(contents) => std::fs::write(&path, contents).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        let error = server(directory.path()).unwrap_err();
        assert!(error.to_string().contains(directory.path().to_str().unwrap()), "{error}");
        error
    };
    assert!(matches!(spoil("ca-cert.pem", None), CertificateError::Read { .. }));
    assert!(matches!(spoil("server-cert.pem", Some(b"")), CertificateError::NoCertificate(_)));
    assert!(matches!(spoil("server-key.pem", Some(b"key")), CertificateError::NoKey(_)));
    let long = vec![b'a'; 2 << 20];
    assert!(matches!(spoil("server-key.pem", Some(&long)), CertificateError::TooLong(_)));
    let other = KeyPair::generate().unwrap().serialize_pem();
    assert!(matches!(
        spoil("server-key.pem", Some(other.as_bytes())),
        CertificateError::Use { .. }
    ));
    // The other role's files are not needed.
    let directory = authority.directory(&authority);
    std::fs::remove_file(directory.path().join("client-key.pem")).unwrap();
    server(directory.path()).unwrap();
    assert!(client(directory.path()).is_err());
}

#[test]
fn a_descriptor_that_others_share_is_as_before() {
    use rustix::fs::{OFlags, fcntl_getfl};
    let (near, far) = UnixStream::pair().unwrap();
    let shared = near.try_clone().unwrap();
    let link = Link::plain(Descriptors::socket(near.into()).unwrap(), false).unwrap();
    assert!(fcntl_getfl(&shared).unwrap().contains(OFlags::NONBLOCK));
    drop(link);
    assert!(!fcntl_getfl(&shared).unwrap().contains(OFlags::NONBLOCK));
    drop(shared);
    assert_eq!((&far).read(&mut [0]).unwrap(), 0);
}

#[test]
fn the_last_words_of_a_peer_are_heard_although_nothing_can_be_sent_to_it() {
    let (near, far) = UnixStream::pair().unwrap();
    let mut link = Link::plain(Descriptors::socket(near.into()).unwrap(), false).unwrap();
    link.send(b"unread".to_vec());
    link.flush().unwrap();
    (&far).write_all(b"bye").unwrap();
    drop(far);
    link.send(b"more".to_vec());
    assert!(matches!(link.flush(), Err(LinkError::Closed)));
    let mut heard = Vec::new();
    assert_eq!(link.receive(Instant::now(), &mut heard).unwrap(), 3);
    assert_eq!(heard, b"bye");
    assert!(link.receive(Instant::now(), &mut heard).is_err());
}

#[test]
fn the_kernel_says_which_process_the_peer_is() {
    let (near, _far) = UnixStream::pair().unwrap();
    let me = peer::process(&near).unwrap();
    assert_eq!(me.pid.map(i32::cast_unsigned), Some(std::process::id()));
    assert_eq!(me.uid, rustix::process::geteuid().as_raw());
    let pidfd = peer::pidfd(&near).unwrap();
    let mut fds = [PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&rustix::time::Timespec::default())).unwrap(), 0, "it lives");
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    assert!(peer::pidfd(listener.as_fd()).is_err());
}
