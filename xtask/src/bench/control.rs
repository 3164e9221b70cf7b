//! How a monitor is controlled: by QMP, or by HTTP over a Unix socket.
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use qmp::client::Client;

/// How long an answer may take unless more is allowed.
const LIMIT: Duration = Duration::from_secs(20);

/// The protocol a monitor speaks.
#[derive(Debug, Clone, Copy)]
pub enum Protocol {
    /// QEMU's.
    Qmp,
    /// Requests of HTTP.
    Http {
        /// Answers as soon as the monitor answers any request.
        ready: Request,
        /// The nearest equivalent of `query-status`.
        status: Request,
        /// Stops the vCPUs.
        stop: Request,
        /// Lets them run again.
        cont: Request,
    },
}

/// Method, path and body.
pub type Request = (&'static str, &'static str, &'static str);

/// A connection that answers.
pub enum Connection {
    /// QMP, capabilities negotiated.
    Qmp(Client),
    /// HTTP.
    Http {
        /// The connection; requests follow one another on it.
        stream: BufReader<UnixStream>,
        /// The requests for status, stop and cont.
        requests: [Request; 3],
    },
}

/// A request to a monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verb {
    /// The run state.
    Status,
    /// Stop all vCPUs.
    Stop,
    /// Let them run again.
    Cont,
}

impl Connection {
    /// Connects, and waits until requests are answered. Also returns that moment.
    ///
    /// # Errors
    /// No monitor listens (yet), or the answer is not a monitor's.
    pub fn open(protocol: Protocol, socket: &Path) -> Result<(Self, Instant)> {
        match protocol {
            Protocol::Qmp => {
                let mut client = Client::connect(socket, Duration::ZERO)?;
                client.set_timeout(LIMIT);
                let ready = Instant::now();
                client.execute_raw("qmp_capabilities", json!({}))?;
                Ok((Self::Qmp(client), ready))
            }
            Protocol::Http { ready, .. } => {
                let mut connection = Self::connect(protocol, socket)?;
                if let Self::Http { stream, .. } = &mut connection {
                    exchange(stream, ready)?;
                }
                Ok((connection, Instant::now()))
            }
        }
    }

    /// Connects. With QMP it waits for the greeting; with HTTP the monitor may not answer requests
    /// yet.
    ///
    /// # Errors
    /// No monitor listens (yet), or it does not speak QMP.
    pub fn connect(protocol: Protocol, socket: &Path) -> Result<Self> {
        match protocol {
            Protocol::Qmp => Self::open(protocol, socket).map(|(connection, _)| connection),
            Protocol::Http { status, stop, cont, .. } => {
                let stream = UnixStream::connect(socket)
                    .with_context(|| format!("cannot connect to {}", socket.display()))?;
                stream.set_read_timeout(Some(LIMIT))?;
                let stream = BufReader::new(stream);
                Ok(Self::Http { stream, requests: [status, stop, cont] })
            }
        }
    }

    /// Sets the time limit of every later answer to `limit`.
    ///
    /// # Errors
    /// The connection is closed.
    pub fn set_limit(&mut self, limit: Duration) -> Result<()> {
        match self {
            Self::Qmp(client) => client.set_timeout(limit),
            Self::Http { stream, .. } => stream.get_ref().set_read_timeout(Some(limit))?,
        }
        Ok(())
    }

    /// Sends a command of QMP.
    ///
    /// # Errors
    /// The monitor refuses, or speaks HTTP.
    pub fn command(&mut self, name: &str, arguments: Value) -> Result<Value> {
        match self {
            Self::Qmp(client) => Ok(client.execute_raw(name, arguments)?),
            Self::Http { .. } => bail!("{name} has no HTTP request"),
        }
    }

    /// Sends a command of QMP with a descriptor, which gets the name `name` in the monitor.
    ///
    /// # Errors
    /// The monitor refuses, or speaks HTTP.
    pub fn hand_over(&mut self, name: &str, file: BorrowedFd<'_>) -> Result<()> {
        match self {
            Self::Qmp(client) => {
                client.execute_with_fds("getfd", json!({ "fdname": name }), &[file])?;
                Ok(())
            }
            Self::Http { .. } => bail!("files cannot be passed by HTTP"),
        }
    }

    /// Sends a request of HTTP.
    ///
    /// # Errors
    /// The monitor refuses, or speaks QMP.
    pub fn request(&mut self, method: &str, path: &str, body: &Value) -> Result<()> {
        match self {
            Self::Http { stream, .. } => exchange(stream, (method, path, &body.to_string())),
            Self::Qmp(_) => bail!("{method} {path} has no QMP command"),
        }
    }

    /// Sends a request; returns how long the answer took.
    ///
    /// # Errors
    /// The monitor refuses, or does not answer.
    pub fn ask(&mut self, verb: Verb) -> Result<Duration> {
        match self {
            Self::Qmp(client) => {
                let name = match verb {
                    Verb::Status => "query-status",
                    Verb::Stop => "stop",
                    Verb::Cont => "cont",
                };
                let started = Instant::now();
                client.execute_raw(name, json!({}))?;
                Ok(started.elapsed())
            }
            Self::Http { stream, requests: [status, stop, cont] } => {
                let request = match verb {
                    Verb::Status => *status,
                    Verb::Stop => *stop,
                    Verb::Cont => *cont,
                };
                let started = Instant::now();
                exchange(stream, request)?;
                Ok(started.elapsed())
            }
        }
    }
}

/// Sends a request and reads the whole answer.
fn exchange(stream: &mut BufReader<UnixStream>, request: (&str, &str, &str)) -> Result<()> {
    let (method, path, body) = request;
    let about = || format!("{method} {path}");
    let length = body.len();
    let text = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    stream.get_mut().write_all(text.as_bytes()).with_context(about)?;
    let mut status = String::new();
    stream.read_line(&mut status).with_context(about)?;
    let mut bytes = 0;
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof)).with_context(about);
        }
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            bytes = value.trim().parse().with_context(about)?;
        }
    }
    let mut body = Vec::new();
    stream.take(bytes).read_to_end(&mut body).with_context(about)?;
    let code = status.split(' ').nth(1).unwrap_or_default();
    ensure!(
        code.starts_with('2'),
        "{}: {} {}",
        about(),
        status.trim_end(),
        String::from_utf8_lossy(&body)
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    const HTTP: Protocol = Protocol::Http {
        ready: ("GET", "/", ""),
        status: ("GET", "/vm", ""),
        stop: ("PATCH", "/vm", r#"{"state":"Paused"}"#),
        cont: ("PATCH", "/vm", r#"{"state":"Resumed"}"#),
    };

    /// Answers one request after another from `answers`, and returns the requests.
    fn server(answers: &'static [&'static str]) -> (tempdir::Dir, thread::JoinHandle<String>) {
        let dir = tempdir::Dir::new();
        let listener = UnixListener::bind(dir.socket()).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = String::new();
            for answer in answers {
                let mut buffer = [0; 4096];
                let bytes = stream.read(&mut buffer).unwrap();
                asked.push_str(&String::from_utf8_lossy(&buffer[..bytes]));
                stream.write_all(answer.as_bytes()).unwrap();
            }
            asked
        });
        (dir, server)
    }

    mod tempdir {
        use std::path::PathBuf;
        use std::sync::atomic::{AtomicU32, Ordering};

        pub struct Dir(PathBuf);

        impl Dir {
            pub fn new() -> Self {
                static COUNT: AtomicU32 = AtomicU32::new(0);
                let count = COUNT.fetch_add(1, Ordering::Relaxed);
                let dir =
                    std::env::temp_dir().join(format!("control.{}.{count}", std::process::id()));
                std::fs::create_dir_all(&dir).unwrap();
                Self(dir)
            }

            pub fn socket(&self) -> PathBuf {
                self.0.join("socket")
            }
        }

        impl Drop for Dir {
            fn drop(&mut self) {
                let _ = std::fs::remove_dir_all(&self.0);
            }
        }
    }

    #[test]
    fn requests_follow_one_another_on_one_connection() {
        let (dir, server) = server(&[
            "HTTP/1.1 200 \r\nContent-length: 4\r\n\r\n{  }",
            "HTTP/1.1 204 \r\n\r\n",
            "HTTP/1.1 204 No Content\r\nServer: x\r\n\r\n",
        ]);
        let (mut connection, _) = Connection::open(HTTP, &dir.socket()).unwrap();
        connection.ask(Verb::Stop).unwrap();
        connection.ask(Verb::Cont).unwrap();
        let asked = server.join().unwrap();
        let paused = asked.find(r#"Content-Length: 18"#).unwrap();
        assert!(asked[paused..].contains("\r\n\r\n{\"state\":\"Paused\"}PATCH /vm HTTP/1.1"));
    }

    #[test]
    fn an_answer_may_take_as_long_as_is_allowed_for_it() {
        let dir = tempdir::Dir::new();
        let listener = UnixListener::bind(dir.socket()).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut buffer = [0; 4096];
            assert!(stream.read(&mut buffer).unwrap() > 0);
            stream.write_all(b"HTTP/1.1 200 \r\n\r\n").unwrap();
            // The second request is read but not answered, until the client times out.
            while stream.read(&mut buffer).unwrap() > 0 {}
        });
        let (mut connection, _) = Connection::open(HTTP, &dir.socket()).unwrap();
        connection.set_limit(Duration::from_millis(10)).unwrap();
        connection.ask(Verb::Stop).unwrap_err();
        drop(connection);
        server.join().unwrap();
    }

    #[test]
    fn a_refusal_is_told_with_its_reason() {
        let (dir, server) =
            server(&["HTTP/1.1 200 \r\n\r\n", "HTTP/1.1 400 \r\nContent-Length: 7\r\n\r\nbecause"]);
        let (mut connection, _) = Connection::open(HTTP, &dir.socket()).unwrap();
        let error = connection.ask(Verb::Stop).unwrap_err().to_string();
        assert!(error.contains("PATCH /vm") && error.ends_with("because"), "{error}");
        server.join().unwrap();
    }
}
