//! A client of the replicated guest (`init/replicated.rs`): a line each way.
use std::io::{self, BufRead, BufReader, ErrorKind, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::counted::{FIRST_HASH, PAGE, checksum, fill, record};
use crate::lab::hosts::{GUEST, Hosts};
use crate::lab::namespace::Namespace;

/// How long an attempt to connect may take.
const ATTEMPT: Duration = Duration::from_secs(1);
/// Longest answer.
const LONGEST: usize = 256;

/// A connection to the guest.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<TcpStream>,
}

impl Client {
    /// Connects from outside as soon as the guest is there.
    ///
    /// # Errors
    /// It is not within `limit`.
    pub fn connect(hosts: &Hosts, limit: Duration) -> Result<Self> {
        Self::from_namespace(&hosts.outside, limit)
    }

    /// Connects from that namespace as soon as the guest is there.
    ///
    /// # Errors
    /// It is not within `limit`.
    pub fn from_namespace(namespace: &Namespace, limit: Duration) -> Result<Self> {
        namespace.enter(|| Self::here(limit))?
    }

    /// Connects from the calling thread's namespace.
    pub(super) fn here(limit: Duration) -> Result<Self> {
        let deadline = Instant::now() + limit;
        loop {
            match TcpStream::connect_timeout(&GUEST, ATTEMPT) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    return Ok(Self { stream: BufReader::new(stream) });
                }
                Err(error) if Instant::now() >= deadline => {
                    return Err(error).context("cannot connect to the guest");
                }
                // It may come up at any moment.
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// A second handle of the connection.
    pub(super) fn stream(&self) -> Result<TcpStream> {
        Ok(self.stream.get_ref().try_clone()?)
    }

    /// Sends a request and returns the answer, which may take `limit`. Afterwards an error has to
    /// end the connection: an answer that comes late would be taken for the next one.
    ///
    /// # Errors
    /// The connection breaks, or the answer does not come in time.
    pub fn ask(&mut self, request: &str, limit: Duration) -> io::Result<String> {
        let stream = self.stream.get_mut();
        stream.set_write_timeout(Some(limit))?;
        stream.write_all(format!("{request}\n").as_bytes())?;
        let deadline = Instant::now() + limit;
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(ErrorKind::TimedOut.into());
            }
            self.stream.get_mut().set_read_timeout(Some(left))?;
            let got = match self.stream.fill_buf() {
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                other => other?,
            };
            let end = got.iter().position(|byte| *byte == b'\n').map_or(got.len(), |at| at + 1);
            line.extend(got.get(..end).unwrap_or_default());
            if end == 0 || line.len() > LONGEST {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            self.stream.consume(end);
        }
        line.pop();
        String::from_utf8(line).map_err(io::Error::other)
    }

    /// The same for what must succeed.
    ///
    /// # Errors
    /// As [`Self::ask`], or the guest answers with an error.
    pub fn get(&mut self, request: &str, limit: Duration) -> Result<String> {
        let answer = self.ask(request, limit).with_context(|| format!("asking for {request}"))?;
        ensure!(!answer.starts_with("error"), "{request}: {answer}");
        Ok(answer)
    }

    /// From now on the guest writes the first `bytes` bytes of each of `pages` pages every `period`;
    /// with 0 pages, it is idle.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn write(
        &mut self,
        pages: u64,
        bytes: usize,
        period: Duration,
        limit: Duration,
    ) -> Result<()> {
        let answer = self.get(&format!("write {pages} {bytes} {}", period.as_millis()), limit)?;
        ensure!(answer == "ok", "{answer}");
        Ok(())
    }

    /// Checks the memory that the guest writes; returns how many rounds it has written.
    ///
    /// # Errors
    /// As [`Self::get`], or a byte is wrong.
    pub fn check_memory(&mut self, limit: Duration) -> Result<u64> {
        let answer = self.get("memory", limit)?;
        let words: Vec<_> = answer.split(' ').collect();
        let [round, pages, bytes, sum] = words.as_slice() else { bail!("memory: {answer}") };
        let (round, pages, bytes) = (round.parse()?, pages.parse()?, bytes.parse()?);
        let wanted = format!("{:016x}", expected(round, pages, bytes));
        ensure!(*sum == wanted, "the guest's memory is wrong: {answer}, must be {wanted}");
        Ok(round)
    }

    /// Lets the guest write the next record to its disk; returns its number, from 1.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn record(&mut self, limit: Duration) -> Result<u64> {
        Ok(self.get("record", limit)?.parse()?)
    }

    /// Lets the guest read all records back from its disk; returns how many there are.
    ///
    /// # Errors
    /// As [`Self::get`], or one is missing.
    pub fn check_records(&mut self, limit: Duration) -> Result<u64> {
        Ok(self.get("records", limit)?.parse()?)
    }

    /// KiB of memory that the guest's kernel could still give.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn free(&mut self, limit: Duration) -> Result<u64> {
        Ok(self.get("free", limit)?.parse()?)
    }

    /// Milliseconds of the guest's monotonic clock.
    ///
    /// # Errors
    /// As [`Self::get`].
    pub fn uptime(&mut self, limit: Duration) -> Result<u64> {
        Ok(self.get("uptime", limit)?.parse()?)
    }
}

/// How many records, from the first on, are in the contents of a disk.
#[must_use]
pub fn records_in(image: &[u8]) -> u64 {
    let mut wanted = [0; PAGE];
    let found = (1..).zip(image.chunks_exact(PAGE)).take_while(|(number, block)| {
        record(*number, &mut wanted);
        *block == wanted
    });
    found.count() as u64
}

/// The checksum of `pages` pages of which the first `bytes` bytes each were written in `round`
/// rounds; before the first, they are zero.
fn expected(round: u64, pages: u64, bytes: usize) -> u64 {
    let mut page = [0; PAGE];
    (0..pages).fold(FIRST_HASH, |sum, number| {
        if round > 0 {
            fill(&mut page, round, number, bytes);
        }
        checksum(sum, &page)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_another_round_or_place_changes_the_checksum() {
        let right = expected(7, 3, 128);
        let mut pages = [[0; PAGE]; 3];
        for (number, page) in (0..).zip(&mut pages) {
            fill(page, 7, number, 128);
        }
        let sum =
            |pages: &[[u8; PAGE]]| pages.iter().fold(FIRST_HASH, |sum, page| checksum(sum, page));
        assert_eq!(sum(&pages), right);
        let mut stale = pages;
        fill(&mut stale[1], 6, 1, 128);
        assert_ne!(sum(&stale), right);
        pages.swap(0, 2);
        assert_ne!(sum(&pages), right);
        assert_ne!(expected(0, 3, 128), right);
    }

    #[test]
    fn records_are_counted_up_to_the_first_that_is_missing() {
        let mut image = vec![0; 5 * PAGE];
        for (number, block) in (1..).zip(image.chunks_exact_mut(PAGE)).take(4) {
            record(number, block);
        }
        assert_eq!(records_in(&image), 4);
        image[2 * PAGE + 100] ^= 1;
        assert_eq!(records_in(&image), 2);
    }
}
