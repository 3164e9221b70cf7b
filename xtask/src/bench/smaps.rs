//! Divides a monitor's memory into its guest's RAM and its own, from `/proc/PID/smaps`.
use anyhow::{Context, Result, bail};

/// The maximum number of mappings that one piece of the guest's RAM may consist of.
const MOST_PARTS: usize = 4;

/// KiB of memory that a monitor occupies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shares {
    /// Private memory beyond the guest's RAM.
    pub private: u64,
    /// Proportional share beyond the guest's RAM: what several processes map counts in equal parts.
    pub pss: u64,
    /// Proportional share of the guest's RAM.
    pub guest: u64,
}

/// Distinguishes the guest's RAM from everything else: it is a mapping of at least its size
/// (`ram_kib`), or several adjacent ones of exactly its size. No monitor maps anything else of that
/// size, except reserved address space.
///
/// # Errors
/// No mapping is the guest's RAM.
pub fn shares(smaps: &str, ram_kib: u64) -> Result<Shares> {
    let maps = mappings(smaps).context("an invalid line of smaps")?;
    let in_a_row = |maps: &[Mapping]| {
        maps.iter().zip(maps.iter().skip(1)).all(|(one, next)| one.end == next.start)
    };
    let is_ram = |maps: &[Mapping]| match maps {
        [one] => one.kib >= ram_kib,
        several => several.iter().map(|m| m.kib).sum::<u64>() == ram_kib && in_a_row(several),
    };
    // Memory with madvise calls on parts of it is split into as many mappings.
    let ram = (1..=MOST_PARTS).find_map(|parts| {
        let all = maps.windows(parts).enumerate().filter(|(_, maps)| is_ram(maps));
        let found: Vec<_> = all.map(|(at, _)| at..at + parts).collect();
        (!found.is_empty()).then_some(found)
    });
    let Some(ram) = ram else {
        bail!(
            "no mapping of {ram_kib} KiB: cannot distinguish the guest's RAM from the monitor's \
             own memory"
        );
    };
    let mut shares = Shares { private: 0, pss: 0, guest: 0 };
    for (at, mapping) in maps.iter().enumerate() {
        if ram.iter().any(|ram| ram.contains(&at)) {
            shares.guest += mapping.pss;
        } else {
            shares.private += mapping.private;
            shares.pss += mapping.pss;
        }
    }
    Ok(shares)
}

struct Mapping {
    start: u64,
    end: u64,
    kib: u64,
    private: u64,
    pss: u64,
}

/// All mappings except those that only reserve address space.
fn mappings(smaps: &str) -> Option<Vec<Mapping>> {
    let mut maps: Vec<Mapping> = Vec::new();
    let mut reserved = false;
    for line in smaps.lines() {
        let (word, rest) = line.split_once(' ')?;
        if let Some((start, end)) = word.split_once('-') {
            let [start, end] = [start, end].map(|n| u64::from_str_radix(n, 16).ok());
            reserved = rest.starts_with("---");
            if !reserved {
                maps.push(Mapping { start: start?, end: end?, kib: 0, private: 0, pss: 0 });
            }
            continue;
        }
        if reserved {
            continue;
        }
        let kib = || rest.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok();
        let mapping = maps.last_mut()?;
        match word {
            "Size:" => mapping.kib = kib()?,
            "Pss:" => mapping.pss = kib()?,
            "Private_Clean:" | "Private_Dirty:" => mapping.private += kib()?,
            _ => {}
        }
    }
    Some(maps)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
55d0a000-55d0b000 r-xp 00000000 fe:00 1 /bin/monitor
Size:                  8 kB
Pss:                   3 kB
Private_Clean:         4 kB
Private_Dirty:         3 kB
Private_Hugetlb:       0 kB
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Size:             262144 kB
Pss:                9000 kB
Pss_Dirty:          9000 kB
Private_Clean:         0 kB
Private_Dirty:      9000 kB
7f0020000000-7f0040000000 ---p 00000000 00:00 0
Size:             524288 kB
Pss:                   0 kB
7fff0000-7fff1000 rw-p 00000000 00:00 0 [stack]
Size:                132 kB
Pss:                  12 kB
Private_Clean:         0 kB
Private_Dirty:        12 kB
";

    #[test]
    fn the_guests_ram_does_not_count() {
        assert_eq!(shares(SMAPS, 262_144).unwrap(), Shares { private: 19, pss: 15, guest: 9000 });
    }

    #[test]
    fn ram_in_several_mappings_does_not_count_either() {
        let (first, rest) =
            ("7f0000000000-7f0000200000 rw-p 0 00:00 0", "7f0000200000-7f0010000000");
        let parts = SMAPS.replace(
            "7f0000000000-7f0010000000 rw-p 00000000 00:00 0\nSize:             262144 kB",
            &format!("{first}\nSize: 2048 kB\nPrivate_Dirty: 40 kB\n{rest} rw-p 0 00:00 0\nSize: 260096 kB"),
        );
        assert_eq!(shares(&parts, 262_144).unwrap().private, 19);
        let apart = parts.replace(rest, "7f0000300000-7f0010100000");
        assert!(shares(&apart, 262_144).is_err());
    }

    #[test]
    fn without_a_mapping_for_ram_there_is_no_figure() {
        assert!(shares(SMAPS, 262_145).is_err());
    }
}
