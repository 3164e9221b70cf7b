//! Integration tests with real Linux guests: an unmodified Debian kernel boots, its devices work,
//! and QMP controls it. Each test starts a monitor of its own.
#[path = "linux/balloon.rs"]
mod balloon;
#[path = "linux/boot.rs"]
mod boot;
#[path = "linux/devices.rs"]
mod devices;
#[path = "linux/examples.rs"]
mod examples;
#[path = "linux/life.rs"]
mod life;
#[path = "linux/matrix.rs"]
mod matrix;
#[path = "linux/plugged.rs"]
mod plugged;
#[path = "linux/snapshot.rs"]
mod snapshot;

use std::env;
use std::sync::Arc;

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};
use snapshot::Shape;
use stories::agent::{Agents, EXAMPLES, NamedTest, SERVE, Test, serve};
use stories::paths::{GUEST_KERNEL, Paths, SEED, workspace};
use stories::{emulated, seed};

/// A machine that an emulated host saves and restores in seconds.
const SMALL: Shape = Shape { native: false, cpus: 1, mib: 256, restores: 1 };
/// The given kernel supports only one vCPU on PVM.
const NATIVE: Shape = Shape { native: true, cpus: 1, mib: 256, restores: 10 };

/// Tests that need Debian's kernel, or something that the given one lacks: several processors, a
/// stopped clock, a keyboard, a power button, a panic that is reported.
const STORIES: &[(&str, Test)] = &[
    ("an_elf_kernel_boots", boot::elf),
    ("a_bzimage_boots", boot::bzimage),
    ("a_flat_kernel_boots", boot::flat),
    ("four_vcpus_come_up", boot::four_vcpus),
    ("without_acpi_the_serial_port_and_reset_work", boot::without_acpi),
    ("the_guests_clock_stands_still_while_stopped", |story| life::stop_and_cont(story, SMALL)),
    ("the_guest_reboots_and_ctrl_alt_del_makes_it", |story| life::reboot(story, SMALL)),
    ("the_power_button_ends_the_guest", |story| life::powerdown(story, SMALL)),
    ("a_panic_in_the_guest_is_told", |story| life::panic(story, SMALL)),
    ("a_busy_guest_of_four_vcpus_and_more_than_4_gib_is_saved_and_goes_on", |story| {
        snapshot::stopped(story, Shape { cpus: 4, mib: 4608, ..SMALL })
    }),
];

/// Tests that need no particular kernel: where one is given, the same is tested [`NATIVELY`], and
/// only a sample of these runs in the emulated host.
const SAMPLED: &[(&str, Test)] = &[
    ("the_root_file_system_lies_on_a_disk", |story| boot::root_on_a_disk(story, SMALL)),
    ("memory_reaches_above_4_gib", |story| boot::memory_above_4_gib(story, SMALL)),
    ("a_file_written_in_the_guest_is_in_the_image", |story| {
        devices::file_in_the_image(story, SMALL)
    }),
    ("a_read_only_disk_stays_as_it_is", |story| devices::read_only_disk(story, SMALL)),
    ("ping_and_tcp_cross_the_tap", |story| devices::ping_and_tcp(story, SMALL)),
    ("reset_boots_the_kernel_again", |story| life::reset(story, SMALL)),
    ("quit_ends_the_monitor", |story| life::quit(story, SMALL)),
    ("poweroff_in_the_guest_ends_the_monitor", |story| life::poweroff(story, SMALL)),
    ("a_busy_guest_is_saved_and_goes_on_ten_times", |story| {
        snapshot::stopped(story, Shape { restores: 10, ..SMALL })
    }),
    ("a_busy_guest_is_saved_while_it_runs_on", |story| snapshot::live(story, SMALL)),
    ("a_guest_is_saved_at_any_moment_of_its_boot", |story| snapshot::any_moment(story, SMALL, 4)),
    ("slots_change_in_six_of_sixty_ways_while_it_runs", |story| {
        matrix::sample(story, SMALL, false, 6)
    }),
    ("slots_change_in_six_of_sixty_ways_while_stopped", |story| {
        matrix::sample(story, SMALL, true, 6)
    }),
    ("the_guest_makes_a_file_system_on_a_plugged_disk", |story| {
        plugged::made_by_the_guest(story, SMALL)
    }),
];

/// Run with a given kernel on this machine's own KVM, which does not run Debian's.
const NATIVELY: &[(&str, Test)] = &[
    ("natively_a_busy_guest_is_saved_and_goes_on_ten_times", |story| {
        snapshot::stopped(story, Shape { mib: 5120, ..NATIVE })
    }),
    ("natively_a_busy_guest_is_saved_while_it_runs_on", |story| snapshot::live(story, NATIVE)),
    ("natively_a_guest_is_saved_at_any_moment_of_its_boot", |story| {
        snapshot::any_moment(story, NATIVE, 50)
    }),
    ("natively_disks_come_and_go_through_every_kind_of_save", plugged::slots),
    ("natively_slots_change_in_sixty_ways_while_it_runs", |story| {
        matrix::whole(story, NATIVE, false)
    }),
    ("natively_slots_change_in_sixty_ways_while_stopped", |story| {
        matrix::whole(story, NATIVE, true)
    }),
    ("natively_the_guest_makes_a_file_system_on_a_plugged_disk", |story| {
        plugged::made_by_the_guest(story, NATIVE)
    }),
    ("natively_the_root_file_system_lies_on_a_disk", |story| boot::root_on_a_disk(story, NATIVE)),
    ("natively_memory_reaches_above_4_gib", |story| boot::memory_above_4_gib(story, NATIVE)),
    ("natively_a_file_written_in_the_guest_is_in_the_image", |story| {
        devices::file_in_the_image(story, NATIVE)
    }),
    ("natively_a_read_only_disk_stays_as_it_is", |story| devices::read_only_disk(story, NATIVE)),
    ("natively_ping_and_tcp_cross_the_tap", |story| devices::ping_and_tcp(story, NATIVE)),
    ("natively_reset_boots_the_kernel_again", |story| life::reset(story, NATIVE)),
    ("natively_quit_ends_the_monitor", |story| life::quit(story, NATIVE)),
    ("natively_poweroff_in_the_guest_ends_the_monitor", |story| life::poweroff(story, NATIVE)),
    ("natively_half_of_the_memory_goes_into_the_balloon", |story| balloon::half(story, NATIVE)),
    ("natively_what_the_guest_frees_goes_back", |story| balloon::freed(story, NATIVE)),
    // Debian's kernel does not support virtio-mmio devices on its command line.
    ("natively_virtio_works_without_acpi", boot::virtio_without_acpi),
];

/// All of `all` except most of [`SAMPLED`], chosen differently each time.
fn sample(all: Vec<NamedTest>) -> Result<Vec<NamedTest>> {
    let is_sampled = |(name, _): &NamedTest| SAMPLED.iter().any(|(known, _)| known == name);
    let (mut sampled, mut chosen): (Vec<_>, Vec<_>) = all.into_iter().partition(is_sampled);
    let seed = seed::get()?;
    fastrand::Rng::with_seed(seed).shuffle(&mut sampled);
    sampled.truncate(emulated::SAMPLE);
    eprintln!(
        "{SEED}={seed}: {} of the {} tests that run natively, too, run in the emulated host; \
         {}=all runs all of them.",
        sampled.len(),
        SAMPLED.len(),
        emulated::VARIABLE,
    );
    chosen.extend(sampled);
    Ok(chosen)
}

fn main() -> Result<()> {
    let serving = env::args().nth(1).as_deref() == Some(SERVE);
    let mut all = [STORIES, SAMPLED].concat();
    if env::var_os(GUEST_KERNEL).is_some() {
        all.extend(NATIVELY);
    } else if !serving {
        eprintln!(
            "Debian's kernel has no virtio_mmio.device= parameter: {GUEST_KERNEL}=VMLINUX adds the \
             test of virtio without ACPI, and saves and restores that kernel on this machine's own \
             KVM."
        );
    }
    let mut all: Vec<NamedTest> =
        all.into_iter().map(|(name, body)| (name.to_owned(), body)).collect();
    let home = if serving { Paths::from_env()?.cache } else { workspace().to_owned() };
    all.extend(examples::stories(&home.join(EXAMPLES))?);
    if serving {
        return serve(&all);
    }
    let mut args = Arguments::from_args();
    // An emulated host keeps one processor busy.
    args.test_threads = Some(args.test_threads.unwrap_or(2).min(2));
    if args.filter.is_none() && !args.list && emulated::is_sampled()? {
        all = sample(all)?;
    }
    let agents = Arc::new(Agents::new(args.nocapture));
    let natively = Arc::new(Agents::native(args.nocapture));
    let trial = |(name, _): NamedTest| {
        let native = NATIVELY.iter().any(|(known, _)| *known == name);
        let agents = Arc::clone(if native { &natively } else { &agents });
        Trial::test(name.clone(), move || {
            agents.run(&name).map_err(|error| Failed::from(format!("{error:#}")))
        })
    };
    let conclusion = libtest_mimic::run(&args, all.into_iter().map(trial).collect());
    agents.finish()?;
    natively.finish()?;
    conclusion.exit()
}
