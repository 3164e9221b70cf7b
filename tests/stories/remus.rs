//! Tests of a guest that outlives its host. It counts, writes memory and writes to its disk, on one
//! of two hosts of a network of the test's own; a client outside notices whatever is lost or done
//! twice.
#[path = "remus/backup.rs"]
mod backup;
#[path = "remus/disks.rs"]
mod disks;
#[path = "remus/failover.rs"]
mod failover;
#[path = "remus/guest.rs"]
mod guest;
#[path = "remus/killed.rs"]
mod killed;
#[path = "remus/link.rs"]
mod link;
#[path = "remus/slow.rs"]
mod slow;

use std::env;
use std::sync::Arc;

use anyhow::Result;
use libtest_mimic::{Arguments, Failed, Trial};
use stories::agent::{Agents, NamedTest, SERVE, Test, serve};
use stories::paths::GUEST_KERNEL;

const STORIES: &[(&str, Test)] = &[
    ("the_guest_counts_writes_and_records", guest::works),
    ("a_guest_that_is_migrated_counts_on_at_the_other_host", guest::migrates),
    ("a_killed_primary_loses_no_record", disks::nothing_is_lost),
    ("the_counter_goes_on_when_the_primary_is_killed", failover::counter_goes_on),
    ("the_counter_goes_on_through_many_failovers", failover::again_and_again),
    ("a_primary_that_stands_still_comes_back", backup::flaps),
    ("a_backup_that_stands_still_is_taken_again", backup::is_taken_again),
    ("a_backup_that_is_killed_is_not_missed", backup::is_killed),
    ("a_backup_that_is_lost_early_is_not_missed", killed::before_it_is_armed),
    ("a_backup_that_hangs_is_replaced_in_the_next_term_only", killed::is_replaced),
    ("a_backup_that_cannot_run_the_guest_gives_it_back", backup::gives_back),
    ("a_paused_guest_stays_paused_at_its_backup", backup::stays_paused),
    ("a_guest_that_reboots_stays_protected", backup::reboots),
    ("a_guest_that_has_ended_stays_so", backup::ends),
    ("twenty_failovers_leave_nothing_behind", backup::leaves_nothing),
    ("a_host_that_loses_power_is_replaced", link::host_vanishes),
    ("a_link_that_is_cut_leaves_one_owner", link::is_cut),
    ("a_stopped_primary_says_nothing_later", link::primary_is_stopped),
    ("loss_and_delay_are_no_failure", link::is_bad),
    ("a_link_that_is_too_slow_slows_the_guest_down", slow::link_is_slow),
    ("a_backup_whose_storage_fails_costs_the_guest_nothing", slow::storage_fails),
    ("flipped_bits_end_a_connection_and_nothing_else", link::flips_bits),
];

fn main() -> Result<()> {
    let all: Vec<NamedTest> =
        STORIES.iter().map(|(name, body)| ((*name).to_owned(), *body)).collect();
    if env::args().nth(1).as_deref() == Some(SERVE) {
        return serve(&all);
    }
    let mut args = Arguments::from_args();
    // They are about time.
    args.test_threads = Some(1);
    let agents = Arc::new(match env::var_os(GUEST_KERNEL) {
        Some(_) => Agents::native(args.nocapture),
        None => Agents::new(args.nocapture),
    });
    let trial = |(name, _): NamedTest| {
        let agents = Arc::clone(&agents);
        Trial::test(name.clone(), move || {
            agents.run(&name).map_err(|error| Failed::from(format!("{error:#}")))
        })
    };
    let conclusion = libtest_mimic::run(&args, all.into_iter().map(trial).collect());
    agents.finish()?;
    conclusion.exit()
}
