//! Tests of domains: `stratoctl` and bare-metal guests on this host's own `/dev/kvm`, each test
//! with a registry of its own.
#[path = "ctl/agents.rs"]
mod agents;
#[path = "ctl/ask.rs"]
mod ask;
#[path = "ctl/at_once.rs"]
mod at_once;
#[path = "ctl/attach.rs"]
mod attach;
#[path = "ctl/cold.rs"]
mod cold;
#[path = "ctl/damage.rs"]
mod damage;
#[path = "ctl/disks.rs"]
mod disks;
#[path = "ctl/fences.rs"]
mod fences;
#[path = "ctl/life.rs"]
mod life;
#[path = "ctl/listen.rs"]
mod listen;
#[path = "ctl/matrix.rs"]
mod matrix;
#[path = "ctl/mistakes.rs"]
mod mistakes;
#[path = "ctl/moved.rs"]
mod moved;
#[path = "ctl/policy.rs"]
mod policy;
#[path = "ctl/protected.rs"]
mod protected;
#[path = "ctl/reboot.rs"]
mod reboot;
#[path = "ctl/received.rs"]
mod received;
#[path = "ctl/remus.rs"]
mod remus;
#[path = "ctl/rig.rs"]
mod rig;
#[path = "ctl/saved.rs"]
mod saved;
#[path = "ctl/ssh.rs"]
mod ssh;
#[path = "ctl/stand_in.rs"]
mod stand_in;
#[path = "ctl/two.rs"]
mod two;
#[path = "ctl/witnesses.rs"]
mod witnesses;
