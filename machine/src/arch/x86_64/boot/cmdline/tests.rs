//! How a guest learns of its devices.
use super::super::tests::SLOTS;
use super::*;

const LINUX: Option<KernelWords> = Some(KernelWords { acpi: true, virtio_mmio: false });
const LINUX_WITHOUT_ACPI: Option<KernelWords> =
    Some(KernelWords { acpi: false, virtio_mmio: true });
const PAYLOAD: Option<KernelWords> = Some(KernelWords { acpi: false, virtio_mmio: false });
const BOTH: &str = " virtio_mmio.device=4K@0xf0100000:5 virtio_mmio.device=4K@0xf0101000:6";

/// The additions to the command line, and the number of devices in the ACPI tables.
fn discovery(user: &str, kernel: Option<KernelWords>) -> (String, Option<usize>) {
    let discovery = discover(user, &SLOTS, || kernel);
    (discovery.cmdline.added, discovery.acpi.map(|slots| slots.len()))
}

#[test]
fn every_device_is_described_in_exactly_one_way() {
    let acpi = (String::new(), Some(2));
    let line = (BOTH.to_owned(), None);
    let cases = [
        ("console=ttyS0", None, &acpi),
        ("console=ttyS0", LINUX, &acpi),
        ("console=ttyS0", PAYLOAD, &acpi),
        ("console=ttyS0", LINUX_WITHOUT_ACPI, &line),
        ("acpi=force", LINUX_WITHOUT_ACPI, &acpi),
        ("acpi=off", LINUX, &line),
        ("quiet acpi=off panic=1", None, &line),
        // The last one takes precedence.
        ("acpi=off acpi=force", None, &acpi),
        ("acpi=force acpi=off", None, &line),
        // Not the exact word, or not among the kernel's parameters.
        ("xacpi=off acpi=offline acpi=of", None, &acpi),
        ("quiet -- acpi=off", None, &acpi),
    ];
    for (user, kernel, expected) in cases {
        assert_eq!(&discovery(user, kernel), expected, "{user} {kernel:?}");
    }
}

#[test]
fn a_device_that_the_user_declares_is_left_to_him() {
    let second = " virtio_mmio.device=4K@0xf0101000:6".to_owned();
    for first in [
        "virtio_mmio.device=4K@0xf0100000:5",
        "virtio_mmio.device=0x1000@0XF0100000:5:7",
        "virtio_mmio.device=512@4027580416:5",
    ] {
        assert_eq!(
            discovery(&format!("acpi=off {first}"), None),
            (second.clone(), None),
            "{first}"
        );
        assert_eq!(discovery(first, None), (String::new(), Some(1)), "{first}");
    }
    for nothing in ["virtio_mmio.device=", "virtio_mmio.device=4K@:5", "virtio_mmio.device=4K@0x"] {
        assert_eq!(discovery(nothing, None), (String::new(), Some(2)), "{nothing}");
    }
}

#[test]
fn the_users_words_stay_as_they_are() {
    let composed =
        |user: &str, kernel| check(discover(user, &SLOTS, || kernel).cmdline, false, 2047).unwrap();
    for user in ["", " ", "a  b=\"c d\"\tx", "root=UUID=1-2 rootflags=data=ordered -- s"] {
        assert_eq!(composed(user, LINUX), user);
        assert!(composed(user, LINUX_WITHOUT_ACPI).contains(BOTH.trim()));
    }
    assert_eq!(composed("a  b", LINUX_WITHOUT_ACPI), format!("a  b{BOTH}"));
    assert_eq!(composed("a -- b", LINUX_WITHOUT_ACPI), format!("a{BOTH} -- b"));
    assert_eq!(composed("-- b", LINUX_WITHOUT_ACPI), format!("{} -- b", BOTH.trim()));
    assert_eq!(composed("a --b", LINUX_WITHOUT_ACPI), format!("a --b{BOTH}"));
}

#[test]
fn bytes_that_a_kernel_would_not_read_are_refused() {
    let error = |user: &str| {
        check(discover(user, &[], || None).cmdline, false, 2047).unwrap_err().to_string()
    };
    assert!(error("a\0b").starts_with("it has a zero byte at byte 1; only printable ASCII"));
    assert!(error("a\n").contains("a line break at byte 1"));
    assert!(error("\u{1b}[0m").contains("a control character (0x1b) at byte 0"));
    assert!(error("name=J\u{f6}rg").contains("\"\u{f6}\" at byte 6"));
}

#[test]
fn what_is_added_counts() {
    let discovery = discover("acpi=off", &SLOTS, || None);
    let len = "acpi=off".len() + BOTH.len();
    assert_eq!(
        check(discovery.cmdline, true, len - 1),
        Err(CmdlineError::TooLong { len, added: BOTH.len(), max: len - 1 })
    );
}

#[test]
fn linux_is_told_that_there_is_no_pci() {
    let line =
        |user: &str, linux, max| check(discover(user, &[], || LINUX).cmdline, linux, max).unwrap();
    assert_eq!(line("quiet", true, 2047), "quiet pci=off");
    assert_eq!(line("quiet -- pci=x", true, 2047), "quiet pci=off -- pci=x");
    assert_eq!(line("", true, 2047), " pci=off");
    // Something else, or a user who has decided.
    assert_eq!(line("quiet", false, 2047), "quiet");
    for decided in ["pci=off", "quiet pci=noearly,nocrs"] {
        assert_eq!(line(decided, true, 2047), decided);
    }
    // As long as the kernel reads.
    assert_eq!(line("quiet", true, 13), "quiet pci=off");
    assert_eq!(line("quiet", true, 12), "quiet");
}
