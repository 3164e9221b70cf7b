//! The second path for signs of life: datagrams beside the connection, which may take another way
//! through the network. They only keep the other side from being suspected.
//!
//! ```text
//! "beat"  term u64  sender u128  number u64  MAC of these (BLAKE3, 32 bytes)
//! ```
//! The key is made by the primary and travels in its offer, over the connection. The number rises with
//! each datagram, so none counts twice, and none that was overtaken; and its sender has to be the
//! process that the term binds. So who does not know the key can at most drop datagrams, or hold them
//! back for a while: even that only delays a suspicion, and decides nothing.
use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use qmp::Error;
use replication::{Incarnation, Status, Term};
use rustix::{
    event::{PollFd, PollFlags},
    fs::{OFlags, fcntl_getfl, fcntl_setfl},
    io::Errno,
    net::{
        RecvFlags, SendFlags, SocketAddrAny, SocketType, getpeername, recvfrom, sendto,
        sockopt::socket_type,
    },
};
use serde::{Deserialize, Serialize};

const MAGIC: [u8; 4] = *b"beat";
/// What is authenticated.
const HEAD: usize = 4 + 8 + 16 + 8;
const LENGTH: usize = HEAD + 32;
/// Most datagrams that are read at a time: signs of life are rarer.
const MOST: usize = 64;

/// What authenticates the datagrams of one protection.
#[derive(Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Key([u8; 32]);

impl Key {
    /// One that nobody knows.
    ///
    /// # Errors
    /// When the host has no random numbers.
    pub fn new() -> io::Result<Self> {
        let mut key = [0; 32];
        let filled = rustix::rand::getrandom(&mut key, rustix::rand::GetRandomFlags::empty())?;
        match filled == key.len() {
            true => Ok(Self(key)),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key")
    }
}

impl From<Key> for String {
    fn from(key: Key) -> Self {
        blake3::Hash::from_bytes(key.0).to_hex().to_string()
    }
}

impl TryFrom<String> for Key {
    type Error = blake3::HexError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        blake3::Hash::from_hex(text).map(|hash| Self(hash.into()))
    }
}

/// A socket for datagrams, which does not block.
pub struct Socket {
    fd: OwnedFd,
    /// It has one peer, to which it sends.
    pub is_connected: bool,
}

impl Socket {
    /// That of an agent.
    ///
    /// # Errors
    /// It is no such socket.
    pub fn new(fd: OwnedFd) -> Result<Self, Error> {
        let wrong = |e: Errno| {
            Error::text(format!("Invalid parameter 'fd': must be a socket for datagrams: {e}"))
        };
        if socket_type(&fd).map_err(wrong)? != SocketType::DGRAM {
            return Err(wrong(Errno::PROTOTYPE));
        }
        let flags = fcntl_getfl(&fd).map_err(wrong)?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(wrong)?;
        let is_connected = getpeername(&fd).is_ok();
        Ok(Self { fd, is_connected })
    }
}

/// One end of the path.
pub struct Beside {
    me: Incarnation,
    key: Option<Key>,
    socket: Option<Socket>,
    /// Where an unconnected socket sends to: from where the last valid datagram came.
    to: Option<SocketAddrAny>,
    /// Of the last datagram that was sent.
    sent: u64,
    /// Of the last one that counted.
    last: (Term, Option<Incarnation>, u64),
    /// How many have counted.
    heard: u64,
}

impl Beside {
    /// One without a socket, and without a key.
    pub fn new(me: Incarnation) -> Self {
        let last = (Term(0), None, 0);
        Self { me, key: None, socket: None, to: None, sent: 0, last, heard: 0 }
    }

    /// Use this socket from now on.
    pub fn set_socket(&mut self, socket: Socket) {
        (self.socket, self.to) = (Some(socket), None);
    }

    /// Use this key from now on.
    pub fn set_key(&mut self, key: Option<Key>) {
        self.key = key;
    }

    /// How many signs of life have come this way.
    pub fn heard(&self) -> u64 {
        self.heard
    }

    /// What to wait for.
    pub fn interest(&self) -> Option<PollFd<'_>> {
        let socket = self.socket.as_ref().filter(|_| self.key.is_some())?;
        Some(PollFd::new(&socket.fd, PollFlags::IN))
    }

    /// Send a sign of life of `term`. It may get lost.
    pub fn send(&mut self, term: Term) {
        let (Some(key), Some(socket)) = (&self.key, &self.socket) else { return };
        self.sent += 1;
        let mut datagram = head(term, self.me, self.sent);
        let mac = blake3::keyed_hash(&key.0, &datagram);
        datagram.extend(mac.as_bytes());
        let fd = socket.fd.as_fd();
        let _ = match (&self.to, socket.is_connected) {
            (_, true) => rustix::io::write(fd, &datagram),
            (Some(to), false) => sendto(fd, &datagram, SendFlags::empty(), to),
            (None, false) => return,
        };
    }

    /// Read what has come; whether any of it is a sign of life of the process that `status` says to be
    /// the peer.
    pub fn receive(&mut self, status: &Status) -> bool {
        let before = self.heard;
        for _ in 0..MOST {
            let mut buffer = [0; LENGTH + 1];
            let (length, from) = match self.read(&mut buffer) {
                Ok(read) => read,
                Err(Errno::AGAIN) => break,
                // Reported once: an earlier datagram has found nobody.
                Err(_) => continue,
            };
            let came = buffer.get(..length).unwrap_or_default();
            if self.counts(came, status) && from.is_some() {
                self.to = from;
            }
        }
        self.heard > before
    }

    fn read(&self, buffer: &mut [u8]) -> Result<(usize, Option<SocketAddrAny>), Errno> {
        match &self.socket {
            None => Err(Errno::AGAIN),
            Some(Socket { fd, is_connected: true }) => Ok((rustix::io::read(fd, buffer)?, None)),
            Some(Socket { fd, .. }) => {
                let (_, length, from) = recvfrom(fd, buffer, RecvFlags::empty())?;
                Ok((length, from))
            }
        }
    }

    fn counts(&mut self, came: &[u8], status: &Status) -> bool {
        let (Some(key), Some(peer)) = (&self.key, status.peer) else { return false };
        let Some((head, mac)) = came.split_at_checked(HEAD) else { return false };
        let Some(number) = head.last_chunk().map(|number| u64::from_le_bytes(*number)) else {
            return false;
        };
        let wanted = self::head(status.term, peer, number);
        let wanted_mac = blake3::keyed_hash(&key.0, &wanted);
        // Hashes are compared in constant time.
        let authentic =
            head == wanted && blake3::Hash::from_slice(mac).is_ok_and(|mac| mac == wanted_mac);
        let (term, sender, last) = self.last;
        let last = if (term, sender) == (status.term, Some(peer)) { last } else { 0 };
        let counts = authentic && number > last;
        if counts {
            self.last = (status.term, Some(peer), number);
            self.heard += 1;
        }
        counts
    }
}

fn head(term: Term, sender: Incarnation, number: u64) -> Vec<u8> {
    let (term, sender) = (term.0.to_le_bytes(), sender.0.to_le_bytes());
    [&MAGIC[..], &term, &sender, &number.to_le_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use replication::Side;

    use super::*;

    const HERE: Incarnation = Incarnation(1);
    const THERE: Incarnation = Incarnation(2);

    fn status(term: u64, peer: Incarnation) -> Status {
        let settings = super::super::settings::of_backup(
            &config::incoming::Arbiter::None,
            std::time::Duration::from_secs(1),
            true,
        );
        let me = replication::Identity { lineage: replication::Lineage(1), incarnation: HERE };
        let primary = replication::Primary::new(me, Term(term), settings, replication::Rules::ALL);
        Status { role: Side::Primary, peer: Some(peer), ..primary.status() }
    }

    fn udp() -> UdpSocket {
        UdpSocket::bind("127.0.0.1:0").unwrap()
    }

    fn end(socket: &UdpSocket, me: Incarnation, key: &Key) -> Beside {
        let mut end = Beside::new(me);
        end.set_socket(Socket::new(socket.try_clone().unwrap().into()).unwrap());
        end.set_key(Some(key.clone()));
        end
    }

    /// Waits for datagrams; whether one counts.
    fn hears(end: &mut Beside, status: &Status) -> bool {
        let mut fds: Vec<_> = end.interest().into_iter().collect();
        let limit = rustix::time::Timespec { tv_sec: 20, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut fds, Some(&limit)), Ok(1));
        end.receive(status)
    }

    #[test]
    fn signs_of_life_reach_an_end_that_does_not_know_where_the_other_one_is() {
        let key = Key::new().unwrap();
        let (near, far) = (udp(), udp());
        near.connect(far.local_addr().unwrap()).unwrap();
        let (mut primary, mut backup) = (end(&near, HERE, &key), end(&far, THERE, &key));
        backup.send(Term(1));
        primary.send(Term(1));
        assert!(hears(&mut backup, &status(1, HERE)));
        backup.send(Term(1));
        assert!(hears(&mut primary, &status(1, THERE)));
        assert_eq!((primary.heard(), backup.heard()), (1, 1), "the first had no address");
    }

    #[test]
    fn what_is_forged_old_or_of_another_term_does_not_count() {
        let key = Key::new().unwrap();
        let (near, far) = (udp(), udp());
        near.connect(far.local_addr().unwrap()).unwrap();
        let mut backup = end(&far, THERE, &key);
        let says = |key: &Key, term, sender, number| {
            let head = head(Term(term), sender, number);
            let mac = blake3::keyed_hash(&key.0, &head);
            near.send(&[&head[..], mac.as_bytes()].concat()).unwrap();
        };
        let primary = status(2, HERE);
        says(&key, 2, HERE, 7);
        assert!(hears(&mut backup, &primary));
        for (key, term, sender, number) in [
            (&key, 2, HERE, 7),
            (&key, 2, HERE, 6),
            (&key, 1, HERE, 8),
            (&key, 3, HERE, 8),
            // A backup's own words, sent back.
            (&key, 2, THERE, 8),
            (&Key::new().unwrap(), 2, HERE, 8),
        ] {
            says(key, term, sender, number);
            assert!(!hears(&mut backup, &primary), "{term} {sender} {number}");
        }
        for length in [0, HEAD - 1, HEAD, HEAD + 31, LENGTH + 1, 2000] {
            near.send(&vec![0; length]).unwrap();
            assert!(!hears(&mut backup, &primary), "{length}");
        }
        says(&key, 2, HERE, 8);
        assert!(hears(&mut backup, &primary), "the next one still counts");
    }

    #[test]
    fn a_key_travels_as_text_and_a_stream_is_no_path() {
        let key = Key::new().unwrap();
        let text = serde_json::to_string(&key).unwrap();
        assert_eq!(text.len(), 66);
        let again: Key = serde_json::from_str(&text).unwrap();
        assert!(again.0 == key.0 && !format!("{key:?}").contains(&text[1..9]));
        assert!(serde_json::from_str::<Key>("\"7\"").is_err());
        let (stream, _) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(Socket::new(stream.into()).is_err());
    }
}
