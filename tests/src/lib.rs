//! The harness: starts the monitor, speaks QMP to it, looks inside the guest.
