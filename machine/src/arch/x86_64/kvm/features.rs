//! The CPU features that a saved guest needs: the CPUID leaves that it has seen.
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use state::{cpu as saved, hex::Hex};

use crate::kvm::KvmError;

/// One CPUID leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leaf {
    pub function: u32,
    pub index: u32,
    pub flags: u32,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

impl From<Leaf> for saved::Leaf {
    fn from(leaf: Leaf) -> Self {
        let Leaf { function, index, flags, eax, ebx, ecx, edx } = leaf;
        Self {
            function: Hex(function),
            index: Hex(index),
            flags: Hex(flags),
            eax: Hex(eax),
            ebx: Hex(ebx),
            ecx: Hex(ecx),
            edx: Hex(edx),
        }
    }
}

impl From<saved::Leaf> for Leaf {
    fn from(leaf: saved::Leaf) -> Self {
        let saved::Leaf { function, index, flags, eax, ebx, ecx, edx } = leaf;
        Self {
            function: function.0,
            index: index.0,
            flags: flags.0,
            eax: eax.0,
            ebx: ebx.0,
            ecx: ecx.0,
            edx: edx.0,
        }
    }
}

/// The leaves of `cpuid`.
pub fn leaves(cpuid: &CpuId) -> Vec<Leaf> {
    let leaf = |e: &kvm_cpuid_entry2| Leaf {
        function: e.function,
        index: e.index,
        flags: e.flags,
        eax: e.eax,
        ebx: e.ebx,
        ecx: e.ecx,
        edx: e.edx,
    };
    cpuid.as_slice().iter().map(leaf).collect()
}

/// The leaves in KVM's form.
///
/// # Errors
/// When there are more than KVM takes.
pub fn cpuid(leaves: &[Leaf]) -> Result<CpuId, KvmError> {
    let entry = |l: &Leaf| kvm_cpuid_entry2 {
        function: l.function,
        index: l.index,
        flags: l.flags,
        eax: l.eax,
        ebx: l.ebx,
        ecx: l.ecx,
        edx: l.edx,
        ..Default::default()
    };
    let entries: Vec<_> = leaves.iter().map(entry).collect();
    CpuId::from_entries(&entries).map_err(|_| KvmError::Ioctl {
        what: "accept so many CPUID leaves",
        source: kvm_ioctls::Error::new(libc::E2BIG),
    })
}

#[derive(Clone, Copy)]
enum Word {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Word {
    fn of(self, leaf: &Leaf) -> u32 {
        match self {
            Self::Eax => leaf.eax,
            Self::Ebx => leaf.ebx,
            Self::Ecx => leaf.ecx,
            Self::Edx => leaf.edx,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Eax => "EAX",
            Self::Ebx => "EBX",
            Self::Ecx => "ECX",
            Self::Edx => "EDX",
        }
    }
}

/// Words in which each bit is a feature that a guest may use once it has seen it. The mask excludes
/// bits that describe the CPU without promising a feature.
const FEATURES: [(u32, u32, Word, u32); 13] = [
    // OSXSAVE (27) mirrors the guest's CR4.
    (1, 0, Word::Ecx, !(1 << 27)),
    // HTT (28) describes the topology.
    (1, 0, Word::Edx, !(1 << 28)),
    // CPUID 7: FDP_EXCPTN_ONLY (6) and no FPU CS/DS (13) mean the absence of a feature.
    (7, 0, Word::Ebx, !(1 << 6 | 1 << 13)),
    // OSPKE (4) mirrors CR4; MAWAU (17 to 21) is a number.
    (7, 0, Word::Ecx, !(1 << 4 | 0x1f << 17)),
    (7, 0, Word::Edx, !0),
    (7, 1, Word::Eax, !0),
    // State components, low and high half.
    (0xd, 0, Word::Eax, !0),
    (0xd, 1, Word::Eax, !0),
    (0x8000_0001, 0, Word::Ecx, !0),
    (0x8000_0001, 0, Word::Edx, !0),
    (0x8000_0007, 0, Word::Edx, !0),
    (0x8000_0008, 0, Word::Ebx, !0),
    (0x4000_0001, 0, Word::Eax, !0),
];

/// Names of the most common features; others are reported by leaf and bit.
#[rustfmt::skip]
const NAMES: [(u32, u32, &str, u32, &str); 50] = [
    (1, 0, "ECX", 0, "sse3"), (1, 0, "ECX", 1, "pclmulqdq"), (1, 0, "ECX", 3, "monitor"),
    (1, 0, "ECX", 5, "vmx"), (1, 0, "ECX", 9, "ssse3"), (1, 0, "ECX", 12, "fma"),
    (1, 0, "ECX", 13, "cx16"), (1, 0, "ECX", 17, "pcid"), (1, 0, "ECX", 19, "sse4_1"),
    (1, 0, "ECX", 20, "sse4_2"), (1, 0, "ECX", 21, "x2apic"), (1, 0, "ECX", 22, "movbe"),
    (1, 0, "ECX", 23, "popcnt"), (1, 0, "ECX", 24, "tsc_deadline_timer"), (1, 0, "ECX", 25, "aes"),
    (1, 0, "ECX", 26, "xsave"), (1, 0, "ECX", 28, "avx"), (1, 0, "ECX", 29, "f16c"),
    (1, 0, "ECX", 30, "rdrand"), (7, 0, "EBX", 0, "fsgsbase"), (7, 0, "EBX", 3, "bmi1"),
    (7, 0, "EBX", 4, "hle"), (7, 0, "EBX", 5, "avx2"), (7, 0, "EBX", 7, "smep"),
    (7, 0, "EBX", 8, "bmi2"), (7, 0, "EBX", 9, "erms"), (7, 0, "EBX", 10, "invpcid"),
    (7, 0, "EBX", 11, "rtm"), (7, 0, "EBX", 16, "avx512f"), (7, 0, "EBX", 18, "rdseed"),
    (7, 0, "EBX", 19, "adx"), (7, 0, "EBX", 20, "smap"), (7, 0, "EBX", 23, "clflushopt"),
    (7, 0, "EBX", 24, "clwb"), (7, 0, "EBX", 29, "sha_ni"), (7, 0, "ECX", 2, "umip"),
    (7, 0, "ECX", 3, "pku"), (7, 0, "ECX", 8, "gfni"), (7, 0, "ECX", 9, "vaes"),
    (7, 0, "ECX", 16, "la57"), (7, 0, "ECX", 22, "rdpid"), (7, 0, "EDX", 26, "spec_ctrl"),
    (7, 0, "EDX", 31, "ssbd"), (0xd, 1, "EAX", 0, "xsaveopt"), (0xd, 1, "EAX", 1, "xsavec"),
    (0xd, 1, "EAX", 3, "xsaves"), (0x8000_0001, 0, "EDX", 20, "nx"),
    (0x8000_0001, 0, "EDX", 26, "pdpe1gb"), (0x8000_0001, 0, "EDX", 27, "rdtscp"),
    (0x8000_0001, 0, "EDX", 29, "lm"),
];

/// Why a guest that has seen `saved` cannot run on vCPUs with `host`: the first feature missing.
pub fn missing(host: &[Leaf], saved: &[Leaf]) -> Option<String> {
    let find = |leaves: &[Leaf], function, index| {
        leaves.iter().find(|l| l.function == function && l.index == index).copied()
    };
    let vendor = |leaves: &[Leaf]| {
        let l = find(leaves, 0, 0)?;
        let bytes: Vec<u8> = [l.ebx, l.edx, l.ecx].iter().flat_map(|w| w.to_le_bytes()).collect();
        Some(String::from_utf8_lossy(&bytes).into_owned())
    };
    let (here, there) = (vendor(host), vendor(saved));
    if here != there {
        let name = |v: Option<String>| v.unwrap_or_else(|| "unknown".into());
        return Some(format!(
            "it was saved on a CPU by {:?}; this one is by {:?}",
            name(there),
            name(here)
        ));
    }
    FEATURES.iter().find_map(|(function, index, word, mask)| {
        let of = |leaves| find(leaves, *function, *index).map_or(0, |l| word.of(&l));
        let lacks = of(saved) & !of(host) & mask;
        if lacks == 0 {
            return None;
        }
        let bit = lacks.trailing_zeros();
        let place = format!("CPUID {function:#x}.{index} {} bit {bit}", word.name());
        let named = NAMES
            .iter()
            .find(|n| (n.0, n.1, n.2, n.3) == (*function, *index, word.name(), bit))
            .map(|n| n.4);
        Some(match named {
            Some(name) => {
                format!("the guest uses the CPU feature {name} ({place}); this host lacks it")
            }
            None => format!("the guest uses a CPU feature ({place}) that this host lacks"),
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> Leaf {
        Leaf { function, index: 0, flags: 0, eax, ebx, ecx, edx }
    }

    const AMD: [u32; 4] = [0x10, 0x6874_7541, 0x444d_4163, 0x6974_6e65];
    const INTEL: [u32; 4] = [0x10, 0x756e_6547, 0x6c65_746e, 0x4965_6e69];

    #[test]
    fn the_first_missing_feature_is_named() {
        let host = [leaf(0, AMD), leaf(1, [0, 0, 1, 0])];
        assert_eq!(missing(&host, &host), None);
        assert_eq!(missing(&host, &[leaf(0, AMD)]), None, "a host may have more");
        let wants = [leaf(0, AMD), leaf(1, [0, 0, 1 | 1 << 25, 0])];
        assert!(missing(&host, &wants).unwrap().contains("feature aes (CPUID 0x1.0 ECX bit 25)"));
        let wants = [leaf(0, AMD), leaf(7, [0, 0, 0, 2])];
        assert!(missing(&host, &wants).unwrap().contains("(CPUID 0x7.0 EDX bit 1)"));
    }

    #[test]
    fn another_vendor_is_refused_by_name() {
        let (amd, intel) = ([leaf(0, AMD)], [leaf(0, INTEL)]);
        let why = missing(&amd, &intel).unwrap();
        assert!(why.contains("\"GenuineIntel\"") && why.contains("\"AuthenticAMD\""), "{why}");
    }

    #[test]
    fn what_only_describes_is_no_feature() {
        let host = [leaf(0, AMD), leaf(1, [0, 0, 0, 0])];
        let seen = [leaf(0, AMD), leaf(1, [7, 7, 1 << 27, 1 << 28])];
        assert_eq!(missing(&host, &seen), None);
    }
}
