//! A proxy for one stream, TCP or Unix, such as a link between two monitors: it delays it, limits
//! its rate, stops it in either direction, flips bits, and hangs up on either end or on both.
use std::collections::VecDeque;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Bytes that are taken from one end at a time.
const PIECE: usize = 16 << 10;
/// Bytes that may be under way in each direction. Beyond these, the sender has to wait.
const UNDER_WAY: usize = 4 << 20;
/// How long a connection to the far end may take.
const CONNECT: Duration = Duration::from_secs(10);
/// How often a listener looks whether the proxy has ended.
const TURN: Duration = Duration::from_millis(5);

/// Where a stream leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// A TCP port.
    Tcp(SocketAddr),
    /// A socket in the file system.
    Unix(PathBuf),
}

/// A direction of the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From who connects to the proxy, to where that leads.
    Forth,
    /// Back.
    Back,
}

/// How one direction of the stream is treated. The default passes everything on at once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Treatment {
    /// From one end to the other.
    pub delay: Duration,
    /// Bytes per second, if limited. At least 1.
    pub rate: Option<u64>,
    /// Nothing is delivered, not even the stream's end, until this is set to false again. Then
    /// nothing is missing, as on a network that TCP sends on again. The sender has to wait when
    /// 4 MiB are under way.
    pub cut: bool,
}

/// A proxy; when dropped, it hangs up on both ends and listens no more.
pub struct Proxy {
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
    at: Address,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    ended: bool,
    treatments: [Treatment; 2],
    /// Bytes delivered since the proxy's beginning.
    delivered: [u64; 2],
    /// How many bytes further on a bit is flipped.
    flips: [Vec<u64>; 2],
    connections: Vec<Arc<Connection>>,
    accepted: u64,
}

impl Proxy {
    /// Listens at `at`, a free place, and connects each stream to `to`. With port 0 any port is
    /// used; see [`Self::address`]. Both are in the network namespace of the calling thread.
    ///
    /// # Errors
    /// The place is taken, or there are no more threads.
    pub fn new(at: &Address, to: Address) -> Result<Self> {
        let listener = Listener::bind(at).with_context(|| format!("cannot listen at {at:?}"))?;
        let at = match &listener {
            Listener::Tcp(listener) => Address::Tcp(listener.local_addr()?),
            Listener::Unix(_) => at.clone(),
        };
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        // A thread is in the namespace of the one that has started it.
        let thread = thread::Builder::new().name("proxy".to_owned());
        let listener = Some(thread.spawn(move || serve(&listener, &to, &theirs))?);
        Ok(Self { shared, listener, at })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> &Address {
        &self.at
    }

    /// Changes how one direction is treated. What is under way keeps the time of its arrival.
    pub fn set(&self, direction: Direction, treatment: Treatment) {
        let mut state = self.shared.lock();
        if let Some(place) = state.treatments.get_mut(direction as usize) {
            *place = treatment;
        }
        self.shared.changed.notify_all();
    }

    /// Flips one bit, in the byte that comes after that many more bytes of that direction.
    pub fn flip(&self, direction: Direction, after: u64) {
        if let Some(flips) = self.shared.lock().flips.get_mut(direction as usize) {
            flips.push(after);
        }
    }

    /// Hangs up on both ends of every connection that is not forgotten; both notice at once.
    pub fn hang_up(&self) {
        self.each(|connection| {
            if !connection.lock().forgotten {
                connection.close();
            }
        });
    }

    /// Forgets the connections without a word to either end, as a host that loses power: what they
    /// send from now on gets no answer, and they are told of nothing. New connections work.
    pub fn forget(&self) {
        self.each(|connection| connection.lock().forgotten = true);
    }

    /// Hangs up on one end of every connection, the one where `direction` leads. The other end
    /// does not notice, as with [`Self::forget`].
    pub fn half_open(&self, direction: Direction) {
        self.each(|connection| {
            connection.lock().forgotten = true;
            if let Some(end) = connection.ends.get(1 - direction as usize) {
                end.close();
            }
        });
    }

    fn each(&self, act: impl Fn(&Connection)) {
        let mut state = self.shared.lock();
        state.connections.iter().for_each(|connection| act(connection));
        state.connections.retain(|connection| !connection.lock().closed);
        drop(state);
        self.shared.changed.notify_all();
    }

    /// How many bytes of that direction have been delivered.
    #[must_use]
    pub fn delivered(&self, direction: Direction) -> u64 {
        self.shared.lock().delivered.get(direction as usize).copied().unwrap_or_default()
    }

    /// How many connections were made: the others of these functions concern these.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.shared.lock().accepted
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        // A panic there has been printed.
        let _ = self.listener.take().map(JoinHandle::join);
        self.each(Connection::close);
        if let Address::Unix(path) = &self.at {
            // Somebody else may have removed it.
            let _ = fs::remove_file(path);
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn serve(listener: &Listener, to: &Address, shared: &Arc<Shared>) {
    while !shared.lock().ended {
        let near = match listener.accept() {
            Ok(near) => near,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                thread::sleep(TURN);
                continue;
            }
            Err(error) => {
                eprintln!("the proxy does not accept any more: {error}");
                return;
            }
        };
        // Dropping the near end tells who connects that there is nobody.
        if let Ok(far) = Stream::connect(to) {
            let connection = Arc::new(Connection { ends: [near, far], work: Mutex::default() });
            let mut state = shared.lock();
            state.accepted += 1;
            state.connections.push(Arc::clone(&connection));
            drop(state);
            for direction in [Direction::Forth, Direction::Back] {
                let (taking, giving) = (Arc::clone(&connection), Arc::clone(&connection));
                let (takes, gives) = (Arc::clone(shared), Arc::clone(shared));
                thread::spawn(move || take(&taking, direction, &takes));
                thread::spawn(move || give(&giving, direction, &gives));
            }
        }
    }
}

/// The two ends of a stream, who connected first, and what is under way between them.
struct Connection {
    ends: [Stream; 2],
    work: Mutex<Work>,
}

#[derive(Default)]
struct Work {
    under_way: [Queue; 2],
    /// Nothing is delivered, and no end is told so.
    forgotten: bool,
    closed: bool,
}

#[derive(Default)]
struct Queue {
    /// When each piece arrives. An empty one is the stream's end.
    pieces: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    free: Option<Instant>,
}

impl Connection {
    fn lock(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn close(&self) {
        self.lock().closed = true;
        self.ends.iter().for_each(Stream::close);
    }
}

/// Takes what one end sends, until it ends.
fn take(connection: &Connection, direction: Direction, shared: &Shared) {
    let from = direction as usize;
    let mut buffer = [0; PIECE];
    loop {
        let Some(mut end) = connection.ends.get(from) else { return };
        let length = match end.read(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            // A reset, for instance. To the other end it is the end.
            Err(_) => 0,
        };
        let now = Instant::now();
        let mut state = shared.lock();
        loop {
            let mut work = connection.lock();
            if work.closed {
                return;
            }
            if work.forgotten {
                // The sender is to go on sending into the void.
                break;
            }
            let treatment = state.treatments.get(from).copied().unwrap_or_default();
            let Some(queue) = work.under_way.get_mut(from) else { return };
            if queue.bytes < UNDER_WAY {
                let takes = treatment.rate.map_or(Duration::ZERO, |rate| {
                    Duration::from_secs_f64(length as f64 / rate as f64)
                });
                let free = queue.free.map_or(now, |free| free.max(now)) + takes;
                queue.free = Some(free);
                queue.bytes += length;
                let piece = buffer.get(..length).unwrap_or_default().to_vec();
                queue.pieces.push_back((free + treatment.delay, piece));
                break;
            }
            drop(work);
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        shared.changed.notify_all();
        if length == 0 {
            return;
        }
    }
}

/// Delivers what is under way to the other end.
fn give(connection: &Connection, direction: Direction, shared: &Shared) {
    let from = direction as usize;
    loop {
        let mut state = shared.lock();
        let mut piece = loop {
            let mut work = connection.lock();
            if work.closed || work.forgotten {
                return;
            }
            let cut = state.treatments.get(from).is_some_and(|treatment| treatment.cut);
            let Some(queue) = work.under_way.get_mut(from) else { return };
            let now = Instant::now();
            let due = queue.pieces.front().map(|(due, _)| due.saturating_duration_since(now));
            if due == Some(Duration::ZERO) && !cut {
                let Some((_, piece)) = queue.pieces.pop_front() else { return };
                queue.bytes -= piece.len();
                break piece;
            }
            drop(work);
            // Without anything to deliver, until something changes.
            let wait = due.filter(|_| !cut).unwrap_or(CONNECT);
            let waited = shared.changed.wait_timeout(state, wait);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        };
        let length = piece.len() as u64;
        if let Some(flips) = state.flips.get_mut(from) {
            flips.retain_mut(|after| match piece.get_mut(*after as usize) {
                Some(byte) => {
                    *byte ^= 0x10;
                    false
                }
                None => {
                    *after -= length;
                    true
                }
            });
        }
        if let Some(delivered) = state.delivered.get_mut(from) {
            *delivered += length;
        }
        drop(state);
        shared.changed.notify_all();
        let Some(mut to) = connection.ends.get(1 - from) else { return };
        if piece.is_empty() {
            to.end();
            return;
        }
        if to.write_all(&piece).is_err() {
            // The other end has gone: so must this one, unless it is not to know.
            if !connection.lock().forgotten {
                connection.close();
            }
            return;
        }
    }
}

/// A connected socket.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn connect(to: &Address) -> io::Result<Self> {
        match to {
            Address::Tcp(to) => TcpStream::connect_timeout(to, CONNECT).and_then(Self::tcp),
            Address::Unix(to) => UnixStream::connect(to).map(Self::Unix),
        }
    }

    fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self::Tcp(stream))
    }

    /// Errors of the following mean that the other end has gone.
    fn shutdown(&self, how: Shutdown) {
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(how),
            Self::Unix(stream) => stream.shutdown(how),
        };
    }

    fn end(&self) {
        self.shutdown(Shutdown::Write);
    }

    fn close(&self) {
        self.shutdown(Shutdown::Both);
    }
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).read(buffer),
            Stream::Unix(stream) => (&mut &*stream).read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Tcp(stream) => (&mut &*stream).write(bytes),
            Stream::Unix(stream) => (&mut &*stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Listener {
    /// One that does not block.
    fn bind(at: &Address) -> io::Result<Self> {
        match at {
            Address::Tcp(at) => {
                let listener = TcpListener::bind(at)?;
                listener.set_nonblocking(true)?;
                Ok(Self::Tcp(listener))
            }
            Address::Unix(at) => {
                let listener = UnixListener::bind(at)?;
                listener.set_nonblocking(true)?;
                Ok(Self::Unix(listener))
            }
        }
    }

    fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Tcp(listener) => Stream::tcp(listener.accept()?.0),
            Self::Unix(listener) => Ok(Stream::Unix(listener.accept()?.0)),
        }
    }
}

#[cfg(test)]
mod tests;
