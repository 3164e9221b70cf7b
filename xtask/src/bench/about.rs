//! Where and when figures were measured: without that they mean little.
use std::fs;
use std::thread::available_parallelism;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use time::OffsetDateTime;

/// The host and the day of a comparison.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct About {
    /// The day it began (UTC), `YYYY-MM-DD`.
    pub date: String,
    /// Processors, their model, and the kernel.
    pub host: String,
}

impl About {
    /// This host, now.
    #[must_use]
    pub fn here_and_now() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let now = OffsetDateTime::from_unix_timestamp(now.cast_signed()).ok();
        let cpus = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let count = available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            date: now.map_or_else(String::new, |now| now.date().to_string()),
            host: host(count, &cpus, kernel.trim()),
        }
    }
}

fn host(count: usize, cpuinfo: &str, kernel: &str) -> String {
    let field = |name: &str| {
        let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
        Some(line.split_once(':')?.1.trim())
    };
    let model = field("model name").unwrap_or("x86-64");
    let virtualises =
        field("flags").is_some_and(|all| all.split(' ').any(|flag| matches!(flag, "vmx" | "svm")));
    let kvm = if virtualises { "" } else { ", KVM without hardware virtualization (PVM)" };
    format!("{count} x {model}, Linux {kernel}{kvm}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_its_processors_its_kernel_and_its_kind_of_kvm() {
        let cpus = "processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nflags\t\t: fpu vmx sse\n";
        assert_eq!(host(2, cpus, "6.1"), "2 x A CPU @ 2 GHz, Linux 6.1");
        let text = host(1, "", "6.1");
        assert_eq!(text, "1 x x86-64, Linux 6.1, KVM without hardware virtualization (PVM)");
    }

    #[test]
    fn a_date_has_four_two_and_two_digits() {
        let date = About::here_and_now().date;
        let lengths: Vec<_> = date.split('-').map(str::len).collect();
        assert_eq!(lengths, [4, 2, 2], "{date}");
    }
}
