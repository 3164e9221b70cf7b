//! Tests with bare-metal guests: a few instructions each, on this host's own `/dev/kvm`, even where
//! it cannot run Linux. Without `/dev/kvm` they fail, and the monitor's message says what to do.
#[path = "bare_metal/balloon.rs"]
mod balloon;
#[path = "bare_metal/blk.rs"]
mod blk;
#[path = "bare_metal/busy_snapshot.rs"]
mod busy_snapshot;
#[path = "bare_metal/clock.rs"]
mod clock;
#[path = "bare_metal/confined.rs"]
mod confined;
#[path = "bare_metal/counters.rs"]
mod counters;
#[path = "bare_metal/ends.rs"]
mod ends;
#[path = "bare_metal/exact.rs"]
mod exact;
#[path = "bare_metal/generation.rs"]
mod generation;
#[path = "bare_metal/golden.rs"]
mod golden;
#[path = "bare_metal/halts.rs"]
mod halts;
#[path = "bare_metal/hand_over.rs"]
mod hand_over;
#[path = "bare_metal/held.rs"]
mod held;
#[path = "bare_metal/hostile_snapshot.rs"]
mod hostile_snapshot;
#[path = "bare_metal/huge_pages.rs"]
mod huge_pages;
#[path = "bare_metal/hung.rs"]
mod hung;
#[path = "bare_metal/kept.rs"]
mod kept;
#[path = "bare_metal/meanwhile.rs"]
mod meanwhile;
#[path = "bare_metal/mistakes.rs"]
mod mistakes;
#[path = "bare_metal/nic.rs"]
mod nic;
#[path = "bare_metal/plug.rs"]
mod plug;
#[path = "bare_metal/plug_refused.rs"]
mod plug_refused;
#[path = "bare_metal/plugged.rs"]
mod plugged;
#[path = "bare_metal/process.rs"]
mod process;
#[path = "bare_metal/reload.rs"]
mod reload;
#[path = "bare_metal/return_path.rs"]
mod return_path;
#[path = "bare_metal/run_state.rs"]
mod run_state;
#[path = "bare_metal/save_faults.rs"]
mod save_faults;
#[path = "bare_metal/snapshot.rs"]
mod snapshot;
#[path = "bare_metal/spot_check.rs"]
mod spot_check;
#[path = "bare_metal/stage.rs"]
mod stage;
#[path = "bare_metal/stream.rs"]
mod stream;
#[path = "bare_metal/talk.rs"]
mod talk;
#[path = "bare_metal/words.rs"]
mod words;
