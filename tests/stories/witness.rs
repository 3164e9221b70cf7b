//! Tests of replication's witnesses: each is asked by processes of `stratoctl`, as a monitor's
//! questions are, and answers as the protocol's own witness does.
#[path = "witness/conformance.rs"]
mod conformance;
#[path = "witness/dir.rs"]
mod dir;
#[path = "witness/etcd.rs"]
mod etcd;
#[path = "witness/rig.rs"]
mod rig;
