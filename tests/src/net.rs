//! Tap devices for tests. Tests run in a network namespace of their own (or in an emulated host),
//! so the names and addresses are free.
use anyhow::Result;

use crate::debian::{Debian, output};

/// A tap device with an address; removed when dropped.
pub struct Tap {
    name: String,
    debian: Debian,
}

impl Tap {
    /// Makes tap device `name` with `address` (`10.0.0.1/24`) on the host's side.
    ///
    /// # Errors
    /// This process may not create one, or the name is taken.
    pub fn create(debian: &Debian, name: &str, address: &str) -> Result<Self> {
        let tap = Self { name: name.to_owned(), debian: debian.clone() };
        tap.ip(&["tuntap", "add", "mode", "tap", "name", name])?;
        // The same MAC address for all, as behind a bridge: a guest that is restored on another tap
        // finds the neighbour that it knows.
        tap.ip(&["link", "set", name, "address", "02:00:00:00:00:01"])?;
        tap.ip(&["addr", "add", address, "dev", name])?;
        tap.ip(&["link", "set", name, "up"])?;
        Ok(tap)
    }

    fn ip(&self, args: &[&str]) -> Result<()> {
        output(self.debian.program("bin/ip")?.args(args)).map(drop)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // Without it there is nothing to remove.
        let _ = self.ip(&["link", "del", &self.name]);
    }
}
